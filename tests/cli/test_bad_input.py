"""Bad input: one clear sentence, exit status 1 or 2, quickly and in little memory."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from med3dvlm.data.phantoms import make_study
from med3dvlm.scan import save_dicom_series

SECONDS, MEGABYTES = 5, 1000


def nifti(path: Path, array: np.ndarray, affine=None) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def volume(shape=(16, 20, 24), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(-200, 400, shape).astype(np.int16)


def missing(folder: Path) -> Path:
    return folder / "missing.nii.gz"


def empty_folder(folder: Path) -> Path:
    return folder


def text_as_nifti(folder: Path) -> Path:
    path = folder / "text.nii.gz"
    path.write_text("this is no scan")
    return path


def truncated_nifti(folder: Path) -> Path:
    path = nifti(folder / "cut.nii", volume())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def truncated_dicom(folder: Path) -> Path:
    series = dicom(folder / "series")
    for path in series.iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return series


def dicom(folder: Path) -> Path:
    study = make_study(0, shape=(8, 16, 16))
    save_dicom_series(study.scan(), folder)
    return folder


def huge_header(folder: Path) -> Path:
    path = nifti(folder / "huge.nii", volume())
    data = bytearray(path.read_bytes())
    data[40:48] = np.array([3, 10000, 10000, 10000], "<i2").tobytes()
    path.write_bytes(data)
    return path


def gzip_bomb(folder: Path) -> Path:
    path = folder / "bomb.nii.gz"
    header = bytearray(nifti(folder / "a.nii", volume()).read_bytes()[:352])
    (folder / "a.nii").unlink()
    header[40:48] = np.array([3, 10000, 10000, 10000], "<i2").tobytes()
    with gzip.open(path, "wb", compresslevel=9) as file:
        file.write(header)
        for _ in range(64):
            file.write(bytes(2**20))
    return path


def flat_picture(folder: Path) -> Path:
    path = folder / "flat.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)
    return path


def flat_nifti(folder: Path) -> Path:
    return nifti(folder / "flat.nii.gz", volume((16, 20, 1)))


def four_dimensional(folder: Path) -> Path:
    return nifti(folder / "4d.nii.gz", volume((16, 20, 24, 3)))


def two_series(folder: Path) -> Path:
    dicom(folder / "a")
    dicom(folder / "b")
    for path in (folder / "b").iterdir():
        path.rename(folder / "a" / f"b-{path.name}")
    (folder / "b").rmdir()
    return folder / "a"


def zero_affine(folder: Path) -> Path:
    path = nifti(folder / "zero.nii", volume())
    image = nib.load(path)
    image.header.set_sform(np.zeros((4, 4)), code=1)
    data = bytearray(path.read_bytes())
    data[280:328] = np.zeros(12, "<f4").tobytes()  # srow_x, srow_y, srow_z
    path.write_bytes(data)
    return path


def constant(folder: Path) -> Path:
    return nifti(folder / "constant.nii.gz", np.full((16, 20, 24), 7, np.int16))


CASES = {
    missing: "missing.nii.gz",
    empty_folder: "",
    text_as_nifti: "text.nii.gz",
    truncated_nifti: "cut.nii",
    truncated_dicom: "series",
    huge_header: "huge.nii",
    gzip_bomb: "bomb.nii.gz",
    flat_picture: "flat.png",
    flat_nifti: "flat.nii.gz",
    four_dimensional: "frame",
    two_series: "series",
    zero_affine: "zero.nii",
}


# Runs a command and writes its peak memory, in kilobytes, into a file. The kernel counts what a
# process was before it became the command, too: a copy of its parent. So that must be a small one.
MEASURED = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
open(sys.argv[1], "w").write(str(usage.ru_maxrss))
sys.exit(process.returncode)
"""


