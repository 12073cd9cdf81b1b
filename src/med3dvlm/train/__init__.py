"""Training in three stages, each told by a recipe: contrastive, alignment, instruction."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

from med3dvlm.data.sources import Progress
from med3dvlm.train.recipe import Recipe, RecipeError, check_needs, load_recipe

if TYPE_CHECKING:
    from med3dvlm.train.engine import Job

# Transformers imports it where it is installed. It then seeks a faster kernel on a hub, and warns
# that there is none: 4 bits do without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# PEFT asks a model by the older of two names whether it is checkpointed.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def train(recipe: Recipe, *, progress: Progress | None = None) -> Any:
    """Follow a recipe, whichever stage it is of; returns the trained model.

    Of a run with `training.shard`, the main process alone gets it, and the others None.

    Raises:
        RecipeError: for a recipe that cannot be followed.
        TrainingError: for a run that cannot go on.
    """
    return finish(begin(recipe, progress=progress), recipe)


def begin(recipe: Recipe, *, progress: Progress | None = None) -> Job:
    """The model and the studies of a recipe, ready to train.

    Raises:
        RecipeError: for a recipe that cannot be followed, or other than its run was begun with.
    """
    from med3dvlm.train.record import check_unchanged

    check_needs(recipe)
    check_unchanged(recipe)
    if recipe.stage == "contrastive":
        from med3dvlm.train.contrastive import contrastive_job

        return contrastive_job(recipe, progress=progress)
    from med3dvlm.train.language import language_job

    return language_job(recipe, progress=progress)


def finish(job: Job, recipe: Recipe) -> Any:
    """Train what was begun, as `train` does; the model is also saved in `recipe.output`."""
    if recipe.stage == "contrastive":
        from med3dvlm.train.contrastive import train_contrastive

        return train_contrastive(job, recipe)
    from med3dvlm.train.language import train_language

    return train_language(job, recipe)


__all__ = ["Recipe", "RecipeError", "begin", "finish", "load_recipe", "train"]
