"""Confidence: fitted on some studies, measured on others, with "cannot tell" by threshold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from med3dvlm.data.sources import Progress
from med3dvlm.evaluate.findings import VOCABULARIES
from med3dvlm.evaluate.statistics import interval, interval_of
from med3dvlm.evaluate.tables import Row
from med3dvlm.evaluate.tasks.answerers import SHORT_ANSWER
from med3dvlm.evaluate.tasks.cases import Cases
from med3dvlm.evaluate.tasks.run import Run, begin
from med3dvlm.evaluate.zero_shot import auroc
from med3dvlm.evidence.confidence import (
    Calibration,
    answer_confidence,
    apply_logistic,
    calibration_error,
    equal_bins,
    fit_logistic,
    fit_temperature,
    log_odds,
    sentence_features,
)
from med3dvlm.evidence.targets import token_log_probs
from med3dvlm.models import Answer, Med3DVLM
from med3dvlm.sentences import split_report

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
KINDS = ("choices", "written answers", "sentences")
Sample = dict[str, Any]


@dataclass
class Measured:
    """What a model said of some studies, and whether it was right.

    Attributes:
        choices: answers to closed questions; `right` has the number of the right choice.
        answers: written answers; sentences: of drafted reports, with their features.
    """

    choices: list[Sample] = field(default_factory=list)
    answers: list[Sample] = field(default_factory=list)
    sentences: list[Sample] = field(default_factory=list)

    def of(self, kind: str) -> list[Sample]:
        return dict(zip(KINDS, (self.choices, self.answers, self.sentences), strict=True))[kind]


def evaluate_calibration(
    model: Med3DVLM,
    fit: Cases,
    test: Cases,
    *,
    weights: str,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> tuple[Calibration, Run]:
    """Fit confidences on some studies; how well they hold on others, before and after.

    Args:
        weights: the fingerprint that the calibration is for.

    Raises:
        ValueError: where a kind of answer cannot be fitted, since no study has such.
    """
    total = len(fit) + len(test)
    fitted_on = measure(model, fit, batch_size, progress, 0, total)
    calibration = fit_calibration(fitted_on, fit, weights)
    measured = measure(model, test, batch_size, progress, len(fit), total)
    run = begin("calibration", model, test.facts)
    run.results.facts["fitted on"] = dict(fit.facts)
    rows: list[Row] = []
    told: list[Row] = []
    for kind in KINDS:
        before, after, right = confidences(calibration, measured.of(kind), kind)
        if not len(right):
            continue
        rows.append(calibration_row(kind, before, after, right))
        told += threshold_rows(kind, after, right)
        run.plots.append((f"Reliability of {kind}", reliability(before, after, right)))
        run.samples += [
            {
                "study": sample["study"],
                "sample": f"{kind} {number}",
                "text": sample["text"],
                "confidence": float(after[number]),
                "scores": {f"{kind}: Brier": float((after[number] - right[number]) ** 2)},
            }
            for number, sample in enumerate(measured.of(kind))
        ]
    run.results.add("Confidence before and after calibration", rows)
    run.results.add("Cannot tell below a threshold", told)
    return calibration, run


def fit_calibration(measured: Measured, cases: Cases, weights: str) -> Calibration:
    for kind in KINDS:
        if not measured.of(kind):
            raise ValueError(
                f"the studies give no {kind} that can be checked: confidences are fitted on "
                "studies with closed and open questions and with labels of findings."
            )
    vocabulary = next(name for name, terms in VOCABULARIES.items() if terms == cases.terms)
    return Calibration(
        weights=weights,
        vocabulary=vocabulary,
        temperature=fit_temperature(
            [s["shares"] for s in measured.choices], [s["right"] for s in measured.choices]
        ),
        answers=fit_logistic(
            [[log_odds(s["confidence"])] for s in measured.answers],
            [s["right"] for s in measured.answers],
        ),
        sentences=fit_logistic(
            [s["features"] for s in measured.sentences], [s["right"] for s in measured.sentences]
        ),
        facts={**cases.facts, **{kind: len(measured.of(kind)) for kind in KINDS}},
    )


# --- what the model says ----------------------------------------------------------------------


@torch.inference_mode()
def measure(
    model: Med3DVLM,
    cases: Cases,
    batch_size: int,
    progress: Progress | None,
    done: int,
    total: int,
) -> Measured:
    """Ask every question and draft every report of some studies."""
    measured = Measured()
    for first in range(0, len(cases), batch_size):
        numbers = list(range(first, min(first + batch_size, len(cases))))
        volumes = torch.from_numpy(np.stack([cases.volume(i) for i in numbers])).unsqueeze(1)
        seen = model.get_visual_tokens(model._to_device(volumes))
        _sentences(model, cases, numbers, seen, measured)
        _written(model, cases, numbers, seen, measured)
        _chosen(model, cases, numbers, seen, measured)
        if progress:
            progress(done + numbers[-1] + 1, total)
    return measured


def _sentences(
    model: Med3DVLM, cases: Cases, numbers: Sequence[int], seen: torch.Tensor, out: Measured
) -> None:
    reports = model.report(seen)
    for row, (index, report) in enumerate(
        zip(numbers, [reports] if len(seen) == 1 else reports, strict=True)
    ):
        visual = seen[row : row + 1]
        sentences = split_report(report)
        if not sentences:
            continue
        texts = [sentence.text for sentence in sentences]
        features = sentence_features(model, visual, texts, cases.terms or {})
        log_probs, spans = token_log_probs(model, visual, model.config.report_prompt, str(report))
        for sentence, row_features in zip(sentences, features, strict=True):
            right = cases.is_true(index, sentence.text)
            if row_features is None or right is None:
                continue
            inside = [
                k for k, (a, b) in enumerate(spans) if b > sentence.start and a < sentence.end
            ]
            out.sentences.append(
                {
                    "study": cases.ids[index],
                    "text": sentence.text,
                    "features": row_features,
                    "confidence": float(log_probs[0, inside].mean().exp()),
                    "right": right,
                }
            )


def _written(
    model: Med3DVLM, cases: Cases, numbers: Sequence[int], seen: torch.Tensor, out: Measured
) -> None:
    asked = [
        (row, index, question)
        for row, index in enumerate(numbers)
        for question in cases.studies[index]["questions"] or ()
        if question["kind"] in ("open", "yes_no")
    ]
    for first in range(0, len(asked), 4 * len(numbers)):
        part = asked[first : first + 4 * len(numbers)]
        answers = model.ask(
            seen[torch.tensor([row for row, _, _ in part])],
            [question["text"] for _, _, question in part],
            max_new_tokens=SHORT_ANSWER,
        )
        for (_, index, question), answer in zip(part, answers, strict=True):
            out.answers.append(
                {
                    "study": cases.ids[index],
                    "text": f"{question['text']} {answer}",
                    "confidence": answer.confidence,
                    "right": same_answer(str(answer), question["answer"]),
                }
            )


def _chosen(
    model: Med3DVLM, cases: Cases, numbers: Sequence[int], seen: torch.Tensor, out: Measured
) -> None:
    for row, index in enumerate(numbers):
        for question in cases.studies[index]["questions"] or ():
            if question["kind"] != "closed":
                continue
            choices = list(question["choices"])
            answer = model.ask(seen[row : row + 1], question["text"], choices)
            out.choices.append(
                {
                    "study": cases.ids[index],
                    "text": f"{question['text']} {answer}",
                    "shares": [share for _, share in answer.choices],
                    "right": ord(question["answer_choice"]) - ord("A"),
                }
            )


def same_answer(given: str, right: str) -> bool:
    """Whether two short answers are the same words, in a list in any order."""
    return _items(given) == _items(right)


def _items(text: str) -> set[str]:
    return {part.strip(" .").lower() for part in re.split(r",|\band\b", text)} - {""}


# --- how well it holds ------------------------------------------------------------------------


def confidences(
    calibration: Calibration, samples: Sequence[Sample], kind: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(before, after, right): probabilities without and with the calibration, and 0 or 1."""
    if kind == "choices":
        taken = [int(np.argmax(s["shares"])) for s in samples]
        before = [max(s["shares"]) for s in samples]
        after = [
            answer_confidence(
                calibration,
                Answer("", confidence=max(s["shares"]), choices=[("", p) for p in s["shares"]]),
            )
            for s in samples
        ]
        right = [k == s["right"] for k, s in zip(taken, samples, strict=True)]
    else:
        before, right = ([s[key] for s in samples] for key in ("confidence", "right"))
        features, coefficients = (
            ([s["features"] for s in samples], calibration.sentences)
            if kind == "sentences"
            else ([[log_odds(s["confidence"])] for s in samples], calibration.answers)
        )
        after = apply_logistic(features, coefficients) if samples else []
    return np.asarray(before, float), np.asarray(after, float), np.asarray(right, float)


