"""What workers do: prepare a study, answer, draft, explain, keep the index.

Each task is given a worker and jobs of one kind, and gives an outcome for each, or what went wrong
with it. Nothing is written to the database here but the text that is streamed: an outcome is
applied by the worker when the job ends, in one transaction.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic_core import to_jsonable_python
from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from med3dvlm.models.decoding import content_of
from med3dvlm.notice import provenance
from med3dvlm.scan import Scan, peak_of, save_nifti
from med3dvlm.search.sheet import scan_strip
from med3dvlm.search.study import Study as IndexedStudy
from med3dvlm.service import imports, metrics, questions, reviews, studies, work
from med3dvlm.service.core import Service
from med3dvlm.service.database import UNREACHABLE
from med3dvlm.service.studies import THUMBNAIL, VOLUME, Conflict, evidence_key, key
from med3dvlm.service.tables import Job, Question, Result, Signature, Study
from med3dvlm.service.work import Cancelled, Outcome, Worker

if TYPE_CHECKING:
    from torch import Tensor

    from med3dvlm.evidence import Rated, Target

FLUSH_S = 0.1  # between the pieces of a streamed text
PRESENT = 0.5  # a template asserts findings that are likelier
NEIGHBOURS = 50  # among which the nearest signed report is looked for

METHODS = ("generate", "retrieve", "template")


# --- taking a study in ------------------------------------------------------------------------


def prepare(worker: Worker, jobs: Sequence[Job]) -> list[Outcome]:
    """Read what was received; write the volume and the thumbnail that everything else uses."""
    (job,) = jobs
    service = worker.service
    study = _study(service, job)
    scan, headers = studies.read_source(service, study, job.request.get("series"))
    worker.check(job)
    folder = service.settings.data / "incoming"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        volume, thumbnail = Path(temporary, VOLUME), Path(temporary, THUMBNAIL)
        save_nifti(scan, volume)
        scan_strip(scan).save(thumbnail, "PNG")
        worker.check(job)
        service.storage.put(volume, key(study.id, VOLUME))
        service.storage.put(thumbnail, key(study.id, THUMBNAIL))
    columns = {
        **headers,
        "voxels": content_of(scan).hex(),
        "shape": list(scan.shape),
        "spacing_mm": [round(mm, 6) for mm in scan.spacing_mm],
        "units": scan.units,
        "orientation": scan.orientation,
        "warnings": [*study.warnings, *scan.warnings],
        "state": "ready",
        "reason": "",
    }

    def apply(session: Session, job: Job) -> dict[str, Any]:
        row = studies.get(session, study.id)
        for column, value in columns.items():
            setattr(row, column, value)
        work.enqueue(session, "index", study.id, job.owner)
        return {"shape": columns["shape"]}

    return [Outcome(apply)]


def index(worker: Worker, jobs: Sequence[Job]) -> list[Outcome]:
    """Put a study into the search index, with its report if that is signed."""
    (job,) = jobs
    service = worker.service
    if service.models.dual is None:
        return [Outcome()]
    study = _study(service, job)
    with service.database.reading() as session:
        signed = reviews.signed_report(session, study.id)
    metadata = {
        "modality": study.modality,
        "description": study.description,
        "study_date": study.study_date,
        "shape": study.shape,
        "spacing_mm": study.spacing_mm,
    }
    entry = IndexedStudy(
        study.id,
        key(study.id, VOLUME),
        study.voxels,
        signed.text if signed else "",
        {name: value for name, value in metadata.items() if value},
    )
    service.index.put(entry, _vector(service, study))
    return [Outcome()]


def _vector(service: Service, study: Study) -> np.ndarray:
    known = service.index.vector(key(study.id, VOLUME))
    if known is not None:
        return known
    return service.index.model.embed_scans(studies.load_scan(service, study))[0]


# --- answering --------------------------------------------------------------------------------


def ask(worker: Worker, jobs: Sequence[Job]) -> list[Outcome | BaseException]:
    """Answer questions about any studies together; those with choices in one pass."""
    service = worker.service
    model, facts = service.models.language, service.models.facts
    about = [_study(service, job) for job in jobs]
    keys = [
        result_key("ask", study.voxels, facts, job.request["text"], job.request.get("choices"))
        for job, study in zip(jobs, about, strict=True)
    ]
    values = _remembered(service, "ask", keys)
    for closed in (True, False):
        rest = [
            i
            for i, job in enumerate(jobs)
            if keys[i] not in values and bool(job.request.get("choices")) is closed
        ]
        if not rest:
            continue
        visual = _see(service, [about[i] for i in rest])
        texts = [jobs[i].request["text"] for i in rest]
        if closed:
            given = model.choose(visual, texts, [jobs[i].request["choices"] for i in rest])
        else:
            stream = Stream(worker, [jobs[i] for i in rest])
            given = model.ask(visual, texts, watch=stream)
            stream.flush()
        for i, answer in zip(rest, given, strict=True):
            if jobs[i].id not in worker.given_up:  # else it broke off
                values[keys[i]] = _answer(model, answer, facts)
    return [
        Cancelled() if job.id in worker.given_up or worker.stopping.is_set()
        else _answered(service, keys[i], values[keys[i]])
        for i, job in enumerate(jobs)
    ]  # fmt: skip


def _answer(model: Any, answer: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """An answer as it is remembered; confidences only of a calibrated model."""
    from med3dvlm.evidence import answer_confidence, choice_shares

    calibration = model.calibration
    likelihoods = dict(answer.choices)
    shares = choice_shares(calibration, answer) if calibration and likelihoods else None
    return {
        "answer": str(answer),
        "confidence": answer_confidence(calibration, answer) if calibration else None,
        "choices_confidence": dict(zip(likelihoods, shares, strict=True)) if shares else None,
        "choices_likelihood": likelihoods or None,
        **facts,
    }


def _answered(service: Service, result: str, value: dict[str, Any]) -> Outcome:
    def apply(session: Session, job: Job) -> dict[str, Any]:
        remember(session, result, value)
        question = session.scalars(select(Question).where(Question.job_id == job.id)).one()
        question.answer = value
        shown = questions.describe(question, "done", service.settings.threshold)
        return to_jsonable_python(shown)

    return Outcome(apply)


# --- drafting ---------------------------------------------------------------------------------


def report(worker: Worker, jobs: Sequence[Job]) -> list[Outcome | BaseException]:
    """Draft reports: generated ones side by side."""
    generated = [i for i, job in enumerate(jobs) if job.request["method"] == "generate"]
    outcomes: dict[int, Outcome | BaseException] = {}
    if generated:
        drafts = _generate(worker, [jobs[i] for i in generated])
        outcomes |= dict(zip(generated, drafts, strict=True))
    for i, job in enumerate(jobs):
        if i not in outcomes:
            outcomes[i] = _draft_without_language(worker, job)
    return [outcomes[i] for i in range(len(jobs))]


def _generate(worker: Worker, jobs: Sequence[Job]) -> list[Outcome | BaseException]:
    service = worker.service
    model, facts = service.models.language, service.models.facts
    about = [_study(service, job) for job in jobs]
    prompt = model.config.report_prompt
    keys = [result_key("report", study.voxels, facts, prompt) for study in about]
    values = _remembered(service, "report", keys)
    rest = [i for i in range(len(jobs)) if keys[i] not in values]
    if rest:
        visual = _see(service, [about[i] for i in rest])
        stream = Stream(worker, [jobs[i] for i in rest])
        written = model.report(visual, watch=stream)
        stream.flush()
        for row, (i, text) in enumerate(
            zip(rest, [written] if len(rest) == 1 else written, strict=True)
        ):
            if jobs[i].id not in worker.given_up:
                values[keys[i]] = _draft(str(text), _rate(model, visual[[row]], str(text)))
    return [
        Cancelled() if job.id in worker.given_up or worker.stopping.is_set()
        else _drafted({"method": "generate", **facts}, values[keys[i]], keys[i])
        for i, job in enumerate(jobs)
    ]  # fmt: skip


def _rate(model: Any, visual: Tensor, text: str) -> list[Rated]:
    """The sentences of a draft, with confidences where the model is calibrated."""
    from med3dvlm.evidence import rate_report

    return _not_rated(text) if model.calibration is None else rate_report(model, visual, text)


def _not_rated(text: str) -> list[Rated]:
    from med3dvlm.evidence import Rated
    from med3dvlm.sentences import split_report

    return [Rated(sentence, None) for sentence in split_report(text)]


def _draft(text: str, rated: Sequence[Rated]) -> dict[str, Any]:
    """A draft as it is remembered: its text, and its sentences with their confidence."""
    sentences = [
        {
            "text": one.sentence.text,
            "section": one.sentence.section,
            "confidence": one.confidence,
            "span": [one.sentence.start, one.sentence.end],
        }
        for one in rated
    ]
    return {"text": text, "sentences": sentences}


def _drafted(facts: dict[str, Any], value: dict[str, Any], result: str | None = None) -> Outcome:
    def apply(session: Session, job: Job) -> dict[str, Any]:
        if result is not None:
            remember(session, result, value)
        version = reviews.add_draft(
            session, job.study_id, value["sentences"], {**facts, "text": value["text"]}
        )
        return {"version": version, "text": value["text"], **facts}

    return Outcome(apply)


def _draft_without_language(worker: Worker, job: Job) -> Outcome | BaseException:
    """From the nearest signed report, or from the probabilities of findings."""
    service = worker.service
    study = _study(service, job)
    if service.models.dual is None:
        return Conflict(f"Model {service.settings.model!r} has no search part: draft by generate.")
    dual = service.index.model
    facts = {
        "method": job.request["method"],
        **provenance(dual),
        "calibrated": False,
    }
    if job.request["method"] == "retrieve":
        return _retrieved(service, study, facts)
    text = _template(dual, studies.load_scan(service, study))
    return _drafted(facts, _draft(text, _not_rated(text)))


def _retrieved(service: Service, study: Study, facts: dict[str, Any]) -> Outcome:
    """A draft from the nearest signed report; which that is, is settled when the job ends.

    An index can hold studies that were deleted: since the search, or while another model's index
    was in use.
    """
    hits = service.index.search(None, vector=_vector(service, study), top=NEIGHBOURS)

    def apply(session: Session, job: Job) -> dict[str, Any]:
        others = (hit for hit in hits if hit.report and hit.id != study.id)
        nearest = next((hit for hit in others if session.get(Signature, hit.id)), None)
        if nearest is None:
            raise Conflict("There is no signed report of another study to draft from.")
        draft = _draft(nearest.report, _not_rated(nearest.report))
        return _drafted({**facts, "from_study": nearest.id}, draft).apply(session, job)

    return Outcome(apply)


def _template(dual: Any, scan: Scan) -> str:
    from med3dvlm.data.phantoms import PHANTOM_TERMS
    from med3dvlm.evaluate.findings import CT_RATE_TERMS
    from med3dvlm.evaluate.tasks.report import template_report

    names = [n for n in dual.config.concepts or () if n in PHANTOM_TERMS or n in CT_RATE_TERMS]
    if dual.concept_head is None or not names:
        raise Conflict(f"Model {dual.label!r} gives no probabilities of findings.")
    (given,) = dual.concept_probabilities(scan)
    return template_report(names, [given[name] > PRESENT for name in names])


# --- explaining -------------------------------------------------------------------------------


def evidence(worker: Worker, jobs: Sequence[Job]) -> list[Outcome]:
    """A map of what a sentence, an answer or a text rests on, on the scan's own voxels."""
    from med3dvlm.evidence import as_scan, explain, place_mm

    (job,) = jobs
    service = worker.service
    study = _study(service, job)
    scan = studies.load_scan(service, study)
    model, target = _target(service, job)

    def watched(streams: list[Tensor]) -> Tensor:
        worker.check(job)
        return target(streams)

    method = job.request["method"]
    values = explain(model, scan, watched, method=method)
    folder = service.settings.data / "incoming"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary, "map.nii.gz")
        save_nifti(as_scan(scan, values), path)
        service.storage.put(path, evidence_key(study.id, job.id))
    peak = peak_of(values)
    result = {
        "method": method,
        "map": f"/api/evidence/{job.id}/map.nii.gz",
        "empty": peak is None,
        "peak_voxel": peak,
        "peak_mm": place_mm(scan, peak),
        **provenance(model),
    }
    return [Outcome(lambda session, job: result)]


