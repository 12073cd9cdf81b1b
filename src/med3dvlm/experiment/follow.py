"""Train and measure what an experiment names; what is finished is kept, what is not goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from med3dvlm.data.prepare import prepare_phantoms
from med3dvlm.data.sources import Progress
from med3dvlm.data.store import Store
from med3dvlm.evaluate.scores import Score, from_dict
from med3dvlm.experiment.measure import MEASURES
from med3dvlm.experiment.spec import TEST, ExperimentError, Planned, run_folder
from med3dvlm.files import write_json
from med3dvlm.scan import Preparation
from med3dvlm.train import Recipe, begin, finish
from med3dvlm.train.checkpoints import last_checkpoint
from med3dvlm.train.engine import trainable_parameters
from med3dvlm.train.plan import encoding_flop, step_flop

RECIPE, COST = "recipe.json", "cost.json"
Say = Callable[[str], None]


def follow(
    planned: Planned, *, say: Say = lambda _: None, progress: Progress | None = None
) -> None:
    """Train every run that is not finished, and take every measure that is not taken.

    Seed after seed, so that what was stopped has whole seeds to show.

    Args:
        say: is told what was done, a line each time.

    Raises:
        ExperimentError: where the folder holds a run of another recipe.
    """
    for key, recipe in planned.recipes.items():
        _check_same(recipe, key)
    tasks = _tasks(planned)
    store = held_out(planned, progress=progress)
    for number, (seed, name, measure) in enumerate(tasks):
        recipe = planned.recipes[seed, name]
        began = time.monotonic()
        if measure is None:
            new = _train(recipe, progress)
        else:
            new = _measure(Path(recipe.output), measure, store, planned)
        if new:
            minutes = (time.monotonic() - began) / 60
            what = "trained" if measure is None else f"measured ({measure})"
            say(f"[{number + 1}/{len(tasks)}] seed {seed}, {name}: {what}, {minutes:.1f} min")


def _tasks(planned: Planned) -> list[tuple[int, str, str | None]]:
    """(seed, run, measure, or None to train it), each once."""
    experiment = planned.experiment
    found: dict[tuple[int, str, str | None], None] = {}
    for seed in experiment.seeds:
        for question in experiment.questions.values():
            for names in question.arms.values():
                for name in experiment.chain(names):
                    found[seed, name, None] = None
                for measure in question.measure:
                    for name in planned.runs_of(names, measure):
                        found[seed, name, measure] = None
    return list(found)


def is_finished(recipe: Recipe) -> bool:
    return Path(recipe.output, COST).is_file()


def held_out(planned: Planned, *, progress: Progress | None = None) -> Store:
    """The phantoms that are measured on, prepared as those that are trained on."""
    recipe = next(iter(planned.recipes.values()))
    return prepare_phantoms(
        planned.folder / TEST,
        planned.experiment.test_studies,
        split="test",
        seed=recipe.data.seed,
        preparation=Preparation.from_dict(recipe.preparation),
        workers=recipe.data.workers,
        progress=progress,
    )


def _check_same(recipe: Recipe, key: tuple[int, str]) -> None:
    """Refuse a folder whose run was another one: its figures would be taken for this one's."""
    path = Path(recipe.output, RECIPE)
    if path.is_file() and json.loads(path.read_text("utf-8")) != _settings(recipe):
        raise ExperimentError(
            f"{path.parent} holds a run of another recipe (seed {key[0]}, {key[1]}): choose "
            "another folder, or remove that one."
        )


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Without paths, for a folder can be moved."""
    settings = json.loads(json.dumps(OmegaConf.to_container(OmegaConf.structured(recipe))))
    del settings["output"], settings["start"], settings["data"]["store"]
    return settings


class _Clock:
    """Seconds of a run, and of its processor, less the pauses; it starts by itself."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self.start()

    def start(self) -> None:
        self.began, self.cpu_began = time.monotonic(), time.process_time()

    def stop(self) -> None:
        self.seconds += time.monotonic() - self.began
        self.cpu_seconds += time.process_time() - self.cpu_began


def _train(recipe: Recipe, progress: Progress | None) -> bool:
    """Train one run unless it is finished; what it cost is written last.

    The seconds of a run that was stopped and went on are not known.
    """
    if is_finished(recipe):
        return False
    output = Path(recipe.output)
    resumed = last_checkpoint(output / "checkpoints") is not None
    write_json(output / RECIPE, _settings(recipe))
    clock = _Clock()
    job = begin(recipe, progress=progress)
    clock.stop()
    learning = sum(p.numel() for p in job.learner.parameters() if p.requires_grad)
    flop, encoding = step_flop(job, recipe), encoding_flop(job)
    clock.start()
    model = finish(job, recipe)
    clock.stop()
    history = json.loads((output / "history.json").read_text("utf-8"))
    steps = max(entry["step"] for entry in history)
    parts = {name: count for name, (_, count) in trainable_parameters(model).items()}
    write_json(
        output / COST,
        {
            "steps": steps,
            "studies_seen": steps * recipe.training.batch_size * recipe.training.accumulation,
            "seconds": None if resumed else clock.seconds,
            "cpu_seconds": None if resumed else clock.cpu_seconds,
            "flop": flop * steps + encoding,
            "parameters": sum(parts.values()),
            "parameters_trained": learning,
            "parts": parts,
        },
    )
    shutil.rmtree(output / "checkpoints")
    return True


def _measure(folder: Path, measure: str, store: Store, planned: Planned) -> bool:
    """Take one measure unless it is there, on as many studies."""
    path = folder / f"{measure}.json"
    on = {"test_studies": len(store), "asked_studies": planned.experiment.asked_studies}
    if path.is_file() and json.loads(path.read_text("utf-8"))["on"] == on:
        return False
    scores = MEASURES[measure].take(folder, store, on["asked_studies"])
    saved = {name: score.to_dict() for name, score in scores.items()}
    write_json(path, {"on": on, "scores": saved})
    return True


def read_cost(planned: Planned, seed: int, name: str) -> dict[str, Any]:
    path = run_folder(planned.folder, seed, name) / COST
    return json.loads(path.read_text("utf-8"))


def read_scores(planned: Planned, seed: int, name: str, measure: str) -> dict[str, Score]:
    path = run_folder(planned.folder, seed, name) / f"{measure}.json"
    saved = json.loads(path.read_text("utf-8"))["scores"]
    return {key: from_dict(value) for key, value in saved.items()}
