"""Questions: accuracy by type with chance beside it, and answers by polarity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from med3dvlm.evaluate.statistics import interval

TYPES = {1: "plane", 2: "phase", 3: "organ", 4: "abnormality", 5: "location"}


@dataclass(frozen=True)
class Answered:
    """One closed question: its type, the letter that is right, the letter given, the choices."""

    type: int
    right: str
    given: str
    choices: int = 4


def letter_in(text: str, letter: str) -> bool:
    """The published rule: a closed answer is right if its letter and dot are in the text."""
    return f"{letter}." in text


def closed_table(answers: Sequence[Answered]) -> list[dict[str, float | int | str]]:
    """Accuracy per type and over all, with 95% intervals, chance, and always the same letter."""
    rows = []
    groups = {name: [a for a in answers if a.type == t] for t, name in TYPES.items()}
    for name, group in {**groups, "all": list(answers)}.items():
        if not group:
            continue
        right = np.array([a.given == a.right for a in group], dtype=float)
        low, high = interval(right)
        common = Counter(a.right for a in group).most_common(1)[0][1]
        rows.append(
            {
                "type": name,
                "questions": len(group),
                "accuracy": float(right.mean()),
                "low": low,
                "high": high,
                "chance": float(np.mean([1 / a.choices for a in group])),
                "commonest letter": common / len(group),
            }
        )
    return rows


def yes_no_table(
    right: Sequence[bool], given: Sequence[bool]
) -> list[dict[str, float | int | str]]:
    """Accuracy by polarity: a model that always says no is right on every "no" and no "yes"."""
    truth, said = np.array(right), np.array(given)
    rows = []
    for name, chosen in (("yes", truth), ("no", ~truth), ("all", np.ones(len(truth), bool))):
        if not chosen.any():
            continue
        correct = (truth == said)[chosen].astype(float)
        low, high = interval(correct)
        rows.append(
            {
                "right answer": name,
                "questions": int(chosen.sum()),
                "accuracy": float(correct.mean()),
                "low": low,
                "high": high,
                "says yes": float(said[chosen].mean()),
                "chance": 0.5,
            }
        )
    return rows
