"""Training in three stages, each told by a recipe: contrastive, alignment, instruction."""

from __future__ import annotations

from typing import Any

from med3dvlm.data.sources import Progress
from med3dvlm.train.recipe import Recipe, RecipeError, check_needs, load_recipe


def train(recipe: Recipe, *, progress: Progress | None = None) -> Any:
    """Follow a recipe, whichever stage it is of; returns the trained model.

    Raises:
        RecipeError: for a recipe that cannot be followed.
        TrainingError: for a run that cannot go on.
    """
    check_needs(recipe)
    if recipe.stage == "contrastive":
        from med3dvlm.train.contrastive import train_contrastive

        return train_contrastive(recipe, progress=progress)
    from med3dvlm.train.language import train_language

    return train_language(recipe, progress=progress)


__all__ = ["Recipe", "RecipeError", "load_recipe", "train"]
