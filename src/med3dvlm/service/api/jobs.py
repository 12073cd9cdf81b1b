"""Jobs: how far they are, what they say, calling them off."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Request
from pydantic_core import to_jsonable_python
from sse_starlette import EventSourceResponse

from med3dvlm.service import metrics, studies, work
from med3dvlm.service.api.common import Core, HexId, JobId, MayAsk, MayRead
from med3dvlm.service.api.schemas import JobOut, JobsOut
from med3dvlm.service.audit import record
from med3dvlm.service.core import Service
from med3dvlm.service.studies import NotThere
from med3dvlm.service.tables import Job
from med3dvlm.service.work import QueueFull

router = APIRouter(prefix="/api/jobs", tags=["jobs"])

PING_S, STALLED_S = 15, 20


@router.get("", response_model=JobsOut)
def of_study(study: HexId, identity: MayRead, core: Core) -> dict[str, Any]:
    """The jobs about a study, the newest first."""
    with core.database.reading() as session:
        studies.get(session, study)
        return {"jobs": [work.describe(session, job) for job in work.of_study(session, study)]}


@router.get("/{job_id}", response_model=JobOut)
def one(job_id: JobId, identity: MayRead, core: Core) -> dict[str, Any]:
    """A job."""
    with core.database.reading() as session:
        return work.describe(session, _find(session, job_id))


@router.delete("/{job_id}", response_model=JobOut)
def cancel(job_id: JobId, identity: MayAsk, core: Core) -> dict[str, Any]:
    """Call a job off: at once where it waits, within a second where it runs."""
    with core.database.session() as session:
        job = _find(session, job_id)
        if job.owner != identity.name:
            raise HTTPException(403, "The job is somebody else's.")
        work.cancel(session, job)
        record(session, identity, "job.cancel", f"job/{job_id}")
        return work.describe(session, job)


@router.get("/{job_id}/events", response_class=EventSourceResponse)
def events(
    job_id: JobId,
    request: Request,
    identity: MayRead,
    core: Core,
    last_event_id: Annotated[str | None, Header()] = None,
) -> EventSourceResponse:
    """Server-sent events until the job is over: token, state, done, failed, cancelled.

    A reader who was cut off goes on after `Last-Event-ID`.
    """
    with core.database.reading() as session:
        _find(session, job_id)
    after = int(last_event_id) if (last_event_id or "").isdecimal() else 0
    return stream(request, core, _lines(request, job_id, min(after, 2**62)))


def stream(request: Request, core: Service, lines: AsyncIterator[dict[str, Any]]) -> Any:
    """An answer of server-sent events; one too many is refused, a stalled reader is let go."""
    check_streams(request, core)
    state = request.app.state

    async def counted() -> AsyncIterator[dict[str, Any]]:
        state.streams += 1
        metrics.STREAMS.set(state.streams)
        try:
            async for line in lines:
                yield line
        finally:
            state.streams -= 1
            metrics.STREAMS.set(state.streams)

    headers = {"X-Accel-Buffering": "no"}
    return EventSourceResponse(
        counted(), ping=PING_S, send_timeout=STALLED_S, sep="\n", headers=headers
    )


def check_streams(request: Request, core: Service) -> None:
    """Raise `QueueFull` where one stream more is too many."""
    if request.app.state.streams >= core.settings.streams:
        raise QueueFull("Too many event streams are open; try again in a moment.")


async def _lines(request: Request, job_id: str, after: int) -> AsyncIterator[dict[str, Any]]:
    async for number, kind, data in request.app.state.events.events(job_id, after):
        yield {"id": str(number), "event": kind, "data": json.dumps(to_jsonable_python(data))}


def _find(session: Any, job_id: str) -> Job:
    job = work.find(session, job_id)
    if job is None:
        raise NotThere(f"There is no job {job_id}.")
    return job
