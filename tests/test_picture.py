"""The picture: the right way round, at the right proportions, with any text."""

from __future__ import annotations

import numpy as np
from PIL import Image

from med3dvlm.picture import SOFT_TISSUE, _views, draw_report
from med3dvlm.scan import Scan


def block_scan(spacing=(5.0, 1.0, 1.0)) -> Scan:
    """Fat with a bright block at the patient's left, back and top."""
    array = np.full((20, 60, 80), -100, dtype=np.float32)
    array[16:, 45:, 60:] = 200
    affine = np.diag([*spacing[::-1], 1.0])
    return Scan(
        array=array, spacing_mm=spacing, affine=affine, modality="CT", units="HU", source="block"
    )


def test_left_is_on_the_right_and_the_head_is_up():
    axial, coronal, sagittal = _views(block_scan(), None)
    scan = block_scan()
    top = scan.array[-1]
    assert top[50, 70] == 200  # the array itself: left is the high end of x
    assert (coronal.left, coronal.right, coronal.top) == ("R", "L", "S")
    assert (axial.left, axial.right, axial.top) == ("R", "L", "A")
    assert (sagittal.left, sagittal.right) == ("A", "P")
    back = _views(Scan(**{**scan.__dict__, "array": np.roll(scan.array, -20, axis=1)}), None)[1]
    assert back.pixels[0, 70] == 200 and back.pixels[0, 10] == -100  # head up, left at right
    assert back.pixels[-1, 70] == -100


def test_proportions_follow_the_spacing():
    for view in _views(block_scan((5.0, 1.0, 2.0)), None):
        height, width = (n * mm for n, mm in zip(view.pixels.shape, view.mm, strict=True))
        expected = {"axial": (60, 160), "coronal": (100, 160), "sagittal": (100, 60)}
        assert (height, width) == expected[view.name]
        assert view.window == SOFT_TISSUE


def test_the_file_is_a_picture_with_all_panels_and_text(tmp_path):
    path = tmp_path / "out" / "report.png"
    text = "Findings: a $5 <b>lesion</b> {x} of 10 mm. Impression: see above."
    draw_report(block_scan(), text, path, title="block", footer="model x")
    pixels = np.asarray(Image.open(path).convert("L"), dtype=float)
    assert pixels.shape == (900, 1600)
    for rows, columns in ((slice(80, 450), slice(30, 480)), (slice(480, 830), slice(30, 480))):
        assert pixels[rows, columns].std() > 10
    assert pixels[80:300, 980:].std() > 5  # the text column
    assert list(tmp_path.rglob(".*")) == []


def test_a_long_report_stays_on_the_page(tmp_path):
    text = "Findings: " + "There is a very long finding here. " * 400
    draw_report(block_scan(), text, tmp_path / "long.png", title="t" * 60)
    pixels = np.asarray(Image.open(tmp_path / "long.png").convert("L"), dtype=float)
    assert pixels[:, 1590:].std() < 1 and pixels[890:].std() < 3


def test_lung_gets_its_own_window(tmp_path):
    scan = block_scan()
    array = scan.array.copy()
    array[:, 20:40, 20:40] = -850
    views = _views(Scan(**{**scan.__dict__, "array": array}), None)
    assert [view.name for view in views][-1] == "axial, lung window"
