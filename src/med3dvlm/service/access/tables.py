"""What is kept about accounts. Tokens and passwords only as hashes."""

from __future__ import annotations

import hashlib
from datetime import datetime

from sqlalchemy import ForeignKey, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from med3dvlm.service.database import Base, UtcTime


class User(Base):
    """A person. Never deleted, since the audit log and signatures name them."""

    __tablename__ = "users"
    __table_args__ = (UniqueConstraint("issuer", "subject"),)

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    display_name: Mapped[str] = mapped_column(String(128))
    role: Mapped[str] = mapped_column(String(32))
    password: Mapped[str | None] = mapped_column(String(255))  # none: signs in by OIDC only
    issuer: Mapped[str | None] = mapped_column(String(255))
    subject: Mapped[str | None] = mapped_column(String(255))
    created: Mapped[datetime] = mapped_column(UtcTime)
    created_by: Mapped[str] = mapped_column(String(128))
    disabled: Mapped[datetime | None] = mapped_column(UtcTime)


class SignedIn(Base):
    """A browser's session."""

    __tablename__ = "sessions"

    token: Mapped[str] = mapped_column(String(64), primary_key=True)  # hashed
    user: Mapped[str] = mapped_column(ForeignKey("users.name"), index=True)
    created: Mapped[datetime] = mapped_column(UtcTime)
    seen: Mapped[datetime] = mapped_column(UtcTime)


class ApiKey(Base):
    """A program's way in."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    role: Mapped[str] = mapped_column(String(32))
    token: Mapped[str] = mapped_column(String(64), unique=True)  # hashed
    hint: Mapped[str] = mapped_column(String(16))  # its first characters, to recognise it
    created: Mapped[datetime] = mapped_column(UtcTime)
    created_by: Mapped[str] = mapped_column(String(128))
    expires: Mapped[datetime] = mapped_column(UtcTime)
    used: Mapped[datetime | None] = mapped_column(UtcTime)
    revoked: Mapped[datetime | None] = mapped_column(UtcTime)


class Attempts(Base):
    """Failed sign-ins in a row, of a name, or of a name from an address."""

    __tablename__ = "sign_in_attempts"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)  # hashed
    failures: Mapped[int]
    last: Mapped[datetime] = mapped_column(UtcTime, index=True)
    wait_until: Mapped[datetime] = mapped_column(UtcTime)


class OidcLogin(Base):
    """A sign-in that is at the OpenID provider."""

    __tablename__ = "oidc_logins"

    state: Mapped[str] = mapped_column(String(64), primary_key=True)  # hashed
    browser: Mapped[str] = mapped_column(String(64))  # its cookie, hashed
    nonce: Mapped[str] = mapped_column(String(64))
    verifier: Mapped[str] = mapped_column(String(128))
    created: Mapped[datetime] = mapped_column(UtcTime)


def hashed(token: str) -> str:
    """Of random tokens of 256 bits; passwords need a slow hash, see passwords.py."""
    return hashlib.sha256(token.encode()).hexdigest()
