"""Questions: closed by likelihood and by the published string rule, yes or no, open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from med3dvlm.data.sources import Progress
from med3dvlm.evaluate.tables import Row
from med3dvlm.evaluate.tasks.answerers import Answerer
from med3dvlm.evaluate.tasks.cases import Cases
from med3dvlm.evaluate.tasks.controls import (
    BLANK,
    SCAN,
    Score,
    Scorer,
    Seen,
    look,
    look_blindly,
    mean_score,
)
from med3dvlm.evaluate.tasks.plots import bars, confusion
from med3dvlm.evaluate.tasks.run import EXAMPLES, Example, Run, add_evidence, begin
from med3dvlm.evaluate.tasks.wording import (
    TextScorer,
    Wording,
    average_rows_by_type,
    usable_metrics,
)
from med3dvlm.evaluate.vqa import Answered, closed_table, letter_in, yes_no_table

Sample = dict[str, Any]
KINDS = ("closed", "yes_no", "open")
STUDIES_AT_ONCE = 16  # whose questions are decided together


def evaluate_vqa(
    answerer: Answerer,
    cases: Cases,
    *,
    scorers: Mapping[str, TextScorer] | None = None,
    controls: int = 200,
    by: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Run:
    """All questions of some studies, with evidence controls on the first `controls` studies.

    Args:
        scorers: metrics of open answers beside the counted ones, by name; each pair of a right
            answer and a given one is scored once.

    Raises:
        ValueError: if no study has a question.
    """
    if not any(study["questions"] for study in cases.studies):
        raise ValueError("no study has a question: prepare the store from a layout that has some.")
    if answerer.preparation is None:
        seen = look_blindly(cases, controls)
    else:
        seen = look(
            {"language": answerer.see},
            cases,
            controls=controls,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )["language"]
    run = begin("vqa", answerer, cases.facts, controls=controls, seed=seed)
    answered = answer_conditions(answerer, cases, seen, batch_size=batch_size, progress=progress)
    run.samples = answered[SCAN]
    wording = score_open(answered, run, scorers)
    _add_tables(run, answered[SCAN], wording)
    scorer = vqa_scorer(answered, wording)
    add_evidence(run, scorer, cases, controls=controls, by=by)
    _add_plots(run)
    run.examples = _examples(cases, answered[SCAN])
    return run


def answer_conditions(
    answerer: Answerer,
    cases: Cases,
    seen: Seen,
    *,
    written: bool = True,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> dict[str, list[Sample]]:
    """Every question with every volume that was seen, in the order of studies and questions.

    Args:
        written: ask for answers in words, too: open questions, and the string rule of closed
            ones.
    """
    samples = {
        condition: [s for i in range(len(rows)) for s in _questions(cases, i, written)]
        for condition, rows in seen.items()
    }
    total, done = sum(len(of) for of in samples.values()), 0
    for condition, rows in seen.items():
        memory: dict[Any, str] = {}  # with a blank, the same words have the same answer
        for first in range(0, len(rows), STUDIES_AT_ONCE):
            asked = range(first, first + STUDIES_AT_ONCE)
            part = [s for s in samples[condition] if s["index"] in asked]
            if condition == BLANK:
                decided = [s for s in part if s["kind"] != "open"]
                new = {_words_asked(s): s for s in decided if _words_asked(s) not in memory}
                decide(answerer, rows, list(new.values()))
                memory |= {words: sample["given"] for words, sample in new.items()}
                for sample in decided:
                    sample["given"] = memory[_words_asked(sample)]
            else:
                decide(answerer, rows, part)
            done += len(part)
            if progress:
                progress(done, total)
        if written:
            for kind in ("closed", "open"):
                of_kind = [sample for sample in samples[condition] if sample["kind"] == kind]
                _write(answerer, rows, of_kind, batch_size)
    return {condition: [_scored(sample) for sample in of] for condition, of in samples.items()}


def _questions(cases: Cases, index: int, written: bool) -> list[Sample]:
    study = cases.studies[index]
    return [
        {
            "study": study["id"],
            "sample": f"{study['id']}#{number}",
            "index": index,
            "kind": question["kind"],
            "type": question["type"],
            "question": question["text"],
            "choices": list(question["choices"] or ()) or None,
            "right": question["answer_choice"] or question["answer"],
            "answer": question["answer"],
            "given": None,
            "text": None,
        }
        for number, question in enumerate(study["questions"] or ())
        if question["kind"] in (KINDS if written else KINDS[:2])
    ]


def _words_asked(sample: Sample) -> tuple[str, ...]:
    return (sample["kind"], sample["question"], *(sample["choices"] or ()))


def decide(answerer: Answerer, rows: Tensor, samples: Sequence[Sample]) -> None:
    """Fill in what is `given` to closed and yes/no questions, those of a kind together.

    `index` of a sample is its row among `rows`.
    """
    for kind in ("closed", "yes_no"):
        of_kind = [sample for sample in samples if sample["kind"] == kind]
        if not of_kind:
            continue
        seen = rows[torch.tensor([sample["index"] for sample in of_kind])]
        questions = [sample["question"] for sample in of_kind]
        if kind == "yes_no":
            given = ["yes" if yes else "no" for yes in answerer.says_yes(seen, questions)]
        else:
            chosen = answerer.choose(seen, questions, [sample["choices"] for sample in of_kind])
            given = [chr(ord("A") + number) for number in chosen]
        for sample, answer in zip(of_kind, given, strict=True):
            sample["given"] = answer


def _write(answerer: Answerer, rows: Tensor, samples: Sequence[Sample], batch_size: int) -> None:
    for first in range(0, len(samples), batch_size):
        part = samples[first : first + batch_size]
        seen = rows[torch.tensor([sample["index"] for sample in part])]
        choices = [s["choices"] for s in part] if part[0]["kind"] == "closed" else None
        texts = answerer.write(seen, [sample["question"] for sample in part], choices)
        for sample, text in zip(part, texts, strict=True):
            sample["text"] = text


def _scored(sample: Sample) -> Sample:
    scores: dict[str, float] = {}
    if sample["kind"] != "open":
        scores[f"{sample['kind']} accuracy"] = float(sample["given"] == sample["right"])
    if sample["kind"] == "closed" and sample["text"] is not None:
        scores["closed string rule"] = float(letter_in(sample["text"], sample["right"]))
    return {**sample, "scores": scores}


def score_open(
    answered: dict[str, list[Sample]], run: Run, scorers: Mapping[str, TextScorer] | None = None
) -> Wording | None:
    """Give every open answer its wording scores; what scored them, None where there is none."""
    opened = [s for samples in answered.values() for s in samples if s["kind"] == "open"]
    if not opened:
        return None
    wording = Wording(usable_metrics(run.results), scorers)
    scores = wording([s["answer"] for s in opened], [s["text"] for s in opened])
    for name, values in scores.items():
        for sample, value in zip(opened, values, strict=True):
            sample["scores"][f"open {name}"] = value
    return wording


# --- tables and scores ------------------------------------------------------------------------


def closed_of(samples: Sequence[Sample]) -> list[Answered]:
    return [
        Answered(
            type=s["type"],
            right=s["right"],
            given=s["given"],
            choices=len(s["choices"]),
            text=s["text"],
            answer=s["answer"],
            study=s["study"],
        )
        for s in samples
        if s["kind"] == "closed"
    ]


def yes_no_of(samples: Sequence[Sample]) -> tuple[list[bool], list[bool], list[str]]:
    """(right, given, studies): whether each is yes, and which study it is about."""
    asked = [s for s in samples if s["kind"] == "yes_no"]
    right, given = ([s[key] == "yes" for s in asked] for key in ("right", "given"))
    return right, given, [s["study"] for s in asked]


def _add_tables(run: Run, samples: Sequence[Sample], wording: Wording | None) -> None:
    closed, yes_no = closed_of(samples), yes_no_table(*yes_no_of(samples))
    opened = [sample for sample in samples if sample["kind"] == "open"]
    if closed:
        run.results.add("Closed questions", closed_table(closed))
    if yes_no:
        run.results.add("Yes or no", yes_no)
    if wording is not None:
        rows = average_rows_by_type(
            _open_scores(opened, wording.names),
            [sample["type"] for sample in opened],
            groups=[sample["study"] for sample in opened],
        )
        run.results.add("Open questions", rows)


def _open_scores(samples: Sequence[Sample], metrics: Sequence[str]) -> dict[str, list[float]]:
    return {name: [s["scores"][f"open {name}"] for s in samples] for name in metrics}


def vqa_scorer(answered: dict[str, list[Sample]], wording: Wording | None = None) -> Scorer:
    """The scores of some studies' questions, with one kind of volume.

    Args:
        wording: what scored the open answers; they are left out without.
    """

    def scores(condition: str, chosen: Sequence[int]) -> list[Score]:
        wanted = set(chosen)
        samples = [s for s in answered[condition] if s["index"] in wanted]
        closed = [s for s in samples if s["kind"] == "closed"]
        found = _from_table("closed", closed_table(closed_of(samples)))
        written = [s for s in closed if "closed string rule" in s["scores"]]
        if written:
            chance = float(np.mean([1 / len(s["choices"]) for s in written]))
            values = [s["scores"]["closed string rule"] for s in written]
            about = [s["study"] for s in written]
            found.append(mean_score("closed, string rule", values, chance, groups=about))
        found += _from_table("yes or no", yes_no_table(*yes_no_of(samples)))
        opened = [s for s in samples if s["kind"] == "open"]
        if opened and wording is not None:
            chance = wording_by_chance(opened, wording)
            for name, values in _open_scores(opened, wording.names).items():
                about = [s["study"] for s in opened]
                found.append(mean_score(f"open, {name}", values, chance.get(name), groups=about))
        return found

    return scores


def _from_table(kind: str, rows: Sequence[Row]) -> list[Score]:
    return [
        Score(
            f"{kind}, {next(iter(row.values()))}",
            *(row[c] for c in ("accuracy", "low", "high", "chance")),
        )
        for row in rows
    ]


def wording_by_chance(samples: Sequence[Sample], wording: Wording) -> dict[str, float]:
    """What the right answer to a question of the same type about another study would score.

    Nothing where no two studies have a question of one type.
    """
    references, others = [], []
    for kind in sorted({sample["type"] for sample in samples}):
        alike = [sample for sample in samples if sample["type"] == kind]
        for first, sample in enumerate(alike):
            turned = (alike[(first + k) % len(alike)] for k in range(1, len(alike)))
            other = next((s for s in turned if s["study"] != sample["study"]), None)
            if other is not None:
                references.append(sample["answer"])
                others.append(other["answer"])
    if not references:
        return {}
    scores = wording(references, others)
    return {name: float(np.mean(values)) for name, values in scores.items()}


# --- plots and examples -----------------------------------------------------------------------


def _add_plots(run: Run) -> None:
    closed = closed_of(run.samples)
    if closed:
        rows = closed_table(closed)
        run.plots.append(("Closed questions by type", bars(rows, "type", "accuracy", "chance")))
        letters = sorted({letter for a in closed for letter in (a.right, a.given)})
        pairs = [(a.right, a.given) for a in closed]
        run.plots.append(("Closed questions: right and given letter", confusion(pairs, letters)))
    right, given, _ = yes_no_of(run.samples)
    if right:
        words = {True: "yes", False: "no"}
        pairs = [(words[r], words[g]) for r, g in zip(right, given, strict=True)]
        run.plots.append(("Yes or no: right and given answer", confusion(pairs, ["yes", "no"])))


def _examples(cases: Cases, samples: Sequence[Sample]) -> list[Example]:
    columns = ("question", "right", "given", "written")
    examples = []
    for index in range(min(EXAMPLES, len(cases))):
        rows = [
            [
                s["question"] + (f" ({', '.join(s['choices'])})" if s["choices"] else ""),
                s["answer"],
                _words(s),
                s["text"] or "",
            ]
            for s in samples
            if s["index"] == index
        ]
        examples.append(Example(cases.ids[index], cases.volume(index), columns, rows))
    return examples


def _words(sample: Sample) -> str:
    if sample["kind"] == "closed":
        return sample["choices"][ord(sample["given"]) - ord("A")]
    return sample["given"] or ""
