"""Phantom studies as files: NIfTI folders, or the layout of M3D-Cap and M3D-VQA."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from med3dvlm.data.phantoms.anatomy import PLANES
from med3dvlm.data.phantoms.study import PhantomError, PhantomStudy, make_study
from med3dvlm.files import atomic_file, atomic_folder, write_json
from med3dvlm.scan.write import save_nifti

LAYOUTS = ("nifti", "m3d")
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


def write_studies(
    count: int,
    folder: Path | str,
    *,
    layout: str = "nifti",
    seed: int = 0,
    split: str = "test",
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the first `count` studies of a split with tables of all of them.

    Returns:
        The number of distinct combinations of findings among them.

    Raises:
        PhantomError: for an unknown layout or split.
    """
    folder = Path(folder)
    combinations, rows, questions = set(), [], []
    for index in range(count):
        study = make_study(index, seed=seed, split=split)
        rows.append(write_study(study, folder, layout=layout))
        combinations.add(tuple(p.name for p in study.truth.findings))
        questions.append((rows[-1]["image"], study.questions))
        if progress:
            progress(index + 1, count)
    if layout == "m3d":
        _write_m3d_tables(folder, rows, questions, split)
    with atomic_file(folder / "manifest.jsonl") as temporary:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text("".join(lines), "utf-8")
    return len(combinations)


def write_study(study: PhantomStudy, folder: Path | str, *, layout: str = "nifti") -> dict:
    """Write one study under a folder, replacing it where it is there.

    Returns:
        Its row of the manifest: id, image (path in the folder), report and truth.

    Raises:
        PhantomError: for an unknown layout.
    """
    if layout not in LAYOUTS:
        raise PhantomError(f"layout {layout!r} is unknown: use {' or '.join(LAYOUTS)}.")
    folder = Path(folder)
    image = _write_nifti(study, folder) if layout == "nifti" else _write_m3d(study, folder)
    return {"id": study.study_id, "image": image, "report": study.report, **truth_of(study)}


def truth_of(study: PhantomStudy) -> dict[str, Any]:
    """What is known of a study, as JSON has it."""
    findings = [
        {"name": p.name, **p.attributes, "centre_mm": [round(mm, 1) for mm in p.centre_mm]}
        for p in study.truth.findings
    ]
    return {"plane": study.truth.plane, "phase": study.truth.phase, "findings": findings}


def _write_nifti(study: PhantomStudy, folder: Path) -> str:
    """ct.nii.gz (int16 HU, axes to the left, back and head), report, truth and questions."""
    with atomic_folder(folder / study.study_id) as temporary:
        save_nifti(study.scan(), temporary / "ct.nii.gz")
        (temporary / "report.txt").write_text(study.report + "\n", "utf-8")
        write_json(temporary / "truth.json", truth_of(study))
        _write_rows(temporary / "questions.csv", _rows("ct.nii.gz", study.questions))
    return f"{study.study_id}/ct.nii.gz"


def _write_m3d(study: PhantomStudy, folder: Path) -> str:
    """8-bit slices stacked in the plane of acquisition, numbered from 1, and text.txt."""
    case = folder / "M3D_Cap" / "ct_case" / study.study_id
    with atomic_folder(case) as temporary:
        series = temporary / study.truth.plane
        series.mkdir()
        grey = np.clip((study.array + 160) * (255 / 400), 0, 255).astype(np.uint8)
        slices = np.moveaxis(grey, PLANES.index(study.truth.plane), 0)
        if study.truth.plane != "axial":
            slices = slices[:, ::-1]  # head up
        for number, pixels in enumerate(slices, start=1):
            Image.fromarray(np.ascontiguousarray(pixels)).save(series / f"{number}.png")
        (temporary / "text.txt").write_text(f"study_findings:{study.report}\n", "utf-8")
    return f"ct_case/{study.study_id}/{study.truth.plane}"


Asked = Sequence[tuple[str, Sequence]]


def _write_m3d_tables(folder: Path, rows: Sequence[dict], asked: Asked, split: str) -> None:
    """M3D_Cap.json, and the two tables of M3D-VQA: multiple choice, and yes or no."""
    pairs = [{"image": r["image"], "text": f"ct_case/{r['id']}/text.txt"} for r in rows]
    write_json(folder / "M3D_Cap" / "M3D_Cap.json", {split: pairs})
    for suffix, kind in (("", "closed"), ("_yn", "yes_no")):
        table = [
            row
            for image, questions in asked
            for row in _rows(image, [q for q in questions if q.kind == kind])
        ]
        with atomic_file(folder / "M3D_VQA" / f"M3D_VQA{suffix}_{split}.csv") as temporary:
            _write_rows(temporary, table)


def _rows(image: str, questions: Sequence) -> list[dict[str, Any]]:
    rows = []
    for question in questions:
        choices = question.choices or ("", "", "", "")
        letter = question.answer_choice or ""
        if question.kind == "yes_no":
            choices, letter = ("Yes", "No", "", ""), {"yes": "A", "no": "B"}[question.answer]
        values = (image, question.text, *choices, question.answer, letter, question.type)
        rows.append(dict(zip(VQA_COLUMNS, values, strict=True)))
    return rows


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, VQA_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
