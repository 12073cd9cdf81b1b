"""The commands with the bundled model, on real input, end to end."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from med3dvlm.data.phantoms import make_study, write_studies
from med3dvlm.scan import read_scan, save_dicom_series, save_nifti, save_nrrd
from tests.models.published_folders import clip_folder, vlm_folder


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_studies(6, folder, split="test")
    return folder


def test_report_streams_the_text_and_says_what_it_is(run, real_ct):
    result = run("report", real_ct)
    assert result.code == 0
    assert "Findings:" in result.out and "Impression:" in result.out
    assert "Not a medical device" in result.err and "phantoms" in result.err


def test_report_as_json_with_picture_and_text_file(run, real_ct, tmp_path):
    picture, text = tmp_path / "a.png", tmp_path / "a.txt"
    result = run("report", real_ct, "--json", "--picture", picture, "-o", text)
    assert result.code == 0
    found = json.loads(result.out)
    assert found["model"] == "demo" and len(found["weights"]) == 16
    assert found["report"] == text.read_text().strip()
    assert 0 < found["confidence"] <= 1
    assert Image.open(picture).size == (1600, 900)
    assert json.loads(run("report", real_ct, "--json").out)["report"] == found["report"]


def test_sampling_follows_the_seed(run, phantoms):
    scan = phantoms / "test-000001" / "ct.nii.gz"
    options = ("--json", "--sample", "--temperature", "1.5", "--max-tokens", "40")

    def draw(seed):
        return json.loads(run("report", scan, *options, "--seed", seed).out)["report"]

    assert draw(3) == draw(3)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_ask_open_and_with_choices(run, phantoms):
    scan = phantoms / "test-000000" / "ct.nii.gz"
    answer = run("ask", scan, "Is there a pleural effusion?")
    assert answer.code == 0 and answer.out.strip()
    question = "In which plane was this scan acquired?"
    choices = ["axial", "coronal", "sagittal", "oblique"]
    options = [part for choice in choices for part in ("--choices", choice)]
    found = json.loads(run("ask", scan, question, *options, "--json").out)
    assert [c["choice"] for c in found["choices"]] == choices
    assert sum(c["confidence"] for c in found["choices"]) == pytest.approx(1)
    shown = run("ask", scan, question, *options).out
    assert shown.count("%") == 4 and shown.count("→") == 1
    both = ["Is there a pleural effusion?", question]
    several = json.loads(run("ask", scan, *both, *options, "--json").out)
    assert [a["question"] for a in several["answers"]] == both
    shares = [[c["confidence"] for c in a["choices"]] for a in (several["answers"][1], found)]
    assert shares[0] == pytest.approx(shares[1], rel=1e-3)
    shown = run("ask", scan, *both).out
    assert [shown.count(text) for text in both] == [1, 1] and answer.out.strip() in shown
    assert run("ask", scan, both[0], " ").code == 2


def test_index_and_search_by_text_and_by_scan(run, phantoms, tmp_path):
    index = tmp_path / "i"
    built = json.loads(run("index", "build", phantoms, "-o", index, "--json").out)
    assert (built["studies"], built["added"], built["refused"]) == (6, 6, [])
    again = json.loads(run("index", "build", phantoms, "-o", index, "--json").out)
    assert (again["added"], again["unchanged"]) == (0, 6)
    scan = phantoms / "test-000004" / "ct.nii.gz"
    hits = json.loads(run("search", index, "--scan", scan, "--json").out)["hits"]
    assert hits[0]["id"] == "test-000004" and hits[0]["score"] == pytest.approx(1, abs=1e-4)
    shown = run("search", index, make_study(2, split="test").report, "--top", 3)
    assert shown.code == 0 and shown.out.count("Technique") == 3
    info = json.loads(run("index", "info", index, "--json").out)
    assert info["studies"] == 6 and info["model"] == "demo" and "phase" in info["columns"]
    phase = make_study(0, split="test").truth.phase
    found = run("search", index, "effusion", "--where", f"phase={phase}", "--json")
    expected = sum(make_study(i, split="test").truth.phase == phase for i in range(6))
    assert len(json.loads(found.out)["hits"]) == expected


def test_one_unreadable_scan_does_not_stop_the_others(run, phantoms, tmp_path):
    folder = tmp_path / "scans"
    shutil.copytree(phantoms / "test-000000", folder / "a")
    (folder / "broken.nii.gz").write_bytes(b"not a scan")
    result = run("index", "build", folder, "-o", tmp_path / "i")
    assert result.code == 1
    said = result.err.replace("\n", "")  # lines are cut at the width of the terminal
    assert "1 added" in result.out and "refused" in said and "broken" in said
    assert run("index", "build", folder, "-o", tmp_path / "i", "--allow-unreadable").code == 0


def test_the_same_scan_in_other_files_gives_the_same_answer(run, phantoms, tmp_path):
    scan = read_scan(phantoms / "test-000003" / "ct.nii.gz")
    save_nifti(scan, tmp_path / "a.nii.gz")
    save_nrrd(scan, tmp_path / "a.nrrd")
    save_dicom_series(scan, tmp_path / "series")
    paths = [tmp_path / "a.nii.gz", tmp_path / "a.nrrd", tmp_path / "series"]
    reports = [json.loads(run("report", p, "--json").out) for p in paths]
    assert len({r["report"] for r in reports}) == 1
    answers = [run("ask", p, "What abnormalities are present?").out for p in paths]
    assert len(set(answers)) == 1


def test_phantoms_are_written_in_both_layouts(run, tmp_path):
    for layout in ("nifti", "m3d"):
        result = run("phantoms", "-n", 2, "-o", tmp_path / layout, "--layout", layout)
        assert result.code == 0 and "2 studies" in result.out
    assert (tmp_path / "nifti" / "test-000001" / "report.txt").is_file()
    assert (tmp_path / "m3d" / "M3D_Cap" / "M3D_Cap.json").is_file()


def test_model_info(run):
    result = run("model", "info", "demo")
    assert result.code == 0
    assert "DCFormer" in result.out and "model card" in result.out
    found = json.loads(run("model", "info", "demo", "--json").out)
    assert found["language"]["preparation"] == found["search"]["preparation"]
    assert found["language"]["prompt_layout"] == "placeholder"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [clip_folder, vlm_folder])
def test_model_convert_there_and_back(run, tmp_path, make):
    folder, _ = make(tmp_path / "published")
    assert run("model", "convert", folder, tmp_path / "own").code == 0
    result = run("model", "convert", tmp_path / "own", tmp_path / "back", "--to", "published")
    assert result.code == 0
    one, two = ((tmp_path / n / "model.safetensors") for n in ("published", "back"))
    from safetensors.numpy import load_file

    a, b = load_file(one), load_file(two)
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
    refused = run("model", "convert", folder, tmp_path / "own")
    assert refused.code == 2 and "--force" in refused.err
    back = run("model", "convert", "demo", tmp_path / "x", "--to", "published")
    assert back.code == 1 and "published layout" in back.err


def test_evaluate_prints_tables_with_chance(run, tmp_path):
    few = ("--controls", 3, "--twins", 2)
    result = run("evaluate", "phantoms", "-n", 12, *few, "-o", tmp_path / "out")
    assert result.code == 0
    for part in ("Retrieval", "chance", "location", "F1", "no patients", "verdict", "Twins"):
        assert part in result.out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["studies"] == 12


def test_demo_is_the_whole_tour(run, tmp_path):
    result = run("demo", "-o", tmp_path / "demo")
    assert result.code == 0
    assert "about a real patient" in " ".join(result.out.split()).lower()
    assert (tmp_path / "demo" / "real-ct.png").is_file()
    assert "test-0000" in result.out


def test_every_command_has_help_with_an_example(run):
    commands = [
        ["report"],
        ["ask"],
        ["search"],
        ["phantoms"],
        ["demo"],
        ["index", "build"],
        ["index", "info"],
        ["model", "info"],
        ["model", "convert"],
        ["model", "quantize"],
        ["model", "export"],
        ["benchmark", "generate"],
        ["train", "contrastive"],
        ["train", "alignment"],
        ["train", "instruction"],
        ["evaluate", "phantoms"],
        ["evaluate", "predictions"],
    ]
    for command in commands:
        result = run(*command, "--help")
        assert result.code == 0 and "Example" in result.out, command
    assert run("--version").out.startswith("med3dvlm ")
