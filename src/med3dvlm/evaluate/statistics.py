"""How sure a figure is, and whether two runs differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap, permutation_test

from med3dvlm.evaluate.tables import Row

BATCH = 100  # resamples at once: 100 × n floats and not 1000 × n


def interval(
    scores: ArrayLike,
    *,
    groups: Sequence[object] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-sample scores, (low, high).

    Scores that are all alike, or a single one, have no spread: both ends are their mean.

    Args:
        groups: what each score belongs to, such as the study that a question is about; whole
            groups are drawn then, for what belongs together varies together.

    Raises:
        ValueError: without scores, or with one that is not a number.
    """
    values = _numbers(scores)
    if np.all(values == values[0]):
        return float(values[0]), float(values[0])
    if groups is not None:
        sums, counts = grouped(values, groups)

        def mean(chosen: np.ndarray) -> float:
            return float(sums[chosen].sum() / counts[chosen].sum())

        ends = interval_of(mean, len(sums), level=level, resamples=resamples, seed=seed)
        return float(ends[0]), float(ends[1])
    found = bootstrap(
        (values,),
        np.mean,
        confidence_level=level,
        n_resamples=resamples,
        batch=BATCH,
        method="percentile",
        rng=np.random.default_rng(seed),
        vectorized=True,
    ).confidence_interval
    return float(found.low), float(found.high)


def grouped(scores: ArrayLike, groups: Sequence[object]) -> tuple[np.ndarray, np.ndarray]:
    """(sums, counts) of the scores of each group."""
    _, codes = np.unique([str(group) for group in groups], return_inverse=True)
    return np.bincount(codes, np.asarray(scores, dtype=float)), np.bincount(codes).astype(float)


def interval_of(
    statistic: Callable[[np.ndarray], ArrayLike],
    count: int,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap intervals, (low, high), of figures that are no mean over samples.

    Args:
        statistic: gives the figures, a number or an array, of the samples at some indices; NaN
            where they have none (one class only), and such resamples do not count.
        count: how many samples there are.
    """
    random = np.random.default_rng(seed)
    drawn = [statistic(random.integers(count, size=count)) for _ in range(resamples)]
    values = np.ma.masked_invalid(np.array(drawn, dtype=float))
    tail = 50 * (1 - level)
    shape = values.shape[1:]
    ends = np.full((2, *shape), np.nan)
    for place in np.ndindex(shape):
        kept = values[(slice(None), *place)].compressed()
        if len(kept):
            ends[(slice(None), *place)] = np.percentile(kept, [tail, 100 - tail])
    return ends[0], ends[1]


def paired_test(
    first: ArrayLike,
    second: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 9999,
    seed: int = 0,
) -> Row:
    """Whether two runs differ on the same samples: `second` minus `first`.

    The interval is the bootstrap's of the mean difference. The p-value, two-sided, is that of the
    sign-flip permutation test: if the runs were alike, each difference could as well have had the
    other sign. It is exact where all 2ⁿ signs are fewer than `resamples`.

    Args:
        first, second: per-sample scores in the same order.

    Raises:
        ValueError: for lists of different lengths, empty ones, or with what is not a number.
    """
    before, after = _numbers(first), _numbers(second)
    if len(before) != len(after):
        raise ValueError(f"{len(before)} scores with {len(after)}: they must pair up.")
    differences = after - before
    low, high = interval(differences, level=level, seed=seed)
    test = permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=resamples,
        batch=BATCH,
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return {
        "samples": len(differences),
        "first": float(before.mean()),
        "second": float(after.mean()),
        "difference": float(differences.mean()),
        "low": low,
        "high": high,
        "p": float(test.pvalue),
    }


def _numbers(scores: ArrayLike) -> np.ndarray:
    values = np.asarray(scores, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"{values.size} scores, shape {values.shape}: give a list of numbers.")
    return values
