"""Studies that are fetched from the PACS: jobs of the queue, with a progress that can be followed.

The job has no study until all of it is here: then the study is entered, in the transaction that
ends the job. What a worker that died left behind is thrown away by the one that takes the job up.
"""

from __future__ import annotations

import math
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, or_, select
from sqlalchemy.orm import Session

from med3dvlm.service import hospital, studies, work
from med3dvlm.service.access import Identity
from med3dvlm.service.audit import record
from med3dvlm.service.core import Service
from med3dvlm.service.database import UNREACHABLE, utc_now
from med3dvlm.service.hospital import PacsFailure
from med3dvlm.service.settings import Settings
from med3dvlm.service.studies import Conflict, NotThere
from med3dvlm.service.tables import ACTIVE, Job
from med3dvlm.service.work import FETCH, Outcome, Worker

if TYPE_CHECKING:
    from med3dvlm.hospital import FoundStudy, Pacs

ATTEMPTS = 3  # of a request that found nobody, or a busy PACS
TELL_S = 0.5  # between two words about the progress
SHOWN = timedelta(hours=1)  # that a fetch which failed stays in the list
LISTED = 50


# --- asking for it ----------------------------------------------------------------------------


def ask_for(
    session: Session,
    settings: Settings,
    identity: Identity,
    study_uid: str,
    series_uid: str | None,
) -> Job:
    """The job that fetches a series; where it is being fetched already, that job.

    Raises:
        Conflict: where no PACS is configured.
        QueueFull, UserLimit: where there is too much to do.
    """
    hospital.check_configured(settings)
    wanted = {"study_uid": study_uid, "series_uid": series_uid}
    running = select(Job).where(Job.kind == FETCH, Job.state.in_(ACTIVE), Job.cancel.is_(False))
    for job in session.scalars(running.order_by(Job.number)):
        if {name: job.request.get(name) for name in wanted} == wanted:
            return job
    job = work.submit(session, settings, FETCH, None, identity, **wanted, by=asdict(identity))
    job.progress = {"received": 0, **wanted}
    record(session, identity, "pacs.import", f"job/{job.id}", **wanted)
    return job


def listed(session: Session) -> list[Job]:
    """Fetches under way, and those that brought nothing lately; the newest first."""
    lately = and_(Job.state == "failed", Job.ended > utc_now() - SHOWN)
    query = select(Job).where(Job.kind == FETCH, or_(Job.state.in_(ACTIVE), lately))
    return list(session.scalars(query.order_by(Job.number.desc()).limit(LISTED)))


# --- the work ---------------------------------------------------------------------------------


def fetch(worker: Worker, jobs: Sequence[Job]) -> list[Outcome]:
    """Get a series from the PACS and take it in."""
    (job,) = jobs
    service, identity = worker.service, Identity(**job.request["by"])
    place = _place(service, job)
    try:
        series = _get(worker, job, place)
        came = studies.Came.at(place, series)
        with service.database.reading() as session:
            known = came.known(session) is not None
        study = None if known else studies.keep(service, came, identity, source="pacs")
    finally:
        shutil.rmtree(place.parent, ignore_errors=True)

    def apply(session: Session, job: Job) -> dict[str, Any]:
        # there was room when it was asked for: what took long to get is not refused now
        entered = studies.enter(session, came, study, identity, job=job.id)
        job.study_id = entered.id
        return {"study": entered.id, "new": entered is study}

    return [Outcome(apply, stored=study.id if study else "")]


def _get(worker: Worker, job: Job, place: Path) -> str:
    """Write the series into a folder; says which it was.

    Raises:
        PacsFailure: where the PACS did not give all of it.
        Cancelled: where the job is not to go on.
    """
    study_uid = job.request["study_uid"]
    try:
        with (
            hospital.connect(worker.service.settings, attempts=ATTEMPTS) as pacs,
            worker.interrupting(pacs.abort),
            Progress(worker, job) as progress,
        ):
            worker.check(job)
            progress.about(pacs, study_uid)
            chosen = _chosen(pacs.series(study_uid), job.request.get("series_uid"))
            progress.begin(chosen.images)
            got = pacs.get(study_uid, place, series_uid=chosen.series_uid, watch=progress)
    except PacsFailure:
        worker.check(job)  # what was called off is no failure of the PACS
        raise
    worker.check(job)
    if chosen.images is not None and got < chosen.images:
        raise PacsFailure(
            f"The PACS sent {got} of the {chosen.images} images that it says the series has; "
            "nothing was taken in. Try again."
        )
    return chosen.series_uid


def _chosen(series: list[FoundStudy], wanted: str | None) -> FoundStudy:
    if wanted is not None:
        found = [one for one in series if one.series_uid == wanted]
        if not found:
            raise NotThere("The PACS has no such series of that study.")
        return found[0]
    images = [one for one in series if hospital.is_image_series(one)]
    if not images:
        raise NotThere("The PACS has no images of that study.")
    if len(images) > 1:
        raise Conflict(
            f"The study has {len(images)} image series: name one, of those that "
            "/api/pacs/studies/{study_uid}/series lists."
        )
    return images[0]


def _place(service: Service, job: Job) -> Path:
    """A folder for this attempt, without what earlier ones on this machine left."""
    incoming = service.settings.data / "incoming"
    for old in incoming.glob(f"fetch-{job.id}-*"):
        if int(old.name.rpartition("-")[2]) < job.attempts:
            shutil.rmtree(old, ignore_errors=True)
    place = incoming / f"fetch-{job.id}-{job.attempts}"
    place.mkdir(parents=True, exist_ok=True)
    return place / "images"


class Progress:
    """Tells now and then how many images are here, and the last of them if no more come."""

    def __init__(self, worker: Worker, job: Job):
        self.worker, self.job = worker, job
        self.lock = threading.Lock()
        self.later: threading.Timer | None = None
        self.latest = 0, 0  # images, bytes
        self.facts: dict[str, Any] = {
            name: job.request.get(name) for name in ("study_uid", "series_uid")
        }
        self.due = 0.0

    def about(self, pacs: Pacs, study_uid: str) -> None:
        """Look up whose study it is, for those who did not ask for it."""
        for found in pacs.find(limit=1, StudyInstanceUID=study_uid):
            if found.study_uid == study_uid:
                said = hospital.describe_found(found)
                names = ("patient_name", "patient_id", "study_date", "description")
                self.facts |= {name: said[name] for name in names}

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.due = math.inf  # nothing is told any more
            if self.later is not None:
                self.later.cancel()

    def begin(self, of: int | None) -> None:
        self.facts["of"] = of
        self(0, 0)

    def __call__(self, received: int, size: int) -> None:
        with self.lock:
            self.latest = received, size
            wait = self.due - time.monotonic()
            if wait <= 0:
                self._tell()
            elif self.later is None:
                self.later = threading.Timer(wait, self._tell_later)
                self.later.daemon = True
                self.later.start()

    def _tell_later(self) -> None:
        with self.lock:
            self.later = None
            if self.due < math.inf:
                self._tell()

    def _tell(self) -> None:
        received, size = self.latest
        said = {"received": received, "bytes": size, **self.facts}
        with suppress(*UNREACHABLE):  # the next word says more
            self.worker.note_progress(self.job, said)
        self.due = time.monotonic() + TELL_S
