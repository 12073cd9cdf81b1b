"""Is the server alive, is it ready, how is it doing?"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from med3dvlm.notice import notice_of
from med3dvlm.service import metrics, studies, work
from med3dvlm.service.api.common import Core, MayMeasure, MayRead
from med3dvlm.service.api.schemas import ModelOut
from med3dvlm.service.database import UNREACHABLE, utc_now
from med3dvlm.service.tables import Job

router = APIRouter(tags=["health"])


@router.get("/health/live")
def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "alive"}


@router.get("/health/ready", responses={503: {"description": "Not ready."}})
def ready(request: Request, core: Core) -> Any:
    """It can take work: the database answers. Says also whether a worker is there to do it."""
    worker = request.app.state.worker
    if worker is not None and worker.fault is not None:
        return JSONResponse({"status": "failed", "reason": "The worker ended; see the log."}, 503)
    try:
        with core.database.reading() as session:
            alive = work.workers_alive(session, core.settings)
    except UNREACHABLE:
        return JSONResponse({"status": "failed", "reason": "The database does not answer."}, 503)
    return {"status": "ready", "workers": len(alive)}


@router.get("/api/model", response_model=ModelOut)
def model(identity: MayRead, core: Core) -> dict[str, Any]:
    """Which model answers here, as the workers have loaded it."""
    with core.database.reading() as session:
        alive = work.workers_alive(session, core.settings)
    facts = alive[0].facts if alive else {}
    label = str(facts.get("model", core.settings.model))
    about = {name: facts.get(name) for name in ("weights", "preparation", "calibrated")}
    return {"label": label, **about, "notice": notice_of(label)}


@router.get("/metrics", response_class=Response)
def measured(identity: MayMeasure, core: Core) -> Response:
    """For Prometheus; what is counted per process is this process's."""
    with core.database.reading() as session:
        _look(session, core)
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def _look(session: Session, core: Core) -> None:
    since = utc_now() - timedelta(days=1)
    counted = (
        select(Job.kind, Job.state, func.count())
        .where(Job.created > since)
        .group_by(Job.kind, Job.state)
    )
    metrics.JOBS.clear()
    for kind, state, number in session.execute(counted):
        metrics.JOBS.labels(kind, state).set(number)
    queued = select(func.count()).select_from(Job).where(Job.state == "queued")
    metrics.QUEUED.set(session.scalar(queued) or 0)
    metrics.STUDIES.clear()
    for state, number in studies.count(session).items():
        metrics.STUDIES.labels(state).set(number)
    metrics.WORKERS.set(len(work.workers_alive(session, core.settings)))
