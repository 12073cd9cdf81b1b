"""What happens to jobs, passed on to those who read along: one look at the database serves all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from sqlalchemy import func, select

from med3dvlm.service import work
from med3dvlm.service.core import Service
from med3dvlm.service.database import UNREACHABLE
from med3dvlm.service.tables import ACTIVE, JobEvent

LOOK_S = 0.08  # between looks
AWAY_S = 1.0  # after a look that failed
ENDS = ("done", "failed", "cancelled")

T = TypeVar("T")


class EventHub:
    """Follows the jobs that somebody follows, for one event loop."""

    def __init__(self, service: Service):
        self.service = service
        self.queues: dict[str, set[asyncio.Queue[JobEvent]]] = {}
        self.last = 0
        self.task: asyncio.Task[None] | None = None
        self.threads = ThreadPoolExecutor(2, "events")  # apart from those that answer requests

    async def events(self, job_id: str, after: int = 0) -> AsyncIterator[tuple[int, str, Any]]:
        """(number, kind, data) of what happened since `after` and happens until the job is over.

        Numbers count up, so that a reader who was cut off goes on after the last it saw. Where
        the database is away, so are the events; they come when it is back.
        """
        last = after
        async with self._queue(job_id) as queue:
            history = await self._patiently(lambda: self._history(job_id, after))
            if not history:
                job = await self._patiently(lambda: self._job(job_id))
                if job is None:
                    return
                if job["state"] not in ACTIVE:  # what it said is forgotten, or was heard already
                    yield last, job["state"], await self._data(job_id, job["state"], {})
                    return
                yield last, "state", {"state": job["state"], "attempt": job["attempts"]}
            while True:
                event = history.pop(0) if history else await queue.get()
                if event.number <= last:
                    continue
                last = event.number
                yield last, event.kind, await self._data(job_id, event.kind, event.data)
                if event.kind in ENDS:
                    return

    async def _data(self, job_id: str, kind: str, data: Any) -> Any:
        return await self._patiently(lambda: self._job(job_id)) if kind == "done" else data

    def close(self) -> None:
        if self.task is not None:
            self.task.cancel()
        self.threads.shutdown(wait=False, cancel_futures=True)

    # --- the one who looks ----------------------------------------------------------------------

    @asynccontextmanager
    async def _queue(self, job_id: str) -> AsyncIterator[asyncio.Queue[JobEvent]]:
        if not self.queues:
            newest = await self._patiently(self._newest)
            if not self.queues:  # else another reader began meanwhile, and waits for what is older
                self.last = newest
        queue: asyncio.Queue[JobEvent] = asyncio.Queue()
        self.queues.setdefault(job_id, set()).add(queue)
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._look())
        try:
            yield queue
        finally:
            self.queues[job_id].discard(queue)
            if not self.queues[job_id]:
                del self.queues[job_id]

    async def _look(self) -> None:
        while self.queues:
            await asyncio.sleep(LOOK_S)
            for event in await self._patiently(self._since):
                self.last = event.number
                for queue in self.queues.get(event.job_id, ()):
                    queue.put_nowait(event)

    async def _patiently(self, read: Callable[[], T]) -> T:
        """What a read of the database gives, as soon as that answers."""
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(*UNREACHABLE):
                return await loop.run_in_executor(self.threads, read)
            await asyncio.sleep(AWAY_S)

    def _newest(self) -> int:
        with self.service.database.reading() as session:
            return session.scalar(select(func.max(JobEvent.number))) or 0

    def _since(self) -> list[JobEvent]:
        query = select(JobEvent).where(JobEvent.number > self.last).order_by(JobEvent.number)
        with self.service.database.reading() as session:
            return list(session.scalars(query.limit(1000)))

    def _history(self, job_id: str, after: int) -> list[JobEvent]:
        query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.number > after)
        with self.service.database.reading() as session:
            return list(session.scalars(query.order_by(JobEvent.number)))

    def _job(self, job_id: str) -> dict[str, Any] | None:
        with self.service.database.reading() as session:
            job = work.find(session, job_id)
            return None if job is None else work.describe(session, job)
