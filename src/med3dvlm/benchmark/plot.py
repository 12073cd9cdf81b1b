"""How cost grows, as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from med3dvlm.evaluate.tables import Results
from med3dvlm.files import atomic_file


def draw_growth(results: Results, path: Path) -> None:
    """Seconds of each form against voxels, both logarithmic, one panel for each table of growth."""
    tables = [table for table in results.tables if table.title.startswith("Growth")]
    figure = Figure(figsize=(5 * len(tables), 4), layout="constrained")
    for i, table in enumerate(tables, 1):
        axes = figure.add_subplot(1, len(tables), i)
        voxels = [row["million voxels"] for row in table.rows]
        for column in table.columns[2:]:
            axes.loglog(voxels, [row[column] for row in table.rows], "o-", label=column[:-3])
        axes.set(title=table.title, xlabel="million voxels", ylabel="seconds")
        axes.grid(which="both", alpha=0.3)
        axes.legend()
    figure.suptitle(f"{results.facts['variant']} on {results.facts['machine']}")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
