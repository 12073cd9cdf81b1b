"""Scores that can be counted again on any choice of studies, for intervals over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from med3dvlm.evaluate.report import crg
from med3dvlm.evaluate.statistics import interval_of
from med3dvlm.evaluate.zero_shot import auroc

RESAMPLES = 1000


@dataclass(frozen=True)
class Ratio:
    """A mean of ratios of sums over studies.

    Attributes:
        above, below: (parts, studies). A mean over studies has ones below; micro F1 has twice
            the hits above, and what is there or asserted below; balanced accuracy has two parts.
        chance: what who has not looked would have, where that is known.
    """

    above: np.ndarray
    below: np.ndarray
    chance: float | None = None

    @classmethod
    def of(cls, *parts: tuple[ArrayLike, ArrayLike], chance: float | None = None) -> Ratio:
        above, below = (np.array([part[k] for part in parts], dtype=float) for k in (0, 1))
        return cls(above, below, chance)

    @classmethod
    def mean(cls, values: ArrayLike, chance: float | None = None) -> Ratio:
        return cls.of((values, np.ones_like(np.asarray(values, dtype=float))), chance=chance)

    @property
    def studies(self) -> int:
        return self.above.shape[1]

    def value(self, chosen: np.ndarray | None = None) -> float:
        """On the studies of some numbers, which may come more than once; NaN where none counts."""
        chosen = np.arange(self.studies) if chosen is None else chosen
        below = self.below[:, chosen].sum(axis=1)
        if not below.all():
            return float("nan")
        return float((self.above[:, chosen].sum(axis=1) / below).mean())

    def to_dict(self) -> dict[str, Any]:
        return {"above": self.above.tolist(), "below": self.below.tolist(), "chance": self.chance}


@dataclass(frozen=True)
class Auroc:
    """The mean AUROC of some findings.

    Attributes:
        names: of the findings.
        truth, given, counted: (studies, findings): whether it is there, its score, and
            whether the study counts for it.
    """

    names: list[str]
    truth: np.ndarray
    given: np.ndarray
    counted: np.ndarray
    chance: float = 0.5

    @property
    def studies(self) -> int:
        return len(self.truth)

    def value(self, chosen: np.ndarray | None = None) -> float:
        each = self.each(chosen)
        return float(np.nanmean(each)) if np.isfinite(each).any() else float("nan")

    def each(self, chosen: np.ndarray | None = None) -> np.ndarray:
        """(findings,); NaN where all or none of the studies have one."""
        chosen = np.arange(self.studies) if chosen is None else chosen
        truth, given, counted = self.truth[chosen], self.given[chosen], self.counted[chosen]
        if counted.all():
            return auroc(truth, given)
        columns = zip(truth.T, given.T, counted.T, strict=True)
        return np.array([auroc(t[c, None], g[c, None])[0] for t, g, c in columns])

    def positives(self) -> np.ndarray:
        """(findings,) studies that have one."""
        return (self.truth & self.counted).sum(axis=0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "names": self.names,
            "truth": self.truth.astype(int).tolist(),
            "given": self.given.tolist(),
            "counted": self.counted.astype(int).tolist(),
        }


@dataclass(frozen=True)
class Crg:
    """CRG of drafted reports.

    Attributes:
        truth, said: (studies, findings) bool.
    """

    truth: np.ndarray
    said: np.ndarray

    @property
    def studies(self) -> int:
        return len(self.truth)

    def value(self, chosen: np.ndarray | None = None) -> float:
        """NaN where no finding is there, or every one."""
        chosen = np.arange(self.studies) if chosen is None else chosen
        return crg(self.truth[chosen], self.said[chosen])


Score = Ratio | Auroc


def from_dict(saved: dict[str, Any]) -> Score:
    if "above" in saved:
        return Ratio(np.array(saved["above"]), np.array(saved["below"]), saved["chance"])
    truth, counted = (np.array(saved[key], dtype=bool) for key in ("truth", "counted"))
    return Auroc(saved["names"], truth, np.array(saved["given"]), counted)


def difference(
    first: Sequence[Score | Crg],
    second: Sequence[Score | Crg],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float, float]:
    """`second` less `first`, (mean over the seeds, low, high).

    The 95% interval is the bootstrap's over studies and seeds at once: each time both are drawn
    anew, and both arms are scored on what is drawn. Three seeds are few: they make it somewhat
    too narrow.

    Args:
        first, second: a score for each seed, on the same studies.
    """
    random = np.random.default_rng(seed)
    count = len(first)

    def statistic(chosen: np.ndarray) -> float:
        drawn = random.integers(count, size=count)
        values = {k: second[k].value(chosen) - first[k].value(chosen) for k in set(drawn.tolist())}
        return float(np.mean([values[k] for k in drawn.tolist()]))

    mean = float(np.mean([b.value() - a.value() for a, b in zip(first, second, strict=True)]))
    low, high = interval_of(statistic, first[0].studies, resamples=resamples, seed=seed)
    return mean, float(low), float(high)
