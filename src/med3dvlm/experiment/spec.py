"""An experiment is data: one YAML that names runs, and questions whose arms are made of them.

    seeds: [0, 1, 2]
    train_studies: 1600
    runs:
      vit-infonce: {recipe: contrastive.yaml, set: {model.loss: infonce, …}}
      vit-linear: {recipe: alignment.yaml, start: vit-infonce}
    questions:
      encoder:
        measure: [retrieval]
        reference: baseline
        arms: {baseline: [vit-infonce], …}

A run is a recipe with settings of its own; runs that arms share are made once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from med3dvlm.experiment.measure import MEASURES
from med3dvlm.files import read_yaml
from med3dvlm.train import Recipe, RecipeError, load_recipe

TRAIN, TEST = "phantoms-train", "phantoms-test"


class ExperimentError(ValueError):
    """An experiment that cannot be followed, in one sentence that names the key."""


@dataclass
class Run:
    """A recipe beside the experiment's file, what it starts from, and what is set otherwise.

    Attributes:
        start: the name of another run.
        set: settings by their dotted keys, such as model.loss, in their order.
    """

    recipe: str = MISSING
    start: str | None = None
    set: dict[str, Any] = field(default_factory=dict)


@dataclass
class Question:
    """Arms that are compared.

    Attributes:
        measure: which of MEASURES; the first score of the first is the one that is plotted first.
        reference: the arm that the others are set against.
        arms: for each its runs, to be measured with what fits their stage; the runs that they
            start from belong to it as well.
    """

    title: str = MISSING
    measure: list[str] = field(default_factory=list)
    reference: str = MISSING
    arms: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Experiment:
    """
    Attributes:
        seeds: of the weights and of the order of the studies; the studies are the same for all.
        train_studies, test_studies: phantoms of the splits train and test.
        asked_studies: of those of test, how many reports are drafted and questions asked about.
    """

    title: str = MISSING
    seeds: list[int] = field(default_factory=lambda: [0])
    train_studies: int = MISSING
    test_studies: int = MISSING
    asked_studies: int = MISSING
    runs: dict[str, Run] = field(default_factory=dict)
    questions: dict[str, Question] = field(default_factory=dict)

    def chain(self, names: Sequence[str]) -> list[str]:
        """Runs with all that they start from, each once, in the order of training."""
        found: dict[str, None] = {}
        for name in names:
            line = [name]
            while (start := self.runs[line[0]].start) is not None:
                line.insert(0, start)
            found |= dict.fromkeys(line)
        return list(found)

    def only(self, names: Sequence[str]) -> Experiment:
        """The experiment with some of its questions.

        Raises:
            ExperimentError: for a question that it does not have.
        """
        for name in names:
            if name not in self.questions:
                raise ExperimentError(
                    f"question {name!r} is unknown: choose from {', '.join(self.questions)}."
                )
        kept = {name: self.questions[name] for name in self.questions if name in names}
        used = self.chain([run for q in kept.values() for arm in q.arms.values() for run in arm])
        runs = {name: run for name, run in self.runs.items() if name in used}
        return Experiment(**{**vars(self), "questions": kept, "runs": runs})


@dataclass(frozen=True)
class Planned:
    """An experiment with a folder: the recipe of every run and seed.

    Attributes:
        recipes: by (seed, name of the run), in the order of training.
    """

    experiment: Experiment
    folder: Path
    recipes: dict[tuple[int, str], Recipe]

    def runs_of(self, arm: Sequence[str], measure: str) -> list[str]:
        """The runs of an arm that a measure is for."""
        stages = MEASURES[measure].stages
        seed = self.experiment.seeds[0]
        return [name for name in arm if self.recipes[seed, name].stage in stages]

    def studies_seen(self, seed: int, name: str) -> int:
        recipe = self.recipes[seed, name]
        training = recipe.training
        steps = training.steps(recipe.data.phantoms)
        return steps * training.batch_size * training.accumulation


def load_experiment(
    path: Path | str,
    folder: Path | str,
    *,
    only: Sequence[str] | None = None,
    seeds: int | None = None,
) -> Planned:
    """Read an experiment, and every recipe that it names.

    Args:
        folder: where its runs will be.
        only: names of questions; all where none is given.
        seeds: so many of the seeds, the first.

    Raises:
        ExperimentError: for a missing file, an unknown key or name, arms with unequal budgets.
        RecipeError: for a run whose recipe cannot be followed.
    """
    path, folder = Path(path), Path(folder)
    if not path.is_file():
        raise ExperimentError(f"{path} is no file: give the path of an experiment (YAML).")
    try:
        experiment = read_yaml(path, Experiment)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        key = getattr(error, "full_key", None)
        reason = (f"{key}: " if key else "") + str(error).split("\n", 1)[0].rstrip(".")
        raise ExperimentError(f"{path} cannot be followed: {reason}.") from error
    try:
        _check_names(experiment)
        experiment = experiment.only(only or list(experiment.questions))
        if seeds is not None and seeds > len(experiment.seeds):
            raise ExperimentError(f"it has {len(experiment.seeds)} seeds, not {seeds}.")
        experiment.seeds = experiment.seeds[:seeds]
        recipes = {
            (seed, name): _recipe(experiment, name, seed, path.parent, folder)
            for seed in experiment.seeds
            for name in experiment.chain(list(experiment.runs))
        }
        planned = Planned(experiment, folder, recipes)
        _check_budgets(planned)
    except ExperimentError as error:
        raise ExperimentError(f"{path}: {error}") from error
    return planned


def _check_names(experiment: Experiment) -> None:
    """Refuse names of runs, arms and measures that there are not, and runs that go in a circle."""
    runs = experiment.runs
    if len(set(experiment.seeds)) != len(experiment.seeds) or not experiment.seeds:
        raise ExperimentError(f"seeds {experiment.seeds}: give some, each once.")
    for key in ("train_studies", "test_studies", "asked_studies"):
        if getattr(experiment, key) < 2:
            raise ExperimentError(f"{key} is {getattr(experiment, key)}: it must be 2 or more.")
    if experiment.asked_studies > experiment.test_studies:
        raise ExperimentError(
            f"asked_studies is {experiment.asked_studies}: there are {experiment.test_studies} "
            "test_studies to ask about."
        )
    for name, run in runs.items():
        line = [name]
        while (start := runs[line[-1]].start) is not None:
            if start not in runs or start in line:
                raise ExperimentError(
                    f"runs.{line[-1]}: it cannot start from {start!r}: name another run."
                )
            line.append(start)
        for key in ("output", "start", "training.seed", "data.store", "data.phantoms"):
            if key in run.set:
                raise ExperimentError(f"runs.{name}.set: {key} is the experiment's to set.")
    for key, question in experiment.questions.items():
        place = f"questions.{key}"
        if question.reference not in question.arms:
            raise ExperimentError(f"{place}: reference {question.reference!r} is none of its arms.")
        if not question.measure:
            raise ExperimentError(f"{place}: measure is empty: use {', '.join(MEASURES)}.")
        for measure in question.measure:
            if measure not in MEASURES:
                raise ExperimentError(
                    f"{place}: measure {measure!r} is unknown: use {', '.join(MEASURES)}."
                )
        for arm, names in question.arms.items():
            for name in names:
                if name not in runs:
                    raise ExperimentError(f"{place}: arm {arm!r} has no run {name!r} to take.")


def _check_budgets(planned: Planned) -> None:
    """Every arm of a question can be measured, on as many studies seen as the others."""
    experiment = planned.experiment
    seed = experiment.seeds[0]
    for key, question in experiment.questions.items():
        seen = {}
        for arm, names in question.arms.items():
            chain = experiment.chain(names)
            seen[arm] = sum(planned.studies_seen(seed, name) for name in chain)
            for measure in question.measure:
                measured = planned.runs_of(names, measure)
                if len(measured) != 1:
                    raise ExperimentError(
                        f"questions.{key}: arm {arm!r} must have one run that {measure!r} can "
                        f"measure, of the stage {' or '.join(MEASURES[measure].stages)}."
                    )
                model = planned.recipes[seed, measured[0]].model
                if measure == "findings" and not model.get("concept_loss_weight"):
                    raise ExperimentError(
                        f"questions.{key}: 'findings' needs a concept head, which run "
                        f"{measured[0]!r} has none of: set its model.concept_loss_weight."
                    )
        if len(set(seen.values())) > 1:
            listed = ", ".join(f"{arm} {count:,}" for arm, count in seen.items())
            raise ExperimentError(
                f"questions.{key}: its arms see different numbers of studies ({listed}): give all "
                "the same steps and batches."
            )


def _recipe(experiment: Experiment, name: str, seed: int, beside: Path, folder: Path) -> Recipe:
    run = experiment.runs[name]
    settings: dict[str, Any] = {
        **run.set,
        "output": str(run_folder(folder, seed, name)),
        "training.seed": seed,
        "data.store": str(folder / TRAIN),
        "data.phantoms": experiment.train_studies,
    }
    if run.start is not None:
        settings["start"] = str(run_folder(folder, seed, run.start))
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    try:
        return load_recipe(beside / run.recipe, overrides)
    except RecipeError as error:
        raise RecipeError(f"run {name!r}: {error}") from error


def run_folder(folder: Path, seed: int, name: str) -> Path:
    return folder / f"seed-{seed}" / name
