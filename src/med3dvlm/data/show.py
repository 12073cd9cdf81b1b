"""Looking at a store: a contact sheet of its volumes, and what there is in it in figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from med3dvlm.data.store import Store
from med3dvlm.files import atomic_file
from med3dvlm.picture import middle_planes

COLUMNS = 4  # studies side by side on a sheet


def contact_sheet(store: Store, indices: Sequence[int], path: Path | str) -> None:
    """A PNG with the three middle slices of each study as the model sees them.

    Axial from below with the patient's right on the left; coronal and sagittal with the head up.
    Slices keep the voxel spacing of the preparation where it has one.
    """
    rows = -(-len(indices) // COLUMNS)
    columns = min(COLUMNS, len(indices))
    figure = Figure(figsize=(3.9 * columns, 1.75 * rows), dpi=100, facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 3 * columns, squeeze=False)
    figure.subplots_adjust(0.005, 0.01, 0.995, 0.97, wspace=0.03, hspace=0.14)
    for axis in axes.flat:
        axis.set_axis_off()
    for place, index in enumerate(indices):
        row, column = divmod(place, COLUMNS)
        slices = _middle_slices(store, index)
        for plane, (pixels, aspect) in enumerate(slices):
            axis = axes[row][3 * column + plane]
            low, high = store.quantisation.low, store.quantisation.high
            axis.imshow(pixels, cmap="gray", vmin=low, vmax=high, aspect=aspect)
        title = store.ids[index]
        title = title if len(title) <= 44 else f"…{title[-43:]}"
        axes[row][3 * column].set_title(title, fontsize=6.5, color="white", loc="left", pad=2)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", facecolor=figure.get_facecolor())


def _middle_slices(store: Store, index: int) -> list[tuple[np.ndarray, float]]:
    """(pixels, height of a pixel against its width) of each plane."""
    z, y, x = store.voxel_mm(index)
    return list(zip(middle_planes(store.volume(index)), (y / x, z / x, z / y), strict=True))


def statistics(store: Store) -> dict[str, Any]:
    """Counts, sizes, spacing, lengths of texts, labels, and overlaps of splits of a store."""
    table = store.table
    reports = [report or "" for report in table["report"].to_pylist()]
    questions = table["questions"].to_pylist()
    splits = [tuple(names) for names in table["splits"].to_pylist()]
    cases: dict[str, set[str]] = {}
    for case, names in zip(table["case"].to_pylist(), splits, strict=True):
        if case:
            cases.setdefault(case, set()).update(names)
    shared = Counter(" and ".join(sorted(names)) for names in cases.values() if len(names) > 1)
    words = [len(report.split()) for report in reports if report]
    repeated = Counter(report for report in reports if report)
    return {
        "studies": len(store),
        "refused": store.info["refused"],
        "dtype": store.info["dtype"],
        "volume": list(store.preparation.size),
        "splits": dict(Counter(name for names in splits for name in names)),
        "cases": len(cases),
        "held back from evaluation": len(store.held_back),
        "cases in several splits": dict(shared),
        "original shape (z, y, x)": _spread(table["original_shape"].to_pylist()),
        "spacing in mm (z, y, x)": _spread(table["spacing_mm"].to_pylist()),
        "modality": dict(Counter(str(name) for name in table["modality"].to_pylist())),
        "studies with a report": len(words),
        "words in a report": _spread([[count] for count in words]),
        "reports shared by several studies": sum(1 for n in repeated.values() if n > 1),
        "questions": dict(Counter(q["kind"] for row in questions for q in row)),
        "questions by type": {
            str(key): count
            for key, count in sorted(Counter(q["type"] for row in questions for q in row).items())
        },
        "studies with remarks": sum(1 for notes in table["notes"].to_pylist() if notes),
        "labels": _label_counts(store),
    }


def plot_statistics(store: Store, path: Path | str) -> None:
    """A PNG with the spread of spacing, slices and words, and how frequent each label is."""
    table = store.table
    counts = _label_counts(store)
    figure = Figure(figsize=(12, 4 + 0.16 * len(counts)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 4 if counts else 3)
    spacing = [mm[0] for mm in table["spacing_mm"].to_pylist()]
    slices = [shape[0] for shape in table["original_shape"].to_pylist()]
    words = [len(report.split()) for report in table["report"].to_pylist() if report]
    panels = (("slice spacing, mm", spacing), ("slices", slices), ("words in a report", words))
    for axis, (name, values) in zip(axes, panels, strict=False):
        axis.hist(values, bins=30, color="#3572b0")
        axis.set(xlabel=name, ylabel="studies")
    if counts:
        axes[3].barh(list(counts), list(counts.values()), color="#3572b0")
        axes[3].tick_params(axis="y", labelsize=6)
        axes[3].invert_yaxis()
        axes[3].set(xlabel="studies")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _label_counts(store: Store) -> dict[str, int]:
    rows = [row for row in store.table["labels"].to_pylist() if row]
    if not rows:
        return {}
    totals = np.sum(rows, axis=0, dtype=np.int64)
    return dict(zip(store.labels, totals.tolist(), strict=True))


def _spread(rows: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Lowest, median and highest of each column."""
    if not rows:
        return {}
    columns = np.array(rows, dtype=np.float64)
    measures = (("lowest", np.min), ("median", np.median), ("highest", np.max))
    return {name: np.round(measure(columns, axis=0), 3).tolist() for name, measure in measures}
