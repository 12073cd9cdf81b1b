"""How sure an answer or a sentence is: from likelihoods to shares that are right (calibration).

What the language model itself makes of a written sentence is how sure it is of the
words, not of the finding (docs/decisions/0018). So for each finding that it names, the model is
asked whether it is there, and a logistic regression, fitted on studies whose truth is known, makes
a probability of what it answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from med3dvlm.data.assertions import Term, read_assertions
from med3dvlm.data.laterality import swap_sides
from med3dvlm.evaluate.findings import VOCABULARIES
from med3dvlm.files import write_json
from med3dvlm.notice import CANNOT_TELL
from med3dvlm.sentences import Sentence, split_report

if TYPE_CHECKING:
    from med3dvlm.models import Answer, Med3DVLM

FILE = "calibration.json"
MOST = 8.0  # log-odds beyond which nothing gets surer
BATCH = 8  # questions at a time
ANSWERS = ["yes", "no"]
RIDGE = 1e-4  # keeps coefficients finite where all answers are right, or all wrong


class NoCalibrationError(ValueError):
    """A model without a calibration that fits its weights: what to do."""


@dataclass(frozen=True)
class Calibration:
    """What makes probabilities of likelihoods, saved beside the weights it was fitted for.

    Attributes:
        weights: fingerprint of those weights, in the precision of the file.
        vocabulary: how findings are named in sentences, a key of `VOCABULARIES`.
        temperature: divides the log-likelihoods of choices.
        answers: slope and intercept of the log-odds of a written answer.
        sentences: coefficients of :func:`sentence_features`, and the intercept.
        facts: what it was fitted on.
    """

    weights: str
    vocabulary: str
    temperature: float
    answers: tuple[float, ...]
    sentences: tuple[float, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def terms(self) -> Mapping[str, Term]:
        return VOCABULARIES[self.vocabulary]

    def save(self, folder: Path | str) -> None:
        """Write `calibration.json` into a checkpoint's folder, atomically."""
        write_json(Path(folder) / FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path | str) -> Calibration | None:
        """What a checkpoint's folder holds, if it holds one.

        Raises:
            ValueError: for a file that is none.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text("utf-8"))
            return cls(
                weights=str(found["weights"]),
                vocabulary=str(found["vocabulary"]),
                temperature=_positive(found["temperature"]),
                answers=_finite(found["answers"], 2),
                sentences=_finite(found["sentences"], len(FEATURES) + 1),
                facts=dict(found["facts"]),
            ).checked()
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: it is no calibration ({error!r}): make it again with 'med3dvlm evaluate "
                "calibration --save', or delete it."
            ) from error

    def checked(self) -> Calibration:
        if self.vocabulary not in VOCABULARIES:
            raise ValueError(f"vocabulary {self.vocabulary!r} is unknown")
        return self


def calibration_of(model: Med3DVLM) -> Calibration:
    """The calibration that the model was loaded with.

    Raises:
        NoCalibrationError: if there is none.
    """
    if model.calibration is None:
        raise NoCalibrationError(
            f"model {model.label!r} has no calibration, so nobody knows how often it is right: fit "
            f"one with 'med3dvlm evaluate calibration --model {model.label} --save'."
        )
    return model.calibration


# --- applying it ------------------------------------------------------------------------------


def answer_confidence(calibration: Calibration, answer: Answer) -> float:
    """The probability that an answer, as `ask` gives it, is right."""
    if answer.choices:
        return max(choice_shares(calibration, answer))
    return float(apply_logistic([[log_odds(answer.confidence)]], calibration.answers)[0])


def choice_shares(calibration: Calibration, answer: Answer) -> list[float]:
    """The probability of each choice, in their order; they add up to 1."""
    logs = np.log([max(share, 1e-12) for _, share in answer.choices]) / calibration.temperature
    return _softmax(logs).tolist()


@dataclass(frozen=True)
class Rated:
    """A sentence with the probability that what it says is so; None where it names no finding.

    Right is a sentence whose findings are there or not as it says, on the side it says.
    """

    sentence: Sentence
    confidence: float | None

    def withheld(self, threshold: float | None) -> bool:
        """Whether it is not sure enough; what has no confidence never is."""
        if threshold is None:
            return False
        return self.confidence is None or self.confidence < threshold


def rate_report(model: Med3DVLM, visual: Tensor, report: str) -> list[Rated]:
    """Each sentence of a report with its confidence.

    Args:
        visual: (1, N, width), from `model.see`.

    Raises:
        NoCalibrationError: for a model that is not calibrated.
    """
    calibration = calibration_of(model)
    sentences = split_report(report)
    features = sentence_features(model, visual, [s.text for s in sentences], calibration.terms)
    return [
        Rated(
            sentence,
            None if row is None else float(apply_logistic([row], calibration.sentences)[0]),
        )
        for sentence, row in zip(sentences, features, strict=True)
    ]


def with_withheld(report: str, rated: Sequence[Rated], threshold: float) -> str:
    """The report with "[cannot tell]" in place of every sentence that is not sure enough."""
    kept, place = [], 0
    for one in rated:
        if one.withheld(threshold):
            kept += [report[place : one.sentence.start], f"[{CANNOT_TELL}]"]
            place = one.sentence.end
    return "".join([*kept, report[place:]])


# --- what is measured -------------------------------------------------------------------------

FEATURES = ("agreement", "asserts something", "names a side")


def sentence_features(
    model: Med3DVLM, visual: Tensor, sentences: Sequence[str], terms: Mapping[str, Term]
) -> list[list[float] | None]:
    """For each sentence the values of `FEATURES`; None where it names no finding.

    `agreement` are the log-odds of yes against no to "Is there …?", turned round for a sentence
    that denies the finding; the least of several findings.
    """
    said = [
        {n: s for n, s in read_assertions(text, terms).items() if s != "not mentioned"}
        for text in sentences
    ]
    named = list(dict.fromkeys(name for statuses in said for name in statuses))
    odds = dict(zip(named, finding_log_odds(model, visual, named), strict=True))
    rows: list[list[float] | None] = []
    for text, statuses in zip(sentences, said, strict=True):
        agreement = [
            -odds[name] if status == "absent" else odds[name] for name, status in statuses.items()
        ]
        rows.append(
            [
                min(agreement),
                float(any(status != "absent" for status in statuses.values())),
                float(swap_sides(text) != text),
            ]
            if statuses
            else None
        )
    return rows


@torch.inference_mode()
def finding_log_odds(model: Med3DVLM, visual: Tensor, findings: Sequence[str]) -> list[float]:
    """Log-odds of yes against no, whether each finding is there; `visual` is (1, N, width)."""
    odds: list[float] = []
    for first in range(0, len(findings), BATCH):
        asked = [f"Is there {name.lower()}?" for name in findings[first : first + BATCH]]
        pairs = [[(question, answer)] for question in asked for answer in ANSWERS]
        batch = model.processor.training_batch(pairs).to(model.device)
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            visual_tokens=visual.expand(len(pairs), -1, -1),
        ).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        taken = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1))
        yes, no = (taken.squeeze(-1) * (labels >= 0)).sum(1).view(-1, 2).T
        odds += (yes - no).clamp(-MOST, MOST).tolist()
    return odds


def log_odds(probability: float) -> float:
    """log(p / (1 − p)), at most 8 either way: float32 knows no more."""
    if probability <= 0 or probability >= 1:
        return math.copysign(MOST, probability - 0.5)
    return float(np.clip(math.log(probability / (1 - probability)), -MOST, MOST))


# --- fitting it -------------------------------------------------------------------------------


def fit_logistic(features: Sequence[Sequence[float]], right: Sequence[bool]) -> tuple[float, ...]:
    """Coefficients and intercept of the logistic regression of `right` (Platt 1999, for one).

    Raises:
        ValueError: without samples.
    """
    if not len(right):
        raise ValueError("there is nothing to fit to: give studies whose answers are known.")
    design, sign = _design(features), 2 * np.asarray(right, float) - 1

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (design @ weights)
        slope = -sign / (1 + np.exp(np.clip(margin, -500, 500)))
        penalty = RIDGE * weights[:-1] @ weights[:-1]
        gradient = design.T @ slope / len(sign) + 2 * RIDGE * np.append(weights[:-1], 0)
        return np.logaddexp(0, -margin).mean() + penalty, gradient

    found = minimize(loss, np.zeros(design.shape[1]), jac=True)
    return tuple(float(w) for w in found.x)


def fit_temperature(shares: Sequence[Sequence[float]], right: Sequence[int]) -> float:
    """The temperature of choices that makes the right ones likeliest (Guo et al., ICML 2017).

    Args:
        shares: for each question the shares of its choices.
        right: the number of the right one.
    """
    if not len(right):
        raise ValueError("there is nothing to fit to: give studies whose answers are known.")
    logs = [np.log(np.maximum(of, 1e-12)) for of in shares]
    pairs = list(zip(logs, right, strict=True))

    def loss(log_temperature: np.ndarray) -> float:
        t = math.exp(float(log_temperature[0]))
        return -float(np.mean([np.log(_softmax(of / t)[k]) for of, k in pairs]))

    found = minimize(loss, [0.0], method="Nelder-Mead", bounds=[(-3.0, 3.0)])
    return math.exp(float(found.x[0]))


def calibration_error(confidence: np.ndarray, right: np.ndarray, *, bins: int = 15) -> float:
    """Expected calibration error over bins of equally many samples (Nixon et al., 2019)."""
    return sum(
        len(part) * abs(float(confidence[part].mean() - right[part].mean()))
        for part in equal_bins(confidence, bins)
    ) / len(right)


def equal_bins(confidence: np.ndarray, bins: int) -> list[np.ndarray]:
    """Numbers of the samples, from least to most confident, in bins of equally many."""
    order = np.argsort(confidence, kind="stable")
    return [part for part in np.array_split(order, bins) if len(part)]


def apply_logistic(
    features: Sequence[Sequence[float]], coefficients: Sequence[float]
) -> np.ndarray:
    """(n,) probabilities, by coefficients that end with the intercept."""
    logits = _design(features) @ np.asarray(coefficients, float)
    return 1 / (1 + np.exp(-np.clip(logits, -500, 500)))


def _design(features: Sequence[Sequence[float]]) -> np.ndarray:
    return np.column_stack([np.asarray(features, float), np.ones(len(features))])


def _softmax(logs: np.ndarray) -> np.ndarray:
    powers = np.exp(logs - logs.max())
    return powers / powers.sum()


def _positive(value: Any) -> float:
    (number,) = _finite([value], 1)
    if number <= 0:
        raise ValueError(f"temperature {number} is not positive")
    return number


def _finite(values: Any, count: int) -> tuple[float, ...]:
    numbers = tuple(float(v) for v in values)
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ValueError(f"{values!r} are not {count} numbers")
    return numbers
