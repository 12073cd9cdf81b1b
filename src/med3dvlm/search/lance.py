"""An index in a folder, on LanceDB: columns on disk, versions that readers keep while others write.

index.json           which model made it, and which table is current; replaced last
studies-<n>.lance/   a table of studies, a generation each
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from med3dvlm.files import write_json
from med3dvlm.search.database import VECTORS, Ranked
from med3dvlm.search.query import FINDING, OWN_COLUMNS, Condition
from med3dvlm.search.study import Entry, SearchIndexError, Study, as_text, to_json

try:
    import fcntl
except ImportError:  # Windows: one writer at a time is then up to the user
    fcntl = None

HEAD = "index.json"
META = "meta_"
MAX_COLUMNS = 500
LOOKUP_FROM = 5_000  # studies; below, a scan of the paths is as quick
EXACT_BELOW = 50_000  # studies; above, the nearest are searched for approximately (decision 13)
PARTITION = 1000  # studies in each part of the approximate index
PROBES, REFINE = 50, 2  # parts that are searched, and how many times the hits are compared exactly
OLD = timedelta(hours=1)  # how long a reader may go on with a version that was replaced
BLOCK = 1000


class LancePlace:
    """A folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.location = str(folder)

    def read_head(self) -> dict[str, Any] | None:
        path = self.folder / HEAD
        if not path.is_file():
            return None
        try:
            head = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise SearchIndexError(f"{self.folder} is damaged ({HEAD}: {error}).") from error
        if not isinstance(head, dict):
            raise SearchIndexError(f"{self.folder} is damaged ({HEAD} holds no settings).")
        return head

    def write_head(self, head: dict[str, Any]) -> None:
        write_json(self.folder / HEAD, head)

    def create(self, table: str, dim: int) -> LanceTable:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.drop(table)
        _connect(self.folder).create_table(table, schema=_schema(dim))
        return self.open(table)

    def open(self, table: str) -> LanceTable:
        try:
            return LanceTable(self.folder, table)
        except Exception as error:  # the library raises ValueError, RuntimeError, OSError
            raise SearchIndexError(
                f"{self.folder} is damaged (its table {table} cannot be opened: {_short(error)})."
            ) from error

    def drop(self, table: str) -> None:
        shutil.rmtree(self.folder / f"{table}.lance", ignore_errors=True)

    @contextmanager
    def writing(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield
            return
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


Method = TypeVar("Method", bound=Callable[..., Any])


def _told(method: Method) -> Method:
    """What the library raises, of many kinds, as one sentence of ours."""

    @wraps(method)
    def call(self: LanceTable, *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, *arguments, **options)
        except (RuntimeError, OSError, ValueError, pa.ArrowException) as error:
            if isinstance(error, SearchIndexError):
                raise
            raise SearchIndexError(
                f"{self.folder}: the database fails ({_short(error)}); med3dvlm index verify says "
                "whether it is damaged."
            ) from error

    return call  # pyright: ignore[reportReturnType]


class LanceTable:
    """A table of studies. Every search sees what was written before it began."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.table = self._opened()

    def _opened(self) -> Any:
        return _connect(self.folder).open_table(self.name)

    @property
    def fresh(self) -> Any:
        self.table.checkout_latest()
        return self.table

    def __len__(self) -> int:
        return self.fresh.count_rows()

    @_told
    def count(self, where: Sequence[Condition]) -> int:
        return self.fresh.count_rows(_filter(where, ()))

    def columns(self) -> list[str]:
        names = self.fresh.schema.names
        return sorted(_key_of(name) for name in names if name.startswith(META))

    @_told
    def write(self, entries: Sequence[Entry], *, instead_of: Sequence[str] = ()) -> None:
        table = self.fresh
        new = {_column_of(key) for e in entries for key in e.study.metadata} - {*table.schema.names}
        if len(table.schema.names) + len(new) > MAX_COLUMNS:
            raise SearchIndexError(
                f"the studies have more than {MAX_COLUMNS} different columns of metadata: leave "
                "some out of the manifest."
            )
        if new:
            table.add_columns(pa.schema([(name, pa.string()) for name in sorted(new)]))
        change = table.merge_insert("path").when_matched_update_all().when_not_matched_insert_all()
        if instead_of:
            change = change.when_not_matched_by_source_delete(_is_one_of("path", instead_of))
        change.execute(_arrow(entries, table.schema), on_bad_vectors="null")

    @_told
    def delete(self, paths: Sequence[str]) -> None:
        for some in _blocks(list(paths)):
            self.fresh.delete(_is_one_of("path", some))

    @_told
    def nearest(
        self,
        query: np.ndarray,
        *,
        limit: int,
        column: str = "vector",
        where: Sequence[Condition] = (),
        without: Sequence[str] = (),
    ) -> Ranked:
        search = self.fresh.search(query, vector_column_name=column, query_type="vector")
        search = search.distance_type("dot").nprobes(PROBES).refine_factor(REFINE)
        found = _limited(search, where, without).limit(limit).select(["path", "_distance"])
        rows = found.to_arrow()
        # the distance is 1 - the inner product
        return _ranked(rows["path"], [1 - value for value in rows["_distance"].to_pylist()])

    @_told
    def matching(
        self,
        words: str,
        *,
        limit: int,
        where: Sequence[Condition] = (),
        without: Sequence[str] = (),
    ) -> Ranked:
        table = self.fresh
        if not _index_on(table, "asserted"):
            return []
        search = table.search(words, query_type="fts", fts_columns="asserted")
        found = _limited(search, where, without).limit(limit).select(["path", "_score"])
        rows = found.to_arrow()
        return _ranked(rows["path"], rows["_score"].to_pylist())

    @_told
    def fetch(self, paths: Sequence[str]) -> dict[str, Entry]:
        found = {}
        for some in _blocks(list(paths)):
            rows = self.fresh.search().where(_is_one_of("path", some)).to_arrow()
            found |= {entry.study.path: entry for entry in _entries(rows)}
        return found

    @_told
    def same_content(self, sha256: str) -> Entry | None:
        rows = self.fresh.search().where(_is_one_of("sha256", [sha256])).limit(1).to_arrow()
        return next(_entries(rows), None)

    @_told
    def select(self, where: Sequence[Condition] = ()) -> list[Study]:
        search = _limited(self.fresh.search(), where, ())
        return [_study(row) for row in search.select(list(STUDY)).to_arrow().to_pylist()]

    def salvage(self, damage: list[str]) -> Iterator[Entry]:
        table = self._opened()  # its own, since another search takes `fresh` to a later version
        yield from _salvage(table, 0, table.count_rows(), damage)

    @_told
    def tend(self) -> None:
        from lancedb.index import FTS, BTree, LabelList

        table = self.fresh
        rows = table.count_rows()
        wanted: dict[str, Any] = {"asserted": FTS(with_position=False)}
        if rows >= LOOKUP_FROM:
            wanted |= {"path": BTree(), "sha256": BTree(), "findings": LabelList()}
            wanted |= {name: BTree() for name in table.schema.names if name.startswith(META)}
        if rows >= EXACT_BELOW:
            with_report = rows - table.count_rows("report_vector IS NULL")
            wanted["vector"] = _approximate(rows)
            if with_report >= EXACT_BELOW:
                wanted["report_vector"] = _approximate(with_report)
        table.optimize(cleanup_older_than=OLD)  # first: it moves rows, and indexes with them
        for column, config in wanted.items():
            if not _index_on(table, column):
                table.create_index(column, config=config)

    def facts(self) -> dict[str, Any]:
        table = self.fresh
        index = _index_on(table, "vector")
        waiting = f", {index.num_unindexed_rows} beside it" if index else ""
        exact = "exact" if index is None else f"approximate ({index.index_type}{waiting})"
        return {"search": exact, "bytes": table.stats()["total_bytes"]}


def _approximate(rows: int) -> Any:
    """8-bit codes in parts of `PARTITION`; a quarter of the library's training serves as well."""
    from lancedb.index import IvfSq

    parts = rows // PARTITION
    return IvfSq(distance_type="dot", num_partitions=parts, sample_rate=64, max_iterations=20)


def _connect(folder: Path) -> Any:
    # it uses threads of its own and says so at every fork; nothing here forks after using it
    warnings.filterwarnings("ignore", message="lance is not fork-safe")
    import lancedb

    return lancedb.connect(folder)


# --- rows ---------------------------------------------------------------------------------------

STUDY = ("path", "id", "sha256", "report", "metadata")


def _schema(dim: int) -> pa.Schema:
    vector = pa.list_(pa.float32(), dim)
    return pa.schema(
        [
            *((name, pa.string()) for name in STUDY),
            ("asserted", pa.string()),
            ("findings", pa.list_(pa.string())),
            ("check", pa.int64()),
            *((name, vector) for name in VECTORS),
        ]
    )


def _arrow(entries: Sequence[Entry], schema: pa.Schema) -> pa.Table:
    studies = [entry.study for entry in entries]
    columns: dict[str, Any] = {
        "path": [study.path for study in studies],
        "id": [study.id for study in studies],
        "sha256": [study.sha256 for study in studies],
        "report": [study.report for study in studies],
        "metadata": [to_json(study.metadata) for study in studies],
        "asserted": [entry.asserted for entry in entries],
        "findings": [list(entry.findings) for entry in entries],
        "check": [entry.check() for entry in entries],
        "vector": _vectors([entry.vector for entry in entries], schema),
        "report_vector": _vectors([entry.report_vector for entry in entries], schema),
    }
    for name in schema.names:
        if name.startswith(META):
            key = _key_of(name)
            there = (study.metadata.get(key) for study in studies)
            columns[name] = [None if value is None else as_text(value) for value in there]
    arrays = [pa.array(columns[f.name], f.type) for f in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _vectors(rows: Sequence[np.ndarray | None], schema: pa.Schema) -> pa.Array:
    kind = schema.field("vector").type
    nothing = np.zeros(kind.list_size, np.float32)
    values = np.concatenate([nothing if row is None else row for row in rows], dtype=np.float32)
    missing = pa.array([row is None for row in rows])
    return pa.FixedSizeListArray.from_arrays(pa.array(values), type=kind, mask=missing)


def _study(row: dict[str, Any]) -> Study:
    texts = (row["id"], row["path"], row["sha256"], row["report"])
    metadata = json.loads(row["metadata"])
    if not all(isinstance(text, str) for text in texts) or not isinstance(metadata, dict):
        raise ValueError(f"{row['path']!r} is no study.")
    return Study(*texts, metadata)


def _entries(rows: pa.Table) -> Iterator[Entry]:
    vectors = {name: _matrix(rows[name]) for name in VECTORS}
    there = rows["report_vector"].is_valid().to_pylist()
    plain = rows.drop_columns(list(VECTORS)).to_pylist()
    for i, row in enumerate(plain):
        report = vectors["report_vector"][i] if there[i] else None
        yield Entry(
            _study(row), vectors["vector"][i], report, row["asserted"] or "", row["findings"] or ()
        )


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """(rows, dim) float32; rows without a vector hold anything."""
    dim = column.type.list_size
    filled = column.fill_null(pa.scalar([0.0] * dim, column.type)).combine_chunks()
    return filled.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)


def _salvage(table: Any, first: int, last: int, damage: list[str]) -> Iterator[Entry]:
    """Blocks of rows; one that cannot be read is halved, down to the rows that are lost."""
    for start in range(first, last, BLOCK):
        end = min(start + BLOCK, last)
        try:
            rows = table.take_offsets(list(range(start, end))).to_arrow()
            checks = rows["check"].to_pylist()
            entries = list(_entries(rows))
        except Exception as error:  # what a damaged file makes the library raise can be anything
            if end - start == 1:
                damage.append(f"study {start + 1} of the table cannot be read ({_short(error)})")
            else:
                middle = (start + end) // 2
                yield from _salvage(table, start, middle, damage)
                yield from _salvage(table, middle, end, damage)
            continue
        for entry, check in zip(entries, checks, strict=True):
            if entry.check() == check:
                yield entry
            else:
                damage.append(f"{entry.study.path}: what is stored is not what was written")


def _ranked(paths: pa.ChunkedArray, scores: list[float]) -> Ranked:
    """Equal scores in the order of the paths, so that the same search gives the same hits."""
    return sorted(zip(paths.to_pylist(), scores, strict=True), key=lambda it: (-it[1], it[0]))


def _index_on(table: Any, column: str) -> Any:
    return next((index for index in table.list_indices() if index.columns == [column]), None)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _blocks(values: list[str]) -> Iterator[list[str]]:
    return (values[i : i + BLOCK] for i in range(0, len(values), BLOCK))


# --- conditions as SQL --------------------------------------------------------------------------


def _column_of(key: str) -> str:
    """A name that SQL takes as it is: letters and digits, all else as _XX_ in hexadecimal."""
    return META + re.sub(r"[^a-z0-9]", lambda match: f"_{ord(match[0]):x}_", key)


def _key_of(column: str) -> str:
    return re.sub(r"_([0-9a-f]+)_", lambda match: chr(int(match[1], 16)), column[len(META) :])


def _limited(search: Any, where: Sequence[Condition], without: Sequence[str]) -> Any:
    text = _filter(where, without)
    return search if text is None else search.where(text)


def _filter(where: Sequence[Condition], without: Sequence[str]) -> str | None:
    parts = [_sql(condition) for condition in where]
    parts += [f"NOT array_has(findings, {_quoted(name)})" for name in without]
    return " AND ".join(parts) or None


def _sql(condition: Condition) -> str:
    value = _quoted(condition.value)
    if condition.column == FINDING:
        return f"{'NOT ' if condition.op == '!=' else ''}array_has(findings, {value})"
    own = condition.column in OWN_COLUMNS
    column = condition.column if own else _column_of(condition.column)
    if condition.op == "~":
        return f"contains(lower({column}), lower({value}))"
    if condition.op == "!=":
        return f"({column} IS NULL OR {column} != {value})"
    if condition.number is not None:
        return f"try_cast({column} AS double) {condition.op} {condition.number!r}"
    return f"{column} {condition.op} {value}"


def _is_one_of(column: str, values: Sequence[str]) -> str:
    return f"{column} IN ({', '.join(map(_quoted, values))})"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
