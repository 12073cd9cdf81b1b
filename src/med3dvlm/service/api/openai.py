"""The chat endpoint that existing clients know (OpenAI's `/v1/chat/completions`).

A study is named in the request, beside the messages or in them:

    {"model": "demo", "metadata": {"study": "<id>"}, "messages": [{"role": "user", "content": "…"}]}
    {"role": "user", "content": [{"type": "text", "text": "…"}, {"type": "study", "study": "<id>"}]}

`study` on the top level does, too (`extra_body={"study": …}` of the Python client). The model
answers one question at a time: of the messages the last by the user counts, and no sampling.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import to_jsonable_python

from med3dvlm.notice import notice_of
from med3dvlm.service import questions, work
from med3dvlm.service.access import Identity
from med3dvlm.service.api.common import Core, HexId, MayAsk, QueryText, Storable, nudge
from med3dvlm.service.api.jobs import check_streams, stream
from med3dvlm.service.core import Service
from med3dvlm.service.tables import Job

router = APIRouter(prefix="/v1", tags=["openai"])

STUDY = re.compile(r"[0-9a-f]{32}")


class Part(BaseModel):
    """A piece of a message: text, or which study it is about."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text", "study"]
    text: Annotated[str, Field(max_length=2000), Storable] | None = None
    study: HexId | None = None


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, Field(max_length=20_000), Storable] | list[Part] | None = None


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatIn(BaseModel):
    """What is taken of a chat request; what else there is, is not minded."""

    model_config = ConfigDict(extra="allow")

    model: QueryText
    messages: Annotated[list[Message], Field(min_length=1, max_length=200)]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    metadata: dict[str, Any] | None = None
    study: HexId | None = None


class ChatError(Exception):
    """A request that cannot be answered, in OpenAI's form."""

    def __init__(self, message: str, *, status: int = 400, code: str = "invalid_request"):
        super().__init__(message)
        self.status, self.code = status, code

    def response(self) -> JSONResponse:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {"message": str(self), "type": kind, "param": None, "code": self.code}
        return JSONResponse({"error": error}, self.status)


@router.get("/models")
def models(identity: MayAsk, core: Core) -> dict[str, Any]:
    """The one model that answers here."""
    name = core.settings.model
    card = {"id": name, "object": "model", "created": 0, "owned_by": "med3dvlm"}
    return {"object": "list", "data": [{**card, "notice": notice_of(name)}]}


@router.post("/chat/completions")
async def chat(request: Request, asked: ChatIn, identity: MayAsk, core: Core) -> Any:
    """Answer the last question of a chat about a study."""
    if asked.model != core.settings.model:
        known = core.settings.model
        message = f"The model {asked.model!r} does not exist here: use {known!r}."
        raise ChatError(message, status=404, code="model_not_found")
    question, study = _question(asked)
    if asked.stream:  # before there is a job that nobody would hear of
        check_streams(request, core)
    job = await run_in_threadpool(_submit, core, identity, study, question)
    nudge(request)
    head = {
        "id": f"chatcmpl-{job.id}",
        "created": int(job.created.timestamp()),
        "model": core.settings.model,
    }
    if asked.stream:
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        lines = _chunks(request, core, job, head, usage=usage)
        return stream(request, core, lines)
    return await _whole(request, core, job, head)


def _question(asked: ChatIn) -> tuple[str, str]:
    """The last question, and the study that the request names."""
    named = [asked.study, (asked.metadata or {}).get("study")]
    text = ""
    for message in asked.messages:
        parts = message.content if isinstance(message.content, list) else []
        named += [part.study for part in parts if part.study]
        if message.role == "user":
            texts = [part.text for part in parts if part.text]
            text = message.content if isinstance(message.content, str) else "\n".join(texts)
    study = next((str(one) for one in reversed(named) if one), None)
    if study is None or not STUDY.fullmatch(study):
        raise ChatError("Name a study: metadata.study, or a content part of type study.")
    if not text.strip():
        raise ChatError("There is no question: end with a message by the user.")
    if len(text) > 2000:
        raise ChatError("The question is longer than 2000 characters: shorten it.")
    return text, study


