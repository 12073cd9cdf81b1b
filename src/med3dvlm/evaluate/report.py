"""Drafted reports by the findings that they assert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

Findings = Mapping[str, bool]


def finding_table(
    truth: Sequence[Findings], predicted: Sequence[Findings]
) -> list[dict[str, float | int | str]]:
    """Precision, recall and F1 per finding, their macro mean, and micro over all.

    Beside each stands the F1 that is expected of someone who asserts a finding at random as often
    as it occurs (its prevalence), and of someone who always asserts it.
    """
    names = list(truth[0])
    true = np.array([[bool(t[n]) for n in names] for t in truth])
    said = np.array([[bool(p.get(n, False)) for n in names] for p in predicted])
    rows = [_row(name, true[:, i], said[:, i]) for i, name in enumerate(names)]
    keys = ("precision", "recall", "F1", "F1 by chance", "F1 always asserted")
    macro: dict[str, float | int | str] = {
        "finding": "macro mean",
        "positives": int(true.sum()),
        **{key: float(np.mean([float(row[key]) for row in rows])) for key in keys},
    }
    return [*rows, macro, _row("micro, all", true.ravel(), said.ravel())]


def _row(name: str, true: np.ndarray, said: np.ndarray) -> dict[str, float | int | str]:
    hits = int((true & said).sum())
    prevalence = float(true.mean())
    precision = hits / int(said.sum()) if said.any() else 0.0
    recall = hits / int(true.sum()) if true.any() else 0.0
    both = precision + recall
    return {
        "finding": name,
        "positives": int(true.sum()),
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / both if both else 0.0,
        # asserting at random with rate p has precision and recall p
        "F1 by chance": prevalence,
        "F1 always asserted": 2 * prevalence / (1 + prevalence),
    }
