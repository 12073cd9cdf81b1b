"""Decoding the pixels of DICOM slices and frames, compressed or not, to physical values."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import gdcm
import numpy as np
import pydicom
from pydicom.encaps import generate_frames
from pydicom.pixels import get_decoder
from pydicom.pixels.processing import apply_modality_lut
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from med3dvlm.scan.blocks import MAX_RATIO, SMALL_BYTES
from med3dvlm.scan.scan import ScanError

DEFLATED = "1.2.840.10008.1.2.1.99"
JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
JPEG_LOSSY_12_BIT = (JPEG_EXTENDED, "1.2.840.10008.1.2.4.53", "1.2.840.10008.1.2.4.55")
"""Extended, and two retired processes: pydicom hands none of them to GDCM at 12 bits."""


def read_dataset(name: str, data: bytes, **options: Any) -> pydicom.Dataset:
    """Parse a DICOM file held in memory; `options` go to `pydicom.dcmread`.

    Raises:
        ScanError: where it is not DICOM, or inflates beyond reason.
    """
    _check_deflated(name, data)
    try:
        dataset = pydicom.dcmread(io.BytesIO(data), force=True, **options)
        _set_transfer_syntax(dataset)
        return dataset
    except Exception as error:  # corrupt files make pydicom raise nearly anything
        raise ScanError(
            f"{name}: it cannot be parsed as DICOM ({_short(error)}); copy it again."
        ) from error


def _set_transfer_syntax(dataset: pydicom.Dataset) -> None:
    """Old files without a preamble do not name it; how they were parsed tells."""
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        syntax = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else syntax


def _check_deflated(name: str, data: bytes) -> None:
    """pydicom inflates a deflated file whole; make sure that it is no bomb first."""
    if DEFLATED.encode() not in data[:2048] or len(data) < 144:
        return
    start = 132 + 12 + struct.unpack("<I", data[140:144])[0]
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    size, rest = 0, data[start:]
    try:
        while rest and not inflate.eof:
            size += len(inflate.decompress(rest, 2**22))
            rest = inflate.unconsumed_tail
            if size > max(SMALL_BYTES, MAX_RATIO * len(data)):
                raise ScanError(f"{name}: it inflates beyond {size} bytes: a decompression bomb.")
    except zlib.error as error:
        raise ScanError(f"{name}: the deflated data is damaged; copy it again.") from error


def decode_slice(dataset: pydicom.Dataset, frame: int = 0) -> np.ndarray:
    """One frame (H, W) float32 in physical units: stored values with their rescale applied.

    Raises:
        ScanError: where the pixels cannot be decoded.
    """
    name = "DICOM slice"
    for index, stored in enumerate(stored_frames(name, dataset)):
        if index == frame:
            try:
                return rescaled(stored, dataset, *rescale_of(dataset, frame))
            except Exception as error:  # values that are no numbers
                raise ScanError(f"{name}: its rescale is unreadable ({_short(error)}).") from error
    raise ScanError(f"{name}: it has no frame {frame}.")


def stored_frames(name: str, dataset: pydicom.Dataset) -> Iterator[np.ndarray]:
    """Frames (H, W) of stored values in the order of the file.

    Raises:
        ScanError: where pixels are missing, damaged, of colour or in an unknown compression.
    """
    try:
        yield from _decoded(name, dataset)
    except ScanError:
        raise
    except BaseException as error:  # every decoder has errors of its own
        # pylibjpeg-rle panics on damaged data with what is not even an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ScanError(
            f"{name}: its pixel data cannot be decoded ({_short(error)}); it is truncated or "
            "damaged, copy it again."
        ) from error


def _decoded(name: str, dataset: pydicom.Dataset) -> Iterator[np.ndarray]:
    if int(dataset.get("SamplesPerPixel", 1) or 1) != 1:
        raise ScanError(f"{name}: it holds colour, not intensities; give the original series.")
    if not any(key in dataset for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise ScanError(f"{name}: it has no pixel data; it is truncated, copy it again.")
    syntax = dataset.file_meta.TransferSyntaxUID
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    if syntax.is_encapsulated:
        frames = int(dataset.get("NumberOfFrames", 1) or 1)
        for data in generate_frames(dataset.PixelData, number_of_frames=frames):
            _check_frame_size(name, data, rows, columns)
    twelve = syntax in JPEG_LOSSY_12_BIT
    if twelve and (syntax != JPEG_EXTENDED or int(dataset.BitsStored) > 8):
        yield from _decode_jpeg_12_bit(dataset, rows, columns)
        return
    for frame, _ in get_decoder(syntax).iter_array(dataset, raw=True):
        if frame.shape != (rows, columns):
            raise ScanError(f"{name}: a frame is {frame.shape}, not {rows}×{columns}.")
        yield frame if syntax.is_encapsulated else _without_overlay(frame, dataset)


def _decode_jpeg_12_bit(dataset: pydicom.Dataset, rows: int, columns: int) -> Iterator[np.ndarray]:
    """GDCM directly: its decoder goes by the JPEG stream, and so reads all three processes."""
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    for data in generate_frames(dataset.PixelData, number_of_frames=frames):
        fragment = gdcm.Fragment()
        fragment.SetByteStringValue(data)
        fragments = gdcm.SequenceOfFragments.New()
        fragments.AddFragment(fragment)
        element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
        element.SetValue(fragments.__ref__())
        image = gdcm.Image()
        image.SetNumberOfDimensions(2)
        image.SetDimensions((columns, rows, 1))
        image.SetDataElement(element)
        kind = gdcm.PhotometricInterpretation.GetPIType("MONOCHROME2")
        image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(kind))
        syntax = gdcm.TransferSyntax.GetTSType(JPEG_EXTENDED)
        image.SetTransferSyntax(gdcm.TransferSyntax(syntax))
        bits = int(dataset.BitsStored)
        image.SetPixelFormat(gdcm.PixelFormat(1, 16, bits, bits - 1, 0))
        buffer = image.GetBuffer().encode("utf-8", "surrogateescape")
        pixels = np.frombuffer(buffer, "<u2")
        yield pixels.reshape(rows, columns)


def _check_frame_size(name: str, data: bytes, rows: int, columns: int) -> None:
    """Refuse a JPEG or JPEG 2000 stream of another size before a decoder allocates for it."""
    size = _jpeg_size(data)
    if size is not None and size != (rows, columns):
        raise ScanError(
            f"{name}: the compressed picture is {size[0]}×{size[1]} but the header says "
            f"{rows}×{columns}; the file is damaged."
        )


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(rows, columns) from the SOF marker of a JPEG or the SIZ marker of a JPEG 2000 stream."""
    if data[:4] == b"\xff\x4f\xff\x51" and len(data) >= 24:
        width, height, left, top = struct.unpack(">4I", data[8:24])
        return height - top, width - left
    at = 2
    while data[:2] == b"\xff\xd8" and at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        # SOF0-15 but for DHT, JPG and DAC, and JPEG-LS's SOF55
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            return struct.unpack(">2H", data[at + 5 : at + 9])  # type: ignore[return-value]
        at += 2 + length
    return None


