"""Hits as people look at them: a picture, or a page, of middle slices, scores and reports."""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from med3dvlm.files import atomic_file
from med3dvlm.picture import SOFT_TISSUE, middle_planes
from med3dvlm.scan import Scan, ScanError, read_scan
from med3dvlm.search.items import StoredItem, item_of
from med3dvlm.search.study import Hit, Study

HEIGHT, GAP, MARGIN = 180, 8, 24  # pixels
TEXT_LEFT, WIDTH = 640, 1400
LINES, CHARACTERS = 7, 105  # of a report
BACKGROUND, INK, DIM, ACCENT = "#0b0e11", "#e6e9ec", "#8b949e", "#58a6ff"
NOT_THERE = "the scan cannot be read"


def draw_sheet(hits: Sequence[Hit], path: Path | str, *, title: str, footer: str = "") -> None:
    """A PNG of the hits, one under the other; a scan that cannot be read says so in its place."""
    foot = textwrap.wrap(footer, 190)
    height = MARGIN + 40 + len(hits) * (HEIGHT + 2 * GAP) + 18 * len(foot) + MARGIN
    sheet = Image.new("RGB", (WIDTH, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 4), _elided(title, 110), INK, _font(18, bold=True))
    top = MARGIN + 40
    for hit in hits:
        try:
            strip = middle_slices(hit.path)
            strip.thumbnail((TEXT_LEFT - 2 * MARGIN, HEIGHT))
            sheet.paste(strip, (MARGIN, top))
        except (ScanError, ValueError, OSError):
            draw.text((MARGIN, top + HEIGHT // 2), NOT_THERE, DIM, _font(13))
        heading = f"{hit.rank}.  {hit.score:.3f}   {hit.id}"
        draw.text((TEXT_LEFT, top), _elided(heading, 80), ACCENT, _font(15, bold=True))
        draw.text((TEXT_LEFT, top + 22), _elided(hit.path, CHARACTERS + 10), DIM, _font(11))
        lines = textwrap.wrap(" ".join(hit.report.split()), CHARACTERS)
        if len(lines) > LINES:
            lines = [*lines[: LINES - 1], f"{lines[LINES - 1]} …"]
        for k, line in enumerate(lines):
            draw.text((TEXT_LEFT, top + 44 + 18 * k), line, INK, _font(13))
        top += HEIGHT + 2 * GAP
    for k, line in enumerate(foot):
        draw.text((MARGIN, top + 18 * k), line, DIM, _font(11))
    with atomic_file(path) as temporary:
        sheet.save(temporary, "PNG")


def write_page(hits: Sequence[Hit], path: Path | str, *, title: str, footer: str = "") -> None:
    """One HTML file with its pictures inside; reports and paths are text, never markup."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>"
        f"<title>{html.escape(title)}</title><style>"
        f"body{{background:{BACKGROUND};color:{INK};font:15px/1.5 system-ui,sans-serif;"
        "max-width:1200px;margin:2em auto;padding:0 1em}"
        "article{display:flex;gap:1.5em;flex-wrap:wrap;margin:1.5em 0;border-top:1px solid #30363d;"
        "padding-top:1.5em}article div{flex:1 1 24em}img{max-width:100%;align-self:start}"
        f"h2{{font-size:1.05em;color:{ACCENT};margin:0}}small,footer{{color:{DIM};"
        "overflow-wrap:anywhere}p{white-space:pre-wrap;margin:.5em 0}</style>"
        f"<h1>{html.escape(title)}</h1>"
    ]
    for hit in hits:
        facts = "; ".join(f"{key}: {value}" for key, value in hit.metadata.items())
        parts.append(
            f"<article>{_picture(hit)}<div><h2>{hit.rank}. {hit.score:.3f} {html.escape(hit.id)}"
            f"</h2><small>{html.escape(hit.path)}</small><p>{html.escape(hit.report)}</p>"
            f"<small>{html.escape(facts)}</small></div></article>"
        )
    parts.append(f"<footer>{html.escape(footer)}</footer></html>\n")
    with atomic_file(path) as temporary:
        temporary.write_text("\n".join(parts), "utf-8")


def _picture(hit: Hit) -> str:
    try:
        strip = middle_slices(hit.path)
    except (ScanError, ValueError, OSError):
        return f"<small>{NOT_THERE}</small>"
    content = io.BytesIO()
    strip.save(content, "PNG")
    encoded = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="middle slices" src="data:image/png;base64,{encoded}">'


def middle_slices(path: str) -> Image.Image:
    """Axial, coronal and sagittal through the middle, the patient's right on the left, head up.

    Args:
        path: of a study, as an index has it.

    Raises:
        ScanError, ValueError, OSError: if it cannot be read.
    """
    return _strip(*_volume(path))


def scan_strip(scan: Scan) -> Image.Image:
    """The same of a scan that was read."""
    return _strip(*_shown(scan))


def _strip(
    volume: np.ndarray, spacing_mm: tuple[float, float, float], window: tuple[float, float]
) -> Image.Image:
    (z, y, x), (low, high) = spacing_mm, window
    pictures = []
    steps = ((y, x), (z, x), (z, y))
    for pixels, (down, across) in zip(middle_planes(volume), steps, strict=True):
        rows, columns = pixels.shape
        grey = np.clip((pixels - low) * (255 / max(high - low, 1e-6)), 0, 255).astype(np.uint8)
        wide = max(1, min(3 * HEIGHT, round(HEIGHT * columns * across / (rows * down))))
        picture = Image.fromarray(np.ascontiguousarray(grey))
        pictures.append(picture.resize((wide, HEIGHT), Image.Resampling.BILINEAR))
    total = sum(picture.width for picture in pictures) + GAP * (len(pictures) - 1)
    strip, left = Image.new("L", (total, HEIGHT)), 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width + GAP
    return strip


def _volume(
    path: str,
) -> tuple[np.ndarray, tuple[float, float, float], tuple[float, float]]:
    """(D, H, W), mm between voxels along each axis, lowest and highest value shown."""
    item = item_of(Study("", path, ""))
    if isinstance(item, StoredItem):
        store, number = item.stored()
        values = store.quantisation
        return store.volume(number), store.voxel_mm(number), (values.low, values.high)
    return _shown(read_scan(path))


def _shown(scan: Scan) -> tuple[np.ndarray, tuple[float, float, float], tuple[float, float]]:
    if scan.units == "HU":
        return scan.array, scan.spacing_mm, SOFT_TISSUE
    low, high = np.percentile(scan.array[:: max(1, len(scan.array) // 32)], [1, 99.5])
    return scan.array, scan.spacing_mm, (float(low), float(high))


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size)


def _elided(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 1] + "…"
