"""From an archive to a store, accounting for every study, wherever the work is stopped.

The studies are cut into units of one shard each. A worker prepares a unit, writes its shard in
one move, then a file of its rows in another: that file says that the unit is done. So a job that
was killed goes on with the units that have none, and what it makes does not depend on where it
was killed, on the number of workers or on the engine. A refused study leaves an empty place.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import zarr

from med3dvlm.data.layouts import LAYOUTS, Layout, phantom_sources
from med3dvlm.data.leakage import GRID, Crossing, find_crossings, fingerprint
from med3dvlm.data.sources import Progress, Source, SourceError, absolute, content_hash
from med3dvlm.data.store import (
    CELL,
    CROSSINGS,
    FORMAT,
    MANIFEST,
    PREPARATION,
    REFUSED,
    SCHEMA,
    STORE,
    VOLUMES,
    Quantisation,
    Store,
    StoreError,
    cell_grid,
    create_volumes,
)
from med3dvlm.files import atomic_file, sync, write_json
from med3dvlm.scan import Preparation, Scan, ScanError, prepare

SHARD_BYTES = 64 * 2**20  # of prepared values; a worker holds one shard
WORK = "work"  # a folder of the store while it is made
ENGINES = ("local", "ray")
LOCK_SECONDS = 15.0


@dataclass(frozen=True)
class Job:
    """All that a worker needs to prepare any unit."""

    layout: str
    root: Path
    folder: Path
    sources: Sequence[Source]
    preparation: Preparation
    dtype: str
    shard: int

    @property
    def units(self) -> int:
        return -(-len(self.sources) // self.shard)

    def members(self, unit: int) -> Sequence[Source]:
        return self.sources[unit * self.shard : (unit + 1) * self.shard]

    def settings(self) -> dict[str, Any]:
        """What two runs must share for the second to go on with the first."""
        listing = json.dumps([_plain(source) for source in self.sources], sort_keys=True)
        return {
            "format": FORMAT,
            "layout": self.layout,
            "root": str(self.root),
            "rows": len(self.sources),
            "sources": hashlib.sha256(listing.encode()).hexdigest(),
            "preparation": self.preparation.to_dict(),
            "dtype": self.dtype,
            "shard": self.shard,
        }


@dataclass
class Prepared:
    """What a job came to.

    Attributes:
        kept: number of studies in the store.
        refused: (id, path, reason) of each that is not.
        noted: number of kept studies that the reader remarked on (see their `notes`).
        held_back: number of kept studies that are also on another side of the splits, and so
            are not evaluated on (see `Store.crossings`).
    """

    kept: int = 0
    refused: list[tuple[str, str, str]] = field(default_factory=list)
    noted: int = 0
    held_back: int = 0

    def reasons(self) -> dict[str, int]:
        """How often each reason stands, without the paths."""
        counts: dict[str, int] = {}
        for _, path, reason in self.refused:
            short = reason.removeprefix(path).lstrip(": ")
            counts[short] = counts.get(short, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))


def prepare_archive(
    layout: str,
    root: Path | str,
    folder: Path | str,
    *,
    preparation: Preparation | None = None,
    dtype: str = "uint8",
    shard: int | None = None,
    workers: int = 1,
    engine: str = "local",
    progress: Progress | None = None,
) -> Prepared:
    """Prepare an archive into a store; goes on where an earlier run was stopped.

    Args:
        layout: one of `LAYOUTS`.
        root: the archive (see the layout's module).
        folder: the store to make.
        preparation: the layout's published one by default.
        dtype: "uint8" or "float16", see `Quantisation`.
        shard: studies a file; 64 MiB of prepared values by default.
        workers: processes; with engine "ray" the cluster's workers take units instead.
        progress: called with (studies done, studies in all).

    Raises:
        SourceError: if the archive is not of that layout.
        StoreError: if the folder holds something else, or another job's work; if it is being
            worked on; or if a worker was killed.
    """
    if layout not in LAYOUTS:
        raise SourceError(f"layout {layout!r} is unknown: use {', '.join(LAYOUTS)}.")
    known = LAYOUTS[layout]
    root = absolute(root)
    preparation = preparation or known.preparation
    if preparation is None:
        raise StoreError(f"layout {layout!r} has no published preparation: choose one.")
    return prepare_sources(
        known,
        known.find(root),
        folder,
        root=root,
        preparation=preparation,
        dtype=dtype,
        shard=shard,
        workers=workers,
        engine=engine,
        progress=progress,
    )


def prepare_sources(
    layout: Layout,
    sources: Sequence[Source],
    folder: Path | str,
    *,
    root: Path,
    preparation: Preparation,
    dtype: str = "uint8",
    shard: int | None = None,
    workers: int = 1,
    engine: str = "local",
    progress: Progress | None = None,
) -> Prepared:
    """As :func:`prepare_archive`, for sources that are listed already."""
    if engine not in ENGINES:
        raise StoreError(f"engine {engine!r} is unknown: use {' or '.join(ENGINES)}.")
    bytes_each = int(np.prod(preparation.size)) * np.dtype(dtype).itemsize
    job = Job(
        layout.name,
        root,
        absolute(folder),
        sources,
        preparation,
        dtype,
        shard or max(1, min(256, SHARD_BYTES // bytes_each)),
    )
    if root == job.folder or root.is_relative_to(job.folder):
        raise StoreError(f"{job.folder} holds the scans themselves: give the store its own folder.")
    if _is_finished(job):
        return _summary(job)
    _refuse_foreign(job)
    with _alone(job):
        _begin(job)
        waiting = [unit for unit in range(job.units) if not _rows_file(job, unit).exists()]
        done = len(sources) - sum(len(job.members(unit)) for unit in waiting)
        run = _with_ray if engine == "ray" else _with_processes
        for unit in run(job, waiting, workers):
            done += len(job.members(unit))
            if progress:
                progress(done, len(sources))
        _finish(job)
    return _summary(job)


# --- one unit -------------------------------------------------------------------------------


def prepare_unit(job: Job, unit: int) -> int:
    """Prepare the studies of a unit, write its shard and its rows, give the unit back."""
    layout = LAYOUTS[job.layout]
    quantisation = Quantisation.of(job.preparation, job.dtype)
    first = unit * job.shard
    block = np.zeros((len(job.members(unit)), *job.preparation.size), job.dtype)
    rows = []
    with _one_thread():
        for place, source in enumerate(job.members(unit)):
            try:
                if source.refusal:
                    raise SourceError(source.refusal)
                row, block[place] = _prepared(job, layout, source, quantisation)
                rows.append({"row": first + place, **row})
            except (ScanError, SourceError, OSError) as error:
                rows.append(
                    {
                        "id": source.id,
                        "source": _relative(source.path, job.root),
                        "refused": " ".join(str(error).split()),
                    }
                )
    array = zarr.open_array(job.folder / VOLUMES, mode="r+")
    array[first : first + len(block)] = block
    for shard in (job.folder / VOLUMES / "c" / str(unit)).rglob("*"):
        if shard.is_file():
            sync(shard)  # on the disk before the rows say so
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with atomic_file(_rows_file(job, unit)) as temporary:
        temporary.write_text(lines, "utf-8")
    return unit


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order, whoever prepares; and workers share the cores without waiting."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _prepared(
    job: Job, layout: Layout, source: Source, quantisation: Quantisation
) -> tuple[dict[str, Any], np.ndarray]:
    found = source
    scan, source = layout.read(found)
    volume = prepare(scan, job.preparation)[0]
    masks = layout.masks(found) if layout.masks else {}
    stored = quantisation.encode(volume)
    row = {
        "id": source.id,
        "splits": list(source.splits),
        "case": source.case,
        "report": source.report,
        "caption": source.caption,
        "questions": list(source.questions),
        "labels": list(source.labels),
        "places": [
            {"label": name, "cells": _cells(mask, scan, job.preparation).tobytes().hex()}
            for name, mask in masks.items()
        ],
        "source": _relative(source.path, job.root),
        "source_sha256": content_hash(source.path),
        "volume_sha256": hashlib.sha256(stored.tobytes()).hexdigest(),
        "fingerprint": fingerprint(volume).tobytes().hex(),
        "original_shape": list(scan.array.shape),
        "spacing_mm": [float(mm) for mm in scan.spacing_mm],
        "modality": scan.modality,
        "units": scan.units,
        "notes": list(scan.warnings),
        "metadata": json.dumps(source.metadata, ensure_ascii=False, sort_keys=True),
    }
    return row, stored


def _cells(mask: np.ndarray, scan: Scan, preparation: Preparation) -> np.ndarray:
    """The fullest voxel of each cell of the prepared volume, as uint8: `cell_grid` of them."""
    whole = replace(preparation, intensity="window", window=((0.0, 0.0), (1.0, 1.0)), pad_value=0.0)
    filled = prepare(replace(scan, array=mask.astype(np.float32)), whole)[0]
    grid = cell_grid(preparation.size)
    wanted = [(0, CELL * cells - size) for cells, size in zip(grid, filled.shape, strict=True)]
    blocks = np.pad(filled, wanted).reshape([n for cells in grid for n in (cells, CELL)])
    return np.round(255 * blocks.max(axis=(1, 3, 5))).astype(np.uint8)


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _plain(source: Source) -> dict[str, Any]:
    return {**asdict(source), "path": str(source.path)}


# --- engines --------------------------------------------------------------------------------

_job: Job  # of a worker process


def _with_processes(job: Job, units: Sequence[int], workers: int) -> Iterator[int]:
    """Each unit as soon as it is done."""
    if workers <= 1 or len(units) <= 1:
        for unit in units:
            yield prepare_unit(job, unit)
        return
    # "spawn": forking a process that has used torch's threads can hang
    context = multiprocessing.get_context("spawn")
    with (
        _children_of_one_thread(),
        ProcessPoolExecutor(workers, context, _start_worker, (job, os.getpid())) as pool,
    ):
        waiting = [pool.submit(_prepare_here, unit) for unit in units]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BrokenProcessPool as error:
            raise StoreError(
                f"{job.folder}: a worker was killed, most often for want of memory; what is done "
                "is kept: run the same command again, with fewer --workers."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _children_of_one_thread() -> Iterator[None]:
    """Libraries read these when they are loaded; workers whose threads compete are slower."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start_worker(job: Job, parent: int) -> None:
    global _job
    _job = job
    lock = (job.folder / WORK / "workers").open("a")
    fcntl.flock(lock, fcntl.LOCK_SH)  # held while this process lives

    def leave_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        lock.close()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _prepare_here(unit: int) -> int:
    return prepare_unit(_job, unit)


def _with_ray(job: Job, units: Sequence[int], workers: int) -> Iterator[int]:
    """As `_with_processes`, on the workers of a Ray cluster that see the same storage."""
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise StoreError("engine 'ray' needs Ray: pip install 'med3dvlm[ray]'.") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, num_cpus=None if os.environ.get("RAY_ADDRESS") else workers)
    shared = ray.put(job)

    def run(row: dict[str, Any]) -> dict[str, Any]:
        return {"unit": prepare_unit(ray.get(shared), int(row["unit"]))}

    dataset = ray.data.from_items([{"unit": unit} for unit in units]).repartition(
        max(1, len(units))
    )
    for row in dataset.map(run).iter_rows():
        yield int(row["unit"])


