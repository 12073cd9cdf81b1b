"""Building an index: find the scans, embed what is new, keep the rest; and rebuilding one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from med3dvlm.data.sources import Progress, absolute
from med3dvlm.search.database import Place, place_of
from med3dvlm.search.embed import ENGINES, Loaded, embed_here, embed_on_ray
from med3dvlm.search.index import SearchIndex, made_by, make_entry, read_head
from med3dvlm.search.items import Item, StoredItem, is_there, item_of, list_items
from med3dvlm.search.study import Embedder, Entry, SearchIndexError, Study

SAVE_EVERY = 200  # studies; a killed build goes on from the last save
TEND_EVERY = 50  # saves
CHUNK = 10_000  # studies that a rebuild lists at a time
FACTS = ("modality", "shape", "slices", "spacing_mm")  # what a scan itself adds to the metadata

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
        damage: what a rebuild found to be lost, a sentence each.
    """

    total: int = 0
    added: int = 0
    unchanged: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    updated: int = 0
    damage: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class How:
    """How studies are read and embedded.

    Attributes:
        batch_size: volumes that are encoded together.
        workers: threads that read; with engine "ray", processes of the cluster.
        save_every: studies; the index is saved each time so many are new.
        engine: "local" or "ray".
        progress: called with (studies done, studies in all).
        on_error: called with (path, reason) as soon as a study is refused.
    """

    batch_size: int = 8
    workers: int = os.cpu_count() or 1
    save_every: int = SAVE_EVERY
    engine: str = "local"
    progress: Progress | None = None
    on_error: Refused | None = None

    def __post_init__(self):
        if self.engine not in ENGINES:
            raise SearchIndexError(
                f"engine {self.engine!r} is unknown: use {' or '.join(ENGINES)}."
            )


def build_index(
    source: Path | str,
    model: Embedder,
    location: Path | str,
    *,
    allow_outside: bool = False,
    how: How | None = None,
) -> BuildResult:
    """Embed the scans of a folder, a manifest or a prepared store into an index.

    A scan whose content is in the index already is not embedded again, wherever it lies now; its
    report and metadata are taken anew. One that cannot be read is refused with the reason, and
    the others are indexed. Studies of other sources stay in the index. A build that was killed
    goes on from its last save. Several may build into one index, and others search it meanwhile.

    Args:
        source: see :func:`find_scans`; or a store, whose volumes are taken as they are prepared.
        location: a folder, or a server's table (see :func:`place_of`).
        allow_outside: see :func:`find_scans`.

    Raises:
        SearchIndexError: if there is nothing to index, or the index is of another model.
    """
    place = place_of(location)
    local = "://" not in str(source)
    if local and "://" not in place.location:
        inside = absolute(place.location)
        if absolute(source).is_relative_to(inside):
            raise SearchIndexError(f"{inside} holds the scans themselves: give the index its own.")
    items = list_items(source, allow_outside=allow_outside)
    if items and isinstance(items[0], StoredItem):  # all are prepared alike
        items[0].check(model.preparation)
    if place.read_head() is None:
        index = SearchIndex.create(location, model)
    else:
        index = SearchIndex.open(location, model=model)
    items = [item for item in items if not Path(item.path).is_relative_to(absolute(place.location))]
    named = str(absolute(source)) if local else str(source)
    found_in = {"source": named, "allow_outside": allow_outside}
    build = _Build(index, model, how or How(), found_in)
    build.run(items)
    if not len(index):
        path, reason = next(iter(build.result.refused), (str(source), "it holds no scan."))
        raise SearchIndexError(f"nothing could be indexed; the first of them, {path}: {reason}")
    index.tend()
    index.add_source(found_in)
    build.result.total = len(index)
    return build.result


class _Build:
    """The state of one build: what was done, and what waits to be saved."""

    def __init__(
        self,
        index: SearchIndex,
        model: Embedder,
        how: How,
        source: dict[str, Any] | None = None,
    ):
        self.index, self.model, self.how, self.source = index, model, how, source
        self.result = BuildResult()
        self.waiting: list[tuple[Study, Entry | Loaded]] = []
        self.moved: set[str] = set()
        self.saves = 0

    def run(self, items: Sequence[Item]) -> None:
        how = self.how
        engine = embed_on_ray if how.engine == "ray" else embed_here
        found = engine(
            items, self.model, self._lookup, batch_size=how.batch_size, workers=how.workers
        )
        for done, loaded in enumerate(found, start=1):
            self._take(loaded)
            if len(self.waiting) >= how.save_every:
                self.save()
            if how.progress:
                how.progress(done, len(items))
        self.save()

    def _lookup(self, path: str, digest: str) -> Entry | None:
        """The study of that content; without a digest, whatever has the path."""
        table = self.index.table
        if table is None:
            return None
        here = table.fetch([path]).get(path)
        if here is not None and digest in ("", here.study.sha256):
            return here
        return table.same_content(digest) if digest else None

    def _take(self, loaded: Loaded) -> None:
        item = loaded.item
        if loaded.refusal:
            self.refuse(item.path, loaded.refusal)
            return
        old = loaded.known
        if old is None:
            self.waiting.append((item.study(loaded.sha256, loaded.facts), loaded))
            self.result.added += 1
            return
        facts = {key: old.study.metadata[key] for key in FACTS if key in old.study.metadata}
        study = item.study(loaded.sha256, facts)
        if old.study.path != item.path:
            self.result.added += 1
            if not is_there(old.study.path):
                self.moved.add(old.study.path)
        else:
            self.result.unchanged += 1
            if study == old.study:
                return
            self.result.updated += 1
        self.waiting.append((study, old))

    def refuse(self, path: str, reason: str) -> None:
        self.result.refused.append((path, reason))
        if self.how.on_error:
            self.how.on_error(path, reason)

    def save(self) -> None:
        if not self.waiting:
            return
        vectors = self._report_vectors()
        entries = [
            make_entry(study, made.vector, vectors.get(study.report))
            for study, made in self.waiting
            if made.vector is not None
        ]
        self.index.put(entries, instead_of=self.moved)
        self.waiting, self.moved = [], set()
        self.saves += 1
        if self.source and self.saves == 1:  # so that a build that is killed leaves it too
            self.index.add_source(self.source)
        if self.saves % TEND_EVERY == 0:
            self.index.tend()

    def _report_vectors(self) -> dict[str, Any]:
        """By report; the model reads each once, and none that it has read before."""
        found = {
            old.study.report: old.report_vector
            for _, old in self.waiting
            if isinstance(old, Entry) and old.report_vector is not None
        }
        new = sorted({study.report for study, _ in self.waiting if study.report} - found.keys())
        if new and self.model.reads_text:
            found |= dict(zip(new, self.model.embed_texts(new), strict=True))
        return found


