"""Writing: what other libraries make of it, and what a failure leaves behind."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pydicom
import pytest

from med3dvlm.scan import read_scan, save_dicom_series, save_nifti, save_nrrd
from tests.scan.samples import make_scan


def test_nifti_is_right_for_nibabel(tmp_path, scan):
    save_nifti(scan, tmp_path / "a.nii.gz")
    image = nib.load(tmp_path / "a.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    assert np.allclose(image.header.get_zooms(), scan.spacing_mm[::-1])
    assert image.get_data_dtype() == np.int16
    # the same point in both worlds: RAS has the other sign for x and y
    lps = scan.affine @ [3, 2, 1, 1]
    assert np.allclose(image.affine @ [3, 2, 1, 1], lps * [-1, -1, 1, 1], atol=1e-4)


def test_fractions_are_kept(tmp_path, scan):
    scan.array[:] += 0.25
    save_nifti(scan, tmp_path / "a.nii")
    save_nrrd(scan, tmp_path / "a.nrrd")
    save_dicom_series(scan, tmp_path / "series")
    assert np.array_equal(read_scan(tmp_path / "a.nii").array, scan.array)
    assert np.array_equal(read_scan(tmp_path / "a.nrrd").array, scan.array)
    assert np.allclose(read_scan(tmp_path / "series").array, scan.array, atol=0.02)


def test_dicom_slices_are_plausible(tmp_path, scan):
    save_dicom_series(scan, tmp_path / "a", series_number=5, series_description="chest")
    slices = [pydicom.dcmread(path) for path in sorted((tmp_path / "a").iterdir())]
    assert len(slices) == 6
    assert len({one.SeriesInstanceUID for one in slices}) == 1
    assert len({one.SOPInstanceUID for one in slices}) == 6
    assert (slices[0].Modality, slices[0].SeriesNumber) == ("CT", 5)
    assert read_scan(tmp_path / "a").meta["series_description"] == "chest"


def test_long_decimals_fit_dicom(tmp_path):
    scan = make_scan(spacing=(1 / 3, 0.123456789012, 2 / 3))
    save_dicom_series(scan, tmp_path / "a")
    assert read_scan(tmp_path / "a").spacing_mm == pytest.approx(scan.spacing_mm, rel=1e-6)


def test_a_failed_write_leaves_the_old_file(tmp_path, scan, monkeypatch):
    save_nifti(scan, tmp_path / "a.nii")
    before = (tmp_path / "a.nii").read_bytes()

    def fail(image, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(nib, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_nifti(scan, tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii"]


@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_dicom_is_the_same_volume_in_every_plane(tmp_path, plane):
    turn = np.radians(20)  # about z: the scan's own axes are cut, not the patient's
    scan = make_scan()
    scan.affine[:2, :3] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]] @ (
        scan.affine[:2, :3]
    )
    save_dicom_series(scan, tmp_path / "a", plane=plane)
    again = read_scan(tmp_path / "a")
    assert np.array_equal(again.array, scan.array)
    assert np.allclose(again.affine, scan.affine, atol=1e-5)


def test_dicom_attributes_replace_what_is_written(tmp_path, scan):
    attributes = {"KVP": 120, "Manufacturer": "ACME"}
    save_dicom_series(scan, tmp_path / "a", attributes=attributes, file_name="IM{:03d}")
    one = pydicom.dcmread(tmp_path / "a" / "IM001")
    assert (one.KVP, one.Manufacturer) == (120, "ACME")


def test_dicom_says_what_it_cannot_write(tmp_path, scan):
    with pytest.raises(ValueError, match="no DICOM keyword"):
        save_dicom_series(scan, tmp_path / "a", attributes={"Colour": "red"})
    with pytest.raises(ValueError, match="use axial, coronal or sagittal"):
        save_dicom_series(scan, tmp_path / "a", plane="oblique")
    assert not (tmp_path / "a").exists()
