"""DICOM series: real slices, and generated ones with one fault or feature each."""

from __future__ import annotations

import copy
import shutil
import zipfile

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedCTImageStorage, RLELossless, SecondaryCaptureImageStorage

from med3dvlm.scan import (
    ScanError,
    decode_slice,
    read_scan,
    save_dicom_series,
    save_nifti,
    save_nrrd,
)
from tests.scan.samples import DATA, make_scan


@pytest.fixture
def series(tmp_path, scan):
    """A folder of the six slices of `scan`."""
    folder = tmp_path / "series"
    save_dicom_series(scan, folder)
    return folder


def edit(folder, change, *, only=None):
    """Apply `change(dataset, index)` to every slice of a folder."""
    for index, path in enumerate(sorted(folder.iterdir())):
        if only is None or index in only:
            dataset = pydicom.dcmread(path)
            change(dataset, index)
            dataset.save_as(path)


def put(**values):
    def change(dataset, index):
        for key, value in values.items():
            setattr(dataset, key, value)

    return change


def words(scan):
    return " ".join(scan.warnings)


# --- real slices ----------------------------------------------------------------------------


def test_real_series_equals_simpleitk():
    folder = DATA / "cip_chest64"
    scan = read_scan(folder)
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.ReadImage(names)
    assert np.array_equal(scan.array, sitk.GetArrayFromImage(image))
    assert np.allclose(scan.spacing_mm, image.GetSpacing()[::-1], atol=1e-3)
    assert np.allclose(scan.affine[:3, 3], image.GetOrigin())
    assert (scan.modality, scan.units, scan.warnings) == ("CT", "HU", ())
    assert not any("name" in key or key == "id" for key in scan.meta)


@pytest.mark.parametrize(
    ("syntax", "mean_hu"), [("50", 21), ("51", 5), ("55", 5), ("80", 0), ("81", 1)]
)
def test_compressed_slices_agree_in_hu(syntax, mean_hu):
    reference = decode_slice(pydicom.dcmread(DATA / "transfer_syntax" / "80.dcm"))
    assert (reference.shape, reference.min(), reference.max()) == ((512, 512), -3024, 1378)
    plane = decode_slice(pydicom.dcmread(DATA / "transfer_syntax" / f"{syntax}.dcm"))
    assert plane.dtype == np.float32
    assert abs(plane - reference).mean() <= mean_hu


def test_a_lone_slice_is_no_volume(tmp_path):
    shutil.copy(DATA / "transfer_syntax" / "50.dcm", tmp_path)
    for path in (tmp_path, tmp_path / "50.dcm"):
        with pytest.raises(ScanError, match="single 2D image is not a volume"):
            read_scan(path)


# --- sound series ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "nested", "one file", "zip", "renamed", "rle"])
def test_every_way_to_give_a_series(kind, series, scan, tmp_path):
    path = series
    if kind == "nested":
        path = tmp_path / "study"
        shutil.copytree(series, path / "a" / "b")
    if kind == "one file":
        path = series / "0003.dcm"
    if kind == "zip":
        path = tmp_path / "series.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for number, file in enumerate(sorted(series.iterdir())):
                archive.write(file, f"../../evil/{number}")
            archive.writestr("readme.txt", "no slice")
    if kind == "renamed":  # names in the wrong order, and no ending
        for index, file in enumerate(sorted(series.iterdir())):
            file.rename(series / f"IM{(index * 5) % 6}")
    if kind == "rle":
        edit(series, lambda dataset, index: dataset.compress(RLELossless))
    again = read_scan(path)
    assert np.array_equal(again.array, scan.array)
    assert np.allclose(again.affine, scan.affine, atol=1e-6)
    assert again.spacing_mm == pytest.approx(scan.spacing_mm)
    assert (again.units, again.warnings) == ("HU", ())
    assert list(tmp_path.rglob("evil")) == []


def test_dicom_nifti_and_nrrd_of_one_scan_are_identical(tmp_path, scan):
    save_dicom_series(scan, tmp_path / "series")
    save_nifti(scan, tmp_path / "scan.nii.gz")
    save_nrrd(scan, tmp_path / "scan.nrrd")
    for name in ("series", "scan.nii.gz", "scan.nrrd"):
        again = read_scan(tmp_path / name)
        assert np.array_equal(again.array, scan.array)
        assert np.allclose(again.affine, scan.affine, atol=1e-4)


