"""Questions: accuracy by type with chance beside it, and answers by polarity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from med3dvlm.evaluate.scores import Ratio
from med3dvlm.evaluate.statistics import interval, interval_of
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
        study: which study it is about; intervals are over studies. None: over questions.
    """

    type: int
    right: str
    given: str
    choices: int = 4
    text: str | None = None
    answer: str | None = None
    study: str | None = None


def letter_in(text: str, letter: str) -> bool:
    """The published rule: a closed answer is right if its letter and dot are in the text.

    A text that lists all choices is therefore right about anything; likelihood cannot be
    cheated like that, so report it beside.
    """
    return f"{letter}." in text


def closed_table(answers: Sequence[Answered]) -> list[Row]:
    """Accuracy per type, over all questions and as the mean of the types.

    Columns: type, questions, accuracy (of the likeliest choice) with its 95% interval low to
    high, over studies where they are known; `string rule` with its interval (where every answer
    has a text), chance (1 / number of choices, averaged),
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
    low, high = _interval_of_means(
        [a.given == a.right for a in answers], [a.type for a in answers], _studies(answers)
    )
    mean: Row = {"type": "mean of types", "questions": len(answers), "low": low, "high": high}
    mean |= {column: None for column in ("string rule low", "string rule high") if column in whole}
    means = {c: float(np.mean([row[c] for row in rows])) for c in whole if c not in mean}
    return [*rows, whole, {column: {**mean, **means}[column] for column in whole}]


def _closed_row(name: str, group: Sequence[Answered]) -> Row:
    right = np.array([a.given == a.right for a in group], dtype=float)
    studies = _studies(group)
    low, high = interval(right, groups=studies)
    row: Row = {
        "type": name,
        "questions": len(group),
        "accuracy": float(right.mean()),
        "low": low,
        "high": high,
    }
    if all(a.text is not None for a in group):
        letters = [letter_in(a.text or "", a.right) for a in group]
        row["string rule"] = float(np.mean(letters))
        row["string rule low"], row["string rule high"] = interval(letters, groups=studies)
    row["chance"] = float(np.mean([1 / a.choices for a in group]))
    row["commonest letter"] = _commonest([a.right for a in group])
    if all(a.answer is not None for a in group):
        row["commonest answer"] = _commonest([a.answer or "" for a in group])
    return row


def _studies(group: Sequence[Answered]) -> list[str] | None:
    """The study of each question; None where one is not known."""
    known = [a.study for a in group if a.study is not None]
    return known if len(known) == len(group) else None


def _interval_of_means(
    correct: Sequence[bool], kinds: Sequence[object], studies: Sequence[str] | None
) -> tuple[float, float]:
    """95% bootstrap interval of the mean of the accuracies of the kinds, over studies."""
    right = np.asarray(correct, dtype=float)
    names, codes = np.unique([str(kind) for kind in kinds], return_inverse=True)
    _, places = np.unique(range(len(right)) if studies is None else studies, return_inverse=True)
    counts, hits = (
        np.array([np.bincount(places, w * (codes == k)) for k in range(len(names))])
        for w in (np.ones(len(right)), right)
    )
    ratio = Ratio(hits, counts)
    low, high = interval_of(ratio.value, ratio.studies)
    return float(low), float(high)


def _commonest(answers: Sequence[str]) -> float:
    return Counter(answers).most_common(1)[0][1] / len(answers)


def yes_no_table(
    right: Sequence[bool], given: Sequence[bool], studies: Sequence[str] | None = None
) -> list[Row]:
    """Accuracy by polarity: a model that always says no is right on every "no" and no "yes".

    Rows: yes, no, all, and balanced (the mean of yes and no, which no constant answer raises
    above one half). `always the commoner` is the accuracy of that constant answer. Intervals are
    over studies, where it is given which study each question is about.
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
        about = None if studies is None else np.asarray(studies)[chosen].tolist()
        low, high = interval(correct, groups=about)
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
        ends = _interval_of_means((truth == said).tolist(), truth.tolist(), studies)
        balanced["low"], balanced["high"] = ends
        rows.append({**balanced, "always the commoner": 0.5})
    return rows
