"""Evidence and thresholds on the command line, with a tiny model in a folder of its own."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from med3dvlm.evidence import Calibration
from med3dvlm.scan import read_scan, save_nifti
from tests.models import tiny

SIDE = ("Which side is the effusion on?", "-c", "left", "-c", "right")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a scan, a calibrated model, one without, and an index."""
    folder = tmp_path_factory.mktemp("evidence")
    save_nifti(replace(tiny.scan(1), source=""), folder / "scan.nii.gz")
    for name in ("plain", "calibrated"):
        model = tiny.vlm()
        model.save_pretrained(folder / name)
        model.processor.save_pretrained(folder / name)
        if name == "calibrated":
            Calibration(model.fingerprint(), "phantoms", 2.0, (1.0, 0.0), (1.0,) * 4).save(
                folder / name
            )
    dual = tiny.dual()
    dual.save_pretrained(folder / "search")
    dual.processor.save_pretrained(folder / "search")
    return folder


def test_a_report_has_a_map_for_each_sentence_on_the_scans_grid(run, files, tmp_path):
    maps, picture = tmp_path / "maps", tmp_path / "a.png"
    result = run(
        *("report", files / "scan.nii.gz", "-m", files / "plain", "--max-tokens", 12, "--json"),
        *("--evidence", maps, "--picture", picture),
    )
    assert result.code == 0, result.err
    listing = json.loads((maps / "evidence.json").read_text())
    assert listing["sentences"] and Image.open(picture).size[0] == 1600
    scan = read_scan(files / "scan.nii.gz")
    for entry in listing["sentences"]:
        found = read_scan(maps / entry["file"])
        assert found.array.shape == scan.array.shape
        assert found.affine == pytest.approx(scan.affine, abs=1e-4)
        assert found.array.min() >= 0 and found.array.max() == 100
        place = np.linalg.solve(scan.affine, [*entry["peak_lps_mm"], 1])[:3]
        assert found.array[tuple(np.rint(place[::-1]).astype(int))] == 100


def test_maps_do_not_replace_the_folder_of_the_scan(run, files, tmp_path):
    scan = tmp_path / "scan.nii.gz"
    scan.write_bytes((files / "scan.nii.gz").read_bytes())
    result = run(
        *("report", scan, "-m", files / "plain", "--max-tokens", 4, "--evidence", tmp_path)
    )
    assert result.code == 1 and "holds other things (scan.nii.gz)" in result.err
    assert scan.read_bytes() == (files / "scan.nii.gz").read_bytes()


def test_an_answer_has_one_map(run, files, tmp_path):
    path = tmp_path / "map.nii.gz"
    ask = ("ask", files / "scan.nii.gz", *SIDE, "-m", files / "plain")
    assert run(*ask, "--evidence", path).code == 0
    assert read_scan(path).array.max() == 100
    refused = run(*ask, "--evidence", tmp_path / "map")
    assert refused.code == 2 and ".nii" in refused.err
    unknown = run(*ask, "--evidence", path, "--evidence-method", "guess")
    assert unknown.code == 2 and "occlusion" in unknown.err


def test_hits_of_a_search_have_maps(run, files, tmp_path):
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "a.nii.gz").write_bytes((files / "scan.nii.gz").read_bytes())
    model = ("-m", files / "search")
    assert run("index", "build", scans, "-o", tmp_path / "i", *model).code == 0
    result = run("search", tmp_path / "i", "effusion", *model, "--evidence", tmp_path / "maps")
    assert result.code == 0, result.err
    assert read_scan(tmp_path / "maps" / "01.nii.gz").array.max() == 100


def test_below_the_threshold_the_answer_is_cannot_tell(run, files):
    ask = ("ask", files / "scan.nii.gz", *SIDE, "-m", files / "calibrated")
    plain = json.loads(run(*ask, "--json").out)
    assert plain["calibrated"] and "withheld" not in plain
    assert sum(c["confidence"] for c in plain["choices"]) == pytest.approx(1)
    sure = plain["confidence"]
    told = run(*ask, "--threshold", min(1, sure + 0.01))
    assert told.out.startswith("cannot tell") and plain["answer"] not in told.out
    withheld = json.loads(run(*ask, "--threshold", min(1, sure + 0.01), "--json").out)
    assert withheld["answer"] == "cannot tell" and withheld["withheld"] == plain["answer"]
    kept = json.loads(run(*ask, "--threshold", sure - 0.01, "--json").out)
    assert kept["answer"] == plain["answer"]


def test_a_report_withholds_what_is_not_sure(run, files):
    report = ("report", files / "scan.nii.gz", "--max-tokens", 12, "--json", "--threshold", 1)
    found = json.loads(run(*report, "-m", files / "calibrated").out)
    assert "[cannot tell]" in found["report"]
    assert all(s["withheld"] and s["text"] for s in found["sentences"])
    refused = run(*report, "-m", files / "plain")
    assert refused.code == 1 and "evaluate calibration" in refused.err
