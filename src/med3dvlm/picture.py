"""The picture of a result: three planes in radiological convention, the report beside them."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from med3dvlm.files import atomic_file
from med3dvlm.scan import Scan

SOFT_TISSUE = (-160.0, 240.0)  # level 40, width 400 HU
LUNG = (-1350.0, 150.0)  # level -600, width 1500 HU
BACKGROUND, TEXT, DIM, ACCENT = "#0b0e11", "#e6e9ec", "#8b949e", "#58a6ff"
HEADINGS = ("Technique", "Findings", "Impression")
LINES = 46  # of the text column at its largest type


@dataclass(frozen=True)
class View:
    """One slice, ready to show: rows down, columns to the right, with its letters."""

    name: str
    pixels: np.ndarray
    mm: tuple[float, float]
    left: str
    right: str
    top: str
    bottom: str
    window: tuple[float, float]


def draw_report(
    scan: Scan,
    text: str,
    path: Path | str,
    *,
    title: str,
    footer: str = "",
    window: tuple[float, float] | None = None,
) -> None:
    """Write a PNG of a scan with a text beside it, atomically.

    The planes go through the middle of what the volume shows, at the aspect ratio of the voxels'
    spacing, seen as radiologists do: the patient's right on the left, the feet down. A scan with
    lung in it gets a fourth view in a lung window.

    Args:
        window: lowest and highest value shown; a soft-tissue window for HU, else percentiles.
    """
    views = _views(scan, window)
    figure = Figure(figsize=(16, 9), dpi=100, facecolor=BACKGROUND)
    FigureCanvasAgg(figure)
    boxes = [(0.02, 0.495), (0.31, 0.495), (0.02, 0.075), (0.31, 0.075)]
    for view, (left, bottom) in zip(views, boxes, strict=False):
        _draw_view(figure, view, (left, bottom, 0.28, 0.385))
    figure.text(0.02, 0.945, title, color=TEXT, fontsize=16, weight="bold", parse_math=False)
    figure.text(0.02, 0.915, _describe(scan), color=DIM, fontsize=10, parse_math=False)
    _draw_text(figure, text, scan.warnings)
    note = "\n".join(line for part in footer.split("\n") for line in textwrap.wrap(part, 190))
    figure.text(0.02, 0.015, note, color=DIM, fontsize=8.5, va="bottom", parse_math=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", facecolor=BACKGROUND)


def _describe(scan: Scan) -> str:
    shape = "×".join(map(str, scan.array.shape))
    spacing = "×".join(f"{s:.2g}" for s in scan.spacing_mm)
    kind = " ".join(filter(None, [scan.modality, scan.units])) or "unknown modality"
    return f"{kind} · {shape} voxels (slices × rows × columns) of {spacing} mm"


def _views(scan: Scan, window: tuple[float, float] | None) -> list[View]:
    """Axial, coronal, sagittal, and a lung-window axial where there is lung."""
    array, (sz, sy, sx) = scan.array, scan.spacing_mm
    shown = window or _window(scan)
    z, y, x = _centre(array, scan)
    up = slice(None, None, -1)  # row 0 is the feet; the head belongs on top
    views = [
        View("axial", array[z], (sy, sx), "R", "L", "A", "P", shown),
        View("coronal", array[up, y], (sz, sx), "R", "L", "S", "I", shown),
        View("sagittal", array[up, :, x], (sz, sy), "A", "P", "S", "I", shown),
    ]
    lung = _lung_slice(array) if scan.units == "HU" else None
    if lung is not None:
        views.append(View("axial, lung window", array[lung], (sy, sx), "R", "L", "A", "P", LUNG))
    return views


def _window(scan: Scan) -> tuple[float, float]:
    if scan.units == "HU":
        return SOFT_TISSUE
    low, high = np.percentile(scan.array[::2, ::2, ::2], [1, 99.5])
    return (float(low), float(high)) if high > low else (float(low), float(low) + 1)


def _centre(array: np.ndarray, scan: Scan) -> tuple[int, int, int]:
    """The middle of what is there: voxels above air, or above the mean."""
    threshold = -300 if scan.units == "HU" else float(array.mean())
    there = array > threshold
    if not there.any():
        there[:] = True
    middles = []
    for axis in range(3):
        weight = there.sum(axis=tuple({0, 1, 2} - {axis}))
        middles.append(int(np.searchsorted(weight.cumsum(), weight.sum() / 2)))
    return middles[0], middles[1], middles[2]


def _lung_slice(array: np.ndarray) -> int | None:
    """The slice with the most lung, if any has 3% of its middle at lung density."""
    _, rows, columns = array.shape
    middle = array[:, rows // 6 : -rows // 6 or None, columns // 6 : -columns // 6 or None]
    share = ((middle > -950) & (middle < -600)).mean(axis=(1, 2))
    best = int(np.argmax(share))
    return best if share[best] > 0.03 else None


def _draw_view(figure: Figure, view: View, box: tuple[float, float, float, float]) -> None:
    axes = figure.add_axes(box, facecolor="black")
    rows, columns = view.pixels.shape
    height, width = rows * view.mm[0], columns * view.mm[1]
    axes.imshow(
        view.pixels,
        cmap="gray",
        vmin=view.window[0],
        vmax=view.window[1],
        extent=(0, width, height, 0),
        interpolation="bilinear",
        aspect="equal",
    )
    axes.set_anchor("W")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    outline = [withStroke(linewidth=2.5, foreground="black")]
    places = {
        view.left: (0.015, 0.5, "left", "center"),
        view.right: (0.985, 0.5, "right", "center"),
        view.top: (0.5, 0.985, "center", "top"),
        view.bottom: (0.5, 0.015, "center", "bottom"),
    }
    for letter, (x, y, ha, va) in places.items():
        axes.text(
            x,
            y,
            letter,
            color=ACCENT,
            fontsize=10,
            weight="bold",
            ha=ha,
            va=va,
            transform=axes.transAxes,
            path_effects=outline,
        )
    low, high = view.window
    label = f"{view.name}   W {high - low:.0f}  L {(high + low) / 2:.0f}"
    axes.set_title(label, color=DIM, fontsize=8.5, loc="left", pad=3)
    bar = 100 if width > 200 else 50 if width > 100 else 10
    ends = [0.03 * width, 0.03 * width + bar]
    axes.plot(ends, [0.95 * height] * 2, color=TEXT, linewidth=2, path_effects=outline)
    axes.text(ends[0], 0.935 * height, f"{bar} mm", color=TEXT, fontsize=8, path_effects=outline)


def _draw_text(figure: Figure, text: str, warnings: tuple[str, ...]) -> None:
    """The report in a column, its headings set apart; smaller type where it is long."""
    for size, width in ((12.5, 62), (10.5, 74), (8.5, 92), (7.0, 112)):
        lines = _lay_out(text, warnings, width)
        if len(lines) <= LINES * 12.5 / size * 0.93:
            break
    else:
        fit = int(LINES * 12.5 / 7.0 * 0.93)
        if len(lines) > fit:
            lines = [*lines[: fit - 1], ("… (the text goes on; see the report itself)", DIM, False)]
    figure.text(0.615, 0.945, "DRAFT · not signed", color=ACCENT, fontsize=12, weight="bold")
    step = 0.0155 * size / 12.5 * 1.25
    y = 0.905
    for line, colour, bold in lines:
        figure.text(
            0.615,
            y,
            line,
            color=colour,
            fontsize=size,
            va="top",
            parse_math=False,
            weight="bold" if bold else "normal",
        )
        y -= step


def _lay_out(text: str, warnings: tuple[str, ...], width: int) -> list[tuple[str, str, bool]]:
    """(line, colour, bold) of the report by sections, then what the reader noticed."""
    parts = re.split(rf"\b({'|'.join(HEADINGS)}):\s*", text)
    lines: list[tuple[str, str, bool]] = []
    sections = [("", parts[0]), *zip(parts[1::2], parts[2::2], strict=True)]
    for heading, body in sections:
        if heading:
            lines += [(heading.upper(), DIM, True)]
        for paragraph in filter(None, (p.strip() for p in body.split("\n"))):
            lines += [(line, TEXT, False) for line in textwrap.wrap(paragraph, width)]
        if lines:
            lines.append(("", TEXT, False))
    for warning in warnings:
        wrapped = textwrap.wrap(f"Note: {warning}", width)
        lines += [(line, DIM, False) for line in wrapped]
    return lines
