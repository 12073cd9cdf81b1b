"""Reports: a model drafts, people edit, one named person signs. Nothing is final before that.

Versions follow each other and never change. A signature names one of them; a study has one
signature at most, by the table's primary key, and it is written together with the audit record.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from med3dvlm.sentences import SECTIONS
from med3dvlm.service import work
from med3dvlm.service.access import Identity
from med3dvlm.service.access.users import readable_name
from med3dvlm.service.audit import record
from med3dvlm.service.database import new_id
from med3dvlm.service.studies import VOLUME, Conflict, NotThere, Unusable, get, key
from med3dvlm.service.tables import Addendum, ReportVersion, Signature, Study

STATUSES = ("proposed", "accepted", "edited", "rejected", "added")
MODEL = "model"


@dataclass(frozen=True)
class SignedReport:
    """A report that a named person stands by.

    Attributes:
        sentences: that were kept, in order: dicts of text, section, status and more.
        text: the report with its headings.
        facts: of the draft that it began with: method, model, weights, preparation.
    """

    study: Study
    version: int
    sentences: list[dict[str, Any]]
    text: str
    signature: Signature
    addenda: list[Addendum]
    facts: dict[str, Any]


# --- versions ---------------------------------------------------------------------------------


def versions(session: Session, study_id: str) -> list[ReportVersion]:
    """The versions of a study's report, the oldest first."""
    query = select(ReportVersion).where(ReportVersion.study_id == study_id)
    return list(session.scalars(query.order_by(ReportVersion.version)))


def version(session: Session, study_id: str, number: int) -> ReportVersion:
    query = select(ReportVersion).where(
        ReportVersion.study_id == study_id, ReportVersion.version == number
    )
    found = session.scalar(query)
    if found is None:
        raise NotThere(f"The report of study {study_id} has no version {number}.")
    return found


def latest(session: Session, study_id: str) -> ReportVersion | None:
    query = select(ReportVersion).where(ReportVersion.study_id == study_id)
    return session.scalar(query.order_by(ReportVersion.version.desc()).limit(1))


def state_of(session: Session, study_id: str) -> str:
    """What a study's report is, where nothing is being drafted."""
    if session.get(Signature, study_id) is not None:
        return "final"
    return "none" if latest(session, study_id) is None else "draft"


def add_draft(
    session: Session, study_id: str, sentences: Sequence[dict[str, Any]], facts: dict[str, Any]
) -> int:
    """A new version by the model; says its number."""
    study = _locked(session, study_id)
    _check_open(session, study)
    proposed = [
        {"id": new_id(), **one, "status": "proposed", "original": one["text"]} for one in sentences
    ]
    added = _add(session, study, facts["model"], MODEL, proposed, facts)
    return added.version


def edit(
    session: Session,
    study_id: str,
    identity: Identity,
    base_version: int,
    sentences: Sequence[dict[str, Any]],
) -> ReportVersion:
    """A new version by a person, made from the latest.

    Args:
        sentences: dicts of text and status, with the id of those that were there before.

    Raises:
        Conflict: for a signed report, or if somebody was quicker.
        Unusable: for a sentence that does not go with the version before.
    """
    study = _locked(session, study_id)
    _check_open(session, study)
    last = latest(session, study_id)
    if (last.version if last else 0) != base_version:
        raise Conflict(
            f"The report has moved on to version {last.version if last else 0}; load it and edit "
            "that."
        )
    before = {one["id"]: one for one in (last.sentences if last else [])}
    kept = [_edited(one, before) for one in sentences]
    ids = [one["id"] for one in kept]
    if len(set(ids)) < len(ids):
        raise Unusable("A sentence is there twice: give each id once.")
    left_out = [one for one in before.values() if one["id"] not in ids and one["original"]]
    kept += [{**one, "status": "rejected"} for one in left_out]  # the change is kept, too
    facts = dict(last.facts) if last else {}
    added = _add(session, study, identity.name, "person", kept, facts)
    record(session, identity, "report.edit", f"study/{study_id}", version=added.version)
    return added


