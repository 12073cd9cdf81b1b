"""Runs that are killed, that run out of disk, that lose their numbers: what is left, and what not.

Kills are real: a process of its own for each run, ended by SIGKILL. They are forked from a server
that has imported everything, because importing takes longer than the training.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from med3dvlm.data.store import Store
from med3dvlm.models import VolumeTextDualEncoder
from med3dvlm.train import load_recipe, train
from med3dvlm.train.checkpoints import UNFINISHED, TrainingError, last_checkpoint
from med3dvlm.train.contrastive import PairCollator
from tests.train.test_train import language_recipe, recipe, store  # noqa: F401

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["med3dvlm.train.contrastive", "med3dvlm.train.language", "peft", "transformers.trainer"]
)
TRAINING = {
    "batch_size": 2,
    "epochs": 2,
    "loggers": [],
    "save_steps": 1,
    "log_steps": 1,
    "learning_rate": 1e-3,
    "ema": 0.9,
}


def run(path: Path, output: Path) -> None:
    torch.set_num_threads(1)
    train(load_recipe(path, [f"output={output}"]))


def run_and_die_in_save(path: Path, output: Path, step: int) -> None:
    """Killed with the weights of a step on the disk, but not its optimizer."""
    from med3dvlm.train import engine

    save = engine._Trainer._save_optimizer_and_scheduler

    def dying(self, folder):
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, folder)

    engine._Trainer._save_optimizer_and_scheduler = dying
    run(path, output)


def run_with_small_files(path: Path, output: Path, limit: int) -> None:
    """No file may grow over `limit` bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["med3dvlm", "train", "contrastive", str(path), f"output={output}"]
    from med3dvlm.cli import main

    sys.stderr = (output.parent / "stderr").open("w", buffering=1)
    main()


def start(target, *arguments) -> multiprocessing.process.BaseProcess:
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    return process


def finish(target, *arguments) -> int | None:
    process = start(target, *arguments)
    process.join()
    return process.exitcode


def steps_saved(output: Path) -> int:
    """The step of the last finished checkpoint; 0 before the first."""
    finished = output.glob("checkpoints/checkpoint-*")
    return max((int(path.name.split("-")[1]) for path in finished), default=0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that are killed: other numbers of threads sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def assert_equal_weights(first: Path, second: Path) -> None:
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory, store) -> dict[str, Path]:  # noqa: F811
    """A recipe of each stage; the second starts from the first, the third from the second."""
    paths = {}
    for stage in ("contrastive", "alignment", "instruction"):
        folder = tmp_path_factory.mktemp(stage)
        before = {name: str(path.parent / name) for name, path in paths.items()}
        if stage == "contrastive":
            paths[stage] = recipe(folder, store, training=TRAINING)
        elif stage == "alignment":
            start_from = before["contrastive"]
            paths[stage] = language_recipe(folder, store, stage, start_from, training=TRAINING)
        else:
            paths[stage] = language_recipe(
                folder,
                store,
                stage,
                before["alignment"],
                training=TRAINING,
                train=["projector", "vision_encoder"],
                lora={"r": 2},
            )
        assert finish(run, paths[stage], folder / stage) == 0
    return paths


@pytest.mark.parametrize("stage", ["contrastive", "alignment", "instruction"])
def test_killed_at_random_moments_it_ends_in_the_same_weights(recipes, tmp_path, stage):
    """Three kills, the last of them at the worst of moments: in the middle of a save."""
    whole, output = recipes[stage].parent / stage, tmp_path / stage
    moments = random.Random(stage)
    for _ in range(2):
        begun = steps_saved(output)
        process = start(run, recipes[stage], output)
        while process.is_alive() and steps_saved(output) <= begun:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    step = 1 + steps_saved(output)
    assert finish(run_and_die_in_save, recipes[stage], output, step) == -signal.SIGKILL
    half = output / "checkpoints" / UNFINISHED / f"checkpoint-{step}"
    assert half.is_dir() and not (half / "optimizer.pt").exists()
    assert finish(run, recipes[stage], output) == 0
    assert not half.exists()
    assert_equal_weights(whole, output)


def test_a_full_disk_leaves_the_last_checkpoint_and_one_sentence(recipes, tmp_path):
    output = tmp_path / "contrastive"
    path = recipes["contrastive"]
    assert finish(run_and_die_in_save, path, output, 3) == -signal.SIGKILL
    kept = output / "checkpoints" / "checkpoint-2"
    before = {file.name: file.read_bytes() for file in kept.iterdir()}
    limit = (kept / "optimizer.pt").stat().st_size - 1000
    assert finish(run_with_small_files, path, output, limit) == 1
    assert {file.name: file.read_bytes() for file in kept.iterdir()} == before
    assert not (output / "checkpoints" / UNFINISHED).exists()
    (sentence,) = [
        line for line in (tmp_path / "stderr").read_text().splitlines() if "Error" in line
    ]
    assert "checkpoint 3 could not be saved" in sentence and str(output) in sentence
    assert finish(run, path, output) == 0
    assert_equal_weights(path.parent / "contrastive", output)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_lost_stops_the_run_and_names_the_studies(
    recipes,
    tmp_path,
    store,  # noqa: F811
    monkeypatch,
    what,
):
    forward, steps = VolumeTextDualEncoder.forward, []
    collate, studies = PairCollator.__call__, []

    def recording(self, items):
        studies.append([item["id"] for item in items])
        return collate(self, items)

    def breaking(self, *args, **batch):
        out = forward(self, *args, **batch)
        steps.append(1)
        if len(steps) == 3 and what == "loss":
            out["loss"] = out["loss"] * float("nan")
        elif len(steps) == 3:
            out["loss"].register_hook(lambda gradient: gradient * float("inf"))
        return out

    monkeypatch.setattr(VolumeTextDualEncoder, "forward", breaking)
    monkeypatch.setattr(PairCollator, "__call__", recording)
    output = tmp_path / "broken"
    with pytest.raises(TrainingError, match=f"step 3: the {what} is") as raised:
        train(load_recipe(recipes["contrastive"], [f"output={output}"]))
    assert len(set(studies[2])) == 2 and set(studies[2]) <= set(Store(store).ids)
    assert f"for studies {', '.join(studies[2])};" in str(raised.value)
    last = last_checkpoint(output / "checkpoints")
    assert last is not None and last.name == "checkpoint-2"
    weights = load_file(last / "model.safetensors").values()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights)
    monkeypatch.undo()
    train(load_recipe(recipes["contrastive"], [f"output={output}"]))
    assert_equal_weights(recipes["contrastive"].parent / "contrastive", output)


def test_a_run_that_is_done_is_not_done_again(recipes, tmp_path):
    output = recipes["contrastive"].parent / "contrastive"
    before = (output / "model.safetensors").read_bytes()
    train(load_recipe(recipes["contrastive"]))
    assert (output / "model.safetensors").read_bytes() == before
    state = json.loads((output / "checkpoints" / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == 8
    assert not (output / UNFINISHED).exists()
