"""What test_sharding.py has torchrun start on two processes: runs that share one model (FSDP2).

All in one launch, for a process takes longer to start than these runs do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from med3dvlm.hub import load
from med3dvlm.models import Med3DVLM
from med3dvlm.train import Recipe, begin, engine, load_recipe, train
from med3dvlm.train.checkpoints import TrainingError
from med3dvlm.train.lora import merge_adapter
from med3dvlm.train.plan import plan
from med3dvlm.train.ranks import is_main, main_first
from med3dvlm.train.sharding import Shards


class Killed(Exception):
    pass


def killed_after(step: int, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a run, and end it when the checkpoint of a step is written."""
    save = engine._Trainer._save_checkpoint

    def last(trainer: Any, *args: Any) -> None:
        save(trainer, *args)
        if trainer.state.global_step == step:
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(engine._Trainer, "_save_checkpoint", last)
        train(recipe)


def cut_learners(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """For each learner that is cut from now on: (elements in this process's pieces, in all)."""
    seen = []
    begin = Shards.__init__

    def noted(self: Shards, learner: Any) -> None:
        begin(self, learner)
        parameters = list(learner.parameters())
        assert all(isinstance(p, DTensor) for p in parameters)
        own = sum(p.to_local().numel() for p in parameters)
        seen.append((own, sum(p.numel() for p in parameters)))

    monkeypatch.setattr(Shards, "__init__", noted)
    return seen


def all_learns_and_a_killed_run_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norm, running mean, accumulation, checkpointing, validation, the best checkpoint."""
    pieces = cut_learners(monkeypatch)
    path = folder / "contrastive.yaml"
    whole = train(load_recipe(path, [f"output={folder / 'whole'}"]))
    assert (whole is not None) == is_main()
    assert all(2 * own < 1.2 * count for own, count in pieces)
    output = folder / "killed"
    recipe = load_recipe(path, [f"output={output}"])
    killed_after(2, recipe, monkeypatch)
    resumed = train(recipe)
    if is_main():
        history, again = (
            json.loads((at / "history.json").read_text())[:-1] for at in (folder / "whole", output)
        )
        assert history == again
        assert sum("eval_r_at_1" in entry for entry in history) == 4
        assert not (output / "checkpoints" / "checkpoint-4" / "model.safetensors").exists()
        loaded = load(output, part="search", device="cpu").state_dict()
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, resumed.state_dict()[name]), name
            assert torch.equal(tensor, loaded[name]), name
    damage(output)
    with pytest.raises(TrainingError, match=r"checkpoint-4 is damaged.*remove it"):
        train(recipe)


def damage(output: Path) -> None:
    with main_first():
        if is_main():
            for path in (output / "checkpoints" / "checkpoint-4" / "shards").glob("*.distcp"):
                path.write_bytes(path.read_bytes()[:100])


def adapters(folder: Path) -> None:
    """They, and the projector in full, over a frozen language model in bf16."""
    path, output = folder / "lora.yaml", folder / "lora"
    model = train(load_recipe(path, [f"output={output}"]))
    assert (model is not None) == is_main()
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [1, 2]
    if not is_main():
        return
    saved, start = (load(at, device="cpu") for at in (output, folder / "aligned"))
    assert isinstance(saved, Med3DVLM)
    merged = merge_adapter(output / "adapter").state_dict()
    changed = set()
    for name, tensor in saved.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=0)
        if not torch.equal(tensor, start.state_dict()[name].to(tensor.dtype)):
            changed.add(name.split(".")[0])
    assert changed == {"projector", "language_model"}


def some_parts_learn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As test_sharding has them learn in one process; this run is killed on its way."""
    changes = ["training.shard=true", "training.batch_size=2", f"output={folder / 'halves'}"]
    recipe = load_recipe(folder / "alone.yaml", changes)
    killed_after(2, recipe, monkeypatch)
    train(recipe)


def tied_embeddings_learn(folder: Path) -> None:
    output = folder / "tied"
    recipe = load_recipe(folder / "tied.yaml", [f"output={output}", "training.shard=true"])
    model = train(recipe)
    again = train(recipe)  # at its end already
    if is_main():
        saved = load(output, device="cpu")
        first, last = saved.get_input_embeddings().weight, saved.get_output_embeddings().weight
        assert first is last
        for name, tensor in saved.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name
            assert torch.equal(tensor, again.state_dict()[name]), name


def other_weights_are_refused(folder: Path) -> None:
    changes = ["training.shard=true", f"output={folder / 'refused'}"]
    job = begin(load_recipe(folder / "tied.yaml", changes))
    if not is_main():
        next(job.model.projector.parameters()).data += 1e-3
    with pytest.raises(TrainingError, match="the processes did not load the same weights"):
        Shards(job.model)


def half_the_memory_is_planned(folder: Path) -> None:
    path = folder / "contrastive.yaml"
    shared = plan(load_recipe(path)).memory
    whole = plan(load_recipe(path, ["training.shard=false"])).memory
    for name in ("weights", "gradients", "optimizer", "average"):
        assert shared[name] / whole[name] == pytest.approx(0.5, abs=0.1), name
    assert shared["activations"] == pytest.approx(whole["activations"], rel=0.05)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    with pytest.MonkeyPatch.context() as patching:
        all_learns_and_a_killed_run_goes_on(place, patching)
    adapters(place)
    with pytest.MonkeyPatch.context() as patching:
        some_parts_learn(place, patching)
    tied_embeddings_learn(place)
    other_weights_are_refused(place)
    half_the_memory_is_planned(place)
    print("done")
