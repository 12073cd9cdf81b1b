"""Endpoints: sessions, accounts, keys and the audit log."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from med3dvlm.notice import notice_of
from med3dvlm.service import audit
from med3dvlm.service.access import keys, sessions, users
from med3dvlm.service.access.gate import OPEN_NOTICE, address_of, cookie_name
from med3dvlm.service.access.identity import Identity, require
from med3dvlm.service.access.limits import Buckets, network_of
from med3dvlm.service.access.oidc import OidcRefused, Provider
from med3dvlm.service.access.passwords import matches
from med3dvlm.service.access.permissions import permissions_of
from med3dvlm.service.access.tables import User
from med3dvlm.service.api.common import Storable
from med3dvlm.service.database import Database
from med3dvlm.service.settings import Settings

OIDC_COOKIE = "med3dvlm_oidc"

router = APIRouter(prefix="/api")

ManageUsers = Annotated[Identity, Depends(require("users:manage"))]
ManageKeys = Annotated[Identity, Depends(require("keys:manage"))]
ReadAudit = Annotated[Identity, Depends(require("audit:read"))]
OwnPassword = Annotated[Identity, Depends(require("password:own"))]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


Name = Annotated[str, StringConstraints(max_length=128), Storable]
Password = Annotated[str, StringConstraints(max_length=1024), Storable]


class SignIn(Strict):
    name: Name
    password: Password


class NewUser(Strict):
    name: Name
    display_name: Name = ""
    role: Name
    password: Password


class UserChange(Strict):
    display_name: Name | None = None
    role: Name | None = None
    disabled: bool | None = None
    password: Password | None = None


class OwnPasswordChange(Strict):
    old: Password
    new: Password


class NewKey(Strict):
    name: Name
    role: Name
    days: float = Field(90, gt=0, le=keys.MOST_DAYS)


class SessionInfo(BaseModel):
    """Who asks. Without a session, `user` is null and the page must sign in.

    `own_password`: whether the account has a password here, which its owner can change.
    """

    user: str | None
    display_name: str | None
    role: str | None
    permissions: list[str]
    own_password: bool
    csrf: str
    mode: str
    oidc: bool
    notice: str
    model_notice: str


class UserInfo(BaseModel):
    name: str
    display_name: str
    role: str
    sign_in: str
    created: datetime
    created_by: str
    disabled: datetime | None


class KeyInfo(BaseModel):
    id: str
    name: str
    role: str
    hint: str
    created: datetime
    created_by: str
    expires: datetime
    used: datetime | None
    revoked: datetime | None


class CreatedKey(KeyInfo):
    key: str = Field(description="Shown this one time.")


class AuditRows(BaseModel):
    rows: list[dict[str, Any]]
    next: int | None


class AuditVerdict(BaseModel):
    sound: bool
    rows: int
    hash: str
    broken: int | None
    reason: str | None


def _database(request: Request) -> Database:
    return request.app.state.database


def _settings(request: Request) -> Settings:
    return request.app.state.settings


def refused(error: ValueError) -> HTTPException:
    """An error of accounts and keys as an answer, in one sentence."""
    sentence = str(error)[:1].upper() + str(error)[1:]
    if isinstance(error, users.NoSuchAccount):
        return HTTPException(404, sentence)
    return HTTPException(422, sentence)


# --- sessions -------------------------------------------------------------------------------


@router.post("/session", tags=["session"], response_model=SessionInfo)
def sign_in(request: Request, body: SignIn) -> Response:
    """Sign in with name and password; an earlier session of this browser ends."""
    if request.state.open:
        raise HTTPException(409, "There are no accounts here, so there is nothing to sign in to.")
    _count_sign_in(request)
    address = address_of(request)
    try:
        found = sessions.sign_in(
            _database(request), _settings(request), body.name, body.password, address=address
        )
    except sessions.SignInRefused as error:
        if error.wait_s > 0:
            headers = {"Retry-After": str(int(error.wait_s) + 1)}
            raise HTTPException(429, str(error), headers) from error
        raise HTTPException(401, str(error)) from error
    response = JSONResponse(_session_info(request, found.identity, found.csrf).model_dump())
    _give_session(request, response, found)
    return response


@router.get("/session", tags=["session"])
def who_am_i(request: Request) -> SessionInfo:
    """Who asks, and how one can sign in."""
    found: sessions.Found | None = request.state.found
    return _session_info(request, request.state.identity, found.csrf if found else "")


@router.delete("/session", tags=["session"], status_code=204)
def sign_out(request: Request, everywhere: bool = False) -> Response:
    """End this session, or with `everywhere` all of the same user."""
    found: sessions.Found | None = request.state.found
    if found is not None:
        sessions.end(_database(request), found, everywhere=everywhere)
    response = Response(status_code=204)
    response.delete_cookie(cookie_name(request), secure=_secure(request), httponly=True)
    response.headers["Clear-Site-Data"] = '"cache"'
    return response


@router.put("/session/password", tags=["session"], response_model=SessionInfo)
def change_own_password(
    request: Request, body: OwnPasswordChange, identity: OwnPassword
) -> Response:
    """Change one's own password; every session of the account ends, and this one begins anew."""
    _count_sign_in(request)
    database, settings = _database(request), _settings(request)
    with database.reading() as session:
        user = session.get(User, identity.name)
    if user is None or identity.kind != "user":
        raise HTTPException(409, "There are no accounts here, so there is no password.")
    if user.password is not None and not matches(user.password, body.old):
        with database.session() as session:
            audit.record(session, identity, "user.password.refuse", f"user/{user.name}")
        raise HTTPException(422, "The current password is wrong.")
    _change_user(request, identity, user.name, password=body.new)
    with database.session() as session:
        user = session.get_one(User, user.name)
        found = sessions.start(session, user, settings, address=address_of(request))
    response = JSONResponse(_session_info(request, found.identity, found.csrf).model_dump())
    _set_cookie(request, response, found)
    return response


