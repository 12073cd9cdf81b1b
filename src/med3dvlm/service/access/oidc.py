"""Signing in at the hospital's own OpenID provider (OpenID Connect Core 1.0, code flow with PKCE).

The provider is the one place that the service itself calls for access, and only where
`oidc_issuer` names it.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from authlib.integrations.base_client import OAuthError
from authlib.integrations.httpx_client import OAuth2Client
from authlib.oidc.core import CodeIDToken
from httpx2 import HTTPError, InvalidURL
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError
from joserfc.jwk import KeySet
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from med3dvlm.service.access.identity import Identity
from med3dvlm.service.access.permissions import check_role
from med3dvlm.service.access.sessions import Found, identity_of, start
from med3dvlm.service.access.tables import OidcLogin, User, hashed
from med3dvlm.service.access.users import (
    AccountError,
    account_name,
    end_sessions,
    readable_name,
)
from med3dvlm.service.audit import record
from med3dvlm.service.database import Database, serialise, utc_now
from med3dvlm.service.settings import Settings, SettingsError

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512")
"""Signatures by the provider's private key only: never none, never one with a shared secret."""
LEEWAY_S = 60
AT_PROVIDER = timedelta(minutes=10)
METADATA_KEPT_S = 3600
KEYS_EVERY_S = 60
TIMEOUT_S = 5

_log = logging.getLogger(__name__)


class OidcRefused(Exception):
    """No session; `reason` is what the page is told: refused, expired, unavailable, no-role."""

    def __init__(self, reason: str, sentence: str):
        super().__init__(sentence)
        self.reason = reason


@dataclass(frozen=True)
class Begun:
    """A sign-in to go on with at the provider."""

    url: str
    browser: str  # the browser's cookie until it is back


