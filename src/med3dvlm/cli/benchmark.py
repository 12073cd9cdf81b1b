"""`benchmark`: speed, each against the plain way in the same run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import JsonOption

if TYPE_CHECKING:
    from med3dvlm.evaluate.tables import Results

app = typer.Typer(no_args_is_help=True, help="Measure speed, each against the plain way.")

RunsOption = Annotated[int, typer.Option(min=1, help="Timed runs of each form, by turns.")]


@app.command("loss")
def loss(
    batch: Annotated[int, typer.Option(min=8, help="Pairs.")] = 4096,
    dim: Annotated[int, typer.Option(min=1, help="Features of each.")] = 768,
    runs: RunsOption = 5,
    as_json: JsonOption = False,
) -> None:
    """The sigmoid loss with its gradients: in blocks, against the whole matrix at once.

    Example: `med3dvlm benchmark loss --batch 8192`
    """
    from med3dvlm.benchmark.loss import benchmark_loss

    with common.errors.status("measuring"):
        results = benchmark_loss(batch=batch, dim=dim, runs=runs)
    _show(results, as_json)


@app.command("generate")
def generate(
    model: common.ModelOption = "demo", runs: RunsOption = 5, as_json: JsonOption = False
) -> None:
    """Reports, answers and choices: together and remembered, against one by one and anew.

    Example: `med3dvlm benchmark generate`
    """
    from med3dvlm.benchmark.generate import benchmark_generate

    with common.errors.status("measuring"):
        results = benchmark_generate(model=model, runs=runs)
    _show(results, as_json)


@app.command("data")
def data(
    small_studies: Annotated[
        int, typer.Option(min=100, help="Studies of the store for random access.")
    ] = 5000,
    as_json: JsonOption = False,
) -> None:
    """The store: reading against .nii.gz, preparing with two workers, random access.

    Example: `med3dvlm benchmark data`
    """
    from med3dvlm.benchmark.store import benchmark_store

    with tempfile.TemporaryDirectory() as folder, common.errors.status("measuring"):
        results = benchmark_store(Path(folder), small_studies=small_studies)
    _show(results, as_json)


def _show(results: Results, as_json: bool) -> None:
    if as_json:
        common.print_json(results.to_dict())
    else:
        typer.echo(results.to_markdown())
