"""The finding extractor against sentences written by hand, and against phantoms' truth."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from med3dvlm.data.ct_rate import LABELS
from med3dvlm.data.phantoms import FINDINGS, PHANTOM_TERMS, make_study
from med3dvlm.evaluate import asserted, extract_findings, finding_table
from med3dvlm.evaluate.findings import CT_RATE_TERMS

BENCHMARK = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "finding_extractor.py"))


def statuses(text: str, **terms) -> dict[str, str]:
    return {n: s for n, s in extract_findings(text, **terms).items() if s != "not mentioned"}


def test_all_findings_of_ct_rate_have_terms():
    assert tuple(CT_RATE_TERMS) == LABELS
    assert set(extract_findings("").values()) == {"not mentioned"}


@pytest.mark.parametrize(
    ("part", "bar"), [("tuned", 0.99), ("held-out", 0.95), ("tuned-2", 0.99), ("held-out-2", 0.65)]
)
def test_sentences_written_by_hand_are_read_well(part, bar):
    sentences = BENCHMARK["read_sentences"](part)
    assert len(sentences) >= 20
    assert {f for told in sentences.values() for f in told} == set(LABELS)
    assert BENCHMARK["f1_scores"](part)["micro"] >= bar, BENCHMARK["errors"](part)


def test_phantom_reports_are_read_without_an_error():
    for index in range(200):
        study = make_study(index, split="test")
        truth = {name: study.truth.has(name) for name in FINDINGS}
        read = extract_findings(study.report, PHANTOM_TERMS)
        assert asserted(read) == truth, study.report
        assert "uncertain" not in read.values()


def test_the_terms_of_ct_rate_read_phantom_reports_too():
    shared = [name for name in LABELS if name in FINDINGS]
    assert len(shared) == 10
    for index in range(100):
        study = make_study(index, split="test")
        read = asserted(extract_findings(study.report))
        assert {n for n in read if read[n]} == {n for n in shared if study.truth.has(n)}


def test_scopes_of_negation():
    assert statuses("No pleural effusion, but there is a nodule.") == {
        "Pleural effusion": "absent",
        "Lung nodule": "present",
    }
    assert statuses("A nodule is seen and emphysema is not seen.") == {
        "Lung nodule": "present",
        "Emphysema": "absent",
    }
    assert statuses("Calcified nodule which is not enlarged; heart size is normal.") == {
        "Lung nodule": "present",
        "Cardiomegaly": "absent",
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "Pleural effusion is not seen on the right. However, it is present on the left.",
            "present",
        ),
        ("No pleural effusion is seen, but it is noted that the heart is large.", "absent"),
        ("Pleural effusion: none on the right.", "absent"),
        ("Pleural effusion has not been observed.", "absent"),
        ("The pleural effusion that was seen before has disappeared.", "absent"),
        ("The pleural effusion has partially resolved.", "present"),
        ("Pleural effusion is unlikely to be infected.", "present"),
        ("Post-resection pleural effusion.", "present"),
    ],
)
def test_what_was_denied_or_is_gone(text, expected):
    assert statuses(text)["Pleural effusion"] == expected


def test_what_is_said_in_several_places_is_weighed():
    text = "No consolidation in the right lung. Consolidation in the left lung."
    assert statuses(text) == {"Consolidation": "present"}
    assert statuses("No nodule. A nodule cannot be excluded.") == {"Lung nodule": "uncertain"}


def test_uncertain_findings_count_only_where_asked():
    read = extract_findings("Possible emphysema. No atelectasis. There is bronchiectasis.")
    assert [n for n, there in asserted(read).items() if there] == ["Bronchiectasis"]
    assert [n for n, there in asserted(read, uncertain=True).items() if there] == [
        "Emphysema",
        "Bronchiectasis",
    ]
    rows = finding_table([asserted(read)], [asserted(read, uncertain=True)])
    assert rows[-1]["precision"] == 0.5 and rows[-1]["recall"] == 1
