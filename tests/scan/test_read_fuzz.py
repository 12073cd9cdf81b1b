"""Whatever bytes are changed: a scan or a ScanError, never anything else."""

from __future__ import annotations

import contextlib
import gzip

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from med3dvlm.scan import ScanError, decode_slice, read_scan, save_dicom_series, save_nrrd
from med3dvlm.scan.dicom_pixels import read_dataset
from tests.scan.samples import DATA, make_scan

# pydicom warns of what it finds in damaged files; read_scan silences it, single slices do not
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=150, database=None)

changes = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6)
cuts = st.none() | st.floats(0, 1)


def mutated(raw: bytes, where: list[tuple[float, int]], cut: float | None, reach: int) -> bytes:
    """Some of the first `reach` bytes set, and perhaps the end cut off."""
    data = bytearray(raw)
    for share, value in where:
        data[int(share * min(reach, len(data)))] = value
    return bytes(data if cut is None else data[: int(cut * len(data))])


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A small sound file of each format: name → (bytes, how far its header reaches)."""
    folder = tmp_path_factory.mktemp("sound")
    scan = make_scan((4, 5, 6))
    save_nrrd(scan, folder / "a.nrrd")
    np.save(folder / "a.npy", scan.array)
    save_dicom_series(scan, folder / "series")
    nifti = (DATA / "nifti_derived" / "00_valid.nii").read_bytes()
    mha = b"NDims = 3\nDimSize = 4 5 6\nElementSpacing = 1 1 2\nElementType = MET_SHORT\n"
    mha += b"TransformMatrix = 1 0 0 0 1 0 0 0 1\nElementDataFile = LOCAL\n"
    return {
        "a.nii": (nifti, 352),
        "a.nii.gz": (gzip.compress(nifti), 10**6),
        "a.nrrd": ((folder / "a.nrrd").read_bytes(), 10**6),
        "a.npy": ((folder / "a.npy").read_bytes(), 128),
        "a.mha": (mha + bytes(240), 200),
        "series/0002.dcm": ((folder / "series" / "0002.dcm").read_bytes(), 10**6),
        "folder": folder,
    }


@pytest.mark.parametrize(
    "name", ["a.nii", "a.nii.gz", "a.nrrd", "a.npy", "a.mha", "series/0002.dcm"]
)
def test_changed_bytes(name, sound, tmp_path):
    raw, reach = sound[name]
    path = tmp_path / name
    if "/" in name:
        for index in (1, 2, 3, 4):
            (path.parent).mkdir(exist_ok=True)
            slice_name = f"{index:04d}.dcm"
            (path.parent / slice_name).write_bytes(
                (sound["folder"] / "series" / slice_name).read_bytes()
            )

    @EXAMPLES
    @given(changes, cuts)
    def check(where, cut):
        path.write_bytes(mutated(raw, where, cut, reach))
        for target in {path, path.parent if "/" in name else path}:
            try:
                scan = read_scan(target)
            except ScanError as error:
                assert "\n" not in str(error)
            else:
                assert scan.array.ndim == 3 and np.isfinite(scan.array).all()
                assert np.isfinite(scan.affine).all()

    check()


@pytest.mark.parametrize("syntax", ["50", "51", "80"])
def test_changed_bytes_of_compressed_slices(syntax):
    raw = (DATA / "transfer_syntax" / f"{syntax}.dcm").read_bytes()

    @settings(EXAMPLES, max_examples=40)
    @given(changes, cuts)
    def check(where, cut):
        try:
            dataset = read_dataset("slice", mutated(raw, where, cut, 10**6))
            assert np.isfinite(decode_slice(dataset)).all()
        except ScanError as error:
            assert "\n" not in str(error)

    check()


def test_changed_bytes_of_run_length_slices():
    dataset = pydicom.dcmread(DATA / "cip_chest64" / "IMG0030.dcm")
    dataset.compress(pydicom.uid.RLELossless)
    pixels = bytes(dataset.PixelData)

    @settings(EXAMPLES, max_examples=60)
    @given(changes)
    def check(where):
        dataset.PixelData = mutated(pixels, where, None, 10**6)
        with contextlib.suppress(ScanError):
            decode_slice(dataset)

    check()
