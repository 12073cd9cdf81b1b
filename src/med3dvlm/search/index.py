"""A first, exact index of studies: embeddings in one array, what is known of each beside it.

    index.json              what made it and which two files are current; replaced last
    embeddings-<n>.npy      (n, dim) float32, rows of length 1
    studies-<n>.jsonl       one study a line, in the order of the rows

The two data files are written under new names before index.json points to them, so a kill at any
moment leaves the index as it was before or as it is after.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from med3dvlm.files import atomic_file, write_json

FORMAT = 1


class SearchIndexError(ValueError):
    """An index that cannot be used, in one sentence with the remedy."""


class Embedder(Protocol):
    """What an index needs of a model; :class:`VolumeTextDualEncoder` has it."""

    label: str
    preparation: Any

    def fingerprint(self) -> str: ...

    def embed_scans(self, scans: Any) -> np.ndarray: ...


@dataclass(frozen=True)
class Study:
    """One indexed study; `sha256` is of its files' content."""

    id: str
    path: str
    sha256: str
    report: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Hit:
    """One result; `score` is the cosine of the angle between query and study."""

    rank: int
    score: float
    id: str
    path: str
    report: str
    metadata: dict[str, Any]


class SearchIndex:
    """Studies and their embeddings, in memory, with a folder behind them."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = settings
        self.studies: list[Study] = []
        self.embeddings = np.zeros((0, 0), dtype=np.float32)

    @classmethod
    def create(cls, folder: Path | str, model: Embedder) -> SearchIndex:
        """An empty index for a model; nothing is written before :meth:`save`."""
        return cls(Path(folder), {"format": FORMAT, **_made_by(model)})

    @classmethod
    def open(cls, folder: Path | str, *, model: Embedder | None = None) -> SearchIndex:
        """Open an index; with `model`, refuse it unless that very model made it.

        Raises:
            SearchIndexError: for a missing or damaged index, or one of another model.
        """
        folder = Path(folder)
        head = folder / "index.json"
        if not head.is_file():
            raise SearchIndexError(f"{folder} is no index: build one with med3dvlm index build.")
        try:
            settings = json.loads(head.read_text("utf-8"))
            index = cls(folder, settings)
            index.embeddings = np.load(folder / settings["embeddings"], allow_pickle=False)
            lines = (folder / settings["studies"]).read_text("utf-8").splitlines()
            index.studies = [Study(**json.loads(line)) for line in lines]
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise SearchIndexError(
                f"{folder} is damaged ({error}): build it again with med3dvlm index build."
            ) from error
        if index.embeddings.ndim != 2 or len(index.embeddings) != len(index.studies):
            raise SearchIndexError(
                f"{folder} is damaged: {len(index.embeddings)} embeddings for "
                f"{len(index.studies)} studies; build it again with med3dvlm index build."
            )
        if model is not None:
            index._check_made_by(model)
        return index

    def _check_made_by(self, model: Embedder) -> None:
        for key, now in _made_by(model).items():
            if key != "model" and self.settings.get(key) != now:
                raise SearchIndexError(
                    f"{self.folder} was made by model {self.settings.get('model')!r} ({key} "
                    f"{self.settings.get(key)}), not by {model.label!r} ({key} {now}): search "
                    "with that model, or build the index again."
                )

    def __len__(self) -> int:
        return len(self.studies)

    def add(self, studies: Iterable[Study], embeddings: np.ndarray) -> None:
        """Add studies with their embeddings (n, dim); a study of a known path is replaced."""
        new = list(studies)
        paths = {study.path for study in new}
        kept = [i for i, study in enumerate(self.studies) if study.path not in paths]
        rows = self.embeddings[kept] if kept else np.zeros((0, embeddings.shape[1]), np.float32)
        self.embeddings = np.concatenate([rows, embeddings.astype(np.float32)])
        self.studies = [*(self.studies[i] for i in kept), *new]

    def save(self) -> None:
        """Write the index; until the last moment the folder holds the older one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        number = 1 + max(
            (int(p.stem.rsplit("-", 1)[1]) for p in self.folder.glob("studies-*.jsonl")), default=0
        )
        names = {"embeddings": f"embeddings-{number}.npy", "studies": f"studies-{number}.jsonl"}
        with (
            atomic_file(self.folder / names["embeddings"]) as temporary,
            temporary.open("wb") as file,
        ):
            np.save(file, self.embeddings)
        lines = "".join(json.dumps(asdict(study)) + "\n" for study in self.studies)
        with atomic_file(self.folder / names["studies"]) as temporary:
            temporary.write_text(lines, "utf-8")
        self.settings = {**self.settings, **names, "count": len(self.studies)}
        write_json(self.folder / "index.json", self.settings)
        for path in [*self.folder.glob("embeddings-*.npy"), *self.folder.glob("studies-*.jsonl")]:
            if path.name not in names.values():
                path.unlink()

    def search(
        self, query: np.ndarray, *, top: int = 10, where: Mapping[str, str] | None = None
    ) -> list[Hit]:
        """The `top` studies nearest to an embedding (dim,), best first.

        Args:
            where: metadata that a hit must have, compared as text.

        Raises:
            SearchIndexError: for an unknown key in `where`, naming the known ones.
        """
        rows = np.array([i for i, s in enumerate(self.studies) if self._matches(s, where or {})])
        if not len(rows):
            return []
        scores = self.embeddings[rows] @ np.asarray(query, dtype=np.float32)
        best = np.argsort(-scores, kind="stable")[:top]
        return [
            self._hit(rank, float(scores[i]), self.studies[rows[i]])
            for rank, i in enumerate(best, start=1)
        ]

    def _matches(self, study: Study, where: Mapping[str, str]) -> bool:
        known = {key for other in self.studies for key in other.metadata} if where else set()
        for key, value in where.items():
            if key not in known:
                raise SearchIndexError(
                    f"no study of {self.folder} has {key!r}: known are {', '.join(sorted(known))}."
                )
            if str(study.metadata.get(key)) != value:
                return False
        return True

    @staticmethod
    def _hit(rank: int, score: float, study: Study) -> Hit:
        return Hit(rank, score, study.id, study.path, study.report, study.metadata)

    def info(self) -> dict[str, Any]:
        """What the index holds and which model made it."""
        keys = sorted({key for study in self.studies for key in study.metadata})
        return {
            "folder": str(self.folder),
            "studies": len(self.studies),
            "with report": sum(bool(study.report) for study in self.studies),
            "dimension": int(self.embeddings.shape[1]),
            "columns": keys,
            **{key: self.settings.get(key) for key in ("model", "weights", "preparation")},
        }


def _made_by(model: Embedder) -> dict[str, str]:
    return {
        "model": model.label,
        "weights": model.fingerprint(),
        "preparation": model.preparation.fingerprint(),
    }