@pytest.mark.parametrize("plane", ["coronal", "sagittal", "feet first"])
def test_other_planes_become_canonical(plane, tmp_path, scan):
    moved = {  # how (x, y, z) of the written series run in the patient
        "coronal": [[1, 0, 0], [0, 0, -1], [0, 1, 0]],
        "sagittal": [[0, 1, 0], [0, 0, -1], [1, 0, 0]],
        "feet first": [[-1, 0, 0], [0, 1, 0], [0, 0, -1]],
    }[plane]
    array, affine = scan.array, scan.affine
    order = [int(np.argmax(np.abs(row))) for row in moved]  # patient axis of each written axis
    flips = [slice(None, None, int(row[axis])) for row, axis in zip(moved, order, strict=True)]
    written = array.transpose(2, 1, 0).transpose(order)[tuple(flips)].transpose(2, 1, 0)
    to_scan = np.zeros((4, 4))
    to_scan[3, 3] = 1
    for column, (row, axis) in enumerate(zip(moved, order, strict=True)):
        to_scan[axis, column] = row[axis]
        to_scan[axis, 3] = 0 if row[axis] > 0 else array.shape[2 - axis] - 1
    other = type(scan)(
        np.ascontiguousarray(written),
        tuple(scan.spacing_mm[2 - axis] for axis in order[::-1]),
        affine @ to_scan,
        modality="CT",
        units="HU",
    )
    save_dicom_series(other, tmp_path / "series")
    again = read_scan(tmp_path / "series")
    assert np.array_equal(again.array, array)
    assert np.allclose(again.affine, affine, atol=1e-5)


def test_rescale_of_each_slice_is_its_own(series, scan):
    def halve(dataset, index):
        dataset.RescaleSlope = "0.5"
        dataset.RescaleIntercept = str(10 * index)

    edit(series, halve, only={2, 4})
    again = read_scan(series)
    for index in range(6):
        expected = scan.array[index] * 0.5 + 10 * index if index in (2, 4) else scan.array[index]
        assert np.array_equal(again.array[index], expected)


def test_padding_becomes_air(series):
    def pad(dataset, index):
        pixels = dataset.pixel_array.copy()
        pixels[0] = -2000
        dataset.PixelData = pixels.tobytes()
        dataset.add_new("PixelPaddingValue", "SS", -2000)

    edit(series, pad)
    assert (read_scan(series).array[:, 0] == -1024).all()


def test_bits_above_the_stored_ones_are_cleared(series, scan):
    def overlay(dataset, index):
        stored = (dataset.pixel_array.astype(np.int32) + 1024).astype(np.uint16)
        dataset.PixelData = (stored | 0xF000).tobytes()
        dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 12, 11, 0
        dataset.RescaleIntercept = "-1024"

    edit(series, overlay)
    assert np.array_equal(read_scan(series).array, scan.array)


def test_monochrome1_of_mr_is_inverted(tmp_path):
    scan = make_scan(modality="MR")
    save_dicom_series(scan, tmp_path / "series")
    edit(tmp_path / "series", put(PhotometricInterpretation="MONOCHROME1"))
    again = read_scan(tmp_path / "series")
    assert np.array_equal(again.array, -1 - scan.array)  # of signed 16 bits
    assert "MONOCHROME1" in words(again) and again.units is None


@pytest.mark.parametrize("inverted", [False, True])
def test_monochrome1_of_ct_goes_by_the_air_around(inverted, tmp_path):
    scan = make_scan((6, 16, 16))
    scan.array[:, :3] = scan.array[:, -3:] = -1000
    save_dicom_series(scan, tmp_path / "series")

    def change(dataset, index):
        dataset.PhotometricInterpretation = "MONOCHROME1"
        if inverted:
            dataset.PixelData = (-1 - dataset.pixel_array).astype("<i2").tobytes()

    edit(tmp_path / "series", change)
    again = read_scan(tmp_path / "series")
    assert np.array_equal(again.array, scan.array)
    assert "MONOCHROME1" in words(again)


