"""A linear probe, or a small head, on the embeddings of an index: labels from a table.

The encoder stays as it is, so a probe of a thousand studies takes seconds. Penalties are chosen and
probabilities calibrated by cross-validation; a fifth of the studies is held out and scored.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from med3dvlm.data.sources import read_table
from med3dvlm.evaluate.calibration import Platt, calibration_table
from med3dvlm.evaluate.tables import Results, Row
from med3dvlm.evaluate.zero_shot import classification_table
from med3dvlm.files import atomic_folder
from med3dvlm.notice import provenance
from med3dvlm.search import SearchIndex

FORMAT = 1
SETTINGS, WEIGHTS = "probe.json", "probe.safetensors"
FILES = (SETTINGS, WEIGHTS, "results.json", "results.md", "*.csv")
FOLDS = 5
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
KEYS = ("path", "id")
FEWEST = 10  # studies of either kind that a label needs


class ProbeError(ValueError):
    """A probe that cannot be trained or used, in one sentence."""


@dataclass
class Probe:
    """Labels from an embedding.

    Attributes:
        labels: in the order of the outputs.
        platt: how each output becomes a probability.
        made_for: model, weights and preparation (fingerprints) of the embeddings.
        penalty: weight decay that cross-validation chose.
    """

    head: nn.Module
    labels: list[str]
    platt: list[Platt]
    made_for: dict[str, str]
    hidden: int
    penalty: float

    def probabilities(self, vectors: np.ndarray) -> np.ndarray:
        """(n, dim) embeddings -> (n, labels) calibrated probabilities."""
        raw = _raw(self.head, torch.from_numpy(np.asarray(vectors, np.float32)))
        return np.column_stack([p(column) for p, column in zip(self.platt, raw.T, strict=True)])

    def check_model(self, model: Any) -> None:
        """Raises ProbeError if it was trained for another model, naming both."""
        now = provenance(model)
        for key in ("weights", "preparation"):
            if self.made_for[key] != now[key]:
                raise ProbeError(
                    f"the probe was trained for model {self.made_for['model']!r} ({key} "
                    f"{self.made_for[key]}), not for {now['model']!r} ({key} {now[key]}): give "
                    "that model, or train it again."
                )

    def save(self, folder: Path | str, results: Results) -> None:
        """Weights, settings, and the scores of the held-out studies."""
        settings = {
            "format": FORMAT,
            "labels": self.labels,
            "platt": [asdict(one) for one in self.platt],
            "made_for": self.made_for,
            "hidden": self.hidden,
            "penalty": self.penalty,
            "dim": next(self.head.parameters()).shape[1],
        }
        with atomic_folder(folder, ours=FILES) as temporary:
            save_file(self.head.state_dict(), temporary / WEIGHTS)
            text = json.dumps(settings, indent=2, ensure_ascii=False)
            (temporary / SETTINGS).write_text(text + "\n", "utf-8")
            results.save(temporary)

    @classmethod
    def load(cls, folder: Path | str) -> Probe:
        """Raises ProbeError for a folder that holds none."""
        folder = Path(folder)
        try:
            given = json.loads((folder / SETTINGS).read_text("utf-8"))
            if given["format"] != FORMAT:
                raise ValueError(f"format {given['format']}")
            head = _head(given["dim"], len(given["labels"]), given["hidden"])
            head.load_state_dict(load_file(folder / WEIGHTS))
            platt = [Platt(**one) for one in given["platt"]]
        except FileNotFoundError as error:
            raise ProbeError(
                f"{folder} holds no probe: train one with med3dvlm train probe."
            ) from error
        except Exception as error:  # damaged files raise nearly anything
            raise ProbeError(f"{folder}: the probe cannot be read ({error}).") from error
        settings = (given["made_for"], given["hidden"], given["penalty"])
        return cls(head, given["labels"], platt, *settings)


def train_probe(
    index: SearchIndex, table: Path | str, *, hidden: int = 0, seed: int = 0
) -> tuple[Probe, Results]:
    """Train on the studies of an index that a table labels.

    Args:
        table: a CSV or JSONL with a column `id` or `path`, and one of 0 and 1 for each label; empty
            is: not known.
        hidden: width of a hidden layer; 0 for a linear probe.

    Raises:
        ProbeError: for a table that does not fit.
    """
    vectors, truth, labels, groups = _labelled(index, Path(table))
    held_out = _fold_of(groups, seed=seed, folds=5) == 0
    for name, column in zip(labels, truth[~held_out].T, strict=True):
        few = min(int((column == 1).sum()), int((column == 0).sum()))
        if few < FEWEST:
            raise ProbeError(
                f"{table}: label {name!r} has {few} training studies of one kind: it needs "
                f"{FEWEST}; leave the column out, or label more."
            )
    x, y = torch.from_numpy(vectors[~held_out]), torch.from_numpy(truth[~held_out])
    folds = _fold_of([g for g, out in zip(groups, held_out, strict=True) if not out], seed=seed + 1)
    outside = {penalty: _outside(x, y, folds, hidden, penalty, seed) for penalty in PENALTIES}
    penalty = min(outside, key=lambda value: _loss(_logits(outside[value]), y).item())
    raw, known = outside[penalty], ~np.isnan(truth[~held_out])
    platt = [Platt.fit(truth[~held_out][k, i], raw[k, i]) for i, k in enumerate(known.T)]
    head = _fit(x, y, hidden, penalty, seed)
    probe = Probe(head, labels, platt, _made_for(index), hidden, penalty)
    return probe, _scores(probe, vectors[held_out], truth[held_out], len(x))


def _made_for(index: SearchIndex) -> dict[str, str]:
    return {key: index.generation[key] for key in ("model", "weights", "preparation")}


def _labelled(
    index: SearchIndex, table: Path
) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """(n, dim) embeddings, (n, labels) float32 with NaN where not known, labels, patients."""
    rows = read_table(table)
    key = next((name for name in KEYS if rows and name in rows[0]), None)
    if key is None:
        raise ProbeError(f"{table}: there is no column id or path: add one.")
    labels = [name for name in rows[0] if name not in KEYS]
    if not labels:
        raise ProbeError(f"{table}: there is no column of labels: add one of 0 and 1.")
    given: dict[str, list[float]] = {}
    for number, row in enumerate(rows, start=1):
        given[str(row[key])] = [_value(row.get(name), name, table, number) for name in labels]
    found = [
        (entry, given[name])
        for entry in index.entries([])
        if (name := entry.study.id if key == "id" else entry.study.path) in given
    ]
    if not found:
        raise ProbeError(f"{table}: no study of {index.place.location} has a {key} that it names.")
    vectors = np.stack([entry.vector for entry, _ in found])
    truth = np.array([values for _, values in found], np.float32)
    groups = [str(e.study.metadata.get("case") or e.study.sha256) for e, _ in found]
    return vectors, truth, labels, groups


def _value(given: Any, name: str, table: Path, number: int) -> float:
    text = str("" if given is None else given).strip().lower()
    known = {"": np.nan, "0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "false": 0.0, "true": 1.0}
    if text not in known:
        raise ProbeError(f"{table}, row {number}: {name} is {given!r}; give 0, 1 or nothing.")
    return known[text]


def _fold_of(groups: Sequence[str], *, seed: int, folds: int = FOLDS) -> np.ndarray:
    """(n,) 0 to folds − 1; studies of one patient together, and always in the same fold."""
    return np.array([zlib.crc32(f"{seed} {group}".encode()) % folds for group in groups])


def _head(dim: int, labels: int, hidden: int) -> nn.Module:
    if not hidden:
        return nn.Linear(dim, labels)
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, labels))


def _fit(x: Tensor, y: Tensor, hidden: int, penalty: float, seed: int) -> nn.Module:
    """The head of least loss and penalty, by L-BFGS on all studies at once."""
    torch.manual_seed(seed)
    head = _head(x.shape[1], y.shape[1], hidden)
    optimiser = torch.optim.LBFGS(
        head.parameters(), max_iter=200, line_search_fn="strong_wolfe", history_size=20
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        size = sum(p.square().sum() for p in head.parameters() if p.ndim > 1)
        loss = _loss(head(x), y) + penalty * size / y.shape[1]
        loss.backward()
        return loss

    optimiser.step(closure)
    return head.eval()


def _loss(logits: Tensor, y: Tensor) -> Tensor:
    """Mean binary cross-entropy over the labels that are known."""
    known = ~y.isnan()
    return F.binary_cross_entropy_with_logits(logits[known], y[known])


def _outside(
    x: Tensor, y: Tensor, folds: np.ndarray, hidden: int, penalty: float, seed: int
) -> np.ndarray:
    """(n, labels) what heads say of the studies that they were not trained on."""
    said = np.zeros(tuple(y.shape))
    for fold in range(FOLDS):
        out = torch.from_numpy(folds == fold)
        if out.any():
            said[out.numpy()] = _raw(_fit(x[~out], y[~out], hidden, penalty, seed), x[out])
    return said


@torch.inference_mode()
def _raw(head: nn.Module, x: Tensor) -> np.ndarray:
    return head(x).sigmoid().double().numpy()


def _logits(probabilities: np.ndarray) -> Tensor:
    return torch.from_numpy(probabilities).clamp(1e-6, 1 - 1e-6).logit()


def _scores(probe: Probe, vectors: np.ndarray, truth: np.ndarray, trained: int) -> Results:
    """AUROC and the like of each label on the held-out studies, and calibration errors."""
    results = Results({**probe.made_for, "trained on": trained, "held out": len(vectors)})
    after = probe.probabilities(vectors)
    before = _raw(probe.head, torch.from_numpy(vectors))
    rows: list[Row] = []
    errors: list[Row] = []
    for i, name in enumerate(probe.labels):
        known = ~np.isnan(truth[:, i])
        true, given = truth[known, i : i + 1], after[known, i : i + 1]
        if not len(true):
            results.notes.append(f"No held-out study has label {name!r}.")
            continue
        rows.append(classification_table(true, given, [name], thresholds=0.5)[0])
        errors.append(calibration_table(true, before[known, i : i + 1], given, [name])[0])
    results.add("Held-out studies", rows)
    results.add("Calibration on held-out studies", errors)
    return results
