"""The queue, in the database, and the workers that take from it.

    queued ──claim──▶ running ──▶ done | failed | cancelled
       ▲                 │
       └──── requeue ────┘   its worker stopped, or was silent for longer than its lease

A worker holds a job by a lease that it renews. What it finishes is written together with what came
of it, in one transaction, and only if it still holds the job: a job that was taken up again by
another has one result. After `attempts` beginnings a job is failed.

Fetches from the PACS are done beside all else, by threads of their own: they need no model, and a
slow PACS must not keep those waiting who ask something.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, delete, func, or_, select, update
from sqlalchemy.orm import Session

from med3dvlm.service import metrics
from med3dvlm.service.access import Identity
from med3dvlm.service.core import Service
from med3dvlm.service.database import UNREACHABLE, new_id, serialise, utc_now
from med3dvlm.service.settings import Settings
from med3dvlm.service.tables import ACTIVE, Job, JobEvent, Study, WorkerSeen

POLL_S = 0.2  # between looks at an empty queue
TEND_S = 60  # between looks at what has grown old, or was deleted
BATCHED = ("ask", "report")  # kinds that are worked on several at a time
FETCH = "fetch"  # from the PACS
FETCHERS = 2  # threads of a worker for it
FULL_DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

log = logging.getLogger("med3dvlm.work")


class QueueFull(Exception):
    """There is more waiting than can be done soon."""


class UserLimit(Exception):
    """Somebody has too much waiting."""


class Cancelled(Exception):
    """A job that is not to be finished by this worker."""


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes:
        apply: writes what follows, in the transaction that ends the job; gives its result, as
            the API shows it.
        stored: id of a study whose files it has put into the storage; they are thrown away where
            no study came of it.
    """

    apply: Callable[[Session, Job], dict[str, Any]] = field(default=lambda session, job: {})
    stored: str = ""


# --- the queue --------------------------------------------------------------------------------


def check_room(session: Session, settings: Settings, owner: str) -> None:
    """Raise where a job more of this owner is too many."""
    waiting = select(func.count()).select_from(Job)
    if (session.scalar(waiting.where(Job.state == "queued")) or 0) >= settings.queue_limit:
        raise QueueFull("The queue is full; try again in a moment.")
    mine = session.scalar(waiting.where(Job.owner == owner, Job.state.in_(ACTIVE))) or 0
    if mine >= settings.user_limit:
        raise UserLimit(f"You have {mine} jobs waiting; wait for some, or cancel them.")


def submit(
    session: Session,
    settings: Settings,
    kind: str,
    study_id: str | None,
    identity: Identity,
    **request: Any,
) -> Job:
    """Put a job into the queue.

    Raises:
        QueueFull, UserLimit: where there is too much to do.
    """
    check_room(session, settings, identity.name)
    return enqueue(session, kind, study_id, identity.name, **request)


def enqueue(session: Session, kind: str, study_id: str | None, owner: str, **request: Any) -> Job:
    """The same for what the service asks of itself: no limit holds it up."""
    job = Job(kind=kind, study_id=study_id, owner=owner, request=request)
    session.add(job)
    session.flush()
    return job


def active(session: Session, study_id: str, kind: str) -> Job | None:
    """The job of a kind that a study is waiting for."""
    query = select(Job).where(Job.study_id == study_id, Job.kind == kind, Job.state.in_(ACTIVE))
    return session.scalar(query.order_by(Job.number).limit(1))


def of_study(session: Session, study_id: str, limit: int = 50) -> list[Job]:
    """The jobs about a study, the newest first."""
    query = select(Job).where(Job.study_id == study_id, Job.kind != "index")
    return list(session.scalars(query.order_by(Job.number.desc()).limit(limit)))


def find(session: Session, job_id: str) -> Job | None:
    return session.scalar(select(Job).where(Job.id == job_id))


def describe(session: Session, job: Job) -> dict[str, Any]:
    """A job as the API gives it; `position` is 1 for the next to be taken."""
    position = None
    if job.state == "queued":
        ahead = select(func.count()).select_from(Job).where(_lane(job.kind == FETCH))
        position = session.scalar(ahead.where(Job.state == "queued", Job.number <= job.number))
    return {
        "id": job.id,
        "kind": job.kind,
        "study": job.study_id,
        "state": job.state,
        "position": position,
        "created": job.created,
        "created_by": job.owner,
        "started": job.started,
        "ended": job.ended,
        "attempts": job.attempts,
        "error": job.error or None,
        "result": job.result,
        "progress": job.progress,
    }


