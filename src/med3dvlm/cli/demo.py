"""`demo`: the tour, on a real CT that comes with the package and on phantoms of known truth."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from med3dvlm.cli import common
from med3dvlm.notice import DEMO_NOTICE, NOTICE

REAL_CT = "assets/scans/ct_abdomen_pelvis.nii.gz"
PHANTOMS = 12


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where pictures and the small index go.")
    ] = Path("med3dvlm-demo"),
    scan: Annotated[str | None, typer.Option(help="Another scan than the bundled CT.")] = None,
    device: common.DeviceOption = "auto",
) -> None:
    """The tour: report, questions and search on a bundled CT, with the bundled model.

    Example: `med3dvlm demo`
    """
    from med3dvlm.data.phantoms import make_study

    out = Console()
    path = scan or str(files("med3dvlm") / REAL_CT)
    read = common.read_with_warnings(path)
    vlm = common.load_language_model("demo", device)
    dual = common.load_dual_encoder("demo", device)

    out.rule("1. A real CT")
    out.print(f"{Path(path).name}: {_size(read)}. Model: demo, {_parameters(vlm)}.")
    out.print(f"[yellow]{escape(DEMO_NOTICE)}[/yellow]")
    _report(out, vlm, read, output / "real-ct.png", "Draft report")
    _questions(out, vlm, read)

    out.rule("2. A phantom, whose truth is known")
    study = make_study(3, split="test")
    phantom = study.scan()
    out.print(Panel(escape(study.report), title="Its true report", border_style="green"))
    _report(out, vlm, phantom, output / "phantom.png", "The model's draft")

    out.rule("3. Search")
    _search(out, dual, output, read, study.caption)

    out.rule("Next")
    out.print("med3dvlm report YOUR_DICOM_FOLDER --picture out.png", markup=False)
    out.print(
        'med3dvlm ask YOUR_DICOM_FOLDER "Is there a pleural effusion?" -c yes -c no', markup=False
    )
    out.print("med3dvlm model info demo      (figures and limits: its model card)", markup=False)
    out.print(NOTICE, style="dim", markup=False)


def _size(scan: Any) -> str:
    shape = " × ".join(map(str, scan.array.shape))
    spacing = " × ".join(f"{s:.2f}" for s in scan.spacing_mm)
    return f"{shape} voxels of {spacing} mm"


def _parameters(model: Any) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters"


def _report(out: Console, vlm: Any, scan: Any, picture: Path, title: str) -> None:
    from med3dvlm.cli.read import draw

    text = vlm.report(scan)
    out.print(Panel(escape(text), title=title))
    draw(scan, text, picture, vlm)


def _questions(out: Console, vlm: Any, scan: Any) -> None:
    """Three questions, the scan encoded once."""
    seen = vlm.see(scan)
    for question in ("Which organ is abnormal?", "Is there a pleural effusion?"):
        answer = vlm.ask(seen, question)
        out.print(f"[bold]{question}[/bold] {escape(answer)}  ({answer.confidence:.0%})")
    question = "In which contrast phase was this scan acquired?"
    choices = ["non-contrast", "arterial", "portal venous", "delayed"]
    answer = vlm.ask(seen, question, choices)
    shares = ", ".join(f"{c} {p:.0%}" for c, p in answer.choices)
    out.print(f"[bold]{question}[/bold] {escape(answer)}  ({shares})")


def _search(out: Console, dual: Any, output: Path, scan: Any, text: str) -> None:
    from med3dvlm.data.phantoms import write_studies
    from med3dvlm.search import How, SearchIndex, build_index

    archive = output / "archive"
    if not (archive / "manifest.jsonl").is_file():  # written last
        with common.progress_bar("writing phantoms") as progress:
            write_studies(PHANTOMS, archive, layout="nifti", split="test", progress=progress)
    with common.progress_bar("embedding") as progress:
        build_index(archive, dual, output / "demo.index", how=How(progress=progress))
    index = SearchIndex.open(output / "demo.index", model=dual)
    for label, query in (
        (f'"{text}"', {"text": text}),
        (f"studies like {Path(scan.source).name}", {"vector": dual.embed_scans(scan)[0]}),
    ):
        out.print(f"[bold]{escape(label)}[/bold]")
        for hit in index.search(top=3, **query):
            first = " ".join((hit.report or "").split())[:110]
            out.print(f"  {hit.rank}. {hit.score:.2f}  {hit.id}  {escape(first)}…")
