"""A store of prepared studies: the volumes in one chunked, compressed array, the texts beside it.

    store.json        what the store is: format, layout it came from, dtype, range, labels
    preparation.json  how the volumes were prepared
    volumes.zarr/     (rows, D, H, W) uint8 or float16, a few chunks a volume, many volumes a shard
    manifest.parquet  one row a study: id, row of the array, texts, questions, source, hashes, …
    refused.csv       what could not be prepared, and why
    crossings.csv     studies that are the same on two sides of the splits (see `leakage`)

Zarr v3 with sharding (decision 0006): a volume, or a part of one, is one range request, from a
disk or through fsspec from object storage; a shard is one file.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import zarr
from zarr.codecs import BloscCodec

from med3dvlm.data.leakage import Crossing, leaking, side_of
from med3dvlm.data.sources import Progress
from med3dvlm.scan import Preparation, compare_preparations

if TYPE_CHECKING:
    import torch

FORMAT = 2
CELL = 8  # voxels along each side of a cell, in which it is kept where a label can be seen
CHUNK_BYTES = 8 * 2**20
DTYPES = ("uint8", "float16")
VOLUMES, MANIFEST = "volumes.zarr", "manifest.parquet"
REFUSED, CROSSINGS = "refused.csv", "crossings.csv"
STORE, PREPARATION = "store.json", "preparation.json"

QUESTION = pa.struct(
    [
        ("text", pa.string()),
        ("answer", pa.string()),
        ("kind", pa.string()),
        ("type", pa.int8()),
        ("choices", pa.list_(pa.string())),
        ("answer_choice", pa.string()),
    ]
)
PLACE = pa.struct([("label", pa.string()), ("cells", pa.binary())])
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),
        ("splits", pa.list_(pa.string())),
        ("case", pa.string()),
        ("report", pa.string()),
        ("caption", pa.string()),
        ("questions", pa.list_(QUESTION)),
        ("labels", pa.list_(pa.int8())),
        ("places", pa.list_(PLACE)),
        ("source", pa.string()),
        ("source_sha256", pa.string()),
        ("volume_sha256", pa.string()),
        ("fingerprint", pa.binary()),
        ("original_shape", pa.list_(pa.int32())),
        ("spacing_mm", pa.list_(pa.float64())),
        ("modality", pa.string()),
        ("units", pa.string()),
        ("notes", pa.list_(pa.string())),
        ("metadata", pa.string()),
    ]
)


class StoreError(ValueError):
    """A store that cannot be used, in one sentence with the remedy."""


@dataclass(frozen=True)
class Quantisation:
    """How prepared values lie in the array.

    uint8 holds 256 even steps from `low` to `high`, so no value is off by more than half a step
    ((high − low) / 510), a quarter of a step on average; float16 holds the values themselves.
    """

    dtype: str
    low: float
    high: float

    @classmethod
    def of(cls, preparation: Preparation, dtype: str) -> Quantisation:
        """That of a preparation, whose window says which values can come.

        Raises:
            StoreError: for another dtype than uint8 and float16.
        """
        if dtype not in DTYPES:
            raise StoreError(f"dtype {dtype!r} is unknown: use {' or '.join(DTYPES)}.")
        outputs = [output for _, output in preparation.window] + [preparation.pad_value]
        return cls(dtype, min(outputs), max(outputs))

    def encode(self, volume: np.ndarray) -> np.ndarray:
        if self.dtype == "float16":
            return volume.astype(np.float16)
        return np.round((volume - self.low) * (255 / (self.high - self.low))).astype(np.uint8)

    def decode(self, stored: Any) -> Any:
        """Stored values, an array or a tensor of any shape, as float32 of the same kind."""
        values = stored.astype(np.float32) if isinstance(stored, np.ndarray) else stored.float()
        gain, low = self.affine
        return values if (gain, low) == (1.0, 0.0) else values * gain + low

    @property
    def affine(self) -> tuple[float, float]:
        """(gain, low): a value is gain times what is stored, and low."""
        if self.dtype == "float16":
            return 1.0, 0.0
        return (self.high - self.low) / 255, self.low


def create_volumes(
    folder: Path, count: int, size: Sequence[int], dtype: str, *, shard: int
) -> zarr.Array:
    """An empty array for `count` volumes, `shard` of them a file.

    LZ4 because it is read at the speed of memory; the bytes of float16 are regrouped first, or
    their noise would hide what repeats.
    """
    width = np.dtype(dtype).itemsize
    depth, *plane = size
    # so that a part of a large volume is read without the whole
    steps = [step for step in range(1, depth + 1) if depth % step == 0]
    fitting = [step for step in steps if step * math.prod(plane) * width <= CHUNK_BYTES]
    codec = BloscCodec(
        cname="lz4", clevel=5, typesize=width, shuffle="noshuffle" if width == 1 else "bitshuffle"
    )
    return zarr.create_array(
        folder,
        shape=(count, *size),
        dtype=dtype,
        chunks=(1, max(fitting, default=1), *plane),
        shards=(shard, *size),
        compressors=codec,
        fill_value=0,
    )


def cell_grid(size: Sequence[int]) -> tuple[int, int, int]:
    """Numbers of cells along (D, H, W) of a prepared volume; the last ones may be cut."""
    depth, height, width = (-(-voxels // CELL) for voxels in size)
    return depth, height, width


class Store:
    """A store opened for reading; studies are numbered 0 to len − 1 in the manifest's order.

    Args:
        location: a local folder, or any URL that fsspec knows (s3://…, gs://…, memory://…).
        skip: ids of studies to leave out.

    Raises:
        StoreError: if it is no store, is not finished, or does not have a study named in `skip`.
    """

    def __init__(self, location: Path | str, *, skip: Sequence[str] = ()):
        self.location = str(location).rstrip("/")
        info = json.loads(self._read(STORE))
        if info.get("format") != FORMAT:
            raise StoreError(
                f"{self.location} is a store of format {info.get('format')}, this version reads "
                f"{FORMAT}: prepare it again."
            )
        self.info: dict[str, Any] = info
        self.preparation = Preparation.from_dict(json.loads(self._read(PREPARATION)))
        self.quantisation = Quantisation(info["dtype"], info["low"], info["high"])
        self.labels: list[str] = info["labels"]
        self.placed: list[str] = info["placed"]
        self.table = _read_parquet(self._read(MANIFEST))
        if skip:
            self.table = self._without(skip)
        self.ids: list[str] = self.table["id"].to_pylist()
        self.rows = self.table["row"].to_numpy()
        self.kept: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getstate__(self) -> dict[str, Any]:
        """Workers open the array themselves."""
        return {k: v for k, v in self.__dict__.items() if k != "volumes"} | {"kept": None}

    @cached_property
    def volumes(self) -> zarr.Array:
        """(rows, D, H, W) as stored; study i lies in row `rows[i]`."""
        return zarr.open_array(f"{self.location}/{VOLUMES}", mode="r")

    def stored(self, index: int, part: tuple[slice, ...] = ()) -> np.ndarray:
        """(D, H, W) of a study as stored, or the `part` of it that three slices name.

        Raises:
            StoreError: if the volume cannot be read, naming the study.
        """
        if self.kept is not None:
            return self.kept[(index, *part)]
        try:
            return np.asarray(self.volumes[(int(self.rows[index]), *part)])
        except Exception as error:  # a damaged shard fails in the codec, the index, the disk
            raise StoreError(
                f"{self.location}: the volume of study {self.ids[index]} cannot be read "
                f"({error}); prepare or copy the store again, or skip that study."
            ) from error

    def keep_in_memory(self) -> None:
        """Read every volume now; `stored` then gives parts of one array, not to be changed."""
        kept = np.empty((len(self), *self.preparation.size), self.info["dtype"])
        for index in range(len(self)):
            kept[index] = self.stored(index)
        self.kept = kept

    def volume(self, index: int, part: tuple[slice, ...] = ()) -> np.ndarray:
        """As `stored`, but the prepared values, float32."""
        return self.quantisation.decode(self.stored(index, part))

    def batches(self, size: int, *, progress: Progress | None = None) -> Iterator[torch.Tensor]:
        """All volumes in their order, prepared: (up to `size`, 1, D, H, W) float32 tensors."""
        import torch

        for first in range(0, len(self), size):
            last = min(first + size, len(self))
            volumes = np.stack([self.volume(index) for index in range(first, last)])
            yield torch.from_numpy(volumes).unsqueeze(1)
            if progress:
                progress(last, len(self))

    def drawn(self, number: int) -> int:
        """Which study item `epoch · len + i` is."""
        return number % len(self)

    def column(self, name: str) -> list[Any]:
        """A column of the manifest, in the studies' order: see :data:`SCHEMA`."""
        return self.table[name].to_pylist()

    def study(self, index: int) -> dict[str, Any]:
        """A row of the manifest: see :data:`SCHEMA`."""
        row: dict[str, Any] = self.table.slice(index, 1).to_pylist()[0]
        del row["fingerprint"], row["places"]  # for `leakage` and `places` alone
        row["metadata"] = json.loads(row["metadata"] or "{}")
        return row

    def voxel_mm(self, index: int) -> tuple[float, float, float]:
        """(z, y, x) distance of a study's prepared voxels; crops are not taken into account."""
        if self.preparation.spacing_mm is not None:
            return self.preparation.spacing_mm
        row = self.study(index)  # stretched: the cube it was made from
        mm, shape = row["spacing_mm"], row["original_shape"]
        z, y, x = (s * n / m for s, n, m in zip(mm, shape, self.preparation.size, strict=True))
        return z, y, x

    def index_of(self, study_id: str) -> int:
        """The number of a study.

        Raises:
            StoreError: if there is none of that id.
        """
        if study_id not in self.ids:
            raise StoreError(f"{self.location} holds no study {study_id!r}.")
        return self.ids.index(study_id)

    def in_split(self, split: str, *, leaks: bool = False) -> np.ndarray:
        """The numbers of the studies of one split.

        Args:
            leaks: with those of validation and test that are also on another side of the splits.
        """
        out = set() if leaks or side_of(split) == 0 else self.held_back
        listed = zip(self.ids, self.table["splits"].to_pylist(), strict=True)
        chosen = [
            i for i, (name, splits) in enumerate(listed) if split in splits and name not in out
        ]
        return np.array(chosen, dtype=np.int64)

    @cached_property
    def crossings(self) -> list[Crossing]:
        """Pairs of studies that are the same on two sides of the splits."""
        rows = csv.DictReader(io.StringIO(self._read(CROSSINGS).decode("utf-8"), newline=""))
        return [Crossing(**{**row, "similarity": float(row["similarity"])}) for row in rows]

    @cached_property
    def held_back(self) -> set[str]:
        """The ids of validation and test that are also on another side of the splits."""
        return leaking(self.crossings)

    def groups(self) -> list[list[int]]:
        """Studies by report: those that share one, as reconstructions of a scan do, together.

        Retrieval that counts a sibling as a hit takes these; the published protocol does not.
        """
        members: dict[str, list[int]] = {}
        for index, report in enumerate(self.table["report"].to_pylist()):
            members.setdefault(report or f"\0{index}", []).append(index)
        return list(members.values())

    def label_matrix(self) -> np.ndarray:
        """(studies, labels) float32, 0 or 1.

        Raises:
            StoreError: if some studies have no labels.
        """
        rows = self.table["labels"].to_pylist()
        if any(len(row) != len(self.labels) for row in rows):
            raise StoreError(f"{self.location}: not every study has its {len(self.labels)} labels.")
        return np.array(rows, dtype=np.float32)

    def places(self, index: int) -> np.ndarray:
        """Where a study shows each of `placed`: (labels, *cell_grid) uint8.

        A cell's value is the share, of 255, that its fullest voxel is filled.
        """
        grid = cell_grid(self.preparation.size)
        found = np.zeros((len(self.placed), *grid), np.uint8)
        for place in self.table["places"][index].as_py():
            cells = np.frombuffer(place["cells"], np.uint8).reshape(grid)
            found[self.placed.index(place["label"])] = cells
        return found

    def check_preparation(self, preparation: Preparation) -> None:
        """Raise a ValueError that shows both where a model wants other volumes than these."""
        compare_preparations(self.preparation, preparation)

    def _read(self, name: str) -> bytes:
        try:
            with fsspec.open(f"{self.location}/{name}", "rb") as file:
                return file.read()
        except (OSError, ValueError, ImportError) as error:
            if name == STORE:
                raise StoreError(
                    f"{self.location} is no finished store of prepared studies: run med3dvlm "
                    "prepare, again if it was stopped."
                ) from error
            raise StoreError(f"{self.location}: {name} cannot be read ({error}).") from error

    def _without(self, skip: Sequence[str]) -> pa.Table:
        unknown = sorted(set(skip) - set(self.table["id"].to_pylist()))
        if unknown:
            raise StoreError(
                f"{self.location} holds no study {unknown[0]!r}, which is to be skipped."
            )
        left_out = set(skip)
        kept = [study_id not in left_out for study_id in self.table["id"].to_pylist()]
        return self.table.filter(pa.array(kept))


def _read_parquet(content: bytes) -> pa.Table:
    """Without Arrow's threads: one that still runs when Python ends aborts the process."""
    file = parquet.ParquetFile(pa.BufferReader(content), pre_buffer=False)
    return file.read(use_threads=False)
