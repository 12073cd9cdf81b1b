"""Checkpoint folders in the published layout, filled with the fixtures' deterministic weights."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tests.models.parity_fill import fill

PARITY = Path(__file__).parent / "parity"


def published_weights(name: str) -> dict[str, torch.Tensor]:
    keys = json.loads((PARITY / f"{name}.keys.json").read_text())
    return {k: torch.from_numpy(np.asarray(fill(k, tuple(shape)))) for k, shape in keys.items()}


def fixture(name: str) -> dict[str, np.ndarray]:
    with np.load(PARITY / f"{name}.npz") as arrays:
        return dict(arrays)


def clip_folder(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    weights = published_weights("clip")
    weights["t_prime"], weights["bias"] = torch.tensor(math.log(10.0)), torch.tensor(-10.0)
    return _write(folder, "clip", weights), weights


def vlm_folder(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    weights = published_weights("vlm_tiny_qwen2")
    return _write(folder, "vlm_tiny_qwen2", weights), weights


def _write(folder: Path, name: str, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    shutil.copy(PARITY / f"{name}.config.json", folder / "config.json")
    return folder


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
