"""`train`: the three stages, each by its recipe."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import JsonOption

app = typer.Typer(no_args_is_help=True, help="Train by a recipe (YAML); goes on by itself.")

RecipeArgument = Annotated[Path, typer.Argument(help="A recipe.", metavar="RECIPE.yaml")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="Settings to change.", metavar="[KEY=VALUE]...")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what the run would take; write nothing.")
]


@app.command("contrastive")
def train_contrastive(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stage 1: volumes and reports into one space.

    Example: `med3dvlm train contrastive recipes/demo/contrastive.yaml training.batch_size=16`
    """
    _train("contrastive", recipe, overrides, dry_run=dry_run, as_json=as_json)


@app.command("alignment")
def train_alignment(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stage 2: the projector learns to speak to the language model.

    Example: `med3dvlm train alignment recipes/demo/alignment.yaml`
    """
    _train("alignment", recipe, overrides, dry_run=dry_run, as_json=as_json)


@app.command("instruction")
def train_instruction(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stage 3: reports and answers.

    Example: `med3dvlm train instruction recipes/demo/instruction.yaml`
    """
    _train("instruction", recipe, overrides, dry_run=dry_run, as_json=as_json)


def _train(
    stage: str, path: Path, overrides: list[str] | None, *, dry_run: bool, as_json: bool
) -> None:
    from med3dvlm.train import RecipeError, load_recipe, train

    if as_json and not dry_run:
        raise typer.BadParameter("--json prints what --dry-run finds: add --dry-run.")
    recipe = load_recipe(path, overrides)
    if recipe.stage != stage:
        raise RecipeError(
            f"{path} is a recipe for {recipe.stage}: use med3dvlm train {recipe.stage}."
        )
    main = os.environ.get("RANK", "0") == "0"  # as torchrun and accelerate number processes
    with common.progress_bar("preparing studies") as progress:
        if dry_run:
            from med3dvlm.train.plan import plan

            planned = plan(recipe, progress=progress)
        else:
            train(recipe, progress=progress if main else None)
    if not main:
        return
    if not dry_run:
        typer.echo(f"{recipe.output}: trained")
    elif as_json:
        common.print_json(planned.to_dict())
    else:
        typer.echo(planned.to_text())
