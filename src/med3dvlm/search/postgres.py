"""An index on a server: PostgreSQL with pgvector (0.8 or newer), for many machines at once.

    postgresql://user@host/database#name      an index of that name in a database

The head lies in the table `med3dvlm_index`, the studies of each generation in a table of their own.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from med3dvlm.search.database import VECTORS, Ranked
from med3dvlm.search.query import FINDING, OWN_COLUMNS, Condition
from med3dvlm.search.study import Entry, SearchIndexError, Study, to_json

EXACT_BELOW = 100_000  # studies; above, a graph (HNSW) is searched
NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")
NUMBER = r"^\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*$"
BLOCK = 1000
COLUMNS = (
    "path, id, sha256, report, metadata::text, asserted, findings, crc, "
    "vector::real[], report_vector::real[]"
)


class PostgresPlace:
    """A database, and the name of an index in it."""

    def __init__(self, location: str):
        self.url, mark, self.name = location.partition("#")
        self.location = location
        self.threads = threading.local()
        if not mark or not NAME.fullmatch(self.name):
            raise SearchIndexError(
                f"{location} names no index: add #name, of lower-case letters, digits and _."
            )

    @property
    def connection(self) -> Any:
        """This thread's own, as transactions of several must not mix; a new one if it broke."""
        if not hasattr(self.threads, "connection") or self.threads.connection.closed:
            self.threads.connection = self._connect()
        return self.threads.connection

    def _connect(self) -> Any:
        try:
            import psycopg
        except ImportError as error:
            raise SearchIndexError(
                "an index on a server needs psycopg: pip install 'med3dvlm[postgres]'."
            ) from error
        try:
            connection = psycopg.connect(self.url, autocommit=True)
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS med3dvlm_index (name text PRIMARY KEY, head jsonb)"
            )
        except psycopg.Error as error:
            reason = " ".join(str(error).split())
            raise SearchIndexError(
                f"{self.url} cannot be used ({reason}): it must be a PostgreSQL server with the "
                "extension pgvector, where this user may create tables."
            ) from error
        return connection

    def read_head(self) -> dict[str, Any] | None:
        rows = self.connection.execute(
            "SELECT head FROM med3dvlm_index WHERE name = %s", [self.name]
        )
        row = rows.fetchone()
        if row is not None and not isinstance(row[0], dict):
            raise SearchIndexError(f"{self.location} is damaged (its head holds no settings).")
        return None if row is None else row[0]

    def write_head(self, head: dict[str, Any]) -> None:
        self.connection.execute(
            "INSERT INTO med3dvlm_index VALUES (%s, %s) "
            "ON CONFLICT (name) DO UPDATE SET head = excluded.head",
            [self.name, json.dumps(head)],
        )

    def create(self, table: str, dim: int) -> PostgresTable:
        self.drop(table)
        name = self._full(table)
        with self.connection.transaction():
            self.connection.execute(
                f"CREATE TABLE {name} (path text PRIMARY KEY, id text, sha256 text, report text, "
                f"metadata jsonb, asserted text, findings text[], crc bigint, "
                f"vector vector({int(dim)}), report_vector vector({int(dim)}), "
                "words tsvector GENERATED ALWAYS AS (to_tsvector('english', asserted)) STORED)"
            )
            self.connection.execute(f"CREATE TABLE {name}_keys (key text PRIMARY KEY)")
            self.connection.execute(f"CREATE INDEX ON {name} (sha256)")
            self.connection.execute(f"CREATE INDEX ON {name} USING gin (words)")
            self.connection.execute(f"CREATE INDEX ON {name} USING gin (findings)")
        return PostgresTable(self, name)

    def open(self, table: str) -> PostgresTable:
        name = self._full(table)
        found = self.connection.execute(
            "SELECT to_regclass(%s), to_regclass(%s)", [name, f"{name}_keys"]
        )
        if None in found.fetchone():
            raise SearchIndexError(f"{self.location} is damaged (its table {name} is missing).")
        return PostgresTable(self, name)

    def drop(self, table: str) -> None:
        name = self._full(table)
        self.connection.execute(f"DROP TABLE IF EXISTS {name}, {name}_keys")

    def _full(self, table: str) -> str:
        return f"{self.name}_{table.replace('-', '_')}"  # read_head has checked that it is a name

    @contextmanager
    def writing(self) -> Iterator[None]:
        key = f"med3dvlm {self.name}"
        self.connection.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [key])
        try:
            yield
        finally:
            self.connection.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", [key])


