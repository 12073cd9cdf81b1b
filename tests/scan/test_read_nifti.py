"""Every file of the malformed corpus, and generated ones."""

from __future__ import annotations

import gzip
import time

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from med3dvlm.scan import ScanError, read_scan, save_nifti
from tests.scan.samples import DATA, make_scan

DERIVED = DATA / "nifti_derived"

REFUSED = {
    "01_truncated_half.nii": "truncated",
    "02_truncated_in_header.nii": "too few",
    "03_truncated_gzip.nii.gz": "gzip stream is damaged",
    "04_gzip_bad_crc.nii.gz": "CRC",
    "06_bad_magic.nii": "marked",
    "07_sizeof_hdr_wrong.nii": "348 or 540",
    "08_dim0_zero.nii": "dimensions",
    "09_dim0_nine.nii": "dimensions",
    "10_dim_negative.nii": "dimensions",
    "11_dim_bomb_32767x32767x32767.nii": "limit",
    "12_dim_z_one_2d.nii": "single 2D image",
    "13_datatype_unknown_77.nii": "voxel type 77",
    "15_vox_offset_past_eof.nii": "truncated",
    "16_vox_offset_nan.nii": "byte nan",
    "19_sform_nan.nii": "not numbers",
    "20_sform_singular.nii": "spacing",
    "28_4d_two_phases.nii.gz": "frame=0",
    "x_text_renamed.nii": "not NIfTI",
    "x_empty.nii.gz": "empty",
}
IDENTICAL = {
    "00_valid.nii.gz": None,
    "05_plain_bytes_named_gz.nii.gz": "not compressed",
    "14_bitpix_mismatch.nii": "bitpix",
    "17_pixdim_zero.nii": "pixdim",
    "18_pixdim_negative.nii": "pixdim",
    "22_scl_slope_nan.nii": None,
    "23_scl_slope_zero.nii": None,
    "25_big_endian_valid.nii": None,
    "29_4d_trailing_one.nii.gz": None,
    "32_float64_hu.nii.gz": None,
    "33_LAS_same_world.nii.gz": None,
    "34_qform_sform_conflict_LR.nii.gz": "left/right conflict",
    "35_units_micron.nii.gz": "micron",
}
FLAGGED = {
    "21_no_qform_no_sform.nii": "orientation unknown",
    "24_scl_slope_huge.nii": "out of the range of HU",
    "26_nan_inf_voxels.nii.gz": "NaN",
    "27_constant_volume.nii.gz": "constant",
    "30_uint16_offset_1024.nii.gz": "not HU",
    "31_uint8_windowed.nii.gz": "not HU",
}


@pytest.fixture(scope="module")
def valid():
    return read_scan(DERIVED / "00_valid.nii")


def test_every_file_of_the_corpus_has_an_expectation():
    files = {path.name for path in DERIVED.iterdir()}
    assert files == {"00_valid.nii", *REFUSED, *IDENTICAL, *FLAGGED}


def test_valid_file_equals_nibabel(valid):
    stored = np.asanyarray(nib.load(DERIVED / "00_valid.nii").dataobj)
    assert np.array_equal(valid.array, stored[::-1, ::-1].transpose(2, 1, 0))
    assert valid.spacing_mm == (3.0, 3.0, 3.0)
    assert (valid.units, valid.orientation, valid.warnings) == ("HU", "LPS", ())
    assert valid.array.dtype == np.float32 and valid.array.flags.c_contiguous
    # the first voxel: rightmost, foremost, lowest; nibabel's world is RAS
    assert np.allclose(valid.affine[:3, 3], [87.956 - 93, -101.319 - 93, 112.302], atol=1e-3)


@pytest.mark.parametrize(("file", "word"), REFUSED.items())
def test_refused_in_one_sentence_that_names_the_file(file, word):
    start = time.perf_counter()
    with pytest.raises(ScanError) as caught:
        read_scan(DERIVED / file)
    message = str(caught.value)
    assert word in message and file in message and "\n" not in message
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(("file", "flag"), IDENTICAL.items())
def test_read_identically(file, flag, valid):
    scan = read_scan(DERIVED / file)
    assert np.array_equal(scan.array, valid.array)
    scale = 0.001 if "micron" in file else 1.0
    assert np.allclose(scan.affine[:3], valid.affine[:3] * scale)
    assert scan.warnings == () if flag is None else flag in " ".join(scan.warnings)


