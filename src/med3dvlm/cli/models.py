"""`model`: look at checkpoints and convert them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import JsonOption

app = typer.Typer(no_args_is_help=True, help="Look at checkpoints and convert them.")


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="'demo', a checkpoint folder, or a hub name.")],
    as_json: JsonOption = False,
) -> None:
    """Say what a checkpoint is: parts, parameters, preparation, settings.

    Example: `med3dvlm model info demo`
    """
    from med3dvlm.hub import PARTS, load, resolve

    folder = resolve(model)
    parts = [part for part, name in PARTS.items() if (folder / name).is_dir()]
    described = {part: _describe(load(model, part=part)) for part in parts}
    result = described or {"model": _describe(load(model))}
    if as_json:
        common.print_json({"name": model, "folder": str(folder), **result})
        return
    for part, facts in result.items():
        typer.echo(f"{part}:")
        for name, value in facts.items():
            typer.echo(f"  {name}: {value}")
    card = folder / "README.md"
    if card.is_file():
        typer.echo(f"model card: {card}")


def _describe(model: Any) -> dict[str, Any]:
    config = model.config
    keys = ("projector", "prompt_layout", "loss", "projection_dim")
    facts: dict[str, Any] = {"class": type(model).__name__}
    for name, child in model.named_children():
        count = sum(p.numel() for p in child.parameters())
        facts[name] = f"{type(child).__name__}, {count:,} parameters"
    facts |= {key: getattr(config, key) for key in keys if hasattr(config, key)}
    facts["encoder"] = config.vision_config.model_type
    for key in ("variant", "stem_activation", "stem_antialias"):
        if hasattr(config.vision_config, key):
            facts[key] = getattr(config.vision_config, key)
    facts["volume_size"] = list(config.vision_config.volume_size)
    if hasattr(model, "num_visual_tokens"):
        facts["visual_tokens"] = model.num_visual_tokens
    facts["preparation"] = model.preparation.to_dict()
    facts["weights"] = model.fingerprint()
    return facts


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint folder or a hub name.")],
    folder: Annotated[Path, typer.Argument(help="Where the converted checkpoint goes.")],
    to: Annotated[str, typer.Option(help="own or published.")] = "own",
    force: Annotated[bool, typer.Option(help="Replace the folder if it is there.")] = False,
) -> None:
    """Convert a published checkpoint to the project's own layout, or back, bit for bit.

    Example: `med3dvlm model convert MagicXin/DCFormer_SigLIP dcformer-siglip`
    """
    if to not in ("own", "published"):
        raise typer.BadParameter(f"--to {to!r} is unknown: use own or published.")
    if folder.exists() and not force:
        raise typer.BadParameter(f"{folder} exists: choose another, or add --force.")
    from med3dvlm.files import atomic_folder
    from med3dvlm.hub import load_exact
    from med3dvlm.models.published import save_published

    with common.errors.status(f"converting {source}"):
        model = load_exact(source)
        if to == "published":
            save_published(model, folder)
        else:
            with atomic_folder(folder) as temporary:
                model.save_pretrained(temporary)
                model.processor.save_pretrained(temporary)
    typer.echo(f"{folder}: {type(model).__name__} in {to} layout")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="The adapter folder of a run with LoRA.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the merged model goes.")],
    base: Annotated[
        str | None, typer.Option(help="What the run began with, where that was moved.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace the folder if it is there.")] = False,
) -> None:
    """Merge an adapter (`keep_adapter: true` in a recipe) into the model it was trained on.

    Example: `med3dvlm model merge runs/instruction/adapter -o merged`
    """
    if output.exists() and not force:
        raise typer.BadParameter(f"{output} exists: choose another, or add --force.")
    from med3dvlm.files import atomic_folder
    from med3dvlm.train.lora import merge_adapter

    with common.errors.status(f"merging {adapter}"):
        model = merge_adapter(adapter, base)
        with atomic_folder(output) as temporary:
            model.save_pretrained(temporary)
            model.processor.save_pretrained(temporary)
    typer.echo(f"{output}: merged")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="'demo', a checkpoint folder, or a hub name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    format: Annotated[str, typer.Option(help="onnx.")] = "onnx",
    part: Annotated[
        str | None, typer.Option(help="language or search, where a folder holds both.")
    ] = None,
    force: Annotated[bool, typer.Option(help="Replace the folder if it is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a dual encoder, or the encoder of a language model, as ONNX graphs.

    They take any number of volumes at once, and are compared with the model before the folder is
    written.

    Example: `med3dvlm model export demo --part search -o demo-onnx`
    """
    if format != "onnx":
        raise typer.BadParameter(f"{format!r} is not known: use onnx.", param_hint="--format")
    if output.exists() and not force:
        raise typer.BadParameter(f"{output} exists: choose another, or add --force.")
    from med3dvlm.files import atomic_folder
    from med3dvlm.hub import load_exact
    from med3dvlm.models.export import export_onnx

    with common.errors.status(f"exporting {model}"), atomic_folder(output) as temporary:
        errors = export_onnx(load_exact(model, part=part).float(), temporary)
    if as_json:
        common.print_json({"folder": str(output), "errors": errors})
        return
    for name, error in errors.items():
        typer.echo(f"{output / name}.onnx: equal to the model within {error:.1e}")
