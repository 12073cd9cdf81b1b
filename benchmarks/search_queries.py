"""Text queries on phantoms, by the truth: `python benchmarks/search_queries.py STORE [INDEX]`.

STORE is a prepared store of phantoms; INDEX is built, or brought up to date. Four kinds of query
are asked, of all findings and pairs of findings that enough studies have:

    finding        "pleural effusion"
    without        "pleural effusion without cardiomegaly"
    no             "no pleural effusion"
    filter         "pleural effusion", of the studies in arterial phase

Printed: precision at 10 by the truth with its 95% interval over queries, of each way to search,
once with the studies' reports in the index and once without any. Chance is the share of studies
that fit. The phantoms' reports state the truth, so words alone can find nearly all: with reports
the figures say that the fusion loses none of it, without reports what the embedding can do.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import med3dvlm.search.index as index_module
from med3dvlm import load
from med3dvlm.data.phantoms import FINDINGS, PHASES
from med3dvlm.data.store import Store
from med3dvlm.evaluate.statistics import interval
from med3dvlm.evaluate.tables import Row, Table
from med3dvlm.search import SearchIndex, build_index
from med3dvlm.search.database import Ranked
from med3dvlm.search.query import read_words
from med3dvlm.search.rank import fuse

TOP = 10
PAIRS = 40


@dataclass(frozen=True)
class Query:
    kind: str
    text: str
    fits: np.ndarray  # (studies,) bool, by the truth
    where: tuple[str, ...] = ()


def queries(store: Store) -> list[Query]:
    truth = dict(zip(store.labels, store.label_matrix().T.astype(bool), strict=True))
    random = np.random.default_rng(0)
    found = []
    for name in FINDINGS:
        spoken, there = name.lower(), truth[name]
        if there.sum() < TOP:
            continue
        found.append(Query("finding", spoken, there))
        found.append(Query("no", f"no {spoken}", ~there))
        for phase in PHASES:
            fits = there & truth[f"phase={phase}"]
            if fits.sum() >= TOP and sum(q.kind == "filter" for q in found) < PAIRS:
                found.append(Query("filter", spoken, fits, (f"labels~phase={phase}",)))
    pairs = [
        Query("without", f"{a.lower()} without {b.lower()}", truth[a] & ~truth[b])
        for a in FINDINGS
        for b in FINDINGS
        if a != b and (truth[a] & truth[b]).sum() >= TOP and (truth[a] & ~truth[b]).sum() >= TOP
    ]
    return found + [pairs[i] for i in random.permutation(len(pairs))[:PAIRS]]


Way = Callable[[SearchIndex, Query], Sequence[str]]


def plain(index: SearchIndex, query: Query) -> list[str]:
    return [hit.path for hit in index.search(query.text, where=query.where, plain=True)]


def fused(index: SearchIndex, query: Query) -> list[str]:
    return [hit.path for hit in index.search(query.text, where=query.where)]


def turned(denial: float, *, excluding: bool) -> Way:
    """Only the embedding, turned away from what is denied."""

    def search(index: SearchIndex, query: Query) -> list[str]:
        index_module.DENIAL, before = denial, index_module.DENIAL
        words = read_words(query.text)
        vector = index._query(words, None)
        index_module.DENIAL = before
        ranked = index._table().nearest(
            vector,
            limit=TOP,
            where=index.conditions(query.where),
            without=words.excluded if excluding else (),
        )
        return _first(ranked)

    return search


def several(*names: str, join: Callable[[Sequence[Ranked]], Ranked] = fuse) -> Way:
    """Some orders, joined one way or another."""

    def search(index: SearchIndex, query: Query) -> list[str]:
        words, table = read_words(query.text), index._table()
        vector = index._query(words, None)
        options = {"limit": 200, "where": index.conditions(query.where), "without": words.excluded}
        of = {
            "scan": table.nearest(vector, **options),
            "report": table.nearest(vector, column="report_vector", **options),
            "words": table.matching(words.wanted, **options) if words.wanted else [],
        }
        return _first(join([of[name] for name in names]))

    return search


def weighted(lists: Sequence[Ranked]) -> Ranked:
    """The sum of scores from 0 to 1: the other usual way to fuse."""
    total: dict[str, float] = {}
    for ranked in lists:
        scores = np.array([score for _, score in ranked])
        low, high = (scores.min(), scores.max()) if len(scores) else (0.0, 1.0)
        for path, score in ranked:
            total[path] = total.get(path, 0.0) + (score - low) / max(high - low, 1e-9)
    return sorted(total.items(), key=lambda it: (-it[1], it[0]))


def _first(ranked: Ranked) -> list[str]:
    return [path for path, _ in ranked[:TOP]]


WAYS: dict[str, Way] = {
    "plain embedding": plain,
    "wanted words only": turned(0.0, excluding=False),
    "turned by 0.25": turned(0.25, excluding=False),
    "turned by 0.5": turned(0.5, excluding=False),
    "turned by 1": turned(1.0, excluding=False),
    "turned by 0.5, denied left out": turned(0.5, excluding=True),
    "words (BM25)": several("words"),
    "scan and words, weighted sum": several("scan", "words", join=weighted),
    "scan, report and words by RRF": several("scan", "report", "words"),
    "search (scan and words by RRF)": fused,
}


def score(index: SearchIndex, asked: Sequence[Query], numbers: dict[str, int]) -> list[Row]:
    kinds = dict.fromkeys(query.kind for query in asked)
    rows: list[Row] = []
    chance: Row = {"way": "chance"}
    for kind in kinds:
        chance[kind] = float(np.mean([query.fits.mean() for query in asked if query.kind == kind]))
    for name, way in WAYS.items():
        row: Row = {"way": name}
        for kind in kinds:
            hits = [
                float(np.mean([query.fits[numbers[path]] for path in found]))
                for query in asked
                if query.kind == kind and (found := way(index, query))
            ]
            if hits:
                low, high = interval(hits)
                row[kind] = float(np.mean(hits))
                row[f"{kind} 95%"] = f"{100 * low:.0f}–{100 * high:.0f}"
        rows.append(row)
    return [chance, *rows]


def main() -> int:
    store, model = Store(sys.argv[1]), load("demo", part="search")
    asked = queries(store)
    with tempfile.TemporaryDirectory() as folder:
        place = sys.argv[2] if len(sys.argv) > 2 else str(Path(folder) / "with")
        build_index(store.location, model, place)
        index = SearchIndex.open(place, model=model)
        numbers = {f"{store.location}#{name}": i for i, name in enumerate(store.ids)}
        bare = SearchIndex.create(Path(folder) / "without", model)
        entries = index.entries([])
        bare.put([replace(e, report_vector=None, asserted="", findings=()) for e in entries])
        bare.tend()
        counts = {kind: sum(q.kind == kind for q in asked) for kind in {q.kind for q in asked}}
        print(f"{len(store)} phantoms, no patients; queries: {counts}\n")
        for title, one in (("Reports in the index", index), ("No reports in the index", bare)):
            print(Table(title, score(one, asked, numbers)).to_markdown(), flush=True)
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
