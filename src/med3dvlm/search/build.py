"""Building an index: find the scans, embed what is new, keep the rest."""

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

import numpy as np

from med3dvlm.scan import Scan, ScanError, read_scan
from med3dvlm.scan.dicom_series import is_dicom
from med3dvlm.search.index import Embedder, SearchIndex, SearchIndexError, Study

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".npy")
HEADER_SUFFIXES = (".nhdr", ".mhd")  # their voxels may lie in a file beside them
DICOM_SUFFIXES = (".dcm", ".ima")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
NO_DICOM = (*VOLUME_SUFFIXES, *PICTURE_SUFFIXES, ".txt", ".json", ".csv", ".gz")
REPORT_BYTES = 2**20  # a longer text beside a scan is a log or a table, no report
SAVE_EVERY = 200  # studies; a killed build goes on from the last save
FACTS = ("modality", "shape", "spacing_mm")  # what a scan itself adds to the metadata

Refused = Callable[[str, str], None]


@dataclass(frozen=True)
class Source:
    """A scan to be indexed, with what the manifest or the folder says of it.

    `refusal` says why it is not to be read at all, if so.
    """

    id: str
    path: Path
    report: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    refusal: str = ""


@dataclass
class BuildResult:
    """What a build did.

    Attributes:
        total: studies in the index now.
        added: new, moved or changed since the last build.
        unchanged: in the index already, with the same content.
        refused: (path, reason) of what could not be indexed.
        updated: of the unchanged, those whose report or metadata are new.
    """

    total: int = 0
    added: int = 0
    unchanged: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    updated: int = 0


def build_index(
    source: Path | str,
    model: Embedder,
    folder: Path | str,
    *,
    batch_size: int = 8,
    save_every: int = SAVE_EVERY,
    allow_outside: bool = False,
    progress: Callable[[int, int], None] | None = None,
    on_error: Refused | None = None,
) -> BuildResult:
    """Embed the scans of a folder or a manifest into an index.

    A scan whose content is in the index already is not embedded again, wherever it lies now; its
    report and metadata are taken anew. One that cannot be read is refused with the reason, and
    the others are indexed. Studies of other sources stay in the index.

    Args:
        source: see :func:`find_scans`.
        batch_size: scans that are read and embedded together.
        save_every: studies; the index is saved each time so many are new (or a twentieth of the
            index, whichever is more), and a build that was killed goes on from there.
        allow_outside: see :func:`find_scans`.
        progress: called with (scans done, scans in all).
        on_error: called with (path, reason) as soon as a scan is refused.

    Raises:
        SearchIndexError: if there is nothing to index, or the index is of another model.
    """
    source, folder = _absolute(source), _absolute(folder)
    if source.is_relative_to(folder):
        raise SearchIndexError(f"{folder} holds the scans themselves: give the index its own.")
    sources = find_scans(source, allow_outside=allow_outside)
    sources = [item for item in sources if not item.path.is_relative_to(folder)]
    if (folder / "index.json").is_file():
        index = SearchIndex.open(folder, model=model)
    else:
        index = SearchIndex.create(folder, model)
    build = _Build(index, model, save_every, on_error)
    for start in range(0, len(sources), batch_size):
        build.take(sources[start : start + batch_size])
        if progress:
            progress(min(start + batch_size, len(sources)), len(sources))
    build.save()
    if not len(index):
        path, reason = next(iter(build.result.refused), (str(source), "it holds no scan."))
        raise SearchIndexError(f"nothing could be indexed; the first of them, {path}: {reason}")
    build.result.total = len(index)
    return build.result


