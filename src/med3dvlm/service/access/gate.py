"""The gate: every request is decided about before its body is read.

FastAPI reads a body before it asks any dependency, so that somebody unknown could fill the disk;
hence this middleware. It knows each endpoint's permission from its `require(…)`, and lets nothing
through that declares none.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, HTTPException, Request
from fastapi.routing import iter_route_contexts
from starlette.responses import JSONResponse
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

from med3dvlm.service.access import keys, sessions
from med3dvlm.service.access.headers import AWAY, DATA_PATHS, LATER_S, is_data
from med3dvlm.service.access.identity import Identity, Require, forbidden
from med3dvlm.service.access.limits import Buckets, limited, network_of, too_large
from med3dvlm.service.access.permissions import PUBLIC
from med3dvlm.service.access.users import any_account
from med3dvlm.service.database import UNREACHABLE, Database
from med3dvlm.service.settings import Settings

SAFE = ("GET", "HEAD", "OPTIONS")
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
COOKIE = "med3dvlm_session"
UPLOAD = "studies:upload"
SIGN_IN = ("POST", "/api/session")
"""Its session is ended by it, and the origin is checked; a stale page may sign in anew."""

OPEN_NOTICE = (
    "No accounts: whoever sits at this machine may read, draft and sign, without proof of who "
    "they are. Make one with: med3dvlm users add NAME --role administrator"
)
NOT_LOCAL = (
    "This server has no accounts, so it answers to its own machine only; make one with: "
    "med3dvlm users add NAME --role administrator"
)

IN_CLEAR = (
    "Passwords and patients' data cross the network in clear: set tls_certificate and tls_key, or "
    "trusted_proxies where a proxy ends TLS."
)

_log = logging.getLogger(__name__)


def open_mode(settings: Settings, database: Database) -> bool:
    """Whether nobody was ever given an account or key, and there is no OpenID provider."""
    if settings.oidc_issuer:
        return False
    with database.reading() as session:
        return not any_account(session)


def check_bind(settings: Settings, database: Database) -> None:
    """Refuse to serve other machines where anybody would be let in.

    Raises:
        ValueError: one sentence with what to do.
    """
    if not _is_local_name(settings.host) and open_mode(settings, database):
        raise ValueError(
            f"without accounts the server answers to its own machine only, not on host "
            f"{settings.host}: first run med3dvlm users add NAME --role administrator."
        )


def is_in_clear(settings: Settings) -> bool:
    """Whether passwords and patients' data would cross a network without TLS."""
    tls = settings.tls_certificate is not None or bool(settings.trusted_proxies)
    return not tls and not _is_local_name(settings.host)


def _is_local_name(host: str) -> bool:
    host = host.strip("[]").lower()
    return host == "localhost" or _is_loopback(host)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


# --- what an endpoint asks ------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One method and path, and what it takes: a permission, or None where it is public."""

    method: str
    path: str
    pattern: re.Pattern[str]
    permission: str | None


class UndeclaredError(RuntimeError):
    """An endpoint that does not say who may use it."""


def rules_of(app: FastAPI) -> list[Rule]:
    """Every endpoint of an app with its permission, in the order in which they are matched.

    Raises:
        UndeclaredError: for one that declares none and is not in `permissions.PUBLIC`.
    """
    return [rule for route in iter_route_contexts(app.routes) for rule in _rules(route)]


def _rules(route: Any) -> Iterator[Rule]:
    if isinstance(route.original_route, Mount):
        if route.path not in ("", "/"):  # the page's files
            raise UndeclaredError(f"{route.path} is mounted: only the page may be, at /.")
        return
    methods = (route.methods or set()) - {"HEAD"}
    if not methods or not is_data(route.path):
        raise UndeclaredError(f"{route.path}: endpoints lie under {', '.join(DATA_PATHS)}.")
    for method in sorted(methods):
        permission = _permission(getattr(route, "dependant", None))
        if permission is None and (method, route.path) not in PUBLIC:
            raise UndeclaredError(
                f"{method} {route.path} does not say who may use it: give it "
                "Depends(require(…)), or put it into permissions.PUBLIC."
            )
        yield Rule(method, route.path, route.path_regex, permission)


