"""A map of an archive: studies that are alike lie together, coloured by any column."""

from __future__ import annotations

import json
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from med3dvlm.files import atomic_file
from med3dvlm.search.index import SearchIndex
from med3dvlm.search.study import Entry, SearchIndexError, as_text

FEWEST = 10
FINDINGS = "findings of the report"
TEMPLATE = "map.html"
REPORT_CHARACTERS = 240


def write_map(
    index: SearchIndex,
    path: Path | str,
    *,
    colour: str | None = None,
    limit: int = 20_000,
    neighbours: int = 15,
    seed: int = 0,
) -> int:
    """Write one HTML file, with nothing from elsewhere, and say how many studies it shows.

    Args:
        colour: the column that it opens with, the one that divides the studies best where none is
            given; any other can be chosen there.
        limit: of more studies, so many are drawn at random by the seed.
        neighbours: how far UMAP looks for what is alike (arXiv 1802.03426).

    Raises:
        SearchIndexError: for too few studies, or an unknown column.
    """
    random = np.random.default_rng(seed)
    kept: list[Entry] = []
    for number, entry in enumerate(index.entries([])):  # every study equally likely (reservoir)
        if number < limit:
            kept.append(entry)
        elif (place := int(random.integers(number + 1))) < limit:
            kept[place] = entry
    if len(kept) < FEWEST:
        raise SearchIndexError(f"a map needs {FEWEST} studies or more; here are {len(kept)}.")
    columns = sorted({key for entry in kept for key in entry.study.metadata})
    if any(entry.findings for entry in kept):
        columns.append(FINDINGS)
    if colour is not None and colour not in columns:
        raise SearchIndexError(f"no study has a column {colour!r}: known are {', '.join(columns)}.")
    places = _project(np.stack([entry.vector for entry in kept]), neighbours, seed)
    values = {name: [_value(entry, name) for entry in kept] for name in columns}
    data = {
        "title": f"{len(kept)} of {len(index)} studies of {index.place.location}",
        "made": f"model {index.generation['model']}, weights {index.generation['weights']}",
        "colour": colour
        or (max(columns, key=lambda name: _tells(values[name])) if columns else ""),
        "columns": values,
        "ids": [entry.study.id for entry in kept],
        "texts": [" ".join(entry.study.report.split())[:REPORT_CHARACTERS] for entry in kept],
        "x": [round(float(x), 4) for x in places[:, 0]],
        "y": [round(float(y), 4) for y in places[:, 1]],
    }
    # "<" would let a report end the element that holds it
    content = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    template = (files("med3dvlm.search") / TEMPLATE).read_text("utf-8")
    with atomic_file(path) as temporary:
        temporary.write_text(template.replace("{{DATA}}", content), "utf-8")
    return len(kept)


def _tells(values: list[str]) -> tuple[float, int]:
    """How much a column's colours say: the entropy of its values, and nothing where most of them
    stand alone; among those that say nothing, the fewer the better."""
    counts = np.array(list(Counter(values).values()))
    if len(counts) > len(values) / 4:
        return 0.0, -len(counts)
    shares = counts / len(values)
    return float(-(shares * np.log(shares)).sum()), -len(counts)


def _value(entry: Entry, column: str) -> str:
    if column == FINDINGS:
        return ", ".join(entry.findings) or "none"
    return as_text(entry.study.metadata.get(column, ""))


def _project(vectors: np.ndarray, neighbours: int, seed: int) -> np.ndarray:
    """(n, 2)"""
    try:
        import umap
    except ImportError as error:
        raise SearchIndexError("the map needs UMAP: pip install 'med3dvlm[map]'.") from error
    made: Any = umap.UMAP(
        n_neighbors=min(neighbours, len(vectors) - 1),
        metric="cosine",
        random_state=seed,
        n_jobs=1,  # with a seed it takes one anyway, and would say so
    )
    return made.fit_transform(vectors)
