"""What an index needs of the database that it lies in, and which database a location means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from med3dvlm.search.query import Condition
from med3dvlm.search.study import Entry, Study

VECTORS = ("vector", "report_vector")
Ranked = list[tuple[str, float]]  # (path, score), best first


class Table(Protocol):
    """The studies of one generation of an index, seen by many processes at once.

    What is written is there for every later search, whole or not at all. Paths are unique. Any
    method raises SearchIndexError where the database fails, and may be called by several threads.
    """

    def __len__(self) -> int: ...

    def count(self, where: Sequence[Condition]) -> int:
        """How many studies meet the conditions."""
        ...

    def columns(self) -> list[str]:
        """The keys of the metadata of any study, in alphabetical order."""
        ...

    def write(self, entries: Sequence[Entry], *, instead_of: Sequence[str] = ()) -> None:
        """Add studies, each path once; one whose path is known takes the place of the older.

        Args:
            instead_of: paths that are taken out in the same step.
        """
        ...

    def delete(self, paths: Sequence[str]) -> None:
        """Take studies out; unknown paths are no error."""
        ...

    def nearest(
        self,
        query: np.ndarray,
        *,
        limit: int,
        column: str = "vector",
        where: Sequence[Condition] = (),
        without: Sequence[str] = (),
    ) -> Ranked:
        """By inner product with an embedding (dim,), in `column` (one of `VECTORS`).

        Args:
            without: findings that a report must not assert.
        """
        ...

    def matching(
        self,
        words: str,
        *,
        limit: int,
        where: Sequence[Condition] = (),
        without: Sequence[str] = (),
    ) -> Ranked:
        """By how well what the report asserts matches some words; only those that have any."""
        ...

    def fetch(self, paths: Sequence[str]) -> dict[str, Entry]:
        """The studies of some paths, by path."""
        ...

    def same_content(self, sha256: str) -> Entry | None:
        """Any study with that content."""
        ...

    def select(self, where: Sequence[Condition] = ()) -> Sequence[Study]:
        """The studies that meet the conditions, in no order."""
        ...

    def salvage(self, damage: list[str]) -> Iterator[Entry]:
        """Every study that can be read and is what was written; what is not goes to `damage`."""
        ...

    def tend(self) -> None:
        """Bring its own indexes up to date, and make those that its size asks for."""
        ...

    def facts(self) -> dict[str, Any]:
        """How it searches now, for people."""
        ...


class Place(Protocol):
    """Where an index lies: a head (plain values), and a table for each generation."""

    location: str

    def read_head(self) -> dict[str, Any] | None:
        """None where there is no index.

        Raises:
            SearchIndexError: for a damaged one.
        """
        ...

    def write_head(self, head: dict[str, Any]) -> None:
        """Replace the head in one move."""
        ...

    def create(self, table: str, dim: int) -> Table:
        """An empty table, in place of any of that name."""
        ...

    def open(self, table: str) -> Table:
        """Raises SearchIndexError where it is missing or damaged."""
        ...

    def drop(self, table: str) -> None: ...

    def writing(self) -> AbstractContextManager[None]:
        """One writer at a time; the system lifts the lock when its holder dies."""
        ...


def place_of(location: Path | str) -> Place:
    """The database of a location: a folder, or postgresql://user@host/database#index."""
    if str(location).startswith(("postgresql://", "postgres://")):
        from med3dvlm.search.postgres import PostgresPlace

        return PostgresPlace(str(location))
    from med3dvlm.search.lance import LancePlace

    return LancePlace(Path(location))
