"""`index` and `search`: find studies in an archive."""

from __future__ import annotations

import os
import tempfile
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import DeviceOption, JsonOption, ModelOption, PrecisionOption, grouped
from med3dvlm.notice import provenance

if TYPE_CHECKING:
    from med3dvlm.search import BuildResult, Hit, How

index_app = typer.Typer(no_args_is_help=True, help="Embed an archive of scans for search.")

INDEX_HELP = "An index: a folder, or postgresql://user@host/database#name."
IndexArgument = Annotated[str, typer.Argument(help=INDEX_HELP, metavar="INDEX")]
SourceArgument = Annotated[
    str, typer.Argument(help="A folder of scans, a CSV/JSONL manifest, or a prepared store.")
]
WhereOption = Annotated[
    list[str] | None,
    typer.Option(help="column=value (or !=, <, <=, >, >=, ~ for contains); repeatable."),
]


@dataclass(frozen=True)
class EmbedOptions:
    """By which model, and by how many hands, scans are embedded."""

    model: ModelOption = "demo"
    batch_size: Annotated[int, typer.Option(min=1, help="Volumes that are encoded together.")] = 8
    workers: Annotated[
        int, typer.Option(min=1, help="Threads that read; with --engine ray, processes.")
    ] = os.cpu_count() or 1
    engine: Annotated[
        str, typer.Option(help="local, or ray: the workers of a Ray cluster on shared storage.")
    ] = "local"
    allow_unreadable: Annotated[
        bool, typer.Option(help="Exit 0 although some scans could not be read.")
    ] = False
    device: DeviceOption = "auto"
    as_json: JsonOption = False

    def how(self, progress: Any) -> How:
        from med3dvlm.search import How

        return How(
            batch_size=self.batch_size, workers=self.workers, engine=self.engine, progress=progress
        )

    def finish(self, location: str, result: BuildResult, dual: Any) -> None:
        _print_result(location, result, dual, as_json=self.as_json)
        if result.refused and not self.allow_unreadable:
            raise typer.Exit(1)


@dataclass(frozen=True)
class BuildOptions(EmbedOptions):
    """Of scans that are read from a source."""

    allow_outside: Annotated[
        bool, typer.Option(help="Follow paths and links that lead out of the source's folder.")
    ] = False
    precision: PrecisionOption = None


@index_app.command("build")
@grouped
def build(
    source: SourceArgument,
    output: Annotated[str, typer.Option("--output", "-o", help=INDEX_HELP, metavar="INDEX")],
    options: BuildOptions,
) -> None:
    """Embed every scan under a folder; what is unchanged since the last build is kept.

    Example: `med3dvlm index build scans/ -o scans.index`
    """
    _build(source, output, options)


@index_app.command("add")
@grouped
def add(
    index: IndexArgument,
    source: SourceArgument,
    options: BuildOptions,
) -> None:
    """Embed more scans into an index that there is already; searches go on meanwhile.

    Example: `med3dvlm index add scans.index today/`
    """
    from med3dvlm.search import SearchIndex

    SearchIndex.open(index)  # refused before the model is loaded
    _build(source, index, options)


def _build(source: str, location: str, options: BuildOptions) -> None:
    from med3dvlm.search import build_index

    with common.progress_bar("embedding") as progress:
        how = options.how(progress)
        dual = common.load_dual_encoder(options.model, options.device, options.precision)
        result = build_index(source, dual, location, allow_outside=options.allow_outside, how=how)
    options.finish(location, result, dual)


def _print_result(location: str, result: BuildResult, dual: Any, *, as_json: bool) -> None:
    if as_json:
        common.print_json(
            {
                "index": location,
                "studies": result.total,
                "added": result.added,
                "unchanged": result.unchanged,
                "refused": [{"path": p, "reason": r} for p, r in result.refused],
                "damage": result.damage,
                **provenance(dual),
            }
        )
        return
    typer.echo(
        f"{location}: {result.total} studies, {result.added} added, "
        f"{result.unchanged} unchanged, {len(result.refused)} refused"
    )
    for sentence in result.damage:
        common.note(f"damage: {sentence}")
    for path, reason in result.refused:
        common.note(f"refused {path}: {reason.removeprefix(f'{path}: ')}")