# --- the folder while it is made ---------------------------------------------------------------


@contextmanager
def _alone(job: Job) -> Iterator[None]:
    """No other run on this store, and no worker left of one that was killed.

    Raises:
        StoreError: if another run is at work.
    """
    work = job.folder / WORK
    work.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        run = stack.enter_context((work / "run").open("a"))
        _lock(run, 0.0, f"{job.folder}: another prepare is at work on it; wait until it ends.")
        workers = stack.enter_context((work / "workers").open("a"))
        _lock(workers, LOCK_SECONDS, f"{job.folder}: workers of an earlier run are still alive.")
        fcntl.flock(workers, fcntl.LOCK_UN)
        yield


def _lock(file: Any, seconds: float, message: str) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() >= end:
                raise StoreError(message) from error
            time.sleep(0.1)


def _begin(job: Job) -> None:
    """The settings and the empty array; or, of an earlier run, a check that it is the same."""
    settings, path = job.settings(), job.folder / WORK / "job.json"
    if path.is_file():
        _same(job, json.loads(path.read_text("utf-8")), settings)
        for pattern in (".*", "*.partial"):  # ours and Zarr's writes that were cut off
            for leftover in job.folder.rglob(pattern):
                leftover.unlink()
    else:
        write_json(path, settings)
    job.preparation.save(job.folder / PREPARATION)
    if not (job.folder / VOLUMES / "zarr.json").is_file():
        shutil.rmtree(job.folder / VOLUMES, ignore_errors=True)
        create_volumes(
            job.folder / VOLUMES, len(job.sources), job.preparation.size, job.dtype, shard=job.shard
        )


