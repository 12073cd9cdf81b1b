"""What a run was begun with, kept beside its checkpoints: it goes on with the same, or not at all.

A checkpoint holds the optimizer, the schedule and the place among the studies. Another recipe would
not be followed from there on, yet it would stand in training.json as what had made the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from med3dvlm.files import write_json
from med3dvlm.train.checkpoints import TrainingError, last_checkpoint
from med3dvlm.train.ranks import main_first, processes
from med3dvlm.train.recipe import Recipe, RecipeError

FILE = "run.json"
# Keys that may change while a run lasts: none has a part in what a step computes.
FREE = {
    "output",
    "keep_adapter",
    "data.workers",
    "data.in_memory",
    "training.max_minutes",
    "training.gradient_checkpointing",
    "training.loader_workers",
    "training.save_steps",
    "training.evaluate_steps",
    "training.samples",
    "training.result",
    "training.log_steps",
    "training.loggers",
}


def checkpoints_of(recipe: Recipe) -> Path:
    return Path(recipe.output, "checkpoints")


def has_record(recipe: Recipe) -> bool:
    """Whether it is known what the run was begun with; not so of those from before this file."""
    return (checkpoints_of(recipe) / FILE).is_file()


def write_record(recipe: Recipe) -> None:
    """Note what a run that begins is begun with."""
    known = {"recipe": asdict(recipe), "processes": processes()}
    write_json(checkpoints_of(recipe) / FILE, known)


def check_unchanged(recipe: Recipe) -> None:
    """Refuse to go on with a run by another recipe, or on another number of processes.

    Raises:
        RecipeError: naming each key that differs, with what it was and what it is.
        TrainingError: if the record of the run cannot be read.
    """
    folder = checkpoints_of(recipe)
    with main_first():  # it also mends what a crash left
        last = last_checkpoint(folder)
    if last is None or not has_record(recipe):
        return
    try:
        known = json.loads((folder / FILE).read_text("utf-8"))
        changed = differences(known["recipe"], recipe)
        if known["processes"] != processes():
            changed["processes"] = (known["processes"], processes())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingError(
            f"{folder / FILE} is damaged: remove it to go on from {last.name} with the recipe "
            "that the run was begun with."
        ) from error
    if changed:
        listed = "; ".join(f"{key} was {was}, is {now}" for key, (was, now) in changed.items())
        raise RecipeError(
            f"{folder} holds a run that was begun otherwise ({listed}): go on as it was begun, "
            f"choose another output, or remove {folder} to begin again."
        )


def differences(known: dict[str, Any], recipe: Recipe) -> dict[str, tuple[str, str]]:
    """The keys with a part in the weights that are not as they were: (was, is), as JSON.

    A key that `known` lacks, because it came to recipes later, was at its default.
    """
    default = Recipe()
    was = dict(_leaves(_filled(known, default)))
    now = dict(_leaves(_filled(json.loads(json.dumps(asdict(recipe))), default)))
    return {
        key: (_shown(was, key), _shown(now, key))
        for key in sorted({*was, *now} - FREE)
        if (key in was, was.get(key)) != (key in now, now.get(key))
    }


def _filled(known: dict[str, Any], default: Any) -> dict[str, Any]:
    """`known` with the defaults of what it lacks, section by section."""
    filled = {}
    for field in fields(default):
        value = getattr(default, field.name)
        if is_dataclass(value):
            filled[field.name] = _filled(known.get(field.name, {}), value)
        else:
            filled[field.name] = known.get(field.name, value)
    return filled


def _leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that is no section."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(leaves: dict[str, Any], key: str) -> str:
    return json.dumps(leaves[key], ensure_ascii=False) if key in leaves else "not set"