def _submit(core: Service, identity: Identity, study: str, question: str) -> Job:
    with core.database.session() as session:
        job, _ = questions.submit(core, session, study, identity, question)
        return job


async def _whole(request: Request, core: Service, job: Job, head: dict[str, Any]) -> Any:
    """The answer when it is there; a client that hangs up does not keep the model busy."""
    asking = asyncio.ensure_future(_end(request, job))
    while not asking.done():
        await asyncio.wait([asking], timeout=0.5)
        if not asking.done() and await request.is_disconnected():
            asking.cancel()
            await run_in_threadpool(_cancel, core, job.id)
            return JSONResponse(None, 499)
    kind, data = asking.result()
    if kind != "done":
        raise ChatError(_reason(kind, data), status=409, code="not_answered")
    answer = data["result"]["answer"]
    message = {"role": "assistant", "content": answer, "refusal": None}
    return {
        **head,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": _usage(job, answer),
        "med3dvlm": _about(core, data),
    }


async def _end(request: Request, job: Job) -> tuple[str, Any]:
    last: tuple[str, Any] = ("cancelled", {})
    async for _, kind, data in request.app.state.events.events(job.id):
        last = kind, data
    return last


async def _chunks(
    request: Request, core: Service, job: Job, head: dict[str, Any], *, usage: bool
) -> AsyncIterator[dict[str, str]]:
    """Server-sent chunks as the model writes; the job is called off where the client hangs up."""

    def chunk(delta: dict[str, Any], end: str | None = None, **more: Any) -> dict[str, str]:
        choice = {"index": 0, "delta": delta, "finish_reason": end, "logprobs": None}
        body = {**head, "object": "chat.completion.chunk", "choices": [choice], **more}
        return {"data": json.dumps(to_jsonable_python(body))}

    over, sent = False, ""
    try:
        yield chunk({"role": "assistant", "content": ""})
        async for _, kind, data in request.app.state.events.events(job.id):
            over = kind not in ("token", "state")
            if kind == "token":
                sent += data["text"]
                yield chunk({"content": data["text"]})
            elif kind == "state" and sent:  # taken up again: what was sent cannot be unsaid
                yield _error("The work was interrupted; ask again.")
                return
            elif kind == "done":
                answer = data["result"]["answer"]
                if not sent:  # remembered, or held back until it was sure enough
                    yield chunk({"content": answer})
                yield chunk({}, "stop", med3dvlm=_about(core, data))
                if usage:
                    body = {**head, "object": "chat.completion.chunk", "choices": []}
                    yield {"data": json.dumps({**body, "usage": _usage(job, answer)})}
            elif over:
                yield _error(_reason(kind, data))
                return
        yield {"data": "[DONE]"}
    finally:
        if not over:
            await asyncio.shield(run_in_threadpool(_cancel, core, job.id))


def _error(message: str) -> dict[str, str]:
    error = {"message": message, "type": "server_error", "param": None, "code": "not_answered"}
    return {"data": json.dumps({"error": error})}


def _reason(kind: str, data: Any) -> str:
    return str((data or {}).get("error") or f"The question was {kind}.")


def _cancel(core: Service, job_id: str) -> None:
    with core.database.session() as session:
        job = work.find(session, job_id)
        if job is not None:
            work.cancel(session, job)


def _usage(job: Job, answer: str) -> dict[str, int]:
    """Counted in words: the tokenizer is with the worker."""
    prompt, completion = len(str(job.request["text"]).split()), len(answer.split())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _about(core: Service, job: dict[str, Any]) -> dict[str, Any]:
    """What an answer rests on, beside OpenAI's own fields."""
    result = job["result"]
    names = ("confidence", "calibrated", "model", "weights", "preparation")
    return {
        "job": job["id"],
        "study": job["study"],
        **{name: result[name] for name in names},
        "notice": notice_of(str(result["model"])),
    }