def command(*arguments: object) -> tuple[subprocess.CompletedProcess[str], float, float]:
    """What came of it, seconds, and the process's own peak memory in megabytes."""
    start = time.monotonic()
    with tempfile.NamedTemporaryFile("r") as peak:
        done = subprocess.run(
            [
                *(sys.executable, "-S", "-c", MEASURED, peak.name),
                *(sys.executable, "-m", "med3dvlm.cli"),
                *map(str, arguments),
            ],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        return done, time.monotonic() - start, int(peak.read()) / 1024


def assert_one_sentence(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode in (1, 2), done
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("make", CASES, ids=lambda f: f.__name__)
def test_a_scan_that_is_none(make, tmp_path):
    done, seconds, peak = command("report", make(tmp_path))
    assert_one_sentence(done)
    assert CASES[make] in done.stderr
    assert seconds < SECONDS
    assert peak < MEGABYTES


def test_not_a_number_is_replaced_and_said(run, tmp_path):
    array = volume().astype(np.float32)
    array[2, 3, 4], array[5, 6, 7] = np.nan, np.inf
    result = run("report", nifti(tmp_path / "nan.nii.gz", array))
    assert result.code == 0
    assert "note:" in result.err


def test_a_constant_volume_is_refused_or_said_to_be_empty(run, tmp_path):
    result = run("report", constant(tmp_path))
    assert result.code == 1 or "constant" in result.err


@pytest.mark.parametrize("spacing", [0.0, -1.0])
def test_spacing_of_zero_or_less(run, tmp_path, spacing):
    path = nifti(tmp_path / "spacing.nii", volume())
    data = bytearray(path.read_bytes())
    data[80:92] = np.full(3, spacing, "<f4").tobytes()  # pixdim
    data[252:256] = np.array([0, 0], "<i2").tobytes()  # neither qform nor sform
    path.write_bytes(data)
    result = run("report", path)
    assert result.code == 1 or "note:" in result.err


@pytest.mark.parametrize("name", ["demoo", "owner/unknown-model"])
def test_an_unknown_model_without_network(name, real_ct):
    done, seconds, _ = command("report", real_ct, "--model", name)
    assert_one_sentence(done)
    assert name in done.stderr and seconds < SECONDS


@pytest.mark.parametrize(
    ("question", "words"), [("", "empty"), ("   ", "empty"), ("why " * 3000, "shorten")]
)
def test_questions_that_cannot_be_asked(run, real_ct, question, words):
    result = run("ask", real_ct, question)
    assert result.code in (1, 2) and words in result.err and result.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["report"],
        ["reprot", "x"],
        ["report", "x", "--modle", "demo"],
        ["search", "index"],
        ["search", "index", ""],
        ["search", "index", "text", "--top", "0"],
        ["phantoms", "-o", "x", "--layout", "bids"],
        ["phantoms", "-o", "x", "-n", "0"],
        ["ask", "x", "question", "-c", "only one"],
        ["model", "convert", "demo", "x", "--to", "onnx"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_2(run, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments).code == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search", "nowhere.index", "effusion"], "no index"),
        (["index", "build", "nowhere", "-o", "i"], "does not exist"),
        (["index", "info", "nowhere"], "no index"),
        (["train", "contrastive", "nowhere.yaml"], "is no file"),
        (["model", "info", "nowhere"], "neither a folder"),
        (["evaluate", "predictions", "nowhere.jsonl"], "cannot be read as a table"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_what_is_not_there_is_exit_1(run, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.code == 1 and words in result.err
    assert list(tmp_path.iterdir()) == []


LIST, BYTES, OTHER = "list.yaml", "bytes.txt", "other.db"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "contrastive", LIST], "must hold 'name: value' lines"),
        (["experiment", LIST, "-o", "e"], "must hold 'name: value' lines"),
        (["evaluate", "predictions", LIST], f"{LIST}, line 1: it is no JSON"),
        (["evaluate", "predictions", LIST, "--bert", "folder"], f"{LIST}, line 1: it is no JSON"),
        (
            ["pacs", "watch", LIST, "--service", "http://127.0.0.1:1", "--url", "http://x"],
            "must hold 'name: value' lines",
        ),
        (["train", "contrastive", "folder"], "is no file"),
        (["classify", "x", "-l", BYTES], f"{BYTES}: it is no text in UTF-8"),
        (["users", "list", "--database", f"sqlite:///{OTHER}"], f"{OTHER} is no SQLite database"),
        (["audit", "verify", "--database", "sqlite:///folder"], "folder is a folder"),
        (["serve", "--data", BYTES], f"{BYTES} is a file"),
        (["serve", "--tls-key", "nowhere.pem"], "no file nowhere.pem"),
        (["serve", "--tls-key", BYTES], "give 'tls_certificate', too"),
        (["service", "corrections", "out", "--data", "new"], "med3dvlm service migrate"),
        (["export", "report", "folder", "none.json", "--to", "text", "-o", "r"], "no report"),
        (["export", "report", "folder", BYTES, "--to", "text", "-o", "r"], "no text in UTF-8"),
        (["audit", "export", "-o", "folder", "--data", "new"], "folder: it is a folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value[:2]),
)
def test_a_file_of_another_kind_is_one_sentence(run, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / LIST).write_text("- a\n- b\n")
    (tmp_path / BYTES).write_bytes(b"\xff\xfe\x00")
    (tmp_path / OTHER).write_bytes(b"not a database" * 100)
    (tmp_path / "none.json").write_text("[1]")
    (tmp_path / "folder").mkdir()
    result = run(*arguments)
    assert result.code == 1 and words in result.err
    assert "Traceback" not in result.err
    assert not any((tmp_path / name).exists() for name in ("e", "r", "out"))


def test_a_full_disk_leaves_no_half_file(run, real_ct, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "report.txt")

    monkeypatch.setattr(os, "replace", full)
    result = run("report", real_ct, "-o", tmp_path / "report.txt")
    assert result.code == 1 and "No space left" in result.err
    assert list(tmp_path.iterdir()) == []
