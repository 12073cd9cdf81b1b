"""The database: SQLite or PostgreSQL, by URL.

    database = Database("sqlite:///med3dvlm.db")
    with database.session() as session:      # committed at the end, rolled back on an error
        session.add(...)
    with database.reading() as session:      # for what only reads: waits for no writer
        ...

On SQLite `session()` is one writer at a time from its first statement on, so that what it reads
stays so until it commits. On PostgreSQL, where that matters, `serialise(session, name)` does it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from sqlalchemy import JSON, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.types import DateTime, TypeDecorator

SQLITE = b"SQLite format 3\0"  # what such a file begins with
BUSY_S = 10  # that a writer waits for another


class Away(Exception):
    """A database other than SQLAlchemy's, the search index's, that does not answer."""


UNREACHABLE = (OperationalError, InterfaceError, PoolTimeoutError, Away)


class DatabaseError(ValueError):
    """A database that cannot be used, in one sentence with the remedy."""


class UtcTime(TypeDecorator[datetime]):
    """A time with its zone, UTC, on every database."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"time {value} has no zone: use utc_now().")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


Json = JSON(none_as_null=True)  # no value is NULL, and not the JSON of it


class Base(DeclarativeBase):
    """Of every table."""

    type_annotation_map = {dict[str, Any]: Json, list[Any]: Json, datetime: UtcTime}


def utc_now() -> datetime:
    return datetime.now(UTC)


def new_id() -> str:
    """32 hex digits."""
    return uuid4().hex


class Database:
    """A pool of connections to one database; may be used by many threads.

    Attributes:
        url: as given, with the driver.
        dialect: "sqlite" or "postgresql".
    """

    def __init__(self, url: str, *, pool: int = 20):
        try:
            parsed = make_url(url)
        except ArgumentError as error:
            raise DatabaseError(
                f"database {url!r} is no URL: use sqlite:///file or postgresql://user@host/name."
            ) from error
        if parsed.drivername in ("postgres", "postgresql"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        self.url, self.dialect = parsed, parsed.get_backend_name()
        options: dict[str, Any] = {"pool_size": pool, "max_overflow": pool, "pool_timeout": 5}
        if self.dialect == "sqlite":
            if parsed.database in (None, "", ":memory:"):
                raise DatabaseError("an SQLite database needs a file: use sqlite:///file.")
            _check_sqlite(Path(str(parsed.database)))
            options["connect_args"] = {"timeout": BUSY_S}
        elif self.dialect == "postgresql":
            options |= {"pool_pre_ping": True, "connect_args": {"connect_timeout": 3}}
        else:
            raise DatabaseError(
                f"database {self.dialect!r} is not supported: use SQLite or PostgreSQL."
            )
        try:
            self.engine: Engine = create_engine(parsed, **options)
        except ImportError as error:
            raise DatabaseError(
                "PostgreSQL needs its driver: pip install 'med3dvlm[service]'."
            ) from error
        self.reader = self.engine.execution_options(sqlite_begin="DEFERRED")
        if self.dialect == "sqlite":
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session that may write; objects stay readable after it ended."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session for what only reads: nothing is committed."""
        with Session(self.reader, expire_on_commit=False) as session:
            yield session

    def check(self) -> None:
        """Raise one of `UNREACHABLE` where the database does not answer."""
        with self.reading() as session:
            session.execute(text("SELECT 1"))

    def close(self) -> None:
        self.engine.dispose()


def serialise(session: Session, name: str) -> None:
    """Let one transaction at a time, of all processes, go beyond this line."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(
            text("SELECT pg_advisory_xact_lock(:key)"), {"key": zlib.crc32(name.encode())}
        )


def _check_sqlite(path: Path) -> None:
    """Make room for a new database, or refuse what is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise DatabaseError(f"{path} is a folder: name the file of an SQLite database.")
    if path.exists() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(len(SQLITE)) != SQLITE:
                raise DatabaseError(f"{path} is no SQLite database: name another file.")


def _prepare_sqlite(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # SQLAlchemy's events begin transactions, not the driver
    cursor = connection.cursor()
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",  # what was acknowledged survives a power cut, too
        "foreign_keys=ON",
    ):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Any) -> None:
    kind = connection.get_execution_options().get("sqlite_begin", "IMMEDIATE")
    connection.exec_driver_sql(f"BEGIN {kind}")