class Provider:
    """The OpenID provider of the settings; may be used by many threads."""

    def __init__(self, settings: Settings):
        """Raises SettingsError where settings that belong together are not all there."""
        for name in ("oidc_client", "public_url", "oidc_roles"):
            if not getattr(settings, name):
                raise SettingsError(f"setting {name!r} is missing: oidc_issuer needs it.")
        for role in settings.oidc_roles.values():
            check_role(role)
        for name in ("oidc_issuer", "public_url"):
            _check_secure(getattr(settings, name))
        self.settings = settings
        self.redirect = settings.public_url.rstrip("/") + "/api/oidc/callback"
        self._lock = threading.Lock()
        self._metadata: tuple[float, dict[str, Any]] | None = None
        self._keys: tuple[float, KeySet] | None = None

    # --- the two halves of a sign-in

    def begin(self, database: Database) -> Begun:
        """What to remember, and where to send the browser.

        Raises:
            OidcRefused: if the provider does not answer.
        """
        endpoint = self._endpoint("authorization_endpoint")
        state, nonce, browser = (secrets.token_urlsafe(32) for _ in range(3))
        verifier = secrets.token_urlsafe(64)
        with self._client() as client:
            url, _ = client.create_authorization_url(
                endpoint, state=state, nonce=nonce, code_verifier=verifier
            )
        now = utc_now()
        with database.session() as session:
            session.execute(delete(OidcLogin).where(OidcLogin.created < now - AT_PROVIDER))
            session.add(
                OidcLogin(
                    state=hashed(state),
                    browser=hashed(browser),
                    nonce=nonce,
                    verifier=verifier,
                    created=now,
                )
            )
        return Begun(url, browser)

    def finish(
        self, database: Database, answer: Mapping[str, str], browser: str, *, address: str
    ) -> Found:
        """Start a session from what the provider sent back.

        Args:
            answer: the query of the callback.
            browser: the cookie that `begin` gave.

        Raises:
            OidcRefused: for whatever is not a good answer to a sign-in of this browser.
        """
        try:
            login = self._take(database, answer, browser)
            claims = self._claims(answer, login)
            role = self._role(claims)
            with database.session() as session:
                serialise(session, "users")
                user = self._user(session, claims, role, address)
                return start(session, user, self.settings, address=address)
        except OidcRefused as error:
            _log.warning("sign-in by OpenID refused: %s", error)
            guest = Identity("unknown", "unknown", "", "user", address)
            with database.session() as session:
                record(session, guest, "session.refuse", "user/unknown", oidc=error.reason)
            raise

    def _take(self, database: Database, answer: Mapping[str, str], browser: str) -> OidcLogin:
        """The sign-in that this is the answer to; each is answered once."""
        with database.session() as session:
            serialise(session, "oidc")
            login = session.get(OidcLogin, hashed(answer.get("state", "")))
            if login is not None:
                session.delete(login)
        if login is None or utc_now() - login.created > AT_PROVIDER:
            raise OidcRefused("expired", "no sign-in of this state is waiting")
        if not hmac.compare_digest(login.browser, hashed(browser)):
            raise OidcRefused("refused", "the answer came to another browser than began")
        if answer.get("iss", self.settings.oidc_issuer) != self.settings.oidc_issuer:
            raise OidcRefused("refused", "the answer is another provider's")
        if "code" not in answer:
            error = answer.get("error", "no code")[:80]
            raise OidcRefused("refused", f"the provider says {error!r}")
        return login

    def _claims(self, answer: Mapping[str, str], login: OidcLogin) -> dict[str, Any]:
        endpoint = self._endpoint("token_endpoint")
        try:
            with self._client() as client:
                token = client.fetch_token(
                    endpoint, code=answer["code"], code_verifier=login.verifier
                )
        except OAuthError as error:
            raise OidcRefused("refused", f"the provider gives no token ({error})") from error
        except (HTTPError, InvalidURL, ValueError) as error:
            raise OidcRefused("unavailable", f"{endpoint} does not answer ({error})") from error
        try:
            return self._checked(str(token.get("id_token", "")), token, login.nonce)
        except (JoseError, ValueError, TypeError, KeyError) as error:
            raise OidcRefused("refused", f"the ID token is not good ({error!r})") from error

    def _checked(self, id_token: str, token: Mapping[str, Any], nonce: str) -> dict[str, Any]:
        try:
            decoded = jwt.decode(id_token, self._key_set(), algorithms=list(ALGORITHMS))
        except InvalidKeyIdError:  # the provider may have new keys
            decoded = jwt.decode(id_token, self._key_set(anew=True), algorithms=list(ALGORITHMS))
        client = self.settings.oidc_client
        params = {"nonce": nonce, "client_id": client, "access_token": token.get("access_token")}
        options = {
            "iss": {"essential": True, "value": self.settings.oidc_issuer},
            "aud": {"essential": True, "value": client},
            "nonce": {"essential": True, "value": nonce},
        }
        claims = CodeIDToken(decoded.claims, decoded.header, options, params)
        claims.validate(leeway=LEEWAY_S)
        return dict(claims)

    # --- who it is

    def _role(self, claims: Mapping[str, Any]) -> str:
        values = _claim(claims, self.settings.oidc_role_claim)
        values = values if isinstance(values, list) else [values]
        for value, role in self.settings.oidc_roles.items():  # the first of the settings' wins
            if value in values:
                return role
        raise OidcRefused("no-role", f"claim {self.settings.oidc_role_claim!r} names no role")

    def _user(self, session: Session, claims: Mapping[str, Any], role: str, address: str) -> User:
        issuer, subject = self.settings.oidc_issuer, str(claims["sub"])[:255]
        user = session.scalar(select(User).where(User.issuer == issuer, User.subject == subject))
        if user is None:
            user = self._new_user(session, claims, role, subject)
            record(session, identity_of(user, address), "user.add", f"user/{user.name}", role=role)
        if user.disabled is not None:
            raise OidcRefused("refused", f"{user.name} is disabled here")
        if user.role != role:
            changes = {"role": [user.role, role]}
            user.role = role
            end_sessions(session, user.name)
            record(
                session, identity_of(user, address), "user.change", f"user/{user.name}", **changes
            )
        return user

    def _new_user(
        self, session: Session, claims: Mapping[str, Any], role: str, subject: str
    ) -> User:
        given = str(_claim(claims, self.settings.oidc_name_claim) or "")
        try:
            name = account_name(given)
            display_name = readable_name(str(claims.get("name") or name))
        except AccountError as error:
            raise OidcRefused("refused", str(error)) from error
        # never another's account: who can choose a name at the provider could take it over
        if session.get(User, name) is not None:
            raise OidcRefused("refused", f"there is another account {name!r} here already")
        user = User(
            name=name,
            display_name=display_name,
            role=role,
            issuer=self.settings.oidc_issuer,
            subject=subject,
            created=utc_now(),
            created_by=self.settings.oidc_issuer[:128],
        )
        session.add(user)
        session.flush()
        return user

    # --- the provider

    def _client(self) -> Any:  # an OAuth2Client, whose type says nothing of httpx's methods
        ca = self.settings.oidc_ca
        return OAuth2Client(
            self.settings.oidc_client,
            self.settings.oidc_secret.get_secret_value() or None,
            scope=self.settings.oidc_scope,
            redirect_uri=self.redirect,
            code_challenge_method="S256",
            timeout=TIMEOUT_S,
            trust_env=False,  # no proxy of the environment: the provider is in the house
            follow_redirects=False,
            **({"verify": str(ca)} if ca else {}),
        )

    def _get(self, url: str) -> Any:
        try:
            _check_secure(url)
            with self._client() as client:
                response = client.request("GET", url, withhold_token=True)
                response.raise_for_status()
                return response.json()
        except (HTTPError, InvalidURL, ValueError) as error:
            raise OidcRefused("unavailable", f"{url} does not answer ({error})") from error

    def _endpoint(self, name: str) -> str:
        with self._lock:
            kept = self._metadata
        if kept is None or time.monotonic() - kept[0] > METADATA_KEPT_S:
            issuer = self.settings.oidc_issuer
            found = self._get(issuer.rstrip("/") + "/.well-known/openid-configuration")
            if not isinstance(found, dict) or found.get("issuer") != issuer:
                raise OidcRefused("unavailable", f"{issuer} describes another issuer")
            kept = (time.monotonic(), found)
            with self._lock:
                self._metadata = kept
        url = kept[1].get(name)
        if not isinstance(url, str):
            raise OidcRefused("unavailable", f"the provider names no {name}")
        try:
            _check_secure(url)
        except SettingsError as error:
            raise OidcRefused("unavailable", str(error)) from error
        return url

    def _key_set(self, *, anew: bool = False) -> KeySet:
        with self._lock:
            kept = self._keys
        age = time.monotonic() - kept[0] if kept else METADATA_KEPT_S
        if kept is None or age >= METADATA_KEPT_S or (anew and age > KEYS_EVERY_S):
            found = self._get(self._endpoint("jwks_uri"))
            kept = (time.monotonic(), KeySet.import_key_set(found))
            with self._lock:
                self._keys = kept
        return kept[1]


def _check_secure(url: str) -> None:
    """Codes and tokens go by TLS, or do not leave this machine."""
    parts = urlsplit(url)
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if parts.scheme != "https" and not (parts.scheme == "http" and local):
        raise SettingsError(f"{url[:200]!r} must begin with https://.")


def _claim(claims: Mapping[str, Any], name: str) -> Any:
    """A claim by its name, or by its path, such as realm_access.roles."""
    if name in claims:
        return claims[name]
    value: Any = claims
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
