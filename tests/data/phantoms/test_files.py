"""Studies on disk: what is read back is what was made."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from med3dvlm.data.phantoms import PhantomError, make_study, write_studies
from med3dvlm.scan import read_scan


def test_nifti_reads_back_the_same(tmp_path):
    seen = []
    combinations = write_studies(3, tmp_path, progress=lambda done, total: seen.append(done))
    assert 1 <= combinations <= 3
    assert seen == [1, 2, 3]
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        study = make_study(index, split="test")
        scan = read_scan(tmp_path / row["image"])
        assert np.array_equal(scan.array, study.array)
        assert np.allclose(scan.affine, study.affine, atol=1e-3)
        assert np.allclose(scan.spacing_mm, study.spacing_mm, rtol=1e-5)
        folder = tmp_path / study.study_id
        assert (folder / "report.txt").read_text().strip() == study.report == row["report"]
        truth = json.loads((folder / "truth.json").read_text())
        assert truth["plane"] == study.truth.plane
        assert [f["name"] for f in truth["findings"]] == [p.name for p in study.truth.findings]
        with (folder / "questions.csv").open(encoding="utf-8") as file:
            assert len(list(csv.DictReader(file))) == len(study.questions)


def test_m3d_layout_stacks_slices_in_the_plane_of_acquisition(tmp_path):
    write_studies(3, tmp_path, layout="m3d", split="validation")
    root = tmp_path / "M3D_Cap"
    pairs = json.loads((root / "M3D_Cap.json").read_text())["validation"]
    assert len(pairs) == 3
    for index, pair in enumerate(pairs):
        study = make_study(index, split="validation")
        slices = sorted((root / pair["image"]).glob("*.png"), key=lambda p: int(p.stem))
        count = {"axial": 64, "coronal": 128, "sagittal": 128}[study.truth.plane]
        assert [int(p.stem) for p in slices] == list(range(1, count + 1))
        pixels = np.asarray(Image.open(slices[0]))
        assert pixels.dtype == np.uint8
        assert (root / pair["text"]).read_text() == f"study_findings:{study.report}\n"


def test_m3d_tables_have_the_published_columns(tmp_path):
    write_studies(2, tmp_path, layout="m3d")
    for name in ("M3D_VQA_test.csv", "M3D_VQA_yn_test.csv"):
        with (tmp_path / "M3D_VQA" / name).open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert ",".join(rows[0]) == (
            "Image Path,Question,Choice A,Choice B,Choice C,Choice D,Answer,Answer Choice,"
            "Question Type"
        )
        for row in rows:
            choice = row[f"Choice {row['Answer Choice']}"]
            assert choice.lower() == row["Answer"].lower()


def test_unknown_layout_says_which_there_are(tmp_path):
    with pytest.raises(PhantomError, match="nifti, dicom, m3d, ct-rate"):
        write_studies(1, tmp_path, layout="bids")


@pytest.mark.skipif(
    shutil.which("dciodvfy") is None and "CI" not in os.environ,  # .ci/run installs it
    reason="an outside validator, dciodvfy, is not here; in CI its absence fails: apt-get install dicom3tools",
)
def test_dicom_headers_keep_to_the_standard(tmp_path):
    """dciodvfy checks every attribute of the CT Image object; it may warn, but find no error."""
    write_studies(4, tmp_path, layout="dicom")
    for series in sorted(tmp_path.glob("*/ct")):
        first = min(series.iterdir())
        found = subprocess.run(["dciodvfy", str(first)], capture_output=True, text=True).stderr
        assert "CTImage" in found
        assert "Error" not in found, found