def _refuse_foreign(job: Job) -> None:
    """A folder that holds anything but this work is somebody's.

    Raises:
        StoreError: if it is.
    """
    if not job.folder.exists() or (job.folder / WORK / "job.json").is_file():
        return
    if not job.folder.is_dir():
        raise StoreError(f"{job.folder} is a file: give a folder for the store.")
    others = sorted(path.name for path in job.folder.iterdir() if path.name != WORK)
    if others:
        raise StoreError(
            f"{job.folder} holds other things ({', '.join(others[:3])}): give the store a folder "
            "of its own."
        )


def _same(job: Job, old: dict[str, Any], new: dict[str, Any]) -> None:
    different = [key for key in new if old.get(key) != new[key]]
    if different:
        shown = "; ".join(f"{key}: {old.get(key)} against {new[key]}" for key in different)
        raise StoreError(
            f"{job.folder} was begun by another job ({shown}): give another folder, or remove it."
        )


def _is_finished(job: Job) -> bool:
    """Whether the store is there already, of the same job.

    Raises:
        StoreError: if it is of another one.
    """
    path = job.folder / STORE
    if not path.is_file():
        return False
    _same(job, json.loads(path.read_text("utf-8"))["job"], job.settings())
    shutil.rmtree(job.folder / WORK, ignore_errors=True)  # killed just before this was done
    return True


