"""Plots of runs, drawn without a display."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from med3dvlm.evaluate.tables import Row
from med3dvlm.picture import middle_planes

COLOUR, DIM = "#1f6feb", "#8b949e"
SLICES = ("axial", "coronal", "sagittal")


def png(figure: Figure, *, dpi: int = 100) -> bytes:
    """The figure as a PNG file."""
    out = BytesIO()
    figure.savefig(out, format="png", dpi=dpi, bbox_inches="tight")
    return out.getvalue()


def bars(rows: Sequence[Row], name: str, value: str, chance: str | None = None) -> Figure:
    """A bar for each row, with its interval from `low` to `high` and a mark where chance is."""
    shown = [row for row in rows if np.isfinite(_numbers([row], value))[0]]
    values = _numbers(shown, value)
    figure = Figure(figsize=(7, 0.6 + 0.32 * max(1, len(shown))))
    axes = figure.subplots()
    places = np.arange(len(shown))
    axes.barh(places, values, color=COLOUR, height=0.7)
    for key in ("low", "high"):
        if not any(key in row for row in shown):
            break
    else:
        ends = [_numbers(shown, "low"), _numbers(shown, "high")]
        reach = np.maximum(0, [values - ends[0], ends[1] - values])
        axes.errorbar(values, places, xerr=np.nan_to_num(reach), fmt="none", ecolor="black")
    if chance is not None:
        marks = _numbers(shown, chance)
        axes.plot(marks, places, "|", color=DIM, markersize=14, markeredgewidth=2, label="chance")
        axes.legend(loc="lower right", fontsize=8)
    axes.set_yticks(places, [str(row[name]) for row in shown], fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_xlabel(value)
    axes.invert_yaxis()
    return figure


def confusion(pairs: Sequence[tuple[str, str]], names: Sequence[str]) -> Figure:
    """How often each answer was given (columns) where each was right (rows)."""
    counts = Counter(pairs)
    table = np.array([[counts[right, given] for given in names] for right in names])
    figure = Figure(figsize=(1.2 + 0.6 * len(names), 1.0 + 0.6 * len(names)))
    axes = figure.subplots()
    axes.imshow(table, cmap="Blues")
    for (row, column), count in np.ndenumerate(table):
        light = count > table.max() / 2
        axes.text(column, row, str(count), ha="center", va="center", color="w" if light else "k")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("given")
    axes.set_ylabel("right")
    return figure


def curves(lines: Sequence[tuple[str, np.ndarray, bool]], x: str, y: str) -> Figure:
    """Lines over 1, 2, 3 …: (name, values, whether it is a baseline)."""
    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    for name, values, baseline in lines:
        style: dict[str, Any] = {"color": DIM, "linestyle": "--"} if baseline else {}
        axes.plot(np.arange(1, len(values) + 1), values, label=name, **style)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(fontsize=8)
    return figure


def middle_slices(volume: np.ndarray) -> Figure:
    """The middle slices of a prepared volume (D, H, W) in three planes, the head on top."""
    slices = middle_planes(volume)
    low, high = float(volume.min()), float(volume.max())
    figure = Figure(figsize=(7.5, 2.6))
    for axes, name, pixels in zip(figure.subplots(1, 3), SLICES, slices, strict=True):
        square = volume.shape[1] / pixels.shape[0]  # slices lie further apart than pixels
        axes.imshow(pixels, cmap="gray", vmin=low, vmax=high, aspect=square)
        axes.set_title(name, fontsize=8)
        axes.axis("off")
    return figure


def _numbers(rows: Sequence[Row], key: str) -> np.ndarray:
    return np.array([row[key] if row.get(key) is not None else np.nan for row in rows], float)
