"""DICOM: classic series of slices, enhanced multi-frame files, folders and zips of them."""

from __future__ import annotations

import math
import os
import stat
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import UID

from med3dvlm.scan.assemble import AIR_HU, assemble, check_volume
from med3dvlm.scan.blocks import SMALL_BYTES, check_claim
from med3dvlm.scan.dicom_pixels import (
    functional_groups,
    read_dataset,
    rescale_of,
    rescaled,
    stored_frames,
    stored_range,
)
from med3dvlm.scan.scan import Scan, ScanError

Progress = Callable[[int, int], None]

MAX_FILES = 100_000
MAX_ZIP_BYTES = 8 * 2**30
ZIP_RATIO = 50
"""DICOM slices in a zip shrink 2 to 10 times."""

SAME_PLACE_MM = 0.01
EVEN = 0.02
"""Steps that differ by less than this share of the usual one are even: rounded positions."""
JITTER = 0.1
"""Up to here steps are taken as even, with a warning; beyond, slices are resampled."""
GAP = 1.5
"""A step this many times the usual one means missing slices."""
UNEVEN_LIMIT = 4.0
"""Series whose largest step is more than this many times the smallest are not resampled."""

NO_IMAGE = {
    "1.2.840.10008.5.1.4.1.1.66.4": "segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "segmentation",
    "1.2.840.10008.5.1.4.1.1.481.2": "radiotherapy dose",
    "1.2.840.10008.5.1.4.1.1.30": "parametric map",
}
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
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
HEADER_TAGS = [
    "SpecificCharacterSet", "ImageType", "SOPClassUID", "SOPInstanceUID", "Modality",
    "SeriesDescription", "SeriesInstanceUID", "SeriesNumber", "AcquisitionNumber",
    "InstanceNumber", "TemporalPositionIdentifier", "SliceThickness", "ConvolutionKernel",
    "ContrastBolusAgent", "Manufacturer", "ManufacturerModelName", "KVP", "BodyPartExamined",
    "PatientPosition", "GantryDetectorTilt", "ImagePositionPatient", "ImageOrientationPatient",
    "PixelSpacing", "Rows", "Columns", "NumberOfFrames", "BitsAllocated", "BitsStored",
    "SamplesPerPixel", "PixelRepresentation", "PhotometricInterpretation", "PixelPaddingValue",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "ModalityLUTSequence",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
META = {
    "series_description": "SeriesDescription", "slice_thickness_mm": "SliceThickness",
    "convolution_kernel": "ConvolutionKernel", "contrast_agent": "ContrastBolusAgent",
    "manufacturer": "Manufacturer", "model": "ManufacturerModelName", "kvp": "KVP",
    "body_part": "BodyPartExamined", "patient_position": "PatientPosition",
}  # fmt: skip


@dataclass(frozen=True)
class Item:
    """One file, on disk or in a zip."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Header:
    """What a file says of itself, without its pixels."""

    item: Item
    dataset: pydicom.Dataset
    stored: int  # bytes of the file


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
        return _read(path, _items(path, stack), series=series, frame=frame, progress=progress)


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
        headers = list(_headers(name, items, notes))
    else:
        headers = _series_of_file(path, items, notes)
    headers = _choose_series(name, headers, series, notes)
    slices = [one for header in headers for one in _slices(header)]
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


# --- files ----------------------------------------------------------------------------------


def _items(path: Path, stack: ExitStack) -> Iterable[Item]:
    """The files of a folder (and its folders), of a zip, or of a file's own folder."""
    if path.is_dir():
        return files_under(path)
    if zipfile.is_zipfile(path) and not is_dicom(path):
        return _zip_members(path, stack)
    beside = [one for one in sorted(path.parent.iterdir()) if _is_regular(one)]
    return [Item(str(one), one.read_bytes) for one in beside if is_dicom(one)]


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does, with or without its preamble."""
    try:
        with path.open("rb") as file:
            return starts_as_dicom(file.read(140))
    except OSError:
        return False


def starts_as_dicom(start: bytes) -> bool:
    if start[128:132] == b"DICM":
        return True
    # without a preamble: an element of group 2 or 8, its value of known type or short
    bare = len(start) > 16 and start[:2] in (b"\x02\x00", b"\x08\x00") and start[3] == 0
    return bare and (start[4:6].isupper() or int.from_bytes(start[4:8], "little") < 256)


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def files_under(folder: Path) -> Iterator[Item]:
    """The DICOM files of a folder and of the folders in it."""
    count = 0
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            path = Path(parent, file)
            if not _is_regular(path) or not is_dicom(path):
                continue
            count += 1
            if count > MAX_FILES:
                raise ScanError(f"{folder}: more than {MAX_FILES} files; give one study's folder.")
            yield Item(str(path), path.read_bytes)


def _zip_members(path: Path, stack: ExitStack) -> Iterator[Item]:
    """Members are read in memory and never written, so their names can lead nowhere."""
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
        members = [info for info in archive.infolist() if not info.is_dir()]
        total, stored = sum(info.file_size for info in members), path.stat().st_size
        largest = max(members, key=lambda info: info.file_size, default=None)
        if largest and largest.file_size > 64 * 2**20:
            unfolds = largest.file_size > ZIP_RATIO * largest.compress_size
        else:
            unfolds = total > SMALL_BYTES and total > ZIP_RATIO * stored
        if total > MAX_ZIP_BYTES or unfolds:
            raise ScanError(
                f"{path}: its members claim {total} bytes out of {stored}: a decompression bomb, "
                "not a scan; if it is real, unpack it and give the folder."
            )
        if len(members) > MAX_FILES:
            raise ScanError(f"{path}: more than {MAX_FILES} members; give one series.")
        for info in members:
            with archive.open(info) as member:
                if not starts_as_dicom(member.read(140)):
                    continue
            # a member cannot unpack to more than the size that was checked
            yield Item(f"{path}:{info.filename}", partial(archive.read, info))
    except ScanError:
        raise
    except Exception as error:  # corrupt and encrypted archives raise several kinds
        raise ScanError(f"{path}: the zip archive cannot be read ({error}).") from error


# --- headers and series ---------------------------------------------------------------------


def _headers(name: str, items: Iterable[Item], notes: list[str]) -> Iterator[Header]:
    """The headers of images; what is no image is counted in a note."""
    ignored: Counter[str] = Counter()
    broken: list[str] = []
    found = 0
    for item in items:
        try:
            data = item.read()
            dataset = read_dataset(item.name, data, specific_tags=HEADER_TAGS,
                                   stop_before_pixels=True)  # fmt: skip
            kind = _not_an_image(dataset)
            uid = str(dataset.get("SeriesInstanceUID", ""))
        except ScanError:
            broken.append(item.name)
            continue
        except Exception:  # values of a corrupt header fail when they are first looked at
            broken.append(item.name)
            continue
        if kind:
            ignored[kind] += 1
            continue
        if not uid:
            broken.append(item.name)
            continue
        found += 1
        yield Header(item, dataset, len(data))
    if broken and found:
        raise ScanError(
            f"{broken[0]}: the DICOM header is damaged or incomplete"
            + (f" (and {len(broken) - 1} more files)" if len(broken) > 1 else "")
            + "; copy it again, or take it away if it is not part of the scan."
        )
    if not found:
        what = ", ".join(f"{n} {kind}" for kind, n in ignored.items())
        if broken:
            reason = f"{len(broken)} DICOM files are damaged, and nothing else is there"
        elif what:
            reason = f"it holds no images, only {what}"
        else:
            reason = "it holds no DICOM images"
        raise ScanError(f"{name}: {reason}; give a CT or MR series.")
    if ignored:
        what = ", ".join(f"{n} {kind}" for kind, n in ignored.items())
        notes.append(f"ignored DICOM objects that are not images: {what}")


def _not_an_image(dataset: pydicom.Dataset) -> str | None:
    """What an object is, if it is no image of a patient; None for images."""
    uid = str(dataset.get("SOPClassUID", ""))
    if uid in NO_IMAGE:
        return NO_IMAGE[uid]
    if "Rows" not in dataset or "Columns" not in dataset:
        known = UID(uid).name if uid else "object without pixels"
        return known.removesuffix(" Storage")
    return None


def _series_of_file(path: Path, items: Iterable[Item], notes: list[str]) -> list[Header]:
    """The whole series that lies beside one of its files."""
    name = str(path)
    own = list(_headers(name, [Item(name, path.read_bytes)], notes))
    uid = own[0].dataset.SeriesInstanceUID
    others = [item for item in items if item.name != name]
    # what else lies there need not be sound
    beside = [header for item in others for header in _quiet_headers(item)]
    return own + [header for header in beside if header.dataset.SeriesInstanceUID == uid]


def _quiet_headers(item: Item) -> list[Header]:
    try:
        return list(_headers(item.name, [item], []))
    except ScanError:
        return []


def _choose_series(
    name: str, headers: list[Header], series: str | int | None, notes: list[str]
) -> list[Header]:
    groups: dict[str, list[Header]] = defaultdict(list)
    for header in headers:
        groups[str(header.dataset.SeriesInstanceUID)].append(header)
    if series is not None:
        return _drop_localizers(name, _named_series(name, groups, series), notes)
    volumes = {uid: group for uid, group in groups.items() if not _only_aside(group)}
    aside = len(groups) - len(volumes)
    if not volumes:
        volumes, aside = groups, 0
    if len(volumes) > 1:  # single pictures beside a volume are no volume
        several = {u: g for u, g in volumes.items() if sum(map(_frames, g)) > 1}
        if several:
            aside += len(volumes) - len(several)
            volumes = several
    if len(volumes) > 1:
        raise ScanError(
            f"{name}: it holds {len(volumes)} image series; choose one with series=: "
            f"{_listing(volumes)}."
        )
    if aside:
        notes.append(
            f"ignored {aside} other series (localizers, secondary captures, single images)"
        )
    (group,) = volumes.values()
    return _drop_localizers(name, group, notes)


def _named_series(name: str, groups: dict[str, list[Header]], series: str | int) -> list[Header]:
    wanted = str(series).strip()
    if wanted in groups:
        return groups[wanted]
    found = {u: g for u, g in groups.items() if str(g[0].dataset.get("SeriesNumber", "")) == wanted}
    if len(found) == 1:
        return next(iter(found.values()))
    reason = "no series" if not found else f"{len(found)} series are"
    raise ScanError(
        f"{name}: {reason} {wanted!r}; choose one of {_listing(found or groups)} (by UID)."
    )


def _listing(groups: dict[str, list[Header]]) -> str:
    numbers = Counter(str(group[0].dataset.get("SeriesNumber", "")) for group in groups.values())
    lines = []
    for uid, group in groups.items():
        first = group[0].dataset
        number = str(first.get("SeriesNumber", "") or "")
        pick = number if number not in ("", "None") and numbers[number] == 1 else uid
        about = str(first.get("SeriesDescription", "") or "no description")
        lines.append(
            f"{pick!r} ({sum(map(_frames, group))} slices, {first.get('Modality', '?')}, {about})"
        )
    shown = "; ".join(lines[:20])
    return shown + (f"; and {len(lines) - 20} more" if len(lines) > 20 else "")


def _frames(header: Header) -> int:
    try:
        return max(1, int(header.dataset.get("NumberOfFrames", 1) or 1))
    except (TypeError, ValueError) as error:
        raise ScanError(f"{header.item.name}: its number of frames is no number.") from error


def _is_localizer(header: Header) -> bool:
    kinds = header.dataset.get("ImageType", None) or []
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return any(str(kind).upper() in ("LOCALIZER", "SCOUT") for kind in kinds)


def _only_aside(group: list[Header]) -> bool:
    """Whether a series is only localizers or secondary captures."""
    return all(
        _is_localizer(header)
        or str(header.dataset.get("SOPClassUID", "")).startswith(SECONDARY_CAPTURE)
        for header in group
    )


def _drop_localizers(name: str, group: list[Header], notes: list[str]) -> list[Header]:
    kept = [header for header in group if not _is_localizer(header)]
    if not kept:
        raise ScanError(f"{name}: it holds only localizer images; give the series itself.")
    if len(kept) < len(group):
        notes.append(f"ignored {len(group) - len(kept)} localizer images in the series")
    return kept


# --- planes ---------------------------------------------------------------------------------


def _slices(header: Header) -> Iterator[Slice]:
    dataset, name = header.dataset, header.item.name
    frames = _frames(header)
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
    return meta
