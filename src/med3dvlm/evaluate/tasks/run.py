"""What every run gives: tables, the predictions behind them, plots and examples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from med3dvlm.evaluate.tables import Results, file_name
from med3dvlm.evaluate.tasks.cases import Cases
from med3dvlm.evaluate.tasks.controls import Scorer, control_table, group_table
from med3dvlm.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREDICTIONS = "predictions.jsonl"
EXAMPLES = 4  # studies on the page


@dataclass(frozen=True)
class Example:
    """A study to show: its prepared volume (D, H, W) and what was asked, true and said.

    Attributes:
        columns: heads of `rows`, which are texts.
    """

    title: str
    volume: np.ndarray | None
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Run:
    """The outcome of one evaluation.

    Attributes:
        task: its name, by which `compare` knows what may be compared.
        samples: one dict a prediction, with `study`, a unique `sample`, and `scores`, by name.
        plots: (title, figure).
    """

    task: str
    results: Results
    samples: list[dict[str, Any]] = field(default_factory=list)
    plots: list[tuple[str, Figure]] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    def save(self, folder: Path | str) -> None:
        """The tables, predictions.jsonl, plots/*.png and report.html, each written atomically."""
        from med3dvlm.evaluate.tasks.html import write_page
        from med3dvlm.evaluate.tasks.plots import png

        folder = Path(folder)
        self.results.save(folder)
        with atomic_file(folder / PREDICTIONS) as temporary:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(s, ensure_ascii=False) + "\n" for s in self.samples)
        for title, figure in self.plots:
            with atomic_file(folder / "plots" / f"{file_name(title)}.png") as temporary:
                temporary.write_bytes(png(figure))
        write_page(self, folder / "report.html")


def begin(task: str, model: Any, facts: Mapping[str, Any], **settings: int) -> Run:
    """A run without tables, its facts filled in: what is measured, on which studies, and how."""
    about = {"task": task, "model": model.label, "weights": model.fingerprint()}
    if model.preparation is not None:
        about["preparation"] = model.preparation.fingerprint()
    versions = {"med3dvlm": version("med3dvlm"), "torch": version("torch")}
    return Run(task, Results({**about, **facts, **settings, **versions}))


def add_evidence(
    run: Run, scorer: Scorer, cases: Cases, *, controls: int, by: str | None, title: str = ""
) -> None:
    """The tables that stand beside the scores: evidence controls, and results by a column."""
    suffix = f", {title}" if title else ""
    if controls:
        rows = control_table(scorer, min(controls, len(cases)))
        run.results.add(f"Evidence controls{suffix}", rows)
    if by is not None:
        run.results.add(f"By {by}{suffix}", group_table(scorer, cases, by))