def enhanced(series, path):
    """The slices of a folder as one enhanced multi-frame file, its frames shuffled."""
    parts = [pydicom.dcmread(file) for file in sorted(series.iterdir())]
    parts = [parts[(5 * index) % len(parts)] for index in range(len(parts))]
    whole = copy.deepcopy(parts[0])
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    whole.NumberOfFrames = len(parts)
    whole.PixelData = b"".join(part.PixelData for part in parts)
    measures, orientation, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = parts[0].PixelSpacing, "2.5"
    orientation.ImageOrientationPatient = parts[0].ImageOrientationPatient
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PlaneOrientationSequence = Sequence([orientation])
    whole.SharedFunctionalGroupsSequence = Sequence([shared])
    groups = []
    for index, part in enumerate(parts):
        group, position, transform = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = part.ImagePositionPatient
        transform.RescaleSlope, transform.RescaleIntercept = "1", str(index)
        transform.RescaleType = "HU"
        group.PlanePositionSequence = Sequence([position])
        group.PixelValueTransformationSequence = Sequence([transform])
        groups.append(group)
    whole.PerFrameFunctionalGroupsSequence = Sequence(groups)
    for key in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
                "RescaleSlope", "RescaleIntercept"):  # fmt: skip
        delattr(whole, key)
    whole.save_as(path)


def test_enhanced_multi_frame(series, scan, tmp_path):
    enhanced(series, tmp_path / "enhanced.dcm")
    again = read_scan(tmp_path / "enhanced.dcm")
    for frame in range(6):
        assert np.array_equal(again.array[(5 * frame) % 6], scan.array[(5 * frame) % 6] + frame)
    assert np.allclose(again.affine, scan.affine)
    assert again.units == "HU"


def test_enhanced_multi_frame_that_claims_too_much(series, tmp_path):
    enhanced(series, tmp_path / "a.dcm")
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    dataset.NumberOfFrames = 900_000
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(ScanError, match="truncated"):
        read_scan(tmp_path / "a.dcm")


def test_multi_frame_without_positions(series, tmp_path):
    enhanced(series, tmp_path / "a.dcm")
    dataset = pydicom.dcmread(tmp_path / "a.dcm")
    del dataset.PerFrameFunctionalGroupsSequence
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.raises(ScanError, match="where each of them lies"):
        read_scan(tmp_path / "a.dcm")


def test_progress_is_told(series):
    calls = []
    read_scan(series, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(n, 6) for n in range(1, 7)]


# --- what lies beside -----------------------------------------------------------------------


def test_two_series_are_listed_and_can_be_chosen(tmp_path):
    first, second = make_scan(seed=1), make_scan((4, 8, 10), seed=2)
    for number, scan in ((3, first), (7, second)):
        save_dicom_series(
            scan, tmp_path / "study" / str(number), series_number=number, series_description="lung"
        )
    with pytest.raises(ScanError) as caught:
        read_scan(tmp_path / "study")
    for word in ("2 image series", "series=", "'3' (6 slices", "'7' (4 slices", "lung"):
        assert word in str(caught.value)
    for series in (7, "7"):
        assert np.array_equal(read_scan(tmp_path / "study", series=series).array, second.array)
    uid = pydicom.dcmread(tmp_path / "study" / "3" / "0001.dcm").SeriesInstanceUID
    assert np.array_equal(read_scan(tmp_path / "study", series=uid).array, first.array)
    with pytest.raises(ScanError, match="no series '9'"):
        read_scan(tmp_path / "study", series=9)
    # one file names its series
    assert read_scan(tmp_path / "study" / "7" / "0001.dcm").shape == (4, 8, 10)


