"""Questions about studies, and their answers as they are shown."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from med3dvlm.notice import CANNOT_TELL
from med3dvlm.service import studies, work
from med3dvlm.service.access import Identity
from med3dvlm.service.audit import record
from med3dvlm.service.core import Service
from med3dvlm.service.tables import Job, Question


def submit(
    service: Service,
    session: Session,
    study_id: str,
    identity: Identity,
    text: str,
    choices: list[str] | None = None,
) -> tuple[Job, Question]:
    """Put a question into the queue.

    Raises:
        QueueFull, UserLimit: where there is too much to do.
    """
    studies.get_ready(session, study_id)
    request: dict[str, Any] = {"text": text} | ({"choices": choices} if choices else {})
    job = work.submit(session, service.settings, "ask", study_id, identity, **request)
    question = Question(
        study_id=study_id, job_id=job.id, asked_by=identity.name, text=text, choices=choices
    )
    session.add(question)
    session.flush()
    record(session, identity, "study.ask", f"study/{study_id}", question=question.id)
    return job, question


def earlier(session: Session, study_id: str) -> list[tuple[Question, Job]]:
    """What was asked about a study, the oldest first."""
    query = select(Question, Job).join(Job, Job.id == Question.job_id)
    rows = session.execute(query.where(Question.study_id == study_id).order_by(Question.number))
    return [(question, job) for question, job in rows]


def describe(question: Question, state: str, threshold: float | None) -> dict[str, Any]:
    """A question as the API gives it; what is less sure than the threshold is "cannot tell"."""
    value = question.answer or {}
    confidence = value.get("confidence")
    withheld = threshold is not None and confidence is not None and confidence < threshold
    answered = question.answer is not None
    return {
        "id": question.id,
        "job": question.job_id,
        "state": state,
        "created": question.created,
        "created_by": question.asked_by,
        "text": question.text,
        "choices": question.choices,
        "answer": CANNOT_TELL if withheld else value.get("answer"),
        "withheld": withheld,
        "confidence": confidence,
        "calibrated": bool(value.get("calibrated")),
        "choices_confidence": value.get("choices_confidence") if answered else None,
        "choices_likelihood": value.get("choices_likelihood") if answered else None,
        **{name: value.get(name) for name in ("model", "weights", "preparation")},
    }
