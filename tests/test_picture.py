"""The picture: the right way round, at the right proportions, with any text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from med3dvlm.picture import LUNG, SOFT_TISSUE, _arrange, _fit, _sections, _views, draw_report
from med3dvlm.scan import Scan


def block_scan(spacing=(5.0, 1.0, 1.0)) -> Scan:
    """Fat with a bright block at the patient's left, back and top."""
    array = np.full((20, 60, 80), -100, dtype=np.float32)
    array[16:, 45:, 60:] = 300
    affine = np.diag([*spacing[::-1], 1.0])
    return Scan(
        array=array, spacing_mm=spacing, affine=affine, modality="CT", units="HU", source="block"
    )


def drawn(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("L"), dtype=float)


def panel(pixels: np.ndarray, scan: Scan, number: int) -> np.ndarray:
    """The pixels of one view of a drawn page."""
    views = _views(scan, point=(18, 50, 70))
    scale, places = _arrange([view.size_mm for view in views])
    width, height = (round(mm * scale) for mm in views[number].size_mm)
    left, top = (round(p) for p in places[number])
    return pixels[top : top + height, left : left + width]


def test_in_the_picture_the_patients_left_is_on_the_right_and_the_head_is_up(tmp_path):
    scan = block_scan()
    draw_report(scan, "", tmp_path / "a.png", title="", point=(18, 50, 70))
    pixels = drawn(tmp_path / "a.png")
    # per plane: where the bright block must be, as (rows, columns), each -1 (first half) or 1
    for number, (rows, columns) in enumerate([(1, 1), (-1, 1), (-1, 1)]):
        view = panel(pixels, scan, number)
        bright = np.argwhere(view > 245).mean(axis=0) / view.shape - 0.5
        assert np.sign(bright).tolist() == [rows, columns]
        assert np.abs(bright).min() > 0.15
    views = _views(scan)
    assert [view.letters for view in views] == [
        ("R", "L", "A", "P"),
        ("R", "L", "S", "I"),
        ("A", "P", "S", "I"),
    ]


def test_an_unknown_orientation_gets_no_letters():
    for view in _views(replace(block_scan(), orientation="unknown")):
        assert view.letters == ("", "", "", "") and "orientation unknown" in view.name


def test_proportions_follow_the_spacing_at_one_scale():
    views = _views(block_scan((5.0, 1.0, 2.0)))
    sizes = {view.name: view.size_mm for view in views}
    assert sizes == {"Axial": (160, 60), "Coronal": (160, 100), "Sagittal": (60, 100)}
    assert {view.window for view in views} == {SOFT_TISSUE}


@pytest.mark.parametrize(
    "sizes",
    [[(300, 300), (300, 60), (300, 60)], [(400, 300)] * 4, [(9, 900), (9, 900), (1, 1)]],
)
def test_panels_do_not_overlap_nor_leave_their_part_of_the_page(sizes):
    scale, places = _arrange(sizes)
    boxes = [
        (left, top, left + w * scale, top + h * scale)
        for (left, top), (w, h) in zip(places, sizes, strict=True)
    ]
    for i, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 32 and top >= 96 and right <= 936.1 and bottom <= 836.1
        for a, b, c, d in boxes[:i]:
            assert right <= a or c <= left or bottom <= b or d <= top


def test_the_file_is_a_picture_with_all_panels_and_text(tmp_path):
    path = tmp_path / "out" / "report.png"
    text = "Findings: a $5 <b>lesion</b> {x} $\\frac{1}$ of 10 mm. Impression: see above."
    scan = replace(block_scan(), warnings=("a slice is missing",))
    draw_report(
        scan,
        text,
        path,
        title="block $",
        footer="model x",
        point=(18, 50, 70),
        questions=[("Plane?", "axial")],
    )
    pixels = drawn(path)
    assert pixels.shape == (900, 1600)
    for number in range(3):
        assert panel(pixels, scan, number).std() > 10
    assert pixels[80:300, 980:].std() > 5  # the text column
    assert pixels[20:60, 980:].std() > 5  # what it may be used for
    assert list(tmp_path.rglob(".*")) == []


def test_a_long_report_makes_the_page_higher_and_keeps_its_impression(tmp_path):
    text = "Findings: " + "There is a very long finding here. " * 400 + "Impression: The end."
    draw_report(block_scan(), text, tmp_path / "long.png", title="t" * 300, footer="m " * 600)
    pixels = drawn(tmp_path / "long.png")
    assert pixels.shape[0] > 900
    assert pixels[:, 1580:].std() < 1  # within the page
    assert pixels[:-64, 940:968].std() < 1  # and the columns; the foot goes across
    _, lines = _fit(_sections(text))
    assert [line.text for line in lines if line.marked] == ["IMPRESSION", "The end."]


def test_a_text_beyond_any_page_says_so():
    _, lines = _fit(_sections("Findings: " + "word " * 40_000))
    assert "goes on" in lines[-1].text and len(lines) < 400


def test_headings_only_where_a_section_begins():
    lines = _sections("Technique: CT. FINDINGS: No acute findings: none.\nImpression: Normal.")
    assert [line.text for line in lines] == [
        *("TECHNIQUE", "CT.", "FINDINGS", "No acute findings: none.", "IMPRESSION", "Normal."),
    ]


def test_a_word_wider_than_the_column_is_broken():
    _, lines = _fit(_sections("W" * 500))
    assert len(lines) > 5 and "".join(line.text for line in lines) == "W" * 500


def test_lung_gets_its_own_window():
    scan = block_scan()
    array = scan.array.copy()
    array[5, 20:40, 20:40] = -850
    views = _views(replace(scan, array=array))
    (lung,) = [view for view in views if view.window == LUNG]
    assert lung.name == "Axial, lung" and (lung.pixels == array[5]).all()


def test_without_units_the_window_is_that_of_the_values():
    random = np.random.default_rng(0).normal(5000, 100, (20, 60, 80)).astype(np.float32)
    low, high = _views(replace(block_scan(), array=random, units=None, modality="MR"))[0].window
    assert 4700 < low < 4800 and 5200 < high < 5300


@pytest.mark.parametrize("value", [0.0, np.nan])
@pytest.mark.parametrize("units", ["HU", None])
def test_an_empty_volume_is_drawn_too(tmp_path, value, units):
    array = np.full((1, 2, 3), value, np.float32)
    draw_report(replace(block_scan(), array=array, units=units), "", tmp_path / "a.png", title="")
    assert drawn(tmp_path / "a.png").shape == (900, 1600)


def test_a_point_outside_and_a_window_upside_down_are_refused(tmp_path):
    with pytest.raises(ValueError, match="outside"):
        draw_report(block_scan(), "", tmp_path / "a.png", title="", point=(20, 0, 0))
    with pytest.raises(ValueError, match="lowest value comes first"):
        draw_report(block_scan(), "", tmp_path / "a.png", title="", window=(40, -40))
    assert not (tmp_path / "a.png").exists()


def test_an_empty_map_leaves_the_planes_in_the_middle_of_the_scan(tmp_path):
    scan = block_scan()
    evidence = np.zeros(scan.shape, np.float32)
    draw_report(scan, "", tmp_path / "plain.png", title="")
    draw_report(scan, "", tmp_path / "empty.png", title="", evidence=evidence)
    assert np.array_equal(drawn(tmp_path / "plain.png"), drawn(tmp_path / "empty.png"))
    evidence[18, 50, 70] = 1
    draw_report(scan, "", tmp_path / "block.png", title="", evidence=evidence)
    assert not np.array_equal(drawn(tmp_path / "plain.png"), drawn(tmp_path / "block.png"))