@pytest.mark.parametrize(("file", "flag"), FLAGGED.items())
def test_read_with_a_flag(file, flag):
    scan = read_scan(DERIVED / file)
    assert flag in " ".join(scan.warnings)
    assert np.isfinite(scan.array).all()
    if "HU" in flag:
        assert scan.units is None
    if "orientation" in flag:
        assert scan.orientation == "unknown"


def test_frame_picks_a_volume_of_4d():
    stored = np.asanyarray(nib.load(DERIVED / "28_4d_two_phases.nii.gz").dataobj)
    for frame in (0, 1):
        scan = read_scan(DERIVED / "28_4d_two_phases.nii.gz", frame=frame)
        assert np.array_equal(scan.array, stored[::-1, ::-1, :, frame].transpose(2, 1, 0))
    with pytest.raises(ScanError, match="frame=2"):
        read_scan(DERIVED / "28_4d_two_phases.nii.gz", frame=2)


def test_every_voxel_type_reads_the_same():
    files = sorted((DATA / "nifti_dtypes").glob("27_*.nii"))
    assert len(files) == 10
    expected = np.arange(27, dtype=np.float32)
    for file in files:
        scan = read_scan(file)
        stored = np.asanyarray(nib.load(file).dataobj)
        assert sorted(scan.array.ravel()) == list(expected)
        assert np.array_equal(scan.array, stored[::-1, ::-1].transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("complex_complex32.nii", "complex"),
        ("complex_complex64.nii", "complex"),
        ("rgb_3D.nii", "colour"),
        ("rgb_4D.nii", "colour"),
        ("rgba_4D.nii", "colour"),
        ("minimal_extended_hdr.nii", "single 2D image"),
    ],
)
def test_what_is_no_grey_volume_is_refused(file, word):
    with pytest.raises(ScanError, match=word):
        read_scan(DATA / "nifti_dtypes" / file)


def test_pairs_read_as_the_single_file():
    folder = DATA / "nifti_dtypes"
    single = read_scan(folder / "minimal.nii")
    names = ("minimal.nii.gz", "minimal.hdr", "minimal.img", "minimal.hdr.gz", "minimal.img.gz")
    for name in (*names, "minimal2.hdr"):
        scan = read_scan(folder / name)
        assert np.array_equal(scan.array, single.array)
        assert np.array_equal(scan.affine, single.affine)


def test_missing_half_of_a_pair(tmp_path):
    (tmp_path / "a.hdr").write_bytes((DATA / "nifti_dtypes" / "minimal.hdr").read_bytes())
    with pytest.raises(ScanError, match=r"a\.img"):
        read_scan(tmp_path / "a.hdr")


def test_six_axis_orders_of_one_brain_are_identical():
    scans = [read_scan(path) for path in sorted((DATA / "orientation").glob("*.nii.gz"))]
    assert len(scans) == 6
    for scan in scans[1:]:
        assert np.array_equal(scan.array, scans[0].array)
        assert np.allclose(scan.affine, scans[0].affine, atol=1e-4)
        assert np.allclose(scan.spacing_mm, scans[0].spacing_mm)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(st.permutations(range(3)), st.tuples(*[st.booleans()] * 3))
def test_any_axis_order_reads_back_the_same(tmp_path_factory, order, flips):
    scan = make_scan((5, 6, 7))
    path = tmp_path_factory.mktemp("order") / "scan.nii"
    save_nifti(scan, path)
    image = nib.load(path)
    start = nib.orientations.io_orientation(image.affine)
    codes = np.column_stack([order, [-1 if flip else 1 for flip in flips]])
    moved = image.as_reoriented(nib.orientations.ornt_transform(start, codes))
    nib.save(moved, path.with_name("moved.nii"))
    again = read_scan(path.with_name("moved.nii"))
    assert np.array_equal(again.array, scan.array)
    assert np.allclose(again.affine, scan.affine, atol=1e-4)


