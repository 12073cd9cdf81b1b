"""NIfTI-1 and NIfTI-2: single files, .hdr/.img pairs, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import nibabel as nib
import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.orientations import aff2axcodes

from med3dvlm.scan.assemble import assemble
from med3dvlm.scan.blocks import check_claim, read_gzip, read_raw
from med3dvlm.scan.geometry import RAS_TO_LPS
from med3dvlm.scan.scan import Scan, ScanError

HEADER_BYTES = {348: Nifti1Header, 540: Nifti2Header}
MAX_OFFSET = 64 * 2**20
"""Where voxels begin at the latest; header extensions are kilobytes."""

UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""xyzt_units, lowest three bits: unknown (taken as mm), metre, mm, micrometre."""


def read_nifti(path: Path, *, frame: int | None = None) -> Scan:
    """Read a NIfTI file or either file of a pair.

    nibabel parses the header; the checks and the voxels are here, because neither nibabel nor
    SimpleITK notices every fault (a wrong checksum, a singular affine, missing voxels).

    Args:
        frame: which volume of a 4D file, from 0.

    Raises:
        ScanError: for anything that is not a sound 3D NIfTI volume.
    """
    name = str(path)
    notes: list[str] = []
    header_path, image_path = _pair(path)
    header = _header(name, header_path, single=header_path == image_path)
    if header_path.name.lower().endswith(".gz") and not is_gzip(header_path):
        notes.append("named .gz but not compressed: read as it is")
    shape, frames = _shape(name, header)
    frame = _choose_frame(name, frames, frame)
    affine, orientation = _affine(name, header, notes)
    dtype = _dtype(name, header, notes)
    count = math.prod(shape)
    offset = _voxel_offset(name, header, single=header_path == image_path)
    stored = image_path.stat().st_size
    compressed = is_gzip(image_path)
    check_claim(
        name,
        (*shape, frames) if frames > 1 else shape,
        dtype.itemsize,
        stored if compressed else stored - offset,
        compressed=compressed,
    )
    offset += frame * count * dtype.itemsize
    if compressed:
        with image_path.open("rb") as file:
            block = read_gzip(name, file, offset, count * dtype.itemsize)
        values = np.frombuffer(block, dtype)
    else:
        values = read_raw(name, image_path, offset, dtype, count)
    return assemble(
        values.reshape(shape, order="F"),
        affine,
        source=name,
        notes=notes,
        scale=_scale(header),
        orientation=orientation,
    )


def is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def looks_like_nifti(start: bytes) -> bool:
    """Whether the first bytes of a (decompressed) file are a NIfTI or Analyze header."""
    sizes = {n.to_bytes(4, order) for n in HEADER_BYTES for order in ("little", "big")}
    return start[:4] in sizes or start[344:348] in (b"n+1\0", b"ni1\0")


def _pair(path: Path) -> tuple[Path, Path]:
    """The files of the header and of the voxels; the same one for .nii."""
    stem, compressed = path.name, path.name.lower().endswith(".gz")
    stem = stem[:-3] if compressed else stem
    kind = stem[-4:].lower()
    if kind not in (".hdr", ".img"):
        return path, path
    other = {".hdr": ".img", ".img": ".hdr"}[kind]
    other = other.upper() if stem[-4:].isupper() else other
    endings = (".gz", "") if compressed else ("", ".gz")
    for ending in endings:
        partner = path.with_name(stem[:-4] + other + ending)
        if partner.is_file():
            return (path, partner) if kind == ".hdr" else (partner, path)
    raise ScanError(
        f"{path}: the other half of the pair, {stem[:-4] + other}, is missing; put both files "
        "side by side."
    )


