"""DICOM: classic series of slices, enhanced multi-frame files, folders and zips of them."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import UID

from med3dvlm.scan.assemble import AIR_HU, assemble, check_volume
from med3dvlm.scan.blocks import check_claim
from med3dvlm.scan.dicom_pixels import (
    functional_groups,
    read_dataset,
    rescale_of,
    rescaled,
    stored_frames,
    stored_range,
)
from med3dvlm.scan.dicom_series import (
    Header,
    Item,
    choose_series,
    frames_of,
    headers_of,
    is_dicom,
    items_of,
    series_of_file,
)
from med3dvlm.scan.scan import Scan, ScanError

Progress = Callable[[int, int], None]

SAME_PLACE_MM = 0.01
EVEN = 0.02
"""Steps that differ by less than this share of the usual one are even: rounded positions."""
JITTER = 0.1
"""Up to here steps are taken as even, with a warning; beyond, slices are resampled."""
GAP = 1.5
"""A step this many times the usual one means missing slices."""
UNEVEN_LIMIT = 4.0
"""Series whose largest step is more than this many times the smallest are not resampled."""

CT_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.2.1",
    "1.2.840.10008.5.1.4.1.1.2.2",
)
MR_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.4",
    "1.2.840.10008.5.1.4.1.1.4.1",
    "1.2.840.10008.5.1.4.1.1.4.4",
)
META = {
    "series_description": "SeriesDescription", "slice_thickness_mm": "SliceThickness",
    "convolution_kernel": "ConvolutionKernel", "contrast_agent": "ContrastBolusAgent",
    "manufacturer": "Manufacturer", "model": "ManufacturerModelName", "kvp": "KVP",
    "body_part": "BodyPartExamined", "patient_position": "PatientPosition",
}  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """One plane in space: a file, or one frame of a multi-frame file."""

    header: Header
    frame: int
    position: np.ndarray  # (3,) LPS mm, centre of the first pixel
    directions: np.ndarray  # (2, 3): along a row, down a column
    spacing: tuple[float, float]  # mm between rows, between columns
    order: tuple[float, ...]  # which of several slices at one place comes first


def read_dicom(
    path: Path,
    *,
    series: str | int | None = None,
    frame: int | None = None,
    progress: Progress | None = None,
) -> Scan:
    """Read the one image series of a folder, a zip, or beside a file.

    Args:
        series: SeriesInstanceUID or SeriesNumber, where there are several.
        frame: which volume, from 0, where several lie at the same place (phases, echoes).
        progress: called with (files done, files in all).

    Raises:
        ScanError: where there is no series, more than one, or it is no sound volume.
    """
    with ExitStack() as stack:  # a zip stays open until its slices are decoded
        return _read(path, items_of(path, stack), series=series, frame=frame, progress=progress)


def _read(
    path: Path,
    items: Iterable[Item],
    *,
    series: str | int | None,
    frame: int | None,
    progress: Progress | None,
) -> Scan:
    name = str(path)
    notes: list[str] = []
    if path.is_dir() or not is_dicom(path):
        headers = list(headers_of(name, items, notes))
    else:
        headers = series_of_file(path, items, notes)
    headers = choose_series(name, headers, series, notes)
    slices = [one for header in headers for one in slices_of(header)]
    slices, shape = _sorted_slices(name, slices, frame)
    volume = _decode(slices, shape, notes, progress)
    volume, slices = _drop_duplicates(name, volume, slices, notes)
    volume, affine = _even_grid(name, volume, slices, notes)
    return assemble(
        volume.transpose(2, 1, 0),
        affine,
        source=name,
        notes=notes,
        modality=_modality(headers[0].dataset, notes),
        other_units=_other_units(slices[0]),
        meta=_meta(headers[0].dataset, len(slices)),
    )


# --- planes ---------------------------------------------------------------------------------


def slices_of(header: Header) -> Iterator[Slice]:
    """The planes of a file: one, or one for each frame.

    Raises:
        ScanError: where the header does not say where they lie, or claims the impossible.
    """
    dataset, name = header.dataset, header.item.name
    frames = frames_of(header)
    try:
        rows, columns = int(dataset.Rows), int(dataset.Columns)
        bits = int(dataset.get("BitsAllocated", 16) or 16)
        syntax = UID(str(dataset.file_meta.get("TransferSyntaxUID", "1.2.840.10008.1.2")))
        packed = syntax.is_encapsulated or syntax.is_deflated
    except Exception as error:  # unknown transfer syntaxes and values that are no numbers
        raise ScanError(f"{name}: size or compression of its pixels is unreadable.") from error
    if rows < 1 or columns < 1 or frames > 1_000_000:
        raise ScanError(f"{name}: it claims {frames} frames of {rows}×{columns} pixels.")
    check_claim(name, (frames, rows, columns), bits / 8, header.stored, compressed=packed)
    if frames > 1 and len(dataset.get("PerFrameFunctionalGroupsSequence", None) or ()) != frames:
        raise ScanError(
            f"{name}: it claims {frames} frames but does not say where each of them lies; export "
            "the original series again."
        )
    for frame in range(frames):
        yield _plane(header, frame)


def _plane(header: Header, frame: int) -> Slice:
    dataset, name = header.dataset, header.item.name
    groups = functional_groups(dataset, frame)

    def find(sequence: str, keyword: str) -> Any:
        for group in groups:
            for item in group.get(sequence, None) or ():
                if item.get(keyword, None) is not None:
                    return item.get(keyword)
        return dataset.get(keyword, None)

    position = _vector(name, "ImagePositionPatient",
                       find("PlanePositionSequence", "ImagePositionPatient"), 3)  # fmt: skip
    both = _vector(name, "ImageOrientationPatient",
                   find("PlaneOrientationSequence", "ImageOrientationPatient"), 6)  # fmt: skip
    spacing = _vector(name, "PixelSpacing", find("PixelMeasuresSequence", "PixelSpacing"), 2)
    directions = both.reshape(2, 3)
    lengths = np.linalg.norm(directions, axis=1)
    if (abs(lengths - 1) > 0.01).any() or abs(directions[0] @ directions[1]) > 0.01:
        raise ScanError(f"{name}: ImageOrientationPatient {both.tolist()} are no directions.")
    if (spacing <= 0).any():
        raise ScanError(f"{name}: PixelSpacing is {spacing.tolist()} mm; it must be positive.")
    # exactly at right angles, as six rounded decimals are not
    across = directions[0] / lengths[0]
    down = directions[1] - (directions[1] @ across) * across
    content = groups[0].get("FrameContentSequence", None) if groups else None
    time = content[0].get("TemporalPositionIndex", None) if content else None
    order = (
        time or dataset.get("TemporalPositionIdentifier", None),
        dataset.get("AcquisitionNumber", None),
        dataset.get("InstanceNumber", None),
        frame,
    )
    return Slice(
        header=header,
        frame=frame,
        position=position,
        directions=np.stack([across, down / np.linalg.norm(down)]),
        spacing=(float(spacing[0]), float(spacing[1])),
        order=tuple(_number(value) for value in order),
    )


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def _vector(name: str, keyword: str, value: Any, count: int) -> np.ndarray:
    try:
        vector = np.array([float(number) for number in value], np.float64)
    except (TypeError, ValueError):
        vector = np.empty(0)
    if len(vector) != count or not np.isfinite(vector).all():
        given = "missing" if value is None else "unreadable"
        raise ScanError(
            f"{name}: {keyword} is {given}, so its place in the volume is unknown; export the "
            "original series again."
        )
    return vector


def _sorted_slices(
    name: str, slices: list[Slice], frame: int | None
) -> tuple[list[Slice], tuple[int, int]]:
    """Slices along their normal, those at one place side by side, and (H, W)."""
    first = slices[0]
    if len(slices) < 2:
        raise ScanError(
            f"{name}: a single 2D image is not a volume; give the folder of the whole series."
        )
    shape = (int(first.header.dataset.Rows), int(first.header.dataset.Columns))
    for one in slices:
        size = (int(one.header.dataset.Rows), int(one.header.dataset.Columns))
        if size != shape:
            raise ScanError(
                f"{name}: its slices have different sizes, {shape[0]}×{shape[1]} and "
                f"{size[0]}×{size[1]}; give one series of one size."
            )
        if not np.allclose(one.spacing, first.spacing, rtol=1e-3):
            raise ScanError(
                f"{name}: its slices have different pixel spacings, {first.spacing} and "
                f"{one.spacing} mm; give one series."
            )
        if not np.allclose(one.directions, first.directions, atol=2e-3):
            raise ScanError(
                f"{name}: its slices lie in different orientations (a localizer or several "
                "stacks); give one parallel series."
            )
    along = _along(slices)
    # to a hundredth of a mm, so that slices at one place are in the order of their volumes
    ranks = sorted(range(len(slices)), key=lambda i: (round(along[i], 2), slices[i].order))
    slices = _one_of_several(name, [slices[i] for i in ranks], frame)
    check_volume(name, (len(slices), *shape))
    _check_limits(name, slices, shape)
    return slices, shape


def _along(slices: list[Slice]) -> np.ndarray:
    """(n,) mm along the normal of the slices."""
    normal = np.cross(*slices[0].directions)
    return np.array([one.position @ normal for one in slices])


def _places(slices: list[Slice]) -> tuple[np.ndarray, np.ndarray]:
    """Where each place in a sorted list of slices begins, and how many slices it has."""
    starts = np.flatnonzero(np.diff(_along(slices), prepend=-np.inf) > SAME_PLACE_MM)
    return starts, np.diff(starts, append=len(slices))


def _one_of_several(name: str, slices: list[Slice], frame: int | None) -> list[Slice]:
    """Where every place holds several slices (phases, echoes) and `frame` picks, those it picks."""
    starts, counts = _places(slices)
    several = int(counts[0]) if (counts == counts[0]).all() and len(counts) > 1 else 1
    if frame is None:
        return slices  # where several are: the same slices twice, or 4D; their voxels will tell
    if not 0 <= frame < several:
        raise ScanError(f"{name}: frame={frame} is not among its volumes, {several} (from 0).")
    return [slices[i + frame] for i in starts]


def _check_limits(name: str, slices: list[Slice], shape: tuple[int, int]) -> None:
    """Every file's claim was checked alone; here the volume they make together."""
    headers = {id(one.header): one.header for one in slices}.values()
    stored = sum(header.stored for header in headers)
    check_claim(name, (len(slices), *shape), 1, stored, compressed=True)


