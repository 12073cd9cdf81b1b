"""DICOM series and CT-RATE: headers, tables, and the voxels read back from both."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.uid import UID

from med3dvlm.data.phantoms import (
    FINDINGS,
    LAYOUTS,
    PLANES,
    SPLITS,
    PhantomError,
    find_findings,
    make_study,
    twin,
    write_studies,
    write_study,
)
from med3dvlm.data.phantoms.identity import make_identity
from med3dvlm.data.phantoms.layouts.ct_rate import LABELS
from med3dvlm.scan import read_scan

SMALL = (16, 32, 24)
ORIENTATIONS = {
    "axial": r"1\0\0\0\1\0",
    "coronal": r"1\0\0\0\0\-1",
    "sagittal": r"0\1\0\0\0\-1",
}


def in_plane(plane: str, index: int = 0):
    study = make_study(index, split="test", shape=SMALL)
    return replace(study, truth=replace(study.truth, plane=plane))


def headers(folder: Path) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_twice_every_byte_is_the_same(layout, tmp_path):
    for name in ("a", "b"):
        write_studies(2, tmp_path / name, layout=layout)
    # again over what is there
    write_studies(2, tmp_path / "b", layout=layout)
    first = digests(tmp_path / "a")
    assert len(first) > 2
    assert digests(tmp_path / "b") == first


# --- DICOM ------------------------------------------------------------------------------------


@pytest.mark.parametrize("plane", PLANES)
def test_dicom_reads_back_the_same_from_every_plane(plane, tmp_path):
    study = in_plane(plane)
    row = write_study(study, tmp_path, layout="dicom")
    assert row["image"] == f"{study.study_id}/ct"
    for folder in (tmp_path / row["image"], tmp_path / study.study_id):
        scan = read_scan(folder)
        assert np.array_equal(scan.array, study.array)
        assert np.allclose(scan.affine, study.affine, atol=1e-6)
        assert np.allclose(scan.spacing_mm, study.spacing_mm, atol=1e-6)
        assert (scan.modality, scan.units, scan.orientation) == ("CT", "HU", "LPS")
        assert scan.warnings == ()


@pytest.mark.parametrize("plane", PLANES)
def test_dicom_slices_lie_in_the_plane_of_acquisition(plane, tmp_path):
    study = in_plane(plane)
    slices = headers(tmp_path / write_study(study, tmp_path, layout="dicom")["image"])
    axis = PLANES.index(plane)
    assert len(slices) == SMALL[axis]
    rows, columns = (n for k, n in enumerate(SMALL) if k != axis)
    # of the world's (x, y, z), the one across the slices
    across = 2 - axis
    places = [one.ImagePositionPatient[across] for one in slices]
    assert places == sorted(places)
    for one in slices:
        assert (one.Rows, one.Columns) == (rows, columns)
        assert "\\".join(map(str, one.ImageOrientationPatient)) == ORIENTATIONS[plane]
        assert plane in one.SeriesDescription
    # a pixel of a slice, by the equation of the standard (PS3.3 C.7.6.2.1.1), is in its place
    one, row, column = slices[3], 2, 5
    across_row, down = np.array(one.ImageOrientationPatient, float).reshape(2, 3)
    step_down, step_across = (float(mm) for mm in one.PixelSpacing)
    place = np.array(one.ImagePositionPatient, float)
    place = place + across_row * step_across * column + down * step_down * row
    x, y, z = np.rint(np.linalg.solve(study.affine, [*place, 1])).astype(int)[:3]
    assert one.pixel_array[row, column] == study.array[z, y, x]


def test_dicom_texts_lie_beside_the_series(tmp_path):
    write_studies(1, tmp_path, layout="dicom")
    study = make_study(0, split="test")
    folder = tmp_path / study.study_id
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["ct", "questions.csv", "report.txt", "truth.json"]
    assert sorted(path.name for path in (folder / "ct").iterdir())[:2] == ["IM0001", "IM0002"]
    assert (folder / "report.txt").read_text("utf-8") == study.report + "\n"
    assert json.loads((folder / "truth.json").read_text())["plane"] == study.truth.plane
    asked = read_rows(folder / "questions.csv")
    assert [row["Question"] for row in asked] == [q.text for q in study.questions]
    assert {row["Image Path"] for row in asked} == {"ct"}


def test_dicom_headers_are_whole_and_consistent(tmp_path):
    agents = {}
    for index in range(8):
        study = make_study(index, split="test", shape=SMALL)
        one, *others = headers(tmp_path / write_study(study, tmp_path, layout="dicom")["image"])
        who = make_identity(study)
        assert one.SpecificCharacterSet == "ISO_IR 192"
        assert (one.PatientName, one.PatientID) == (who.name, who.patient_id)
        assert one.PatientSex in ("F", "M")
        years = int(one.StudyDate[:4]) - int(one.PatientBirthDate[:4])
        assert int(one.PatientAge[:3]) in (years - 1, years)
        assert 18 <= int(one.PatientAge[:3]) <= 90
        assert len(one.AccessionNumber) <= 16
        assert len(one.PatientID) <= 64
        for keyword in (
            "InstitutionName ReferringPhysicianName StudyDescription ProtocolName Manufacturer "
            "ManufacturerModelName KVP SliceThickness ConvolutionKernel StudyTime"
        ).split():
            assert one.get(keyword), keyword
        assert one.BodyPartExamined == "CHESTABDOMEN"
        assert study.truth.phase in one.SeriesDescription
        agents[study.truth.phase] = "ContrastBolusAgent" in one
        varying = {"SOPInstanceUID", "InstanceNumber", "ImagePositionPatient", "PixelData"}
        for other in others:
            differs = {e.keyword for e in one if other.get(e.keyword) != e.value}
            assert differs <= varying
    assert agents.pop("non-contrast") is False
    assert agents
    assert all(agents.values())


def test_dicom_uids_are_valid_and_no_two_are_the_same(tmp_path):
    study = in_plane("axial")
    other = twin(study, "remove")
    instances, studies = [], set()
    for one in (study, other, make_study(0, split="test", seed=1, shape=SMALL)):
        slices = headers(tmp_path / write_study(one, tmp_path, layout="dicom")["image"])
        instances += [s.SOPInstanceUID for s in slices]
        studies |= {(slices[0].StudyInstanceUID, slices[0].SeriesInstanceUID)}
        for s in slices:
            assert s.file_meta.MediaStorageSOPInstanceUID == s.SOPInstanceUID
    assert len(set(instances)) == len(instances)
    uids = {*instances, *(uid for pair in studies for uid in pair)}
    assert len(uids) == len(instances) + 6
    assert all(UID(uid).is_valid and len(uid) <= 64 for uid in uids)
    # twins are one patient
    assert make_identity(study) == make_identity(other)


def test_names_that_are_not_ascii_survive(tmp_path):
    seen = 0
    for index in range(12):
        study = make_study(index, split="test", shape=(4, 8, 8))
        name = make_identity(study).name
        if name.isascii():
            continue
        one = headers(tmp_path / write_study(study, tmp_path, layout="dicom")["image"])[0]
        assert str(one.PatientName) == name
        assert one.PatientName.family_name == name.split("^")[0]
        seen += 1
    assert seen >= 2


def test_patients_are_their_own_in_every_split_and_seed():
    who = [
        make_identity(make_study(index, split=split, seed=seed))
        for split in SPLITS
        for seed in (0, 1)
        for index in range(30)
    ]
    assert len({one.patient_id for one in who}) == len(who)
    assert len({(one.name, one.birth) for one in who}) == len(who)


# --- CT-RATE ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ct_rate(tmp_path_factory) -> Path:
    """Seven patients of validation, the sixth with two reconstructions, and two of test."""
    folder = tmp_path_factory.mktemp("ct-rate")
    write_studies(7, folder, layout="ct-rate", split="validation")
    write_studies(2, folder, layout="ct-rate", split="test")
    return folder / "dataset"


def volume_path(root: Path, name: str) -> Path:
    split, patient, scan, _ = name.split("_")
    return root / split / f"{split}_{patient}" / f"{split}_{patient}_{scan}" / name


def study_of(name: str):
    patient = int(name.split("_")[1]) - 1
    return make_study(patient % 1_000_000, split="test" if patient >= 1_000_000 else "validation")


def test_ct_rate_tables_and_volumes_name_the_same(ct_rate):
    tables = {
        "radiology_text_reports/validation_reports.csv",
        "metadata/validation_metadata.csv",
        "multi_abnormality_labels/valid_predicted_labels.csv",
    }
    assert {str(path.relative_to(ct_rate)) for path in ct_rate.rglob("*.csv")} == tables
    names = [f"valid_{patient}_a_1.nii.gz" for patient in range(1, 8)]
    names.insert(6, "valid_6_a_2.nii.gz")
    names += ["valid_1000001_a_1.nii.gz", "valid_1000002_a_1.nii.gz"]
    for table in tables:
        assert [row["VolumeName"] for row in read_rows(ct_rate / table)] == names
    assert {path.name for path in ct_rate.rglob("*.nii.gz")} == set(names)
    assert all(volume_path(ct_rate, name).is_file() for name in names)


def test_ct_rate_values_and_metadata_give_the_hu(ct_rate):
    for row in read_rows(ct_rate / "metadata" / "validation_metadata.csv"):
        study = study_of(row["VolumeName"])
        image = nib.load(volume_path(ct_rate, row["VolumeName"]))
        assert image.get_data_dtype() == np.int16
        assert (image.dataobj.slope, image.dataobj.inter) == (1, 0)
        assert np.allclose(image.header.get_zooms(), study.spacing_mm[::-1])
        stored = np.asarray(image.dataobj).transpose(2, 1, 0)
        assert stored.min() >= 0
        hu = stored * float(row["RescaleSlope"]) + float(row["RescaleIntercept"])
        difference = hu - study.array
        if row["VolumeName"].endswith("_1.nii.gz"):
            assert not difference.any()
        else:
            assert 3 < difference.std() < 9
            # air is clipped at -1024
            assert abs(difference[study.array > -900].mean()) < 0.1
        assert json.loads(row["XYSpacing"]) == pytest.approx(study.spacing_mm[1:], rel=1e-5)
        assert float(row["ZSpacing"]) == pytest.approx(study.spacing_mm[0], rel=1e-5)
        assert int(row["NumberofSlices"]) == len(stored)
        assert row["PatientSex"] == make_identity(study).sex


def test_ct_rate_reports_are_the_report_in_parts(ct_rate):
    rows = read_rows(ct_rate / "radiology_text_reports" / "validation_reports.csv")
    for row in rows:
        study = study_of(row["VolumeName"])
        parts = row["Technique_EN"], row["Findings_EN"], row["Impressions_EN"]
        assert "Technique: {} Findings: {} Impression: {}".format(*parts) == study.report
        assert row["ClinicalInformation_EN"] == "Not given."
    first, second = (dict(row) for row in rows if row["VolumeName"].startswith("valid_6_"))
    assert first.pop("VolumeName") != second.pop("VolumeName")
    assert first == second


def test_ct_rate_labels_are_the_truth(ct_rate):
    rows = read_rows(ct_rate / "multi_abnormality_labels" / "valid_predicted_labels.csv")
    assert tuple(rows[0]) == ("VolumeName", *LABELS)
    assert len(LABELS) == 18
    drawn = [name for name in LABELS if name in FINDINGS]
    assert len(drawn) == 10
    for row in rows:
        study = study_of(row["VolumeName"])
        found = find_findings(study.report)
        for name in LABELS:
            assert row[name] == str(int(name in drawn and found[name]))
            assert row[name] == str(int(study.truth.has(name)))


def test_ct_rate_has_no_name_for_twins(tmp_path):
    study = twin(make_study(0, split="test"), "add")
    with pytest.raises(PhantomError, match="no twins"):
        write_study(study, tmp_path, layout="ct-rate")
    with pytest.raises(PhantomError, match="below 1000000"):
        write_study(make_study(1_000_000, split="validation"), tmp_path, layout="ct-rate")


def test_ct_rate_names_differ_between_splits_and_seeds(tmp_path):
    images = {
        write_study(study, tmp_path, layout="ct-rate")["image"]
        for split in SPLITS
        for seed in (0, 1)
        for study in [make_study(0, split=split, seed=seed, shape=(4, 8, 8))]
    }
    assert len(images) == 6