class PostgresTable:
    """A table of studies; every statement sees what was committed before it began."""

    def __init__(self, place: PostgresPlace, name: str):
        self.place, self.name = place, name

    @contextmanager
    def _transaction(self) -> Iterator[Any]:
        """All or nothing; what the server says becomes one sentence."""
        import psycopg

        try:
            with self.place.connection.transaction(), self.place.connection.cursor() as cursor:
                yield cursor
        except psycopg.Error as error:
            reason = " ".join(str(error).split())
            raise SearchIndexError(f"{self.place.location}: the server says: {reason}") from error

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        with self._transaction() as cursor:
            return cursor.execute(sql, list(values)).fetchall()

    def _do(self, sql: str, values: Sequence[Any] = ()) -> None:
        with self._transaction() as cursor:
            cursor.execute(sql, list(values))

    def __len__(self) -> int:
        return self._rows(f"SELECT count(*) FROM {self.name}")[0][0]

    def count(self, where: Sequence[Condition]) -> int:
        limits, values = _filter(where, ())
        return self._rows(f"SELECT count(*) FROM {self.name} WHERE {limits}", values)[0][0]

    def columns(self) -> list[str]:
        return sorted(row[0] for row in self._rows(f"SELECT key FROM {self.name}_keys"))

    def write(self, entries: Sequence[Entry], *, instead_of: Sequence[str] = ()) -> None:
        keys = sorted({key for entry in entries for key in entry.study.metadata})
        columns = (
            "path, id, sha256, report, metadata, asserted, findings, crc, vector, report_vector"
        )
        changes = ", ".join(f"{c} = excluded.{c}" for c in columns.split(", ")[1:])
        with self._transaction() as cursor:
            cursor.executemany(
                f"INSERT INTO {self.name}_keys VALUES (%s) ON CONFLICT DO NOTHING",
                [[key] for key in keys],
            )
            cursor.execute(f"DELETE FROM {self.name} WHERE path = ANY(%s)", [list(instead_of)])
            cursor.executemany(
                f"INSERT INTO {self.name} ({columns}) VALUES "
                "(%s, %s, %s, %s, %s, %s, %s, %s, %s::real[]::vector, %s::real[]::vector) "
                f"ON CONFLICT (path) DO UPDATE SET {changes}",
                [_values(entry) for entry in entries],
            )

    def delete(self, paths: Sequence[str]) -> None:
        self._do(f"DELETE FROM {self.name} WHERE path = ANY(%s)", [list(paths)])

    def nearest(
        self,
        query: np.ndarray,
        *,
        limit: int,
        column: str = "vector",
        where: Sequence[Condition] = (),
        without: Sequence[str] = (),
    ) -> Ranked:
        assert column in VECTORS
        limits, values = _filter(where, without)
        given = np.asarray(query, np.float32).tolist()
        with self._transaction() as cursor:
            # the graph is searched on until enough of what it finds meets the conditions
            cursor.execute("SET LOCAL hnsw.iterative_scan = strict_order")
            cursor.execute(f"SET LOCAL hnsw.ef_search = {min(max(limit, 100), 1000)}")
            cursor.execute(
                f"SELECT path, -({column} <#> %s::real[]::vector) AS score FROM {self.name} "
                f"WHERE {column} IS NOT NULL AND {limits} "
                f"ORDER BY {column} <#> %s::real[]::vector LIMIT {int(limit)}",
                [given, *values, given],
            )
            return _ranked(cursor.fetchall())

    def matching(
        self,
        words: str,
        *,
        limit: int,
        where: Sequence[Condition] = (),
        without: Sequence[str] = (),
    ) -> Ranked:
        limits, values = _filter(where, without)
        rows = self._rows(
            "WITH asked AS (SELECT string_agg(quote_literal(word), ' | ')::tsquery AS query "
            "FROM unnest(tsvector_to_array(to_tsvector('english', %s))) AS word) "
            f"SELECT path, ts_rank_cd(words, query, 1) AS score FROM {self.name}, asked "
            f"WHERE words @@ query AND {limits} ORDER BY score DESC, path LIMIT {int(limit)}",
            [words, *values],
        )
        return _ranked(rows)

    def fetch(self, paths: Sequence[str]) -> dict[str, Entry]:
        rows = self._rows(f"SELECT {COLUMNS} FROM {self.name} WHERE path = ANY(%s)", [list(paths)])
        return {row[0]: _entry(row) for row in rows}

    def same_content(self, sha256: str) -> Entry | None:
        rows = self._rows(f"SELECT {COLUMNS} FROM {self.name} WHERE sha256 = %s LIMIT 1", [sha256])
        return _entry(rows[0]) if rows else None

    def select(self, where: Sequence[Condition] = ()) -> list[Study]:
        limits, values = _filter(where, ())
        rows = self._rows(
            f"SELECT path, id, sha256, report, metadata::text FROM {self.name} WHERE {limits}",
            values,
        )
        return [_study(row) for row in rows]

    def salvage(self, damage: list[str]) -> Iterator[Entry]:
        for row in self._pages():
            entry = _entry(row)
            if entry.check() == row[7]:
                yield entry
            else:
                damage.append(f"{row[0]}: what is stored is not what was written")

    def _pages(self) -> Iterator[Any]:
        last = ""
        while rows := self._rows(
            f"SELECT {COLUMNS} FROM {self.name} WHERE path > %s ORDER BY path LIMIT {BLOCK}", [last]
        ):
            yield from rows
            last = rows[-1][0]

    def tend(self) -> None:
        rows = len(self)
        for column in VECTORS:
            there = self._rows(f"SELECT count({column}) FROM {self.name}")[0][0]
            if rows >= EXACT_BELOW and there >= EXACT_BELOW:
                self._do(
                    f"CREATE INDEX IF NOT EXISTS {self.name}_{column} ON {self.name} "
                    f"USING hnsw ({column} vector_ip_ops)"
                )
        self._do(f"ANALYZE {self.name}")

    def facts(self) -> dict[str, Any]:
        graph = self._rows("SELECT to_regclass(%s)", [f"{self.name}_vector"])[0][0]
        size = self._rows("SELECT pg_total_relation_size(%s::regclass)", [self.name])[0][0]
        return {"search": "approximate (HNSW)" if graph else "exact", "bytes": size}


