"""Where studies come from: the scans of a folder or a manifest, with what is said of each.

Every layout (this module, `m3d`, `ct_rate`) ends in the same list of :class:`Source`; what is
wrong with one of them is written on it as `refusal`, so that nothing is lost from the account.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from med3dvlm.scan.dicom_series import is_dicom

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".npy")
HEADER_SUFFIXES = (".nhdr", ".mhd")  # their voxels may lie in a file beside them
DICOM_SUFFIXES = (".dcm", ".ima")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
NO_DICOM = (*VOLUME_SUFFIXES, *PICTURE_SUFFIXES, ".txt", ".json", ".csv", ".gz")
REPORT_BYTES = 2**20  # a longer text beside a scan is a log or a table, no report
PATH_COLUMNS = ("path", "image")
OWN_COLUMNS = (*PATH_COLUMNS, "report", "id")


Progress = Callable[[int, int], None]  # (done, in all)


class SourceError(ValueError):
    """A folder, manifest or table that cannot be followed, in one sentence with the remedy."""


@dataclass(frozen=True)
class Source:
    """A scan that waits to be read, with what its folder or tables say of it.

    Attributes:
        id: unique among the sources of one archive.
        path: what `read_scan` takes.
        report: "" where there is none.
        metadata: plain values that go along with it.
        refusal: why it is not to be read at all, "" if it is.
        splits: the splits it is listed in, for example ("test", "test1k").
        case: the patient or case, where the layout tells; series of one case share it.
        questions: dicts of text, answer, kind (closed, open, yes_no), type (1–5), choices and
            answer_choice.
        labels: 0 or 1 for each label of the layout, in its order.
        caption: one line that says what is there, where there is one beside the report.
    """

    id: str
    path: Path
    report: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    refusal: str = ""
    splits: tuple[str, ...] = ()
    case: str = ""
    questions: tuple[dict[str, Any], ...] = ()
    labels: tuple[int, ...] = ()
    caption: str = ""


def find_scans(source: Path | str, *, allow_outside: bool = False) -> list[Source]:
    """The scans of a folder, a manifest or a single file, in a stable order.

    In a folder: every volume file, every folder of DICOM files, every folder of two or more
    pictures without a volume beside them; hidden files and other indexes are left out. The report
    of `name.nii.gz` or of a folder `name` is `name.txt` beside it, else `report.txt` beside it or
    in the folder. A folder with a `manifest.jsonl` is read by that.

    A manifest (.csv, .jsonl) has a column `path` (or `image`), relative to its own folder, and
    may have `report`, `id`, `split`, `case` and any others, which are kept as metadata where they
    are plain values.

    Args:
        allow_outside: follow paths and links that lead out of the source's folder. A manifest
            or an archive from elsewhere could otherwise pull any file of this machine into an
            index that others search.

    Raises:
        SourceError: if the source is missing, a manifest is faulty, or no scan is found.
    """
    source = absolute(source)
    if not source.exists():
        raise SourceError(f"{source} does not exist: give a folder of scans or a manifest.")
    if source.is_file() and source.suffix.lower() in (".csv", ".jsonl"):
        found = _from_manifest(source, allow_outside)
    elif source.is_file():
        found = [_from_path(source, source.parent, allow_outside)]
    elif (source / "manifest.jsonl").is_file():
        found = _from_manifest(source / "manifest.jsonl", allow_outside)
    else:
        found = _from_folder(source, allow_outside)
    if not found:
        raise SourceError(f"{source} holds no scan: give a folder of scans or a manifest.")
    return found


def absolute(path: Path | str) -> Path:
    """Without "..", so that a scan has one name however the command was called."""
    return Path(os.path.abspath(path))


def inside(path: Path, root: Path) -> bool:
    """Whether a path stays under a root when every link is followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def stem_of(path: Path) -> str:
    """The name without the suffix of a volume; names like 1.2.840.1 keep their dots."""
    if path.is_dir():
        return path.name
    lower = path.name.lower()
    fits = [suffix for suffix in VOLUME_SUFFIXES if lower.endswith(suffix)]
    return path.name[: -len(max(fits, key=len))] if fits else path.stem


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a .csv (UTF-8, with or without its mark) or .jsonl table.

    Raises:
        SourceError: if it cannot be read as such, with the number of a broken line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")  # spreadsheets put a mark in front
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read as a table: {error}.") from error
    return _csv_rows(path, text) if path.suffix.lower() == ".csv" else _json_rows(path, text)


def _csv_rows(path: Path, text: str) -> list[dict[str, Any]]:
    # line breaks inside quotes are the report's own
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        return list(reader)
    except csv.Error as error:
        raise SourceError(f"{path}, line {reader.line_num}: it is no CSV ({error}).") from error


def _json_rows(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)  # without its place, in the line alone
            raise SourceError(f"{path}, line {number}: it is no JSON ({reason}).") from error
        if not isinstance(row, dict):
            raise SourceError(
                f"{path}, line {number}: it is no object; give one JSON object a line."
            )
        rows.append(row)
    return rows