def cancel(session: Session, job: Job) -> None:
    """At once where it waits; where it runs, its worker is told."""
    if job.state == "queued":
        end(session, job, "cancelled")
    elif job.state == "running":
        job.cancel = True


def end(session: Session, job: Job, state: str, *, error: str = "", result: Any = None) -> None:
    """Write that a job is over, and what that means for its study."""
    job.state, job.error, job.result = state, error, result
    job.ended, job.lease = utc_now(), None
    if state != "done":
        _undo(session, job, error)
    data = {"error": error} if state == "failed" else {}
    add_events(session, [JobEvent(job_id=job.id, kind=state, data=data)])


def _undo(session: Session, job: Job, error: str) -> None:
    from med3dvlm.service.reviews import state_of

    if job.study_id is None:
        return
    study = session.scalars(select(Study).where(Study.id == job.study_id)).one()
    if job.kind == "prepare" and study.state == "received":
        study.state, study.reason = "refused", error or "Its preparation was cancelled."
    if job.kind == "report" and study.report_state == "drafting":
        study.report_state = state_of(session, study.id)


def requeue(session: Session, job: Job, *, counted: bool = True) -> None:
    """Let another worker, or the same, begin anew."""
    job.state, job.worker, job.lease = "queued", "", None
    job.attempts -= not counted
    data = {"state": "queued", "attempt": job.attempts}
    add_events(session, [JobEvent(job_id=job.id, kind="state", data=data)])


def add_events(session: Session, events: Sequence[JobEvent]) -> None:
    """Write events, as the last thing of a transaction: their numbers follow its commit."""
    session.flush()
    serialise(session, "job events")
    session.add_all(events)
    session.flush()


def claim(session: Session, settings: Settings, worker: str, *, fetches: bool = False) -> list[Job]:
    """The next job, and others of its kind that can be worked on beside it; none if none waits.

    Args:
        fetches: from the PACS, and nothing else; else everything but those.
    """
    while True:
        queue = select(Job).order_by(Job.number).with_for_update(skip_locked=True)
        first = session.scalar(queue.where(_lane(fetches), _free()).limit(1))
        if first is None:
            return []
        if first.cancel:
            end(session, first, "cancelled")
        elif first.attempts >= settings.attempts:
            reason = f"It was begun {first.attempts} times, and each time its worker died."
            end(session, first, "failed", error=reason)
        else:
            break
    jobs = [first]
    if first.kind in BATCHED and first.attempts == 0:  # else alone: it may be what kills workers
        fresh = queue.where(Job.state == "queued", Job.kind == first.kind, Job.attempts == 0)
        jobs += session.scalars(fresh.where(Job.id != first.id).limit(settings.batch - 1))
    now = utc_now()
    for job in jobs:
        job.state, job.worker, job.started = "running", worker, now
        job.lease = now + timedelta(seconds=settings.lease_s)
        job.attempts += 1
    add_events(
        session,
        [
            JobEvent(
                job_id=job.id, kind="state", data={"state": "running", "attempt": job.attempts}
            )
            for job in jobs
        ],
    )
    return jobs


def _lane(fetches: bool) -> ColumnElement[bool]:
    return Job.kind == FETCH if fetches else Job.kind != FETCH


def _free() -> ColumnElement[bool]:
    """Jobs that wait, and those whose worker has died."""
    return or_(Job.state == "queued", and_(Job.state == "running", Job.lease < utc_now()))


# --- the worker -------------------------------------------------------------------------------