# --- pixels ---------------------------------------------------------------------------------


def _decode(
    slices: list[Slice],
    shape: tuple[int, int],
    notes: list[str],
    progress: Progress | None,
) -> np.ndarray:
    """(K, H, W) float32 in physical units."""
    volume = np.empty((len(slices), *shape), np.float32)
    targets: dict[int, dict[int, int]] = defaultdict(dict)
    headers: dict[int, Header] = {}
    for k, one in enumerate(slices):
        targets[id(one.header)][one.frame] = k
        headers[id(one.header)] = one.header
    inverted = np.full(len(slices), np.nan)
    for done, (key, header) in enumerate(headers.items()):
        dataset = read_dataset(header.item.name, header.item.read())
        wanted = targets[key]
        for frame, stored in enumerate(stored_frames(header.item.name, dataset)):
            if frame in wanted:
                k = wanted.pop(frame)
                volume[k], inverted[k] = _physical(header.item.name, stored, dataset, frame)
        if wanted:
            raise ScanError(
                f"{header.item.name}: frame {min(wanted)} is missing; it is truncated, copy it "
                "again."
            )
        if progress:
            progress(done + 1, len(headers))
    _invert(volume, inverted, slices[0].header.dataset.get("Modality", None) == "CT", notes)
    return volume


