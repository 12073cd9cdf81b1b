"""Evidence controls: the same questions with a blank, another patient's and a shuffled volume.

A score that stays where it was has not come out of the volume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from med3dvlm.data.sources import Progress
from med3dvlm.evaluate.statistics import interval
from med3dvlm.evaluate.tables import Row
from med3dvlm.evaluate.tasks.cases import Cases
from med3dvlm.scan import Preparation

SCAN, BLANK, OTHER, SHUFFLED = "scan", "blank", "other patient", "shuffled"
CONTROLLED = (BLANK, OTHER, SHUFFLED)
KEPT = 0.5  # of the margin over chance: a score that keeps more of it survives

See = Callable[[Tensor], Tensor]
Seen = dict[str, Tensor]  # condition -> (n, …)


@dataclass(frozen=True)
class Score:
    """One figure, with its 95% interval and what chance would give, where there are such."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None

    def row(self) -> Row:
        return {"value": self.value, "low": self.low, "high": self.high, "chance": self.chance}


Scorer = Callable[[str, Sequence[int]], list[Score]]  # (condition, numbers of studies)


def mean_score(
    name: str,
    values: ArrayLike,
    chance: float | None = None,
    *,
    groups: Sequence[str] | None = None,
) -> Score:
    """The mean of per-sample values with its interval, over groups where they are given."""
    numbers = np.asarray(values, dtype=float)
    return Score(name, float(numbers.mean()), *interval(numbers, groups=groups), chance)


def blank_volume(preparation: Preparation) -> Tensor:
    """(1, 1, D, H, W): the value that a prepared volume has outside the scan, everywhere."""
    return torch.full((1, 1, *preparation.size), preparation.pad_value)


def shuffled_volume(volume: np.ndarray, seed: int, index: int) -> np.ndarray:
    """The voxels of a volume in random order: its histogram is kept, all anatomy is gone."""
    order = np.random.default_rng([seed, index]).permutation(volume.size)
    return volume.reshape(-1)[order].reshape(volume.shape)


def other_patients(cases: Cases, seed: int) -> list[int]:
    """For each study the number of one of another patient with another report, drawn by the seed.

    Raises:
        ValueError: where all studies are of one patient, or share one report.
    """
    random = np.random.default_rng(seed)
    reports = cases.groups()
    order = random.permutation(len(cases))
    found = []
    for index in range(len(cases)):
        start = int(random.integers(len(cases)))
        fits = (
            int(other)
            for other in np.roll(order, start)
            if cases.patient(other) != cases.patient(index) and reports[other] != reports[index]
        )
        other = next(fits, None)
        if other is None:
            raise ValueError(
                f"there is no study of another patient than {cases.patient(index)}: evaluate on "
                "more studies, or with --controls 0."
            )
        found.append(other)
    return found


def look(
    encoders: Mapping[str, See],
    cases: Cases,
    *,
    controls: int = 0,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Seen]:
    """What each encoder sees of every study, and of the first `controls` studies' controls.

    A volume is read once and encoded once by each encoder, as are a shuffled one and the blank;
    another patient's is one that was encoded already.

    Returns:
        For each encoder {"scan": (n, …), and with controls "blank", "other patient" and
        "shuffled": (controls, …)}.
    """
    controls = min(controls, len(cases))
    kept: dict[str, dict[str, list[Tensor]]] = {name: {SCAN: [], SHUFFLED: []} for name in encoders}
    for first in range(0, len(cases), batch_size):
        numbers = range(first, min(first + batch_size, len(cases)))
        volumes = [cases.volume(index) for index in numbers]
        mixed = [
            shuffled_volume(volume, seed, index)
            for index, volume in zip(numbers, volumes, strict=True)
            if index < controls
        ]
        for name, see in encoders.items():
            kept[name][SCAN].append(see(_batch(volumes)))
            if mixed:
                kept[name][SHUFFLED].append(see(_batch(mixed)))
        if progress:
            progress(numbers.stop, len(cases))
    seen: dict[str, Seen] = {name: {SCAN: torch.cat(kept[name][SCAN])} for name in encoders}
    if not controls:
        return seen
    others = other_patients(cases, seed)[:controls]
    for name, see in encoders.items():
        blank = see(blank_volume(cases.preparation))
        seen[name] |= {
            BLANK: blank.expand(controls, *blank.shape[1:]),
            OTHER: seen[name][SCAN][others],
            SHUFFLED: torch.cat(kept[name][SHUFFLED]),
        }
    return seen


def look_blindly(cases: Cases, controls: int) -> Seen:
    """What one sees who looks at no volume: as many rows of nothing."""
    rows = dict.fromkeys(CONTROLLED, min(controls, len(cases))) if controls else {}
    return {name: torch.zeros(n, 1) for name, n in {SCAN: len(cases), **rows}.items()}


def _batch(volumes: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(volumes)).unsqueeze(1)


# --- tables -----------------------------------------------------------------------------------


def control_table(scorer: Scorer, count: int) -> list[Row]:
    """Every score of the first `count` studies with each volume, and the verdict."""
    by_condition = {
        condition: {score.name: score for score in scorer(condition, range(count))}
        for condition in (SCAN, *CONTROLLED)
    }
    rows: list[Row] = []
    for name, scan in by_condition[SCAN].items():
        blank = by_condition[BLANK][name]
        rows.append(
            {
                "score": name,
                "studies": count,
                "scan": scan.value,
                "low": scan.low,
                "high": scan.high,
                "blank": blank.value,
                "blank low": blank.low,
                "blank high": blank.high,
                **{c: by_condition[c][name].value for c in (OTHER, SHUFFLED)},
                "chance": scan.chance,
                "verdict": verdict(scan, blank),
            }
        )
    return rows


def verdict(scan: Score, blank: Score) -> str:
    """Whether a score outlives its volume.

    "not above chance": there is nothing to survive. "survives blank": the blank's interval
    reaches the scan's, or the blank keeps more than half of the margin over chance. Else "falls".
    """
    if scan.chance is not None and scan.value <= scan.chance:
        return "not above chance"
    if _not_lower(blank, scan):
        return "survives blank"
    if scan.chance is not None and blank.value - scan.chance > KEPT * (scan.value - scan.chance):
        return "survives blank"
    return "falls"


def _not_lower(blank: Score, scan: Score) -> bool:
    """The blank's interval reaches the scan's, or lies above it."""
    high = blank.value if blank.high is None else blank.high
    return high >= (scan.value if scan.low is None else scan.low)


def group_table(scorer: Scorer, cases: Cases, column: str) -> list[Row]:
    """Every score by the value of a column; the rarest values last.

    Raises:
        ValueError: for an unknown column.
    """
    members: dict[str, list[int]] = {}
    for index, value in enumerate(cases.column(column)):
        members.setdefault(value, []).append(index)
    return [
        {"score": score.name, column: value, "studies": len(chosen), **score.row()}
        for value, chosen in sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))
        for score in scorer(SCAN, chosen)
    ]
