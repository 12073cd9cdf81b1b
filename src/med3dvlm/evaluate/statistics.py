"""How sure a figure is."""

from __future__ import annotations

import numpy as np
from scipy.stats import bootstrap


def interval(scores: np.ndarray, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of per-sample scores, (low, high).

    Scores that are all alike, or a single one, have no spread: both ends are their mean.
    """
    scores = np.asarray(scores, dtype=float)
    if len(scores) < 2 or np.all(scores == scores[0]):
        return float(scores.mean()), float(scores.mean())
    found = bootstrap(
        (scores,),
        np.mean,
        confidence_level=level,
        n_resamples=1000,
        method="percentile",
        rng=np.random.default_rng(seed),
        vectorized=True,
    ).confidence_interval
    return float(found.low), float(found.high)