def _physical(
    name: str, stored: np.ndarray, dataset: pydicom.Dataset, frame: int
) -> tuple[np.ndarray, float]:
    """(H, W) in physical units, and for MONOCHROME1 the sum that inverts it, else NaN."""
    slope, intercept = rescale_of(dataset, frame)
    if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
        raise ScanError(
            f"{name}: its rescale (slope {slope:g}, intercept {intercept:g}) is no scale; export "
            "the original series again."
        )
    plane = rescaled(stored, dataset, slope, intercept)
    if dataset.get("PhotometricInterpretation", "") == "MONOCHROME1":
        low, high = stored_range(dataset)
        return plane, slope * (low + high) + 2 * intercept
    padding = _padding(dataset)
    if padding is not None and dataset.get("Modality", None) == "CT":
        level = padding * slope + intercept
        # in the range of tissue it cannot be told from tissue
        if not -1000 < level < 3071:
            plane[stored == padding] = AIR_HU
    return plane, math.nan


def _padding(dataset: pydicom.Dataset) -> int | None:
    value = dataset.get("PixelPaddingValue", None)
    if not isinstance(value, int):
        return None
    bits = int(dataset.get("BitsAllocated", 16))
    signed = int(dataset.get("PixelRepresentation", 0) or 0)
    # often written with the wrong sign
    if signed and value >= 2 ** (bits - 1):
        return value - 2**bits
    return value + 2**bits if not signed and value < 0 else value


