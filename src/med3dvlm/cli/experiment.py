"""`experiment`: arms trained at an equal budget, and measured on the same held-out phantoms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import JsonOption


def experiment(
    recipe: Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml", help="What to compare.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the runs and the results.")
    ],
    only: Annotated[
        list[str] | None, typer.Option(help="Only this question; may be given more than once.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Only so many of the seeds, the first.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is to be trained; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train and measure the arms of an experiment; what is finished is kept, so repeat to go on.

    Example: `med3dvlm experiment recipes/comparison/phantoms.yaml -o runs/comparison --seeds 1`
    """
    from med3dvlm.evaluate.tables import Table
    from med3dvlm.experiment import follow, load_experiment, outcome
    from med3dvlm.experiment.outcome import plan_rows

    planned = load_experiment(recipe, output, only=only, seeds=seeds)
    if dry_run:
        rows = plan_rows(planned)
        if as_json:
            common.print_json(rows)
        else:
            typer.echo(Table(planned.experiment.title, rows).to_markdown())
        return
    with common.progress_bar("preparing studies") as progress:
        follow(planned, say=lambda line: common.errors.print(line, markup=False), progress=progress)
    found = outcome(planned)
    found.save(output)
    if as_json:
        common.print_json(found.to_dict())
    else:
        typer.echo(found.results().to_markdown())
