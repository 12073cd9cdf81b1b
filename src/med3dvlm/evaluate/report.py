"""Drafted reports by the findings that they assert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from med3dvlm.evaluate.statistics import interval_of
from med3dvlm.evaluate.tables import Row

Findings = Mapping[str, bool]


def finding_table(truth: Sequence[Findings], predicted: Sequence[Findings]) -> list[Row]:
    """Precision, recall and F1 per finding, their macro mean, and micro over all.

    Beside each F1 stand the F1 of three who have not looked: one asserts each finding in as many
    studies as have it, chosen at random (`by chance`, its exact expectation), one always asserts
    it, one never does (0). The macro mean is over the findings that occur; a finding that does
    not occur has no recall, and what is wrongly said of it counts in the micro row.

    Args:
        truth: per study, every finding and whether it is there; all with the same names.
        predicted: per study what a report asserts; a finding that is not named is not asserted.

    Raises:
        ValueError: for lists of different lengths, or findings that the truth does not know.
    """
    true, said, names = _arrays(truth, predicted)
    rows = [_row(name, true[:, [i]], said[:, [i]]) for i, name in enumerate(names)]
    occurring = [row for row in rows if row["positives"]]
    macro: Row = {"finding": "macro mean", "positives": int(true.sum())}
    for key in [key for key in rows[0] if key not in macro]:
        macro[key] = float(np.mean([row[key] for row in occurring])) if occurring else None
    return [*rows, macro, _row("micro, all", true, said)]


def micro_f1(true: np.ndarray, said: np.ndarray) -> tuple[float, float | None, float | None, float]:
    """Micro F1 of (studies, findings) bool, its 95% interval over studies, and F1 by chance.

    NaN where no study has a finding; such resamples do not count.
    """

    def f1(chosen: np.ndarray | slice) -> float:
        value = _row("", true[chosen], said[chosen])["F1"]
        return float("nan") if value is None else float(value)

    low, high = interval_of(f1, len(true))
    return f1(slice(None)), float(low), float(high), _chance_f1(true)


def baseline_table(truth: Sequence[Findings]) -> list[Row]:
    """What three who have not looked would score, micro over all findings.

    Accuracy is here to show why it is no measure: findings are rare, so never asserting one is
    right most of the time.
    """
    true, _, _ = _arrays(truth, truth)
    prevalence = true.mean(axis=0)
    share, chance = float(true.mean()), _chance_f1(true)
    at_random = float(np.mean(prevalence**2 + (1 - prevalence) ** 2))
    return [
        _baseline("never asserts", 0.0, 0.0, 0.0, 1 - share),
        _baseline("at random, as often as it occurs", chance, chance, chance, at_random),
        _baseline("always asserts", share, float(true.any()), _always_f1(true), share),
    ]


def crg_table(truth: Sequence[Findings], predicted: Sequence[Findings]) -> list[Row]:
    """CRG of drafted reports with its 95% interval, beside those who have not looked.

    CRG (Hamamci et al., MIDL 2025, arXiv 2505.17167) weighs hits and misses of the A positives
    among all X labels, studies × findings, so that rare findings count:
    r = (X − A) / 2A, U = (X − A) / 2, s = r·TP − r·FN − FP, CRG = U / (2U − s). A perfect draft
    has 1; never asserting anything and always asserting everything both have 1/3.

    Raises:
        ValueError: as `finding_table`, and where no label is positive, or every one is.
    """
    true, said, _ = _arrays(truth, predicted)
    if true.all() or not true.any():
        raise ValueError("CRG is not defined where no finding is there, or every one is.")
    low, high = interval_of(lambda chosen: crg(true[chosen], said[chosen]), len(true))
    rows: list[Row] = [
        {"who": "drafted reports", "CRG": crg(true, said), "low": float(low), "high": float(high)}
    ]
    for who, constant in (("never asserts", False), ("always asserts", True)):
        rows.append({"who": who, "CRG": crg(true, np.full_like(true, constant))})
    return rows


def crg(true: np.ndarray, said: np.ndarray) -> float:
    """CRG of (studies, findings) bool; NaN where no finding is there, or every one."""
    positives = int(true.sum())
    largest = (true.size - positives) / 2
    if not positives or not largest:
        return float("nan")
    weight = largest / positives
    hits, false = int((true & said).sum()), int((~true & said).sum())
    score = weight * hits - weight * (positives - hits) - false
    return largest / (2 * largest - score)


def _baseline(name: str, precision: float, recall: float, f1: float, accuracy: float) -> Row:
    return {"who": name, "precision": precision, "recall": recall, "F1": f1, "accuracy": accuracy}


def _arrays(
    truth: Sequence[Findings], predicted: Sequence[Findings]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(studies, findings) bool of what is there and what is said, and the findings' names."""
    if len(truth) != len(predicted) or not truth:
        raise ValueError(f"{len(truth)} studies with {len(predicted)} reports: give as many.")
    names = list(truth[0])
    unknown = sorted({name for study in [*truth, *predicted] for name in study} - set(names))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not among the findings of the first study.")
    true = np.array([[bool(study[name]) for name in names] for study in truth])
    said = np.array([[bool(study.get(name, False)) for name in names] for study in predicted])
    return true, said, names


def _row(name: str, true: np.ndarray, said: np.ndarray) -> Row:
    """Scores of (studies, findings) pooled; without positives no precision, recall or F1."""
    hits, there, asserted = int((true & said).sum()), int(true.sum()), int(said.sum())
    return {
        "finding": name,
        "positives": there,
        "precision": (hits / asserted if asserted else 0.0) if there else None,
        "recall": hits / there if there else None,
        "F1": 2 * hits / (there + asserted) if there else None,
        "F1 by chance": _chance_f1(true),
        "F1 always asserted": _always_f1(true),
        "F1 never asserted": 0.0,
    }


def _chance_f1(true: np.ndarray) -> float:
    """Expected F1 when each finding is asserted in as many studies, n_f, as have it, at random.

    F1 is then 2·hits / (2·Σ n_f), and of the n_f asserted a share n_f / studies is right.
    """
    positives = true.sum(axis=0)
    return float((positives**2).sum() / len(true) / positives.sum()) if true.any() else 0.0


def _always_f1(true: np.ndarray) -> float:
    return 2 * float(true.mean()) / (1 + float(true.mean()))
