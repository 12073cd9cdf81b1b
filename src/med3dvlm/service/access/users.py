"""Accounts: made, changed and disabled, each with a row in the audit log.

Passwords are hashed before the transaction, which would otherwise be held open for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from med3dvlm.service.access.identity import Identity
from med3dvlm.service.access.passwords import check_password, hash_password
from med3dvlm.service.access.permissions import check_role
from med3dvlm.service.access.tables import ApiKey, SignedIn, User
from med3dvlm.service.audit import record
from med3dvlm.service.database import Database, serialise, utc_now

NAME = re.compile(r"[a-z0-9][a-z0-9._@-]{0,63}")


class AccountError(ValueError):
    """Something about accounts that is not done, with the reason and what to do instead."""


class NoSuchAccount(AccountError):
    """There is no account, or key, of that name."""


def account_name(name: str) -> str:
    """The one spelling under which a name is kept: lower case, no spaces around it.

    Raises:
        AccountError: for a name with other characters than names have.
    """
    name = name.strip().lower()
    if not NAME.fullmatch(name) or name == "local":
        raise AccountError(
            f"the name {name[:80]!r} cannot be one: use 1 to 64 of a-z, 0-9, '.', '_', '-' and "
            "'@', and not 'local'."
        )
    return name


def readable_name(name: str) -> str:
    """A name as signatures show it."""
    name = " ".join(name.split())
    if not 1 <= len(name) <= 128 or not name.isprintable():
        raise AccountError("a display name must have 1 to 128 printable characters.")
    return name


def public(user: User) -> dict[str, Any]:
    """What may be said about an account."""
    return {
        "name": user.name,
        "display_name": user.display_name,
        "role": user.role,
        "sign_in": "password" if user.password else "oidc",
        "created": user.created,
        "created_by": user.created_by,
        "disabled": user.disabled,
    }


def any_account(session: Session) -> bool:
    """Whether anybody, or any program, was ever given an account or key here."""
    found = select(User.name).limit(1), select(ApiKey.id).limit(1)
    return any(session.scalar(one) is not None for one in found)


def add_user(
    database: Database,
    by: Identity,
    name: str,
    *,
    role: str,
    password: str,
    display_name: str = "",
    password_length: int,
) -> User:
    """Make an account.

    Raises:
        AccountError: for a name that is taken or cannot be one; also `PasswordError`, ValueError
            for a password or role that is none.
    """
    name, display_name = account_name(name), readable_name(display_name or name)
    check_role(role)
    check_password(password, name, display_name, length=password_length)
    user = User(
        name=name,
        display_name=display_name,
        role=role,
        password=hash_password(password),
        created=utc_now(),
        created_by=by.name,
    )
    with database.session() as session:
        serialise(session, "users")
        if session.get(User, name) is not None:
            raise AccountError(f"there is an account {name!r} already: choose another name.")
        session.add(user)
        record(session, by, "user.add", f"user/{name}", role=role)
    return user


def list_users(session: Session) -> Sequence[User]:
    return session.scalars(select(User).order_by(User.name)).all()


def change_user(
    database: Database,
    by: Identity,
    name: str,
    *,
    role: str | None = None,
    display_name: str | None = None,
    disabled: bool | None = None,
    password: str | None = None,
    password_length: int = 0,
) -> User:
    """Change an account, wholly or not at all; its sessions end where that changes what it may
    do, or its password.

    Args:
        password_length: fewest characters of a new password.

    Raises:
        AccountError: if there is none, or if nobody would be left to administer; also
            `PasswordError`, ValueError for a password or role that is none.
    """
    if role is not None:
        check_role(role)
    stored = None if password is None else _hashed(database, name, password, password_length)
    with database.session() as session:
        serialise(session, "users")
        user = _existing(session, name)
        changes: dict[str, Any] = {}
        if role is not None and role != user.role:
            changes["role"] = [user.role, role]
        if disabled is not None and disabled != (user.disabled is not None):
            changes["disabled"] = disabled
        loses = "role" in changes or disabled
        if changes and loses and user.role == "administrator" and user.disabled is None:
            _keep_an_administrator(session, user)
        if display_name is not None and readable_name(display_name) != user.display_name:
            changes["display_name"] = [user.display_name, readable_name(display_name)]
            user.display_name = readable_name(display_name)
        if "role" in changes:
            user.role = changes["role"][1]
        if "disabled" in changes:
            user.disabled = utc_now() if disabled else None
        if "role" in changes or "disabled" in changes:
            end_sessions(session, user.name)
        if changes:
            record(session, by, "user.change", f"user/{user.name}", **changes)
        if stored is not None:
            user.password = stored
            end_sessions(session, user.name)
            record(session, by, "user.password", f"user/{user.name}")
    return user


def set_password(
    database: Database, by: Identity, name: str, password: str, *, password_length: int
) -> None:
    """Give an account another password; its sessions end.

    Raises:
        AccountError: if there is none, or it signs in elsewhere; also `PasswordError`.
    """
    change_user(database, by, name, password=password, password_length=password_length)


def _hashed(database: Database, name: str, password: str, length: int) -> str:
    """A new password of an account as it is kept, if it is good enough."""
    with database.reading() as session:
        user = _existing(session, name)
    if user.issuer is not None:
        raise AccountError(f"{user.name} signs in at {user.issuer}: change the password there.")
    check_password(password, user.name, user.display_name, length=length)
    return hash_password(password)


def end_sessions(session: Session, name: str) -> None:
    """Sign an account out everywhere."""
    session.execute(delete(SignedIn).where(SignedIn.user == name))


def _existing(session: Session, name: str) -> User:
    user = session.get(User, name.strip().lower())
    if user is None:
        raise NoSuchAccount(f"there is no account {name[:80]!r}.")
    return user


def _keep_an_administrator(session: Session, user: User) -> None:
    others = select(func.count()).where(
        User.role == "administrator", User.disabled.is_(None), User.name != user.name
    )
    if not session.scalar(others):
        raise AccountError(
            f"{user.name} is the last administrator: give another account that role first."
        )
