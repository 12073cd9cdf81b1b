"""The picture of a result: three planes in radiological convention, the report beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from med3dvlm.files import atomic_file
from med3dvlm.scan import Scan, peak_of
from med3dvlm.sentences import HEADING

NOTICE = "DRAFT — research use only, not for clinical use"
SOFT_TISSUE = (-160.0, 240.0)  # level 40, width 400 HU
LUNG = (-1350.0, 150.0)  # level -600, width 1500 HU

# the page, in pixels from its top left
DPI = 100
WIDTH, HEIGHT, MAX_HEIGHT = 1600, 900, 6000
MARGIN, FOOT, FOOT_LINES = 32, 64, 3
IMAGES_TOP, IMAGES_RIGHT, CAPTION, GAP = 96, 936, 24, 18
TEXT_LEFT, TEXT_TOP = 984, 84
TYPE_SIZES = (12.5, 11.0, 9.5)  # points; a report too long for the smallest makes the page higher
LEADING = 1.42
HEAT = 0.6  # how much of a slice the strongest evidence covers

BACKGROUND, INK, DIM, ACCENT, AMBER = "#0b0e11", "#e6e9ec", "#8b949e", "#58a6ff", "#e3b341"
SET_APART = ("IMPRESSION", "CONCLUSION")


@dataclass(frozen=True)
class View:
    """One slice, ready to show: rows down, columns to the right, with its letters.

    Attributes:
        mm: (rows, columns) distance of pixel centres; letters: of the left, right, top and bottom
            edge, empty where the scan's orientation is not known.
        heat: what is laid over the pixels, 0 to 1.
    """

    name: str
    pixels: np.ndarray
    mm: tuple[float, float]
    letters: tuple[str, str, str, str]
    window: tuple[float, float]
    index: int
    count: int
    heat: np.ndarray | None = None

    @property
    def size_mm(self) -> tuple[float, float]:
        """(width, height)."""
        rows, columns = self.pixels.shape
        return columns * self.mm[1], rows * self.mm[0]


@dataclass(frozen=True)
class Line:
    """One line of the text column; `space` above it is in lines."""

    text: str
    colour: str = INK
    bold: bool = False
    space: float = 0.0
    marked: bool = False


def draw_report(
    scan: Scan,
    text: str,
    path: Path | str,
    *,
    title: str,
    footer: str = "",
    window: tuple[float, float] | None = None,
    point: tuple[int, int, int] | None = None,
    questions: Sequence[tuple[str, str]] = (),
    evidence: np.ndarray | None = None,
) -> None:
    """Write a PNG of a scan with a text beside it, atomically.

    The planes go through the middle of what the volume shows, all at one scale and at the aspect
    ratio of the voxels' spacing, seen as radiologists do: the patient's right on the left, the
    feet down. A scan with lung in it gets a fourth view in a lung window. The page is 1600×900
    pixels, and higher where a long text needs it.

    Args:
        text: the draft report; its sections begin with "Findings:", "Impression:" and the like.
        footer: who made it: model, weights, preparation.
        window: lowest and highest value shown; a soft-tissue window for HU, else percentiles.
        point: (z, y, x) voxel the planes go through.
        questions: (question, answer) pairs, under the report.
        evidence: a map (D, H, W) on the scan's voxels, 0 to 1, laid over the slices; the planes
            then go through its highest voxel, where it has one and no point is given.

    Raises:
        ValueError: for a window that is not low before high, a point outside the volume, or a map
            of another shape.
    """
    if evidence is not None and evidence.shape != scan.array.shape:
        raise ValueError(f"the map has {evidence.shape} voxels, the scan {scan.array.shape}.")
    if evidence is not None and point is None:
        point = peak_of(evidence)
    views = _views(scan, window=window, point=point, evidence=evidence)
    paragraphs = [*_sections(text), *_asked(questions), *_notes(scan)]
    size, lines = _fit(paragraphs)
    foot = [line for part in footer.split("\n") for line in _wrap(part, 8.5, WIDTH - 2 * MARGIN)]
    if len(foot) > FOOT_LINES:
        foot = [*foot[: FOOT_LINES - 1], f"{foot[FOOT_LINES - 1]} …"]
    needed = TEXT_TOP + _height(lines, size) + FOOT
    page = Page(min(max(HEIGHT, needed), MAX_HEIGHT))
    heading = IMAGES_RIGHT - MARGIN
    page.write(MARGIN, 44, _elide(title, 16, heading, bold=True), size=16, bold=True)
    page.write(MARGIN, 70, _elide(_describe(scan), 10, heading), size=10, colour=DIM)
    page.write(TEXT_LEFT, 44, NOTICE, size=12, colour=AMBER, bold=True)
    scale, places = _arrange([view.size_mm for view in views])
    for view, (left, top) in zip(views, places, strict=True):
        _draw_view(page, view, left, top, scale)
    _draw_text(page, lines, size)
    for i, line in enumerate(reversed(foot)):
        page.write(MARGIN, page.height - 16 - 15 * i, line, size=8.5, colour=DIM)
    with atomic_file(path) as temporary:
        page.figure.savefig(temporary, format="png", facecolor=BACKGROUND)


class Page:
    """A figure addressed in pixels from its top left."""

    def __init__(self, height: float):
        self.height = round(height)
        self.figure = Figure(
            figsize=(WIDTH / DPI, self.height / DPI), dpi=DPI, facecolor=BACKGROUND
        )
        FigureCanvasAgg(self.figure)

    def write(
        self,
        x: float,
        baseline: float,
        text: str,
        *,
        size: float,
        colour: str = INK,
        bold: bool = False,
    ) -> None:
        """Text as it is: `$` is no mathematics."""
        self.figure.text(
            x / WIDTH,
            1 - baseline / self.height,
            text,
            color=colour,
            fontproperties=_font(size, bold=bold),
            va="baseline",
            parse_math=False,
        )

    def bar(self, x: float, top: float, bottom: float) -> None:
        """A vertical rule."""
        ends = [1 - top / self.height, 1 - bottom / self.height]
        self.figure.add_artist(Line2D([x / WIDTH] * 2, ends, color=ACCENT, linewidth=2.5))


def _describe(scan: Scan) -> str:
    shape = " × ".join(map(str, scan.array.shape))
    spacing = " × ".join(f"{s:.3g}" for s in scan.spacing_mm)
    kind = scan.modality or ("CT" if scan.units == "HU" else "modality unknown")
    units = ", HU" if scan.units == "HU" else ""
    return f"{kind}{units} · {shape} voxels of {spacing} mm (slices × rows × columns)"


def middle_planes(volume: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Axial, coronal and sagittal through the middle of (D, H, W), the head on top."""
    depth, height, width = (n // 2 for n in volume.shape)
    return volume[depth], volume[::-1, height], volume[::-1, :, width]


# --- what is shown --------------------------------------------------------------------------


def _views(
    scan: Scan,
    *,
    window: tuple[float, float] | None = None,
    point: tuple[int, int, int] | None = None,
    evidence: np.ndarray | None = None,
) -> list[View]:
    """Axial, a lung-window axial where there is lung, coronal and sagittal."""
    array, (sz, sy, sx) = scan.array, scan.spacing_mm
    depth, height, width = array.shape
    shown = _window(scan) if window is None else window
    if not shown[0] < shown[1]:
        raise ValueError(f"window {shown}: the lowest value comes first.")
    z, y, x = _centre(scan) if point is None else point
    if not (0 <= z < depth and 0 <= y < height and 0 <= x < width):
        raise ValueError(f"point {(z, y, x)} is outside the volume of {array.shape} voxels.")
    known = scan.orientation != "unknown"
    across, along = ("R", "L", "A", "P"), ("R", "L", "S", "I")
    side = ("A", "P", "S", "I")
    up = slice(None, None, -1)  # row 0 is the feet; the head belongs on top

    def view(
        name: str,
        cut: tuple[Any, ...],
        mm: tuple[float, float],
        letters: tuple[str, str, str, str],
        values: tuple[float, float],
        place: tuple[int, int],
    ) -> View:
        if not known:
            name, letters = f"{name}? (orientation unknown)", ("", "", "", "")
        heat = None if evidence is None else evidence[cut]
        return View(name, array[cut], mm, letters, values, place[0] + 1, place[1], heat)

    views = [view("Axial", (z,), (sy, sx), across, shown, (z, depth))]
    lung = _lung_slice(array) if scan.units == "HU" else None
    if lung is not None:
        views.append(view("Axial, lung", (lung,), (sy, sx), across, LUNG, (lung, depth)))
    views.append(view("Coronal", (up, y), (sz, sx), along, shown, (y, height)))
    views.append(view("Sagittal", (up, slice(None), x), (sz, sy), side, shown, (x, width)))
    return views


def _window(scan: Scan) -> tuple[float, float]:
    if scan.units == "HU":
        return SOFT_TISSUE
    sample = _sample(scan.array)
    sample = sample[np.isfinite(sample)]
    low, high = np.percentile(sample, [1, 99.5]) if sample.size else (0.0, 1.0)
    return (float(low), float(high)) if high > low else (float(low), float(low) + 1)


def _sample(array: np.ndarray) -> np.ndarray:
    """Every n-th voxel of each axis, about two million: enough to judge by."""
    step = max(1, round((array.size / 2e6) ** (1 / 3)))
    return array[tuple(slice(None, None, min(step, n)) for n in array.shape)]


def _centre(scan: Scan) -> tuple[int, int, int]:
    """The middle of what is there: voxels above air, or above the mean."""
    array = _sample(scan.array)
    finite = array[np.isfinite(array)]
    mean = float(finite.mean()) if finite.size else 0.0
    there = array > (-300 if scan.units == "HU" else mean)
    if not there.any():
        there[:] = True
    middles = []
    for axis, (n, whole) in enumerate(zip(array.shape, scan.array.shape, strict=True)):
        weight = there.sum(axis=tuple({0, 1, 2} - {axis}))
        middle = int(np.searchsorted(weight.cumsum(), weight.sum() / 2))
        middles.append(min(whole - 1, middle * -(-whole // n)))
    return middles[0], middles[1], middles[2]


def _lung_slice(array: np.ndarray) -> int | None:
    """The slice with the most lung, if any has 3% of its middle at lung density."""
    _, rows, columns = array.shape
    step = max(1, min(rows, columns) // 64)
    middle = array[:, rows // 6 : -rows // 6 or None : step]
    middle = middle[..., columns // 6 : -columns // 6 or None : step]
    share = ((middle > -950) & (middle < -600)).mean(axis=(1, 2))
    best = int(np.argmax(share))
    return best if share[best] > 0.03 else None


# --- the panels -----------------------------------------------------------------------------


def _arrange(sizes: list[tuple[float, float]]) -> tuple[float, list[tuple[float, float]]]:
    """Pixels per mm, the same for all views, and the (left, top) pixel of each.

    The views keep their order and are broken into rows so that they come out largest.

    Args:
        sizes: (width, height) of each, mm.
    """
    wide, high = IMAGES_RIGHT - MARGIN, HEIGHT - FOOT - IMAGES_TOP
    best, best_rows = 0.0, [list(range(len(sizes)))]
    for breaks in product((False, True), repeat=len(sizes) - 1):
        rows = [[0]]
        for i, new_row in enumerate(breaks, start=1):
            if new_row:
                rows.append([i])
            else:
                rows[-1].append(i)
        tall = sum(max(sizes[i][1] for i in row) for row in rows)
        scale = min(
            (high - CAPTION * len(rows) - GAP * (len(rows) - 1)) / tall,
            *((wide - GAP * (len(r) - 1)) / sum(sizes[i][0] for i in r) for r in rows),
        )
        if scale > best:
            best, best_rows = scale, rows
    places, top = [], IMAGES_TOP + CAPTION
    for row in best_rows:
        left = MARGIN
        for i in row:
            places.append((left, top))
            left += sizes[i][0] * best + GAP
        top += max(sizes[i][1] for i in row) * best + CAPTION + GAP
    return best, places


def _draw_view(page: Page, view: View, left: float, top: float, scale: float) -> None:
    """One panel whose image fills its axes, which are then counted in mm from the top left."""
    width, height = view.size_mm
    box = (left / WIDTH, 1 - (top + height * scale) / page.height)
    box = (*box, width * scale / WIDTH, height * scale / page.height)
    axes = page.figure.add_axes(box, facecolor="black")
    axes.imshow(
        view.pixels,
        cmap="gray",
        vmin=view.window[0],
        vmax=view.window[1],
        extent=(0, width, height, 0),
        interpolation="bicubic" if min(view.mm) * scale > 1 else "hanning",
        aspect="auto",  # the box has the aspect ratio already
    )
    if view.heat is not None:
        axes.imshow(
            view.heat,
            cmap="inferno",
            vmin=0,
            vmax=1,
            alpha=HEAT * np.clip(view.heat, 0, 1),
            extent=(0, width, height, 0),
            interpolation="bilinear",
            aspect="auto",
        )
    axes.set_axis_off()
    low, high = view.window
    caption = f"{view.name}  {view.index}/{view.count}"
    caption += f"  ·  W {high - low:.0f}  L {(high + low) / 2:.0f}"
    page.write(left, top - 7, _elide(caption, 8.5, width * scale), size=8.5, colour=DIM)
    outline = [withStroke(linewidth=2.5, foreground="black")]
    inset = 5 / scale
    edges = [
        (inset, height / 2, "left", "center"),
        (width - inset, height / 2, "right", "center"),
        (width / 2, inset, "center", "top"),
        (width / 2, height - inset, "center", "bottom"),
    ]
    thin = height * scale < 48  # no room for letters above each other
    for letter, (x, y, ha, va) in list(zip(view.letters, edges, strict=True))[: 2 if thin else 4]:
        font = _font(11, bold=True)
        axes.text(
            x, y, letter, color=ACCENT, fontproperties=font, ha=ha, va=va, path_effects=outline
        )
    bar = next((mm for mm in (100, 50, 20, 10, 5, 2, 1) if mm <= 0.45 * width), None)
    if bar and not thin and any(view.letters):  # files without orientation have no spacing either
        start, level = 10 / scale, height - 12 / scale
        axes.plot([start, start + bar], [level] * 2, color=INK, lw=2, path_effects=outline)
        label = f"{bar // 10} cm" if bar >= 10 else f"{bar} mm"
        font = _font(8.5)
        above = level - 6 / scale
        axes.text(start, above, label, color=INK, fontproperties=font, path_effects=outline)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


# --- the text -------------------------------------------------------------------------------


def _sections(text: str) -> list[Line]:
    """Paragraphs, not wrapped yet, under headings."""
    parts = HEADING.split(text)
    lines = []
    for heading, body in [("", parts[0]), *zip(parts[1::2], parts[2::2], strict=True)]:
        marked = heading.upper() in SET_APART
        if heading:
            lines.append(Line(heading.upper(), DIM, True, 0.9, marked))
        for i, paragraph in enumerate(filter(None, (p.strip() for p in body.split("\n")))):
            lines.append(Line(paragraph, INK, False, 0.35 if i else 0.0, marked))
    return lines


def _asked(questions: Sequence[tuple[str, str]]) -> list[Line]:
    lines = [Line("QUESTIONS", DIM, True, 0.9)] if questions else []
    for question, answer in questions:
        lines += [Line(question, DIM, False, 0.35), Line(answer, INK)]
    return lines


def _notes(scan: Scan) -> list[Line]:
    """What the reader of the scan noticed."""
    lines = [Line("ABOUT THE SCAN", DIM, True, 0.9)] if scan.warnings else []
    return lines + [Line(warning, AMBER, False, 0.2) for warning in scan.warnings]


def _fit(paragraphs: list[Line]) -> tuple[float, list[Line]]:
    """The largest type in which the text fits the page, or the smallest; the lines in it."""
    width = WIDTH - MARGIN - TEXT_LEFT
    size, lines = TYPE_SIZES[0], list[Line]()
    for size in TYPE_SIZES:
        lines = []
        for p in paragraphs:
            for i, text in enumerate(_wrap(p.text, size, width, bold=p.bold)):
                space = p.space if lines and not i else 0.0
                lines.append(Line(text, p.colour, p.bold, space, p.marked))
        if TEXT_TOP + _height(lines, size) + FOOT <= HEIGHT:
            return size, lines
    room = MAX_HEIGHT - TEXT_TOP - FOOT
    if _height(lines, size) > room:
        end = Line("… the text goes on: this page shows only its beginning", AMBER, True, 0.9)
        while lines and _height([*lines, end], size) > room:
            excess = _height([*lines, end], size) - room
            del lines[-max(1, int(excess / _step(size) / 2)) :]
        lines.append(end)
    return size, lines


def _step(size: float) -> float:
    """Pixels from one line to the next."""
    return size / 72 * DPI * LEADING


def _height(lines: list[Line], size: float) -> float:
    return sum((1 + line.space) * _step(size) for line in lines)


def _draw_text(page: Page, lines: list[Line], size: float) -> None:
    y = float(TEXT_TOP)
    marked: list[float] = []
    for line in lines:
        y += (1 + line.space) * _step(size)
        page.write(TEXT_LEFT, y, line.text, size=size, colour=line.colour, bold=line.bold)
        if line.marked:
            marked += [y - 0.75 * _step(size), y + 0.3 * _step(size)]
    if marked:
        page.bar(TEXT_LEFT - 12, marked[0], marked[-1])


def _wrap(text: str, size: float, width: float, *, bold: bool = False) -> list[str]:
    """Lines no wider than `width` pixels; words that are wider are broken."""
    measure = _measure(size, bold)
    lines, line = [], ""
    for word in _printable(text).split():
        joined = f"{line} {word}" if line else word
        if measure(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        while measure(word) > width:
            fits = next(
                n for n in range(len(word) - 1, 0, -1) if n == 1 or measure(word[:n]) <= width
            )
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    return [*lines, line] if line else lines


def _elide(text: str, size: float, width: float, *, bold: bool = False) -> str:
    text, measure = " ".join(_printable(text).split()), _measure(size, bold)
    if measure(text) <= width:
        return text
    while text and measure(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _printable(text: str) -> str:
    """Without control and direction marks, which would show as boxes or turn the text around."""
    return "".join(c if c.isprintable() else " " for c in text)


@lru_cache
def _families() -> tuple[str, ...]:
    """The font that comes with matplotlib, then what this machine has for other scripts."""
    there = {font.name for font in font_manager.fontManager.ttflist}
    others = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Noto Sans Arabic")
    return ("DejaVu Sans", *(name for name in others if name in there))


@lru_cache
def _font(size: float, *, bold: bool = False) -> FontProperties:
    return FontProperties(family=list(_families()), size=size, weight="bold" if bold else "normal")


@lru_cache
def _measure(size: float, bold: bool) -> Callable[[str], float]:
    """The width of a text, pixels, from the widths of its letters (without kerning)."""
    renderer = FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()
    font = _font(size, bold=bold)

    @lru_cache(4096)
    def letter(character: str) -> float:
        # between two others: a space alone has no extent
        both = renderer.get_text_width_height_descent(f"x{character}x", font, False)[0]
        return both - renderer.get_text_width_height_descent("xx", font, False)[0]

    return lambda text: sum(map(letter, text))
