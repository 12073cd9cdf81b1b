"""Is the server alive, is it ready?"""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, Request

from med3dvlm.service.database import UNREACHABLE

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live")
def live() -> dict[str, str]:
    """The process answers."""
    return {"status": "alive"}


@router.get("/ready")
def ready(request: Request) -> dict[str, str]:
    """It can do its work: the database answers."""
    try:
        request.app.state.database.check()
    except UNREACHABLE as error:
        raise HTTPException(503, "The database does not answer.") from error
    return {"status": "ready"}
