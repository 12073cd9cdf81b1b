"""CT-RATE: names, tables, and which values are Hounsfield units."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from med3dvlm.data.ct_rate import LABELS, read_ct_rate, read_volume
from med3dvlm.data.phantoms import make_study
from med3dvlm.data.sources import SourceError
from med3dvlm.scan import ScanError

STUDY = make_study(0, split="test")
SPACING = STUDY.scan().spacing_mm


def write_table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_volume(path: Path, values: np.ndarray, spacing=SPACING) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values.transpose(2, 1, 0), np.diag([*spacing[::-1], 1.0]))
    nibabel.save(image, path)


@pytest.fixture
def archive(tmp_path) -> Path:
    """Two reconstructions of one scan, the second stored as HU already, and an empty report."""
    hu = STUDY.scan().array[:, ::-1, ::-1].astype(np.int16)  # NIfTI: to the right and front
    names = ["valid_1_a_1", "valid_1_a_2", "valid_2_a_1"]
    for name, values in zip(names, (hu + 1024, hu, hu), strict=True):
        write_volume(tmp_path / "dataset" / "valid" / f"{name}.nii.gz", values)
    reports = [
        {
            "VolumeName": f"{name}.nii.gz",
            "Findings_EN": "Not given." if name == "valid_2_a_1" else "Nodule,\n8 mm.",
            "Impressions_EN": "" if name == "valid_2_a_1" else "Lung nodule.",
        }
        for name in names
    ]
    write_table(tmp_path / "reports" / "validation_reports.csv", reports)
    metadata = [
        {
            "VolumeName": f"{name}.nii.gz",
            "RescaleSlope": 1,
            "RescaleIntercept": -1024,
            "XYSpacing": f"[{SPACING[2]}, {SPACING[1]}]",
            "ZSpacing": SPACING[0],
        }
        for name in names
    ]
    write_table(tmp_path / "metadata.csv", metadata)
    labels = [
        {"VolumeName": f"{n}.nii.gz", **{k: int(k == LABELS[9]) for k in LABELS}} for n in names
    ]
    write_table(tmp_path / "labels.csv", labels)
    return tmp_path


def test_values_are_hu_whether_the_release_is_rescaled_or_not(archive):
    first, second, empty = read_ct_rate(archive)
    assert first.report == second.report == "Findings: Nodule, 8 mm. Impression: Lung nodule."
    assert first.case == second.case == "valid_1" and first.splits == ("validation",)
    assert [LABELS[i] for i, there in enumerate(first.labels) if there] == ["Lung nodule"]
    for source in (first, second):
        scan = read_volume(source)
        assert scan.units == "HU" and scan.warnings == ()
        np.testing.assert_array_equal(scan.array, STUDY.scan().array)
    assert "report is empty" in empty.refusal


def test_the_spacing_of_the_metadata_is_believed(archive):
    path = archive / "dataset" / "valid" / "valid_1_a_2.nii.gz"
    write_volume(path, STUDY.scan().array.astype(np.int16), spacing=(1.0, 1.0, 1.0))
    scan = read_volume(read_ct_rate(archive)[1])
    np.testing.assert_allclose(scan.spacing_mm, SPACING, rtol=1e-5)
    lengths = np.linalg.norm(scan.affine[:3, :3], axis=0)
    np.testing.assert_allclose(lengths, SPACING[::-1], rtol=1e-5)
    assert any("metadata" in warning for warning in scan.warnings)


def test_values_that_are_hu_in_neither_way_are_refused(archive):
    path = archive / "dataset" / "valid" / "valid_1_a_1.nii.gz"
    write_volume(path, np.clip(STUDY.scan().array / 16, 0, 255).astype(np.uint8))
    with pytest.raises(ScanError, match="Hounsfield"):
        read_volume(read_ct_rate(archive)[0])


def test_volumes_and_tables_that_do_not_meet(archive):
    (archive / "dataset" / "valid" / "valid_2_a_1.nii.gz").unlink()
    write_volume(archive / "valid_9_a_1.nii.gz", STUDY.scan().array.astype(np.int16))
    by_id = {source.id: source.refusal for source in read_ct_rate(archive)}
    assert "missing" in by_id["valid_2_a_1"] and "does not name it" in by_id["valid_9_a_1"]
    assert not by_id["valid_1_a_1"]


def test_two_releases_of_a_volume_are_not_mixed(archive):
    first = archive / "dataset" / "valid" / "valid_1_a_1.nii.gz"
    second = archive / "dataset" / "valid_fixed" / first.name
    second.parent.mkdir()
    shutil.copy(first, second)
    by_id = {source.id: source.refusal for source in read_ct_rate(archive)}
    assert f"{first}: {second} has the same name; keep one of them." == by_id.pop("valid_1_a_1")
    assert not by_id["valid_1_a_2"]


def test_what_is_no_such_archive(tmp_path):
    with pytest.raises(SourceError, match="no volume like"):
        read_ct_rate(tmp_path)
    write_volume(tmp_path / "train_1_a_1.nii.gz", np.zeros((2, 3, 4), np.int16))
    with pytest.raises(SourceError, match="add the reports"):
        read_ct_rate(tmp_path)


@pytest.mark.parametrize("value", ["2", "0.5", "-1", "", "nan"])
def test_a_label_that_is_neither_0_nor_1_is_refused(archive, value):
    path = archive / "labels.csv"
    labels = [{"VolumeName": "valid_1_a_1.nii.gz", **dict.fromkeys(LABELS, "1.0")}]
    write_table(path, labels)
    assert read_ct_rate(archive)[0].labels == (1,) * len(LABELS)
    write_table(path, [{**labels[0], LABELS[3]: value}])
    assert "something but 0 and 1" in read_ct_rate(archive)[0].refusal