# --- rebuilding -----------------------------------------------------------------------------------


def rebuild_index(location: Path | str, model: Embedder, *, how: How | None = None) -> BuildResult:
    """Make an index anew beside the old one, and switch to it in one move.

    With the model that made it, what is whole is copied, and what is lost is looked for in the
    sources that the index was built from and embedded again. With another model, every study is
    embedded again from its scan; until the switch searches go on with the old one, and after it
    those that still use the old model do, until the next rebuild. Studies that were added or
    removed meanwhile are taken along. A rebuild that was killed goes on where it was.

    Raises:
        SearchIndexError: if nothing could be saved.
    """
    how = how or How()
    place = place_of(location)
    head = read_head(place)
    current, made = head["generations"][0], made_by(model)
    same = all(current[key] == made[key] for key in ("weights", "preparation"))
    old = SearchIndex(place, head, current)
    damage: list[str] = []
    try:
        old.table = place.open(current["table"])
    except SearchIndexError as error:
        damage.append(str(error))
    build = _Build(_pending(place, head, made), model, how)
    seen: dict[str, int] = {}
    if old.table is not None:
        if build.index.table is not None:  # what was removed since it was killed goes here, too
            seen = dict.fromkeys((e.study.path for e in build.index.entries([])), -1)
        _take_over(old, build, seen, damage, copy=same)
    if damage:
        _look_again(head["sources"], build)
    if not len(build.index):
        raise SearchIndexError(
            f"{place.location}: nothing of it could be saved ({damage[0] if damage else 'empty'}): "
            "delete it and build it again with med3dvlm index build."
        )
    build.index.tend()
    while not _switch(old, build.index, seen, keep=not same):
        _take_over(old, build, seen, [], copy=same)
    build.result.damage = damage
    build.result.total = len(build.index)
    return build.result


def _pending(place: Place, head: dict[str, Any], made: dict[str, Any]) -> SearchIndex:
    """The generation that is to come: begun now, or by a rebuild that was killed."""
    pending = head.get("pending")
    if pending and all(pending[key] == made[key] for key in ("weights", "preparation")):
        index = SearchIndex(place, head, pending)
        index.table = place.open(pending["table"])
    else:
        numbers = [int(g["table"].removeprefix("studies-")) for g in head["generations"]]
        index = SearchIndex(place, head, {"table": f"studies-{max(numbers) + 1}", **made})
    index.pending = True
    return index


def _take_over(
    old: SearchIndex, build: _Build, seen: dict[str, int], damage: list[str], *, copy: bool
) -> None:
    """Bring what is new in the old generation since it was last `seen`; take out what is gone."""
    there: set[str] = set()
    chunk: list[Entry] = []
    for entry in old.entries(damage):
        there.add(entry.study.path)
        if seen.get(entry.study.path) != entry.check():
            seen[entry.study.path] = entry.check()
            chunk.append(entry)
        if len(chunk) == CHUNK:
            _bring(chunk, build, copy=copy)
            chunk = []
    _bring(chunk, build, copy=copy)
    gone = seen.keys() - there
    if gone:
        build.index.remove(gone)
        for path in gone:
            del seen[path]


def _bring(entries: Sequence[Entry], build: _Build, *, copy: bool) -> None:
    if copy:
        build.index.put([make_entry(e.study, e.vector, e.report_vector) for e in entries])
        build.result.unchanged += len(entries)
    else:
        build.run([item_of(entry.study) for entry in entries])


def _look_again(sources: Sequence[dict[str, Any]], build: _Build) -> None:
    """Find in the sources what was lost; what is there already stays."""
    for source in sources:
        try:
            items = list_items(source["source"], allow_outside=source["allow_outside"])
        except ValueError as error:
            build.refuse(source["source"], str(error))
            continue
        build.run(items)


def _switch(old: SearchIndex, new: SearchIndex, seen: dict[str, int], *, keep: bool) -> bool:
    """Make the new generation the current one, unless the old one has changed since `seen`."""
    place = new.place
    with place.writing():
        if old.table is not None:
            now = {entry.study.path: entry.check() for entry in old.entries([])}
            if now != seen:
                return False
        head = read_head(place)
        before = head["generations"]
        kept = before[:1] if keep else []
        head["generations"] = [new.generation, *kept]
        head.pop("pending", None)
        place.write_head(head)
        for generation in before[len(kept) :]:
            place.drop(generation["table"])
    new.head, new.pending = head, False
    return True