def _header(name: str, path: Path, *, single: bool) -> Nifti1Header:
    start = _start(name, path)
    if len(start) < 348:
        raise ScanError(
            f"{name}: {len(start)} bytes are too few for a NIfTI header; it is empty, truncated "
            "or not NIfTI."
        )
    for order, code in (("little", "<"), ("big", ">")):
        size = int.from_bytes(start[:4], order)  # type: ignore[arg-type]
        if size in HEADER_BYTES and len(start) >= size:
            header = HEADER_BYTES[size](start[:size], endianness=code, check=False)
            break
    else:
        raise ScanError(
            f"{name}: the header does not begin with its size (348 or 540) as NIfTI does; it is "
            "corrupt or not NIfTI."
        )
    magic = bytes(header["magic"].item())
    wanted = (b"n+1", b"n+2") if single else (b"ni1", b"ni2")
    if magic[:3] not in wanted:
        what = "an Analyze 7.5 file, which has no orientation" if not magic.strip(b"\0") else (
            f"marked {magic[:4]!r} instead of {wanted[0]!r}"
        )  # fmt: skip
        raise ScanError(f"{name}: the header is {what}; convert it to NIfTI.")
    return header


def _start(name: str, path: Path) -> bytes:
    with path.open("rb") as file:
        if not is_gzip(path):
            return file.read(540)
        return bytes(_first_of_gzip(name, file))


def _first_of_gzip(name: str, file: BinaryIO) -> bytes:
    try:
        return gzip.GzipFile(fileobj=file).read(540)
    except (EOFError, OSError, zlib.error) as error:
        raise ScanError(
            f"{name}: the gzip stream is damaged ({error}); copy or download the file again."
        ) from error


def _shape(name: str, header: Nifti1Header) -> tuple[tuple[int, int, int], int]:
    """(I, J, K) and the number of volumes."""
    dim = [int(n) for n in header["dim"]]
    rank = dim[0]
    if not 1 <= rank <= 7 or any(n < 1 for n in dim[1 : rank + 1]):
        raise ScanError(
            f"{name}: the header claims dimensions {dim[: max(2, min(8, rank + 1))]}, which is "
            "no volume; the file is corrupt."
        )
    if header["datatype"] in (128, 2304, 32, 1792, 2048):
        kind = "colour" if header["datatype"] in (128, 2304) else "complex numbers"
        raise ScanError(f"{name}: it holds {kind}, not intensities; give a grey volume.")
    dims = [*dim[1 : rank + 1], 1, 1][:3]
    extra = [n for n in dim[4 : rank + 1] if n > 1]
    if min(dims) < 2:
        size = "×".join(map(str, dims))
        raise ScanError(
            f"{name}: a single 2D image ({size}) is not a volume; give the whole series or a "
            "3D file."
        )
    if len(extra) > 1 or (extra and rank > 4 and dim[4] == 1):
        raise ScanError(f"{name}: it has {rank} dimensions; give a 3D or 4D file.")
    return (dims[0], dims[1], dims[2]), (extra[0] if extra else 1)


def _choose_frame(name: str, frames: int, frame: int | None) -> int:
    if frame is None and frames > 1:
        raise ScanError(
            f"{name}: it holds {frames} volumes (4D); choose one with frame=0 … frame={frames - 1}."
        )
    if frame is not None and not 0 <= frame < frames:
        raise ScanError(f"{name}: frame={frame} is not among its {frames} volumes (from 0).")
    return frame or 0


def _dtype(name: str, header: Nifti1Header, notes: list[str]) -> np.dtype:
    code = int(header["datatype"])
    try:
        dtype = cast(np.dtype, header.get_data_dtype())
    except (nib.spatialimages.HeaderDataError, KeyError) as error:
        raise ScanError(f"{name}: voxel type {code} is unknown; the file is corrupt.") from error
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ScanError(f"{name}: voxel type {dtype} is not supported; save it as float32.")
    if int(header["bitpix"]) != 8 * dtype.itemsize:
        notes.append(
            f"bitpix is {int(header['bitpix'])} but the voxel type is {dtype.name}: the type "
            "is believed"
        )
    return dtype


