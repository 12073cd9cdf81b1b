"""Reading the voxel block that a header promises, never more than the file can hold."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from isal import igzip, isal_zlib

from med3dvlm.scan.scan import ScanError

MAX_VOXELS = 1_500_000_000
"""Largest volume read: 512×512×5700, 6 GB as float32."""

SMALL_BYTES = 256 * 2**20
"""Below this a claim is harmless, however well the file is compressed."""

MAX_RATIO = 100
"""Real scans compress 2 to 20 times; a large block that claims more is a bomb."""

MAX_TRAILING = 16 * 2**20
"""Bytes behind the voxels that are still read, to reach the checksum of a gzip stream."""


def check_claim(
    name: str, shape: Sequence[int], itemsize: float, stored: int, *, compressed: bool
) -> None:
    """Refuse, before anything is allocated, a size that the file cannot honestly hold.

    Args:
        shape: voxels along each axis, all positive.
        itemsize: bytes per voxel before compression.
        stored: bytes that the file (or its part) has for the voxels.

    Raises:
        ScanError: for too many voxels, too little data, or an implausible compression.
    """
    voxels = math.prod(int(n) for n in shape)
    size = "×".join(str(n) for n in shape)
    if voxels > MAX_VOXELS:
        raise ScanError(
            f"{name}: the header claims {size} voxels, more than the limit of {MAX_VOXELS:.1e}; "
            "check that the header is not corrupt."
        )
    claimed = voxels * itemsize
    if not compressed and claimed > stored:
        raise ScanError(
            f"{name}: the header claims {size} voxels ({claimed:.0f} bytes) but the file holds "
            f"only {max(0, stored)} bytes of them; it is truncated, copy it again."
        )
    # deflate cannot exceed 1032:1, whatever the data
    if compressed and claimed > 1100 * stored + 2**16:
        raise ScanError(
            f"{name}: the header claims {size} voxels, more than {stored} compressed bytes can "
            "hold; the file is corrupt or truncated, copy it again."
        )
    if compressed and max(claimed, 4 * voxels) > SMALL_BYTES and claimed > MAX_RATIO * stored:
        raise ScanError(
            f"{name}: {size} voxels out of {stored} compressed bytes looks like a decompression "
            "bomb, not a scan; if it is real, store it uncompressed."
        )


def read_gzip(name: str, file: BinaryIO, offset: int, size: int) -> bytearray:
    """`size` bytes from `offset` of a gzip stream, which is read to its end for its checksum."""
    try:
        with igzip.IGzipFile(fileobj=file) as stream:
            _skip(name, stream, offset)
            block = bytearray(size)
            _fill(name, stream, block)
            if len(stream.read(MAX_TRAILING)) == MAX_TRAILING:
                raise ScanError(
                    f"{name}: the compressed data goes on far beyond the voxels the header "
                    "claims; the header is wrong or the file is a decompression bomb."
                )
            return block
    except (EOFError, OSError, isal_zlib.error) as error:  # pyright: ignore[reportGeneralTypeIssues]
        raise ScanError(
            f"{name}: the gzip stream is damaged ({error}); copy or download the file again."
        ) from error


def read_zlib(name: str, data: bytes, size: int) -> bytes:
    """`size` bytes from a zlib stream, as MetaImage stores them."""
    try:
        block = zlib.decompressobj().decompress(data, size + 1)
    except zlib.error as error:
        raise ScanError(
            f"{name}: the compressed voxels are damaged ({error}); copy the file again."
        ) from error
    if len(block) != size:
        raise ScanError(
            f"{name}: the compressed voxels are {'more' if len(block) > size else 'fewer'} than "
            "the header claims; the file is corrupt or truncated."
        )
    return block


def read_raw(name: str, path: Path, offset: int, dtype: np.dtype, count: int) -> np.ndarray:
    """`count` values of `dtype` from `offset` of a plain file."""
    with path.open("rb") as file:
        file.seek(offset)
        values = np.fromfile(file, dtype, count)
    if values.size < count:
        raise ScanError(
            f"{name}: {values.size} of {count} voxels are there; it is truncated, copy it again."
        )
    return values


def _skip(name: str, stream: BinaryIO | gzip.GzipFile, offset: int) -> None:
    while offset > 0:
        part = stream.read(min(offset, 2**20))
        if not part:
            raise ScanError(f"{name}: the file ends before its voxels begin; copy it again.")
        offset -= len(part)


def _fill(name: str, stream: BinaryIO | gzip.GzipFile, block: bytearray) -> None:
    view, done = memoryview(block), 0
    while done < len(block):
        part = stream.readinto(view[done : done + 2**22])  # type: ignore[union-attr]
        if not part:
            raise ScanError(
                f"{name}: {done} of the {len(block)} bytes of voxels the header claims are "
                "there; it is truncated, copy it again."
            )
        done += part
