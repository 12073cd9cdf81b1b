"""Reports: drafting, editing, signing, what changed; corrections for training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import StreamingResponse

from med3dvlm.notice import notice_of
from med3dvlm.service import reviews, studies, work
from med3dvlm.service.api.common import (
    BIG,
    Core,
    MayDraft,
    MayEdit,
    MayExportCorrections,
    MayRead,
    MaySign,
    StudyId,
    nudge,
)
from med3dvlm.service.api.schemas import (
    AddendumIn,
    AddendumOut,
    ChangesOut,
    DraftIn,
    EditIn,
    JobStarted,
    ReportOut,
    ReportVersionOut,
    SignatureOut,
    SignIn,
)
from med3dvlm.service.audit import record
from med3dvlm.service.tables import Addendum, ReportVersion, Signature

router = APIRouter(tags=["reports"])

Threshold = Annotated[
    float | None, Query(ge=0, le=1, description="Withhold what is less sure; else the setting.")
]


@router.post("/api/studies/{study_id}/report", status_code=202, response_model=JobStarted)
def draft(
    study_id: StudyId, how: DraftIn, request: Request, identity: MayDraft, core: Core
) -> dict[str, Any]:
    """Draft a report; where one is being drafted already, that is the answer."""
    with core.database.session() as session:
        study = studies.get_ready(session, study_id)
        if study.report_state == "final":
            raise studies.Conflict("The report is signed; write an addendum.")
        job = work.active(session, study_id, "report")
        if job is None:
            job = work.submit(
                session, core.settings, "report", study_id, identity, method=how.method
            )
            study.report_state = "drafting"
            record(session, identity, "report.draft", f"study/{study_id}", method=how.method)
        started = {"job": work.describe(session, job)}
    nudge(request)
    return started


@router.get("/api/studies/{study_id}/report", response_model=ReportOut)
def report(
    study_id: StudyId, identity: MayRead, core: Core, threshold: Threshold = None
) -> dict[str, Any]:
    """The report as it stands."""
    threshold = core.settings.threshold if threshold is None else threshold
    with core.database.reading() as session:
        study = studies.get(session, study_id)
        signature = session.get(Signature, study_id)
        versions = reviews.versions(session, study_id)
        last = versions[-1] if versions else None
        facts = dict(last.facts) if last else {}
        sentences = last.sentences if last else []
        return {
            "state": study.report_state,
            "version": last.version if last else 0,
            "versions": [_version(one, signature) for one in versions],
            "sentences": _sentences(sentences, facts, threshold),
            "text": reviews.as_text([s for s in sentences if s["status"] != "rejected"]),
            "signature": _signature(signature) if signature else None,
            "addenda": [_addendum(one) for one in reviews.addenda(session, study_id)],
            **{name: facts.get(name) for name in ("method", "model", "weights", "preparation")},
            "calibrated": bool(facts.get("calibrated")),
            "threshold": threshold,
            "notice": notice_of(str(facts.get("model") or core.settings.model)),
        }


@router.put("/api/studies/{study_id}/report", response_model=ReportOut)
def edit(study_id: StudyId, edited: EditIn, identity: MayEdit, core: Core) -> dict[str, Any]:
    """Write a new version, made from the latest."""
    sentences = [one.model_dump() for one in edited.sentences]
    with core.database.session() as session:
        studies.get_ready(session, study_id)
        reviews.edit(session, study_id, identity, edited.base_version, sentences)
    return report(study_id, identity, core)


@router.post("/api/studies/{study_id}/report/sign", response_model=SignatureOut)
def sign(
    study_id: StudyId, signing: SignIn, request: Request, identity: MaySign, core: Core
) -> dict[str, Any]:
    """Sign the latest version; once answered, the signature is on the disk."""
    with core.database.session() as session:
        signature = reviews.sign(session, study_id, identity, signing.version, signing.name)
    nudge(request)
    return _signature(signature)


@router.post("/api/studies/{study_id}/report/addendum", status_code=201, response_model=AddendumOut)
def addendum(study_id: StudyId, added: AddendumIn, identity: MaySign, core: Core) -> dict[str, Any]:
    """Add to a signed report."""
    with core.database.session() as session:
        written = reviews.add_addendum(session, study_id, identity, added.text, added.name)
    return _addendum(written)


@router.get("/api/studies/{study_id}/report/versions/{number}", response_model=ReportVersionOut)
def version(
    study_id: StudyId,
    number: Annotated[int, Path(ge=1, le=BIG)],
    identity: MayRead,
    core: Core,
    threshold: Threshold = None,
) -> dict[str, Any]:
    """An earlier version."""
    threshold = core.settings.threshold if threshold is None else threshold
    with core.database.reading() as session:
        found = reviews.version(session, study_id, number)
        kept = [s for s in found.sentences if s["status"] != "rejected"]
        return {
            **_version(found, session.get(Signature, study_id)),
            "sentences": _sentences(found.sentences, found.facts, threshold),
            "text": reviews.as_text(kept),
        }


@router.get("/api/studies/{study_id}/report/changes", response_model=ChangesOut)
def changes(study_id: StudyId, identity: MayRead, core: Core) -> dict[str, Any]:
    """From the model's draft to what stands now, sentence by sentence."""
    with core.database.reading() as session:
        studies.get(session, study_id)
        return {"changes": reviews.changes(session, study_id)}


@router.get("/api/corrections.jsonl", response_class=StreamingResponse)
def corrections(identity: MayExportCorrections, core: Core) -> StreamingResponse:
    """Signed reports with the drafts they began as: a manifest for `med3dvlm prepare folder`."""

    def lines() -> Iterator[str]:
        with core.database.reading() as session:
            for row in reviews.corrections(session):
                yield json.dumps(row, ensure_ascii=False) + "\n"

    with core.database.session() as session:
        record(session, identity, "corrections.export", "corrections")
    return StreamingResponse(lines(), media_type="application/x-ndjson")


def _version(one: ReportVersion, signature: Signature | None) -> dict[str, Any]:
    final = signature is not None and signature.version == one.version
    return {
        "version": one.version,
        "created": one.created,
        "author": one.author,
        "kind": one.kind,
        "state": "final" if final else "draft",
    }


def _sentences(
    sentences: list[dict[str, Any]], facts: dict[str, Any], threshold: float | None
) -> list[dict[str, Any]]:
    """As the API gives them; what a person has decided about is never withheld."""
    rated = threshold is not None and bool(facts.get("calibrated"))
    return [
        {
            **{name: one[name] for name in ("id", "text", "section", "confidence", "status")},
            "original": one["original"],
            "withheld": rated
            and one["status"] == "proposed"
            and (one["confidence"] is None or one["confidence"] < threshold),
        }
        for one in sentences
    ]


def _signature(signature: Signature) -> dict[str, Any]:
    return {
        "name": signature.name,
        "authenticated": signature.authenticated,
        "signed": signature.signed,
        "version": signature.version,
        "digest": signature.digest,
    }


def _addendum(one: Addendum) -> dict[str, Any]:
    return {
        "id": one.id,
        "author": one.name,
        "authenticated": one.authenticated,
        "created": one.created,
        "text": one.text,
    }