def _voxel_offset(name: str, header: Nifti1Header, *, single: bool) -> int:
    offset = float(header["vox_offset"])
    least = int(header["sizeof_hdr"]) if single else 0
    if not math.isfinite(offset) or offset < 0 or offset > MAX_OFFSET or 0 < offset < least:
        raise ScanError(f"{name}: its voxels begin at byte {offset:g}; the header is corrupt.")
    # some writers leave 0: the voxels then follow the header and its extension flag
    return int(offset) or (least + 4 if single else 0)


def _scale(header: Nifti1Header) -> tuple[float, float]:
    """The standard: a slope of zero, or one that is no number, means stored values as they are."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not math.isfinite(slope) or slope == 0.0:
        return 1.0, 0.0
    return slope, intercept if math.isfinite(intercept) else 0.0


def _affine(name: str, header: Nifti1Header, notes: list[str]) -> tuple[np.ndarray, str]:
    """Index → LPS mm, and "LPS" or "unknown": the sform, else the qform, else a guess."""
    pixdim = [float(mm) for mm in header["pixdim"][1:4]]
    sform_code, qform_code = int(header["sform_code"]), int(header["qform_code"])
    unit = int(header["xyzt_units"]) & 7
    if sform_code > 0:
        affine = np.asarray(header.get_sform(), np.float64)
        lengths = np.linalg.norm(affine[:3, :3], axis=0)
        # a slightly different pixdim is common; this one is another scale
        if np.isfinite(affine).all() and not np.allclose(pixdim, lengths, rtol=0.02):
            given = ", ".join(f"{mm:g}" for mm in pixdim)
            notes.append(f"pixdim ({given}) contradicts the affine, which is believed")
        if qform_code > 0:
            _compare_forms(header, affine, notes)
    else:
        pixdim = _usable_pixdim(name, pixdim, notes)
        header = header.copy()
        header["pixdim"][1:4] = pixdim
        if qform_code > 0:
            affine = _qform(name, header)
        else:
            affine = np.asarray(header.get_base_affine(), np.float64)
            notes.append(
                "orientation unknown: the file has neither sform nor qform; left and right may "
                "be swapped"
            )
    if UNIT_MM.get(unit, 1.0) != 1.0:
        affine = affine.copy()
        affine[:3] *= UNIT_MM[unit]
        word = {1: "metres", 3: "micrometres (microns)"}[unit]
        notes.append(f"the file gives lengths in {word}: converted to mm, check that it is meant")
    known = sform_code > 0 or qform_code > 0
    return RAS_TO_LPS @ affine, "LPS" if known else "unknown"


def _usable_pixdim(name: str, pixdim: list[float], notes: list[str]) -> list[float]:
    if any(not math.isfinite(mm) or mm == 0 for mm in pixdim):
        raise ScanError(
            f"{name}: the voxel spacing is {' × '.join(f'{mm:g}' for mm in pixdim)} mm and no "
            "sform gives another; write the file again with a valid spacing."
        )
    if any(mm < 0 for mm in pixdim):
        notes.append("negative voxel spacing: its sign is ignored")
    return [abs(mm) for mm in pixdim]


def _qform(name: str, header: Nifti1Header) -> np.ndarray:
    try:
        return np.asarray(header.get_qform(), np.float64)
    except (nib.spatialimages.HeaderDataError, ValueError) as error:
        raise ScanError(f"{name}: its qform is no rotation; write the file again.") from error


def _compare_forms(header: Nifti1Header, sform: np.ndarray, notes: list[str]) -> None:
    try:
        qform = np.asarray(header.get_qform(), np.float64)
        forms = aff2axcodes(qform), aff2axcodes(sform)
    except (nib.spatialimages.HeaderDataError, ValueError, np.linalg.LinAlgError):
        notes.append("the qform is invalid: the sform is believed")
        return
    if forms[0] != forms[1]:
        left_right = any({a, b} == {"L", "R"} for a, b in zip(*forms, strict=True))
        what = "left/right" if left_right else "orientation"
        notes.append(
            f"{what} conflict: qform says {''.join(map(str, forms[0]))}, sform says "
            f"{''.join(map(str, forms[1]))}; the sform is believed"
        )
