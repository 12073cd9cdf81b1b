"""DICOM files and series: what lies in a folder or zip, and which of it is the scan."""

from __future__ import annotations

import os
import stat
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pydicom
from pydicom.uid import UID

from med3dvlm.scan.blocks import SMALL_BYTES
from med3dvlm.scan.dicom_pixels import read_dataset
from med3dvlm.scan.scan import ScanError

MAX_FILES = 100_000
MAX_ZIP_BYTES = 8 * 2**30
ZIP_RATIO = 50
"""DICOM slices in a zip shrink 2 to 10 times."""

NO_IMAGE = {
    "1.2.840.10008.5.1.4.1.1.66.4": "segmentation",
    "1.2.840.10008.5.1.4.1.1.66.7": "segmentation",
    "1.2.840.10008.5.1.4.1.1.481.2": "radiotherapy dose",
    "1.2.840.10008.5.1.4.1.1.30": "parametric map",
}
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
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


# --- files ----------------------------------------------------------------------------------


def items_of(path: Path, stack: ExitStack) -> Iterable[Item]:
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


def headers_of(name: str, items: Iterable[Item], notes: list[str]) -> Iterator[Header]:
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


def series_of_file(path: Path, items: Iterable[Item], notes: list[str]) -> list[Header]:
    """The whole series that lies beside one of its files."""
    name = str(path)
    own = list(headers_of(name, [Item(name, path.read_bytes)], notes))
    uid = own[0].dataset.SeriesInstanceUID
    others = [item for item in items if item.name != name]
    # what else lies there need not be sound
    beside = [header for item in others for header in _quiet_headers(item)]
    return own + [header for header in beside if header.dataset.SeriesInstanceUID == uid]


def _quiet_headers(item: Item) -> list[Header]:
    try:
        return list(headers_of(item.name, [item], []))
    except ScanError:
        return []


def choose_series(
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
        several = {u: g for u, g in volumes.items() if sum(map(frames_of, g)) > 1}
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
            f"{pick!r} ({sum(map(frames_of, group))} slices, {first.get('Modality', '?')}, {about})"
        )
    shown = "; ".join(lines[:20])
    return shown + (f"; and {len(lines) - 20} more" if len(lines) > 20 else "")


def frames_of(header: Header) -> int:
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
