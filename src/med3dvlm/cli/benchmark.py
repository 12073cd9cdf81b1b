"""`benchmark`: speed, each against the plain way in the same run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import JsonOption

app = typer.Typer(no_args_is_help=True, help="Measure speed, each against the plain way.")


@app.callback()
def _benchmark() -> None:
    """Keeps `data` a command of its own while it is the only one."""


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
    from med3dvlm.data.benchmark import benchmark_store
    from med3dvlm.evaluate.tables import Table

    with tempfile.TemporaryDirectory() as folder, common.errors.status("measuring"):
        rows = benchmark_store(Path(folder), small_studies=small_studies)
    if as_json:
        common.print_json(rows)
    else:
        typer.echo(Table("Store", rows, shares=False).to_markdown())