def content_hash(path: Path) -> str:
    """SHA-256 of everything that is read for a scan; "" if it is missing.

    For a folder all its files but texts and hidden ones; for one DICOM file its series lies
    beside it, and for a detached header its voxels, so the files there count too.
    """
    root = path if path.is_dir() else path.parent
    if path.is_dir():
        files = [p for p in path.rglob("*") if not p.name.startswith(".")]
    elif not path.is_file():
        return ""
    elif path.name.lower().endswith(HEADER_SUFFIXES):
        files = [p for p in root.iterdir() if p.name.startswith(f"{stem_of(path)}.")]
    elif is_dicom(path):
        files = [p for p in root.iterdir() if p.is_file() and is_dicom(p)]
    else:
        files = [path]
    files = sorted(p for p in files if p.is_file() and p.suffix.lower() != ".txt")
    digest = hashlib.sha256()
    for file in files:
        if files != [path]:  # a single volume is the same under any name
            digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _from_folder(root: Path, allow_outside: bool) -> list[Source]:
    found = [
        item if isinstance(item, Source) else _from_path(item, root, allow_outside)
        for item in _walk(root, allow_outside)
    ]
    shared = {name for name, count in Counter(item.id for item in found).items() if count > 1}
    found = [  # a.nrrd beside a.nii.gz: an id each
        replace(item, id=item.path.relative_to(root).as_posix()) if item.id in shared else item
        for item in found
    ]
    return sorted(found, key=lambda item: item.path)


def _walk(root: Path, allow_outside: bool) -> Iterator[Path | Source]:
    """Volume files and folders of slices; a Source where there is something to refuse."""
    problems: list[OSError] = []
    visited: set[str] = set()
    for parent, folders, names in os.walk(root, onerror=problems.append, followlinks=allow_outside):
        here = Path(parent)
        real = os.path.realpath(here)
        if real in visited or _is_ours(here):
            folders.clear()  # a link in a circle, or embeddings that look like volumes
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if not allow_outside:
            for name in folders:
                if (here / name).is_symlink() and not inside(here / name, root):
                    yield _outside(here / name)
        files = sorted(here / name for name in names if not name.startswith("."))
        volumes = [path for path in files if path.name.lower().endswith(VOLUME_SUFFIXES)]
        yield from (path for path in volumes if path.is_file())
        if _holds_slices(files, pictures=not volumes):
            yield here
    for problem in problems:
        reason = f"{problem.filename}: it cannot be opened ({problem.strerror})."
        yield Source(str(problem.filename), Path(problem.filename), refusal=reason)


def _is_ours(folder: Path) -> bool:
    """Whether a folder is an index or a store, which hold no scans of their own."""
    index = (folder / "index.json").is_file() and any(folder.glob("studies-*"))
    return index or (folder / "volumes.zarr").is_dir()


def _holds_slices(files: list[Path], *, pictures: bool) -> bool:
    """Files of one folder: DICOM by suffix or, without one, by content; or several pictures."""
    suffixes = Counter(path.suffix.lower() for path in files)
    if any(suffixes[suffix] for suffix in DICOM_SUFFIXES):
        return True
    if pictures and sum(suffixes[suffix] for suffix in PICTURE_SUFFIXES) > 1:
        return True
    # names like IM0001, or a UID, whose last number looks like a suffix
    unknown = (path for path in files if path.suffix.lower() not in NO_DICOM)
    return any(path.is_file() and is_dicom(path) for path in unknown)


def _from_path(path: Path, root: Path, allow_outside: bool) -> Source:
    if not allow_outside and not inside(path, root):
        return _outside(path)
    stem = stem_of(path)
    name = stem if path == root else (path.parent / stem).relative_to(root).as_posix()
    return Source(name, path, _report_beside(path, stem, root, allow_outside))


def _report_beside(path: Path, stem: str, root: Path, allow_outside: bool) -> str:
    places = [path / "report.txt"] if path.is_dir() else []
    if path != root:
        places = [path.parent / f"{stem}.txt", *places, path.parent / "report.txt"]
    for text in places:
        allowed = text.is_file() and (allow_outside or inside(text, root))
        if allowed and text.stat().st_size <= REPORT_BYTES:
            return text.read_text("utf-8-sig", errors="replace").strip()
    return ""


def _outside(path: Path) -> Source:
    reason = f"{path}: it links to outside the folder; copy it in, or allow that explicitly."
    return Source(stem_of(path), path, refusal=reason)


def _from_manifest(manifest: Path, allow_outside: bool) -> list[Source]:
    root = manifest.parent.resolve()
    found: dict[Path, Source] = {}
    ids: set[str] = set()
    for number, row in enumerate(read_table(manifest), start=1):
        where = f"{manifest}, row {number}"
        given = next((row[key] for key in PATH_COLUMNS if row.get(key)), None)
        if not given:
            raise SourceError(f"{where}: there is no path; add the column.")
        try:
            path = (root / str(given)).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise SourceError(f"{where}: {given!r} is no path ({error}).") from error
        if not allow_outside and not path.is_relative_to(root):
            raise SourceError(
                f"{where}: {given!r} lies outside the manifest's folder; put the manifest above "
                "its scans, or allow that explicitly."
            )
        if path in found:
            raise SourceError(f"{where}: {given!r} is there a second time; remove one.")
        name = str(row.get("id") or given)
        if name in ids:
            raise SourceError(f"{where}: id {name!r} is there a second time; give each its own.")
        ids.add(name)
        extra = {
            str(key): value
            for key, value in row.items()
            if key not in OWN_COLUMNS and isinstance(value, str | int | float | bool)
        }
        found[path] = Source(
            name,
            path,
            str(row.get("report") or ""),
            extra,
            splits=tuple(str(row["split"]).split()) if row.get("split") else (),
            case=str(row.get("case") or ""),
        )
    return list(found.values())
