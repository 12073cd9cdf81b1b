"""Writing scans as NIfTI, NRRD and DICOM series, for exchange, phantoms and tests."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MRImageStorage,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from med3dvlm.files import atomic_file, atomic_folder
from med3dvlm.scan.geometry import RAS_TO_LPS
from med3dvlm.scan.scan import Scan


def save_nifti(scan: Scan, path: str | Path) -> None:
    """Write .nii or .nii.gz; voxels are int16 where that loses nothing, else float32."""
    voxels = _smallest(scan.array).transpose(2, 1, 0)
    image = nib.Nifti1Image(voxels, RAS_TO_LPS @ scan.affine)
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    image.header.set_xyzt_units("mm")
    with atomic_file(path) as temporary:
        nib.save(image, temporary)


def save_nrrd(scan: Scan, path: str | Path) -> None:
    """Write a gzipped NRRD in LPS; voxels are int16 where that loses nothing, else float32."""
    voxels = _smallest(scan.array)
    width, height, depth = voxels.shape[::-1]
    vectors = [",".join(repr(float(v)) for v in scan.affine[:3, axis]) for axis in range(4)]
    header = "\n".join(
        [
            "NRRD0004",
            f"type: {'short' if voxels.dtype == np.int16 else 'float'}",
            "dimension: 3",
            "space: left-posterior-superior",
            f"sizes: {width} {height} {depth}",
            f"space directions: ({vectors[0]}) ({vectors[1]}) ({vectors[2]})",
            "kinds: domain domain domain",
            "endian: little",
            "encoding: gzip",
            f"space origin: ({vectors[3]})",
        ]
    )
    little = np.ascontiguousarray(voxels, voxels.dtype.newbyteorder("<"))
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        file.write(header.encode() + b"\n\n")
        with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=6, mtime=0) as stream:
            stream.write(little.data)


def save_dicom_series(
    scan: Scan,
    folder: str | Path,
    *,
    patient_id: str = "ANONYMOUS",
    series_number: int = 1,
    series_description: str = "",
    study_uid: str | None = None,
    series_uid: str | None = None,
    plane: str = "axial",
    attributes: Mapping[str, Any] | None = None,
    file_name: str = "{:04d}.dcm",
) -> None:
    """Write one file per slice, replacing the folder: from the lowest up, front or right slice on.

    Stored values are int16 with a rescale: of slope 1 where the values are whole numbers, else
    as fine as 16 bits allow. Instance UIDs follow from the series UID and what the slices show.

    Args:
        plane: "axial", "coronal" or "sagittal": how the volume is cut into slices.
        attributes: what each slice says besides, or instead: DICOM keyword → value.
        file_name: names the files by their number, from 1.

    Raises:
        ValueError: for an unknown plane, or an attribute that is no DICOM keyword.
    """
    attributes = attributes or {}
    unknown = [keyword for keyword in attributes if tag_for_keyword(keyword) is None]
    if unknown:
        raise ValueError(f"attribute {unknown[0]!r} is no DICOM keyword; use names like KVP.")
    scan = _cut(scan, plane)
    slope, intercept = _rescale(scan.array)
    study_uid, series_uid = study_uid or generate_uid(), series_uid or generate_uid()
    frame_uid, now = generate_uid(), datetime.now()
    depth = scan.array.shape[0]
    with atomic_folder(folder) as temporary:
        for z in range(depth):
            stored = np.rint((scan.array[z] - np.float64(intercept)) / slope).astype("<i2")
            pixels = stored.tobytes()
            dataset = _slice(scan, z, pixels)
            if plane != "axial":
                dataset.ImageType = ["DERIVED", "SECONDARY", "MPR"]
            digest = hashlib.sha256(pixels).hexdigest()
            dataset.SOPInstanceUID = generate_uid(entropy_srcs=[f"{series_uid} {z} {digest}"])
            dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
            dataset.PatientName, dataset.PatientID = patient_id, patient_id
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_uid, series_uid
            dataset.FrameOfReferenceUID = frame_uid
            dataset.StudyDate, dataset.StudyTime = f"{now:%Y%m%d}", f"{now:%H%M%S}"
            dataset.StudyID, dataset.PositionReferenceIndicator = "", ""
            dataset.SeriesNumber, dataset.SeriesDescription = series_number, series_description
            dataset.AcquisitionNumber = 1
            dataset.RescaleSlope, dataset.RescaleIntercept = f"{slope:.10g}", f"{intercept:.10g}"
            for keyword, value in attributes.items():
                setattr(dataset, keyword, value)
            dataset.save_as(temporary / file_name.format(z + 1), enforce_file_format=True)


def _cut(scan: Scan, plane: str) -> Scan:
    """The scan on axes (slice, row, column) of a plane: rows go to the back, or to the feet."""
    if plane == "axial":
        return scan
    if plane not in ("coronal", "sagittal"):
        raise ValueError(f"plane {plane!r} is unknown: use axial, coronal or sagittal.")
    # of the axes (z, y, x): slices, rows, columns; both planes have their rows along z
    order = (1, 0, 2) if plane == "coronal" else (2, 0, 1)
    slices, rows, columns = (2 - axis for axis in order)  # in the affine, whose axes are (x, y, z)
    affine = scan.affine[:, [columns, rows, slices, 3]]
    affine[:3, 1] *= -1
    affine[:3, 3] += scan.affine[:3, 2] * (scan.array.shape[0] - 1)  # the head is the first row
    return replace(
        scan,
        array=scan.array[::-1].transpose(order),
        spacing_mm=tuple(scan.spacing_mm[axis] for axis in order),
        affine=affine,
    )


def _slice(scan: Scan, z: int, pixels: bytes) -> pydicom.Dataset:
    classes = {"CT": CTImageStorage, "MR": MRImageStorage}
    x_axis, y_axis = scan.affine[:3, 0], scan.affine[:3, 1]
    spacing_z, spacing_y, spacing_x = scan.spacing_mm
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    modality = scan.modality or ("CT" if scan.units == "HU" else "OT")  # only CT is in HU
    dataset.SOPClassUID = classes.get(modality, SecondaryCaptureImageStorage)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.Modality = modality
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.Manufacturer = "med3dvlm"
    dataset.PatientPosition = "HFS"
    dataset.InstanceNumber = z + 1
    dataset.SliceThickness = _decimal(spacing_z)
    dataset.ImagePositionPatient = [_decimal(v) for v in (scan.affine @ [0, 0, z, 1])[:3]]
    both = [*(x_axis / spacing_x), *(y_axis / spacing_y)]
    dataset.ImageOrientationPatient = [_decimal(v) for v in both]
    dataset.PixelSpacing = [_decimal(spacing_y), _decimal(spacing_x)]
    dataset.Rows, dataset.Columns = scan.array.shape[1:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
    dataset.PixelRepresentation = 1
    if scan.units == "HU":
        dataset.RescaleType = "HU"
    dataset.PixelData = pixels
    return dataset


def _decimal(value: float) -> str:
    """A DICOM decimal string: at most 16 characters."""
    value = round(value, 10) + 0.0  # no -0
    text = f"{value:.10f}".rstrip("0").rstrip(".")
    return text if len(text) <= 16 else f"{value:.8g}"


def _rescale(array: np.ndarray) -> tuple[float, float]:
    low, high = float(array.min()), float(array.max())
    if low >= -32768 and high <= 32767 and _is_whole(array):
        return 1.0, 0.0
    slope = float(f"{max((high - low) / 65000, 1e-9):.8g}")
    return slope, float(f"{(low + high) / 2:.8g}")


def _is_whole(array: np.ndarray) -> bool:
    return all(np.array_equal(plane, np.rint(plane)) for plane in array)


def _smallest(array: np.ndarray) -> np.ndarray:
    fits = float(array.min()) >= -32768 and float(array.max()) <= 32767
    return array.astype(np.int16) if fits and _is_whole(array) else array
