"""Evidence: maps of what a sentence, an answer or a text rests on."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from med3dvlm.service import reviews, studies, work
from med3dvlm.service.api.common import (
    Core,
    JobId,
    MayExplain,
    MayRead,
    StudyId,
    nudge,
    unchanging,
)
from med3dvlm.service.api.schemas import EvidenceIn, JobStarted
from med3dvlm.service.audit import record
from med3dvlm.service.studies import NotThere, Unusable, evidence_key

router = APIRouter(tags=["evidence"])


@router.post("/api/studies/{study_id}/evidence", status_code=202, response_model=JobStarted)
def explain(
    study_id: StudyId, what: EvidenceIn, request: Request, identity: MayExplain, core: Core
) -> dict[str, Any]:
    """Make a map; the job's result says where it is and where it peaks."""
    given = {n: getattr(what, n) for n in ("sentence", "question", "text") if getattr(what, n)}
    if len(given) != 1:
        raise Unusable("Give one of sentence, question and text.")
    with core.database.session() as session:
        studies.get_ready(session, study_id)
        if what.sentence:
            reviews.find_sentence(session, study_id, what.sentence)
        if what.text:
            _ = core.index.model  # refused here, and not by the worker, where there is none
        job = work.submit(
            session, core.settings, "evidence", study_id, identity, method=what.method, **given
        )
        record(session, identity, "evidence.make", f"study/{study_id}", job=job.id)
        started = {"job": work.describe(session, job)}
    nudge(request)
    return started


@router.get("/api/evidence/{job_id}/map.nii.gz", response_class=FileResponse)
def evidence_map(job_id: JobId, request: Request, identity: MayRead, core: Core) -> Response:
    """The map on the scan's own grid, in percent of its most."""
    with core.database.reading() as session:
        job = work.find(session, job_id)
    if job is None or job.kind != "evidence" or job.state != "done":
        raise NotThere(f"There is no map of job {job_id}.")
    try:
        path = core.storage.fetch(evidence_key(job.study_id, job.id))
    except FileNotFoundError as error:
        raise NotThere(f"The map of job {job_id} is gone.") from error
    return unchanging(request, path, "application/gzip", job.id)
