"""`index` and `search`: find studies in an archive."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import DeviceOption, JsonOption, ModelOption

index_app = typer.Typer(no_args_is_help=True, help="Embed an archive of scans for search.")

IndexArgument = Annotated[Path, typer.Argument(help="An index folder.", metavar="INDEX")]


@index_app.command("build")
def build(
    source: Annotated[Path, typer.Argument(help="A folder of scans, or a CSV/JSONL manifest.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The index folder to write.")],
    model: ModelOption = "demo",
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    allow_unreadable: Annotated[
        bool, typer.Option(help="Exit 0 although some scans could not be read.")
    ] = False,
    allow_outside: Annotated[
        bool, typer.Option(help="Follow paths and links that lead out of the source's folder.")
    ] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Embed every scan under a folder; what is unchanged since the last build is kept.

    Example: `med3dvlm index build scans/ -o scans.index`
    """
    from med3dvlm.search import build_index

    dual = common.load_dual_encoder(model, device)
    with common.progress_bar("embedding") as progress:
        result = build_index(
            source,
            dual,
            output,
            batch_size=batch_size,
            allow_outside=allow_outside,
            progress=progress,
        )
    if as_json:
        common.print_json(
            {
                "index": str(output),
                "studies": result.total,
                "added": result.added,
                "unchanged": result.unchanged,
                "refused": [{"path": p, "reason": r} for p, r in result.refused],
                **common.provenance(dual),
            }
        )
    else:
        typer.echo(
            f"{output}: {result.total} studies, {result.added} added, "
            f"{result.unchanged} unchanged, {len(result.refused)} refused"
        )
        for path, reason in result.refused:
            common.errors.print(f"refused {path}: {reason}", markup=False, highlight=False)
    if result.refused and not allow_unreadable:
        raise typer.Exit(1)


@index_app.command("info")
def info(index: IndexArgument, as_json: JsonOption = False) -> None:
    """Say what an index holds and which model made it.

    Example: `med3dvlm index info scans.index`
    """
    from med3dvlm.search import SearchIndex

    facts = SearchIndex.open(index).info()
    if as_json:
        common.print_json(facts)
    else:
        for name, value in facts.items():
            typer.echo(f"{name}: {value}")


def search(
    index: IndexArgument,
    text: Annotated[str | None, typer.Argument(help="What to look for, in quotes.")] = None,
    scan: Annotated[str | None, typer.Option(help="Look for studies like this scan.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many studies.")] = 10,
    where: Annotated[
        list[str] | None, typer.Option(help="key=value that a study must have; repeatable.")
    ] = None,
    evidence: Annotated[
        Path | None, typer.Option(help="Write a NIfTI map for each hit into this folder.")
    ] = None,
    model: ModelOption = "demo",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Find the studies of an index nearest to a text or to a scan.

    Example: `med3dvlm search scans.index "left pleural effusion" --top 5`
    """
    if (text is None) == (scan is None):
        raise typer.BadParameter("give either a text or --scan.")
    if text is not None and not text.strip():
        raise typer.BadParameter("the text is empty: write what to look for.")
    from med3dvlm.search import SearchIndex

    read = None if scan is None else common.read_with_warnings(scan)
    dual = common.load_dual_encoder(model, device)
    opened = SearchIndex.open(index, model=dual)
    query = dual.embed_texts(text) if read is None else dual.embed_scans(read)
    hits = opened.search(query[0], top=top, where=_conditions(where))
    if evidence is not None:
        _explain_hits(dual, hits, query[0], evidence)
    if as_json:
        common.print_json(
            {
                "index": str(index),
                "query": text or scan,
                "hits": [_hit(hit) for hit in hits],
                **common.provenance(dual),
                "notice": common.notice(dual),
            }
        )
        return
    for hit in hits:
        typer.echo(f"{hit.rank:3d}  {hit.score:.3f}  {hit.path}")
        if hit.report:
            typer.echo(f"            {_first_line(hit.report)}")
    common.print_notice(dual)


def _explain_hits(dual: Any, hits: Any, query: Any, folder: Path) -> None:
    """A map for each hit, by its rank: what of its scan is like the query."""
    from med3dvlm.evidence import as_scan, explain, query_target
    from med3dvlm.files import atomic_folder
    from med3dvlm.scan import save_nifti

    target = query_target(dual, query)
    with atomic_folder(folder) as temporary:
        for hit in hits:
            scan = common.read_with_warnings(hit.path)
            values = explain(dual, scan, target)
            save_nifti(as_scan(scan, values), temporary / f"{hit.rank:02d}.nii.gz")
    common.errors.print(f"evidence: {folder}", markup=False, highlight=False)


def _conditions(where: list[str] | None) -> dict[str, str]:
    conditions = {}
    for condition in where or []:
        key, equals, value = condition.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"--where {condition!r} is not of the form key=value.")
        conditions[key] = value
    return conditions


def _hit(hit: Any) -> dict[str, Any]:
    return {
        "rank": hit.rank,
        "score": hit.score,
        "id": hit.id,
        "path": hit.path,
        "report": hit.report,
        "metadata": hit.metadata,
    }


def _first_line(text: str, *, width: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
