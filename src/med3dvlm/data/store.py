"""A store of prepared studies: the volumes in one memory-mapped array, the texts beside it.

preparation.json   how the volumes were prepared
volumes.npy        (n, D, H, W) uint8, 0..255 for the prepared 0..1
studies.jsonl      one study a line: id, report, caption, questions, concepts
concepts.json      the names of the concepts, in the order of each study's vector
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from med3dvlm.data.phantoms import CONCEPTS, PHANTOM_VERSION, concept_vector, make_study
from med3dvlm.files import atomic_folder, write_json
from med3dvlm.scan import Preparation, compare_preparations, prepare

Progress = Callable[[int, int], None]


class StoreError(ValueError):
    """A store that cannot be used, in one sentence with the remedy."""


class Store:
    """A store opened for reading."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        try:
            self.preparation = Preparation.load(self.folder / "preparation.json")
            self.volumes = np.load(self.folder / "volumes.npy", mmap_mode="r")
            lines = (self.folder / "studies.jsonl").read_text("utf-8").splitlines()
            self.studies: list[dict[str, Any]] = [json.loads(line) for line in lines]
            self.concepts: list[str] = json.loads((self.folder / "concepts.json").read_text())
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{self.folder} is not a store of prepared studies ({error}): prepare it again."
            ) from error
        if len(self.studies) != len(self.volumes):
            raise StoreError(
                f"{self.folder} holds {len(self.volumes)} volumes and {len(self.studies)} texts: "
                "prepare it again."
            )

    def __len__(self) -> int:
        return len(self.studies)

    def check_preparation(self, preparation: Preparation) -> None:
        """Raise a ValueError that shows both where a model wants other volumes than these."""
        compare_preparations(self.preparation, preparation)

    def concept_matrix(self) -> np.ndarray:
        """(n, concepts) float32, 0 or 1."""
        return np.array([study["concepts"] for study in self.studies], dtype=np.float32)


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
    folder = Path(folder)
    source = {"phantoms": PHANTOM_VERSION, "seed": seed, "split": split, "count": count}
    if _is_from(folder, source, preparation):
        return Store(folder)
    size = preparation.size
    with atomic_folder(folder) as temporary:
        volumes = np.lib.format.open_memmap(
            temporary / "volumes.npy", mode="w+", dtype=np.uint8, shape=(count, *size)
        )
        jobs = ((index, seed, split, preparation) for index in range(count))
        # "spawn": forking a process that has used torch's threads can hang
        context = multiprocessing.get_context("spawn")
        with (
            context.Pool(workers, initializer=_one_thread) as pool,
            (temporary / "studies.jsonl").open("w", encoding="utf-8") as lines,
        ):
            for index, (volume, study) in enumerate(pool.imap(_prepare_one, jobs, chunksize=8)):
                volumes[index] = volume
                lines.write(json.dumps(study) + "\n")
                if progress:
                    progress(index + 1, count)
        volumes.flush()
        write_json(temporary / "concepts.json", list(CONCEPTS))
        write_json(temporary / "source.json", source)
        preparation.save(temporary / "preparation.json")
    return Store(folder)


def _is_from(folder: Path, source: dict[str, Any], preparation: Preparation) -> bool:
    path = folder / "source.json"
    if not path.is_file() or json.loads(path.read_text()) != source:
        return False
    return Preparation.load(folder / "preparation.json") == preparation


def _one_thread() -> None:
    """Workers share the cores already; more threads in each would only wait for each other."""
    torch.set_num_threads(1)


def _prepare_one(job: tuple[int, int, str, Preparation]) -> tuple[np.ndarray, dict[str, Any]]:
    index, seed, split, preparation = job
    study = make_study(index, seed=seed, split=split)
    volume = prepare(study.scan(), preparation)[0]
    texts = {
        "id": study.study_id,
        "report": study.report,
        "caption": study.caption,
        "questions": [asdict(question) for question in study.questions],
        "concepts": concept_vector(study).astype(int).tolist(),
    }
    return np.round(volume * 255).astype(np.uint8), texts