def _values(entry: Entry) -> list[Any]:
    study = entry.study
    report = None if entry.report_vector is None else entry.report_vector.tolist()
    return [
        study.path,
        study.id,
        study.sha256,
        study.report,
        to_json(study.metadata),
        entry.asserted,
        list(entry.findings),
        entry.check(),
        entry.vector.tolist(),
        report,
    ]


def _study(row: Sequence[Any]) -> Study:
    path, name, sha256, report, metadata = row[:5]
    return Study(name, path, sha256, report, json.loads(metadata))


def _entry(row: Sequence[Any]) -> Entry:
    report = None if row[9] is None else np.array(row[9], np.float32)
    return Entry(_study(row), np.array(row[8], np.float32), report, row[5], row[6])


def _ranked(rows: Sequence[tuple[str, float]]) -> Ranked:
    return sorted(((path, float(score)) for path, score in rows), key=lambda it: (-it[1], it[0]))


def _filter(where: Sequence[Condition], without: Sequence[str]) -> tuple[str, list[Any]]:
    """SQL with its values; what came from outside is a value, never SQL."""
    parts, values = ["true"], list[Any]()
    for condition in where:
        sql, given = _sql(condition)
        parts.append(sql)
        values += given
    if without:
        parts.append("NOT findings && %s")
        values.append(list(without))
    return " AND ".join(parts), values


def _sql(condition: Condition) -> tuple[str, list[Any]]:
    if condition.column == FINDING:
        return f"{'NOT ' if condition.op == '!=' else ''}%s = ANY(findings)", [condition.value]
    own = condition.column in OWN_COLUMNS
    column = condition.column if own else "(metadata->>%s)"
    key = [] if own else [condition.column]
    if condition.op == "~":
        return f"position(lower(%s) in lower({column})) > 0", [condition.value, *key]
    if condition.op == "!=":
        return f"{column} IS DISTINCT FROM %s", [*key, condition.value]
    if condition.number is not None:
        return (
            f"CASE WHEN {column} ~ %s THEN {column}::float8 {condition.op} %s ELSE false END",
            [*key, NUMBER, *key, condition.number],
        )
    return f'{column} COLLATE "C" {condition.op} %s', [*key, condition.value]
