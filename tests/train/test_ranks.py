"""Runs over several processes, started as a user starts them: by torchrun, over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch
from safetensors.torch import load_file

from med3dvlm.train import load_recipe, train
from tests.train.test_train import language_recipe, recipe, store  # noqa: F401

TRAINING = {"epochs": 2, "loggers": [], "save_steps": 1, "log_steps": 1, "learning_rate": 1e-3}
LEARNING = ["text_encoder", "text_projection", "vision_projection", "loss"]


def by_torchrun(*command: str) -> subprocess.CompletedProcess:
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = subprocess.run(
        [*program, "--nproc-per-node=2", "-m", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    return run


def test_two_ranks_train_what_one_process_trains(tmp_path, store):  # noqa: F811
    """The same four pairs a step; no batch norm learns, for its statistics are each rank's own."""
    still = ["model.text_config.dropout=0", "model.text_config.attention_dropout=0"]
    train(load_recipe(recipe(tmp_path, store), still))
    path = recipe(
        tmp_path,
        store,
        start=str(tmp_path / "contrastive"),
        output=str(tmp_path / "alone"),
        train=LEARNING,
        training={**TRAINING, "batch_size": 4},
    )
    train(load_recipe(path))
    output = tmp_path / "ranks"
    settings = (f"output={output}", "training.batch_size=2")
    run = by_torchrun("med3dvlm.cli", "train", "contrastive", str(path), *settings)
    assert run.stdout.count("trained") == 1
    alone, together = (
        load_file(tmp_path / name / "model.safetensors") for name in ("alone", "ranks")
    )
    before = load_file(tmp_path / "contrastive" / "model.safetensors")
    moved = [name for name in alone if not torch.equal(alone[name], before[name])]
    assert len(moved) > 10
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-4, atol=1e-5)
    history = json.loads((output / "history.json").read_text())
    steps = [entry["step"] for entry in history if "loss" in entry]
    assert steps == [1, 2, 3, 4]
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == [
        "checkpoint-4",
        "run.json",
    ]


def test_two_ranks_weigh_answers_as_one_process_does(tmp_path, store):  # noqa: F811
    train(load_recipe(recipe(tmp_path, store), ["training.max_steps=1"]))
    data = {"store": str(store), "phantoms": 8, "workers": 1, "turns": 3}
    path = language_recipe(
        tmp_path,
        store,
        "alignment",
        "contrastive",
        train=["language_model"],
        data={**data, "tasks": {"report": 1.0, "yes_no": 1.0, "closed": 1.0}},
        training={**TRAINING, "batch_size": 4, "loss_average": "answer", "save_steps": 9},
    )
    train(load_recipe(path, [f"output={tmp_path / 'alone'}"]))
    settings = (f"output={tmp_path / 'ranks'}", "training.batch_size=2")
    by_torchrun("med3dvlm.cli", "train", "alignment", str(path), *settings)
    alone, together = (
        load_file(tmp_path / name / "model.safetensors") for name in ("alone", "ranks")
    )
    for name, tensor in alone.items():
        if not name.endswith("k_proj.bias"):  # has no gradient but noise, which AdamW scales up
            torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=2e-5)
