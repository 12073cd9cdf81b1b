"""The audit log: who did what, when, in a chain that shows whether a row was touched.

Each row's hash is the SHA-256 of its content and of the hash before it, so that a row that is
changed, taken out or put in breaks the chain there. Rows can only be added: triggers of the
database refuse anything else. Who owns the database can still write a whole new chain, or cut off
its end; against that, every row also goes to the logger `med3dvlm.audit` (for a log server), and
`verify` takes a hash that was noted earlier.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import DDL, Connection, String, Text, event, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from med3dvlm.service.access.identity import Identity
from med3dvlm.service.database import Base, serialise, utc_now

START = "0" * 64
"""What the first row's hash goes over, in place of a hash before it."""

CONTENT = ("id", "time", "name", "kind", "role", "address", "action", "object", "details")
_WAITING = "audit rows of this transaction"
_logger = logging.getLogger("med3dvlm.audit")


class AuditRow(Base):
    """One act."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)  # 1, 2, 3, no gaps
    time: Mapped[str] = mapped_column(String(32))  # ISO 8601, UTC: text, as it is hashed
    name: Mapped[str] = mapped_column(String(128))
    kind: Mapped[str] = mapped_column(String(16))
    role: Mapped[str] = mapped_column(String(32))
    address: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(64))
    object: Mapped[str] = mapped_column(String(256))
    details: Mapped[str] = mapped_column(Text)  # JSON
    previous: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))

    def content(self) -> dict[str, Any]:
        """What the hash goes over, as JSON values."""
        return {name: getattr(self, name) for name in CONTENT}

    def computed_hash(self) -> str:
        text = json.dumps(self.content(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(f"{self.previous}\n{text}".encode()).hexdigest()

    def public(self) -> dict[str, Any]:
        """As the API and the export give it."""
        return {
            **self.content(),
            "details": json.loads(self.details),
            "previous": self.previous,
            "hash": self.hash,
        }


# --- writing --------------------------------------------------------------------------------


def record(session: Session, identity: Identity, action: str, object: str, **details: Any) -> None:
    """Note an act; the row is written as the last thing of the session's transaction.

    Last, because rows are written one transaction at a time: what comes after would be waited
    for by everyone.

    Args:
        action: thing and verb, such as "report.sign".
        object: kind and id, such as "study/3f…".
        details: JSON values; no report text, no patient's name: the log is exported.
    """
    row = AuditRow(
        time=utc_now().isoformat(timespec="microseconds"),
        name=_clean(identity.name, 128),
        kind=identity.kind,
        role=identity.role,
        address=_clean(identity.address, 64),
        action=action,
        object=_clean(object, 256),
        details=json.dumps(details, sort_keys=True, ensure_ascii=False),
    )
    session.info.setdefault(_WAITING, []).append(row)


def _clean(text: str, length: int) -> str:
    """No characters that could forge a line of a text log, and no longer than the column."""
    return "".join(c if c.isprintable() else "�" for c in text)[:length]


@event.listens_for(Session, "before_commit")
def _write(session: Session) -> None:
    rows: list[AuditRow] = session.info.pop(_WAITING, [])
    if not rows:
        return
    session.flush()
    serialise(session, "audit")
    last = session.scalar(select(AuditRow).order_by(AuditRow.id.desc()).limit(1))
    number, previous = (last.id, last.hash) if last else (0, START)
    for row in rows:
        number += 1
        row.id, row.previous = number, previous
        previous = row.hash = row.computed_hash()
    session.add_all(rows)
    session.flush()
    session.info.setdefault(_WRITTEN, []).extend(rows)


_WRITTEN = "audit rows to be logged once committed"


@event.listens_for(Session, "after_commit")
def _log(session: Session) -> None:
    for row in session.info.pop(_WRITTEN, []):
        _logger.info(json.dumps(row.public(), sort_keys=True, ensure_ascii=False))


@event.listens_for(Session, "after_rollback")
def _forget(session: Session) -> None:
    session.info.pop(_WAITING, None)
    session.info.pop(_WRITTEN, None)


# --- only added to --------------------------------------------------------------------------

REFUSAL = "the audit log is append-only"

APPEND_ONLY: dict[str, tuple[str, ...]] = {
    "sqlite": (
        "CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit "
        f"BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END",
        "CREATE TRIGGER audit_no_delete BEFORE DELETE ON audit "
        f"BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END",
        # INSERT OR REPLACE deletes without the trigger above
        "CREATE TRIGGER audit_no_replace BEFORE INSERT ON audit "
        "WHEN EXISTS (SELECT 1 FROM audit WHERE id = NEW.id) "
        f"BEGIN SELECT RAISE(ABORT, '{REFUSAL}'); END",
    ),
    "postgresql": (
        "CREATE FUNCTION audit_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{REFUSAL}'; END $$",
        "CREATE TRIGGER audit_no_change BEFORE UPDATE OR DELETE ON audit "
        "FOR EACH ROW EXECUTE FUNCTION audit_refuse()",
        "CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()",
    ),
}
"""By dialect: what the database itself must know. The migration that makes the table runs it."""


def protect(connection: Connection) -> None:
    """Make the table `audit` one that is only added to."""
    for statement in APPEND_ONLY[connection.dialect.name]:
        connection.execute(DDL(statement))


@event.listens_for(AuditRow.__table__, "after_create")
def _protect_new_table(table: Any, connection: Connection, **_: Any) -> None:
    protect(connection)


# --- reading --------------------------------------------------------------------------------


def rows_after(session: Session, after: int = 0, limit: int | None = None) -> Iterator[AuditRow]:
    """Rows whose number is above `after`, oldest first."""
    statement = select(AuditRow).where(AuditRow.id > after).order_by(AuditRow.id).limit(limit)
    return iter(session.scalars(statement.execution_options(yield_per=1000)))


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        rows: of the chain that were looked at and are sound.
        hash: of the last of them. Note it elsewhere: with it, a cut-off end is noticed.
        broken: number of the first row that is not as it was written, or None.
        reason: one sentence, or None.
    """

    rows: int
    hash: str
    broken: int | None = None
    reason: str | None = None

    @property
    def sound(self) -> bool:
        return self.reason is None


def verify(session: Session, *, expected: tuple[int, str] | None = None) -> Verdict:
    """Go through the whole chain.

    Args:
        expected: number and hash of a row, noted at an earlier time.
    """
    number, previous, met = 0, START, expected is None
    for row in rows_after(session):
        reason = _fault(row, number + 1, previous)
        if reason is None and expected is not None and row.id == expected[0]:
            met = True
            if row.hash != expected[1]:
                reason = "its hash is not the one noted earlier: the chain was written anew"
        if reason is not None:
            return Verdict(number, previous, number + 1, f"row {number + 1}: {reason}.")
        number, previous = row.id, row.hash
        session.expunge(row)
    if expected is not None and not met:
        reason = f"row {number + 1}: it is gone; the chain once had {expected[0]} rows or more."
        return Verdict(number, previous, number + 1, reason)
    return Verdict(number, previous)


def _fault(row: AuditRow, number: int, previous: str) -> str | None:
    if row.id != number:
        return f"it is gone; the next one there is {row.id}"
    if row.previous != previous:
        return "it does not follow from the row before it"
    if row.hash != row.computed_hash():
        return "its content is not what was written"
    return None
