"""`create_app`: the endpoints, and what they share, put together from the settings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from med3dvlm import __version__
from med3dvlm.service.access import api as access
from med3dvlm.service.access.install import install
from med3dvlm.service.api import health
from med3dvlm.service.database import Database
from med3dvlm.service.settings import Settings


def create_app(settings: Settings) -> FastAPI:
    """The whole service: `app.state` has `settings` and `database`."""
    app = FastAPI(
        title="med3dvlm",
        version=__version__,
        description="3D medical scans and language. Research use only; not a medical device.",
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.settings = settings
    app.state.database = Database(settings.database_url)
    app.include_router(health.router)
    app.include_router(access.router)
    install(app)  # after every endpoint: what it does not know, it lets nobody into
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    yield
    app.state.database.close()
