"""Retrieval: is the right text nearest to a scan, and the right scan to a text?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RANKS = (1, 5, 10)


def ranks_of_matches(
    similarity: np.ndarray, *, groups: Sequence[object] | None = None
) -> np.ndarray:
    """The rank of each row's own column, 1 being best.

    Ties count as if broken at random: a match that ties with k others has the mean of the ranks
    it could have, so a constant similarity scores chance and not the top.

    Args:
        similarity: (n, n), row i and column i belong together.
        groups: n labels; a column of the same group as the row is as good as its own (series
            that share one report), and other members of the group do not stand in its way.

    Returns:
        (n,) float64.
    """
    n = len(similarity)
    own = np.diag(similarity)
    if groups is not None:
        same = np.equal.outer(np.asarray(groups), np.asarray(groups))
        own = np.where(same, similarity, -np.inf).max(axis=1)
        rivals = ~same
    else:
        rivals = ~np.eye(n, dtype=bool)
    better = ((similarity > own[:, None]) & rivals).sum(axis=1)
    tied = ((similarity == own[:, None]) & rivals).sum(axis=1)
    return 1 + better + tied / 2


def recall_at(ranks: np.ndarray, k: int) -> np.ndarray:
    """(n,) of 0 or 1: is the match among the first k?"""
    return (ranks <= k).astype(float)


def retrieval_table(
    images: np.ndarray,
    texts: np.ndarray,
    *,
    pools: Sequence[int] = (100, 500, 1000, 2000),
    groups: Sequence[object] | None = None,
) -> list[dict[str, float | int | str]]:
    """R@1, 5 and 10 in both directions for every pool size that the studies suffice for.

    A pool of n is each disjoint run of n studies in turn, averaged. Rows of the embeddings have
    length 1 and belong together.

    Returns:
        One row per pool and direction: pool, direction, queries, R@k and chance@k.
    """
    rows: list[dict[str, float | int | str]] = []
    for pool in (p for p in pools if p <= len(images)):
        starts = range(0, len(images) - pool + 1, pool)
        for direction, (queries, answers) in {
            "scan to text": (images, texts),
            "text to scan": (texts, images),
        }.items():
            ranks = np.concatenate(
                [
                    ranks_of_matches(
                        queries[s : s + pool] @ answers[s : s + pool].T,
                        groups=None if groups is None else groups[s : s + pool],
                    )
                    for s in starts
                ]
            )
            row: dict[str, float | int | str] = {"pool": pool, "direction": direction}
            row["queries"] = len(ranks)
            for k in RANKS:
                row[f"R@{k}"] = float(recall_at(ranks, k).mean())
                row[f"chance@{k}"] = k / pool
            rows.append(row)
    return rows
