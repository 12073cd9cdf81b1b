"""Questions: accuracy by type with chance beside it, and answers by polarity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from med3dvlm.evaluate.statistics import interval
from med3dvlm.evaluate.tables import Row

TYPES = {1: "plane", 2: "phase", 3: "organ", 4: "abnormality", 5: "location"}


@dataclass(frozen=True)
class Answered:
    """One closed question and what a model said.

    Attributes:
        type: 1 plane, 2 phase, 3 organ, 4 abnormality, 5 location.
        right: the letter that is right.
        given: the letter of the likeliest choice.
        choices: how many choices there were.
        text: what the model wrote, for the published rule; None if it was not asked to write.
        answer: the right answer in words, for the baseline of always giving the commonest.
    """

    type: int
    right: str
    given: str
    choices: int = 4
    text: str | None = None
    answer: str | None = None


def letter_in(text: str, letter: str) -> bool:
    """The published rule: a closed answer is right if its letter and dot are in the text.

    A text that lists all choices is therefore right about anything; likelihood cannot be
    cheated like that, so report it beside.
    """
    return f"{letter}." in text


def closed_table(answers: Sequence[Answered]) -> list[Row]:
    """Accuracy per type, over all questions and as the mean of the types.

    Columns: type, questions, accuracy (of the likeliest choice) with its 95% interval low to
    high, `string rule` (where every answer has a text), chance (1 / number of choices, averaged),
    `commonest letter` and, where every answer has its words, `commonest answer`: the accuracy of
    always giving the letter, or the answer, that is right most often for a type.
    """
    groups = {type: [a for a in answers if a.type == type] for type in {a.type for a in answers}}
    rows = [_closed_row(TYPES.get(t, f"type {t}"), groups[t]) for t in sorted(groups)]
    if not rows:
        return []
    whole = _closed_row("all", answers)
    for baseline in ("commonest letter", "commonest answer"):
        if baseline in whole:  # the commonest of each type, not one for all types
            shares = np.array([row[baseline] for row in rows], dtype=float)
            whole[baseline] = float(shares @ [row["questions"] for row in rows]) / len(answers)
    mean: Row = {"type": "mean of types", "questions": len(answers), "low": None, "high": None}
    means = {c: float(np.mean([row[c] for row in rows])) for c in whole if c not in mean}
    return [*rows, whole, {column: {**mean, **means}[column] for column in whole}]


def _closed_row(name: str, group: Sequence[Answered]) -> Row:
    right = np.array([a.given == a.right for a in group], dtype=float)
    low, high = interval(right)
    row: Row = {
        "type": name,
        "questions": len(group),
        "accuracy": float(right.mean()),
        "low": low,
        "high": high,
    }
    if all(a.text is not None for a in group):
        row["string rule"] = float(np.mean([letter_in(a.text or "", a.right) for a in group]))
    row["chance"] = float(np.mean([1 / a.choices for a in group]))
    row["commonest letter"] = _commonest([a.right for a in group])
    if all(a.answer is not None for a in group):
        row["commonest answer"] = _commonest([a.answer or "" for a in group])
    return row


def _commonest(answers: Sequence[str]) -> float:
    return Counter(answers).most_common(1)[0][1] / len(answers)


def yes_no_table(right: Sequence[bool], given: Sequence[bool]) -> list[Row]:
    """Accuracy by polarity: a model that always says no is right on every "no" and no "yes".

    Rows: yes, no, all, and balanced (the mean of yes and no, which no constant answer raises
    above one half). `always the commoner` is the accuracy of that constant answer.
    """
    truth, said = np.array(right, dtype=bool), np.array(given, dtype=bool)
    if truth.shape != said.shape:
        raise ValueError(f"{len(truth)} right answers with {len(said)} given: they must pair up.")
    if not len(truth):
        return []
    constant = truth.mean() >= 0.5
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
                "always the commoner": float((truth[chosen] == constant).mean()),
            }
        )
    if len(rows) == 3:
        both = {c: (rows[0][c] + rows[1][c]) / 2 for c in ("accuracy", "says yes", "chance")}
        balanced = {**dict.fromkeys(rows[0]), **both}
        balanced |= {"right answer": "balanced", "questions": len(truth)}
        rows.append({**balanced, "always the commoner": 0.5})
    return rows
