"""`pacs` and `export` as a user has them, with a real Orthanc and the bundled model."""

from __future__ import annotations

import json
from datetime import date

import pydicom
import pytest

from med3dvlm.scan import read_scan, save_nifti
from tests.cli.conftest import run  # noqa: F401
from tests.hospital.conftest import USER, write_series
from tests.hospital.validate import dicom_errors


@pytest.fixture
def pacs(pacs_address, monkeypatch):
    """The environment of a machine beside a PACS."""
    monkeypatch.setenv("MED3DVLM_PACS_URL", pacs_address.url)
    monkeypatch.setenv("MED3DVLM_PACS_USER", USER)
    monkeypatch.setenv("MED3DVLM_PACS_PASSWORD", pacs_address.password)
    monkeypatch.setenv("MED3DVLM_PACS_CA", str(pacs_address.ca))
    return pacs_address


def test_send_find_get(run, pacs, tmp_path):  # noqa: F811
    folder = write_series(tmp_path, 8)
    first = pydicom.dcmread(next(folder.iterdir()))
    sent = run("pacs", "send", folder, "--json")
    assert sent.code == 0 and json.loads(sent.out)["sent"] == 20
    found = run("pacs", "find", f"PatientID={first.PatientID}", "--series")
    assert first.StudyInstanceUID in found.out and first.SeriesInstanceUID in found.out
    (study,) = json.loads(run("pacs", "find", f"PatientID={first.PatientID}", "--json").out)
    assert study["PatientName"] == str(first.PatientName)
    got = run("pacs", "get", first.StudyInstanceUID, "-o", tmp_path / "got")
    assert got.code == 0 and "20 files" in got.out
    assert read_scan(tmp_path / "got").shape == read_scan(folder).shape


def test_watch_drafts_into_a_folder_once(run, pacs, tmp_path):  # noqa: F811
    folder = write_series(tmp_path / "images", 23)
    for file in sorted(folder.iterdir()):
        one = pydicom.dcmread(file)
        one.StudyDate, one.StationName = f"{date.today():%Y%m%d}", "COMMAND"
        one.save_as(file)
    assert run("pacs", "send", folder).code == 0
    rules = tmp_path / "rules.yaml"
    rules.write_text("stable_s: 0\nrules: [{name: ours, where: {StationName: COMMAND}}]\n")
    watch = ("pacs", "watch", rules, "-o", tmp_path / "out", "--state", tmp_path / "db", "--once")
    done = run(*watch, "--json")
    assert done.code == 0
    (entry,) = json.loads(done.out)
    assert entry["state"] == "drafted" and entry["rule"] == "ours"
    drafted = tmp_path / "out" / entry["study_uid"]
    report = json.loads((drafted / "report.json").read_text())
    assert report["model"]["name"] == "demo" and report["signature"] is None
    assert "phantoms" in report["notice"] and "Unsigned draft" in report["report"]
    assert json.loads(run(*watch, "--json").out) == []

    # the draft becomes a preliminary SR, which the PACS takes
    sr = tmp_path / "draft.dcm"
    made = run("export", "report", folder, drafted / "report.json", "-o", sr, "--json")
    assert made.code == 0 and json.loads(made.out)["verified"] is False
    assert dicom_errors(sr) == []
    assert pydicom.dcmread(sr).PreliminaryFlag == "PRELIMINARY"
    assert run("pacs", "send", sr).code == 0


@pytest.mark.parametrize("to", ["sr", "basic-text-sr", "encapsulated-pdf"])
def test_export_of_a_text_file(run, series, tmp_path, to):  # noqa: F811
    text, made = tmp_path / "report.txt", tmp_path / "made.dcm"
    text.write_text("Findings: No effusion. Impression: Normal.", "utf-8")
    done = run("export", "report", series, text, "--to", to, "-o", made, "--signed-by", "A. B.")
    assert done.code == 0, done.err
    assert dicom_errors(made) == []
    assert pydicom.dcmread(made).VerificationFlag == "UNVERIFIED"  # a typed name verifies nothing


def test_a_forged_signature_in_a_file_verifies_nothing(run, series, tmp_path):  # noqa: F811
    forged = tmp_path / "report.json"
    signature = {"name": "Dr. No", "signed": "2026-01-01T00:00:00+00:00", "authenticated": True}
    forged.write_text(json.dumps({"report": "Findings: x.", "signature": signature}))
    made = tmp_path / "made.dcm"
    assert run("export", "report", series, forged, "-o", made).code == 0
    read = pydicom.dcmread(made)
    assert read.VerificationFlag == "UNVERIFIED" and "Dr. No" not in str(read)


@pytest.mark.parametrize("to", ["seg", "parametric-map"])
def test_export_of_evidence(run, series, tmp_path, to):  # noqa: F811
    evidence, made = tmp_path / "map.nii.gz", tmp_path / "made.dcm"
    asked = run("ask", series, "Is there a pleural effusion?", "--evidence", evidence)
    assert asked.code == 0
    done = run("export", "evidence", series, evidence, "--to", to, "-o", made, "--about", "x")
    assert done.code == 0, done.err
    assert dicom_errors(made) == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["pacs", "find"], 2, "MED3DVLM_PACS_URL"),
        (["pacs", "find", "PatientID", "--url", "http://x"], 2, "KEYWORD=VALUE"),
        (["pacs", "find", "Colour=red", "--url", "http://localhost:1"], 1, "no DICOM keyword"),
        (["pacs", "find", "--url", "ftp://x"], 1, "no URL"),
        (["pacs", "send", "nothing.dcm", "--url", "http://localhost:1"], 1, "no DICOM file"),
        (["pacs", "watch", "rules.yaml", "--url", "http://x"], 2, "--output or --service"),
        (["export", "report", "nowhere", "none.txt", "-o", "x"], 1, "none.txt"),
        (["export", "report", "a", "b", "-o", "x", "--to", "docx"], 2, "basic-text-sr"),
        (["export", "evidence", "a", "b", "-o", "x", "--to", "docx"], 2, "parametric-map"),
    ],
)
def test_wrong_usage_is_one_sentence(run, monkeypatch, arguments, code, said):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "200")
    result = run(*arguments)
    assert result.code == code and said in result.err


def test_a_nifti_scan_has_no_images_to_refer_to(run, series, tmp_path):  # noqa: F811
    scan, text = tmp_path / "scan.nii.gz", tmp_path / "report.txt"
    save_nifti(read_scan(series), scan)
    text.write_text("Findings: No effusion.", "utf-8")
    refused = run("export", "report", scan, text, "-o", tmp_path / "made.dcm")
    assert refused.code == 1 and "basic-text-sr" in refused.err
    plain = run("export", "report", scan, text, "--to", "pdf", "-o", tmp_path / "made.pdf")
    assert plain.code == 0 and (tmp_path / "made.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    "command",
    [["pacs", c] for c in ("find", "get", "send", "watch")]
    + [["export", "report"], ["export", "evidence"]],
    ids=" ".join,
)
def test_help_has_an_example(run, command):  # noqa: F811
    result = run(*command, "--help")
    assert result.code == 0 and "Example:" in result.out and "--json" in result.out
