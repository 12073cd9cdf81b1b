"""Three formats for prepared volumes, measured side by side: `python benchmarks/store_formats.py`.

Each holds the same 128×256×256 uint8 volumes (a real CT, prepared, with noise): Zarr v3 with
shards, one Blosc2 array a shard, and WebDataset (tar) of Blosc2-compressed samples. Printed:
megabytes a volume, and seconds a volume for reading in order, at random, an eighth of a volume,
and in order with two processes. Needs `pip install blosc2 webdataset` beside the extra `data`.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from importlib.resources import as_file, files
from pathlib import Path

import blosc2
import numpy as np
import webdataset
import zarr

from med3dvlm.data.store import create_volumes
from med3dvlm.scan import PRESETS, prepare, read_scan

COUNT, SHARD = 32, 8
SIZE = (128, 256, 256)
EIGHTH = (slice(32, 96), slice(64, 192), slice(64, 192))


def volumes() -> np.ndarray:
    bundled = files("med3dvlm") / "assets" / "scans" / "ct_abdomen_pelvis.nii.gz"
    with as_file(bundled) as path:
        volume = prepare(read_scan(path), PRESETS["m3d"])[0] * 255
    random = np.random.default_rng(0)
    return np.stack(
        [
            np.clip(volume + random.integers(-2, 3, SIZE), 0, 255).astype(np.uint8)
            for _ in range(COUNT)
        ]
    )


class Zarr:
    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, data: np.ndarray) -> None:
        create_volumes(self.folder, COUNT, SIZE, "uint8", shard=SHARD)[:] = data

    def read(self, index: int, part: tuple = ()) -> np.ndarray:
        return np.asarray(self._array()[(index, *part)])

    def _array(self):
        if not hasattr(self, "array"):
            self.array = zarr.open_array(self.folder, mode="r")
        return self.array


class Blosc:
    """One array a shard; blocks of half a megabyte, so that parts can be read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.arrays: dict[int, blosc2.NDArray] = {}

    def write(self, data: np.ndarray) -> None:
        self.folder.mkdir()
        options = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.NOFILTER]}
        for first in range(0, COUNT, SHARD):
            blosc2.asarray(
                data[first : first + SHARD],
                urlpath=str(self.folder / f"{first // SHARD}.b2nd"),
                chunks=(1, *SIZE),
                blocks=(1, 8, 256, 256),
                cparams=options,
            )

    def read(self, index: int, part: tuple = ()) -> np.ndarray:
        shard, place = divmod(index, SHARD)
        if shard not in self.arrays:
            self.arrays[shard] = blosc2.open(str(self.folder / f"{shard}.b2nd"), mode="r")
        return self.arrays[shard][(place, *part)]


class Web:
    """Samples stream in their order only; one at random reads its shard up to there."""

    def __init__(self, folder: Path):
        self.folder = folder

    def write(self, data: np.ndarray) -> None:
        self.folder.mkdir()
        pattern = str(self.folder / "%d.tar")
        with webdataset.ShardWriter(pattern, maxcount=SHARD, verbose=0) as sink:
            for index, volume in enumerate(data):
                packed = blosc2.compress2(volume, codec=blosc2.Codec.LZ4, clevel=5)
                sink.write({"__key__": f"{index:06d}", "b2": packed})

    def samples(self, shard: int):
        path = str(self.folder / f"{shard}.tar")
        for sample in webdataset.WebDataset(path, shardshuffle=False):
            yield np.frombuffer(blosc2.decompress2(sample["b2"]), np.uint8).reshape(SIZE)

    def read(self, index: int, part: tuple = ()) -> np.ndarray:
        shard, place = divmod(index, SHARD)
        for at, volume in enumerate(self.samples(shard)):
            if at == place:
                return volume[part]
        raise IndexError(index)


def in_order(reader: Zarr | Blosc | Web, indices: range) -> None:
    if isinstance(reader, Web):
        for shard in sorted({index // SHARD for index in indices}):
            for _ in reader.samples(shard):
                pass
    else:
        for index in indices:
            reader.read(index)


def seconds(act) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def with_two(kind: type, folder: Path) -> float:
    """Two processes, half of the shards each; started before the clock."""
    half = COUNT // 2
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        pool.map(abs, range(8))
        parts = [(kind(folder), range(half)), (kind(folder), range(half, COUNT))]
        return seconds(lambda: pool.starmap(in_order, parts))


def main() -> int:
    data = volumes()
    random = np.random.default_rng(1).integers(0, COUNT, COUNT).tolist()
    print("| format | MB | in order, ms | at random, ms | an eighth, ms | two processes, ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as root:
        for kind in (Zarr, Blosc, Web):
            folder = Path(root) / kind.__name__
            kind(folder).write(data)
            size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / COUNT / 1e6
            reader = kind(folder)
            in_order(reader, range(COUNT))  # into the page cache
            figures = [
                seconds(lambda r=reader: in_order(r, range(COUNT))),
                seconds(lambda r=reader: [r.read(i) for i in random]),
                seconds(lambda r=reader: [r.read(i, EIGHTH) for i in random]),
                with_two(kind, folder),
            ]
            cells = " | ".join(f"{1000 * figure / COUNT:.1f}" for figure in figures)
            print(f"| {kind.__name__} | {size:.2f} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
