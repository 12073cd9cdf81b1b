"""Retrieval: is the right text nearest to a scan, and the right scan to a text?"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from med3dvlm.evaluate.statistics import interval
from med3dvlm.evaluate.tables import Row

RANKS = (1, 5, 10)
POOLS = (100, 500, 1000, 2000)
TIE = 1e-6
"""Similarities this near are the same: float32 embeddings carry no finer difference, and one
text embedded in two batches differs by as much."""


@dataclass(frozen=True)
class Places:
    """Where the matches of each query stand; all (n,) integers.

    Attributes:
        better: rivals that are strictly nearer than the nearest match.
        tied: rivals exactly as near as it.
        matches: matches exactly as near as it, itself included.
    """

    better: np.ndarray
    tied: np.ndarray
    matches: np.ndarray

    def expected_rank(self) -> np.ndarray:
        """(n,) rank of the first match, 1 being best, with ties broken at random."""
        return self.better + (self.matches + self.tied + 1) / (self.matches + 1)

    def hit_at(self, k: int) -> np.ndarray:
        """(n,) probability that a match is among the first k, with ties broken at random.

        So an embedding that is the same for everything scores chance, neither 0 nor 100%.
        """
        return _drawn(self.matches, self.matches + self.tied, k - self.better)


def _drawn(good: np.ndarray, total: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Probability of at least one of `good` among `draws` out of `total`, without replacement."""
    bad = total - good
    draws = np.clip(draws, 0, total)
    possible = np.minimum(draws, bad)  # beyond that a good one is certain
    log_none = gammaln(bad + 1) - gammaln(bad - possible + 1)
    log_none += gammaln(total - possible + 1) - gammaln(total + 1)
    return np.where(draws > bad, 1.0, 1 - np.exp(log_none))


def places_of_matches(
    similarity: np.ndarray, *, groups: Sequence[Hashable] | None = None
) -> Places:
    """Where each row's own column stands.

    Args:
        similarity: (n, n), row i and column i belong together.
        groups: n labels; a column of the row's own group is as good as its own column (series
            that share one report: give the reports as the groups). Without, a sibling is a miss,
            as in the published protocol.

    Raises:
        ValueError: if the matrix is not square, or holds NaN (which would compare as no rival).
    """
    n = len(similarity)
    if similarity.shape != (n, n) or not n:
        raise ValueError(f"similarity is {similarity.shape}: it must be square and not empty.")
    if not np.isfinite(similarity).all():
        raise ValueError("the similarities are not all finite: the embeddings are broken.")
    codes = np.arange(n) if groups is None else _codes(groups)
    if len(codes) != n:
        raise ValueError(f"{len(codes)} groups for {n} rows: give one for each.")
    same = np.equal.outer(codes, codes)
    nearest = np.where(same, similarity, -np.inf).max(axis=1, keepdims=True)
    as_near = np.abs(similarity - nearest) <= TIE
    return Places(
        better=((similarity > nearest + TIE) & ~same).sum(axis=1),
        tied=(as_near & ~same).sum(axis=1),
        matches=(as_near & same).sum(axis=1),
    )


def _codes(groups: Sequence[Hashable]) -> np.ndarray:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups])


def retrieval_table(
    images: np.ndarray,
    texts: np.ndarray,
    *,
    pools: Sequence[int] = POOLS,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> list[Row]:
    """R@1, 5 and 10 in both directions for every pool size that the studies suffice for.

    The studies are shuffled by the seed (archives are sorted, and neighbours are alike) and cut
    into as many disjoint pools as there are; every pool's queries count. Where no pool size fits,
    all studies are one pool.

    Args:
        images, texts: (n, dim) embeddings, rows of length 1, row i of both belonging together.
        groups: see :func:`places_of_matches`; chance is then that of hitting any of the group.

    Returns:
        One row per pool size and direction: pool, pools, direction, queries, R@k with its interval
        over the queries (95%: low@k, high@k) and chance@k.
    """
    n = len(images)
    codes = np.arange(n) if groups is None else _codes(groups)
    if not n or len(texts) != n or len(codes) != n:
        raise ValueError(f"{n} scans, {len(texts)} texts, {len(codes)} groups: give as many.")
    order = np.random.default_rng(seed).permutation(n)
    rows = []
    for pool in [p for p in pools if 0 < p <= n] or [n]:
        members = [order[start : start + pool] for start in range(0, n - pool + 1, pool)]
        for direction, (queries, answers) in {
            "scan to text": (images, texts),
            "text to scan": (texts, images),
        }.items():
            # float64: the order of a float32 sum must not break ties
            places = [
                places_of_matches(
                    queries[m].astype(np.float64) @ answers[m].astype(np.float64).T,
                    groups=codes[m].tolist(),
                )
                for m in members
            ]
            rows.append(_row(pool, direction, places, [codes[m] for m in members]))
    return rows


def _row(pool: int, direction: str, places: list[Places], codes: list[np.ndarray]) -> Row:
    row: Row = {"pool": pool, "pools": len(places), "direction": direction}
    row["queries"] = pool * len(places)
    for k in RANKS:
        # sorted: the interval is of the queries, whatever their order
        hits = np.sort(np.concatenate([place.hit_at(k) for place in places]))
        row[f"R@{k}"] = float(hits.mean())
        row[f"low@{k}"], row[f"high@{k}"] = interval(hits)
        row[f"chance@{k}"] = float(np.mean([_chance(code, k) for code in codes]))
    return row


def _chance(codes: np.ndarray, k: int) -> float:
    """R@k of a random order of a pool."""
    _, group, sizes = np.unique(codes, return_inverse=True, return_counts=True)
    n = len(codes)
    return float(_drawn(sizes[group], np.full(n, n), np.full(n, k)).mean())
