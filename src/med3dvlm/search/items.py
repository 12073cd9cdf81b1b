"""What can be embedded: scans of a folder or a manifest, and studies of a prepared store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from med3dvlm.data.sources import Source, absolute, content_hash, find_scans
from med3dvlm.scan import Preparation, Scan, prepare, read_scan
from med3dvlm.search.study import SearchIndexError, Study

if TYPE_CHECKING:
    from med3dvlm.data.store import Store

IN_STORE = "#"


@dataclass(frozen=True)
class ScanItem:
    """A scan that waits to be read."""

    source: Source

    @property
    def path(self) -> str:
        return str(self.source.path)

    @property
    def refusal(self) -> str:
        return self.source.refusal

    def content(self) -> str:
        """SHA-256 of what is read for it."""
        return content_hash(self.source.path)

    def volume(self, preparation: Preparation) -> tuple[np.ndarray, dict[str, Any]]:
        """(1, D, H, W) prepared, and what the scan adds to the metadata."""
        scan = read_scan(self.source.path)
        return prepare(scan, preparation), _facts(scan)

    def study(self, sha256: str, facts: dict[str, Any]) -> Study:
        item = self.source
        return Study(item.id, self.path, sha256, item.report, {**facts, **item.metadata})


@dataclass(frozen=True)
class StoredItem:
    """A study of a store, whose volume is prepared already.

    Attributes:
        number: in the store.
        metadata: as the manifest has it; `labels` are those that hold, a line.
    """

    location: str
    id: str
    number: int
    sha256: str
    report: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    refusal: str = ""

    @property
    def path(self) -> str:
        return f"{self.location}{IN_STORE}{self.id}"

    def check(self, preparation: Preparation) -> None:
        """Raise a ValueError that shows both, if the store is prepared otherwise."""
        _store(self.location).check_preparation(preparation)

    def content(self) -> str:
        return self.sha256

    def volume(self, preparation: Preparation) -> tuple[np.ndarray, dict[str, Any]]:
        self.check(preparation)
        return _store(self.location).volume(self.number)[None], {}

    def study(self, sha256: str, facts: dict[str, Any]) -> Study:
        return Study(self.id, self.path, sha256, self.report, {**facts, **self.metadata})

    def stored(self) -> tuple[Store, int]:
        """The store, and the study's number in it.

        Raises:
            SearchIndexError: if the store has no such study any more.
        """
        if self.refusal:
            raise SearchIndexError(self.refusal)
        return _store(self.location), self.number


Item = ScanItem | StoredItem


def list_items(source: Path | str, *, allow_outside: bool = False) -> list[Item]:
    """The scans of a folder or manifest (see :func:`find_scans`), or the studies of a store."""
    if "://" in str(source) or (Path(source) / "store.json").is_file():
        location = str(source) if "://" in str(source) else str(absolute(source))
        return list(_stored_items(location))
    return [ScanItem(found) for found in find_scans(source, allow_outside=allow_outside)]


def item_of(study: Study) -> Item:
    """What an indexed study was made from."""
    location, mark, name = study.path.rpartition(IN_STORE)
    if mark and ("://" in location or (Path(location) / "store.json").is_file()):
        known = _numbers(location)
        refusal = "" if name in known else f"{location} holds no study {name!r} any more."
        return StoredItem(
            location,
            name,
            known.get(name, 0),
            study.sha256,
            study.report,
            dict(study.metadata),
            refusal,
        )
    return ScanItem(Source(study.id, Path(study.path), study.report, dict(study.metadata)))


def is_there(path: str) -> bool:
    """Whether what a study was made from still exists."""
    location, mark, _ = path.rpartition(IN_STORE)
    if mark and ("://" in location or (Path(location) / "store.json").is_file()):
        return not item_of(Study("", path, "")).refusal
    return Path(path).exists()


def _stored_items(location: str) -> Sequence[Item]:
    store = _store(location)
    table = store.table.drop_columns(["questions", "places", "fingerprint"])
    return [
        StoredItem(
            location,
            row["id"],
            number,
            row["volume_sha256"],
            row["report"] or "",
            _metadata(row, store.labels),
        )
        for number, row in enumerate(table.to_pylist())
    ]


def _metadata(row: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    there = [name for name, value in zip(labels, row["labels"] or (), strict=False) if value]
    given = {
        "modality": row["modality"],
        "shape": row["original_shape"],
        "spacing_mm": [round(mm, 4) for mm in row["spacing_mm"]],
        "split": " ".join(row["splits"]),
        "case": row["case"],
        "source": row["source"],
        "labels": "; ".join(there),
    }
    given = {key: value for key, value in given.items() if value not in (None, "")}
    return {**given, **json.loads(row["metadata"] or "{}")}


@lru_cache(maxsize=8)
def _store(location: str) -> Store:
    try:
        from med3dvlm.data.store import Store
    except ImportError as error:
        raise SearchIndexError(
            "a prepared store needs the extra 'data': pip install 'med3dvlm[data]'."
        ) from error
    return Store(location)


@lru_cache(maxsize=8)
def _numbers(location: str) -> dict[str, int]:
    return {name: number for number, name in enumerate(_store(location).ids)}


def _facts(scan: Scan) -> dict[str, Any]:
    """What a scan tells of itself, ready for JSON."""
    return {
        **{key: value for key, value in scan.meta.items() if value is not None},
        "modality": scan.modality or "",
        "shape": list(scan.array.shape),
        "slices": scan.array.shape[0],
        "spacing_mm": [round(float(s), 4) for s in scan.spacing_mm],
    }
