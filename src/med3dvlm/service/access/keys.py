"""API keys: shown once, kept as a hash, of one role, with an end."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from med3dvlm.service.access.identity import Identity
from med3dvlm.service.access.permissions import check_role
from med3dvlm.service.access.tables import ApiKey, hashed
from med3dvlm.service.access.users import AccountError, NoSuchAccount, account_name
from med3dvlm.service.audit import record
from med3dvlm.service.database import UNREACHABLE, Database, new_id, serialise, utc_now

PREFIX = "m3d_"
MOST_DAYS = 366
USED_EVERY = timedelta(minutes=1)

_log = logging.getLogger(__name__)


def public(key: ApiKey) -> dict[str, Any]:
    """What may be said about a key: never the key."""
    names = ("id", "name", "role", "hint", "created", "created_by", "expires", "used", "revoked")
    return {name: getattr(key, name) for name in names}


def add_key(
    database: Database, by: Identity, name: str, *, role: str, days: float
) -> tuple[ApiKey, str]:
    """Make a key, and the token that is shown this one time.

    Raises:
        AccountError: for a name that is taken, or a time that is too long.
    """
    name = account_name(name)
    check_role(role)
    if not 0 < days <= MOST_DAYS:
        raise AccountError(f"a key must end in 1 to {MOST_DAYS} days, not {days:g}.")
    token = PREFIX + secrets.token_urlsafe(32)
    now = utc_now()
    key = ApiKey(
        id=new_id(),
        name=name,
        role=role,
        token=hashed(token),
        hint=token[: len(PREFIX) + 4],
        created=now,
        created_by=by.name,
        expires=now + timedelta(days=days),
    )
    with database.session() as session:
        serialise(session, "keys")
        if session.scalar(select(ApiKey.id).where(ApiKey.name == name)) is not None:
            raise AccountError(f"there is a key {name!r} already: choose another name.")
        session.add(key)
        record(session, by, "key.add", f"key/{key.id}", name=name, role=role, days=days)
    return key, token


def list_keys(session: Session) -> Sequence[ApiKey]:
    return session.scalars(select(ApiKey).order_by(ApiKey.created)).all()


def revoke_key(database: Database, by: Identity, key: str) -> ApiKey:
    """End a key, given its id or its name, at once.

    Raises:
        NoSuchAccount: if there is none.
    """
    with database.session() as session:
        found = session.scalar(select(ApiKey).where((ApiKey.id == key) | (ApiKey.name == key)))
        if found is None:
            raise NoSuchAccount(f"there is no key {key[:80]!r}.")
        if found.revoked is None:
            found.revoked = utc_now()
            record(session, by, "key.revoke", f"key/{found.id}", name=found.name)
    return found


def find(database: Database, token: str, *, address: str) -> Identity | None:
    """Whose key it is, if it is one that is still good."""
    now = utc_now()
    with database.reading() as session:
        key = session.scalar(select(ApiKey).where(ApiKey.token == hashed(token)))
    if key is None or key.revoked is not None or key.expires <= now:
        return None
    if key.used is None or now - key.used > USED_EVERY:
        _note_used(database, key.id, now)
    return Identity(f"key:{key.name}", key.name, key.role, "key", address)


def _note_used(database: Database, id: str, now: datetime) -> None:
    try:
        with database.session() as session:
            session.execute(update(ApiKey).where(ApiKey.id == id).values(used=now))
    except UNREACHABLE as error:  # a full disk must not keep anyone from reading
        _log.warning("when a key was last used could not be noted: %s", error)
