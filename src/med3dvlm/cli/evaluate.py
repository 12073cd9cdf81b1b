"""`evaluate`: figures of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import DeviceOption, JsonOption, ModelOption, SeedOption

app = typer.Typer(no_args_is_help=True, help="Measure a model.")


@app.command("phantoms")
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