def _session_info(request: Request, identity: Identity | None, csrf: str) -> SessionInfo:
    is_open = request.state.open
    own_password = False
    if identity is not None and identity.kind == "user":
        with _database(request).reading() as session:
            user = session.get(User, identity.name)
            own_password = user is not None and user.password is not None
    return SessionInfo(
        user=identity.name if identity else None,
        display_name=identity.display_name if identity else None,
        role=identity.role if identity else None,
        permissions=permissions_of(identity.role, identity.kind) if identity else [],
        own_password=own_password,
        csrf=csrf,
        mode="open" if is_open else "accounts",
        oidc=request.app.state.oidc is not None,
        notice=OPEN_NOTICE if is_open else "",
        model_notice=notice_of(_settings(request).model),
    )


def _give_session(request: Request, response: Response, found: sessions.Found) -> None:
    before: sessions.Found | None = request.state.found
    if before is not None:
        sessions.end(_database(request), before)
    _set_cookie(request, response, found)


def _set_cookie(request: Request, response: Response, found: sessions.Found) -> None:
    response.set_cookie(
        cookie_name(request),
        found.token,
        httponly=True,
        samesite="strict",
        secure=_secure(request),
        path="/",
    )


def _secure(request: Request) -> bool:
    return request.url.scheme == "https"


def _count_sign_in(request: Request) -> None:
    buckets: Buckets = request.app.state.sign_ins
    wait = buckets.wait(network_of(address_of(request)))
    if wait > 0:
        headers = {"Retry-After": str(int(wait) + 1)}
        raise HTTPException(429, "Too many sign-ins from here; wait a little.", headers)


# --- OpenID ---------------------------------------------------------------------------------


@router.get("/oidc/login", tags=["session"], status_code=303, response_class=RedirectResponse)
def oidc_login(request: Request) -> Response:
    """Go to the hospital's OpenID provider."""
    provider = _provider(request)
    _count_sign_in(request)
    try:
        begun = provider.begin(_database(request))
    except OidcRefused as error:
        return RedirectResponse(f"/?sign_in={error.reason}", 303)
    response = RedirectResponse(begun.url, 303)
    response.set_cookie(
        cookie_name(request, OIDC_COOKIE),
        begun.browser,
        max_age=600,
        httponly=True,
        samesite="lax",  # strict ones do not come back from the provider
        secure=_secure(request),
    )
    return response


