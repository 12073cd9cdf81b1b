"""NRRD, MetaImage, NPY, slice folders, and paths that are no scan at all."""

from __future__ import annotations

import os
import pickle
import time

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from med3dvlm.scan import ScanError, read_scan, save_nrrd
from tests.scan.samples import make_scan


def image_of(scan):
    image = sitk.GetImageFromArray(scan.array.astype(np.int16))
    image.SetSpacing(scan.spacing_mm[::-1])
    image.SetOrigin(scan.affine[:3, 3].tolist())
    return image


def test_scans_travel_between_processes(scan):
    again = pickle.loads(pickle.dumps(scan))  # noqa: S301
    assert np.array_equal(again.array, scan.array) and repr(again) == repr(scan)


def test_repr_is_short(scan):
    assert repr(scan) == "Scan(6×8×10 voxels of 2.5×0.7×0.8 mm (z, y, x), CT, HU, LPS, 'made')"


# --- NRRD and MetaImage, against SimpleITK ----------------------------------------------------


@pytest.mark.parametrize("name", ["a.nrrd", "a.nhdr", "a.mha", "a.mhd"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("order", ["LPS", "RAS", "ASL", "PIR"])
def test_what_simpleitk_writes_is_read(name, compressed, order, tmp_path, scan):
    image = sitk.DICOMOrient(image_of(scan), order)
    sitk.WriteImage(image, str(tmp_path / name), useCompression=compressed)
    again = read_scan(tmp_path / name)
    assert np.array_equal(again.array, scan.array)
    assert np.allclose(again.affine, scan.affine, atol=1e-6)
    assert again.units == "HU" and again.warnings == ()


@pytest.mark.parametrize("kind", [sitk.sitkUInt8, sitk.sitkInt32, sitk.sitkFloat32, sitk.sitkInt64])
def test_voxel_types(kind, tmp_path):
    array = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    for name in ("a.nrrd", "a.mha"):
        sitk.WriteImage(sitk.Cast(sitk.GetImageFromArray(array), kind), str(tmp_path / name))
        assert np.array_equal(read_scan(tmp_path / name).array, array)


def test_simpleitk_reads_what_is_written(tmp_path, scan):
    save_nrrd(scan, tmp_path / "a.nrrd")
    image = sitk.ReadImage(str(tmp_path / "a.nrrd"))
    assert np.array_equal(sitk.GetArrayFromImage(image), scan.array)
    assert np.allclose(image.GetSpacing(), scan.spacing_mm[::-1])
    assert np.allclose(image.GetOrigin(), scan.affine[:3, 3])


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
@pytest.mark.parametrize("compressed", [False, True])
def test_truncated(name, compressed, tmp_path, scan):
    sitk.WriteImage(image_of(scan), str(tmp_path / name), useCompression=compressed)
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw[:-200])
    with pytest.raises(ScanError, match=r"truncated|damaged|fewer"):
        read_scan(tmp_path / name)


NRRD = "NRRD0004\ntype: short\ndimension: 3\nsizes: 4 4 4\nencoding: raw\nendian: little\n"


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (NRRD.replace("4 4 4", "10000 10000 10000"), "limit"),
        (NRRD.replace("4 4 4", "4 4 -4"), "no size"),
        (NRRD.replace("4 4 4", "4 4 4000"), "truncated"),
        (NRRD.replace("dimension: 3", "dimension: 2"), "2D"),
        (NRRD.replace("short", "block"), "voxel type"),
        (NRRD.replace("raw", "hex"), "encoding"),
        (NRRD + "spacings: 1 0 1\n", "spacing"),
        (NRRD + "spacings: 1 -1 1\n", "spacing"),
        (NRRD + "space directions: (1,0,0) (0,1,0) (0,nan,0)\n", "not numbers"),
        (NRRD + "data file: ../../etc/passwd\n", "same folder"),
        (NRRD + "data file: gone.raw\n", "missing"),
    ],
)
def test_bad_nrrd_headers(header, word, tmp_path):
    (tmp_path / "a.nrrd").write_bytes(header.encode() + b"\n" + bytes(128))
    with pytest.raises(ScanError, match=word):
        read_scan(tmp_path / "a.nrrd")


def test_nrrd_without_directions_is_flagged(tmp_path):
    (tmp_path / "a.nrrd").write_bytes(NRRD.encode() + b"spacings: 1 2 3\n\n" + bytes(range(128)))
    scan = read_scan(tmp_path / "a.nrrd")
    assert scan.orientation == "unknown" and scan.spacing_mm == (3, 2, 1)


def test_components_of_nrrd_are_chosen_from(tmp_path):
    array = np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6, 2)).astype(np.int16)
    image = sitk.GetImageFromArray(array, isVector=True)
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    with pytest.raises(ScanError, match="frame=0"):
        read_scan(tmp_path / "a.nrrd")
    assert np.array_equal(read_scan(tmp_path / "a.nrrd", frame=1).array, array[..., 1])


