"""Evidence and calibration as evaluations, with a tiny model on a few phantoms."""

from __future__ import annotations

import numpy as np
import pytest

from med3dvlm.data.phantoms import FINDINGS
from med3dvlm.evaluate.tasks import cases_of_phantoms, evaluate_calibration, evaluate_evidence
from med3dvlm.evaluate.tasks.calibration import (
    Measured,
    fit_calibration,
    same_answer,
    threshold_rows,
)
from med3dvlm.evaluate.tasks.evidence import centre_map, one_lesion
from med3dvlm.hub import load
from tests.models import tiny


def test_studies_have_one_lesion_each_in_turn():
    studies = list(one_lesion(20))
    assert [len(s.truth.findings) for s in studies] == [1] * 20
    assert [s.truth.findings[0].name for s in studies[:18]] == list(FINDINGS)
    assert len({s.study_id for s in studies}) == 20


def test_evidence_is_measured_beside_chance():
    run = evaluate_evidence(tiny.vlm(), tiny.dual(), count=2, slow=1, curve_studies=2)
    rows = {(r["explained"], r["method"]): r for r in run.results.tables[0].rows}
    methods = {"layercam", "grad-cam", "centre", "random", "occlusion", "integrated-gradients"}
    assert {m for e, m in rows if e == "answer"} == methods
    assert rows["search query", "layercam"]["studies"] == 2
    assert rows["answer", "occlusion"]["studies"] == 1
    assert 0 < rows["answer", "random"]["hit"] < 0.2
    assert all(0 <= r["hit"] <= 1 for r in rows.values())


def test_calibration_is_measured_before_and_after():
    model = load("demo", part="language")
    fit, test = (cases_of_phantoms(2, model.preparation, split=s) for s in ("validation", "test"))
    found, run = evaluate_calibration(model, fit, test, weights="0" * 16)
    assert found.facts["sentences"] > 5 and found.vocabulary == "phantoms"
    assert found.temperature > 0
    rows = {r["what"]: r for r in run.results.tables[0].rows}
    assert set(rows) == {"choices", "written answers", "sentences"}
    assert rows["choices"]["samples"] == sum(
        q["kind"] == "closed" for study in test.studies for q in study["questions"]
    )
    assert {s["study"] for s in run.samples} == set(test.ids)


def test_reports_that_name_no_finding_cannot_be_calibrated():
    said = {"right": 1.0, "shares": [0.6, 0.4], "confidence": 0.6}
    measured = Measured(choices=[said], answers=[said], sentences=[])
    with pytest.raises(ValueError, match="no sentences that can be checked"):
        fit_calibration(measured, cases_of_phantoms(1, tiny.PREPARATION), weights="")


def test_lists_are_the_same_in_any_order():
    assert same_answer("Liver, spleen and heart", "heart, liver and spleen.")
    assert not same_answer("liver", "liver and spleen")


def test_the_threshold_says_what_is_kept():
    rows = threshold_rows("x", np.array([0.2, 0.65, 0.95]), np.array([0.0, 0.0, 1.0]))
    by = {row["threshold"]: row for row in rows}
    assert by[0.0]["said"] == 1 and by[0.7]["said"] == pytest.approx(1 / 3)
    assert by[0.7]["right of what is said"] == 1 and by[0.7]["right of what is withheld"] == 0


def test_the_centre_is_in_the_middle():
    values = centre_map((5, 7, 9))
    assert np.unravel_index(values.argmax(), values.shape) == (2, 3, 4) and values.min() == 0
