"""Backup and restore: every table and every file, in a folder, whatever the database.

    backup.json              schema, version, when, how many rows of each table
    tables/<name>.jsonl.gz   a row a line, from one moment
    files/…                  the storage, key by key; what is there already is not copied again

Tables are read in one transaction and before the files: a study that was thrown away meanwhile is
the only one whose files can be missing. The search index is made anew from what was restored.
A backup of SQLite can be restored into PostgreSQL, which is how one moves.
"""

from __future__ import annotations

import base64
import gzip
import json
import shutil
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, MetaData, Table, func, insert, inspect, select, text
from sqlalchemy.types import DateTime, LargeBinary

from med3dvlm import __version__
from med3dvlm.files import atomic_file, write_json
from med3dvlm.service import work
from med3dvlm.service.core import Service
from med3dvlm.service.database import Base
from med3dvlm.service.migrations import current_revision, migrate
from med3dvlm.service.tables import Job, Study

FORMAT = 1
ABOUT = "backup.json"
NEEDED = {"format": int, "schema": str, "created": str, "tables": dict}  # of it, to restore
ROWS = 1000  # written at a time
NOT_DATA = ("workers",)


class BackupError(ValueError):
    """A backup that cannot be made or used, in one sentence with the remedy."""


def back_up(service: Service, folder: Path) -> dict[str, Any]:
    """Write a backup; into the folder of an older one only what is new is copied.

    Returns:
        What `backup.json` says; `missing` are files of studies thrown away meanwhile.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    revision = current_revision(service.database)
    with service.database.reader.connect() as connection:
        if service.database.dialect == "postgresql":
            connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        tables = _tables(connection, Base.metadata.tables)
        counts = {table.name: _write_table(connection, table, folder) for table in tables}
    copied, missing = _copy_files(service, folder / "files")
    about = {
        "format": FORMAT,
        "version": __version__,
        "created": datetime.now(UTC).isoformat(),
        "schema": revision,
        "tables": counts,
        "files_copied": copied,
        "missing": missing,
    }
    write_json(folder / ABOUT, about)
    return about


def restore(service: Service, folder: Path) -> dict[str, Any]:
    """Bring a backup back into an empty database and storage.

    Raises:
        BackupError: if it is none or is damaged, or the database is not empty.
    """
    about = _read_about(folder)
    with service.database.engine.connect() as connection:
        if inspect(connection).has_table("alembic_version"):
            raise BackupError(
                f"the database {service.database.url} is not empty: restore into a new one."
            )
    migrate(service.database, to=about["schema"])
    for file in sorted((folder / "files").rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            service.storage.put(file, file.relative_to(folder / "files").as_posix())
    with service.database.engine.begin() as connection:
        for table in _tables(connection, about["tables"]):
            count = _read_table(connection, table, folder)
            if count != about["tables"].get(table.name, 0):
                raise BackupError(
                    f"{folder}: table {table.name} has {count} rows, and had "
                    f"{about['tables'].get(table.name, 0)}: the backup is damaged."
                )
    migrate(service.database)
    reindex(service)
    return about


def reindex(service: Service) -> int:
    """Let the workers put every ready study into the index; says how many there are."""
    with service.database.session() as session:
        waiting = select(Job.study_id).where(Job.kind == "index", Job.state == "queued")
        ready = select(Study.id).where(Study.state == "ready", Study.id.not_in(waiting))
        ids = list(session.scalars(ready))
        for study_id in ids:
            work.enqueue(session, "index", study_id, "service")
    return len(ids)


# --- tables -----------------------------------------------------------------------------------


def _tables(connection: Connection, names: Iterable[str]) -> list[Table]:
    """As they are in this database, each after those that it refers to."""
    known = MetaData()
    known.reflect(connection, only=[name for name in names if name not in NOT_DATA])
    return known.sorted_tables


def _write_table(connection: Connection, table: Table, folder: Path) -> int:
    count = 0
    with atomic_file(folder / "tables" / f"{table.name}.jsonl.gz") as temporary:
        with gzip.open(temporary, "wt", encoding="utf-8") as file:
            keys = list(table.primary_key.columns)
            for row in connection.execute(select(table).order_by(*keys)).mappings():
                values = {name: _plain(value) for name, value in row.items()}
                file.write(json.dumps(values, ensure_ascii=False) + "\n")
                count += 1
    return count


def _read_table(connection: Connection, table: Table, folder: Path) -> int:
    path = folder / "tables" / f"{table.name}.jsonl.gz"
    if not path.is_file():
        return 0
    count, rows = 0, []
    for row in _lines(path):
        rows.append({name: _value(table.columns[name].type, v) for name, v in row.items()})
        if len(rows) == ROWS:
            connection.execute(insert(table), rows)
            count, rows = count + len(rows), []
    if rows:
        connection.execute(insert(table), rows)
    if connection.dialect.name == "postgresql" and "number" in table.columns:
        last = connection.scalar(select(func.max(table.c.number)))
        if last:
            sequence = select(func.pg_get_serial_sequence(table.name, "number")).scalar_subquery()
            connection.execute(select(func.setval(sequence, last)))
    return count + len(rows)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)
    except (OSError, EOFError, ValueError) as error:
        raise BackupError(f"{path}: it is damaged ({error}).") from error


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value


def _value(kind: Any, value: Any) -> Any:
    if value is not None and isinstance(kind, DateTime):
        return datetime.fromisoformat(value)
    if value is not None and isinstance(kind, LargeBinary):
        return base64.b64decode(value)
    return value


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / ABOUT).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BackupError(f"{folder} is no backup ({ABOUT}: {error}).") from error
    for key, kind in NEEDED.items():
        if not isinstance(about, dict) or not isinstance(about.get(key), kind):
            raise BackupError(
                f"{folder / ABOUT} has no {key!r} that can be read: the backup is damaged, nothing "
                "was restored; use another one."
            )
    if about["format"] != FORMAT:
        raise BackupError(f"{folder} is no backup that this version reads.")
    return about


# --- files ------------------------------------------------------------------------------------


def _copy_files(service: Service, folder: Path) -> tuple[int, list[str]]:
    """Bring a folder to what the storage holds."""
    copied, missing, kept = 0, [], set()
    for key in service.storage.list_keys():
        kept.add(key)
        target = folder / key
        if target.is_file():  # a file never changes under its key
            continue
        try:
            source = service.storage.fetch(key)
        except FileNotFoundError:
            missing.append(key)
            continue
        with atomic_file(target) as temporary:
            shutil.copyfile(source, temporary)
        copied += 1
    for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if file.is_file() and file.relative_to(folder).as_posix() not in kept:
            file.unlink()  # thrown away since the older backup
    return copied, missing