def _permission(dependant: Any) -> str | None:
    waiting = [dependant] if dependant is not None else []
    while waiting:
        one = waiting.pop()
        if isinstance(one.call, Require):
            return one.call.permission
        waiting += one.dependencies
    return None


# --- the gate -------------------------------------------------------------------------------


class Gate:
    """ASGI middleware; puts the caller's `Identity` into `scope["state"]["identity"]`.

    `scope["state"]["found"]` is the browser's session, where there is one.
    """

    def __init__(self, app: ASGIApp, *, rules: list[Rule], settings: Settings, database: Database):
        self.app, self.rules, self.settings, self.database = app, rules, settings, database
        self._users = Buckets(settings.requests_per_min)
        self._guests = Buckets(settings.guest_requests_per_min)
        self._has_accounts = False
        # of its own, so that endpoints that take long never keep anyone waiting here
        self._threads = CapacityLimiter(8)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no websockets here
            await send({"type": "websocket.close", "code": 1008})
            return
        request = Request(scope)
        try:
            most = await to_thread.run_sync(self._decide, request, limiter=self._threads)
        except HTTPException as error:
            _note_refusal(request, error)
            await _answer(error, request)(scope, receive, send)
        except UNREACHABLE:
            _log.exception("the database does not answer")
            error = HTTPException(503, AWAY, {"Retry-After": LATER_S})
            await _answer(error, request)(scope, receive, send)
        else:
            await self.app(scope, limited(receive, most), send)

    def _decide(self, request: Request) -> int:
        """Let a request in, with the bytes that it may send, or raise HTTPException."""
        path = request.scope["path"]
        if path.startswith("/health/"):  # probes come by address, and when the database is gone
            self._rule(request)
            return 0
        is_open = self._is_open()
        self._check_host(request, is_open)
        if not is_data(path):
            if request.method not in SAFE:
                raise HTTPException(405, "Only an endpoint takes that.", {"Allow": "GET, HEAD"})
            self._count_guest(request)
            return 0
        rule = self._rule(request)
        if request.method not in SAFE:
            self._check_origin(request)
        identity = self._identify(request, is_open)
        if identity is None:
            self._count_guest(request)
            if rule.permission is not None:
                raise _unknown("Sign in first.")
        else:
            _wait(self._users.wait(f"{identity.kind}:{identity.name}"))
            if rule.permission is not None and not identity.may(rule.permission):
                raise HTTPException(403, forbidden(identity, rule.permission))
        return self._body_limit(request, rule)

    def _rule(self, request: Request) -> Rule:
        path, allowed = request.scope["path"], []
        for rule in self.rules:
            if rule.pattern.match(path):
                if rule.method == request.method:
                    return rule
                allowed.append(rule.method)
        if allowed:
            raise HTTPException(
                405, f"Here one can only {', '.join(allowed)}.", {"Allow": ", ".join(allowed)}
            )
        raise HTTPException(404, "There is nothing of that name.")

    # who

    def _identify(self, request: Request, is_open: bool) -> Identity | None:
        state = request.scope.setdefault("state", {})
        address = address_of(request)
        found = None
        if is_open:
            self._check_local(request)
            identity = Identity("local", "Local user", "reviewer", "local", address)
        elif "authorization" in request.headers:
            identity = self._key_of(request, address)
        else:
            token = request.cookies.get(cookie_name(request), "")
            if token:
                found = sessions.find(self.database, self.settings, token, address=address)
            if found is not None:
                self._check_csrf(request, found)
            identity = found.identity if found is not None else None
        state |= {"identity": identity, "found": found, "open": is_open}
        return identity

    def _key_of(self, request: Request, address: str) -> Identity:
        scheme, _, token = request.headers["authorization"].partition(" ")
        identity = None
        if scheme.lower() == "bearer":
            identity = keys.find(self.database, token.strip(), address=address)
        if identity is None:
            self._count_guest(request)
            raise _unknown("The API key is unknown, revoked or expired.")
        return identity

    def _is_open(self) -> bool:
        # once there was an account, there always is
        self._has_accounts = self._has_accounts or not open_mode(self.settings, self.database)
        return not self._has_accounts

    def _check_local(self, request: Request) -> None:
        client = request.client.host if request.client else ""
        far = _is_address(client) and not _is_loopback(client)
        if far or any(name in request.headers for name in FORWARDED):
            raise HTTPException(403, NOT_LOCAL)

    def _check_csrf(self, request: Request, found: sessions.Found) -> None:
        if request.method in SAFE or (request.method, request.scope["path"]) == SIGN_IN:
            return
        given = request.headers.get("x-csrf-token", "")
        if not hmac.compare_digest(given.encode(), found.csrf.encode()):
            raise HTTPException(
                403, "The header X-CSRF-Token is missing or wrong; load the page again."
            )

    # from where

    def _check_host(self, request: Request, is_open: bool) -> None:
        """Against names that an attacker points at this server (DNS rebinding)."""
        allowed = self.settings.allowed_hosts
        if not allowed:
            if not is_open:
                return  # a cookie goes to the name it came from, and nobody is let in without
            allowed = LOCAL_HOSTS
        host = (urlsplit(f"//{request.headers.get('host', '')}").hostname or "").lower()
        if host not in allowed:
            raise HTTPException(
                400, f"This server does not answer to the name {host[:80]!r}; see allowed_hosts."
            )

    def _check_origin(self, request: Request) -> None:
        """Changes come from this server's own page, or from no page at all."""
        origin = request.headers.get("origin")
        foreign = request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if origin is not None:
            public = urlsplit(self.settings.public_url).netloc
            foreign = urlsplit(origin).netloc not in (request.headers.get("host"), public or None)
        if foreign:
            raise HTTPException(403, "A page of another site may not do this.")

    # how much

    def _count_guest(self, request: Request) -> None:
        _wait(self._guests.wait(network_of(address_of(request))))

    def _body_limit(self, request: Request, rule: Rule) -> int:
        upload = rule.permission == UPLOAD
        most = self.settings.upload_mb * 2**20 if upload else self.settings.body_kb * 2**10
        claimed = request.headers.get("content-length", "0")
        if not claimed.isdecimal() or int(claimed[:20]) > most:
            raise too_large(most)
        return most


