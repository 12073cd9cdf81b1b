"""`read_scan`: one function for every format, by what a file holds and not by its name."""

from __future__ import annotations

import gzip
import stat
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from med3dvlm.scan.dicom import read_dicom
from med3dvlm.scan.dicom_series import files_under, starts_as_dicom
from med3dvlm.scan.itk import read_metaimage, read_nrrd
from med3dvlm.scan.nifti import looks_like_nifti, read_nifti
from med3dvlm.scan.npy import read_npy
from med3dvlm.scan.scan import Scan, ScanError
from med3dvlm.scan.slices import PICTURES, read_slices

FORMATS = "a DICOM series (folder, file or zip), NIfTI, NRRD, MetaImage, NPY or a slice folder"


def read_scan(
    path: str | Path,
    *,
    series: str | int | None = None,
    frame: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scan:
    """Read a CT or MR volume into canonical orientation, in HU where the file says so.

    Args:
        path: a DICOM folder (searched to its depths), one file of a series (the series beside
            it is read), a zip of a series, a NIfTI, NRRD, MetaImage or NPY file, or a folder of
            PNG or JPEG slices.
        series: SeriesInstanceUID or SeriesNumber, where a folder holds several.
        frame: which volume of a 4D file, from 0.
        progress: called with (files done, files in all) while a DICOM series is read.

    Raises:
        ScanError: for whatever cannot be read as a volume, with what is wrong and what to do.
    """
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # libraries' own; the scan's are in Scan.warnings
            return _read(path, series=series, frame=frame, progress=progress)
    except ScanError:
        raise
    except MemoryError as error:
        raise ScanError(f"{path}: it does not fit into memory; give a smaller volume.") from error
    except Exception as error:  # corrupt files make the libraries raise nearly anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ScanError(
            f"{path}: it cannot be read ({reason}); the file is damaged or not a scan."
        ) from error


def _read(
    path: Path,
    *,
    series: str | int | None,
    frame: int | None,
    progress: Callable[[int, int], None] | None,
) -> Scan:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise ScanError(f"{path}: there is no such file or folder; check the path.") from error
    if stat.S_ISDIR(mode):
        return _read_folder(path, series=series, frame=frame, progress=progress)
    if not stat.S_ISREG(mode):
        raise ScanError(f"{path}: it is a device or a pipe, not a file; give a file or a folder.")
    if path.stat().st_size == 0:
        raise ScanError(f"{path}: the file is empty; copy or download it again.")
    kind = _kind(path)
    if kind == "dicom":
        return read_dicom(path, series=series, frame=frame, progress=progress)
    if series is not None:
        raise ScanError(f"{path}: series= is for DICOM only; leave it out.")
    if kind == "picture":
        raise ScanError(
            f"{path}: a single 2D image is not a volume; give the folder that holds all slices."
        )
    readers = {"nifti": read_nifti, "nrrd": read_nrrd, "meta": read_metaimage, "npy": read_npy}
    if kind not in readers:
        raise ScanError(f"{path}: it is in no format known here; give {FORMATS}.")
    return readers[kind](path, frame=frame)


def _kind(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(1024)
    name = path.name.lower()
    nifti_name = name.removesuffix(".gz").endswith((".nii", ".hdr", ".img"))
    if start[:2] == b"\x1f\x8b":
        try:
            with gzip.open(path) as stream:
                inside = stream.read(352)
        except (EOFError, OSError, zlib.error):
            inside = b""
        return "nifti" if nifti_name or looks_like_nifti(inside) else None
    if start[128:132] == b"DICM":
        return "dicom"
    if start[:4] == b"NRRD":
        return "nrrd"
    if start[:6] == b"\x93NUMPY":
        return "npy"
    if start[:8] == b"\x89PNG\r\n\x1a\n" or start[:3] == b"\xff\xd8\xff":
        return "picture"
    if looks_like_nifti(start) or nifti_name:
        return "nifti"
    if b"ElementDataFile" in start or (name.endswith((".mha", ".mhd")) and b"=" in start):
        return "meta"
    if zipfile.is_zipfile(path) or starts_as_dicom(start):
        return "dicom"
    return None


def _read_folder(
    folder: Path,
    *,
    series: str | int | None,
    frame: int | None,
    progress: Callable[[int, int], None] | None,
) -> Scan:
    files = sorted(file for file in folder.iterdir() if file.is_file())
    pictures = [file for file in files if file.suffix.lower() in PICTURES]
    # one preview picture beside DICOM folders is no slice folder
    if pictures and next(iter(files_under(folder)), None) is None:
        if series is not None or frame is not None:
            raise ScanError(f"{folder}: series= and frame= are not for slice folders.")
        return read_slices(folder, pictures)
    try:
        return read_dicom(folder, series=series, frame=frame, progress=progress)
    except ScanError as error:
        volumes = [file.name for file in files if _is_volume(file)]
        if volumes and "holds no DICOM images" in str(error):
            raise ScanError(
                f"{folder}: a folder of volumes ({', '.join(volumes[:3])}); give one of the files."
            ) from error
        if "holds no DICOM images" in str(error):
            raise ScanError(f"{folder}: the folder holds no scan; give {FORMATS}.") from error
        raise


def _is_volume(file: Path) -> bool:
    return file.name.lower().endswith((".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".npy"))
