"""`prepare` and `data`: an archive to a store of prepared volumes, and what is in one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import JsonOption

data_app = typer.Typer(no_args_is_help=True, help="Look at a store of prepared studies.")

LAYOUT_NAMES = ("m3d-cap", "m3d-vqa", "ct-rate", "folder")
SHOWN_REASONS = 20
StoreArgument = Annotated[str, typer.Argument(help="A store, or its URL.", metavar="STORE")]


def prepare(
    layout: Annotated[str, typer.Argument(help=", ".join(LAYOUT_NAMES), metavar="LAYOUT")],
    source: Annotated[
        Path, typer.Argument(help="The archive; for folder also a CSV/JSONL manifest.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The store to make.")],
    preparation: Annotated[
        str | None,
        typer.Option(
            help="m3d, ct-rate, demo, a JSON file, or a model's folder; by default the one "
            "published with the layout."
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="uint8 (256 steps over the range), or float16.")
    ] = "uint8",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = os.cpu_count() or 1,
    engine: Annotated[
        str, typer.Option(help="local, or ray: the workers of a Ray cluster on shared storage.")
    ] = "local",
    shard: Annotated[
        int | None, typer.Option(min=1, help="Studies a file; 64 MiB of them by default.")
    ] = None,
    allow_refused: Annotated[
        bool, typer.Option(help="Exit 0 although some studies were refused.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Prepare an archive into a store of volumes and texts; a stopped run goes on by itself.

    Studies that cannot be read are refused, each with its reason, in STORE/refused.csv.

    Example: `med3dvlm prepare m3d-cap M3D_Cap/ -o m3d.store`
    """
    if layout not in LAYOUT_NAMES:
        raise typer.BadParameter(f"layout {layout!r} is unknown: use {', '.join(LAYOUT_NAMES)}.")
    settings = None if preparation is None else _preparation(preparation)
    if layout == "folder" and settings is None:
        raise typer.BadParameter(
            "a folder has no published preparation: say --preparation m3d, ct-rate, demo, a JSON "
            "file, or the folder of the model that will read the store."
        )
    jobs = data_module("prepare")
    with common.progress_bar("preparing") as progress:
        result = jobs.prepare_archive(
            layout,
            source,
            output,
            preparation=settings,
            dtype=dtype,
            shard=shard,
            workers=workers,
            engine=engine,
            progress=progress,
        )
    if as_json:
        refused = [{"id": i, "path": p, "reason": r} for i, p, r in result.refused]
        common.print_json(
            {
                "store": str(output),
                "kept": result.kept,
                "noted": result.noted,
                "held_back": result.held_back,
                "refused": refused,
            }
        )
    else:
        _print_result(output, result)
    if result.refused and not allow_refused:
        raise typer.Exit(1)


def _print_result(output: Path, result: Any) -> None:
    typer.echo(
        f"{output}: {result.kept} studies kept, {result.noted} of them with remarks, "
        f"{len(result.refused)} refused, {result.held_back} held back from evaluation"
    )
    for reason, count in list(result.reasons().items())[:SHOWN_REASONS]:
        typer.echo(f"  {count:6d}  {reason}")
    if result.refused:
        typer.echo(f"every path with its reason: {output / 'refused.csv'}")


def _preparation(name: str) -> Any:
    from med3dvlm.scan import PRESETS, Preparation

    if name in PRESETS:
        return PRESETS[name]
    if Path(name).is_file():
        return Preparation.load(name)
    if Path(name).is_dir():
        return common.load_dual_encoder(name, "cpu").preparation
    raise ValueError(
        f"preparation {name!r} is neither {', '.join(PRESETS)}, nor a file, nor a model's folder."
    )


def data_module(name: str) -> Any:
    """A module of `data` that needs the libraries of the extra `data`."""
    from importlib import import_module

    try:
        return import_module(f"med3dvlm.data.{name}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"stores need {error.name}, which is not installed: pip install 'med3dvlm[data]'."
        ) from error


@data_app.command("show")
def show(
    store: StoreArgument,
    study: Annotated[
        list[str] | None, typer.Option(help="Studies by id; the first twenty by default.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The picture to write (PNG).")
    ] = Path("store.png"),
    as_json: JsonOption = False,
) -> None:
    """Draw studies as a contact sheet, and print the texts and questions of those that are named.

    Example: `med3dvlm data show m3d.store --study ct_case/000006/Axial_C__portal_venous_phase`
    """
    opened = data_module("store").Store(store)
    indices = [opened.index_of(name) for name in study] if study else range(min(20, len(opened)))
    if not len(indices):
        raise ValueError(f"{store} holds no study to show.")
    data_module("show").contact_sheet(opened, list(indices), output)
    told = [opened.study(index) for index in indices] if study else []
    if as_json:
        common.print_json({"picture": str(output), "studies": told})
        return
    for row in told:
        _print_study(row)
    typer.echo(f"{output}: {len(indices)} of {len(opened)} studies")


def _print_study(row: dict[str, Any]) -> None:
    typer.echo(f"{row['id']}  ({', '.join(row['splits']) or 'no split'})")
    typer.echo(f"  {row['source']}, {row['original_shape']} voxels of {row['spacing_mm']} mm")
    typer.echo(f"  {row['report'] or '(no report)'}")
    for question in row["questions"]:
        choices = "".join(f" {'ABCD'[i]}. {c}" for i, c in enumerate(question["choices"] or []))
        typer.echo(f"  - {question['text']}{choices} → {question['answer']}")
    for note in row["notes"]:
        typer.echo(f"  note: {note}")


@data_app.command("leaks")
def leaks(store: StoreArgument, as_json: JsonOption = False) -> None:
    """List studies that are the same on two sides of the splits: by case, content or likeness.

    Those of the test side (else of validation) are held back from evaluation.

    Example: `med3dvlm data leaks m3d.store`
    """
    opened = data_module("store").Store(store)
    if as_json:
        common.print_json([vars(crossing) for crossing in opened.crossings])
        return
    for one in opened.crossings:
        typer.echo(
            f"{one.kind:9s} {one.similarity:.2f}  {one.first} ({one.first_split})  "
            f"{one.second} ({one.second_split})"
        )
    typer.echo(f"{len(opened.crossings)} crossings, {len(opened.held_back)} studies held back")


@data_app.command("stats")
def stats(
    store: StoreArgument,
    plot: Annotated[Path | None, typer.Option(help="Also plot them (PNG).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Print counts, sizes, spacing, lengths of texts, labels and overlaps of splits.

    Example: `med3dvlm data stats m3d.store --plot stats.png`
    """
    opened = data_module("store").Store(store)
    shown = data_module("show")
    figures = shown.statistics(opened)
    if plot is not None:
        shown.plot_statistics(opened, plot)
    if as_json:
        common.print_json(figures)
        return
    for name, value in figures.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {count}" for key, count in value.items()) or "none"
        typer.echo(f"{name}: {value}")