def address_of(request: Request) -> str:
    return request.client.host if request.client else "unix"


def cookie_name(request: Request, name: str = COOKIE) -> str:
    """Under TLS with the prefix by which browsers take it from this very host only."""
    return f"__Host-{name}" if request.url.scheme == "https" else name


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _wait(seconds: float) -> None:
    if seconds > 0:
        raise HTTPException(
            429, "Too many requests; wait a little.", {"Retry-After": str(int(seconds) + 1)}
        )


def _unknown(sentence: str) -> HTTPException:
    return HTTPException(401, sentence, {"WWW-Authenticate": "Bearer"})


def _note_refusal(request: Request, error: HTTPException) -> None:
    """To the log, as JSON, so that nothing in a path can forge a line; no query, no header."""
    identity: Identity | None = request.scope.get("state", {}).get("identity")
    facts = {
        "refused": error.status_code,
        "who": identity.name if identity else None,
        "address": address_of(request),
        "method": request.method,
        "path": request.scope["path"][:200],
        "reason": error.detail,
    }
    _log.warning(json.dumps(facts))


def _answer(error: HTTPException, request: Request) -> JSONResponse:
    headers = dict(error.headers or {})
    if request.method not in SAFE:  # what is still to come of the body, nobody reads
        headers["Connection"] = "close"
    return JSONResponse({"detail": error.detail}, error.status_code, headers)
