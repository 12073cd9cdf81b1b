"""Labels from probabilities, scored finding by finding as CT-RATE's figures are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from med3dvlm.evaluate.statistics import interval_of
from med3dvlm.evaluate.tables import Row

SCORES = ("AUROC", "F1", "weighted F1", "accuracy", "precision", "recall")
GRID = np.linspace(0, 1, 100)  # the thresholds that CT-CLIP's evaluation tries
Thresholds = Literal["nearest corner"] | float | Sequence[float]


def classification_table(
    truth: ArrayLike,
    probabilities: ArrayLike,
    names: Sequence[str],
    *,
    scores: ArrayLike | None = None,
    thresholds: Thresholds = "nearest corner",
    resamples: int = 1000,
    seed: int = 0,
) -> list[Row]:
    """AUROC, F1, accuracy, precision and recall per finding and their mean, with 95% intervals.

    `F1`, precision and recall are those of "present"; `weighted F1` is the mean of the F1 of
    present and of absent, by how often each is right: what CT-RATE's published tables call F1.
    Intervals are the bootstrap's over studies, with the thresholds kept.

    Args:
        truth: (studies, findings) of 0 and 1.
        probabilities: (studies, findings), 0 to 1.
        names: of the findings.
        scores: (studies, findings), what the AUROC ranks studies by where probabilities come too
            near to 0 or 1 to tell them apart; the probabilities, if not given.
        thresholds: a finding is present where its probability is above. "nearest corner" takes
            for each finding the one of 100 whose ROC point is nearest to (0, 1), as CT-CLIP's
            evaluation does, on these very studies; that flatters. Thresholds chosen on a
            validation split, one for all or one each, do not.

    Returns:
        A row per finding: finding, positives, threshold, and each score with its low and high.
        A finding that all studies have, or none, has no AUROC and no nearest corner: it has a
        threshold of one half where that was asked for, and is left out of the last row, the mean.
        Without positives there is no F1, precision or recall, in a resample neither.

    Raises:
        ValueError: for shapes that do not fit, labels but 0 and 1, or probabilities out of 0..1.
    """
    true, given = _checked(truth, probabilities, names)
    ranked = given if scores is None else np.asarray(scores, dtype=float)
    if ranked.shape != given.shape:
        raise ValueError(f"scores are {ranked.shape}, probabilities {given.shape}: give as many.")
    if isinstance(thresholds, str):
        if thresholds != "nearest corner":
            raise ValueError(f'thresholds is {thresholds!r}: give "nearest corner" or numbers.')
        limits = np.array([nearest_corner(t, p) for t, p in zip(true.T, given.T, strict=True)])
    else:
        limits = np.broadcast_to(np.asarray(thresholds, dtype=float), len(names))
    said = given > limits
    mixed = true.any(axis=0) & ~true.all(axis=0)

    def scored(chosen: np.ndarray | slice) -> np.ndarray:
        each = _scores(true[chosen], ranked[chosen], said[chosen])
        return np.column_stack([each, _means(each[:, mixed])])

    found = scored(slice(None))
    low, high = interval_of(scored, len(true), resamples=resamples, seed=seed)
    rows: list[Row] = []
    for i, name in enumerate([*names, "mean"]):
        positives = true[:, i].sum() if i < len(names) else true[:, mixed].sum()
        row: Row = {"finding": name, "positives": int(positives)}
        row["threshold"] = float(limits[i]) if i < len(names) else None
        for k, score in enumerate(SCORES):
            for column, values in ((score, found), (f"{score} low", low), (f"{score} high", high)):
                row[column] = float(values[k, i]) if np.isfinite(values[k, i]) else None
        rows.append(row)
    return rows


def nearest_corner(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """The threshold of 100 from 0 to 1 whose ROC point is nearest to (0, 1), the last of several.

    One half where all studies are of one class: there is no ROC then.
    """
    true = np.asarray(truth, dtype=bool)
    if true.all() or not true.any():
        return 0.5
    said = np.asarray(probabilities)[:, None] > GRID
    missed, false = 1 - said[true].mean(axis=0), said[~true].mean(axis=0)
    distance = np.hypot(missed, false)
    return float(GRID[len(GRID) - 1 - np.argmin(distance[::-1])])


def _checked(
    truth: ArrayLike, probabilities: ArrayLike, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    labels, given = np.asarray(truth), np.asarray(probabilities, dtype=float)
    if labels.ndim != 2 or labels.shape != given.shape or labels.shape[1] != len(names):
        raise ValueError(
            f"truth is {labels.shape}, probabilities {given.shape}, {len(names)} names: give a row "
            "per study and a column per name in both."
        )
    if not labels.size:
        raise ValueError("truth is empty: give at least one study and one finding.")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("truth holds something but 0 and 1.")
    if not ((given >= 0) & (given <= 1)).all():
        raise ValueError("probabilities must be from 0 to 1.")
    return labels.astype(bool), given


def _scores(true: np.ndarray, given: np.ndarray, said: np.ndarray) -> np.ndarray:
    """(scores, findings) in the order of SCORES.

    NaN: an AUROC where all studies are of one class; F1, precision and recall without positives.
    A precision where nothing is asserted is 0.
    """
    count, positives, asserted = len(true), true.sum(axis=0), said.sum(axis=0)
    hits = (true & said).sum(axis=0)
    rejected = count - positives - asserted + hits  # neither there nor asserted
    f1 = _share(2 * hits, positives + asserted)
    f1_absent = _share(2 * rejected, 2 * count - positives - asserted)
    there = np.where(positives > 0, 1.0, np.nan)
    return np.array(
        [
            auroc(true, given),
            there * f1,
            (positives * f1 + (count - positives) * f1_absent) / count,
            (hits + rejected) / count,
            there * _share(hits, asserted),
            there * _share(hits, positives),
        ]
    )


def _means(scores: np.ndarray) -> np.ndarray:
    """(scores, findings) -> (scores,), of the findings that have one."""
    known = np.isfinite(scores)
    return np.divide(
        np.where(known, scores, 0).sum(axis=1),
        known.sum(axis=1),
        out=np.full(len(scores), np.nan),
        where=known.any(axis=1),
    )


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def auroc(true: np.ndarray, given: np.ndarray) -> np.ndarray:
    """The share of pairs that are in order, ties half (Mann and Whitney); NaN for one class."""
    positives = true.sum(axis=0)
    pairs = (positives * (len(true) - positives)).astype(float)
    above = (rankdata(given, axis=0) * true).sum(axis=0) - positives * (positives + 1) / 2
    return np.divide(above, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