def _without_overlay(frame: np.ndarray, dataset: pydicom.Dataset) -> np.ndarray:
    """Clear the bits around the stored ones (old files keep overlays there), extend the sign."""
    if frame.dtype.kind not in "iu":
        return frame
    allocated, stored = frame.dtype.itemsize * 8, int(dataset.get("BitsStored", 0) or 0)
    high = int(dataset.get("HighBit", stored - 1))
    if not 0 < stored < allocated or not stored - 1 <= high < allocated:
        return frame
    up = allocated - 1 - high
    # shifting left drops the bits above; shifting right (arithmetic if signed) those below
    return (frame << up) >> (allocated - stored)


def rescale_of(dataset: pydicom.Dataset, frame: int = 0) -> tuple[float, float]:
    """(slope, intercept) of a frame: its own, the shared one, or that of the whole file."""
    for item in functional_groups(dataset, frame):
        for transform in item.get("PixelValueTransformationSequence", None) or ():
            return (
                float(transform.get("RescaleSlope", 1)),
                float(transform.get("RescaleIntercept", 0)),
            )
    slope, intercept = dataset.get("RescaleSlope", 1), dataset.get("RescaleIntercept", 0)
    slope = 1.0 if slope is None else float(slope)
    return slope, 0.0 if intercept is None else float(intercept)


def functional_groups(dataset: pydicom.Dataset, frame: int) -> list[pydicom.Dataset]:
    """What an enhanced file says of one frame: its own groups first, then the shared ones."""
    groups = []
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence", None)
    if per_frame is not None and frame < len(per_frame):
        groups.append(per_frame[frame])
    shared = dataset.get("SharedFunctionalGroupsSequence", None)
    if shared:
        groups.append(shared[0])
    return groups


def rescaled(
    stored: np.ndarray, dataset: pydicom.Dataset, slope: float, intercept: float
) -> np.ndarray:
    """Stored values (H, W) to float32 in the file's units."""
    if "ModalityLUTSequence" in dataset and "RescaleSlope" not in dataset:
        return np.asarray(apply_modality_lut(stored, dataset), np.float32)
    if slope == 1.0 and intercept == 0.0:
        return stored.astype(np.float32)
    return (stored * np.float64(slope) + intercept).astype(np.float32)


def stored_range(dataset: pydicom.Dataset) -> tuple[int, int]:
    """Lowest and highest value the stored bits can hold."""
    bits = int(dataset.get("BitsStored", 16) or 16)
    if int(dataset.get("PixelRepresentation", 0) or 0):
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