class _Build:
    """The state of one build: what the index holds, and what waits to be saved to it."""

    def __init__(
        self, index: SearchIndex, model: Embedder, save_every: int, on_error: Refused | None
    ):
        self.index, self.model = index, model
        self.save_every, self.on_error = save_every, on_error
        self.result = BuildResult()
        self.waiting: list[tuple[Study, np.ndarray]] = []
        self.moved: set[str] = set()
        known = list(zip(index.studies, index.embeddings, strict=True))
        self.by_path = {study.path: (study, row) for study, row in known}
        self.by_content = {study.sha256: (study, row) for study, row in known}

    def take(self, batch: list[Source]) -> None:
        """Add what is new of a batch, and save if enough waits."""
        new: list[tuple[Study, Scan]] = []
        for item in batch:
            try:
                if item.refusal:
                    raise SearchIndexError(item.refusal)
                digest = content_hash(item.path)
                if not self._reuse(item, digest):
                    scan = read_scan(item.path)
                    new.append((_study(item, digest, _facts(scan)), scan))
            except (ScanError, SearchIndexError, OSError) as error:
                self._refuse(str(item.path), str(error))
        if new:
            self._embed(new)
        if len(self.waiting) >= max(self.save_every, len(self.index) // 20):
            self.save()

    def _reuse(self, item: Source, digest: str) -> bool:
        """Take over the embedding of a scan with the same content; False if there is none."""
        path = str(item.path)
        here = path in self.by_path and self.by_path[path][0].sha256 == digest
        if not digest or not (here or digest in self.by_content):
            return False
        old, row = self.by_path[path] if here else self.by_content[digest]
        facts = {key: old.metadata[key] for key in FACTS if key in old.metadata}
        study = _study(item, digest, facts)
        if not here:
            self.result.added += 1
            if not os.path.exists(old.path):
                self.moved.add(old.path)
        else:
            self.result.unchanged += 1
            if study == old:
                return True
            self.result.updated += 1
        self.waiting.append((study, row))
        return True

    def _embed(self, new: list[tuple[Study, Scan]]) -> None:
        try:
            rows = np.asarray(self.model.embed_scans([scan for _, scan in new]))
        except ValueError as error:  # of which scan it does not say: one by one
            if len(new) > 1:
                for one in new:
                    self._embed([one])
            else:
                self._refuse(new[0][0].path, str(error))
            return
        for (study, _), row in zip(new, rows, strict=True):
            if not np.isfinite(row).all():
                self._refuse(study.path, "the model gives no finite embedding for it.")
                continue
            self.waiting.append((study, row))
            self.by_content[study.sha256] = (study, row)
            self.result.added += 1

    def _refuse(self, path: str, reason: str) -> None:
        self.result.refused.append((path, reason))
        if self.on_error:
            self.on_error(path, reason)

    def save(self) -> None:
        if self.waiting:
            self.index.discard(self.moved)
            self.index.add([s for s, _ in self.waiting], np.stack([row for _, row in self.waiting]))
            self.index.save()
        self.waiting, self.moved = [], set()


def _facts(scan: Scan) -> dict[str, Any]:
    """:data:`FACTS` of a scan, ready for JSON."""
    return {
        "modality": scan.modality,
        "shape": list(scan.array.shape),
        "spacing_mm": [round(float(s), 4) for s in scan.spacing_mm],
    }


def _study(item: Source, digest: str, facts: dict[str, Any]) -> Study:
    return Study(item.id, str(item.path), digest, item.report, {**facts, **item.metadata})


def find_scans(source: Path | str, *, allow_outside: bool = False) -> list[Source]:
    """The scans of a folder, a manifest or a single file, in a stable order.

    In a folder: every volume file, every folder of DICOM files, every folder of two or more
    pictures without a volume beside them; hidden files and other indexes are left out. The report
    of `name.nii.gz` or of a folder `name` is `name.txt` beside it, else `report.txt` beside it or
    in the folder. A folder with a `manifest.jsonl` is read by that.

    A manifest (.csv, .jsonl) has a column `path` (or `image`), relative to its own folder, and
    may have `report`, `id` and any others, which are kept as metadata where they are plain values.

    Args:
        allow_outside: follow paths and links that lead out of the source's folder. A manifest
            or an archive from elsewhere could otherwise pull any file of this machine into an
            index that others search.

    Raises:
        SearchIndexError: if the source is missing, a manifest is faulty, or no scan is found.
    """
    source = _absolute(source)
    if not source.exists():
        raise SearchIndexError(f"{source} does not exist: give a folder of scans or a manifest.")
    if source.is_file() and source.suffix.lower() in (".csv", ".jsonl"):
        found = _from_manifest(source, allow_outside)
    elif source.is_file():
        found = [_from_path(source, source.parent, allow_outside)]
    elif (source / "manifest.jsonl").is_file():
        found = _from_manifest(source / "manifest.jsonl", allow_outside)
    else:
        found = _from_folder(source, allow_outside)
    if not found:
        raise SearchIndexError(f"{source} holds no scan: give a folder of scans or a manifest.")
    return found


def _absolute(path: Path | str) -> Path:
    """Without "..", so that a scan has one name however the command was called."""
    return Path(os.path.abspath(path))


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
        if real in visited or _is_index(here):
            folders.clear()  # a link in a circle, or embeddings that look like volumes
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if not allow_outside:
            for name in folders:
                if (here / name).is_symlink() and not _inside(here / name, root):
                    yield _outside(here / name)
        files = sorted(here / name for name in names if not name.startswith("."))
        volumes = [path for path in files if path.name.lower().endswith(VOLUME_SUFFIXES)]
        yield from (path for path in volumes if path.is_file())
        if _holds_slices(files, pictures=not volumes):
            yield here
    for problem in problems:
        reason = f"{problem.filename}: it cannot be opened ({problem.strerror})."
        yield Source(str(problem.filename), Path(problem.filename), refusal=reason)


def _is_index(folder: Path) -> bool:
    return (folder / "index.json").is_file() and any(folder.glob("studies-*.jsonl"))


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
    if not allow_outside and not _inside(path, root):
        return _outside(path)
    stem = _stem(path)
    name = stem if path == root else (path.parent / stem).relative_to(root).as_posix()
    return Source(name, path, _report_beside(path, stem, root, allow_outside))


def _stem(path: Path) -> str:
    """The name without the suffix of a volume; names like 1.2.840.1 keep their dots."""
    if path.is_dir():
        return path.name
    lower = path.name.lower()
    fits = [suffix for suffix in VOLUME_SUFFIXES if lower.endswith(suffix)]
    return path.name[: -len(max(fits, key=len))] if fits else path.stem


def _report_beside(path: Path, stem: str, root: Path, allow_outside: bool) -> str:
    places = [path / "report.txt"] if path.is_dir() else []
    if path != root:
        places = [path.parent / f"{stem}.txt", *places, path.parent / "report.txt"]
    for text in places:
        allowed = text.is_file() and (allow_outside or _inside(text, root))
        if allowed and text.stat().st_size <= REPORT_BYTES:
            return text.read_text("utf-8-sig", errors="replace").strip()
    return ""


def _inside(path: Path, root: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def _outside(path: Path) -> Source:
    reason = f"{path}: it links to outside the folder; copy it in, or allow that explicitly."
    return Source(_stem(path), path, refusal=reason)


def _from_manifest(manifest: Path, allow_outside: bool) -> list[Source]:
    root = manifest.parent.resolve()
    found: dict[Path, Source] = {}
    for number, row in enumerate(_rows(manifest), start=1):
        where = f"{manifest}, row {number}"
        given = (row.get("path") or row.get("image")) if isinstance(row, dict) else None
        if not given:
            raise SearchIndexError(f"{where}: there is no path; add the column.")
        try:
            path = (root / str(given)).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise SearchIndexError(f"{where}: {given!r} is no path ({error}).") from error
        if not allow_outside and not path.is_relative_to(root):
            raise SearchIndexError(
                f"{where}: {given!r} lies outside the manifest's folder; put the manifest above "
                "its scans, or allow that explicitly."
            )
        if path in found:
            raise SearchIndexError(f"{where}: {given!r} is there a second time; remove one.")
        extra = {
            str(key): value
            for key, value in row.items()
            if key not in ("path", "image", "report", "id")
            and isinstance(value, str | int | float | bool)
        }
        name, report = str(row.get("id") or given), str(row.get("report") or "")
        found[path] = Source(name, path, report, extra)
    return list(found.values())


def _rows(manifest: Path) -> list[Any]:
    try:
        text = manifest.read_bytes().decode("utf-8-sig")  # spreadsheets put a mark in front
        if manifest.suffix.lower() == ".csv":  # line breaks inside quotes are the report's own
            return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise SearchIndexError(f"{manifest} cannot be read as a manifest: {error}.") from error


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
        files = [p for p in root.iterdir() if p.name.startswith(f"{_stem(path)}.")]
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