class Worker:
    """Takes jobs until it is stopped: `run()` in a process of its own, `start()` as a thread.

    Args:
        fetches: take fetches from the PACS, and nothing else; it then needs no model.

    Attributes:
        name: host, process and a random part.
        given_up: jobs that it holds and is not to finish: cancelled, or taken by another.
        fetchers: workers beside it for what comes from the PACS, where there is one.
        left: studies that are gone, and whose files could not be removed yet.
    """

    def __init__(self, service: Service, *, fetches: bool = False):
        from med3dvlm.service.tasks import TASKS  # here: two threads must not import it at once

        self.service, self.fetches, self.tasks = service, fetches, TASKS
        beside = FETCHERS if service.settings.pacs_url and not fetches else 0
        self.fetchers = [Worker(service, fetches=True) for _ in range(beside)]
        self._interrupt: Callable[[], None] = lambda: None
        self.name = f"{socket.gethostname()[:60]}:{os.getpid()}:{new_id()[:8]}"
        self.stopping = threading.Event()
        self.awake = threading.Event()
        self.held: dict[str, int] = {}
        self.given_up: set[str] = set()
        self.left: set[str] = set()
        self.threads: list[threading.Thread] = []
        self.fault: BaseException | None = None

    def start(self) -> None:
        thread = threading.Thread(target=self._run_safely, name="worker", daemon=True)
        self.threads.append(thread)
        thread.start()

    def stop(self, timeout_s: float = 20) -> None:
        """Give back what is not finished, and end."""
        everybody = [self, *self.fetchers]
        for worker in everybody:
            worker.stopping.set()
            worker.awake.set()
            worker._interrupt()
        until = time.monotonic() + timeout_s
        for thread in [thread for worker in everybody for thread in worker.threads]:
            thread.join(max(0.1, until - time.monotonic()))

    def run(self) -> None:
        """Load the model, then work until `stopping` is set."""
        for fetcher in self.fetchers:
            fetcher.start()
        if not self.fetches:
            facts = self.service.models.facts
            log.info("worker %s is ready with model %s", self.name, facts["model"])
        beat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self.threads.append(beat)
        beat.start()
        while not self.stopping.is_set():
            try:
                jobs = self._claim()
            except UNREACHABLE as error:
                log.warning("the database does not answer: %s", _short(error))
                self.stopping.wait(1)
                continue
            if jobs:
                self._work_safely(jobs)
            else:
                self.awake.wait(POLL_S)
                self.awake.clear()

    def _work_safely(self, jobs: Sequence[Job]) -> None:
        """Whatever happens, go on: a job whose end could not be written is begun anew in time."""
        try:
            self.work(jobs)
        except Exception:  # a worker that died of one job would leave all others waiting
            log.exception("jobs %s could not be ended", [job.id for job in jobs])
            self.held = {}

    def _run_safely(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self.fault = error
            log.exception("the worker ended")

    def _claim(self) -> list[Job]:
        with self.service.database.reading() as session:  # which keeps no writer waiting
            if session.scalar(select(Job.id).where(_lane(self.fetches), _free()).limit(1)) is None:
                return []
        with self.service.database.session() as session:
            jobs = claim(session, self.service.settings, self.name, fetches=self.fetches)
        self.given_up = set()
        self.held = {job.id: job.attempts for job in jobs}  # the heartbeat looks from now on
        return jobs

    def work(self, jobs: Sequence[Job]) -> None:
        """Do jobs of one kind, and write what came of each."""
        began = time.monotonic()
        try:
            outcomes: Sequence[Outcome | BaseException] = self.tasks[jobs[0].kind](self, jobs)
        except Exception as error:
            if len(jobs) > 1 and not isinstance(error, Cancelled):
                for job in jobs:  # one of them is at fault, the others are not to suffer
                    self.work([job])
                return
            outcomes = [error] * len(jobs)
        for job, outcome in zip(jobs, outcomes, strict=True):
            self._finish(job, outcome)
            metrics.JOB_SECONDS.labels(job.kind).observe(time.monotonic() - began)

    def check(self, job: Job) -> None:
        """Raise `Cancelled` where a job is not to go on."""
        if self.stopping.is_set() or job.id in self.given_up:
            raise Cancelled

    @contextmanager
    def interrupting(self, interrupt: Callable[[], None]) -> Iterator[None]:
        """For what waits for others in this block: `interrupt`, called from another thread once
        the job is given up or the worker stops, must end the wait."""
        self._interrupt = interrupt
        try:
            yield
        finally:
            self._interrupt = lambda: None

    def note_progress(self, job: Job, progress: dict[str, Any]) -> None:
        """Write how far a job is, for those who follow it."""
        with self.service.database.session() as session:
            held = self._held(session, job)
            if held is not None:
                held.progress = progress
                add_events(session, [JobEvent(job_id=job.id, kind="progress", data=progress)])

    def tell(self, texts: Sequence[tuple[str, str]]) -> None:
        """Write (job, new text) pairs for those who read along."""
        events = [JobEvent(job_id=job, kind="token", data={"text": text}) for job, text in texts]
        with self.service.database.session() as session:
            add_events(session, events)

    def _finish(self, job: Job, outcome: Outcome | BaseException) -> None:
        """Write the end of a job, however long the database is away."""
        stored = outcome.stored if isinstance(outcome, Outcome) else ""
        while True:
            try:
                with self.service.database.session() as session:
                    held = self._held(session, job)
                    if held is not None:
                        self._write(session, held, outcome)
                break
            except UNREACHABLE as error:
                log.warning("the end of job %s cannot be written yet: %s", job.id, _short(error))
                if self.stopping.wait(1):
                    return
            except Exception as error:
                if isinstance(outcome, BaseException):
                    raise
                outcome = error  # what it made cannot be written: that is its end
        self.held.pop(job.id, None)
        if stored:
            self._sweep(stored)
        elif held is None and job.study_id is not None:
            self._sweep(job.study_id)

    def _held(self, session: Session, job: Job) -> Job | None:
        mine = select(Job).where(
            Job.id == job.id,
            Job.worker == self.name,
            Job.state == "running",
            Job.attempts == job.attempts,
        )
        return session.scalar(mine.with_for_update())

    def _write(self, session: Session, job: Job, outcome: Outcome | BaseException) -> None:
        if job.cancel:
            end(session, job, "cancelled")
        elif isinstance(outcome, Outcome):
            end(session, job, "done", result=outcome.apply(session, job))
        elif isinstance(outcome, (Cancelled, *UNREACHABLE)):
            requeue(session, job, counted=False)
        elif isinstance(outcome, ValueError | LookupError):
            end(session, job, "failed", error=str(outcome))
        elif isinstance(outcome, OSError) and outcome.errno in FULL_DISK:
            end(session, job, "failed", error="The server's disk is full; tell its keeper.")
        else:
            log.error("job %s (%s) failed", job.id, job.kind, exc_info=outcome)
            if job.attempts < self.service.settings.attempts:
                requeue(session, job)
            else:
                reason = f"The work failed ({type(outcome).__name__}); the server's log says more."
                end(session, job, "failed", error=reason)

    def _sweep(self, study_id: str) -> None:
        """Remove what is left of a study that was thrown away while the job ran, or never came to
        be; what cannot be removed is tried again when the worker tends."""
        from med3dvlm.service.studies import clear

        try:
            with self.service.database.reading() as session:
                there = session.scalar(select(Study.id).where(Study.id == study_id))
            if there is None:
                clear(self.service, study_id)
            self.left.discard(study_id)
        except Exception:  # the job is over: there is nobody else to tell
            self.left.add(study_id)
            log.exception("study %s is gone, its files are not; trying again later", study_id)

    # --- the heartbeat ------------------------------------------------------------------------

    def _beat(self) -> None:
        lease_s = self.service.settings.lease_s
        seen = tended = -1e9
        while not self.stopping.wait(min(0.5, lease_s / 4)):
            now = time.monotonic()
            try:
                if self.held:
                    self._renew()
                if not self.fetches and now - seen > lease_s / 4:
                    self._appear()
                    seen = now
                if now - tended > TEND_S:
                    self._tend()
                    tended = now
            except UNREACHABLE:
                continue  # said by the one who works
            except Exception:  # without it, all that the worker holds would be taken from it
                log.exception("the heartbeat stumbled")
        if not self.fetches:
            with suppress(*UNREACHABLE), self.service.database.session() as session:
                session.execute(delete(WorkerSeen).where(WorkerSeen.name == self.name))

    def _renew(self) -> None:
        """Hold what is held for longer; notice what was cancelled or is held no more."""
        held = dict(self.held)
        mine = and_(Job.id.in_(held), Job.worker == self.name, Job.state == "running")
        with self.service.database.session() as session:
            lease = utc_now() + timedelta(seconds=self.service.settings.lease_s)
            session.execute(update(Job).where(mine).values(lease=lease))
            rows = session.execute(select(Job.id, Job.attempts, Job.cancel).where(mine))
            keep = {id for id, attempts, cancel in rows if attempts == held[id] and not cancel}
        self.given_up |= set(held) - keep
        if self.given_up & self.held.keys():
            self._interrupt()

    def _appear(self) -> None:
        with self.service.database.session() as session:
            session.merge(
                WorkerSeen(name=self.name, seen=utc_now(), facts=dict(self.service.models.facts))
            )

    def _tend(self) -> None:
        from med3dvlm.service.studies import tend

        for study_id in list(self.left):
            self._sweep(study_id)
        settings = self.service.settings
        with self.service.database.session() as session:
            old = utc_now() - timedelta(hours=settings.events_kept_h)
            session.execute(delete(JobEvent).where(JobEvent.created < old))
            # a fetch that brought nothing names a patient, and belongs to no study
            nothing = and_(Job.kind == FETCH, Job.study_id.is_(None), Job.ended < old)
            session.execute(delete(Job).where(nothing))
            gone = utc_now() - timedelta(days=1)
            session.execute(delete(WorkerSeen).where(WorkerSeen.seen < gone))
        tend(self.service)


def workers_alive(session: Session, settings: Settings) -> list[WorkerSeen]:
    """Those that were heard of within their lease."""
    since: datetime = utc_now() - timedelta(seconds=settings.lease_s)
    return list(session.scalars(select(WorkerSeen).where(WorkerSeen.seen > since)))


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]
