"""Signing in with a password, and the session that a browser has afterwards.

The browser holds a random token; the database only its hash. A session ends when it was idle for
`session_idle_min`, after `session_h` in any case, when its user signs out, and when an account's
role or password changes or it is disabled.
"""

from __future__ import annotations

import hmac
import logging
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import delete, update
from sqlalchemy.orm import Session

from med3dvlm.service.access.identity import Identity
from med3dvlm.service.access.passwords import hash_password, is_outdated, matches
from med3dvlm.service.access.tables import Attempts, SignedIn, User, hashed
from med3dvlm.service.access.users import end_sessions
from med3dvlm.service.audit import record
from med3dvlm.service.database import UNREACHABLE, Database, serialise, utc_now
from med3dvlm.service.settings import Settings

FREE_FROM_ADDRESS = 5
"""Wrong passwords for one name from one address before there is a wait."""
FREE = 50
"""Wrong passwords for one name from everywhere: a colleague's guesses do not shut one out."""
FIRST_WAIT = timedelta(seconds=15)  # doubles with every further one
LONGEST_WAIT = timedelta(minutes=15)
FORGIVEN = timedelta(days=1)
SEEN_EVERY = timedelta(minutes=1)
"""How exactly is known when a session was last seen: each time is a write."""

_log = logging.getLogger(__name__)

REFUSED = "The name or the password is wrong."


class SignInRefused(Exception):
    """No; `wait_s` is above 0 where it is too early to try again."""

    def __init__(self, sentence: str, wait_s: float = 0):
        super().__init__(sentence)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Found:
    """A session that is good."""

    identity: Identity
    token: str

    @property
    def csrf(self) -> str:
        return csrf_of(self.token)


def csrf_of(token: str) -> str:
    """What a page must send with every change: follows from the token, does not give it away."""
    return hmac.new(token.encode(), b"csrf", "sha256").hexdigest()


def sign_in(
    database: Database, settings: Settings, name: str, password: str, *, address: str
) -> Found:
    """Start a session.

    Unknown names, wrong passwords and disabled accounts get the same answer after the same time.

    Raises:
        SignInRefused: with what to say.
    """
    name = name.strip().lower()
    keys = {
        hashed(f"address\n{name}\n{address}"): FREE_FROM_ADDRESS,
        hashed(f"name\n{name}"): FREE,
    }
    with database.session() as session:
        _count_attempt(session, keys)
        user = session.get(User, name[:64])
    stored = user.password if user is not None and user.disabled is None else None
    right = matches(stored, password)
    renewed = hash_password(password) if right and stored and is_outdated(stored) else None
    with database.session() as session:
        # as it is now: between the two transactions, it may have been disabled
        user = session.get(User, name[:64])
        if right and user is not None and user.disabled is None and user.password == stored:
            session.execute(delete(Attempts).where(Attempts.key.in_(keys)))
            user.password = renewed or stored
            return start(session, user, settings, address=address)
        known = user.name if user is not None else "unknown"  # what was typed may be a password
        guest = Identity(known, known, "", "user", address)
        record(session, guest, "session.refuse", f"user/{known}")
    raise SignInRefused(REFUSED)


def start(session: Session, user: User, settings: Settings, *, address: str) -> Found:
    """Put a new session of `user` into the database; old ones are cleared away."""
    now = utc_now()
    ended = (SignedIn.created < now - timedelta(hours=settings.session_h)) | (
        SignedIn.seen < now - timedelta(minutes=settings.session_idle_min)
    )
    session.execute(delete(SignedIn).where(ended))
    token = secrets.token_urlsafe(32)
    session.add(SignedIn(token=hashed(token), user=user.name, created=now, seen=now))
    identity = identity_of(user, address)
    record(session, identity, "session.start", f"user/{user.name}")
    return Found(identity, token)


def find(database: Database, settings: Settings, token: str, *, address: str) -> Found | None:
    """The session of a token, if there is one that is still good."""
    now = utc_now()
    with database.reading() as session:
        row = session.get(SignedIn, hashed(token))
        user = session.get(User, row.user) if row is not None else None
    if row is None or user is None or user.disabled is not None:
        return None
    idle, age = now - row.seen, now - row.created
    if idle > timedelta(minutes=settings.session_idle_min):
        return None
    if age > timedelta(hours=settings.session_h):
        return None
    if idle > SEEN_EVERY:
        _note_seen(database, row.token, now)
    return Found(identity_of(user, address), token)


def end(database: Database, found: Found, *, everywhere: bool = False) -> None:
    """Sign out: this session, or all of its user."""
    with database.session() as session:
        if everywhere:
            end_sessions(session, found.identity.name)
        else:
            session.execute(delete(SignedIn).where(SignedIn.token == hashed(found.token)))
        record(
            session,
            found.identity,
            "session.end",
            f"user/{found.identity.name}",
            everywhere=everywhere,
        )


def identity_of(user: User, address: str) -> Identity:
    """Who a request of a signed-in account comes from."""
    return Identity(user.name, user.display_name, user.role, "user", address)


def _note_seen(database: Database, token: str, now: datetime) -> None:
    later = update(SignedIn).where(SignedIn.token == token, SignedIn.seen < now).values(seen=now)
    try:
        with database.session() as session:
            session.execute(later)
    except UNREACHABLE as error:  # a full disk must not keep anyone from reading
        _log.warning("when a session was last seen could not be noted: %s", error)


def _count_attempt(session: Session, keys: dict[str, int]) -> None:
    """Count an attempt before it is tried, so that guesses side by side are counted, too."""
    now = utc_now()
    serialise(session, "sign-in")
    session.execute(delete(Attempts).where(Attempts.last < now - FORGIVEN))
    rows = {key: session.get(Attempts, key) for key in keys}
    wait = max((row.wait_until - now for row in rows.values() if row), default=timedelta(0))
    if wait > timedelta(0):
        seconds = wait.total_seconds()
        raise SignInRefused(f"Too many failed sign-ins; wait {seconds:.0f} seconds.", seconds)
    for key, free in keys.items():
        row = rows[key]
        if row is None:
            row = Attempts(key=key, failures=0, last=now, wait_until=now)
            session.add(row)
        row.failures, row.last = row.failures + 1, now
        if row.failures >= free:
            factor = 2.0 ** min(row.failures - free, 20)
            row.wait_until = now + min(FIRST_WAIT * factor, LONGEST_WAIT)