def test_localizers_captures_and_reports_are_ignored(series, scan, tmp_path):
    single = make_scan((2, 8, 10), seed=4)
    for name, change in {
        "localizer": put(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        "capture": put(SOPClassUID=SecondaryCaptureImageStorage),
    }.items():
        save_dicom_series(single, tmp_path / "study" / name, series_number=99)
        edit(tmp_path / "study" / name, change)
    shutil.copytree(series, tmp_path / "study" / "scan")
    report = pydicom.dcmread(series / "0001.dcm")
    report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    for key in ("Rows", "Columns", "PixelData"):
        delattr(report, key)
    report.save_as(tmp_path / "study" / "report.dcm")
    (tmp_path / "study" / "notes.txt").write_text("not DICOM")
    again = read_scan(tmp_path / "study")
    assert np.array_equal(again.array, scan.array)
    assert "Text SR" in words(again) and "ignored 2 other series" in words(again)
    with pytest.raises(ScanError, match="Text SR"):
        read_scan(tmp_path / "study" / "report.dcm")


def test_localizers_within_the_series_are_ignored(series, scan):
    extra = pydicom.dcmread(series / "0001.dcm")
    extra.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    extra.save_as(series / "0099.dcm")
    again = read_scan(series)
    assert np.array_equal(again.array, scan.array) and "localizer" in words(again)


# --- places of slices -----------------------------------------------------------------------


def move(millimetres):
    def change(dataset, index):
        position = [float(v) for v in dataset.ImagePositionPatient]
        position[2] = -100 + millimetres[index]
        dataset.ImagePositionPatient = position

    return change


def test_reversed_positions_turn_the_volume(series, scan):
    edit(series, move([12.5 - 2.5 * index for index in range(6)]))
    assert np.array_equal(read_scan(series).array, scan.array[::-1])


def test_rounded_positions_are_even(series, scan):
    edit(series, move([0, 2.5, 5.05, 7.5, 9.95, 12.5]))
    again = read_scan(series)
    assert np.array_equal(again.array, scan.array)
    assert again.spacing_mm[0] == pytest.approx(2.5)


def test_missing_slice_is_refused_with_its_place(series):
    (series / "0004.dcm").unlink()
    with pytest.raises(ScanError, match=r"missing.*z=-95\.00 and -90\.00"):
        read_scan(series)


def test_uneven_slices_are_resampled(series, scan):
    edit(series, move([0, 2.5, 5, 7.5, 12.5, 17.5]))
    again = read_scan(series)
    assert "unevenly spaced" in words(again)
    assert again.shape[0] == 8 and again.spacing_mm[0] == pytest.approx(2.5)
    assert np.array_equal(again.array[:4], scan.array[:4])
    assert np.allclose(again.array[4], (scan.array[3] + scan.array[4]) / 2)


def test_wildly_uneven_slices_are_refused(series):
    edit(series, move([0, 1, 10, 30, 70, 150]))
    with pytest.raises(ScanError, match="uneven"):
        read_scan(series)


def test_copies_are_dropped_but_different_slices_are_not(series, scan):
    shutil.copy(series / "0002.dcm", series / "copy.dcm")
    again = read_scan(series)
    assert np.array_equal(again.array, scan.array) and "there twice" in words(again)
    other = pydicom.dcmread(series / "copy.dcm")
    other.PixelData = pydicom.dcmread(series / "0003.dcm").PixelData
    other.save_as(series / "copy.dcm")
    with pytest.raises(ScanError, match="same position"):
        read_scan(series)


def test_4d_series_is_refused_or_chosen_from(series, tmp_path):
    phases = [make_scan(seed=0), make_scan(seed=9)]
    uid = pydicom.dcmread(series / "0001.dcm").SeriesInstanceUID
    save_dicom_series(phases[1], tmp_path / "b", series_uid=uid)
    edit(tmp_path / "b", lambda dataset, index: put(InstanceNumber=100 + index)(dataset, index))
    for file in (tmp_path / "b").iterdir():
        shutil.copy(file, series / f"late{file.name}")
    with pytest.raises(ScanError, match=r"4D.*frame=0 … frame=1"):
        read_scan(series)
    for frame in (0, 1):
        assert np.array_equal(read_scan(series, frame=frame).array, phases[frame].array)


def test_gantry_tilt_is_straightened(tmp_path):
    scan = make_scan((8, 20, 16), (2.5, 1.0, 1.0))
    scan.array[:] = -1000
    scan.array[:, 8:12, 6:10] = 300
    save_dicom_series(scan, tmp_path / "series")
    tilt = np.radians(15)

    def lean(dataset, index):
        # planes lean by 15°, and their first pixels stay above one another
        dataset.ImageOrientationPatient = [1, 0, 0, 0, float(np.cos(tilt)), float(np.sin(tilt))]
        dataset.ImagePositionPatient = [0, 0, 2.5 * index]

    edit(tmp_path / "series", lean)
    again = read_scan(tmp_path / "series")
    assert "tilt" in words(again)
    axes = again.affine[:3, :3] / np.linalg.norm(again.affine[:3, :3], axis=0)
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    assert again.spacing_mm[0] == pytest.approx(2.5 * np.cos(tilt))
    # a point of the rod is where the tilted slices put it
    centre = np.array([7.5, 9.5 * np.cos(tilt), 4 * 2.5 + 9.5 * np.sin(tilt), 1])
    x, y, z = np.rint(np.linalg.inv(again.affine) @ centre).astype(int)[:3]
    assert again.array[z, y, x] == 300


def test_slices_aside_of_the_stack_are_refused(series):
    edit(series, put(ImagePositionPatient=[40, 30.25, -95]), only={2})
    with pytest.raises(ScanError, match="aside"):
        read_scan(series)


# --- faults ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (put(Rows=4), "different sizes"),
        (put(PixelSpacing=[1.0, 0.9]), "different pixel spacings"),
        (put(PixelSpacing=[0.0, 0.8]), "positive"),
        (put(PixelSpacing=[-0.7, 0.8]), "positive"),
        (put(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), "different orientations"),
        (put(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), "no directions"),
        (put(ImagePositionPatient=None), "ImagePositionPatient is missing"),
        (put(PixelData=bytes(20)), "truncated"),
        (put(SamplesPerPixel=3, PhotometricInterpretation="RGB"), "colour"),
    ],
)
def test_faults_of_one_slice(change, word, series):
    edit(series, change, only={3})
    with pytest.raises(ScanError, match=word) as caught:
        read_scan(series)
    assert "\n" not in str(caught.value)