@index_app.command("remove")
def remove(
    index: IndexArgument,
    studies: Annotated[
        list[str] | None, typer.Argument(help="Paths or ids.", metavar="STUDY")
    ] = None,
    where: WhereOption = None,
    missing: Annotated[
        bool, typer.Option("--missing", help="Those whose scan is not there any more.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Take studies out of an index; their scans stay where they are.

    Example: `med3dvlm index remove scans.index --where site=A --missing`
    """
    if not studies and not where and not missing:
        raise typer.BadParameter("say which: paths or ids, --where, or --missing.")
    from med3dvlm.search import SearchIndex, SearchIndexError
    from med3dvlm.search.items import is_there

    opened = SearchIndex.open(index)
    found = opened.select(where or ())
    if studies:
        given = {*studies, *(os.path.abspath(name) for name in studies)}
        found = [study for study in found if study.id in given or study.path in given]
        known = {name for study in found for name in (study.id, study.path)}
        unknown = [n for n in studies if n not in known and os.path.abspath(n) not in known]
        if unknown:
            raise SearchIndexError(f"{index} holds no study {unknown[0]!r}.")
    if missing:
        found = [study for study in found if not is_there(study.path)]
    removed = opened.remove(study.path for study in found)
    if as_json:
        paths = [study.path for study in found]
        common.print_json({"index": index, "removed": paths, "studies": len(opened)})
    else:
        typer.echo(f"{index}: {removed} removed, {len(opened)} studies left")


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


@index_app.command("verify")
def verify(index: IndexArgument, as_json: JsonOption = False) -> None:
    """Read the whole index and say what is damaged; exit status 1 if anything is.

    Example: `med3dvlm index verify scans.index`
    """
    from med3dvlm.search import SearchIndex

    opened = SearchIndex.open(index)
    problems = opened.verify()
    if as_json:
        common.print_json({"index": index, "studies": len(opened), "problems": problems})
    else:
        for problem in problems:
            typer.echo(problem)
        verdict = f"{len(problems)} problems: mend it with med3dvlm index rebuild {index}"
        typer.echo(f"{index}: {len(opened)} studies, {verdict if problems else 'whole'}")
    if problems:
        raise typer.Exit(1)


@index_app.command("rebuild")
@grouped
def rebuild(
    index: IndexArgument,
    options: EmbedOptions,
) -> None:
    """Make an index anew beside the old one, then switch: after damage, or for another model.

    Example: `med3dvlm index rebuild scans.index --model runs/search`
    """
    from med3dvlm.search import rebuild_index
    from med3dvlm.search.database import place_of
    from med3dvlm.search.index import read_head

    read_head(place_of(index))
    with common.progress_bar("embedding") as progress:
        dual = common.load_dual_encoder(options.model, options.device)
        result = rebuild_index(index, dual, how=options.how(progress))
    options.finish(index, result, dual)


@index_app.command("map")
def map_of(
    index: IndexArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")],
    colour: Annotated[
        str | None, typer.Option(help="The column it opens with; others can be chosen there.")
    ] = None,
    limit: Annotated[
        int, typer.Option(min=10, help="Of more studies, so many are drawn at random.")
    ] = 20_000,
    seed: common.SeedOption = 0,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Draw the studies of an index so that those that are alike lie together (UMAP).

    Example: `med3dvlm index map scans.index -o map.html --colour modality`
    """
    from med3dvlm.search import SearchIndex
    from med3dvlm.search.map import write_map

    opened = SearchIndex.open(index)
    with common.errors.status("projecting"):
        shown = write_map(opened, output, colour=colour, limit=limit, seed=seed)
    typer.echo(f"{output}: {shown} of {len(opened)} studies")
    if open_it:
        _open(output)


def search(
    index: IndexArgument,
    text: Annotated[str | None, typer.Argument(help="What to look for, in quotes.")] = None,
    scan: Annotated[str | None, typer.Option(help="Look for studies like this scan.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many studies a page.")] = 10,
    page: Annotated[int, typer.Option(min=1, help="Which page of them.")] = 1,
    where: WhereOption = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Compare embeddings only; words deny nothing.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="Write a PNG of the hits: middle slices and reports.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the same as a page.")] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open that page in the browser.")] = False,
    evidence: Annotated[
        Path | None, typer.Option(help="Write a NIfTI map for each hit into this folder.")
    ] = None,
    model: ModelOption = "demo",
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the studies of an index that fit a text, or are like a scan, or both.

    Example: `med3dvlm search scans.index "left pleural effusion without pneumothorax" --top 5`
    """
    if text is None and scan is None:
        raise typer.BadParameter("say what to look for: a text, --scan, or both.")
    if text is not None and not text.strip():
        raise typer.BadParameter("the text is empty: write what to look for.")
    from med3dvlm.search import SearchIndex

    SearchIndex.open(index).conditions(where or ())  # refused before the model is loaded
    read = None if scan is None else common.read_with_warnings(scan)
    dual = common.load_dual_encoder(model, device, precision)
    opened = SearchIndex.open(index, model=dual)
    vector = None if read is None else dual.embed_scans(read)[0]
    hits = opened.search(text, vector=vector, top=top, page=page, where=where or (), plain=plain)
    understood = None if text is None or plain else _understood(text)
    _show(hits, [*filter(None, (text, scan)), *(where or ())], dual, picture, html, open_it)
    if evidence is not None:
        _explain_hits(dual, hits, text if vector is None else vector, evidence)
    if as_json:
        common.print_json(
            {
                "index": index,
                "query": {"text": text, "scan": scan, "where": where or [], "page": page},
                "understood": understood,
                "hits": [_hit(hit) for hit in hits],
                **provenance(dual),
                "notice": common.notice(dual),
            }
        )
        return
    if understood and understood["without"]:
        common.note(
            f"wanted: {understood['wanted'] or '–'}; without: {', '.join(understood['without'])}"
        )
    for hit in hits:
        typer.echo(f"{hit.rank:3d}  {hit.score:.3f}  {hit.path}")
        if hit.report:
            typer.echo(f"            {_first_line(hit.report)}")
    if not hits:
        common.note("no study fits.")
    common.print_notice(dual)


def _show(
    hits: list[Hit],
    query: list[str],
    dual: Any,
    picture: Path | None,
    page: Path | None,
    open_it: bool,
) -> None:
    if open_it and page is None:
        handle, name = tempfile.mkstemp(prefix="med3dvlm-", suffix=".html")
        os.close(handle)
        page = Path(name)
    if picture is None and page is None:
        return
    from med3dvlm.search.sheet import draw_sheet, write_page

    facts = provenance(dual)
    made = f"Model {facts['model']}, weights {facts['weights']}, preparation {facts['preparation']}"
    footer = f"{made}. {common.notice(dual)}"
    for path, draw in ((picture, draw_sheet), (page, write_page)):
        if path is not None:
            draw(hits, path, title=" · ".join(query), footer=footer)
            common.note(f"written: {path}")
    if open_it and page is not None:
        _open(page)


def _open(page: Path) -> None:
    if not webbrowser.open(page.absolute().as_uri()):
        common.note(f"no browser could be started: open {page} yourself.")


def _understood(text: str) -> dict[str, Any]:
    from med3dvlm.search.query import read_words

    words = read_words(text)
    return {
        "wanted": words.wanted,
        "without": list(words.unwanted),
        "left out if a report asserts": list(words.excluded),
    }


def _explain_hits(dual: Any, hits: Any, query: Any, folder: Path) -> None:
    """A map for each hit, by its rank: what of its scan is like the query."""
    from med3dvlm.evidence import as_scan, explain, query_target
    from med3dvlm.evidence.maps import FILES
    from med3dvlm.files import atomic_folder
    from med3dvlm.scan import save_nifti

    target = query_target(dual, query)
    with atomic_folder(folder, ours=FILES) as temporary:
        for hit in hits:
            scan = common.read_with_warnings(hit.path)
            values = explain(dual, scan, target)
            save_nifti(as_scan(scan, values), temporary / f"{hit.rank:02d}.nii.gz")
    common.note(f"evidence: {folder}")


def _hit(hit: Any) -> dict[str, Any]:
    return {
        "rank": hit.rank,
        "score": hit.score,
        "similarity": hit.similarity,
        "id": hit.id,
        "path": hit.path,
        "report": hit.report,
        "metadata": hit.metadata,
    }


def _first_line(text: str, *, width: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
