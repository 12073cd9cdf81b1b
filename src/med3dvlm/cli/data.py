"""`phantoms`, `train`, `evaluate`: generated studies, training by recipe, figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import DeviceOption, JsonOption, ModelOption, SeedOption

train_app = typer.Typer(no_args_is_help=True, help="Train by a recipe (YAML); goes on by itself.")
evaluate_app = typer.Typer(no_args_is_help=True, help="Measure a model.")


def phantoms(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many studies.")] = 10,
    layout: Annotated[
        str, typer.Option(help="nifti, dicom, m3d (as M3D-Cap and M3D-VQA) or ct-rate.")
    ] = "nifti",
    split: Annotated[
        str, typer.Option(help="train, validation or test; they share none.")
    ] = "test",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Write generated CT-like studies with reports, questions and their truth.

    Example: `med3dvlm phantoms -n 20 -o phantoms/`
    """
    from med3dvlm.data.phantoms import LAYOUTS, SPLITS, write_studies

    for name, value, known in (("layout", layout, LAYOUTS), ("split", split, SPLITS)):
        if value not in known:
            raise typer.BadParameter(f"--{name} {value!r} is unknown: use {', '.join(known)}.")
    with common.progress_bar("writing studies") as progress:
        combinations = write_studies(
            count, output, layout=layout, seed=seed, split=split, progress=progress
        )
    if as_json:
        common.print_json(
            {"folder": str(output), "studies": count, "finding_combinations": combinations}
        )
    else:
        typer.echo(f"{output}: {count} studies, {combinations} distinct finding combinations")


RecipeArgument = Annotated[Path, typer.Argument(help="A recipe.", metavar="RECIPE.yaml")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="Settings to change.", metavar="[KEY=VALUE]...")
]


@train_app.command("contrastive")
def train_contrastive(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Stage 1: volumes and reports into one space.

    Example: `med3dvlm train contrastive recipes/demo/contrastive.yaml training.batch_size=16`
    """
    _train("contrastive", recipe, overrides)


@train_app.command("alignment")
def train_alignment(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Stage 2: the projector learns to speak to the language model.

    Example: `med3dvlm train alignment recipes/demo/alignment.yaml`
    """
    _train("alignment", recipe, overrides)


@train_app.command("instruction")
def train_instruction(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Stage 3: reports and answers.

    Example: `med3dvlm train instruction recipes/demo/instruction.yaml`
    """
    _train("instruction", recipe, overrides)


def _train(stage: str, path: Path, overrides: list[str] | None) -> None:
    from med3dvlm.train import RecipeError, load_recipe, train

    recipe = load_recipe(path, overrides)
    if recipe.stage != stage:
        raise RecipeError(
            f"{path} is a recipe for {recipe.stage}: use med3dvlm train {recipe.stage}."
        )
    with common.progress_bar("preparing studies") as progress:
        train(recipe, progress=progress)
    typer.echo(f"{recipe.output}: trained")


@evaluate_app.command("phantoms")
def evaluate_phantoms(
    model: ModelOption = "demo",
    count: Annotated[int, typer.Option("--count", "-n", min=10, help="Held-out studies.")] = 500,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write tables (JSON, CSV, Markdown) here.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Retrieval, questions and reports on held-out phantoms, each with chance beside it.

    Example: `med3dvlm evaluate phantoms --model demo -n 500`
    """
    from med3dvlm.evaluate.phantoms import evaluate_on_phantoms

    dual = common.load_dual_encoder(model, device)
    vlm = common.load_language_model(model, device)
    with common.progress_bar("evaluating") as progress:
        result = evaluate_on_phantoms(
            dual, vlm, count=count, seed=seed, batch_size=batch_size, progress=progress
        )
    if output is not None:
        result.save(output)
    if as_json:
        common.print_json(result.to_dict())
    else:
        typer.echo(result.to_markdown())