def _edited(given: dict[str, Any], before: dict[str, dict[str, Any]]) -> dict[str, Any]:
    text = " ".join(given["text"].split())
    if not given.get("id"):
        return {
            "id": new_id(),
            "text": text,
            "section": given.get("section") or "",
            "confidence": None,
            "status": "added",
            "original": None,
        }
    old = before.get(given["id"])
    if old is None:
        raise Unusable(f"The version before has no sentence {given['id']}: leave out its id.")
    status = given["status"]
    if old["original"] is None:
        status = status if status in ("added", "rejected") else "added"
    elif status not in ("rejected", "proposed"):
        status = "accepted" if text == old["original"] else "edited"
    return {
        **old,
        "text": text,
        "section": given.get("section") or old["section"],
        "status": status,
    }


def _add(
    session: Session,
    study: Study,
    author: str,
    kind: str,
    sentences: list[dict[str, Any]],
    facts: dict[str, Any],
) -> ReportVersion:
    query = select(func.max(ReportVersion.version)).where(ReportVersion.study_id == study.id)
    added = ReportVersion(
        study_id=study.id,
        version=(session.scalar(query) or 0) + 1,
        author=author,
        kind=kind,
        sentences=sentences,
        facts=facts,
    )
    session.add(added)
    study.report_state = "draft"
    session.flush()
    return added


def _locked(session: Session, study_id: str) -> Study:
    """The study, whose report nobody else changes until this transaction is over."""
    get(session, study_id)
    query = select(Study).where(Study.id == study_id)
    return session.scalars(query.with_for_update().execution_options(populate_existing=True)).one()


def _check_open(session: Session, study: Study) -> None:
    if session.get(Signature, study.id) is not None:
        raise Conflict("The report is signed; write an addendum.")


# --- signing ----------------------------------------------------------------------------------


def sign(
    session: Session, study_id: str, identity: Identity, number: int, name: str | None
) -> Signature:
    """Let a named person stand by a version; the same again by the same person is the same.

    Args:
        name: of the signer, on a server without accounts.

    Raises:
        Conflict: if the version is not the latest, holds sentences that nobody looked at, or the
            report is signed already, in another version or by somebody else.
        Unusable: if nobody knows who signs.
    """
    study = _locked(session, study_id)
    authenticated, shown = _signer(identity, name)
    there = session.get(Signature, study_id)
    if there is not None:
        if (there.version, there.user, there.name) == (number, identity.name, shown):
            return there
        raise Conflict(f"Version {there.version} is signed by {there.name}; write an addendum.")
    found = version(session, study_id, number)
    last = latest(session, study_id)
    if last is None or last.version != number:
        raise Conflict(f"The report has moved on to version {last.version if last else 0}.")
    open_ones = sum(one["status"] == "proposed" for one in found.sentences)
    if open_ones:
        raise Conflict(
            f"{open_ones} sentences are neither accepted nor rejected: look at each before signing."
        )
    if not _kept(found.sentences):
        raise Conflict("The report says nothing: there is nothing to sign.")
    signature = Signature(
        study_id=study_id,
        version=number,
        user=identity.name,
        name=shown,
        authenticated=authenticated,
        digest=_digest(found.sentences),
    )
    session.add(signature)
    study.report_state = "final"
    work.enqueue(session, "index", study_id, identity.name)
    session.flush()
    record(
        session,
        identity,
        "report.sign",
        f"study/{study_id}",
        version=number,
        digest=signature.digest,
        authenticated=authenticated,
    )
    return signature


def add_addendum(
    session: Session, study_id: str, identity: Identity, text: str, name: str | None
) -> Addendum:
    """Add to a signed report."""
    _locked(session, study_id)
    if session.get(Signature, study_id) is None:
        raise Conflict("The report is not signed yet: edit it.")
    authenticated, shown = _signer(identity, name)
    added = Addendum(
        study_id=study_id, user=identity.name, name=shown, authenticated=authenticated, text=text
    )
    session.add(added)
    session.flush()
    digest = hashlib.sha256(text.encode()).hexdigest()
    record(session, identity, "report.addendum", f"study/{study_id}", digest=digest)
    return added


def _signer(identity: Identity, name: str | None) -> tuple[bool, str]:
    if identity.kind != "local":
        return True, identity.display_name or identity.name
    if not (name or "").strip():
        raise Unusable("Say who signs: this server has no accounts, so give a name.")
    return False, readable_name(str(name))


