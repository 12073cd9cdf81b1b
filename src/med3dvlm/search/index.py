"""A first, exact index of studies: embeddings in one array, what is known of each beside it.

    index.json              what made it and which two files are current; replaced last
    embeddings-<n>.npy      (n, dim) float32, rows of length 1
    studies-<n>.jsonl       one study a line, in the order of the rows

The two data files are written under new names before index.json points to them, so a kill at any
moment leaves the index as it was before or as it is after.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from med3dvlm.files import atomic_file, write_json

try:
    import fcntl
except ImportError:  # Windows: one writer at a time is then up to the user
    fcntl = None

FORMAT = 1
REBUILD = "delete the folder and build it again with med3dvlm index build"


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
    """One indexed study; `sha256` is of its files' content, metadata are plain values."""

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
    """Studies and their embeddings, in memory, with a folder behind them.

    Attributes:
        settings: what index.json holds: format, model, weights and preparation (fingerprints),
            preparation_settings, dim, count, and the names of the two data files.
        studies: in the order of the rows of `embeddings`.
        embeddings: (n, dim) float32.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder = folder
        self.settings = settings
        self.studies: list[Study] = []
        self.embeddings = np.zeros((0, 0), dtype=np.float32)

    @classmethod
    def create(cls, folder: Path | str, model: Embedder) -> SearchIndex:
        """An empty index for a model; nothing is written before :meth:`save`."""
        made_by = {**_made_by(model), "preparation_settings": model.preparation.to_dict()}
        return cls(Path(folder), {"format": FORMAT, **made_by})

    @classmethod
    def open(cls, folder: Path | str, *, model: Embedder | None = None) -> SearchIndex:
        """Open an index; with `model`, refuse it unless that very model made it.

        Raises:
            SearchIndexError: for a missing or damaged index, or one of another model.
        """
        folder = Path(folder)
        settings = _read_head(folder)
        try:
            index = cls._load(folder, settings)
        except FileNotFoundError as error:
            now = _read_head(folder)  # another process may have saved between the two readings
            if now == settings:
                raise SearchIndexError(
                    f"{folder} is damaged ({Path(error.filename).name} is missing): {REBUILD}."
                ) from error
            index = cls._load(folder, now)
        if model is not None:
            index._check_made_by(model)
        return index

    @classmethod
    def _load(cls, folder: Path, settings: dict[str, Any]) -> SearchIndex:
        index = cls(folder, settings)
        try:
            # mapped first: a damaged header may claim a size that no memory holds
            mapped = np.load(folder / settings["embeddings"], mmap_mode="r", allow_pickle=False)
            index.embeddings = np.array(mapped, dtype=np.float32)
            lines = (folder / settings["studies"]).read_text("utf-8").split("\n")
            index.studies = [_study(json.loads(line)) for line in lines if line]
        except FileNotFoundError:
            raise
        except Exception as error:  # a damaged header makes numpy raise nearly anything
            raise SearchIndexError(f"{folder} is damaged ({error}): {REBUILD}.") from error
        shape = index.embeddings.shape
        expected = (settings.get("count"), settings.get("dim", shape[-1] if shape else None))
        if shape != expected or len(index.studies) != shape[0]:
            raise SearchIndexError(
                f"{folder} is damaged: embeddings of shape {shape} and {len(index.studies)} "
                f"studies where index.json says {expected}: {REBUILD}."
            )
        if not np.isfinite(index.embeddings).all():
            raise SearchIndexError(f"{folder} is damaged: embeddings are not numbers: {REBUILD}.")
        return index

    def _check_made_by(self, model: Embedder) -> None:
        for key, now in _made_by(model).items():
            if key != "model" and self.settings.get(key) != now:
                raise SearchIndexError(
                    f"{self.folder} was made by model {self.settings.get('model')!r} ({key} "
                    f"{self.settings.get(key)}), not by {model.label!r} ({key} {now})"
                    f"{self._differences(model) if key == 'preparation' else ''}: search with "
                    "that model, or build the index again in another folder."
                )

    def _differences(self, model: Embedder) -> str:
        """The settings of the preparations that differ, both sides of each."""
        old, new = self.settings.get("preparation_settings"), model.preparation.to_dict()
        if not isinstance(old, dict):
            return ""
        keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
        return "; " + ", ".join(f"{key} {old.get(key)} against {new.get(key)}" for key in keys)

    def __len__(self) -> int:
        return len(self.studies)

    def add(self, studies: Iterable[Study], embeddings: np.ndarray) -> None:
        """Add studies with their embeddings (n, dim); a study of a known path is replaced.

        Copies the whole array, so add many at once.

        Raises:
            SearchIndexError: if the embeddings do not fit the studies or the index.
        """
        rows = np.asarray(embeddings, dtype=np.float32)
        given = list(studies)
        dim = self.embeddings.shape[1] if len(self) else rows.shape[-1]
        if rows.shape != (len(given), dim) or not np.isfinite(rows).all():
            raise SearchIndexError(
                f"embeddings of shape {rows.shape} for {len(given)} studies in an index of "
                f"dimension {dim}: give one row of finite numbers for each."
            )
        last = {study.path: i for i, study in enumerate(given)}  # of a path given twice
        self.discard(last)
        kept = self.embeddings if len(self) else rows[:0]
        self.embeddings = np.concatenate([kept, rows[list(last.values())]])
        self.studies += [given[i] for i in last.values()]

    def discard(self, paths: Iterable[str]) -> None:
        """Take the studies of these paths out; unknown paths are no error."""
        gone = set(paths)
        kept = [i for i, study in enumerate(self.studies) if study.path not in gone]
        if len(kept) < len(self):
            self.embeddings = self.embeddings[kept]
            self.studies = [self.studies[i] for i in kept]

    def save(self) -> None:
        """Write the index; until the last moment the folder holds the older one.

        Raises:
            SearchIndexError: if someone else saved an index there since this one was opened.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _one_writer(self.folder) as sync:
            self._check_still_current()
            numbers = [p.stem.rsplit("-", 1)[1] for p in self.folder.glob("studies-*.jsonl")]
            number = 1 + max((int(n) for n in numbers if n.isdigit()), default=0)
            names = {
                "embeddings": f"embeddings-{number}.npy",
                "studies": f"studies-{number}.jsonl",
            }
            with atomic_file(self.folder / names["embeddings"]) as temporary:
                with temporary.open("wb") as file:
                    np.save(file, self.embeddings)
            with atomic_file(self.folder / names["studies"]) as temporary:
                with temporary.open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(asdict(study)) + "\n" for study in self.studies)
            sync()  # the new files are in the folder for good before index.json names them
            dim = int(self.embeddings.shape[1])
            settings = {**self.settings, "dim": dim, "count": len(self), **names}
            write_json(self.folder / "index.json", settings)
            sync()
            self.settings = settings
            self._remove_leftovers(set(names.values()))

    def _check_still_current(self) -> None:
        """Two builds into one folder must not undo each other."""
        if not (self.folder / "index.json").exists():
            return
        if _read_head(self.folder).get("studies") != self.settings.get("studies"):
            raise SearchIndexError(
                f"{self.folder} holds an index that was written after this one was opened: open "
                "it again and repeat."
            )

    def _remove_leftovers(self, current: set[str]) -> None:
        """Older data files, and the temporary ones of writers that were killed."""
        for pattern in ("*embeddings-*.npy", "*studies-*.jsonl", ".*index.json"):
            for path in self.folder.glob(pattern):
                if path.name not in current:
                    path.unlink(missing_ok=True)

    def search(
        self, query: np.ndarray, *, top: int = 10, where: Mapping[str, str] | None = None
    ) -> list[Hit]:
        """The `top` studies nearest to an embedding (dim,), best first.

        Args:
            where: metadata that a hit must have, compared as text ("true", "false" for booleans).

        Raises:
            SearchIndexError: for a query that does not fit, or an unknown key in `where`, naming
                the known ones.
        """
        if top < 1:
            raise SearchIndexError(f"top is {top}: ask for one study or more.")
        rows = self._rows(where or {})
        if not len(rows):
            return []
        vector = np.asarray(query, dtype=np.float32)
        if vector.shape != self.embeddings.shape[1:] or not np.isfinite(vector).all():
            raise SearchIndexError(
                f"a query of shape {vector.shape} for an index of dimension "
                f"{self.embeddings.shape[1]}: give one embedding of the model that made it."
            )
        scores = (self.embeddings[rows] if where else self.embeddings) @ vector
        best = np.argsort(-scores, kind="stable")[:top]
        return [
            self._hit(rank, float(scores[i]), self.studies[rows[i]])
            for rank, i in enumerate(best, start=1)
        ]

    def _rows(self, where: Mapping[str, str]) -> np.ndarray:
        """The rows whose metadata are as `where` says."""
        columns = self.columns() if where else []
        for key in where:
            if key not in columns:
                raise SearchIndexError(
                    f"no study of {self.folder} has {key!r}: known are {', '.join(columns)}."
                )
        wanted = [(key, _as_text(value)) for key, value in where.items()]
        return np.array(
            [
                i
                for i, study in enumerate(self.studies)
                if all(_as_text(study.metadata.get(key)) == value for key, value in wanted)
            ],
            dtype=int,
        )

    @staticmethod
    def _hit(rank: int, score: float, study: Study) -> Hit:
        return Hit(rank, score, study.id, study.path, study.report, study.metadata)

    def columns(self) -> list[str]:
        """The metadata that any study has, in alphabetical order."""
        return sorted({key for study in self.studies for key in study.metadata})

    def info(self) -> dict[str, Any]:
        """What the index holds and which model made it."""
        return {
            "folder": str(self.folder),
            "studies": len(self.studies),
            "with report": sum(bool(study.report) for study in self.studies),
            "dimension": int(self.embeddings.shape[1]),
            "columns": self.columns(),
            **{key: self.settings.get(key) for key in ("model", "weights", "preparation")},
        }