def test_truncated_file(series):
    path = series / "0003.dcm"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(ScanError, match=r"0003\.dcm"):
        read_scan(series)


def test_ct_without_negative_values_is_not_hu(series):
    def shift(dataset, index):
        dataset.PixelData = (dataset.pixel_array + 1024).astype("<i2").tobytes()

    edit(series, shift)
    again = read_scan(series)
    assert again.units is None and "not HU" in words(again)


def test_spectral_maps_are_not_hu(series):
    edit(series, put(RescaleType="Z_EFF"))
    again = read_scan(series)
    assert again.units is None and "Z_EFF" in words(again)


def test_a_rescale_that_is_no_scale_is_refused(series):
    edit(series, put(RescaleSlope="0"), only={1})
    with pytest.raises(ScanError, match="rescale"):
        read_scan(series)


def test_mislabelled_modality_is_flagged(series):
    edit(series, put(Modality="MR"))
    again = read_scan(series)
    assert again.units is None
    assert "modality conflict" in words(again) and "look like CT" in words(again)


def test_inflating_bomb(tmp_path, series):
    import zlib

    dataset = pydicom.dcmread(series / "0001.dcm")
    dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    dataset.save_as(tmp_path / "bomb.dcm")
    raw = (tmp_path / "bomb.dcm").read_bytes()
    start = 144 + int.from_bytes(raw[140:144], "little")
    deflate = zlib.compressobj(1, zlib.DEFLATED, -15)
    body = b"".join(deflate.compress(bytes(2**22)) for _ in range(80)) + deflate.flush()
    (tmp_path / "bomb.dcm").write_bytes(raw[:start] + body)
    with pytest.raises(ScanError):
        read_scan(tmp_path / "bomb.dcm")


def test_zip_bomb(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        start = bytes(128) + b"DICM"
        for number in range(10):
            file.writestr(str(number), start + bytes(30 * 2**20))
    with pytest.raises(ScanError, match="bomb"):
        read_scan(tmp_path / "bomb.zip")
