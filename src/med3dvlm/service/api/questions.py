"""Questions about a study, and their answers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from med3dvlm.service import questions, studies, work
from med3dvlm.service.api.common import Core, MayAsk, MayRead, StudyId, nudge
from med3dvlm.service.api.schemas import (
    QuestionIn,
    QuestionsOut,
    QuestionStarted,
    SuggestionsOut,
)

router = APIRouter(prefix="/api/studies/{study_id}", tags=["questions"])

SUGGESTIONS = (
    "Is there pleural effusion?",
    "Is there pneumothorax?",
    "Is there cardiomegaly?",
    "Is there lung nodule?",
    "Is there lymphadenopathy?",
    "Which contrast phase is this?",
    "What is the most important abnormality?",
)


@router.post("/questions", status_code=202, response_model=QuestionStarted)
def ask(
    study_id: StudyId, asked: QuestionIn, request: Request, identity: MayAsk, core: Core
) -> dict[str, Any]:
    """Ask; follow the job's events for the answer as it is written."""
    with core.database.session() as session:
        job, question = questions.submit(
            core, session, study_id, identity, asked.text, asked.choices
        )
        started = {
            "job": work.describe(session, job),
            "question": questions.describe(question, job.state, core.settings.threshold),
        }
    nudge(request)
    return started


@router.get("/questions", response_model=QuestionsOut)
def earlier(study_id: StudyId, identity: MayRead, core: Core) -> dict[str, Any]:
    """What was asked about the study, the oldest first."""
    threshold = core.settings.threshold
    with core.database.reading() as session:
        studies.get(session, study_id)
        found = questions.earlier(session, study_id)
    return {"questions": [questions.describe(one, job.state, threshold) for one, job in found]}


@router.get("/suggestions", response_model=SuggestionsOut)
def suggestions(study_id: StudyId, identity: MayRead, core: Core) -> dict[str, Any]:
    """What could be asked."""
    with core.database.reading() as session:
        studies.get(session, study_id)
    return {"suggestions": list(SUGGESTIONS)}
