"""To and from the hospital: exports of signed reports and of evidence, the PACS."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Query, Response
from pydantic import BaseModel, StringConstraints

from med3dvlm.service import hospital, imports, work
from med3dvlm.service.access import Identity, require
from med3dvlm.service.api.common import Core, JobId, Problem, QueryText, StudyId
from med3dvlm.service.api.schemas import JobsOut, JobStarted
from med3dvlm.service.audit import record
from med3dvlm.service.core import Service

if TYPE_CHECKING:
    from med3dvlm.hospital import Pacs

router = APIRouter(tags=["hospital"])

MayExport = Annotated[Identity, Depends(require("reports:export"))]
MaySend = Annotated[Identity, Depends(require("reports:send"))]
MayQuery = Annotated[Identity, Depends(require("pacs:query"))]
MayImport = Annotated[Identity, Depends(require("pacs:import"))]

Format = Literal["sr", "basic-text-sr", "encapsulated-pdf", "pdf", "fhir", "text", "json"]
DicomFormat = Literal["sr", "basic-text-sr", "encapsulated-pdf"]
EvidenceFormat = Literal["seg", "parametric-map"]
FhirVersion = Literal["r5", "r4"]
Uid = Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)*$", max_length=64)]
KINDS = (
    "application/dicom",
    "application/pdf",
    "application/fhir+json",
    "application/json",
    "text/plain",
)
Answers = dict[int | str, dict[str, Any]]
FILE: Answers = {
    200: {
        "description": "The file.",
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in KINDS},
    }
}
DICOM_FILE: Answers = {
    200: {
        "description": "The DICOM file.",
        "content": {KINDS[0]: {"schema": {"type": "string", "format": "binary"}}},
    }
}
BAD_GATEWAY: Answers = {502: {"model": Problem, "description": "The PACS failed."}}


class SendIn(BaseModel):
    """What is sent to the PACS.

    Attributes:
        evidence: evidence jobs whose maps go with the report, as `evidence_format`.
    """

    format: DicomFormat = "sr"
    evidence: list[Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]] = []
    evidence_format: EvidenceFormat = "seg"


class SentOut(BaseModel):
    sent: int
    format: str
    pacs: str
    sop_instance_uids: list[str]


class PacsOut(BaseModel):
    configured: bool
    url: str


class PacsStudy(BaseModel):
    study_uid: str
    patient_name: str
    patient_id: str
    accession_number: str
    study_date: str
    modalities: list[str]
    description: str
    series: int | None
    images: int | None


class PacsStudies(BaseModel):
    studies: list[PacsStudy]


class PacsSeries(BaseModel):
    series_uid: str
    has_images: bool
    number: int | None
    modality: str
    description: str
    images: int | None


class PacsSeriesList(BaseModel):
    series: list[PacsSeries]


class ImportIn(BaseModel):
    study_uid: Uid
    series_uid: Uid | None = None


@router.get("/api/studies/{study_id}/export", response_class=Response, responses=FILE)
def export(
    study_id: StudyId,
    identity: MayExport,
    core: Core,
    format: Annotated[Format, Query(description="sr and the like are DICOM files.")],
    version: Annotated[FhirVersion, Query(description="Of FHIR.")] = "r5",
) -> Response:
    """A signed report as a file; a draft is refused."""
    if format == "json":
        text = json.dumps(hospital.report_json(core, study_id), ensure_ascii=False, indent=1)
        data, kind, suffix = text.encode(), "application/json", ".json"
    else:
        made = hospital.export_report(core, study_id, format, version)
        data, kind, suffix = made.data, made.media_type, made.suffix
    _note(core, identity, "report.export", study_id, format=format)
    return _file(data, kind, f"report-{study_id[:8]}{suffix}")


@router.get(
    "/api/studies/{study_id}/evidence/{job_id}/export",
    response_class=Response,
    responses=DICOM_FILE,
)
def export_evidence(
    study_id: StudyId,
    job_id: JobId,
    identity: MayExport,
    core: Core,
    format: Annotated[EvidenceFormat, Query()],
) -> Response:
    """An evidence map as DICOM, on the geometry of the images."""
    from med3dvlm.hospital import dicom_bytes

    data = dicom_bytes(hospital.evidence_object(core, study_id, job_id, format))
    _note(core, identity, "evidence.export", study_id, format=format, job=job_id)
    return _file(data, "application/dicom", f"evidence-{job_id[:8]}-{format}.dcm")


@router.post("/api/studies/{study_id}/send", response_model=SentOut, responses=BAD_GATEWAY)
def send(study_id: StudyId, what: SendIn, identity: MaySend, core: Core) -> dict[str, Any]:
    """Store a signed report, and maps with it, in the PACS; the same again is stored once."""
    report, signed = hospital.report_object(core, study_id, what.format)
    objects = [report]
    for job_id in dict.fromkeys(what.evidence):
        objects.append(hospital.evidence_object(core, study_id, job_id, what.evidence_format))
    uids = [str(one.SOPInstanceUID) for one in objects]
    with _pacs(core) as pacs:
        address = str(pacs.address)
        # before, so that nothing leaves that the log does not know of
        details = {"format": what.format, "pacs": address, "objects": uids}
        _note(core, identity, "report.send", study_id, **details)
        sent = pacs.send(objects)
    hospital.note_left(core, signed, what.format, report)
    return {"sent": sent, "format": what.format, "pacs": address, "sop_instance_uids": uids}


@router.get("/api/pacs", response_model=PacsOut)
def pacs_facts(identity: MayQuery, core: Core) -> dict[str, Any]:
    """Whether there is a PACS, and where."""
    return {"configured": bool(core.settings.pacs_url), "url": core.settings.pacs_url}


@router.get("/api/pacs/studies", response_model=PacsStudies, responses=BAD_GATEWAY)
def find(
    identity: MayQuery,
    core: Core,
    patient_id: Annotated[QueryText, Query()] = "",
    patient_name: Annotated[QueryText, Query(description="* stands for any letters.")] = "",
    accession_number: Annotated[QueryText, Query()] = "",
    study_date: Annotated[QueryText, Query(description="20250131 or 20250101-20250131.")] = "",
    modality: Annotated[QueryText, Query()] = "",
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> dict[str, Any]:
    """Studies of the PACS that fit."""
    given = {
        "PatientID": patient_id,
        "PatientName": patient_name,
        "AccessionNumber": accession_number,
        "StudyDate": study_date,
        "ModalitiesInStudy": modality,
    }
    filters = {keyword: value for keyword, value in given.items() if value.strip()}
    with _pacs(core) as pacs:
        found = pacs.find(limit=limit, **filters)
    with core.database.session() as session:
        record(session, identity, "pacs.query", "pacs", by=sorted(filters), found=len(found))
    return {"studies": [hospital.describe_found(one) for one in found]}


@router.get(
    "/api/pacs/studies/{study_uid}/series", response_model=PacsSeriesList, responses=BAD_GATEWAY
)
def series(study_uid: Uid, identity: MayQuery, core: Core) -> dict[str, Any]:
    """The series of a study of the PACS."""
    with _pacs(core) as pacs:
        return {"series": [hospital.describe_series(one) for one in pacs.series(study_uid)]}


@router.post("/api/pacs/import", status_code=202, response_model=JobStarted)
def fetch(what: ImportIn, identity: MayImport, core: Core) -> dict[str, Any]:
    """Fetch a series from the PACS; where it is being fetched already, that is the answer.

    The job's result names the study, which may be one that is here already (`new`).
    """
    with core.database.session() as session:
        job = imports.ask_for(session, core.settings, identity, what.study_uid, what.series_uid)
        return {"job": work.describe(session, job)}


@router.get("/api/pacs/imports", response_model=JobsOut)
def fetches(identity: MayImport, core: Core) -> dict[str, Any]:
    """What is being fetched, and what could not be in the last hour; the newest first."""
    with core.database.reading() as session:
        return {"jobs": [work.describe(session, job) for job in imports.listed(session)]}


@contextmanager
def _failures() -> Iterator[None]:
    """What the PACS did wrong is a bad gateway's answer."""
    try:
        yield
    except hospital.PacsFailure as error:
        headers = {"Retry-After": "10"} if error.passing else None
        raise HTTPException(502, str(error), headers) from error


@contextmanager
def _pacs(core: Service) -> Iterator[Pacs]:
    with _failures(), hospital.connect(core.settings) as pacs:
        yield pacs


def _note(core: Service, identity: Identity, action: str, study_id: str, **details: Any) -> None:
    with core.database.session() as session:
        record(session, identity, action, f"study/{study_id}", **details)


def _file(data: bytes, kind: str, name: str) -> Response:
    headers = {
        "Content-Disposition": f'attachment; filename="{name}"',
        "Cache-Control": "no-store",
    }
    return Response(data, media_type=kind, headers=headers)