def _kept(sentences: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [one for one in sentences if one["status"] != "rejected" and one["text"]]


def _digest(sentences: Sequence[dict[str, Any]]) -> str:
    signed = [[one["section"], one["text"]] for one in _kept(sentences)]
    return hashlib.sha256(json.dumps(signed, ensure_ascii=False).encode()).hexdigest()


# --- reading ----------------------------------------------------------------------------------


def signed_report(session: Session, study_id: str) -> SignedReport | None:
    """What was signed, or None."""
    signature = session.get(Signature, study_id)
    if signature is None:
        return None
    found = version(session, study_id, signature.version)
    kept = _kept(found.sentences)
    return SignedReport(
        study=get(session, study_id),
        version=signature.version,
        sentences=kept,
        text=as_text(kept),
        signature=signature,
        addenda=addenda(session, study_id),
        facts={name: value for name, value in found.facts.items() if name != "text"},
    )


def addenda(session: Session, study_id: str) -> list[Addendum]:
    query = select(Addendum).where(Addendum.study_id == study_id).order_by(Addendum.number)
    return list(session.scalars(query))


def as_text(sentences: Sequence[dict[str, Any]]) -> str:
    """Sentences under their headings, in the order in which a report has these."""
    order = ["", *SECTIONS]
    headings = sorted(
        {one["section"] for one in sentences},
        key=lambda name: (order.index(name) if name in order else len(order), name),
    )
    parts = []
    for heading in headings:
        said = " ".join(one["text"] for one in sentences if one["section"] == heading)
        parts.append(f"{heading}: {said}" if heading else said)
    return "\n".join(parts)


def find_sentence(
    session: Session, study_id: str, sentence_id: str
) -> tuple[dict[str, Any], str | None]:
    """A sentence of the latest version, and the text of the draft that it came from."""
    last = latest(session, study_id)
    found = next(
        (one for one in (last.sentences if last else []) if one["id"] == sentence_id), None
    )
    if last is None or found is None:
        raise NotThere(f"The report has no sentence {sentence_id}.")
    drafted = last.facts.get("method") == "generate"
    return found, last.facts.get("text") if drafted else None


def changes(session: Session, study_id: str) -> list[dict[str, Any]]:
    """From the model's draft to the latest, or signed, version: sentence by sentence."""
    last = latest(session, study_id)
    return [
        {
            "id": one["id"],
            "section": one["section"],
            "status": one["status"],
            "before": one["original"],
            "after": None if one["status"] == "rejected" else one["text"],
        }
        for one in (last.sentences if last else [])
    ]


# --- corrections as training data -------------------------------------------------------------


def corrections(session: Session) -> Iterator[dict[str, Any]]:
    """Signed reports as rows of a manifest that `med3dvlm prepare folder` reads.

    `path` is where the storage has the volume. What was drafted and what became of it goes along
    as plain values, for who wants to learn from the difference.
    """
    query = select(Study).join(Signature, Signature.study_id == Study.id).order_by(Study.number)
    for study in session.scalars(query):
        signed = signed_report(session, study.id)
        assert signed is not None  # by the join
        counts = dict.fromkeys(STATUSES, 0)
        for one in version(session, study.id, signed.version).sentences:
            counts[one["status"]] += 1
        yield {
            "path": key(study.id, VOLUME),
            "id": study.id,
            "report": signed.text,
            "split": "train",
            "draft": _draft_of(session, study.id),
            "draft_method": str(signed.facts.get("method", "")),
            "draft_model": str(signed.facts.get("model", "")),
            "draft_weights": str(signed.facts.get("weights", "")),
            **{f"sentences_{status}": counts[status] for status in STATUSES[1:]},
            "signed": signed.signature.signed.isoformat(),
        }


def _draft_of(session: Session, study_id: str) -> str:
    """The last draft by the model, as it came."""
    query = select(ReportVersion).where(
        ReportVersion.study_id == study_id, ReportVersion.kind == MODEL
    )
    found = session.scalar(query.order_by(ReportVersion.version.desc()).limit(1))
    return "" if found is None else str(found.facts.get("text", ""))
