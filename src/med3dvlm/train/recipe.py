"""Recipes: one YAML file says everything a training run needs; unknown keys are errors."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from med3dvlm.files import read_yaml

STAGES = ("contrastive", "alignment", "instruction")
PRECISIONS = ("fp32", "bf16")
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")
LOGGERS = ("tensorboard", "wandb", "mlflow", "trackio")
TASKS = ("report", "caption", "closed", "open", "yes_no")
# by which power of its length an answer's tokens count less
LOSS_AVERAGES = {"token": 0.0, "root": 0.5, "answer": 1.0}
RESULTS = ("last", "best")
METRICS = {"contrastive": ("loss", "r_at_1"), "alignment": ("loss",), "instruction": ("loss",)}
# How scans are flipped in training (see med3dvlm.data.augment).
FLIPS = ("off", "swap", "published")

# Settings that one stage reads and the others do not.
LANGUAGE_ONLY = (
    "data.tasks",
    "data.turns",
    "data.vary_prompts",
    "data.shuffle_choices",
    "training.loss_average",
    "training.samples",
)
CONTRASTIVE_ONLY = (
    "anew",
    "data.caption_share",
    "data.intensity",
    "data.shift_voxels",
    "data.flips",
)
# Of PEFT's LoraConfig, what a run sets or has no use for.
SET_BY_RUNS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
}

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class RecipeError(ValueError):
    """A recipe that cannot be followed, in one sentence that names the key."""


@dataclass
class ValidationRecipe:
    """Studies to watch a run with; none of them is trained on.

    They are the first `studies` of `split` in the store, or, where the run trains on phantoms,
    as many phantoms of that split, generated into `<store>-validation`.
    """

    studies: int = 0
    split: str = "validation"


@dataclass
class DataRecipe:
    """The prepared studies to learn from: a store, made by `med3dvlm prepare`.

    In its place `mixture` names several, each with its weight: its share of an epoch. With
    `phantoms` more than 0, that many studies of `split` and `seed` are generated into
    `store` first, where they are not there yet.
    """

    store: str = ""
    mixture: dict[str, float] = field(default_factory=dict)
    phantoms: int = 0
    split: str = "train"
    seed: int = 0
    skip: list[str] = field(default_factory=list)  # ids of studies that are not to be used
    workers: int = 2
    in_memory: bool = False  # whether volumes are read once and kept, as stored
    # How often each task is drawn in the language stages: report, caption, closed, open, yes_no.
    tasks: dict[str, float] = field(default_factory=lambda: {"report": 1.0})
    # Language stages: how many tasks of a study are trained on at one look at it. They see its
    # visual tokens and not each other.
    turns: int = 1
    # Language stages: whether reports and captions are asked for in several wordings.
    vary_prompts: bool = False
    # Language stages: whether the choices of closed questions come in another order each time.
    shuffle_choices: bool = False
    # Contrastive stage: how often the short caption stands in for the report.
    caption_share: float = 0.0
    # Augmentation, contrastive stage: intensity scale and shift as shares of the range, and
    # shifts of the volume in voxels. Flips: off; swap mirrors left and right in scan and words;
    # published flips and turns scans whose words stay, as the published training did.
    intensity: float = 0.1
    shift_voxels: int = 2
    flips: str = "off"
    validation: ValidationRecipe = field(default_factory=ValidationRecipe)


@dataclass
class TrainingRecipe:
    epochs: float = 1.0
    max_steps: int = -1
    # Ends early, all starts of the run counted. Warm-up and decay stay those of epochs or
    # max_steps; the last fifth of the time scales the rate down to zero on top of them.
    max_minutes: float | None = None
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup_share: float = 0.03
    schedule: str = "cosine"
    clip_norm: float = 1.0
    precision: str = "fp32"  # or bf16
    loss_average: str = "token"  # language stages: what counts alike, or root or answer
    ema: float | None = None  # decay of a running mean of the weights, which is then the result
    gradient_checkpointing: bool = False  # less memory, more time
    shard: bool = False  # whether the processes of a run share one model among them (FSDP2)
    seed: int = 0
    loader_workers: int = 0  # processes that read batches ahead
    save_steps: int = 500
    evaluate_steps: int | None = None  # how often data.validation is looked at
    best_metric: str = "loss"  # or r_at_1, contrastive: whose best checkpoint is kept
    result: str = "last"  # or best: whose weights (with ema, their mean) become the model
    samples: int = 4  # language stages: validation studies that are written about each time
    log_steps: int = 20
    loggers: list[str] = field(default_factory=lambda: ["tensorboard"])

    def steps(self, studies: int) -> int:
        """Optimizer steps of one process over so many studies, as the Trainer counts them."""
        if self.max_steps > 0:
            return self.max_steps
        batches = studies // self.batch_size
        return math.ceil(self.epochs * math.ceil(batches / self.accumulation))


@dataclass
class Recipe:
    """One stage of training.

    `model` are settings of DualEncoderConfig (contrastive) or Med3DVLMConfig (language stages);
    `start` is the checkpoint to start from: a dual encoder to go on with, the dual encoder whose
    volume encoder alignment takes, or the aligned model that instruction tuning goes on with.
    `train` names the parts that learn: vision_encoder, projector, language_model; of a dual
    encoder vision_encoder, vision_projection, text_encoder, text_projection, loss. `anew` names
    those of them that forget what they had learned (contrastive stage). `lora` are settings of
    PEFT's LoraConfig; its target_modules are layers of the language model, by the ends of their
    names or by a pattern of the whole: all linear ones but the last where it names none.
    """

    stage: str = MISSING
    output: str = MISSING
    start: str | None = None
    preparation: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer_size: int = 1024
    train: list[str] = field(default_factory=list)
    anew: list[str] = field(default_factory=list)
    lora: dict[str, Any] | None = None
    quantize: str | None = None  # with lora: nf4 holds the frozen language model in 4 bits (QLoRA)
    keep_adapter: bool = False  # with lora: save the adapters beside the merged model too
    data: DataRecipe = field(default_factory=DataRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)


def load_recipe(path: Path | str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply overrides such as `training.batch_size=8`.

    Raises:
        RecipeError: for a missing file, an unknown key, a value of the wrong kind.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"{path} is no file: give the path of a recipe (YAML).")
    try:
        recipe = read_yaml(path, Recipe, overrides or ())
    except ConfigKeyError as error:
        raise RecipeError(f"{path}: {_unknown(str(error.full_key))}") from error
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        key = getattr(error, "full_key", None)
        reason = (f"{key}: " if key else "") + str(error).split("\n", 1)[0].rstrip(".")
        raise RecipeError(f"{path} cannot be followed: {reason}.") from error
    try:
        check_settings(recipe)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    return recipe


def _unknown(full_key: str) -> str:
    """What to say about a key that no section has."""
    *sections, key = full_key.split(".")
    known: Any = Recipe
    for section in sections:
        default = next(f for f in fields(known) if f.name == section).default_factory
        if not is_dataclass(default):
            break
        known = default
    return unknown_key(key, (f.name for f in fields(known)), section=".".join(sections))


def unknown_key(key: str, known: Iterable[str], *, section: str) -> str:
    """A sentence that names the nearest known key."""
    names = sorted(known)
    near = get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(names)}."
    place = f"section {section!r}" if section else "a recipe"
    return f"key {key!r} is unknown in {place}: {hint}"


def check_keys(settings: dict[str, Any], known: Iterable[str], *, section: str) -> None:
    """Refuse keys of a free section that what it sets does not have.

    Raises:
        RecipeError: naming the first, and the nearest that is known.
    """
    names = set(known)
    for key in settings:
        if key not in names:
            raise RecipeError(unknown_key(key, names, section=section))


def check_settings(recipe: Recipe) -> None:
    """Refuse what no model and no data could make possible.

    Raises:
        RecipeError: naming the key, what is wrong and what can stand there.
    """
    training, data = recipe.training, recipe.data
    one_of = [
        ("stage", recipe.stage, STAGES),
        ("training.precision", training.precision, PRECISIONS),
        ("training.schedule", training.schedule, SCHEDULES),
        ("data.flips", data.flips, FLIPS),
        ("training.loss_average", training.loss_average, tuple(LOSS_AVERAGES)),
        *(("training.loggers", name, LOGGERS) for name in training.loggers),
        *(("data.tasks", name, TASKS) for name in data.tasks),
        ("training.best_metric", training.best_metric, METRICS.get(recipe.stage, ())),
        ("training.result", training.result, RESULTS),
    ]
    for key, value, known in one_of:
        if value not in known:
            raise RecipeError(f"{key} {value!r} is unknown: choose one of {', '.join(known)}.")
    if bool(data.store) == bool(data.mixture):
        raise RecipeError("data: give either a store or a mixture of stores, with their weights.")
    if data.mixture and data.phantoms:
        raise RecipeError("data.phantoms are generated into data.store: give that, no mixture.")
    for name, weight in data.mixture.items():
        if not 0 < weight < math.inf:
            raise RecipeError(f"data.mixture: the weight of {name} is {weight}: it must be over 0.")
    _check_stage(recipe)
    _check_start(recipe)
    least = [
        ("training.batch_size", training.batch_size, 1),
        ("training.accumulation", training.accumulation, 1),
        ("training.save_steps", training.save_steps, 1),
        ("training.log_steps", training.log_steps, 1),
        ("training.evaluate_steps", training.evaluate_steps, 1),
        ("training.samples", training.samples, 0),
        ("training.loader_workers", training.loader_workers, 0),
        ("training.weight_decay", training.weight_decay, 0),
        ("data.validation.studies", data.validation.studies, 0),
        ("data.phantoms", data.phantoms, 0),
        ("data.turns", data.turns, 1),
    ]
    for key, value, low in least:
        if value is not None and not low <= value < math.inf:
            raise RecipeError(f"{key} is {value}: it must be {low} or more.")
    if not 0 < training.learning_rate < math.inf:
        raise RecipeError(f"training.learning_rate is {training.learning_rate}: it must be over 0.")
    if training.epochs <= 0 and training.max_steps <= 0:
        raise RecipeError(f"training.epochs is {training.epochs}: it must be over 0.")
    if not 0 <= training.warmup_share < 1:
        raise RecipeError(
            f"training.warmup_share is {training.warmup_share}: it is a share of the steps, from 0 "
            "to under 1."
        )
    if training.ema is not None and not 0 < training.ema < 1:
        raise RecipeError(f"training.ema is {training.ema}: a decay lies between 0 and 1.")
    if bool(training.evaluate_steps) != bool(data.validation.studies):
        raise RecipeError(
            "training.evaluate_steps and data.validation.studies belong together: give both, or "
            "neither."
        )
    if training.result == "best" and not training.evaluate_steps:
        raise RecipeError(
            "training.result is best, but nothing is measured: give training.evaluate_steps and "
            "data.validation.studies, or leave it at last."
        )
    if training.shard and recipe.quantize:
        raise RecipeError("training.shard cuts whole weights: leave it out, or quantize.")
    _check_lora(recipe)


def _check_stage(recipe: Recipe) -> None:
    """Refuse settings that only another stage reads."""
    if recipe.stage == "contrastive":
        unread, readers = LANGUAGE_ONLY, "language stages"
    else:
        unread, readers = CONTRASTIVE_ONLY, "contrastive stage"
    for key in unread:
        if _is_set(recipe, key):
            raise RecipeError(f"{key} is for the {readers}: leave it out.")


def _check_processes() -> None:
    from med3dvlm.train.ranks import processes  # takes seconds

    if processes() == 1:
        raise RecipeError(
            "training.shard shares one model among several processes, but this is one: start with "
            "torchrun --nproc-per-node, or leave it out."
        )


def _check_start(recipe: Recipe) -> None:
    """Refuse settings of what the checkpoint to start from has already.

    Whether a language stage reads `model` is known when its start is: it does with a dual encoder.
    """
    if recipe.stage == "contrastive" and recipe.start is None:
        if recipe.anew:
            raise RecipeError("anew needs a start: without, nothing was learned before.")
        return
    for key in ("preparation", "tokenizer_size", "model"):
        if _is_set(recipe, key) and (key != "model" or recipe.stage == "contrastive"):
            raise RecipeError(f"{key}: the checkpoint to start from has its own: leave it out.")


def _is_set(recipe: Recipe, key: str) -> bool:
    """Whether a dotted key is other than it would be without."""
    return attrgetter(key)(recipe) != attrgetter(key)(Recipe())


def _check_lora(recipe: Recipe) -> None:
    """Refuse adapters where there can be none, and settings that they do not have."""
    if recipe.quantize not in (None, "nf4"):
        raise RecipeError(f"quantize {recipe.quantize!r} is unknown: use nf4, or leave it out.")
    if recipe.lora is None:
        if recipe.keep_adapter:
            raise RecipeError("keep_adapter needs lora: there is no adapter to keep without.")
        if recipe.quantize:
            raise RecipeError("quantize needs lora: weights in 4 bits cannot learn.")
        return
    if recipe.stage == "contrastive":
        raise RecipeError("lora needs a language model, which a contrastive recipe does not train.")
    if "language_model" in recipe.train:
        raise RecipeError(
            "train: with lora the language model learns through adapters alone: take "
            "language_model out of train, or leave lora out."
        )
    if "modules_to_save" in recipe.lora:
        raise RecipeError("lora.modules_to_save: name the parts that learn in full in train.")
    if recipe.lora:
        from peft import LoraConfig  # takes seconds

        known = {f.name for f in fields(LoraConfig)} - SET_BY_RUNS
        check_keys(recipe.lora, known, section="lora")


def check_needs(recipe: Recipe) -> None:
    """Refuse a recipe that asks for what is not there, before anything is loaded.

    Raises:
        RecipeError: naming the key and the file, folder or package that is missing; for a launcher
            that would spread the model by itself.
    """
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            raise RecipeError(
                f"the launcher asks for {name}: start without it, and with training.shard=true, "
                "by which the processes share one model among them (FSDP2)."
            )
    if recipe.training.shard:
        _check_processes()
    for name in recipe.training.loggers:
        if find_spec(name) is None:
            raise RecipeError(
                f"training.loggers: {name} is not installed: pip install {name}, or leave it out."
            )
    if recipe.quantize and find_spec("bitsandbytes") is None:
        raise RecipeError("quantize needs bitsandbytes: pip install 'med3dvlm[quantize]'.")
    if recipe.stage != "contrastive" and recipe.start is None:
        raise RecipeError("start is missing: name the checkpoint to start from.")
    _check_checkpoint("start", recipe.start)
    for key in ("language_model", "text_encoder"):
        _check_checkpoint(f"model.{key}", recipe.model.get(key))
    for store in recipe.data.mixture or [recipe.data.store]:
        there = "://" in store or Path(store, "store.json").is_file()
        if not recipe.data.phantoms and not there:
            key = "mixture" if recipe.data.mixture else "store"
            raise RecipeError(
                f"data.{key}: {store} is no finished store: run med3dvlm prepare, or set "
                "data.phantoms to generate studies."
            )


def _check_checkpoint(key: str, name: str | None) -> None:
    """A folder that is here, or a name of the hub that is in the cache or could be fetched."""
    if name is None or name == "demo" or Path(name).is_dir():
        return
    from huggingface_hub import constants, try_to_load_from_cache

    if not _HUB_NAME.fullmatch(name):
        raise RecipeError(f"{key}: folder {name} does not exist: give one that does.")
    if constants.HF_HUB_OFFLINE and not isinstance(
        try_to_load_from_cache(name, "config.json"), str
    ):
        raise RecipeError(
            f"{key}: {name} is neither a folder here nor in the hub's cache, and HF_HUB_OFFLINE is "
            "set: download it where a network is and give its folder."
        )