def _invert(volume: np.ndarray, sums: np.ndarray, is_ct: bool, notes: list[str]) -> None:
    """Turn MONOCHROME1 (low is white) round, in place.

    By the standard the rescale of a CT gives HU whatever MONOCHROME1 says of its display, but
    some writers invert the stored values too: the air around the patient tells.
    """
    if np.isnan(sums).any():
        return
    if is_ct:
        border = np.concatenate([volume[:, 0].ravel(), volume[:, -1].ravel()])
        middle = volume[:, volume.shape[1] // 4 : -(volume.shape[1] // 4) or None]
        if np.median(border) <= np.median(middle[:: max(1, len(middle) // 16)]):
            notes.append("MONOCHROME1: only its display is inverted, HU kept as they are")
            return
    for plane, total in zip(volume, sums, strict=True):
        np.subtract(np.float32(total), plane, out=plane)
    if is_ct and float(volume.max()) > 20_000:  # inverted within the values used, not the bits
        low, high = float(volume.min()), float(volume.max())
        volume -= np.float32(low - AIR_HU) if high - low < 20_000 else np.float32(0)
    notes.append("MONOCHROME1: inverted, so that bright is high")


def _drop_duplicates(
    name: str, volume: np.ndarray, slices: list[Slice], notes: list[str]
) -> tuple[np.ndarray, list[Slice]]:
    """One slice per place: copies are dropped, different ones refused."""
    starts, counts = _places(slices)
    if (counts == 1).all():
        return volume, slices
    for start, count in zip(starts, counts, strict=True):
        for k in range(start + 1, start + count):
            if not np.array_equal(volume[k], volume[start]):
                _refuse_overlap(name, slices, counts, start)
    notes.append(f"{len(slices) - len(starts)} slices are there twice: the copies were dropped")
    return volume[starts], [slices[i] for i in starts]


def _refuse_overlap(name: str, slices: list[Slice], counts: np.ndarray, at: int) -> None:
    if (counts == counts[0]).all() and len(counts) > 1:
        raise ScanError(
            f"{name}: it holds {counts[0]} volumes at the same place (4D: phases, echoes or "
            f"repeats); choose one with frame=0 … frame={counts[0] - 1}."
        )
    where = ", ".join(f"{mm:.2f}" for mm in slices[at].position)
    raise ScanError(
        f"{name}: different slices lie at the same position ({where}) mm; take away those that "
        "are not part of the scan."
    )


# --- grid -----------------------------------------------------------------------------------


def _even_grid(
    name: str, volume: np.ndarray, slices: list[Slice], notes: list[str]
) -> tuple[np.ndarray, np.ndarray]:
    """The volume on evenly spaced slices and its affine, index (column, row, slice) → LPS mm."""
    if len(slices) < 2:
        raise ScanError(
            f"{name}: a single 2D image is not a volume; give the folder of the whole series."
        )
    along = _along(slices)
    positions = np.array([one.position for one in slices])
    first, last = positions[0], positions[-1]
    course = (last - first) / (along[-1] - along[0])  # mm in space per mm along the normal
    aside = np.linalg.norm(positions - first - np.outer(along - along[0], course), axis=1)
    if aside.max() > max(0.5, 0.5 * min(slices[0].spacing)):
        k = int(aside.argmax())
        raise ScanError(
            f"{name}: {slices[k].header.item.name} lies {aside[k]:.1f} mm aside of the line of "
            "the other slices; give slices of one stack."
        )
    step = _step(name, slices, along, notes)
    if step is None:
        step = _usual(np.diff(along))
        volume = _resample_slices(volume, along, step)
    spacing = slices[0].spacing
    affine = np.eye(4)
    affine[:3, 0] = slices[0].directions[0] * spacing[1]
    affine[:3, 1] = slices[0].directions[1] * spacing[0]
    affine[:3, 2] = course * step
    affine[:3, 3] = first
    return volume, affine


def _usual(steps: np.ndarray) -> float:
    return float(np.quantile(steps, 0.5, method="lower"))


def _step(name: str, slices: list[Slice], along: np.ndarray, notes: list[str]) -> float | None:
    """Distance of even slices, mm; None where they are uneven and have to be resampled."""
    steps = np.diff(along)
    usual, even = _usual(steps), float(along[-1] - along[0]) / len(steps)
    off = float(abs(steps - usual).max()) / usual
    # positions are often rounded to 0.1 mm, and rounding does not add up along the stack
    drift = float(abs(along - along[0] - even * np.arange(len(along))).max()) / even
    if off <= JITTER or (abs(steps - usual).max() <= 0.11 and drift <= 0.5):
        if off > EVEN:
            notes.append(
                f"slice distances vary by up to {100 * off:.0f}% of {usual:.3g} mm: taken as even"
            )
        return even
    gaps = np.flatnonzero(steps > GAP * usual)
    if 0 < len(gaps) <= max(1, 0.1 * len(steps)):
        low, high = (slices[gaps[0] + i].position for i in (0, 1))
        axis = int(abs(high - low).argmax())
        raise ScanError(
            f"{name}: slices are missing: {steps[gaps[0]]:.4g} mm between "
            f"{'xyz'[axis]}={low[axis]:.2f} and {high[axis]:.2f} mm where the others are "
            f"{usual:.4g} mm apart ({len(gaps)} gaps); export the whole series."
        )
    if steps.max() > UNEVEN_LIMIT * steps.min():
        raise ScanError(
            f"{name}: the slices are {steps.min():.4g} to {steps.max():.4g} mm apart, too uneven "
            "for a volume; give one evenly spaced series."
        )
    notes.append(
        f"unevenly spaced slices ({steps.min():.4g} to {steps.max():.4g} mm): resampled to every "
        f"{usual:.4g} mm by linear interpolation"
    )
    return None


def _resample_slices(volume: np.ndarray, along: np.ndarray, step: float) -> np.ndarray:
    """(K', H, W) at every `step` mm from the first slice on, by linear interpolation."""
    targets = np.arange(along[0], along[-1] + 1e-3 * step, step)
    even = np.empty((len(targets), *volume.shape[1:]), np.float32)
    for k, mm in enumerate(targets):
        above = int(np.clip(np.searchsorted(along, mm), 1, len(along) - 1))
        share = (mm - along[above - 1]) / (along[above] - along[above - 1])
        share = np.float32(np.clip(share, 0, 1))
        even[k] = volume[above - 1] * (1 - share) + volume[above] * share
    return even


# --- facts ----------------------------------------------------------------------------------


def _modality(dataset: pydicom.Dataset, notes: list[str]) -> str | None:
    given = str(dataset.get("Modality", "") or "").strip() or None
    uid = str(dataset.get("SOPClassUID", ""))
    implied = "CT" if uid in CT_CLASSES else "MR" if uid in MR_CLASSES else None
    if implied and given != implied:
        notes.append(
            f"modality conflict: Modality says {given or 'nothing'}, the SOP class says {implied}; "
            + ("Modality is believed" if given else "the class is believed")
        )
    return given or implied


def _other_units(one: Slice) -> str | None:
    """The RescaleType where it is neither HU nor unspecified: spectral and perfusion maps."""
    dataset = one.header.dataset
    kinds = [dataset.get("RescaleType", None)]
    for group in functional_groups(dataset, one.frame):
        for transform in group.get("PixelValueTransformationSequence", None) or ():
            kinds.append(transform.get("RescaleType", None))
    kind = str(next((kind for kind in kinds if kind), "")).upper()
    return kind if kind not in ("", "HU", "US") else None


def _meta(dataset: pydicom.Dataset, count: int) -> dict[str, Any]:
    meta: dict[str, Any] = {"slices": count}
    for key, keyword in META.items():
        value = dataset.get(keyword, None)
        if value not in (None, ""):
            meta[key] = float(value) if isinstance(value, float) else str(value)
    date = str(dataset.get("StudyDate", None) or "")
    if re.fullmatch(r"\d{8}", date):
        meta["study_date"] = f"{date[:4]}-{date[4:6]}-{date[6:]}"
    return meta