def _save(path, voxels, affine=None, **header):
    image = nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine)
    for key, value in header.items():
        image.header[key] = value
    nib.save(image, path)
    return path


def _hu(shape=(9, 8, 7)):
    return np.random.default_rng(1).integers(-1000, 1000, shape).astype(np.int16)


def test_oblique_keeps_its_grid_and_says_so(tmp_path):
    angle = np.radians(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    voxels = _hu()
    scan = read_scan(_save(tmp_path / "a.nii", voxels, turn))
    assert "oblique by 20°" in " ".join(scan.warnings)
    assert np.array_equal(scan.array, voxels[::-1, ::-1].transpose(2, 1, 0))


def test_shear_is_resampled_to_right_angles(tmp_path):
    shear = np.eye(4)
    shear[1, 2] = 0.5  # half a voxel back per slice
    voxels = np.full((20, 20, 9), -1000, np.int16)
    for z in range(9):  # a straight rod along z in space
        y = 10 - z / 2
        low = int(np.floor(y))
        voxels[8:12, low - 2 : low + 3, z] = 500
    scan = read_scan(_save(tmp_path / "a.nii", voxels, shear))
    assert "tilt" in " ".join(scan.warnings)
    axes = scan.affine[:3, :3] / np.linalg.norm(scan.affine[:3, :3], axis=0)
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-9)
    centres = [np.mean(np.nonzero(plane > 0)[0]) for plane in scan.array]
    assert np.ptp(centres) <= 1.0


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_no_spacing_at_all_is_refused(tmp_path, value):
    path = _save(tmp_path / "a.nii", _hu())
    raw = bytearray(path.read_bytes())
    raw[252:256] = bytes(4)  # qform and sform codes
    raw[80:84] = np.float32(value).tobytes()
    path.write_bytes(raw)
    with pytest.raises(ScanError, match="spacing"):
        read_scan(path)


def test_scaling_is_applied_in_double_precision(tmp_path):
    voxels = _hu()
    path = _save(tmp_path / "a.nii", voxels)
    raw = bytearray(path.read_bytes())
    raw[112:120] = np.array([1.5, -24.0], np.float32).tobytes()
    path.write_bytes(raw)
    scan = read_scan(path)
    expected = (voxels * 1.5 - 24).astype(np.float32)[::-1, ::-1].transpose(2, 1, 0)
    assert np.array_equal(scan.array, np.where(expected <= -1500, -1024, expected))


def test_padding_is_set_to_air(tmp_path):
    voxels = _hu()
    voxels[0] = -3024
    scan = read_scan(_save(tmp_path / "a.nii", voxels))
    assert scan.array.min() == -1024 and "padding" in " ".join(scan.warnings)


def test_nifti2_is_read(tmp_path):
    voxels = _hu()
    nib.save(nib.Nifti2Image(voxels, np.eye(4)), tmp_path / "a.nii")
    assert np.array_equal(
        read_scan(tmp_path / "a.nii").array, voxels[::-1, ::-1].transpose(2, 1, 0)
    )


def test_no_number_at_all_is_refused(tmp_path):
    with pytest.raises(ScanError, match="number"):
        read_scan(_save(tmp_path / "a.nii", np.full((4, 4, 4), np.nan, np.float32)))


def test_gzip_bombs_are_refused_quickly(tmp_path):
    header = bytearray((DERIVED / "00_valid.nii").read_bytes()[:352])
    long = tmp_path / "long.nii.gz"  # far more data than the header claims
    with gzip.open(long, "wb", compresslevel=1) as file:
        file.write(header + bytes(32768))
        for _ in range(40):
            file.write(bytes(2**20))
    large = tmp_path / "large.nii.gz"  # a header that claims what only a bomb can hold
    header[42:48] = np.array([1000, 1000, 500], "<i2").tobytes()
    with gzip.open(large, "wb", compresslevel=1) as file:
        file.write(header)
        for _ in range(200):
            file.write(bytes(2**20))
    for path in (long, large):
        start = time.perf_counter()
        with pytest.raises(ScanError, match="bomb|more than"):
            read_scan(path)
        assert time.perf_counter() - start < 5
