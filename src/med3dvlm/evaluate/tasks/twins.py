"""Twins: phantoms that are the same voxel for voxel but for one finding, asked the same question.

Who does not look gives both the same answer, and so is right about at most one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from med3dvlm.data.phantoms import (
    FINDINGS,
    PHANTOM_VERSION,
    PhantomError,
    PhantomStudy,
    Question,
    ask_where,
    ask_whether,
    make_study,
    twin,
)
from med3dvlm.data.sources import Progress
from med3dvlm.evaluate.statistics import interval
from med3dvlm.evaluate.tables import Row
from med3dvlm.evaluate.tasks.answerers import Answerer
from med3dvlm.evaluate.tasks.cases import CAVEAT
from med3dvlm.evaluate.tasks.plots import bars
from med3dvlm.evaluate.tasks.run import EXAMPLES, Example, Run, begin
from med3dvlm.evaluate.tasks.vqa import decide
from med3dvlm.scan import prepare

TRIES = 20  # studies, to find one that has a place for a finding
KINDS = {"removed": "Twins with the finding removed", "moved": "Twins with the finding moved"}


@dataclass(frozen=True)
class Pair:
    """Two studies and the question that has another right answer in each.

    Attributes:
        kind: "removed": the finding is in the first only; "moved": it is elsewhere in the second.
    """

    kind: str
    finding: str
    studies: tuple[PhantomStudy, PhantomStudy]
    questions: tuple[Question, Question]

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.studies[0].study_id} | {self.studies[1].study_id}"


def make_pairs(count: int, *, seed: int = 0, split: str = "test") -> list[Pair]:
    """`count` pairs of either kind, each finding as often as the others, as far as they divide."""
    movable = [name for name, finding in FINDINGS.items() if finding.location is not None]
    removed = _pairs(count, list(FINDINGS), _removed, seed, split)
    return [*removed, *_pairs(count, movable, _moved, seed, split)]


def _pairs(count: int, names: list[str], make: Any, seed: int, split: str) -> Iterator[Pair]:
    index = 0
    for number in range(count):
        name = names[number % len(names)]
        for _ in range(TRIES):
            study, index = make_study(index, seed=seed, split=split), index + 1
            pair = make(study, name)
            if pair is not None:
                yield pair
                break


def _removed(study: PhantomStudy, name: str) -> Pair | None:
    try:
        has = study.truth.has(name)
        pair = (study, twin(study, "remove", name)) if has else (twin(study, "add", name), study)
    except PhantomError:
        return None
    yes, no = (ask_whether(study.stream("twins"), name, answer) for answer in ("yes", "no"))
    return Pair("removed", name, pair, (yes, no))


def _moved(study: PhantomStudy, name: str) -> Pair | None:
    """From one side to the other; a finding on both sides has no other side."""
    try:
        first = study if study.truth.has(name) else twin(study, "add", name)
        second = twin(first, "move", name)
    except PhantomError:
        return None
    here, there = (next(p for p in s.truth.findings if p.name == name) for s in (first, second))
    sides = {str(p.attributes[FINDINGS[name].location]).split()[0] for p in (here, there)}
    if sides != {"left", "right"}:
        return None
    return Pair("moved", name, (first, second), ask_where(study.stream("twins"), here, there))


def evaluate_twins(
    answerer: Answerer,
    *,
    count: int = 72,
    seed: int = 0,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Run:
    """The share of pairs answered rightly on both sides, by finding, and of answers that changed.

    Args:
        count: pairs of either kind: removed (yes or no?), and moved to the other side (where?).
    """
    pairs = make_pairs(count, seed=seed)
    facts = {"phantom version": PHANTOM_VERSION, "data": CAVEAT, "pairs": len(pairs)}
    run = begin("twins", answerer, facts, seed=seed)
    for first in range(0, len(pairs), batch_size):
        part = pairs[first : first + batch_size]
        studies = [study for pair in part for study in pair.studies]
        given = _answers(answerer, part, _see(answerer, studies))
        run.samples += [_sample(pair, of) for pair, of in zip(part, given, strict=True)]
        for study in studies:
            study.__dict__.pop("array", None)  # 4 MB each, not needed again
        if progress:
            progress(first + len(part), len(pairs))
    for kind, title in KINDS.items():
        rows = twin_table([s for s in run.samples if s["kind"] == kind])
        if rows:
            run.results.add(title, rows)
            run.plots.append((title, bars(rows, "finding", "right on both", "guessing")))
    run.examples = _examples(answerer, pairs, run.samples)
    return run


def _see(answerer: Answerer, studies: Sequence[PhantomStudy]) -> Tensor:
    preparation = answerer.preparation
    if preparation is None:
        return torch.zeros(len(studies), 1)
    return answerer.see(
        torch.from_numpy(np.stack([prepare(study.scan(), preparation) for study in studies]))
    )


def _answers(answerer: Answerer, pairs: Sequence[Pair], seen: Tensor) -> list[list[str]]:
    """What is answered about both studies of each pair, of which `seen` has two rows each."""
    asked = [
        {
            "index": 2 * place + side,
            "kind": "closed" if question.choices else "yes_no",
            "question": question.text,
            "choices": question.choices,
        }
        for place, pair in enumerate(pairs)
        for side, question in enumerate(pair.questions)
    ]
    decide(answerer, seen, asked)
    given = [
        s["choices"][ord(s["given"]) - ord("A")] if s["choices"] else s["given"] for s in asked
    ]
    return [given[i : i + 2] for i in range(0, len(given), 2)]


def _sample(pair: Pair, given: list[str]) -> dict[str, Any]:
    right = [question.answer for question in pair.questions]
    correct = [g == r for g, r in zip(given, right, strict=True)]
    return {
        "study": pair.name,
        "sample": pair.name,
        "kind": pair.kind,
        "finding": pair.finding,
        "question": pair.questions[0].text,
        "choices": pair.questions[0].choices,
        "right": right,
        "given": given,
        "scores": {
            f"{pair.kind}: right on both": float(all(correct)),
            f"{pair.kind}: answer changed": float(given[0] != given[1]),
        },
    }


def twin_table(samples: Sequence[dict[str, Any]]) -> list[Row]:
    """By finding and over all: right on both sides, on each, and how often the answer changed.

    Columns: finding, pairs, `right on both` with its interval, `right on first` (the finding is
    there, or where it was) and `right on second` (its twin), `answer changed`, and what drawing
    each answer at random (`guessing`) and not looking would have right on both.
    """
    names = [name for name in FINDINGS if any(s["finding"] == name for s in samples)]
    groups = [(name, [s for s in samples if s["finding"] == name]) for name in names]
    return [_twin_row(name, group) for name, group in [*groups, ("all", samples)] if group]


def _twin_row(name: str, group: Sequence[dict[str, Any]]) -> Row:
    hits = np.array(
        [[g == r for g, r in zip(s["given"], s["right"], strict=True)] for s in group], dtype=float
    )
    both = hits.all(axis=1).astype(float)
    low, high = interval(both)
    return {
        "finding": name,
        "pairs": len(group),
        "right on both": float(both.mean()),
        "low": low,
        "high": high,
        "right on first": float(hits[:, 0].mean()),
        "right on second": float(hits[:, 1].mean()),
        "answer changed": float(np.mean([s["given"][0] != s["given"][1] for s in group])),
        "guessing": float(np.mean([1 / len(s["choices"] or "yn") ** 2 for s in group])),
        "not looking": 0.0,
    }


def _examples(
    answerer: Answerer, pairs: Sequence[Pair], samples: Sequence[dict[str, Any]]
) -> list[Example]:
    if answerer.preparation is None:
        return []
    columns = ("question", "right", "given")
    examples = []
    for pair, sample in list(zip(pairs, samples, strict=True))[: EXAMPLES // 2]:
        for side, study in enumerate(pair.studies):
            volume = prepare(study.scan(), answerer.preparation)[0]
            row = [sample["question"], sample["right"][side], sample["given"][side]]
            examples.append(Example(study.study_id, volume, columns, [row]))
    return examples