def _target(service: Service, job: Job) -> tuple[Any, Target]:
    """What is explained, and by which model."""
    from med3dvlm.evidence import answer_target, query_target, text_target

    asked = job.request
    if asked.get("text"):
        return service.index.model, query_target(service.index.model, asked["text"])
    model = service.models.language
    with service.database.reading() as session:
        if asked.get("question"):
            query = select(Question).where(
                Question.id == asked["question"], Question.study_id == job.study_id
            )
            question = session.scalar(query)
            if question is None or question.answer is None:
                raise Conflict("The question has no answer yet.")
            answer = question.answer["answer"]
            return model, answer_target(model, question.text, answer, question.choices)
        sentence, draft = reviews.find_sentence(session, job.study_id, asked["sentence"])
    prompt = model.config.report_prompt
    if draft and sentence.get("span") and sentence["text"] == sentence["original"]:
        low, high = sentence["span"]
        return model, text_target(model, prompt, draft, part=(low, high))
    return model, text_target(model, prompt, sentence["text"])


# --- what the tasks share ---------------------------------------------------------------------


class Stream:
    """Follows texts as they are written and passes them on, a piece for each job now and then."""

    def __init__(self, worker: Worker, jobs: Sequence[Job]):
        self.worker, self.jobs = worker, jobs
        self.tokenizer: Any = worker.service.models.language.processor.tokenizer
        self.silent = worker.service.settings.threshold is not None  # it may have to be withheld
        self.tokens: list[list[int]] = [[] for _ in jobs]
        self.sent = [""] * len(jobs)
        self.due = time.monotonic()

    def __call__(self, rows: Sequence[int], tokens: Sequence[int]) -> Sequence[int]:
        for row, token in zip(rows, tokens, strict=True):
            self.tokens[row].append(token)
        metrics.TOKENS.inc(len(rows))
        if time.monotonic() >= self.due:
            self.flush()
            self.due = time.monotonic() + FLUSH_S
        if self.worker.stopping.is_set():
            return rows
        return [row for row in rows if self.jobs[row].id in self.worker.given_up]

    def flush(self) -> None:
        """Send what is new; where the database is away it goes with the next piece."""
        if self.silent:
            return
        texts = [self._text(tokens) for tokens in self.tokens]
        new = [
            (row, text[len(self.sent[row]) :])
            for row, text in enumerate(texts)
            if len(text) > len(self.sent[row]) and text.startswith(self.sent[row])
        ]
        if not new:
            return
        try:
            self.worker.tell([(self.jobs[row].id, piece) for row, piece in new])
        except UNREACHABLE:
            return
        for row, piece in new:
            self.sent[row] += piece

    def _text(self, tokens: list[int]) -> str:
        """Without a character of which only the first bytes are there."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip().rstrip("�")


def result_key(kind: str, voxels: str, facts: dict[str, Any], *asked: Any) -> str:
    """By what a result is remembered: what was looked at, by which model, and what was asked."""
    calibration = facts.get("calibrated")
    what = [kind, voxels, facts["weights"], facts["preparation"], calibration, *asked]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def remember(session: Session, result: str, value: dict[str, Any]) -> None:
    """Keep a result; another worker may have been quicker."""
    insert = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
    statement = insert[session.get_bind().dialect.name](Result).values(key=result, value=value)
    session.execute(statement.on_conflict_do_nothing())


def _remembered(service: Service, kind: str, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    with service.database.reading() as session:
        rows = session.scalars(select(Result).where(Result.key.in_(keys)))
        found = {row.key: row.value for row in rows}
    hits = sum(one in found for one in keys)
    metrics.RESULTS.labels(kind, "remembered").inc(hits)
    metrics.RESULTS.labels(kind, "computed").inc(len(keys) - hits)
    return found


def _study(service: Service, job: Job) -> Study:
    with service.database.reading() as session:
        return studies.get(session, job.study_id)


def _see(service: Service, about: Sequence[Study]) -> Tensor:
    return service.models.see(
        [study.voxels for study in about],
        lambda place: studies.load_scan(service, about[place]),
    )


TASKS: dict[str, Callable[[Worker, Sequence[Job]], Sequence[Outcome | BaseException]]] = {
    "prepare": prepare,
    "index": index,
    "ask": ask,
    "report": report,
    "evidence": evidence,
    work.FETCH: imports.fetch,
}
