"""Phantom studies as files: NIfTI folders, or the layout of M3D-Cap and M3D-VQA."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from med3dvlm.data.phantoms.anatomy import PLANES
from med3dvlm.data.phantoms.study import PhantomError, PhantomStudy, make_study
from med3dvlm.files import atomic_file, atomic_folder, write_json
from med3dvlm.scan import save_nifti

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
    """Write the first `count` studies of a split; those already there are kept.

    Returns:
        The number of distinct combinations of findings among them.

    Raises:
        PhantomError: for an unknown layout or split.
    """
    if layout not in LAYOUTS:
        raise PhantomError(f"layout {layout!r} is unknown: use {' or '.join(LAYOUTS)}.")
    folder = Path(folder)
    combinations, rows = set(), []
    for index in range(count):
        study = make_study(index, seed=seed, split=split)
        combinations.add(tuple(p.name for p in study.truth.findings))
        rows.append(_write_nifti(study, folder) if layout == "nifti" else _write_m3d(study, folder))
        if progress:
            progress(index + 1, count)
    if layout == "nifti":
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        with atomic_file(folder / "manifest.jsonl") as temporary:
            temporary.write_text(lines, "utf-8")
    else:
        write_json(folder / "M3D_Cap" / "M3D_Cap.json", {split: rows})
        _write_vqa(folder, [make_study(i, seed=seed, split=split) for i in range(count)], split)
    return len(combinations)


def _truth(study: PhantomStudy) -> dict:
    findings = [
        {"name": p.name, **{k: v for k, v in p.attributes.items() if k != "u"}}
        for p in study.truth.findings
    ]
    return {"plane": study.truth.plane, "phase": study.truth.phase, "findings": findings}


def _write_nifti(study: PhantomStudy, folder: Path) -> dict:
    target = folder / study.study_id
    if not target.is_dir():
        with atomic_folder(target) as temporary:
            whole = replace(study.scan(), array=np.round(study.array))
            save_nifti(whole, temporary / "ct.nii.gz")
            (temporary / "report.txt").write_text(study.report + "\n", "utf-8")
            write_json(temporary / "truth.json", _truth(study))
            _write_rows(temporary / "questions.csv", _question_rows(study, "ct.nii.gz"))
    path = f"{study.study_id}/ct.nii.gz"
    return {"id": study.study_id, "path": path, "report": study.report, **_truth(study)}


def _write_m3d(study: PhantomStudy, folder: Path) -> dict:
    """8-bit slices stacked in the plane of acquisition, numbered from 1, and text.txt."""
    image = f"ct_case/{study.study_id}/{study.truth.plane}"
    case = folder / "M3D_Cap" / "ct_case" / study.study_id
    if not case.is_dir():
        with atomic_folder(case) as temporary:
            series = temporary / study.truth.plane
            series.mkdir()
            grey = np.clip((study.array + 160) / 400 * 255, 0, 255).astype(np.uint8)
            slices = np.moveaxis(grey, PLANES.index(study.truth.plane), 0)
            if study.truth.plane != "axial":
                slices = slices[:, ::-1]  # head up
            for number, pixels in enumerate(slices, start=1):
                Image.fromarray(np.ascontiguousarray(pixels)).save(series / f"{number}.png")
            text = f"study_findings:{study.report}\n"
            (temporary / "text.txt").write_text(text, "utf-8")
    return {"image": image, "text": f"ct_case/{study.study_id}/text.txt"}


def _write_vqa(folder: Path, studies: list[PhantomStudy], split: str) -> None:
    """The two tables of M3D-VQA: multiple choice (open answers in `Answer`), and yes/no."""
    rows: dict[str, list[dict]] = {"": [], "_yn": []}
    for study in studies:
        image = f"ct_case/{study.study_id}/{study.truth.plane}"
        for row, question in zip(_question_rows(study, image), study.questions, strict=True):
            if question.kind == "yes_no":
                rows["_yn"].append(row)
            elif question.kind == "closed":
                rows[""].append(row)
    target = folder / "M3D_VQA"
    target.mkdir(parents=True, exist_ok=True)
    for suffix, part in rows.items():
        with atomic_file(target / f"M3D_VQA{suffix}_{split}.csv") as temporary:
            _write_rows(temporary, part)


def _question_rows(study: PhantomStudy, image: str) -> list[dict]:
    rows = []
    for question in study.questions:
        choices = question.choices or ("", "", "", "")
        if question.kind == "yes_no":
            choices = ("Yes", "No", "", "")
        letter = question.answer_choice or {"yes": "A", "no": "B"}.get(question.answer, "")
        values = (image, question.text, *choices, question.answer, letter, question.type)
        rows.append(dict(zip(VQA_COLUMNS, values, strict=True)))
    return rows


def _write_rows(path: Path, rows: list[dict]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, VQA_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
