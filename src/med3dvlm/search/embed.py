"""From what waits to what is embedded: read by many, encoded in batches, here or on a cluster."""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from med3dvlm.scan import Preparation, ScanError
from med3dvlm.search.items import Item
from med3dvlm.search.study import Embedder, Entry, SearchIndexError

ENGINES = ("local", "ray")
AHEAD = 2  # batches that are read while one is encoded

Lookup = Callable[[str, str], Entry | None]
"""(path, sha256) -> the study with that content, that path's before any other's."""


@dataclass(frozen=True)
class Loaded:
    """What came of an item.

    Attributes:
        sha256: of its content.
        known: the indexed study of the same content, which need not be embedded again.
        vector: (dim,) of length 1; None for a known one.
        facts: what the scan adds to the metadata.
        refusal: why there is nothing of the above.
    """

    item: Item
    sha256: str = ""
    known: Entry | None = None
    vector: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    refusal: str = ""


def embed_here(
    items: Sequence[Item],
    model: Embedder,
    lookup: Lookup,
    *,
    batch_size: int,
    workers: int,
) -> Iterator[Loaded]:
    """What comes of the items, each once and nearly in their order.

    Threads read ahead, so that decompressing and resampling go on beside the encoder.
    """

    def load(item: Item) -> tuple[Loaded, np.ndarray | None]:
        return _load(item, model.preparation, lookup)

    waiting: list[tuple[Loaded, np.ndarray]] = []
    with ThreadPoolExecutor(workers) as pool:
        for loaded, volume in _in_order(pool, load, items, AHEAD * batch_size + workers):
            if volume is None:
                yield loaded
                continue
            waiting.append((loaded, volume))
            if len(waiting) >= batch_size:
                yield from _encode(waiting, model)
                waiting = []
        if waiting:
            yield from _encode(waiting, model)


def _load(item: Item, preparation: Preparation, lookup: Lookup) -> tuple[Loaded, np.ndarray | None]:
    try:
        if item.refusal:
            raise SearchIndexError(item.refusal)
        digest = item.content()
        known = lookup(item.path, digest) if digest else None
        if known is not None:
            return Loaded(item, digest, known), None
        volume, facts = item.volume(preparation)
    except (ScanError, SearchIndexError, OSError, ValueError) as error:
        return Loaded(item, refusal=str(error)), None
    return Loaded(item, digest, facts=facts), volume


def _in_order(
    pool: ThreadPoolExecutor, act: Callable[[Item], Any], items: Sequence[Item], ahead: int
) -> Iterator[Any]:
    futures: deque[Future[Any]] = deque()
    try:
        for item in items:
            futures.append(pool.submit(act, item))
            if len(futures) >= ahead:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()
    finally:
        for future in futures:
            future.cancel()


def _encode(waiting: Sequence[tuple[Loaded, np.ndarray]], model: Embedder) -> Iterator[Loaded]:
    try:
        volumes = torch.from_numpy(np.stack([volume for _, volume in waiting]))
        rows = np.asarray(model.embed_volumes(volumes), np.float32)
    except ValueError as error:  # of which scan it does not say: one by one
        if len(waiting) > 1:
            for one in waiting:
                yield from _encode([one], model)
        else:
            yield replace(waiting[0][0], refusal=str(error))
        return
    for (loaded, _), row in zip(waiting, rows, strict=True):
        length = float(np.linalg.norm(row))
        if np.isfinite(length) and length > 0:
            yield replace(loaded, vector=row / length)
        else:
            yield replace(loaded, refusal="the model gives no finite embedding for it.")


# --- on a cluster -------------------------------------------------------------------------------


def embed_on_ray(
    items: Sequence[Item],
    model: Embedder,
    lookup: Lookup,
    *,
    batch_size: int,
    workers: int,
) -> Iterator[Loaded]:
    """As :func:`embed_here`, on the workers of a Ray cluster that see the same storage.

    Each loads the model once, by its name, and reads and encodes batches; this process alone
    writes to the index.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise SearchIndexError("engine 'ray' needs Ray: pip install 'med3dvlm[ray]'.") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, num_cpus=None if os.environ.get("RAY_ADDRESS") else workers)
    waiting = [{"item": pickle.dumps((item, _known(item, lookup)))} for item in items]
    dataset = ray.data.from_items(waiting).map_batches(
        RayWorker,
        fn_constructor_args=(model.label, model.fingerprint()),
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=1 if torch.cuda.is_available() else 0,
    )
    for row in dataset.iter_rows():
        yield pickle.loads(row["loaded"])  # noqa: S301 (our own workers wrote it)


def _known(item: Item, lookup: Lookup) -> Entry | None:
    """The study of the same path, if its content may be the same."""
    return None if item.refusal else lookup(item.path, "")


class RayWorker:
    """Reads and encodes what it is given."""

    def __init__(self, name: str, fingerprint: str):
        from med3dvlm.hub import load

        self.model: Any = load(name, part="search")
        if self.model.fingerprint() != fingerprint:
            raise SearchIndexError(f"model {name!r} is another one on a worker than here.")

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[bytes]]:
        given = [pickle.loads(packed) for packed in batch["item"]]  # noqa: S301 (ours)
        known = {item.path: entry for item, entry in given}

        def lookup(path: str, digest: str) -> Entry | None:
            entry = known[path]
            return entry if entry is not None and entry.study.sha256 == digest else None

        items = [item for item, _ in given]
        found = embed_here(items, self.model, lookup, batch_size=len(items), workers=2)
        return {"loaded": [pickle.dumps(loaded) for loaded in found]}
