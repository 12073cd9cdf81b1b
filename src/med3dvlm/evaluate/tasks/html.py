"""One page with everything about a run: self-contained, and all text escaped."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from med3dvlm.evaluate.tables import Table
from med3dvlm.evaluate.tasks.plots import middle_slices, png
from med3dvlm.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from med3dvlm.evaluate.tasks.run import Example, Run

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; margin: .5rem 0 1.5rem }
th, td { border-bottom: 1px solid #ccc; padding: .25rem .6rem; text-align: left;
         vertical-align: top; white-space: pre-wrap }
img { max-width: 100% }
.wide { overflow-x: auto }
"""
NOTICE = "Research use only. Not a medical device; a clinician must check every word."


def write_page(run: Run, path: Path) -> None:
    """Tables, plots and examples of a run as one HTML file without scripts or links."""
    results = run.results
    facts = "".join(f"<li>{_text(k)}: {_text(v)}</li>" for k, v in results.facts.items())
    notes = "".join(f"<p>Note: {_text(note)}</p>" for note in results.notes)
    parts = [
        f"<h1>Evaluation: {_text(run.task)}</h1><p>{NOTICE}</p><ul>{facts}</ul>{notes}",
        *(_table(table) for table in results.tables),
        *(f"<h2>{_text(title)}</h2>{_image(figure, title)}" for title, figure in run.plots),
        "<h2>Examples</h2>" if run.examples else "",
        *(_example(example) for example in run.examples),
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Evaluation: {_text(run.task)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page, "utf-8")


def _table(table: Table) -> str:
    rows = [[table.show(row.get(column), column) for column in table.columns] for row in table.rows]
    return f"<h2>{_text(table.title)}</h2>{_grid(table.columns, rows)}"


def _example(example: Example) -> str:
    image = "" if example.volume is None else _image(middle_slices(example.volume), example.title)
    return f"<h3>{_text(example.title)}</h3>{image}{_grid(example.columns, example.rows)}"


def _grid(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>\n{body}</table></div>'


def _image(figure: Figure, title: str) -> str:
    data = b64encode(png(figure)).decode()
    return f'<img alt="{_text(title)}" src="data:image/png;base64,{data}">'


def _text(value: object) -> str:
    return escape(str(value), quote=True)
