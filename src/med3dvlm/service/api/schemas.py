"""What goes over the wire."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from med3dvlm.service.api.common import BIG, HexId, PersonName, Text, Words

StudyState = Literal["received", "ready", "refused"]
ReportState = Literal["none", "drafting", "draft", "final"]
JobState = Literal["queued", "running", "done", "failed", "cancelled"]
Status = Literal["proposed", "accepted", "edited", "rejected", "added"]
Method = Literal["generate", "retrieve", "template"]
MapMethod = Literal["layercam", "grad-cam", "integrated-gradients", "occlusion"]


class StudyOut(BaseModel):
    """A series, and what its headers say; `shape` is (D, H, W), `spacing_mm` (z, y, x)."""

    id: str
    created: datetime
    created_by: str
    source: str
    state: StudyState
    reason: str
    patient_name: str
    patient_id: str
    accession_number: str
    study_uid: str
    series_uid: str
    study_date: str
    modality: str
    description: str
    shape: list[int]
    spacing_mm: list[float]
    units: str | None
    orientation: str
    warnings: list[str]
    report_state: ReportState
    has_model_notice: str


class WorklistOut(BaseModel):
    """A page of the worklist; `next` is the cursor of the one after."""

    studies: list[StudyOut]
    next: str | None


class JobOut(BaseModel):
    """A piece of work; `position` in the queue is 1 for the next.

    `study` is null for a fetch from the PACS until the study is here. Its `progress` has
    `received`, `of` (images; null where the PACS does not say), `bytes`, the UIDs that were asked
    for, and, once the PACS has said it, whose study it is.
    """

    id: str
    kind: str
    study: str | None
    state: JobState
    position: int | None
    created: datetime
    created_by: str
    started: datetime | None
    ended: datetime | None
    attempts: int
    error: str | None
    result: dict[str, Any] | None
    progress: dict[str, Any] | None


class JobsOut(BaseModel):
    jobs: list[JobOut]


class JobStarted(BaseModel):
    """A job that was put into the queue."""

    job: JobOut


class QuestionIn(BaseModel):
    """A question, and what could be answered."""

    text: Words
    choices: Annotated[list[Words], Field(min_length=2, max_length=26)] | None = None


class QuestionOut(BaseModel):
    """A question with its answer, once there is one.

    `confidence` is how likely the answer is right, of a calibrated model only: null says that
    nobody knows. So is `choices_confidence`; `choices_likelihood` is what the model itself makes
    of each choice, and no confidence.
    """

    id: str
    job: str
    state: JobState
    created: datetime
    created_by: str
    text: str
    choices: list[str] | None
    answer: str | None
    withheld: bool
    confidence: float | None
    calibrated: bool
    choices_confidence: dict[str, float] | None
    choices_likelihood: dict[str, float] | None
    model: str | None
    weights: str | None
    preparation: str | None


class QuestionsOut(BaseModel):
    questions: list[QuestionOut]


class QuestionStarted(BaseModel):
    job: JobOut
    question: QuestionOut


class DraftIn(BaseModel):
    """How a report is to be drafted."""

    method: Method = "generate"


class SentenceIn(BaseModel):
    """A sentence as a person leaves it; without an id it is new."""

    id: HexId | None = None
    text: Text
    status: Status = "accepted"
    section: Annotated[str, Field(max_length=40)] | None = None


class EditIn(BaseModel):
    """The whole report as a person leaves it; what is left out counts as rejected."""

    base_version: Annotated[int, Field(ge=0, le=BIG)]
    sentences: Annotated[list[SentenceIn], Field(max_length=500)]


class SignIn(BaseModel):
    """Which version is signed; by whom, on a server without accounts."""

    version: Annotated[int, Field(ge=0, le=BIG)]
    name: PersonName | None = None


class AddendumIn(BaseModel):
    text: Annotated[Text, Field(min_length=1)]
    name: PersonName | None = None


class SentenceOut(BaseModel):
    id: str
    text: str
    section: str
    confidence: float | None
    withheld: bool
    status: Status
    original: str | None


class SignatureOut(BaseModel):
    name: str
    authenticated: bool
    signed: datetime
    version: int
    digest: str


class AddendumOut(BaseModel):
    id: str
    author: str
    authenticated: bool
    created: datetime
    text: str


class VersionOut(BaseModel):
    version: int
    created: datetime
    author: str
    kind: Literal["model", "person"]
    state: Literal["draft", "final"]


class ReportOut(BaseModel):
    """A report as it stands. Confidences are null where the model is not calibrated."""

    state: ReportState
    version: int
    versions: list[VersionOut]
    sentences: list[SentenceOut]
    text: str
    signature: SignatureOut | None
    addenda: list[AddendumOut]
    method: str | None
    model: str | None
    weights: str | None
    preparation: str | None
    calibrated: bool
    threshold: float | None
    notice: str


class ReportVersionOut(BaseModel):
    version: int
    created: datetime
    author: str
    kind: Literal["model", "person"]
    state: Literal["draft", "final"]
    sentences: list[SentenceOut]
    text: str


class ChangeOut(BaseModel):
    """What became of a sentence; `before` is null for one that a person added."""

    id: str
    section: str
    status: Status
    before: str | None
    after: str | None


class ChangesOut(BaseModel):
    changes: list[ChangeOut]


class EvidenceIn(BaseModel):
    """What is to be explained: a sentence of the report, an answer, or a text; one of them."""

    sentence: HexId | None = None
    question: HexId | None = None
    text: Words | None = None
    method: MapMethod = "layercam"


class HitOut(BaseModel):
    study: StudyOut
    score: float
    first_line: str
    thumbnail: str


class HitsOut(BaseModel):
    hits: list[HitOut]


class SuggestionsOut(BaseModel):
    suggestions: list[str]


class ModelOut(BaseModel):
    """The model that answers; null where no worker has loaded it yet."""

    label: str
    weights: str | None
    preparation: str | None
    calibrated: bool | None
    notice: str
