"""NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd).

Read here and not through SimpleITK, which fills what a truncated file lacks with zeros; the
tests compare with SimpleITK on sound files.
"""

from __future__ import annotations

import bz2
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from med3dvlm.scan.assemble import assemble
from med3dvlm.scan.blocks import check_claim, read_gzip, read_raw, read_zlib
from med3dvlm.scan.geometry import RAS_TO_LPS
from med3dvlm.scan.scan import Scan, ScanError

HEADER_LIMIT = 2**20

NRRD_TYPES = {
    "i1": ("signed char", "int8", "int8_t"),
    "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
    "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
    "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
    "i4": ("int", "signed int", "int32", "int32_t"),
    "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
    "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
    "u8": ("ulonglong", "unsigned long long", "uint64", "uint64_t"),
    "f4": ("float",),
    "f8": ("double",),
}
META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2",
    "MET_INT": "i4", "MET_UINT": "u4", "MET_LONG": "i4", "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
TO_LPS = {
    "left-posterior-superior": np.eye(4), "lps": np.eye(4),
    "right-anterior-superior": RAS_TO_LPS, "ras": RAS_TO_LPS,
    "left-anterior-superior": np.diag([1.0, -1.0, 1.0, 1.0]), "las": np.diag([1.0, -1, 1, 1]),
}  # fmt: skip


