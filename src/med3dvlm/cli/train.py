"""`train`: the three stages, each by its recipe; probes and calibrations of a trained model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from med3dvlm.cli import common
from med3dvlm.cli.classify import AbsentOption, PresentOption, prompt_pairs
from med3dvlm.cli.common import JsonOption, grouped

app = typer.Typer(no_args_is_help=True, help="Train by a recipe (YAML); goes on by itself.")


@dataclass(frozen=True)
class RunOptions:
    """What is trained, and whether it is only planned."""

    recipe: Annotated[Path, typer.Argument(help="A recipe.", metavar="RECIPE.yaml")]
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change.", metavar="KEY=VALUE")
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would take; write nothing.")
    ] = False
    as_json: JsonOption = False


@app.command("contrastive")
@grouped
def train_contrastive(options: RunOptions) -> None:
    """Stage 1: volumes and reports into one space.

    Example: `med3dvlm train contrastive recipes/demo/contrastive.yaml training.batch_size=16`
    """
    _train("contrastive", options)


@app.command("alignment")
@grouped
def train_alignment(options: RunOptions) -> None:
    """Stage 2: the projector learns to speak to the language model.

    Example: `med3dvlm train alignment recipes/demo/alignment.yaml`
    """
    _train("alignment", options)


@app.command("instruction")
@grouped
def train_instruction(options: RunOptions) -> None:
    """Stage 3: reports and answers.

    Example: `med3dvlm train instruction recipes/demo/instruction.yaml`
    """
    _train("instruction", options)


@app.command("probe")
def train_probe(
    index: Annotated[str, typer.Argument(help="An index of the studies.", metavar="INDEX")],
    labels: Annotated[
        Path,
        typer.Argument(help="CSV or JSONL: id or path, and a column of 0 and 1 for each label."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    hidden: Annotated[
        int, typer.Option(min=0, help="Width of a hidden layer; 0 for a linear probe.")
    ] = 0,
    seed: common.SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Labels of one's own, from the embeddings of an index; for `classify --probe`.

    A fifth of the studies is held out, and scored with intervals.

    Example: `med3dvlm train probe scans.index labels.csv -o probe/`
    """
    from med3dvlm.search import SearchIndex
    from med3dvlm.train.probe import train_probe

    probe, results = train_probe(SearchIndex.open(index), labels, hidden=hidden, seed=seed)
    probe.save(output, results)
    common.print_results(results, as_json)


@app.command("calibration")
def train_calibration(
    store: Annotated[str, typer.Argument(help="A store with labels.", metavar="STORE")],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="The file to write; findings_calibration.json in the model's folder.",
        ),
    ],
    model: common.ModelOption = "demo",
    split: Annotated[
        str, typer.Option(help="Which split; not the one evaluated on.")
    ] = "validation",
    present: PresentOption = None,
    absent: AbsentOption = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    device: common.DeviceOption = "auto",
) -> None:
    """Fit the probabilities of `classify` to labelled studies (Platt scaling).

    Example: `med3dvlm train calibration ct.store -m m -o m/findings_calibration.json`
    """
    from med3dvlm.cli.store import data_module
    from med3dvlm.evaluate.tasks import cases_of_store, fit_calibration
    from med3dvlm.evaluate.tasks.zero_shot import PROMPTS

    prompts = prompt_pairs(present, absent) or PROMPTS
    cases = cases_of_store(data_module("store").Store(store), split)
    dual = common.load_dual_encoder(model, device)
    with common.progress_bar("embedding") as progress:
        fitted = fit_calibration(
            dual, cases, prompts=prompts, batch_size=batch_size, progress=progress
        )
    fitted.save(output)
    typer.echo(f"{output}: {len(fitted.findings)} findings, fitted on {len(cases)} studies")


def _train(stage: str, options: RunOptions) -> None:
    from med3dvlm.train import RecipeError, load_recipe, train

    if options.as_json and not options.dry_run:
        raise typer.BadParameter("--json prints what --dry-run finds: add --dry-run.")
    recipe = load_recipe(options.recipe, options.overrides)
    if recipe.stage != stage:
        raise RecipeError(
            f"{options.recipe} is a recipe for {recipe.stage}: use med3dvlm train {recipe.stage}."
        )
    main = os.environ.get("RANK", "0") == "0"  # as torchrun and accelerate number processes
    with common.progress_bar("preparing studies") as progress:
        if options.dry_run:
            from med3dvlm.train.plan import plan

            planned = plan(recipe, progress=progress)
        else:
            train(recipe, progress=progress if main else None)
    if not main:
        return
    if not options.dry_run:
        typer.echo(f"{recipe.output}: trained")
    elif options.as_json:
        common.print_json(planned.to_dict())
    else:
        typer.echo(planned.to_text())
