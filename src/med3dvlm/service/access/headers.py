"""What a browser may do with an answer; and an orderly answer where the server failed."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PAGE_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # NiiVue's textures
        "font-src 'self'",
        "connect-src 'self'",
        "manifest-src 'self'",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
DATA_POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox"
)
"""Of what is no page: were it shown as one, it could load and run nothing."""

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
}
AWAY, LATER_S = "The database does not answer; try again in a moment.", "10"
FAILED = "The server failed; its log says why."
DATA_PATHS = ("/api/", "/v1/", "/metrics", "/health/", "/openapi.json")


def is_data(path: str) -> bool:
    """Whether a path is an endpoint's, and not a file of the page."""
    return path.startswith(DATA_PATHS)


class SecurityHeaders:
    """Puts the headers on every answer, also on those of the server's own failures."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                _add(MutableHeaders(scope=message), scope)
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception:  # raised again below: the client gets a sentence, the log the fault
            if not started:
                response = JSONResponse({"detail": FAILED}, 500)
                await response(scope, receive, send_with_headers)
            raise  # to the log


def _add(headers: MutableHeaders, scope: Scope) -> None:
    data = is_data(scope["path"])
    for name, value in HEADERS.items():
        headers[name] = value
    headers["Content-Security-Policy"] = DATA_POLICY if data else PAGE_POLICY
    if scope["scheme"] == "https":
        headers["Strict-Transport-Security"] = "max-age=31536000; includeSubDomains"
    if data:  # patients' data: nothing is kept but what an endpoint says may be
        headers.setdefault("Cache-Control", "no-store")