def _made_by(model: Embedder) -> dict[str, str]:
    return {
        "model": model.label,
        "weights": model.fingerprint(),
        "preparation": model.preparation.fingerprint(),
    }


def _read_head(folder: Path) -> dict[str, Any]:
    """index.json, checked: an index may come from elsewhere, so its names stay in its folder."""
    head = folder / "index.json"
    if not head.is_file():
        raise SearchIndexError(f"{folder} is no index: build one with med3dvlm index build.")
    try:
        settings = json.loads(head.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SearchIndexError(f"{folder} is damaged (index.json: {error}): {REBUILD}.") from error
    if not isinstance(settings, dict):
        raise SearchIndexError(f"{folder} is damaged (index.json holds no settings): {REBUILD}.")
    if settings.get("format") != FORMAT:
        raise SearchIndexError(
            f"{folder} is of format {settings.get('format')}, this version reads {FORMAT}: "
            f"{REBUILD}."
        )
    for key in ("embeddings", "studies"):
        name = settings.get(key)
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set('/\\:"\0'):
            raise SearchIndexError(
                f"{folder} is damaged (index.json names {name!r} as its {key}): {REBUILD}."
            )
    return settings


def _study(line: Any) -> Study:
    study = Study(**line)
    texts = (study.id, study.path, study.sha256, study.report)
    if not all(isinstance(text, str) for text in texts) or not isinstance(study.metadata, dict):
        raise ValueError(f"a study that is none: {str(line)[:80]}")
    return study


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextmanager
def _one_writer(folder: Path) -> Iterator[Callable[[], None]]:
    """Hold the folder's lock, which the system lifts when its holder dies.

    Yields a function that makes the folder's entries durable.
    """
    if fcntl is None:
        yield lambda: None
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield lambda: os.fsync(handle)
    finally:
        os.close(handle)
