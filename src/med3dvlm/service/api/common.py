"""What the endpoints share: who asks, what is worked with, what a text may be."""

from __future__ import annotations

from pathlib import Path as LocalPath
from typing import Annotated, Any

from fastapi import Depends, Path, Request, Response
from fastapi.responses import FileResponse
from pydantic import AfterValidator, BaseModel, StringConstraints

from med3dvlm.service.access import Identity, require
from med3dvlm.service.core import Service

BIG = 2**31 - 1  # what a database takes for a number


class Problem(BaseModel):
    """What every refusal says."""

    detail: str


PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (400, 401, 403, 404, 409, 422, 429, 503, 507)
}


def _storable(text: str) -> str:
    if "\0" in text:
        raise ValueError("it holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("it is not valid Unicode") from error
    return text


Storable = AfterValidator(_storable)
Words = Annotated[str, StringConstraints(min_length=1, max_length=2000, pattern=r"\S"), Storable]
Text = Annotated[str, StringConstraints(max_length=20_000), Storable]
PersonName = Annotated[str, StringConstraints(min_length=1, max_length=200), Storable]
QueryText = Annotated[str, StringConstraints(max_length=400), Storable]
HexId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
StudyId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]
JobId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$")]


def _service(request: Request) -> Service:
    return request.app.state.service


Core = Annotated[Service, Depends(_service)]

MayRead = Annotated[Identity, Depends(require("studies:read"))]
MayUpload = Annotated[Identity, Depends(require("studies:upload"))]
MayDelete = Annotated[Identity, Depends(require("studies:delete"))]
MayAsk = Annotated[Identity, Depends(require("studies:ask"))]
MayDraft = Annotated[Identity, Depends(require("reports:draft"))]
MayEdit = Annotated[Identity, Depends(require("reports:edit"))]
MaySign = Annotated[Identity, Depends(require("reports:sign"))]
MayExplain = Annotated[Identity, Depends(require("evidence:make"))]
MaySearch = Annotated[Identity, Depends(require("search"))]
MayMeasure = Annotated[Identity, Depends(require("metrics:read"))]
MayExportCorrections = Annotated[Identity, Depends(require("corrections:export"))]


def unchanging(request: Request, path: LocalPath, kind: str, tag: str) -> Response:
    """A file that never changes: a browser that has it is told so, if it may still see it."""
    headers = {"Cache-Control": "private, no-cache", "ETag": f'"{tag}"'}
    given = request.headers.get("if-none-match", "").split(",")
    known = [one.strip().removeprefix("W/") for one in given]
    if headers["ETag"] in known:
        return Response(status_code=304, headers=headers)
    return FileResponse(path, media_type=kind, headers=headers)


def nudge(request: Request) -> None:
    """Tell a worker in this process that there is something to do."""
    worker = request.app.state.worker
    if worker is not None:
        worker.awake.set()