def calibration_row(kind: str, before: np.ndarray, after: np.ndarray, right: np.ndarray) -> Row:
    """Columns: what, samples, right, the expected calibration error before and after with 95%
    intervals, Brier scores (and that of always saying how often it is right), AUROC."""
    row: Row = {"what": kind, "samples": len(right), "right": float(right.mean())}
    for name, given in (("before", before), ("after", after)):
        row[f"ECE {name}"] = calibration_error(given, right)
        low, high = interval_of(
            lambda some, given=given: calibration_error(given[some], right[some]),
            len(right),
            resamples=200,
        )
        row[f"ECE {name}, low"], row[f"ECE {name}, high"] = float(low), float(high)
    row["Brier before"] = float(np.mean((before - right) ** 2))
    row["Brier after"] = float(np.mean((after - right) ** 2))
    row["Brier of the mean"] = float(np.mean((right.mean() - right) ** 2))
    for name, given in (("before", before), ("after", after)):
        row[f"AUROC {name}"] = float(auroc(right[:, None], given[:, None])[0])
    return row


def threshold_rows(kind: str, confidence: np.ndarray, right: np.ndarray) -> list[Row]:
    """What is still said at each threshold, and how much of that is right."""
    rows: list[Row] = []
    for threshold in (0.0, *THRESHOLDS):
        kept = confidence >= threshold
        row: Row = {"what": kind, "threshold": threshold, "said": float(kept.mean())}
        if kept.any():
            low, high = interval(right[kept])
            row |= {"right of what is said": float(right[kept].mean()), "low": low, "high": high}
        if not kept.all():
            row["right of what is withheld"] = float(right[~kept].mean())
        rows.append(row)
    return rows


def reliability(before: np.ndarray, after: np.ndarray, right: np.ndarray) -> Figure:
    """How often samples of some confidence are right, in bins of equally many."""
    figure = Figure(figsize=(4.5, 4.5))
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color="#8b949e")
    for name, given, colour in (("before", before, "#d29922"), ("after", after, "#1f6feb")):
        bins = equal_bins(given, 10)
        axes.plot(
            [given[b].mean() for b in bins],
            [right[b].mean() for b in bins],
            "o-",
            color=colour,
            label=name,
        )
    axes.set_xlabel("confidence")
    axes.set_ylabel("right")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8)
    return figure
