"""M3D-Cap and M3D-VQA: 8-bit slices with a text, and tables of pairs and questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from med3dvlm.data.phantoms.anatomy import PLANES
from med3dvlm.data.phantoms.layouts.common import VQA_COLUMNS, question_rows, write_table
from med3dvlm.data.phantoms.study import PhantomStudy
from med3dvlm.files import atomic_folder, write_json

CASES = "ct_case"


def write_study(study: PhantomStudy, folder: Path) -> str:
    """8-bit slices stacked in the plane of acquisition, numbered from 1, and text.txt."""
    with atomic_folder(folder / "M3D_Cap" / CASES / study.study_id) as temporary:
        series = temporary / study.truth.plane
        series.mkdir()
        grey = np.clip((study.array + 160) * (255 / 400), 0, 255).astype(np.uint8)
        slices = np.moveaxis(grey, PLANES.index(study.truth.plane), 0)
        if study.truth.plane != "axial":
            slices = slices[:, ::-1]  # head up
        for number, pixels in enumerate(slices, start=1):
            Image.fromarray(np.ascontiguousarray(pixels)).save(series / f"{number}.png")
        (temporary / "text.txt").write_text(f"study_findings:{study.report}\n", "utf-8")
    return _image(study)


def write_tables(folder: Path, split: str, studies: Sequence[PhantomStudy]) -> None:
    """M3D_Cap.json, and the two tables of M3D-VQA: multiple choice, and yes or no."""
    pairs = [{"image": _image(s), "text": f"{CASES}/{s.study_id}/text.txt"} for s in studies]
    write_json(folder / "M3D_Cap" / "M3D_Cap.json", {split: pairs})
    for suffix, kind in (("", "closed"), ("_yn", "yes_no")):
        rows = [
            row
            for study in studies
            for row in question_rows(_image(study), (q for q in study.questions if q.kind == kind))
        ]
        write_table(folder / "M3D_VQA" / f"M3D_VQA{suffix}_{split}.csv", VQA_COLUMNS, rows)


def _image(study: PhantomStudy) -> str:
    return f"{CASES}/{study.study_id}/{study.truth.plane}"
