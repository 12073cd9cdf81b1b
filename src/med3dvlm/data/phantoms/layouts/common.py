"""What several layouts write: tables, the columns of M3D-VQA, and the texts beside a scan."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from med3dvlm.data.phantoms.language import Question
from med3dvlm.data.phantoms.study import PhantomStudy
from med3dvlm.files import atomic_file, write_json

VQA_COLUMNS = (
    "Image Path",
    "Question",
    "Choice A",
    "Choice B",
    "Choice C",
    "Choice D",
    "Answer",
    "Answer Choice",
    "Question Type",
)


def truth_of(study: PhantomStudy) -> dict[str, Any]:
    """What is known of a study, as JSON has it."""
    findings = [
        {"name": p.name, **p.attributes, "centre_mm": [round(mm, 1) for mm in p.centre_mm]}
        for p in study.truth.findings
    ]
    return {"plane": study.truth.plane, "phase": study.truth.phase, "findings": findings}


def write_texts(study: PhantomStudy, folder: Path, image: str) -> None:
    """report.txt, truth.json and questions.csv of one study; `image` is named in the questions."""
    with atomic_file(folder / "report.txt") as temporary:
        temporary.write_text(study.report + "\n", "utf-8")
    write_json(folder / "truth.json", truth_of(study))
    write_table(folder / "questions.csv", VQA_COLUMNS, question_rows(image, study.questions))


def question_rows(image: str, questions: Iterable[Question]) -> list[dict[str, Any]]:
    """Questions in the columns of M3D-VQA; open ones have no choices."""
    rows = []
    for question in questions:
        choices = question.choices or ("", "", "", "")
        letter = question.answer_choice or ""
        if question.kind == "yes_no":
            choices, letter = ("Yes", "No", "", ""), {"yes": "A", "no": "B"}[question.answer]
        values = (image, question.text, *choices, question.answer, letter, question.type)
        rows.append(dict(zip(VQA_COLUMNS, values, strict=True)))
    return rows


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file atomically."""
    with atomic_file(path) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