@dataclass
class _Block:
    """Where the voxels of a text header lie."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    encoding: str  # raw, gzip, bzip2, zlib
    whole_tail: bool = False  # voxels are the last bytes of the file


def read_nrrd(path: Path, *, frame: int | None = None) -> Scan:
    """Read an NRRD file, its data attached or beside it.

    Raises:
        ScanError: for anything that is not a sound 3D volume of one value per voxel.
    """
    name = str(path)
    fields, length = _nrrd_fields(name, path)
    block, drop = _nrrd_block(name, path, fields, length)
    affine, orientation, notes = _nrrd_affine(name, fields, drop)
    voxels = _voxels(name, block)
    if drop is not None:
        frames = block.shape[drop]
        if frames > 1 and frame is None:
            raise ScanError(
                f"{name}: it holds {frames} volumes or components; choose one with frame=0 … "
                f"frame={frames - 1}."
            )
        _check_frame(name, frame, frames)
        voxels = np.take(voxels, frame or 0, axis=drop)
    else:
        _check_frame(name, frame, 1)
    return assemble(voxels, affine, source=name, notes=notes, orientation=orientation)


def read_metaimage(path: Path, *, frame: int | None = None) -> Scan:
    """Read a MetaImage file, its data attached or beside it.

    Raises:
        ScanError: for anything that is not a sound 3D volume of one value per voxel.
    """
    name = str(path)
    fields, length = _meta_fields(name, path)
    _check_frame(name, frame, 1)
    block = _meta_block(name, path, fields, length)
    affine, orientation, notes = _meta_affine(name, fields)
    return assemble(_voxels(name, block), affine, source=name, notes=notes, orientation=orientation)


def _check_frame(name: str, frame: int | None, frames: int) -> None:
    if frame is not None and not 0 <= frame < frames:
        raise ScanError(f"{name}: frame={frame} is not among its {frames} volumes (from 0).")


def _voxels(name: str, block: _Block) -> np.ndarray:
    """(I, J, K) view; the first axis is the fastest in the file."""
    count = math.prod(block.shape)
    size = count * block.dtype.itemsize
    file_size = block.path.stat().st_size
    offset = max(0, file_size - size) if block.whole_tail else block.offset
    check_claim(name, block.shape, block.dtype.itemsize, file_size - offset,
                compressed=block.encoding != "raw")  # fmt: skip
    if block.encoding == "raw":
        values = read_raw(name, block.path, offset, block.dtype, count)
        return values.reshape(block.shape, order="F")
    with block.path.open("rb") as file:
        file.seek(offset)
        if block.encoding == "gzip":
            data: bytes | bytearray = read_gzip(name, file, 0, size)
        elif block.encoding == "zlib":
            data = read_zlib(name, file.read(), size)
        else:
            data = _bzip2(name, file.read(), size)
    return np.frombuffer(data, block.dtype).reshape(block.shape, order="F")


def _bzip2(name: str, data: bytes, size: int) -> bytes:
    try:
        with bz2.BZ2File(io.BytesIO(data)) as stream:
            block = stream.read(size)
    except (OSError, EOFError, ValueError) as error:
        raise ScanError(f"{name}: the bzip2 stream is damaged ({error}).") from error
    if len(block) < size:
        raise ScanError(f"{name}: it is truncated, copy it again.")
    return block


def _beside(name: str, path: Path, file_name: str) -> Path:
    """The data file of a detached header: only a plain name, in the same folder."""
    if Path(file_name).name != file_name or file_name in ("", ".", ".."):
        raise ScanError(
            f"{name}: its data file {file_name!r} is not in the same folder; put both side by "
            "side and name it without a folder."
        )
    data = path.with_name(file_name)
    if not data.is_file():
        raise ScanError(f"{name}: its data file {file_name!r} is missing; put both side by side.")
    return data


def _numbers(name: str, field: str, text: str, count: int | None = None) -> list[float]:
    try:
        numbers = [float(word) for word in text.split()]
    except ValueError as error:
        raise ScanError(f"{name}: {field!r} is {text[:60]!r}, not numbers.") from error
    if count is not None and len(numbers) != count:
        raise ScanError(f"{name}: {field!r} has {len(numbers)} numbers instead of {count}.")
    return numbers


def _sizes(name: str, field: str, text: str, count: int) -> tuple[int, ...]:
    numbers = _numbers(name, field, text, count)
    if any(not math.isfinite(n) or n != int(n) or n < 1 for n in numbers):
        raise ScanError(f"{name}: {field!r} is {text[:60]!r}, which is no size.")
    return tuple(int(n) for n in numbers)


def _dimension(name: str, text: str) -> int:
    rank = int(_numbers(name, "dimension", text, 1)[0]) if text else 0
    if rank < 3:
        raise ScanError(f"{name}: a single 2D image is not a volume; give a 3D file.")
    if rank > 4:
        raise ScanError(f"{name}: it has {rank} dimensions; give a 3D or 4D file.")
    return rank


# --- NRRD -----------------------------------------------------------------------------------


def _nrrd_fields(name: str, path: Path) -> tuple[dict[str, str], int]:
    """Fields by lower-case name, and where the attached data begins."""
    with path.open("rb") as file:
        start = file.read(HEADER_LIMIT)
    end = re.search(rb"\r?\n\r?\n", start)
    header = start[: end.start()] if end else start
    if not end and len(start) == HEADER_LIMIT:
        raise ScanError(f"{name}: the NRRD header does not end; the file is corrupt.")
    fields = {}
    for line in header.decode("utf-8", "replace").splitlines()[1:]:
        key, colon, value = line.partition(":")
        if colon and not line.startswith("#") and not value.startswith("="):
            fields[key.strip().lower().replace(" ", "")] = value.strip()
    return fields, end.end() if end else len(start)


def _nrrd_block(
    name: str, path: Path, fields: dict[str, str], length: int
) -> tuple[_Block, int | None]:
    """Where the voxels are, and the axis of volumes or components, if there is one."""
    rank = _dimension(name, fields.get("dimension", ""))
    shape = _sizes(name, "sizes", fields.get("sizes", ""), rank)
    kind = fields.get("type", "").lower()
    code = next((code for code, names in NRRD_TYPES.items() if kind in names), None)
    if code is None:
        raise ScanError(f"{name}: voxel type {kind!r} is not supported; save it as float.")
    order = ">" if fields.get("endian", "little").lower() == "big" else "<"
    encoding = fields.get("encoding", "raw").lower()
    encoding = {"gz": "gzip", "bz2": "bzip2"}.get(encoding, encoding)
    if encoding not in ("raw", "gzip", "bzip2"):
        raise ScanError(f"{name}: encoding {encoding!r} is not supported; save it as gzip.")
    data_file = fields.get("datafile")
    if data_file is not None:
        path, length = _beside(name, path, data_file), 0
    elif path.suffix.lower() == ".nhdr":
        raise ScanError(f"{name}: the header does not name its data file; use a .nrrd file.")
    skip = int(_numbers(name, "byte skip", fields.get("byteskip", "0"), 1)[0])
    if skip < -1 or fields.get("lineskip", "0") != "0" or (skip and encoding != "raw"):
        raise ScanError(f"{name}: skipping lines or bytes is not supported; save it again.")
    block = _Block(
        path=path,
        offset=length + max(skip, 0),
        dtype=np.dtype(order + code),
        shape=shape,
        encoding=encoding,
        whole_tail=skip == -1,
    )
    return block, _spare_axis(name, fields) if rank == 4 else None


def _spare_axis(name: str, fields: dict[str, str]) -> int:
    """The axis of a 4D file that is not an axis of space."""
    directions = re.findall(r"none|\([^)]*\)", fields.get("spacedirections", ""))
    if directions.count("none") == 1 and len(directions) == 4:
        return directions.index("none")
    kinds = fields.get("kinds", "").lower().split()
    spatial = [kind in ("domain", "space") for kind in kinds]
    if len(kinds) == 4 and spatial.count(False) == 1:
        return spatial.index(False)
    return 3


def _nrrd_affine(
    name: str, fields: dict[str, str], drop: int | None
) -> tuple[np.ndarray, str, list[str]]:
    notes: list[str] = []
    affine = np.eye(4)
    space = fields.get("space", "").lower()
    if "spacedirections" not in fields:
        spacings = fields.get("spacings", "1 1 1" if drop is None else "1 1 1 1")
        numbers = _numbers(name, "spacings", spacings)
        numbers = [mm for axis, mm in enumerate(numbers) if axis != drop]
        if len(numbers) != 3 or any(not math.isfinite(mm) or mm <= 0 for mm in numbers):
            raise ScanError(f"{name}: 'spacings' is {spacings!r}, which is no voxel spacing.")
        affine[:3, :3] = np.diag(numbers)
        notes.append("orientation unknown: the file has no space directions")
        return affine, "unknown", notes
    vectors = re.findall(r"\(([^)]*)\)", fields["spacedirections"])
    if len(vectors) != 3:
        raise ScanError(f"{name}: 'space directions' has {len(vectors)} vectors instead of 3.")
    for axis, vector in enumerate(vectors):
        affine[:3, axis] = _numbers(name, "space directions", vector.replace(",", " "), 3)
    origin = fields.get("spaceorigin", "(0,0,0)").strip("() ").replace(",", " ")
    affine[:3, 3] = _numbers(name, "space origin", origin, 3)
    if space in TO_LPS:
        return TO_LPS[space] @ affine, "LPS", notes
    notes.append(f"orientation unknown: the space is {space or 'not given'!r}, taken as LPS")
    return affine, "unknown", notes


# --- MetaImage ------------------------------------------------------------------------------


def _meta_fields(name: str, path: Path) -> tuple[dict[str, str], int]:
    with path.open("rb") as file:
        start = file.read(HEADER_LIMIT)
    end = re.search(rb"(?im)^ElementDataFile\s*=[^\n]*\n?", start)
    if not end:
        raise ScanError(f"{name}: the MetaImage header names no ElementDataFile; it is corrupt.")
    fields = {}
    for line in start[: end.end()].decode("utf-8", "replace").splitlines():
        key, equals, value = line.partition("=")
        if equals:
            fields[key.strip().lower()] = value.strip()
    return fields, end.end()


def _meta_block(name: str, path: Path, fields: dict[str, str], length: int) -> _Block:
    rank = _dimension(name, fields.get("ndims", ""))
    shape = _sizes(name, "DimSize", fields.get("dimsize", ""), rank)
    if rank == 4 and shape[3] != 1:
        raise ScanError(f"{name}: it holds {shape[3]} volumes (4D); save one of them as 3D.")
    if fields.get("elementnumberofchannels", "1") != "1":
        raise ScanError(f"{name}: it has several values per voxel; give a grey volume.")
    code = META_TYPES.get(fields.get("elementtype", "").upper())
    if code is None:
        kind = fields.get("elementtype", "")
        raise ScanError(f"{name}: voxel type {kind!r} is not supported; save it as float.")

    def is_true(*keys: str) -> bool:
        return any(fields.get(key, "false").lower() == "true" for key in keys)

    if fields.get("binarydata", "true").lower() != "true":
        raise ScanError(f"{name}: text voxels are not supported; save it as binary.")
    data_file = fields["elementdatafile"]
    if data_file.upper() != "LOCAL":
        if data_file.upper().startswith("LIST") or "%" in data_file:
            raise ScanError(f"{name}: voxels spread over files are not supported; save one file.")
        path, length = _beside(name, path, data_file), 0
    header_size = int(_numbers(name, "HeaderSize", fields.get("headersize", "0"), 1)[0])
    if header_size < -1:
        raise ScanError(f"{name}: HeaderSize is {header_size}; the header is corrupt.")
    order = ">" if is_true("elementbyteordermsb", "binarydatabyteordermsb") else "<"
    return _Block(
        path=path,
        offset=length + max(header_size, 0),
        dtype=np.dtype(order + code),
        shape=shape[:3],
        encoding="zlib" if is_true("compresseddata") else "raw",
        whole_tail=header_size == -1,
    )


def _meta_affine(name: str, fields: dict[str, str]) -> tuple[np.ndarray, str, list[str]]:
    rank = int(float(fields["ndims"]))

    def numbers(keys: tuple[str, ...], default: list[float], count: int) -> np.ndarray:
        for key in keys:
            if key in fields:
                return np.array(_numbers(name, key, fields[key], count))
        return np.array(default)

    spacing = numbers(("elementspacing", "elementsize"), [1.0] * rank, rank)[:3]
    if not np.isfinite(spacing).all() or (spacing <= 0).any():
        raise ScanError(f"{name}: the voxel spacing is {spacing.tolist()}; it must be positive.")
    keys = ("transformmatrix", "rotation", "orientation")
    # one row of the matrix is the direction of one axis, in LPS
    rows = numbers(keys, list(np.eye(rank).ravel()), rank * rank).reshape(rank, rank)
    affine = np.eye(4)
    affine[:3, :3] = rows[:3, :3].T * spacing
    affine[:3, 3] = numbers(("offset", "position", "origin"), [0.0] * rank, rank)[:3]
    if any(key in fields for key in keys):
        return affine, "LPS", []
    return affine, "unknown", ["orientation unknown: the file has no TransformMatrix"]
