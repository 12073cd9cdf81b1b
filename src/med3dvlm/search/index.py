"""An index of studies: which model made it, what is in it, and the search."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from med3dvlm.data.assertions import part_text
from med3dvlm.notice import provenance
from med3dvlm.search.database import Place, Ranked, Table, place_of
from med3dvlm.search.query import (
    Condition,
    Words,
    asserted_findings,
    read_conditions,
    read_words,
)
from med3dvlm.search.rank import fuse
from med3dvlm.search.study import Embedder, Entry, Hit, SearchIndexError, Study

FORMAT = 2
DEPTH = 200  # studies that each list contributes to the order, or twice what is shown
PRESENT, ABSENT = "There is {}.", "There is no {}."
DENIAL = 0.5  # what turning away from a denied phrase counts, against what is wanted (decision 14)
PROBED = 200  # studies that `verify` looks up in the approximate index
FOUND = 0.9  # of them, at least


class SearchIndex:
    """Studies in a database, with the model whose embeddings they are.

    Attributes:
        head: what is known of the whole index: its format; its `generations`, the current one
            first, each with table, dim and what made it (model, weights, preparation); `sources`,
            from which it was built.
        generation: that of `head` which is searched here.
        table: its studies; None before the first is written.
    """

    def __init__(self, place: Place, head: dict[str, Any], generation: dict[str, Any]):
        self.place, self.head, self.generation = place, head, generation
        self.table: Table | None = None
        self.model: Embedder | None = None
        self.pending = False  # whether `generation` is one that `rebuild` makes

    @classmethod
    def create(cls, location: Path | str, model: Embedder) -> SearchIndex:
        """An empty index for a model; nothing is written before the first study."""
        generation = {"table": "studies-1", **made_by(model)}
        head = {"format": FORMAT, "generations": [generation], "sources": []}
        index = cls(place_of(location), head, generation)
        index.model = model
        return index

    @classmethod
    def open(cls, location: Path | str, *, model: Embedder | None = None) -> SearchIndex:
        """Open an index; with `model`, that generation of it which the very model made.

        Raises:
            SearchIndexError: for a missing or damaged index, or one of another model.
        """
        place = place_of(location)
        head = read_head(place)
        generations = head["generations"]
        generation = generations[0]
        if model is not None:
            made = made_by(model)
            fitting = [g for g in generations if not _differing(g, made)]
            if not fitting:
                raise SearchIndexError(_refusal(place, generation, made))
            generation = fitting[0]
        index = cls(place, head, generation)
        index.model = model
        index.table = place.open(generation["table"])
        return index

    def __len__(self) -> int:
        return 0 if self.table is None else len(self.table)

    # --- writing --------------------------------------------------------------------------------

    def put(self, entries: Sequence[Entry], *, instead_of: Iterable[str] = ()) -> None:
        """Write studies, all or none; one of a known path takes the place of the older.

        Args:
            instead_of: paths to take out in the same step.

        Raises:
            SearchIndexError: for embeddings that do not fit, or if the index has moved on to
                another model since it was opened.
        """
        if not entries:
            return
        dim = self.generation.get("dim", entries[0].vector.shape[-1])
        for entry in entries:
            vectors = [v for v in (entry.vector, entry.report_vector) if v is not None]
            if any(v.shape != (dim,) or not np.isfinite(v).all() for v in vectors):
                raise SearchIndexError(
                    f"{entry.study.path}: embeddings of shape {[v.shape for v in vectors]} in an "
                    f"index of dimension {dim}: give finite numbers of that dimension."
                )
        latest = {entry.study.path: entry for entry in entries}  # of a path given twice, the last
        with self.place.writing():
            self._begin(dim)
            gone = sorted(set(instead_of) - latest.keys())
            self._table().write(list(latest.values()), instead_of=gone)

    def remove(self, paths: Iterable[str]) -> int:
        """Take studies out; says how many there were."""
        gone = list(paths)
        with self.place.writing():
            self._check_current()
            before = len(self)
            self._table().delete(gone)
            return before - len(self)

    def tend(self) -> None:
        """Bring the database's own indexes up to date; searches go on meanwhile."""
        if self.table is not None:
            with self.place.writing():
                self._check_current()
                self.table.tend()

    def add_source(self, source: dict[str, Any]) -> None:
        """Note where studies came from, for a rebuild after damage."""
        with self.place.writing():
            self._check_current()
            if source not in self.head["sources"]:
                self.head["sources"].append(source)
                self.place.write_head(self.head)

    def _begin(self, dim: int) -> None:
        """The table and the head of a new index, or another process's, if it was first."""
        if self.table is not None:
            self._check_current()
            return
        if self.pending:
            self.head = read_head(self.place)
            self.generation["dim"] = int(dim)
            self.table = self.place.create(self.generation["table"], int(dim))
            self.head["pending"] = self.generation
            self.place.write_head(self.head)
        elif self.place.read_head() is None:
            self.generation["dim"] = int(dim)
            self.table = self.place.create(self.generation["table"], int(dim))
            self.place.write_head(self.head)
        else:
            self.head = read_head(self.place)
            current = self.head["generations"][0]
            if _differing(current, self.generation):
                raise SearchIndexError(_refusal(self.place, current, self.generation))
            self.generation = current
            self.table = self.place.open(current["table"])

    def _check_current(self) -> None:
        self.head = read_head(self.place)
        current = self.head["generations"][0]
        expected = self.head.get("pending") if self.pending else current
        if (expected or {}).get("table") != self.generation["table"]:
            raise SearchIndexError(
                f"{self.place.location} is now of model {current['model']!r} (weights "
                f"{current['weights']}): open it again, with that model."
            )

    # --- searching ------------------------------------------------------------------------------

    def search(
        self,
        text: str | None = None,
        *,
        vector: np.ndarray | None = None,
        top: int = 10,
        page: int = 1,
        where: Iterable[str] = (),
        plain: bool = False,
    ) -> list[Hit]:
        """The studies that fit best, best first.

        With words, two orders are fused (:func:`fuse`): by the similarity of the scan's embedding
        to that of the words, and by how well the words match what the report asserts (BM25). What
        the words deny ("without effusion") turns the embedding away from it, and a report that
        asserts a denied finding is left out (:func:`read_words`).

        Args:
            text: words; with `vector` also given, both count.
            vector: (dim,) an embedding, as of a scan.
            top: studies a page; page: counted from 1.
            where: conditions, see :func:`read_conditions`.
            plain: only compare the embedding of the words with those of the scans.

        Raises:
            SearchIndexError: for a query that cannot be answered.
        """
        if top < 1 or page < 1:
            raise SearchIndexError(f"top is {top}, page {page}: both begin with 1.")
        if text is None and vector is None:
            raise SearchIndexError("nothing is asked: give words, a scan or both.")
        self._refresh()
        conditions = self.conditions(where)
        table = self._table()
        last = top * page
        depth = DEPTH
        while depth < 2 * last:
            depth *= 2
        words = None if text is None else read_words(text)
        if words is not None and plain:
            words = Words(words.text, words.text)
        query = self._query(words, vector)
        lists = self._lists(table, words, query, conditions, depth, plain)
        chosen = fuse(lists)[last - top : last]
        entries = table.fetch([path for path, _ in chosen])
        return [
            _hit(rank, score, float(entries[path].vector @ query), entries[path].study)
            for rank, (path, score) in enumerate(chosen, start=last - top + 1)
            if path in entries  # else someone has just taken it out
        ]

    def select(self, where: Iterable[str] = ()) -> list[Study]:
        """The studies that meet some conditions, in the order of their paths."""
        found = self._table().select(self.conditions(where))
        return sorted(found, key=lambda study: study.path)

    def conditions(self, where: Iterable[str]) -> list[Condition]:
        """Conditions on the columns that this index has."""
        return read_conditions(where, self._table().columns())

    def _lists(
        self,
        table: Table,
        words: Words | None,
        query: np.ndarray,
        conditions: Sequence[Condition],
        depth: int,
        plain: bool,
    ) -> list[Ranked]:
        excluded = words.excluded if words else ()
        lists = [table.nearest(query, limit=depth, where=conditions, without=excluded)]
        if words is not None and words.wanted and not plain:
            lists.append(
                table.matching(words.wanted, limit=depth, where=conditions, without=excluded)
            )
        return lists

    def _query(self, words: Words | None, vector: np.ndarray | None) -> np.ndarray:
        """(dim,) of length 1: what is wanted, turned away from what is denied."""
        dim = self.generation["dim"]
        total = np.zeros(dim, np.float32)
        if vector is not None:
            given = np.asarray(vector, np.float32)
            if given.shape != (dim,) or not np.isfinite(given).all() or not given.any():
                raise SearchIndexError(
                    f"a query of shape {given.shape} for an index of dimension {dim}: give one "
                    "embedding of the model that made it."
                )
            total = total + given / np.linalg.norm(given)
        if words is not None:
            total = total + self._embed(words)
        length = float(np.linalg.norm(total))
        return total / length if length else total

    def _embed(self, words: Words) -> np.ndarray:
        if self.model is None:
            raise SearchIndexError("a search by words needs a model: open the index with one.")
        texts = [words.wanted] if words.wanted else []
        texts += [form.format(phrase) for phrase in words.unwanted for form in (PRESENT, ABSENT)]
        rows = np.asarray(self.model.embed_texts(texts), np.float32)
        wanted = rows[0] if words.wanted else np.zeros(rows.shape[1], np.float32)
        pairs = rows[len(texts) - 2 * len(words.unwanted) :]
        away = pairs[0::2] - pairs[1::2]  # from "there is no" to "there is"
        lengths = np.linalg.norm(away, axis=1, keepdims=True)
        return wanted - DENIAL * (away / np.maximum(lengths, 1e-6)).sum(axis=0)

    def _refresh(self) -> None:
        """Follow a rebuild by the same model; go on with the older table while it is there.

        Raises:
            SearchIndexError: if the index is of another model now, and the older table gone.
        """
        generations = read_head(self.place)["generations"]
        if self.pending or self.generation["table"] in [g["table"] for g in generations]:
            return
        fitting = [g for g in generations if not _differing(g, self.generation)]
        if not fitting:
            raise SearchIndexError(_refusal(self.place, generations[0], self.generation))
        self.generation = fitting[0]
        self.table = self.place.open(self.generation["table"])

    def _table(self) -> Table:
        if self.table is None:
            raise SearchIndexError(f"{self.place.location} holds no study yet.")
        return self.table

    # --- looking after it -----------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """What the index holds and which model made it."""
        table = self._table()
        made = {key: self.generation.get(key) for key in ("model", "weights", "preparation")}
        older = [g["model"] for g in self.head["generations"][1:]]
        return {
            "index": self.place.location,
            "studies": len(table),
            "with report": table.count([Condition("report", "!=", "")]),
            "dimension": self.generation["dim"],
            "columns": table.columns(),
            **made,
            **table.facts(),
            **({"still answers": older} if older else {}),
        }

    def entries(self, damage: list[str]) -> Iterator[Entry]:
        """Every study that is whole; what is not is named in `damage`."""
        return self._table().salvage(damage)

    def verify(self) -> list[str]:
        """What is wrong with the index, a sentence each; nothing if it is whole.

        Reads every study and compares it with the check that was stored with it, looks for paths
        that are there twice, and asks the approximate index, if there is one, for studies that it
        must find.
        """
        problems: list[str] = []
        table = self._table()
        seen: set[str] = set()
        probes: list[Entry] = []
        step = max(1, len(table) // PROBED)
        for number, entry in enumerate(self.entries(problems)):
            if entry.study.path in seen:
                problems.append(f"{entry.study.path} is there twice")
            seen.add(entry.study.path)
            if abs(float(np.linalg.norm(entry.vector)) - 1) > 1e-3:
                problems.append(f"{entry.study.path}: its embedding is not of length 1")
            if number % step == 0:
                probes.append(entry)
        return problems + _misses(table, probes)


def _misses(table: Table, probes: Sequence[Entry]) -> list[str]:
    """Whether the studies are found by their own embeddings and words."""
    found = 0
    try:
        for entry in probes:
            nearest = table.nearest(entry.vector, limit=10)
            best = nearest[0][1] if nearest else -1.0
            found += best >= float(entry.vector @ entry.vector) - 1e-3
        for entry in probes[:3]:
            if entry.asserted:
                table.matching(entry.asserted, limit=1)
    except Exception as error:  # what a damaged file makes the library raise can be anything
        return [f"a search fails ({' '.join(str(error).split())[:200]})"]
    if found < FOUND * len(probes):
        return [f"of {len(probes)} studies only {found} are found by their own embedding"]
    return []


def read_head(place: Place) -> dict[str, Any]:
    """The head of an index, checked: one may come from elsewhere, so its names are names.

    Raises:
        SearchIndexError: where there is none, or one that is damaged or of another format.
    """
    head = place.read_head()
    if head is None:
        raise SearchIndexError(
            f"{place.location} is no index: build one with med3dvlm index build."
        )
    if head.get("format") != FORMAT:
        raise SearchIndexError(
            f"{place.location} is of format {head.get('format')}, this version reads {FORMAT}: "
            "delete it and build it again with med3dvlm index build."
        )
    generations = head.get("generations")
    if not isinstance(generations, list) or not generations or "sources" not in head:
        raise SearchIndexError(f"{place.location} is damaged (it names no generation).")
    for generation in [*generations, *([head["pending"]] if head.get("pending") else [])]:
        whole = isinstance(generation, dict) and isinstance(generation.get("dim"), int)
        name = str(generation.get("table")) if whole else ""
        if not name.removeprefix("studies-").isdecimal():
            raise SearchIndexError(f"{place.location} is damaged (a generation is none).")
    return head


def made_by(model: Embedder) -> dict[str, Any]:
    return {**provenance(model), "preparation_settings": model.preparation.to_dict()}


def make_entry(study: Study, vector: np.ndarray, report_vector: np.ndarray | None) -> Entry:
    """A row of the database; the report is read for what it asserts."""
    if not study.report:
        return Entry(study, vector)
    asserted, _ = part_text(study.report)
    return Entry(study, vector, report_vector, asserted, asserted_findings(study.report))


def _differing(generation: dict[str, Any], made: dict[str, Any]) -> list[str]:
    return [key for key in ("weights", "preparation") if generation.get(key) != made[key]]


def _refusal(place: Place, generation: dict[str, Any], made: dict[str, Any]) -> str:
    key = _differing(generation, made)[0]
    differences = ""
    old, new = generation.get("preparation_settings"), made["preparation_settings"]
    if key == "preparation" and isinstance(old, dict):
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        shown = (f"{name} {old.get(name)} against {new.get(name)}" for name in names)
        differences = f"; {', '.join(shown)}"
    return (
        f"{place.location} was made by model {generation.get('model')!r} ({key} "
        f"{generation.get(key)}), not by {made['model']!r} ({key} {made[key]}){differences}: "
        "search with that model, or move the index to yours with med3dvlm index rebuild."
    )


def _hit(rank: int, score: float, similarity: float, study: Study) -> Hit:
    return Hit(rank, score, similarity, study.id, study.path, study.report, study.metadata)
