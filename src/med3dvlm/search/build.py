"""Building an index: find the scans, embed what is new, keep the rest."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from med3dvlm.scan import Scan, ScanError, read_scan
from med3dvlm.search.index import Embedder, SearchIndex, SearchIndexError, Study

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".npy")
SLICE_SUFFIXES = (".dcm", ".ima", ".png", ".jpg", ".jpeg")
SAVE_EVERY = 200  # studies; a killed build goes on from the last save


@dataclass(frozen=True)
class Source:
    """A scan to be indexed, with what the manifest or the folder says of it."""

    id: str
    path: Path
    report: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass
class BuildResult:
    total: int
    added: int
    unchanged: int
    refused: list[tuple[str, str]]


def build_index(
    source: Path | str,
    model: Embedder,
    folder: Path | str,
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> BuildResult:
    """Embed the scans of a folder or a manifest into an index.

    A scan that is in the index already with the same content is not embedded again. One that
    cannot be read is refused with the reason, and the others are indexed.

    Raises:
        SearchIndexError: if there is nothing to index, or the index is of another model.
    """
    sources = find_scans(Path(source))
    folder = Path(folder)
    if (folder / "index.json").is_file():
        index = SearchIndex.open(folder, model=model)
    else:
        index = SearchIndex.create(folder, model)
    known = {study.path: study.sha256 for study in index.studies}
    result = BuildResult(total=0, added=0, unchanged=0, refused=[])
    waiting: list[tuple[Study, Scan]] = []
    for number, item in enumerate(sources, start=1):
        digest = content_hash(item.path)
        if known.get(str(item.path)) == digest:
            result.unchanged += 1
        else:
            try:
                scan = read_scan(item.path)
                waiting.append((_study(item, digest, scan), scan))
            except ScanError as error:
                result.refused.append((str(item.path), str(error)))
        if len(waiting) >= batch_size or (waiting and number == len(sources)):
            _embed(waiting, model, index)
            result.added += len(waiting)
            waiting = []
            if result.added % SAVE_EVERY < batch_size:
                index.save()
        if progress:
            progress(number, len(sources))
    if not len(index):
        path, reason = result.refused[0]
        raise SearchIndexError(f"nothing could be indexed; the first of them, {path}: {reason}")
    index.save()
    result.total = len(index)
    return result


def _embed(waiting: list[tuple[Study, Scan]], model: Embedder, index: SearchIndex) -> None:
    index.add([study for study, _ in waiting], model.embed_scans([scan for _, scan in waiting]))


def _study(item: Source, digest: str, scan: Scan) -> Study:
    metadata = {
        "modality": scan.modality,
        "shape": list(scan.array.shape),
        "spacing_mm": [round(float(s), 4) for s in scan.spacing_mm],
        **item.metadata,
    }
    return Study(item.id, str(item.path), digest, item.report, metadata)


def find_scans(source: Path) -> list[Source]:
    """The scans under a folder, or of a manifest, in a stable order.

    Raises:
        SearchIndexError: if the source is missing, or no scan is found.
    """
    if not source.exists():
        raise SearchIndexError(f"{source} does not exist: give a folder of scans or a manifest.")
    if source.is_file() and source.suffix.lower() in (".csv", ".jsonl"):
        found = _from_manifest(source)
    elif source.is_file():
        found = [_from_path(source, source.parent)]
    else:
        manifest = source / "manifest.jsonl"
        found = _from_manifest(manifest) if manifest.is_file() else _from_folder(source)
    if not found:
        raise SearchIndexError(f"{source} holds no scan: give a folder of scans or a manifest.")
    return found


def _from_folder(root: Path) -> list[Source]:
    found = []
    for path in sorted(root.rglob("*")):
        if (path.is_file() and path.name.lower().endswith(VOLUME_SUFFIXES)) or (
            path.is_dir() and _holds_slices(path)
        ):
            found.append(_from_path(path, root))
    if not found and _holds_slices(root):
        found.append(_from_path(root, root.parent))
    return found


def _holds_slices(folder: Path) -> bool:
    """A folder of slices: by their suffix, or DICOM files without one."""
    for path in folder.iterdir():
        if not path.is_file():
            continue
        if path.suffix.lower() in SLICE_SUFFIXES:
            return True
        if not path.suffix and _is_dicom(path):
            return True
    return False


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _from_path(path: Path, root: Path) -> Source:
    stem = path.name.split(".")[0] if path.is_file() else path.name
    name = path.parent / stem
    try:
        relative = name.relative_to(root).as_posix()
    except ValueError:
        relative = stem
    for text in (path.parent / f"{stem}.txt", path.parent / "report.txt"):
        if text.is_file():
            return Source(relative, path, text.read_text("utf-8", errors="replace").strip())
    return Source(relative, path)


def _from_manifest(manifest: Path) -> list[Source]:
    """Rows with a column `path`, relative to the manifest and inside its folder."""
    try:
        text = manifest.read_text("utf-8")
        if manifest.suffix.lower() == ".csv":
            rows = list(csv.DictReader(text.splitlines()))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise SearchIndexError(f"{manifest} cannot be read as a manifest: {error}.") from error
    root = manifest.parent.resolve()
    found = []
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not row.get("path"):
            raise SearchIndexError(f"{manifest}, row {number}: there is no path; add the column.")
        path = (root / str(row["path"])).resolve()
        if not path.is_relative_to(root):
            raise SearchIndexError(
                f"{manifest}, row {number}: {row['path']!r} lies outside the manifest's folder; "
                "put the manifest above its scans."
            )
        extra = {
            key: value
            for key, value in row.items()
            if key not in ("path", "report", "id") and isinstance(value, str | int | float | bool)
        }
        name = str(row.get("id") or row["path"])
        found.append(Source(name, path, str(row.get("report") or ""), extra))
    return found


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names; "" if it is missing."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if not file.is_file():
            return ""
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