def _rows_file(job: Job, unit: int) -> Path:
    return job.folder / WORK / "rows" / f"{unit:08d}.jsonl"


def _finish(job: Job) -> None:
    """Gather the rows into the manifest; the store is one when store.json is there."""
    kept: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for unit in range(job.units):
        for line in _rows_file(job, unit).read_text("utf-8").splitlines():
            row = json.loads(line)
            if "refused" in row:
                refused.append(row)
            else:
                kept.append(_unpacked(row))
    crossings = _crossings(kept)
    with atomic_file(job.folder / MANIFEST) as temporary:
        table = pa.Table.from_pylist(kept, schema=SCHEMA)
        parquet.write_table(table, temporary, compression="zstd")
    _write_csv(
        job.folder / REFUSED,
        ("id", "source", "reason"),
        [(row["id"], row["source"], row["refused"]) for row in refused],
    )
    columns = tuple(column.name for column in fields(Crossing))
    _write_csv(job.folder / CROSSINGS, columns, [astuple(crossing) for crossing in crossings])
    quantisation = Quantisation.of(job.preparation, job.dtype)
    info = {
        "format": FORMAT,
        "studies": len(kept),
        "refused": len(refused),
        **asdict(quantisation),
        "labels": list(LAYOUTS[job.layout].labels),
        "placed": list(LAYOUTS[job.layout].placed),
        "job": job.settings(),
    }
    write_json(job.folder / STORE, info)
    shutil.rmtree(job.folder / WORK)


def _unpacked(row: dict[str, Any]) -> dict[str, Any]:
    places = [{**place, "cells": bytes.fromhex(place["cells"])} for place in row["places"]]
    return {**row, "places": places, "fingerprint": bytes.fromhex(row["fingerprint"])}


def _crossings(rows: Sequence[dict[str, Any]]) -> list[Crossing]:
    """The studies that are the same on two sides of the splits."""
    prints = [np.frombuffer(row["fingerprint"], np.uint8) for row in rows]
    return find_crossings(
        [row["id"] for row in rows],
        [row["splits"] for row in rows],
        [row["case"] for row in rows],
        [row["volume_sha256"] for row in rows],
        np.array(prints, np.uint8).reshape(len(rows), GRID, GRID, GRID),
    )


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with atomic_file(path) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(rows)


def _summary(job: Job) -> Prepared:
    table = Store(job.folder).table
    with (job.folder / REFUSED).open(encoding="utf-8", newline="") as file:
        refused = [
            (row["id"], str(job.root / row["source"]), row["reason"])
            for row in csv.DictReader(file)
        ]
    noted = sum(1 for notes in table["notes"].to_pylist() if notes)
    return Prepared(len(table), refused, noted, len(Store(job.folder).held_back))


def prepare_phantoms(
    folder: Path | str,
    count: int,
    *,
    split: str,
    preparation: Preparation,
    seed: int = 0,
    workers: int = 2,
    progress: Progress | None = None,
) -> Store:
    """A store of generated studies; one that is there already and is the same is kept."""
    sources = phantom_sources(count, split=split, seed=seed)
    prepare_sources(
        LAYOUTS["phantoms"],
        sources,
        folder,
        root=Path("phantoms"),
        preparation=preparation,
        workers=workers,
        progress=progress,
    )
    return Store(folder)
