"""What the store gains: reading against .nii.gz, preparing with more workers, random access.

Every figure compares two ways in the same run, so that ratios hold on a noisy machine.
"""

from __future__ import annotations

import time
from importlib.resources import as_file, files
from pathlib import Path
from statistics import median
from typing import Any

import nibabel
import numpy as np

from med3dvlm.benchmark.measure import machine, timed
from med3dvlm.data.layouts import LAYOUTS, phantom_sources
from med3dvlm.data.prepare import prepare_archive, prepare_sources
from med3dvlm.data.store import DTYPES, Store
from med3dvlm.evaluate.tables import Results
from med3dvlm.scan import PRESETS, Preparation, prepare, read_scan, save_nifti

VOLUMES = 8  # 128×256×256 ones that are read
SMALL_STUDIES = 5000
PREPARED = 160  # phantoms that are made and prepared
READS = 500  # small studies timed at each end of the store
SMALL = Preparation(size=(8, 16, 16), intensity="minmax", window=((0, 0), (1, 1)))


def benchmark_store(folder: Path, *, small_studies: int = SMALL_STUDIES) -> Results:
    """Rows of (what, figure, against, ratio); files go under `folder`."""
    rows = [*_reading(folder), *_preparing(folder), *_random_access(folder, small_studies)]
    results = Results(machine())
    results.add("Store", rows, shares=False)
    return results


def _reading(folder: Path) -> list[dict[str, Any]]:
    """A prepared 128×256×256 volume: .nii.gz of float32, as published, against the store."""
    scans = _scans(folder / "scans")
    plain = folder / "volume.nii.gz"
    volume = prepare(read_scan(next(scans.iterdir())), PRESETS["m3d"])[0]
    nibabel.save(nibabel.Nifti1Image(volume.transpose(2, 1, 0), np.eye(4)), plain)
    # alternating, so that both meet the same noise
    stores = {}
    for dtype in DTYPES:
        prepare_archive("folder", scans, folder / dtype, preparation=PRESETS["m3d"], dtype=dtype)
        stores[dtype] = Store(folder / dtype)
    times: dict[str, list[float]] = {name: [] for name in ("nii.gz", *stores)}
    for index in range(VOLUMES):
        times["nii.gz"].append(timed(lambda: np.asarray(nibabel.load(plain).dataobj)))
        for dtype, store in stores.items():
            times[dtype].append(timed(lambda store=store, i=index: store.stored(i)))
    usual = median(times["nii.gz"])
    rows = []
    for dtype in stores:
        size = sum(f.stat().st_size for f in (folder / dtype).rglob("*") if f.is_file()) / VOLUMES
        share = size / plain.stat().st_size
        rows.append(_row(f"read a volume, {dtype}, s", median(times[dtype]), usual))
        rows.append(_row(f"size of a volume, {dtype}, MB", size / 1e6, size / share / 1e6))
    return rows


def _preparing(folder: Path) -> list[dict[str, Any]]:
    """Studies a second with one process, and with two once both have started."""
    rates = {}
    for workers in (1, 2):
        moments: list[tuple[float, int]] = []
        prepare_sources(
            LAYOUTS["phantoms"],
            phantom_sources(PREPARED, split="test", seed=0),
            folder / f"with-{workers}",
            root=Path("phantoms"),
            preparation=PRESETS["demo"],
            shard=4,
            workers=workers,
            progress=lambda done, _, m=moments: m.append((time.perf_counter(), done)),
        )
        (start, first), (end, last) = moments[len(moments) // 4], moments[-1]
        rates[workers] = (last - first) / (end - start)
    return [
        {
            "what": "prepare phantoms with 2 workers, studies/s",
            "figure": rates[2],
            "against": rates[1],
            "ratio": rates[2] / rates[1],
        }
    ]


def _random_access(folder: Path, count: int) -> list[dict[str, Any]]:
    """Small studies at random from the last tenth of a store, against its first tenth."""
    source = folder / "small"
    source.mkdir()
    random = np.random.default_rng(0)
    for index in range(count):
        np.save(source / f"{index:05d}.npy", random.random(SMALL.size, np.float32))
    prepare_archive("folder", source, folder / "small.store", preparation=SMALL)
    store = Store(folder / "small.store")
    tenth = count // 10
    first, last = [], []
    for index in random.integers(0, tenth, min(READS, count)).tolist():
        first.append(timed(lambda i=index: store.stored(i)))
        last.append(timed(lambda i=count - 1 - index: store.stored(i)))
    return [_row(f"read one of the last of {count} small studies, s", median(last), median(first))]


def _scans(folder: Path) -> Path:
    """The bundled CT as several files, each with a little noise of its own."""
    folder.mkdir(parents=True)
    bundled = files("med3dvlm") / "assets" / "scans" / "ct_abdomen_pelvis.nii.gz"
    with as_file(bundled) as path:
        scan = read_scan(path)
    random = np.random.default_rng(0)
    for index in range(VOLUMES):
        noise = random.integers(-8, 9, scan.array.shape).astype(np.float32)
        noisy = type(scan)(scan.array + noise, scan.spacing_mm, scan.affine, "CT", "HU")
        save_nifti(noisy, folder / f"{index}.nii.gz")
    return folder


def _row(what: str, figure: float, against: float) -> dict[str, Any]:
    return {"what": what, "figure": figure, "against": against, "ratio": against / figure}
