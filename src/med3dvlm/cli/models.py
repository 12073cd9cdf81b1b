"""`model`: look at checkpoints and convert them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import JsonOption

app = typer.Typer(no_args_is_help=True, help="Look at checkpoints and convert them.")

ModelArgument = Annotated[str, typer.Argument(help="'demo', a checkpoint folder, or a hub name.")]
ForceOption = Annotated[bool, typer.Option(help="Replace the folder if it is there.")]


@app.command()
def info(
    model: ModelArgument,
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
    force: ForceOption = False,
) -> None:
    """Convert a published checkpoint to the project's own layout, or back, bit for bit.

    Example: `med3dvlm model convert MagicXin/DCFormer_SigLIP dcformer-siglip`
    """
    if to not in ("own", "published"):
        raise typer.BadParameter(f"--to {to!r} is unknown: use own or published.")
    _check_free(folder, force)
    from med3dvlm.hub import load_exact
    from med3dvlm.models.published import save_published

    with common.errors.status(f"converting {source}"):
        model = load_exact(source)
        if to == "published":
            save_published(model, folder)
        else:
            _save(model, folder)
    typer.echo(f"{folder}: {type(model).__name__} in {to} layout")


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="The adapter folder of a run with LoRA.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the merged model goes.")],
    base: Annotated[
        str | None, typer.Option(help="What the run began with, where that was moved.")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Merge an adapter (`keep_adapter: true` in a recipe) into the model it was trained on.

    Example: `med3dvlm model merge runs/instruction/adapter -o merged`
    """
    _check_free(output, force)
    from med3dvlm.train.lora import merge_adapter

    with common.errors.status(f"merging {adapter}"):
        model = merge_adapter(adapter, base)
        _save(model, output)
    typer.echo(f"{output}: merged")


@app.command()
def quantize(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the smaller model goes.")],
    bits: Annotated[int, typer.Option(help="Of each weight; 8 is what there is.")] = 8,
    force: ForceOption = False,
) -> None:
    """Hold the language model's weights in 8 bits: half the memory of 16.

    Example: `med3dvlm model quantize med3dvlm-7b -o med3dvlm-7b-8bit`
    """
    from med3dvlm.models.quantized import BITS

    if bits not in BITS:
        raise typer.BadParameter(f"--bits {bits} is unknown: use {' or '.join(map(str, BITS))}.")
    _check_free(output, force)

    with common.errors.status(f"quantizing {model}"):
        vlm = common.load_exact_language_model(model)
        vlm.quantize()
        _save(vlm, output)
    typer.echo(f"{output}: {bits} bits")


FORMATS = {
    "onnx": "the encoder, or a dual encoder whole, as graphs that take any number of volumes",
    "engine": "the plain language model, and what embeds prompts for it (vLLM, SGLang)",
}


@app.command()
def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")],
    format: Annotated[
        str, typer.Option(help="; ".join(f"{name}: {what}" for name, what in FORMATS.items()))
    ] = "onnx",
    part: Annotated[
        str | None, typer.Option(help="language or search, where a folder holds both.")
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a model in the form that another program runs.

    ONNX graphs are compared with the model before the folder is written.

    Example: `med3dvlm model export demo --part search -o demo-onnx`
    """
    if format not in FORMATS:
        raise typer.BadParameter(f"--format {format!r} is unknown: use {', '.join(FORMATS)}.")
    _check_free(output, force)
    if format == "engine":
        from med3dvlm.engines import export_for_engines

        with common.errors.status(f"exporting {model}"):
            export_for_engines(common.load_exact_language_model(model), output)
        errors = {}
    else:
        from med3dvlm.files import atomic_folder
        from med3dvlm.hub import load_exact
        from med3dvlm.models.export import export_onnx

        with common.errors.status(f"exporting {model}"), atomic_folder(output) as temporary:
            errors = export_onnx(load_exact(model, part=part).float(), temporary)
    if as_json:
        common.print_json({"folder": str(output), "format": format, "errors": errors})
        return
    typer.echo(f"{output}: {FORMATS[format]}")
    for name, error in errors.items():
        typer.echo(f"{output / name}.onnx: equal to the model within {error:.1e}")


def _check_free(folder: Path, force: bool) -> None:
    if folder.exists() and not force:
        raise typer.BadParameter(f"{folder} exists: choose another, or add --force.")


def _save(model: Any, folder: Path) -> None:
    from med3dvlm.files import atomic_folder

    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        model.processor.save_pretrained(temporary)
