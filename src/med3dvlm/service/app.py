"""`create_app`: the endpoints, and what they share, put together from the settings."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from anyio import to_thread
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from med3dvlm import __version__
from med3dvlm.service import metrics, work
from med3dvlm.service.access import api as access
from med3dvlm.service.access.install import install
from med3dvlm.service.api import (
    evidence,
    health,
    hospital,
    jobs,
    openai,
    questions,
    reports,
    search,
    studies,
)
from med3dvlm.service.api.common import PROBLEMS
from med3dvlm.service.api.faults import install_faults
from med3dvlm.service.core import Service
from med3dvlm.service.database import UNREACHABLE
from med3dvlm.service.events import EventHub
from med3dvlm.service.migrations import migrate
from med3dvlm.service.settings import Settings
from med3dvlm.service.studies import tend
from med3dvlm.service.work import Worker

WEB = Path(__file__).parent / "web"
ROUTERS = (studies, questions, reports, evidence, search, jobs, openai, hospital)

log = logging.getLogger("med3dvlm.service")


def create_app(settings: Settings) -> FastAPI:
    """The whole service; the schema is brought up to date, and a worker runs as a thread of it
    unless `settings.workers` says otherwise.

    `app.state` has `settings`, `service`, `database`, `worker` (None where it is elsewhere),
    `events`.
    """
    app = FastAPI(
        title="med3dvlm",
        version=__version__,
        description="3D medical scans and language. Research use only; not a medical device.",
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
    )
    service = Service.open(settings)
    migrate(service.database)
    app.state.settings, app.state.service = settings, service
    app.state.database = service.database
    app.state.worker = Worker(service) if settings.workers is None else None
    app.state.streams = 0
    app.include_router(health.router)
    app.include_router(access.router)
    for router in ROUTERS:
        app.include_router(router.router, responses=PROBLEMS)
    install_faults(app)
    app.mount("/", _Page(directory=WEB, html=True), name="page")
    app.add_middleware(_Counted)
    install(app)  # after every endpoint: what it does not know, it lets nobody into
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    state = app.state
    state.events = EventHub(state.service)
    tending = None
    if state.worker is not None:
        state.worker.start()
    else:
        tending = asyncio.create_task(_tend(state.service))
    try:
        yield
    finally:
        if tending is not None:
            tending.cancel()
            with suppress(asyncio.CancelledError):
                await tending
        if state.worker is not None:
            await to_thread.run_sync(state.worker.stop)
        state.events.close()
        state.service.close()


async def _tend(service: Service) -> None:
    """What a worker does for its machine, where the workers may be on others: drop old copies."""
    while True:
        try:
            await to_thread.run_sync(tend, service)
        except UNREACHABLE:
            pass  # said to those who ask for something
        except Exception:  # were this to end, copies of deleted studies would stay for good
            log.exception("copies of files could not be looked through; trying again later")
        await asyncio.sleep(work.TEND_S)


class _Page(StaticFiles):
    """The page's files, asked for anew each time: they change with the version."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers["Cache-Control"] = "no-cache"
        return response


class _Counted:
    """Counts requests and the seconds until their answers begin, by route and not by path."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        await self.app(scope, receive, _counting(scope, send))


def _counting(scope: Scope, send: Send) -> Callable[[Message], Any]:
    began = time.monotonic()

    async def counted(message: Message) -> None:
        if message["type"] == "http.response.start":
            route = getattr(scope.get("route"), "path", "other") or "page"
            metrics.REQUESTS.labels(scope["method"], route, message["status"]).inc()
            metrics.SECONDS.labels(route).observe(time.monotonic() - began)
        await send(message)

    return counted