MHA = "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\n"


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (MHA.replace("4 4 4", "9000 9000 90000"), "limit"),
        (MHA.replace("4 4 4", "4 4"), "DimSize"),
        (MHA + "ElementSpacing = 1 0 1\n", "positive"),
        (MHA + "ElementSpacing = 1 1 -1\n", "positive"),
        (MHA + "ElementNumberOfChannels = 3\n", "several values"),
        (MHA + "BinaryData = False\n", "text voxels"),
        (MHA.replace("NDims = 3", "NDims = 2"), "2D"),
    ],
)
def test_bad_metaimage_headers(header, word, tmp_path):
    (tmp_path / "a.mha").write_bytes(header.encode() + b"ElementDataFile = LOCAL\n" + bytes(128))
    with pytest.raises(ScanError, match=word):
        read_scan(tmp_path / "a.mha")


# --- NPY ------------------------------------------------------------------------------------


def test_npy_is_read_as_it_is(tmp_path, scan):
    for array in (scan.array, scan.array[None], np.asfortranarray(scan.array.astype(np.int16))):
        np.save(tmp_path / "a.npy", array)
        again = read_scan(tmp_path / "a.npy")
        assert np.array_equal(again.array, scan.array)
        assert (again.spacing_mm, again.orientation, again.units) == ((1, 1, 1), "unknown", "HU")
        assert "unknown" in again.warnings[0]


def test_npy_pickles_are_never_loaded(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    np.save(tmp_path / "a.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(ScanError, match="pickle"):
        read_scan(tmp_path / "a.npy")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.zeros((4, 4)), "give an array"),
        (np.zeros((2, 4, 4, 4)), "frame=0"),
        (np.zeros((4, 4, 4), complex), "intensities"),
        (np.zeros((0, 4, 4)), "no volume"),
        (np.full((4, 4, 4), np.nan), "number"),
        (np.zeros((1, 40, 40)), "2D"),
    ],
)
def test_npy_that_is_no_volume(array, word, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ScanError, match=word):
        read_scan(tmp_path / "a.npy")


def test_npy_that_claims_too_much(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 4, 4), np.int16))
    raw = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(raw.replace(b"(4, 4, 4), ", b"(4, 4, 999)"[:11]))
    with pytest.raises(ScanError):
        read_scan(tmp_path / "a.npy")


# --- slice folders --------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Twelve grey slices, 0.png … 11.png, whose value is their number."""
    folder = tmp_path / "影像"
    folder.mkdir()
    for number in range(12):
        plane = np.full((20, 30), number, np.uint8)
        plane[5, 7] = 255
        Image.fromarray(plane).save(folder / f"{number}.png")
    return folder


def test_slices_are_in_the_order_of_their_numbers(pictures):
    scan = read_scan(pictures)
    assert scan.array.shape == (12, 20, 30)
    assert scan.array[:, 0, 0].tolist() == list(range(12))
    assert (scan.array[:, 5, 7] == 255).all()
    assert (scan.orientation, scan.units) == ("unknown", None)
    assert "orientation" in scan.warnings[0] and "not HU" in scan.warnings[1]


def test_odd_slices_are_left_out_by_name(pictures):
    Image.new("L", (99, 99)).save(pictures / "12.png")
    (pictures / "13.png").write_bytes((pictures / "3.png").read_bytes()[:40])
    (pictures / "14.jpg").write_text("not a picture")
    scan = read_scan(pictures)
    assert scan.array.shape == (12, 20, 30)
    for name in ("12.png", "13.png", "14.jpg"):
        assert name in " ".join(scan.warnings)


def test_colour_and_jpeg_slices_become_grey(tmp_path):
    for number in range(3):
        Image.new("RGB", (20, 20), (50 * number,) * 3).save(tmp_path / f"s{number}.jpeg")
    scan = read_scan(tmp_path)
    assert np.allclose(scan.array[:, 3, 3], [0, 50, 100], atol=1)


def test_pictures_that_are_no_volume(tmp_path, pictures):
    with pytest.raises(ScanError, match="single 2D image"):
        read_scan(pictures / "0.png")
    (tmp_path / "one").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / "one" / "1.png")
    with pytest.raises(ScanError, match="single 2D image"):
        read_scan(tmp_path / "one")
    (tmp_path / "huge").mkdir()
    for number in range(2):  # 400 million pixels in 400 kB
        Image.new("1", (20000, 20000)).save(tmp_path / "huge" / f"{number}.png")
    with pytest.raises(ScanError, match="can be opened"):
        read_scan(tmp_path / "huge")


# --- no scan at all -------------------------------------------------------------------------


def test_paths_that_are_no_scan(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.nii.gz").write_text("this is no scan")
    (tmp_path / "text.txt").write_text("this is no scan")
    (tmp_path / "zero.dcm").write_bytes(b"")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    os.mkfifo(tmp_path / "pipe.nii")
    for name, word in {
        "gone.nii": "no such file",
        "empty": "no scan",
        "text.nii.gz": "not NIfTI",
        "text.txt": "no format",
        "zero.dcm": "empty",
        "broken.zip": "no format",
        "pipe.nii": "pipe",
        "a\0b": "no such file",
    }.items():
        start = time.perf_counter()
        with pytest.raises(ScanError, match=word):
            read_scan(tmp_path / name)
        assert time.perf_counter() - start < 1


def test_a_folder_of_volumes_names_them(tmp_path):
    save_nrrd(make_scan(), tmp_path / "a.nrrd")
    with pytest.raises(ScanError, match=r"folder of volumes \(a\.nrrd\)"):
        read_scan(tmp_path)
