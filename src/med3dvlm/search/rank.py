"""One order out of several."""

from __future__ import annotations

from collections.abc import Sequence

from med3dvlm.search.database import Ranked

RRF_K = 60


def fuse(lists: Sequence[Ranked]) -> Ranked:
    """Reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009).

    A study scores Σ 1 / (60 + its rank) over the lists that it is in, divided by what the first of
    all lists would score, so that 1 is the best there can be. A single list keeps its scores.
    """
    filled = [ranked for ranked in lists if ranked]
    if len(filled) < 2:
        return filled[0] if filled else []
    scores: dict[str, float] = {}
    for ranked in filled:
        for rank, (path, _) in enumerate(ranked, start=1):
            scores[path] = scores.get(path, 0.0) + 1 / (RRF_K + rank)
    best = len(filled) / (RRF_K + 1)
    return sorted(((p, s / best) for p, s in scores.items()), key=lambda it: (-it[1], it[0]))
