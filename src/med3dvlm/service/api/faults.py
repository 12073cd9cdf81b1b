"""What becomes of what goes wrong: one sentence with the fitting status, and never half an act."""

from __future__ import annotations

import errno
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from med3dvlm.search import SearchIndexError
from med3dvlm.service.access.headers import AWAY, FAILED, LATER_S
from med3dvlm.service.access.users import AccountError
from med3dvlm.service.api.openai import ChatError
from med3dvlm.service.database import UNREACHABLE
from med3dvlm.service.search import NoSearchError
from med3dvlm.service.storage import StorageError
from med3dvlm.service.studies import Conflict, NotThere, Unusable
from med3dvlm.service.work import FULL_DISK, QueueFull, UserLimit

SOON_S = "2"
FULL = "The server's disk is full, nothing was written; tell its keeper."

log = logging.getLogger("med3dvlm.service")


def install_faults(app: FastAPI) -> None:
    """Turn what the service raises into answers."""
    for kind, status in {
        NotThere: 404,
        Conflict: 409,
        Unusable: 422,
        AccountError: 422,
        NoSearchError: 409,
        SearchIndexError: 422,
    }.items():
        app.add_exception_handler(kind, _sentence(status))
    app.add_exception_handler(QueueFull, _sentence(503, SOON_S))
    app.add_exception_handler(UserLimit, _sentence(429, SOON_S))
    app.add_exception_handler(ChatError, lambda request, error: error.response())  # type: ignore[attr-defined]
    app.add_exception_handler(RequestValidationError, _invalid)
    for kind in UNREACHABLE:
        app.add_exception_handler(kind, _database)
    app.add_exception_handler(StorageError, _storage)
    app.add_exception_handler(OSError, _disk)
    app.add_exception_handler(Exception, _fault)


def _sentence(status: int, retry_after: str | None = None) -> Any:
    headers = {"Retry-After": retry_after} if retry_after else None

    def answer(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": " ".join(str(error).split())}, status, headers)

    return answer


def _invalid(request: Request, error: Exception) -> JSONResponse:
    """The first of what is wrong with a request, in a sentence."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
    detail = f"{place}: {first['msg']}."
    return JSONResponse({"detail": detail.encode("utf-8", "replace").decode()}, 422)


def _database(request: Request, error: Exception) -> JSONResponse:
    """Away, or out of space."""
    log.warning("%s %s: %s", request.method, request.url.path, " ".join(str(error).split())[:200])
    original = getattr(error, "orig", None)
    text = str(original).lower()
    if getattr(original, "sqlstate", None) == "53100" or "is full" in text or "disk i/o" in text:
        return JSONResponse({"detail": FULL}, 507)
    return JSONResponse({"detail": AWAY}, 503, {"Retry-After": LATER_S})


def _storage(request: Request, error: Exception) -> JSONResponse:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return JSONResponse({"detail": str(error)}, 503, {"Retry-After": LATER_S})


def _disk(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OSError)
    if error.errno in FULL_DISK:
        return JSONResponse({"detail": FULL}, 507)
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    if error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ECONNREFUSED):
        detail = "The storage does not answer; try again in a moment."
        return JSONResponse({"detail": detail}, 503, {"Retry-After": LATER_S})
    return _fault(request, error)


def _fault(request: Request, error: Exception) -> JSONResponse:
    """What nobody thought of: the log has it, and the caller learns nothing of the inside."""
    return JSONResponse({"detail": FAILED}, 500)