@router.get("/oidc/callback", tags=["session"], status_code=303, response_class=RedirectResponse)
def oidc_callback(request: Request) -> Response:
    """Come back, with a session or to /?sign_in=refused, expired, unavailable or no-role."""
    provider = _provider(request)
    _count_sign_in(request)
    browser = request.cookies.get(cookie_name(request, OIDC_COOKIE), "")
    try:
        found = provider.finish(
            _database(request), request.query_params, browser, address=address_of(request)
        )
        response = RedirectResponse("/", 303)
        _give_session(request, response, found)
    except OidcRefused as error:
        response = RedirectResponse(f"/?sign_in={error.reason}", 303)
    name = cookie_name(request, OIDC_COOKIE)
    response.delete_cookie(name, secure=_secure(request), httponly=True)
    return response


def _provider(request: Request) -> Provider:
    provider: Provider | None = request.app.state.oidc
    if provider is None:
        raise HTTPException(404, "There is no OpenID provider here.")
    return provider


# --- accounts -------------------------------------------------------------------------------


@router.get("/users", tags=["accounts"])
def list_users(request: Request, identity: ManageUsers) -> list[UserInfo]:
    with _database(request).reading() as session:
        return [UserInfo(**users.public(user)) for user in users.list_users(session)]


@router.post("/users", tags=["accounts"], status_code=201)
def add_user(request: Request, body: NewUser, identity: ManageUsers) -> UserInfo:
    try:
        user = users.add_user(
            _database(request),
            identity,
            body.name,
            role=body.role,
            password=body.password,
            display_name=body.display_name,
            password_length=_settings(request).password_length,
        )
    except ValueError as error:
        raise refused(error) from error
    return UserInfo(**users.public(user))


@router.patch("/users/{name}", tags=["accounts"])
def change_user(request: Request, name: Name, body: UserChange, identity: ManageUsers) -> UserInfo:
    """Change an account; another role or password ends its sessions."""
    return _change_user(request, identity, name, **body.model_dump())


@router.delete("/users/{name}", tags=["accounts"])
def disable_user(request: Request, name: Name, identity: ManageUsers) -> UserInfo:
    """Disable an account. It is kept, since signatures and the audit log name it."""
    return _change_user(request, identity, name, disabled=True)


def _change_user(request: Request, identity: Identity, name: str, **changes: Any) -> UserInfo:
    try:
        user = users.change_user(
            _database(request),
            identity,
            name,
            password_length=_settings(request).password_length,
            **changes,
        )
    except ValueError as error:
        raise refused(error) from error
    return UserInfo(**users.public(user))


# --- keys -----------------------------------------------------------------------------------


@router.get("/keys", tags=["accounts"])
def list_keys(request: Request, identity: ManageKeys) -> list[KeyInfo]:
    with _database(request).reading() as session:
        return [KeyInfo(**keys.public(key)) for key in keys.list_keys(session)]


@router.post("/keys", tags=["accounts"], status_code=201)
def add_key(request: Request, body: NewKey, identity: ManageKeys) -> CreatedKey:
    """Make a key; it is shown in this answer and never again."""
    try:
        key, token = keys.add_key(
            _database(request), identity, body.name, role=body.role, days=body.days
        )
    except ValueError as error:
        raise refused(error) from error
    return CreatedKey(**keys.public(key), key=token)


@router.delete("/keys/{id}", tags=["accounts"])
def revoke_key(request: Request, id: Name, identity: ManageKeys) -> KeyInfo:
    try:
        return KeyInfo(**keys.public(keys.revoke_key(_database(request), identity, id)))
    except ValueError as error:
        raise refused(error) from error


# --- audit ----------------------------------------------------------------------------------


@router.get("/audit", tags=["audit"])
def read_audit(
    request: Request,
    identity: ReadAudit,
    after: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> AuditRows:
    """The log from row `after` + 1 on."""
    with _database(request).reading() as session:
        rows = [row.public() for row in audit.rows_after(session, after, limit)]
    return AuditRows(rows=rows, next=rows[-1]["id"] if len(rows) == limit else None)


@router.post("/audit/verify", tags=["audit"])
def verify_audit(request: Request, identity: ReadAudit) -> AuditVerdict:
    """Go through the whole chain; names the first row that is not as it was written."""
    database = _database(request)
    with database.reading() as session:
        verdict = audit.verify(session)
    with database.session() as session:
        audit.record(session, identity, "audit.verify", "audit", sound=verdict.sound)
    return AuditVerdict(
        sound=verdict.sound,
        rows=verdict.rows,
        hash=verdict.hash,
        broken=verdict.broken,
        reason=verdict.reason,
    )
