"""NumPy arrays (.npy): voxels without geometry."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.lib import format as npy_format

from med3dvlm.scan.assemble import assemble
from med3dvlm.scan.blocks import check_claim, read_raw
from med3dvlm.scan.scan import Scan, ScanError


def read_npy(path: Path, *, frame: int | None = None) -> Scan:
    """Read an array (D, H, W), or (1, D, H, W), taken as canonical with 1 mm spacing.

    Args:
        frame: which volume of an (n, D, H, W) array, from 0.

    Raises:
        ScanError: for objects (pickles), complex numbers, and anything that is not 3D.
    """
    name = str(path)
    shape, fortran, dtype, offset = _header(name, path)
    if dtype.hasobject:
        raise ScanError(f"{name}: it holds Python objects (a pickle), which are never loaded.")
    if dtype.kind not in "iufb" or dtype.itemsize > 8:
        raise ScanError(f"{name}: it holds {dtype}, not intensities; save it as float32.")
    if any(n < 1 for n in shape):
        raise ScanError(f"{name}: its shape is {shape}, which is no volume.")
    check_claim(name, shape or (1,), dtype.itemsize, path.stat().st_size - offset, compressed=False)
    count = int(np.prod(shape, dtype=np.int64))
    order = "F" if fortran else "C"
    values = read_raw(name, path, offset, dtype, count).reshape(shape, order=order)
    if values.ndim == 4:
        values = _frame(name, values, frame)
    elif frame is not None:
        raise ScanError(f"{name}: it holds one volume; leave frame= out.")
    if values.ndim != 3:
        raise ScanError(f"{name}: its shape is {shape}; give an array (D, H, W).")
    notes = ["orientation and voxel spacing unknown: a NumPy array has none, 1 mm is assumed"]
    return assemble(
        values.transpose(2, 1, 0), np.eye(4), source=name, notes=notes, orientation="unknown"
    )


def _header(name: str, path: Path) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    with path.open("rb") as file:
        try:
            version = npy_format.read_magic(file)
            if version == (1, 0):
                shape, fortran, dtype = npy_format.read_array_header_1_0(file)
            else:
                shape, fortran, dtype = npy_format.read_array_header_2_0(file)
        except Exception as error:  # the header is parsed as Python: corrupt ones raise anything
            raise ScanError(
                f"{name}: the NumPy header is corrupt; save the array again."
            ) from error
        return shape, fortran, dtype, file.tell()


def _frame(name: str, values: np.ndarray, frame: int | None) -> np.ndarray:
    if frame is None and len(values) > 1:
        raise ScanError(
            f"{name}: it holds {len(values)} volumes (4D); choose one with frame=0 … "
            f"frame={len(values) - 1}."
        )
    if frame is not None and not 0 <= frame < len(values):
        raise ScanError(f"{name}: frame={frame} is not among its {len(values)} volumes (from 0).")
    return values[frame or 0]
