"""Building an index: find the scans, embed what is new, keep the rest."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from med3dvlm.data.sources import Source, absolute, content_hash, find_scans
from med3dvlm.scan import Scan, ScanError, read_scan
from med3dvlm.search.index import Embedder, SearchIndex, SearchIndexError, Study

SAVE_EVERY = 200  # studies; a killed build goes on from the last save
FACTS = ("modality", "shape", "spacing_mm")  # what a scan itself adds to the metadata

Refused = Callable[[str, str], None]


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
    source, folder = absolute(source), absolute(folder)
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
