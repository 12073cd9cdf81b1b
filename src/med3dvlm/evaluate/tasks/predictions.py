"""A file of texts with their references, whoever wrote them: wording, string rule, findings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from med3dvlm.data.assertions import Term
from med3dvlm.data.sources import SourceError, content_hash, read_table
from med3dvlm.evaluate.findings import asserted, extract_findings
from med3dvlm.evaluate.tasks.controls import mean_score
from med3dvlm.evaluate.tasks.report import F1_OF_A_REPORT, add_finding_tables, f1_of_a_report
from med3dvlm.evaluate.tasks.run import EXAMPLES, Example, Run, begin
from med3dvlm.evaluate.tasks.wording import (
    TextScorer,
    Wording,
    average_rows_by_type,
    places_by_type,
    usable_metrics,
)
from med3dvlm.evaluate.vqa import letter_in

COLUMNS = ("reference", "prediction")
STRING_RULE = "closed string rule"


@dataclass(frozen=True)
class Prediction:
    """A text and what it should have said.

    Attributes:
        study: whose it is; the row's number where the file does not tell.
        type: of the question: M3D's 1 to 5, or any name.
        choices: of a closed question, where the file has them.
        answer_choice: the letter that is right; None for what is no closed question.
    """

    study: str
    reference: str
    prediction: str
    type: int | str | None = None
    choices: Sequence[str] | None = None
    answer_choice: str | None = None


@dataclass(frozen=True)
class Predictions:
    """The rows of a file, which stands in the results where a model does."""

    path: Path
    rows: Sequence[Prediction]
    preparation: None = None  # of the volumes that were looked at: not known

    @property
    def label(self) -> str:
        return self.path.name

    def fingerprint(self) -> str:
        """SHA-256 of the file."""
        return content_hash(self.path)


def read_predictions(path: Path | str) -> Predictions:
    """The rows of a .jsonl or .csv file.

    Columns: `reference` and `prediction`, and where there are such `study`, `type` and, of closed
    questions, `answer_choice` (the letter that is right) and `choices` (a list; in a .csv as JSON).

    Raises:
        SourceError: for a file that cannot be read or is empty, a missing column, or a row that
            is faulty, with its number.
    """
    path = Path(path)
    rows = read_table(path)
    if not rows:
        raise SourceError(f"{path} has no row: give a reference and a prediction in each.")
    columns = [str(column) for column in dict.fromkeys(key for row in rows for key in row)]
    missing = [column for column in COLUMNS if column not in columns]
    if missing:
        raise SourceError(
            f"{path} has no column {' and no '.join(missing)}, only {', '.join(columns)}: name "
            f"its columns {' and '.join(COLUMNS)}."
        )
    return Predictions(
        path, [_prediction(row, n, f"{path}, row {n}") for n, row in enumerate(rows, start=1)]
    )


def _prediction(row: Mapping[Any, Any], number: int, where: str) -> Prediction:
    if None in row:  # what the reader of CSV has left over
        raise SourceError(f"{where}: it has more fields than the head; quote texts with commas.")
    for column in COLUMNS:
        if not isinstance(row.get(column), str):
            raise SourceError(f"{where}: it has no text as its {column}.")
    if not row["reference"].strip():
        raise SourceError(f"{where}: its reference is empty, so nothing can be compared with it.")
    choices, letter = _choices(row.get("choices"), where), row.get("answer_choice") or None
    if choices and letter is None:
        raise SourceError(f"{where}: it has choices, but no answer_choice that is right.")
    if letter is not None and not _is_letter(letter, choices):
        known = f"one of its {len(choices)} choices" if choices else "a choice, such as A"
        raise SourceError(f"{where}: answer_choice {letter!r} is not the letter of {known}.")
    study = row.get("study")
    return Prediction(
        study=f"row {number}" if study in (None, "") else str(study),
        reference=row["reference"],
        prediction=row["prediction"],
        type=_type(row.get("type")),
        choices=choices,
        answer_choice=letter,
    )


def _is_letter(letter: Any, choices: Sequence[str] | None) -> bool:
    if not isinstance(letter, str) or not re.fullmatch("[A-Z]", letter):
        return False
    return choices is None or ord(letter) - ord("A") < len(choices)


def _choices(given: Any, where: str) -> list[str] | None:
    if given in (None, ""):
        return None
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        found = None
    if not isinstance(found, list) or not found:
        raise SourceError(f"{where}: its choices are no list; give a JSON list of texts.")
    return [str(choice) for choice in found]


def _type(given: Any) -> int | str | None:
    if given in (None, ""):
        return None
    return int(given) if str(given).isdecimal() else str(given)


# --- scores -----------------------------------------------------------------------------------


def evaluate_predictions(
    predictions: Predictions,
    *,
    terms: Mapping[str, Term] | None = None,
    scorers: Mapping[str, TextScorer] | None = None,
) -> Run:
    """Wording of free texts, the published string rule of closed answers; findings if asked for.

    Args:
        terms: findings that are read out of references and predictions; see
            :func:`extract_findings`.
        scorers: metrics of wording beside the counted ones, by name.

    Raises:
        ValueError: where findings are asked for, and no row is a free text to read them in.
    """
    run = begin("predictions", predictions, {"predictions": len(predictions.rows)})
    run.samples = [_sample(row, number) for number, row in enumerate(predictions.rows, start=1)]
    closed = [sample for sample in run.samples if sample["answer_choice"]]
    free = [sample for sample in run.samples if not sample["answer_choice"]]
    if terms is not None and not free:
        raise ValueError(
            f"{predictions.path} holds closed questions only: there are no findings to read."
        )
    if free:
        _add_wording(run, free, scorers)
    if closed:
        _add_closed(run, closed)
    if terms is not None:
        _add_findings(run, free, terms)
    run.examples = [
        Example(sample["sample"], None, COLUMNS, [[sample[column] for column in COLUMNS]])
        for sample in run.samples[:EXAMPLES]
    ]
    return run


def _sample(row: Prediction, number: int) -> dict[str, Any]:
    return {"sample": f"{row.study}#{number}", **vars(row), "scores": {}}


def _add_wording(
    run: Run, free: Sequence[dict[str, Any]], scorers: Mapping[str, TextScorer] | None
) -> None:
    wording = Wording(usable_metrics(run.results), scorers)
    scores = wording(*([sample[column] for sample in free] for column in COLUMNS))
    for name, values in scores.items():
        for sample, value in zip(free, values, strict=True):
            sample["scores"][name] = value
    rows = average_rows_by_type(scores, [s["type"] for s in free], groups=_studies(free))
    run.results.add("Wording of predictions", rows)


def _add_closed(run: Run, closed: Sequence[dict[str, Any]]) -> None:
    for sample in closed:
        right = letter_in(sample["prediction"], sample["answer_choice"])
        sample["scores"][STRING_RULE] = float(right)
    rows = []
    for kind, places in places_by_type([sample["type"] for sample in closed]):
        chosen = [closed[place] for place in places]
        offered = [len(sample["choices"]) for sample in chosen if sample["choices"]]
        score = mean_score(
            STRING_RULE,
            [sample["scores"][STRING_RULE] for sample in chosen],
            float(np.mean([1 / n for n in offered])) if len(offered) == len(chosen) else None,
            groups=_studies(chosen),
        )
        rows.append({"type": kind, "questions": len(chosen), **score.row()})
    run.results.add("Closed questions, string rule", rows)


def _add_findings(run: Run, free: Sequence[dict[str, Any]], terms: Mapping[str, Term]) -> None:
    true, said = (
        np.array(
            [list(asserted(extract_findings(sample[column], terms)).values()) for sample in free]
        )
        for column in COLUMNS
    )
    for sample, there, found in zip(free, true, said, strict=True):
        sample["scores"][F1_OF_A_REPORT] = f1_of_a_report(there, found)
        sample |= {"true": there.tolist(), "said": found.tolist()}
    add_finding_tables(run, list(terms), true, {"prediction": said})
    run.results.notes.append(
        "What is there, and what is said to be, was read out of the texts by rules: no labels of "
        "the studies stand behind it."
    )


def _studies(samples: Sequence[dict[str, Any]]) -> list[str]:
    return [sample["study"] for sample in samples]
