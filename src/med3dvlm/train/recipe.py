"""Recipes: one YAML file says everything a training run needs; unknown keys are errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

STAGES = ("contrastive", "alignment", "instruction")


class RecipeError(ValueError):
    """A recipe that cannot be followed, in one sentence that names the key."""


@dataclass
class DataRecipe:
    """The prepared studies to learn from: a store, made by `med3dvlm prepare`.

    With `phantoms` more than 0, that many studies of `split` and `seed` are generated into
    `store` first, where they are not there yet.
    """

    store: str = MISSING
    phantoms: int = 0
    split: str = "train"
    seed: int = 0
    skip: list[str] = field(default_factory=list)  # ids of studies that are not to be used
    workers: int = 2
    # How often each task is drawn in the language stages: report, caption, closed, open, yes_no.
    tasks: dict[str, float] = field(default_factory=lambda: {"report": 1.0})
    # Language stages: whether reports and captions are asked for in several wordings.
    vary_prompts: bool = False
    # Contrastive stage: how often the short caption stands in for the report.
    caption_share: float = 0.0
    # Augmentation, contrastive stage: intensity scale and shift as shares of the range, and
    # shifts of the volume in voxels. No flips: reports speak of left and right.
    intensity: float = 0.1
    shift_voxels: int = 2


@dataclass
class TrainingRecipe:
    epochs: float = 1.0
    max_steps: int = -1
    max_minutes: float | None = None  # ends early, with the schedule fitted to the time
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    warmup_share: float = 0.03
    schedule: str = "cosine"
    clip_norm: float = 1.0
    precision: str = "fp32"  # or bf16
    seed: int = 0
    loader_workers: int = 0  # processes that read batches ahead
    save_steps: int = 500
    log_steps: int = 20
    loggers: list[str] = field(default_factory=lambda: ["tensorboard"])


@dataclass
class Recipe:
    """One stage of training.

    `model` are settings of DualEncoderConfig (contrastive) or Med3DVLMConfig (language stages);
    `start` is the checkpoint to start from: a dual encoder to go on with, the dual encoder whose
    volume encoder alignment takes, or the aligned model that instruction tuning goes on with.
    `train` names the parts that learn: vision_encoder, projector, language_model; of a dual
    encoder vision_encoder, vision_projection, text_encoder, text_projection, loss. `anew` names
    those of them that forget what they had learned (contrastive stage).
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
    data: DataRecipe = field(default_factory=DataRecipe)
    training: TrainingRecipe = field(default_factory=TrainingRecipe)


def load_recipe(path: Path | str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply overrides such as `training.batch_size=8`.

    Raises:
        RecipeError: for a missing file, an unknown key, a value of the wrong kind.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"{path} does not exist: give the path of a recipe (YAML).")
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(Recipe),
            OmegaConf.load(path),
            OmegaConf.from_dotlist(overrides or []),
        )
        recipe: Recipe = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        key = getattr(error, "full_key", None)
        reason = (f"{key}: " if key else "") + str(error).split("\n", 1)[0].rstrip(".")
        raise RecipeError(f"{path} cannot be followed: {reason}.") from error
    if recipe.stage not in STAGES:
        raise RecipeError(
            f"{path}: stage {recipe.stage!r} is unknown: choose one of {', '.join(STAGES)}."
        )
    return recipe
