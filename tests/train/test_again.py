"""Runs that are started again: as before, changed, ended by the clock, damaged; best weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from med3dvlm import hub
from med3dvlm.cli import app
from med3dvlm.models import VolumeTextDualEncoder
from med3dvlm.train import RecipeError, checkpoints, load_recipe, studies, train
from med3dvlm.train.checkpoints import TrainingError, last_checkpoint, publish
from med3dvlm.train.contrastive import PairMeasure, contrastive_job
from med3dvlm.train.engine import _Trainer, _trainer
from med3dvlm.train.language import TaskMeasure
from med3dvlm.train.plan import plan
from med3dvlm.train.recipe import Recipe
from med3dvlm.train.record import differences
from med3dvlm.train.studies import check_enough
from tests.train.test_train import (
    Interrupted,
    language_recipe,
    recipe,
    store,  # noqa: F401
)

# Two epochs of four steps, of which six are taken: the end lies within an epoch.
TRAINING = {
    "batch_size": 2,
    "max_steps": 6,
    "loggers": [],
    "save_steps": 100,
    "log_steps": 1,
    "learning_rate": 1e-3,
    "ema": 0.5,
}
WATCHED = {"evaluate_steps": 2}


@pytest.fixture(scope="module")
def done(tmp_path_factory, store) -> Path:  # noqa: F811
    """The folder of a finished contrastive run and its recipe; not to be written to."""
    folder = tmp_path_factory.mktemp("done")
    train(load_recipe(recipe(folder, store, training=TRAINING)))
    return folder


@pytest.fixture
def again(done, tmp_path) -> tuple[Path, str]:
    """A recipe whose run is finished, and the setting that says where."""
    output = tmp_path / "contrastive"
    shutil.copytree(done / "contrastive", output)
    return done / "recipe.yaml", f"output={output}"


def result(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}


def forget_the_last_step(output: Path) -> None:
    """Let its checkpoint be one of a run that has a step to go."""
    state = output / "checkpoints" / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text().replace('"global_step": 6', '"global_step": 5'))


def output_of(setting: str) -> Path:
    return Path(setting.removeprefix("output="))


# --- changed, or not --------------------------------------------------------------------------


def test_a_finished_run_is_left_as_it_is(again):
    path, output = again
    before = result(output_of(output))
    free = ["training.log_steps=5", "training.max_minutes=3", "training.loader_workers=1"]
    model = train(load_recipe(path, [output, *free]))
    assert result(output_of(output)) == before
    assert [p.name for p in (output_of(output) / "checkpoints").glob("c*")] == ["checkpoint-6"]
    for name, tensor in load_file(output_of(output) / "model.safetensors").items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_another_recipe_is_refused_and_falsifies_nothing(again):
    path, output = again
    before = result(output_of(output))
    changes = ["training.learning_rate=0.5", "model.vision_config.variant=s", "training.ema=null"]
    with pytest.raises(RecipeError) as refused:
        train(load_recipe(path, [output, *changes]))
    sentence = str(refused.value)
    assert 'model.vision_config.variant was "t", is "s"' in sentence
    assert "training.learning_rate was 0.001, is 0.5" in sentence
    assert "training.ema was 0.5, is null" in sentence
    assert f"remove {output_of(output) / 'checkpoints'}" in sentence
    assert result(output_of(output)) == before
    plan(load_recipe(path, [output, *changes]))  # what it would take may be asked
    shutil.rmtree(output_of(output) / "checkpoints")
    train(load_recipe(path, [output, "training.learning_rate=0.01"]))
    written = json.loads((output_of(output) / "training.json").read_text())
    assert written["recipe"]["training"]["learning_rate"] == 0.01
    assert written["metrics"]["train_loss"] > 0 and written["metrics"]["step"] == 6


def test_another_number_of_processes_is_refused(again):
    path, output = again
    record = output_of(output) / "checkpoints" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "processes": 2}))
    with pytest.raises(RecipeError, match="processes was 2, is 1"):
        train(load_recipe(path, [output]))
    record.write_text("{")
    with pytest.raises(TrainingError, match=r"run.json is damaged: remove it"):
        train(load_recipe(path, [output]))


def test_a_run_from_before_there_were_records_goes_on(again):
    path, output = again
    (output_of(output) / "checkpoints" / "run.json").unlink()
    before = result(output_of(output))
    train(load_recipe(path, [output]))
    assert result(output_of(output)) == before
    train(load_recipe(path, [output, "training.max_steps=7"]))
    history = json.loads((output_of(output) / "history.json").read_text())
    assert history[-1]["step"] == 7


def test_a_run_that_decayed_scales_goes_on_so(tmp_path, store, monkeypatch):  # noqa: F811
    path = recipe(tmp_path, store, training={**TRAINING, "weight_decay": 0.1})
    output = tmp_path / "contrastive"
    with monkeypatch.context() as patch:
        patch.delattr(_Trainer, "get_decay_parameter_names")
        train(load_recipe(path))
        whole = result(output)["model.safetensors"]
        forget_the_last_step(output)
    train(load_recipe(path))
    assert json.loads((output / "history.json").read_text())[-1]["train_loss"] > 0
    assert result(output)["model.safetensors"] != whole  # a step more, of the same optimizer


def test_a_key_that_came_later_was_at_its_default():
    now = Recipe(stage="contrastive", output="a")
    known = {"stage": "contrastive", "output": "b", "training": {"seed": 1}, "lora": None}
    assert differences(known, now) == {"training.seed": ("1", "0")}


@pytest.mark.parametrize("missing", [("config.json",), ("config.json", "history.json")])
def test_a_result_that_a_crash_kept_from_being_written_is_written(again, missing):
    path, output = again
    before = result(output_of(output))
    for name in missing:
        (output_of(output) / name).unlink()
    train(load_recipe(path, [output]))
    after = result(output_of(output))
    assert after["model.safetensors"] == before["model.safetensors"]
    metrics = json.loads(after["training.json"])["metrics"]
    assert metrics["step"] == 6
    if "history.json" in missing:  # the totals are not known, and not made up
        assert "train_loss" not in metrics
    else:
        assert metrics == json.loads(before["training.json"])["metrics"]
        assert after["history.json"] == before["history.json"]


def test_a_result_of_an_earlier_run_is_not_taken_for_this_ones(again):
    path, output = again
    shutil.rmtree(output_of(output) / "checkpoints")
    first = result(output_of(output))
    train(load_recipe(path, [output, "training.seed=1"]))
    second = result(output_of(output))
    for name, content in first.items():  # as if the second could not be written
        (output_of(output) / name).write_bytes(content)
    train(load_recipe(path, [output, "training.seed=1"]))
    assert result(output_of(output))["model.safetensors"] == second["model.safetensors"]


# --- the clock --------------------------------------------------------------------------------


@pytest.fixture
def seconds(monkeypatch) -> list[float]:
    """A clock that goes on by one at each step."""
    now, forward = [0.0], VolumeTextDualEncoder.forward

    def in_a_second(self, *args, **batch):
        now[0] += 1.0
        return forward(self, *args, **batch)

    monkeypatch.setattr("med3dvlm.train.clock.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(VolumeTextDualEncoder, "forward", in_a_second)
    return now


def rates(output: Path) -> dict[int, float]:
    history = json.loads((output / "history.json").read_text())
    return {entry["step"]: entry["learning_rate"] for entry in history if "loss" in entry}


def test_a_run_that_the_clock_ended_is_not_done_again(tmp_path, store, seconds):  # noqa: F811
    training = {**TRAINING, "max_steps": 10000, "max_minutes": 0.05}
    path, output = recipe(tmp_path, store, training=training), tmp_path / "contrastive"
    train(load_recipe(path))
    steps = max(rates(output))
    assert last_checkpoint(output / "checkpoints") == output / f"checkpoints/checkpoint-{steps}"
    before = result(output)
    train(load_recipe(path))
    assert result(output) == before
    train(load_recipe(path, ["training.max_minutes=0.1"]))  # more time is gone on with
    assert max(rates(output)) > steps


def test_the_time_used_is_kept_and_the_rate_logged_is_the_one_taken(
    tmp_path,
    store,  # noqa: F811
    monkeypatch,
    seconds,
):
    training = {**TRAINING, "max_steps": 10000, "schedule": "constant", "save_steps": 1}
    path = recipe(tmp_path, store, training={**training, "max_minutes": 0.1})
    with monkeypatch.context() as patch:

        def interrupted(*_, **__):
            if seconds[0] == 3:
                raise Interrupted

        patch.setattr("med3dvlm.train.engine._Averaging.on_step_begin", interrupted)
        with pytest.raises(Interrupted):
            train(load_recipe(path))
    seconds[0] += 1000.0  # in which it did not run
    train(load_recipe(path))
    # of six seconds three were used before; the last fifth lowers the rate
    expected = [1e-3] * 5 + [1e-3 * 5 / 6, 0, 0]
    assert list(rates(tmp_path / "contrastive").values()) == pytest.approx(expected)


def test_a_plan_says_when_the_clock_ends_a_run_in_its_warm_up(tmp_path, store):  # noqa: F811
    training = {**TRAINING, "max_steps": -1, "epochs": 1000000, "max_minutes": 0.001}
    path = recipe(tmp_path, store, training=training)
    (note,) = [note for note in plan(load_recipe(path)).notes if "max_minutes" in note]
    assert "in a warm-up of 120,000" in note and "lower training.warmup_share" in note
    (note,) = [
        note
        for note in plan(load_recipe(path, ["training.warmup_share=0"])).notes
        if "max_minutes" in note
    ]
    assert "of the 4,000,000 that the schedule is laid out for" in note and "warm-up" not in note


# --- damaged checkpoints ----------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def reshape(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: torch.zeros(7, 7) for name in tensors}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut),
        ("model.safetensors", reshape),
        ("model.safetensors", Path.unlink),
        ("ema.safetensors", cut),
        ("optimizer.pt", cut),
        ("optimizer.pt", Path.unlink),
        ("scheduler.pt", cut),
        ("rng_state.pth", cut),
        ("trainer_state.json", cut),
        ("trainer_state.json", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_named_with_what_to_do(again, name, damage):
    path, output = again
    last = output_of(output) / "checkpoints" / "checkpoint-6"
    forget_the_last_step(output_of(output))  # so that all of it is read
    remedy = "remove it to begin again."
    if damage is cut:
        (last.parent / "checkpoint-4").mkdir()
        remedy = "remove it to go on from checkpoint-4."
    damage(last / name)
    with pytest.raises(TrainingError) as refused:
        train(load_recipe(path, [output]))
    assert str(refused.value).startswith(f"{last} is damaged, or of another model (")
    assert str(refused.value).endswith(f"): {remedy}")


def test_a_mean_of_other_shapes_is_refused(again):
    path, output = again
    reshape(output_of(output) / "checkpoints" / "checkpoint-6" / "ema.safetensors")
    with pytest.raises(TrainingError, match="does not hold the mean of this run's weights"):
        train(load_recipe(path, [output]))


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_a_checkpoint_that_is_replaced_is_there_at_every_moment(tmp_path, monkeypatch, moves):
    """Killed after so many of the moves that replace it."""
    source, target = tmp_path / "unfinished" / "checkpoint-3", tmp_path / "checkpoint-3"
    for folder, text in ((source, "new"), (target, "old")):
        folder.mkdir(parents=True)
        (folder / "weights").write_text(text)
    replace, made = os.replace, []

    def killed(*arguments):
        if len(made) == moves:
            raise KeyboardInterrupt
        made.append(replace(*arguments))

    monkeypatch.setattr(checkpoints.os, "replace", killed)
    monkeypatch.setattr(checkpoints.shutil, "rmtree", lambda *_, **__: None)
    if moves < 2:
        with pytest.raises(KeyboardInterrupt):
            publish(source, target)
    else:
        publish(source, target)
    monkeypatch.undo()
    assert last_checkpoint(tmp_path) == target
    assert (target / "weights").read_text() == ("new" if moves == 2 else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


# --- the best weights -------------------------------------------------------------------------


def worse_each_time(monkeypatch, measure) -> None:
    """Let the first look at the model be the best."""
    looked, call = [], measure.__call__

    def measured(self, model):
        looked.append(1)
        figures, samples = call(self, model)
        return {**figures, "loss": float(len(looked))}, samples

    monkeypatch.setattr(measure, "__call__", measured)


def test_the_best_weights_become_the_model_where_the_recipe_says_so(
    tmp_path,
    store,  # noqa: F811
    monkeypatch,
):
    worse_each_time(monkeypatch, PairMeasure)
    data = {"store": str(tmp_path / "phantoms"), "phantoms": 8, "validation": {"studies": 2}}
    path = recipe(tmp_path, store, data=data, training={**TRAINING, **WATCHED})
    train(load_recipe(path))
    output = tmp_path / "contrastive"
    last = load_file(output / "model.safetensors")
    best = load_file(output / "checkpoints" / "checkpoint-2" / "ema.safetensors")
    model = train(load_recipe(path, ["training.result=best"]))
    weights = load_file(output / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in best.items())
    assert not all(torch.equal(last[name], tensor) for name, tensor in best.items())
    assert hub.load(output).fingerprint() == model.fingerprint()
    metrics = json.loads((output / "training.json").read_text())["metrics"]
    assert (metrics["step"], metrics["result_step"]) == (6, 2) and metrics["train_loss"] > 0
    before = result(output)
    train(load_recipe(path, ["training.result=best"]))
    assert result(output) == before
    shutil.rmtree(output / "checkpoints" / "checkpoint-2")
    with pytest.raises(TrainingError, match=r"checkpoint-2 .*: start the run again with .*=last"):
        train(load_recipe(path, ["training.result=best"]))


def test_the_best_adapters_become_the_model(done, tmp_path, store, monkeypatch):  # noqa: F811
    worse_each_time(monkeypatch, TaskMeasure)
    path = language_recipe(tmp_path, store, "alignment", str(done / "contrastive"))
    train(load_recipe(path))
    data = {"store": str(tmp_path / "phantoms"), "phantoms": 8, "validation": {"studies": 2}}
    path = language_recipe(
        tmp_path,
        store,
        "instruction",
        "alignment",
        train=["projector", "vision_encoder"],
        lora={"r": 2},
        data=data,
        training={**TRAINING, **WATCHED, "ema": None, "samples": 0, "schedule": "constant"},
    )
    still = ["training.warmup_share=0"]
    chosen = train(load_recipe(path, [*still, "training.result=best"])).state_dict()
    short = [f"output={tmp_path / 'short'}", "training.max_steps=2"]
    wanted = train(load_recipe(path, [*still, *short])).state_dict()
    assert not [name for name in wanted if not torch.equal(wanted[name], chosen[name])]


def test_a_best_that_nothing_measures_is_refused(tmp_path, store):  # noqa: F811
    with pytest.raises(RecipeError, match="training.result is best, but nothing is measured"):
        load_recipe(recipe(tmp_path, store), ["training.result=best"])


# --- the optimizer, the output ----------------------------------------------------------------


def test_scales_and_shifts_are_not_decayed(tmp_path, store):  # noqa: F811
    followed = load_recipe(recipe(tmp_path, store), ["training.weight_decay=0.1"])
    job = contrastive_job(followed)
    decayed, spared = _trainer(job, followed, None).create_optimizer().param_groups
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0
    assert {p.ndim for p in decayed["params"]} >= {2, 5} and spared["params"]
    assert min(p.ndim for p in decayed["params"]) == 2
    assert job.model.loss.t_prime in set(spared["params"])


def test_results_alone_go_to_standard_output(again):
    path, output = again
    shutil.rmtree(output_of(output))
    ran = CliRunner().invoke(app, ["train", "contrastive", str(path), output])
    assert ran.exit_code == 0, ran.output
    assert ran.stdout == f"{output_of(output)}: trained\n"
    assert "'loss'" in ran.stderr


def test_more_processes_than_there_are_batches_are_refused(monkeypatch):
    of_four = Recipe()
    of_four.training.batch_size = 4
    check_enough(4, of_four)
    monkeypatch.setattr(studies, "processes", lambda: 2)
    check_enough(8, of_four)
    with pytest.raises(RecipeError, match="8 studies a step, but there are only 7"):
        check_enough(7, of_four)
