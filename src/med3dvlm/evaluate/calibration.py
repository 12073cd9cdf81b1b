"""Probabilities that mean what they say: fitted on one split, measured on another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import expit, logit

from med3dvlm.evaluate.statistics import interval_of
from med3dvlm.evaluate.tables import Row
from med3dvlm.files import write_json
from med3dvlm.notice import provenance

FORMAT = 1
BINS = 15
SMALLEST = 1e-6  # a probability of exactly 0 or 1 has no logit


class CalibrationError(ValueError):
    """A calibration that cannot be used, in one sentence."""


@dataclass(frozen=True)
class Platt:
    """p' = σ(slope · logit(p) + offset) (Platt, 1999)."""

    slope: float = 1.0
    offset: float = 0.0

    def __call__(self, probabilities: ArrayLike) -> np.ndarray:
        return expit(self.slope * _logit(probabilities) + self.offset)

    @classmethod
    def fit(cls, truth: ArrayLike, probabilities: ArrayLike) -> Platt:
        """By likelihood, with Platt's targets, which are a little inside 0 and 1.

        Labels of one class only say nothing of the slope: it stays 1.
        """
        true, score = np.asarray(truth, bool), _logit(probabilities)
        positives, negatives = int(true.sum()), int((~true).sum())
        target = np.where(true, (positives + 1) / (positives + 2), 1 / (negatives + 2))

        def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
            slope, offset = values if positives and negatives else (1.0, values[1])
            given = slope * score + offset
            error = expit(given) - target
            value = np.mean(np.logaddexp(0, given) - target * given)
            return float(value), np.array([np.mean(error * score), np.mean(error)])

        found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B").x
        one_class = not (positives and negatives)
        return cls(1.0 if one_class else float(found[0]), float(found[1]))


@dataclass(frozen=True)
class Calibration:
    """How a model's scores from prompts become probabilities.

    Attributes:
        weights, preparation: fingerprints of the model that it was fitted for.
        prompts: pairs of prompts, present and absent.
        findings: by name, in lower case.
        others: fitted on all findings together, for those that have none of their own.
        facts: what it was fitted on.
    """

    model: str
    weights: str
    preparation: str
    prompts: tuple[tuple[str, str], ...]
    findings: Mapping[str, Platt]
    others: Platt
    facts: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, names: Sequence[str], probabilities: np.ndarray) -> np.ndarray:
        """(n, names) calibrated."""
        columns = [
            self.findings.get(name.lower(), self.others)(column)
            for name, column in zip(names, probabilities.T, strict=True)
        ]
        return np.column_stack(columns)

    def check_model(self, model: Any) -> None:
        """Raises CalibrationError if it was fitted for another model, naming both."""
        now = provenance(model)
        if (self.weights, self.preparation) != (now["weights"], now["preparation"]):
            raise CalibrationError(
                f"the calibration was fitted for model {self.model!r} (weights {self.weights}, "
                f"preparation {self.preparation}), not for {now['model']!r} (weights "
                f"{now['weights']}, preparation {now['preparation']}): fit it again with med3dvlm "
                "train calibration."
            )

    def save(self, path: Path | str) -> None:
        write_json(path, {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, path: Path | str) -> Calibration:
        """Raises CalibrationError for a file that is none."""
        try:
            given = json.loads(Path(path).read_text("utf-8"))
            if given.pop("format") != FORMAT:
                raise ValueError("another format")
            given["prompts"] = tuple((str(a), str(b)) for a, b in given["prompts"])
            given["findings"] = {name: Platt(**value) for name, value in given["findings"].items()}
            given["others"] = Platt(**given["others"])
            return cls(**given)
        except FileNotFoundError as error:
            raise CalibrationError(
                f"{path} does not exist: fit one with train calibration."
            ) from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CalibrationError(f"{path} is no calibration ({error}).") from error


def calibration_error(truth: ArrayLike, probabilities: ArrayLike, *, bins: int = BINS) -> float:
    """Expected calibration error: |share present − mean probability|, averaged over even bins by
    how many studies each holds (Guo et al., ICML 2017)."""
    true, given = np.asarray(truth, float).ravel(), np.asarray(probabilities, float).ravel()
    place = np.minimum((given * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=true - given, minlength=bins)
    return float(np.abs(gaps).sum() / len(true))


def calibration_table(
    truth: np.ndarray,
    before: np.ndarray,
    after: np.ndarray,
    names: Sequence[str],
    *,
    resamples: int = 300,
    seed: int = 0,
) -> list[Row]:
    """Calibration error and Brier score of every finding and their mean, before and after.

    Args:
        truth, before, after: (studies, findings).
    """
    true = np.asarray(truth, float)

    def errors(chosen: np.ndarray | slice) -> np.ndarray:
        """(2, findings + 1): of before and after, the mean last."""
        found = [
            [calibration_error(t, p) for t, p in zip(true[chosen].T, given[chosen].T, strict=True)]
            for given in (before, after)
        ]
        return np.column_stack([np.array(found), np.mean(found, axis=1)])

    found = errors(slice(None))
    low, high = interval_of(errors, len(true), resamples=resamples, seed=seed)
    brier = [((given - true) ** 2).mean(axis=0) for given in (before, after)]
    rows: list[Row] = []
    for i, name in enumerate([*names, "mean"]):
        row: Row = {"finding": name}
        for k, when in enumerate(("before", "after")):
            row[f"error {when}"] = float(found[k, i])
            row[f"error {when} low"] = float(low[k, i])
            row[f"error {when} high"] = float(high[k, i])
            row[f"Brier {when}"] = float(brier[k][i] if i < len(names) else brier[k].mean())
        rows.append(row)
    return rows


def _logit(probabilities: ArrayLike) -> np.ndarray:
    return logit(np.clip(np.asarray(probabilities, float), SMALLEST, 1 - SMALLEST))
