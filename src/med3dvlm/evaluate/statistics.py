"""How sure a figure is."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import bootstrap


def interval(
    scores: ArrayLike, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-sample scores, (low, high).

    Scores that are all alike, or a single one, have no spread: both ends are their mean.

    Raises:
        ValueError: without scores, or with one that is not a number.
    """
    values = np.asarray(scores, dtype=float)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"{values.size} scores, shape {values.shape}: give a list of numbers.")
    if np.all(values == values[0]):
        return float(values[0]), float(values[0])
    found = bootstrap(
        (values,),
        np.mean,
        confidence_level=level,
        n_resamples=resamples,
        batch=100,  # of resamples at once: 100 × n floats and not 1000 × n
        method="percentile",
        rng=np.random.default_rng(seed),
        vectorized=True,
    ).confidence_interval
    return float(found.low), float(found.high)
