"""`phantoms`: generated studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import JsonOption, SeedOption


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
