"""Scans: reading every common format into one canonical volume, and preparing it for a model."""

from med3dvlm.scan.dicom_pixels import decode_slice
from med3dvlm.scan.geometry import peak_of
from med3dvlm.scan.prepare import (
    PRESETS,
    Preparation,
    compare_preparations,
    prepare,
    prepared_affine,
    to_scan_grid,
)
from med3dvlm.scan.read import read_scan
from med3dvlm.scan.scan import NotHounsfieldWarning, Scan, ScanError
from med3dvlm.scan.write import save_dicom_series, save_nifti, save_nrrd

__all__ = [
    "PRESETS",
    "NotHounsfieldWarning",
    "Preparation",
    "Scan",
    "ScanError",
    "compare_preparations",
    "decode_slice",
    "peak_of",
    "prepare",
    "prepared_affine",
    "read_scan",
    "save_dicom_series",
    "save_nifti",
    "save_nrrd",
    "to_scan_grid",
]
