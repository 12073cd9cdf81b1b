"""What a query wants and denies, and how orders are fused."""

from __future__ import annotations

import pytest

from med3dvlm.data.assertions import part_text
from med3dvlm.search.query import asserted_findings, read_words
from med3dvlm.search.rank import fuse


@pytest.mark.parametrize(
    ("text", "wanted", "unwanted", "excluded"),
    [
        ("left pleural effusion", "left pleural effusion", (), ()),
        ("no pneumothorax", "", ("pneumothorax",), ("Pneumothorax",)),
        (
            "pleural effusion without consolidation or lung nodules",
            "pleural effusion",
            ("consolidation", "lung nodules"),
            ("Consolidation", "Lung nodule"),
        ),
        (
            "bilateral effusion without consolidation, portal venous, 2026",
            "bilateral effusion, portal venous, 2026",
            ("consolidation",),
            ("Consolidation",),
        ),
        (
            "without emphysema, atelectasis or ascites, arterial phase",
            "arterial phase",
            ("emphysema", "atelectasis", "ascites"),
            ("Ascites", "Atelectasis", "Emphysema"),
        ),
        ("no effusion", "", ("effusion",), ("Pericardial effusion", "Pleural effusion")),
        (
            "cardiomegaly and no left pleural effusion with gallstones",
            "cardiomegaly, gallstones",
            ("left pleural effusion",),
            (),  # a right one may well be there
        ),
        ("lungs free of nodules", "", ("nodules",), ("Lung nodule",)),
        ("cyst, nodule not seen", "cyst", ("nodule",), ("Lung nodule",)),
        ("hernia but no mass", "hernia", ("mass",), ()),
        ("normal heart size", "normal heart size", (), ()),
        ("no change of the nodule", "no change of the nodule", (), ()),
    ],
)
def test_what_a_query_wants_and_denies(text, wanted, unwanted, excluded):
    words = read_words(text)
    assert (words.wanted, words.unwanted) == (wanted, unwanted)
    assert tuple(sorted(words.excluded)) == excluded


def test_what_a_report_asserts():
    report = (
        "Technique: Axial CT. Findings: No pleural effusion or pneumothorax. Nodule of 12 mm in "
        "the left lower lobe. The heart is normal in size. History of lymphoma. Impression: Nodule."
    )
    asserted, denied = part_text(report)
    assert asserted == (
        "Axial CT\nNodule of 12 mm in the left lower lobe\nThe heart is normal in size\nNodule"
    )
    assert denied == ["pleural effusion", "pneumothorax"]
    assert asserted_findings(report) == ["Lung nodule"]


def test_fusion_is_the_published_formula():
    first, second = [("a", 9.0), ("b", 8.0), ("c", 7.0)], [("c", 0.9), ("d", 0.8)]
    fused = dict(fuse([first, second, []]))
    assert fused["c"] == pytest.approx((1 / 63 + 1 / 61) / (2 / 61))
    assert fused["a"] == pytest.approx(0.5) and fused["d"] == pytest.approx(61 / 62 / 2)
    assert [path for path, _ in fuse([first, second])] == ["c", "a", "b", "d"]
    assert fuse([first]) == first and fuse([[], []]) == []
