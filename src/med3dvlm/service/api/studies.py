"""Studies: taking in, the worklist, volumes for the viewer."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse

from med3dvlm.service import studies, uploads
from med3dvlm.service.api.common import (
    BIG,
    Core,
    MayDelete,
    MayRead,
    MayUpload,
    QueryText,
    StudyId,
    nudge,
    unchanging,
)
from med3dvlm.service.api.schemas import ReportState, StudyOut, StudyState, WorklistOut
from med3dvlm.service.audit import record
from med3dvlm.service.studies import THUMBNAIL, VOLUME, NotThere, key

router = APIRouter(prefix="/api/studies", tags=["studies"])


@router.post(
    "",
    status_code=202,
    response_model=StudyOut,
    responses={200: {"model": StudyOut, "description": "The same content is there already."}},
    openapi_extra=uploads.OPENAPI,
)
def upload(
    request: Request,
    response: Response,
    identity: MayUpload,
    core: Core,
    received: Annotated[uploads.Upload, Depends(uploads.received)],
    series: Annotated[QueryText | None, Query(description="SeriesInstanceUID or number.")] = None,
) -> dict[str, Any]:
    """Take in a NIfTI file, the DICOM files of a series, or a zip of either."""
    study, new = studies.receive(
        core, received.scan, identity, name=received.name, notes=received.notes, series=series
    )
    response.status_code = 202 if new else 200
    nudge(request)
    return studies.describe(core, study)


@router.get("", response_model=WorklistOut)
def worklist(
    identity: MayRead,
    core: Core,
    text: Annotated[QueryText, Query()] = "",
    state: Annotated[StudyState | None, Query()] = None,
    report: Annotated[ReportState | None, Query(description="State of the report.")] = None,
    cursor: Annotated[int | None, Query(ge=0, le=BIG)] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> dict[str, Any]:
    """The worklist, newest first: by words in name, id, accession number or description."""
    with core.database.reading() as session:
        found = studies.worklist(
            session, text=text, state=state, report=report, before=cursor, limit=limit + 1
        )
    more = len(found) > limit
    return {
        "studies": [studies.describe(core, study) for study in found[:limit]],
        "next": str(found[limit - 1].number) if more else None,
    }


@router.get("/{study_id}", response_model=StudyOut)
def one(study_id: StudyId, identity: MayRead, core: Core) -> dict[str, Any]:
    """A study."""
    with core.database.reading() as session:
        return studies.describe(core, studies.get(session, study_id))


@router.delete("/{study_id}", status_code=204)
def delete(
    study_id: StudyId,
    identity: MayDelete,
    core: Core,
    signed: Annotated[bool, Query(description="Also where its report is signed.")] = False,
) -> None:
    """Throw a study away, with everything that was made of it."""
    studies.remove(core, study_id, identity, signed=signed)


@router.get("/{study_id}/volume.nii.gz", response_class=FileResponse)
def volume(study_id: StudyId, request: Request, identity: MayRead, core: Core) -> Response:
    """The scan in canonical order, as NIfTI; that somebody looked at it is noted."""
    with core.database.session() as session:
        studies.get_ready(session, study_id)
        record(session, identity, "study.view", f"study/{study_id}")
    return _file(request, core, study_id, VOLUME, "application/gzip")


@router.get("/{study_id}/thumbnail.png", response_class=FileResponse)
def thumbnail(study_id: StudyId, request: Request, identity: MayRead, core: Core) -> Response:
    """Axial, coronal and sagittal through the middle."""
    return _file(request, core, study_id, THUMBNAIL, "image/png")


def _file(request: Request, core: Core, study_id: str, name: str, kind: str) -> Response:
    with core.database.reading() as session:
        study = studies.get_ready(session, study_id)
    try:
        path = core.storage.fetch(key(study_id, name))
    except FileNotFoundError as error:
        raise NotThere(f"The file {name} of study {study_id} is gone.") from error
    return unchanging(request, path, kind, f"{study.voxels[:32]}-{name}")
