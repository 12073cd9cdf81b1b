"""Confidence: fitted to known truths, saved with the weights, and "cannot tell" when unsure."""

from __future__ import annotations

import json

import numpy as np
import pytest

from med3dvlm.data.phantoms import PHANTOM_TERMS, is_true, make_study
from med3dvlm.evidence import (
    Calibration,
    NoCalibrationError,
    answer_confidence,
    choice_shares,
    rate_report,
    with_withheld,
)
from med3dvlm.evidence.confidence import (
    Rated,
    apply_logistic,
    calibration_error,
    fit_logistic,
    fit_temperature,
    log_odds,
    sentence_features,
)
from med3dvlm.hub import load
from med3dvlm.models import Answer
from med3dvlm.sentences import Sentence, split_report
from tests.models import tiny

REPORT = "Technique: CT.  Findings: Left pleural effusion. No consolidation. The bones are normal."


def calibration(**changed) -> Calibration:
    settings = {
        "weights": "0" * 16,
        "vocabulary": "phantoms",
        "temperature": 2.0,
        "answers": (1.0, 0.0),
        "sentences": (1.0, 0.0, 0.0, 0.0),
    }
    return Calibration(**{**settings, **changed})


def test_a_known_temperature_is_recovered():
    random = np.random.default_rng(0)
    logits = random.normal(0, 2, (4000, 4))
    powers = np.exp(logits)
    true = powers / powers.sum(axis=1, keepdims=True)
    right = [int(random.choice(4, p=p)) for p in true]
    sharper = np.exp(2.5 * logits)
    shares = sharper / sharper.sum(axis=1, keepdims=True)
    assert fit_temperature(shares.tolist(), right) == pytest.approx(2.5, rel=0.06)


def test_the_logistic_fit_is_scikit_learns():
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(1)
    features = random.normal(size=(500, 3))
    right = random.random(500) < 1 / (1 + np.exp(-(features @ [2.0, -1.0, 0.0] + 0.5)))
    found = fit_logistic(features.tolist(), right.tolist())
    theirs = LogisticRegression(C=1 / (2 * 1e-4 * 500), tol=1e-8).fit(features, right)
    assert found == pytest.approx([*theirs.coef_[0], *theirs.intercept_], abs=1e-3)


def test_calibration_lowers_the_calibration_error():
    random = np.random.default_rng(2)
    logits = random.normal(0.5, 1.5, 4000)
    right = random.random(4000) < 1 / (1 + np.exp(-logits))
    over = 1 / (1 + np.exp(-3 * logits))  # three times too sure
    odds = [[log_odds(p)] for p in over]
    after = apply_logistic(odds[:2000], fit_logistic(odds[2000:], right[2000:].tolist()))
    before_error = calibration_error(over[:2000], right[:2000].astype(float))
    assert before_error > 0.1 > 0.05 > calibration_error(after, right[:2000].astype(float))
    assert calibration_error(np.full(10, 0.8), np.repeat([1.0, 0.0], [8, 2]), bins=1) < 1e-9


def test_certain_answers_do_not_break_the_fit():
    found = fit_logistic([[1.0], [2.0], [3.0]], [True, True, True])
    assert np.isfinite(found).all() and apply_logistic([[2.0]], found)[0] > 0.9
    assert log_odds(1.0) == 8 and log_odds(0.0) == -8
    with pytest.raises(ValueError, match="nothing to fit"):
        fit_logistic([], [])


def test_answers_get_the_calibrated_probability():
    given = Answer("A. left", confidence=0.8, choices=[("left", 0.8), ("right", 0.2)])
    shares = choice_shares(calibration(), given)
    assert shares == pytest.approx([2 / 3, 1 / 3])  # 4 : 1 at temperature 2 is 2 : 1
    assert answer_confidence(calibration(), given) == pytest.approx(2 / 3)
    written = Answer("left", confidence=0.8)
    assert answer_confidence(calibration(answers=(1.0, 0.0)), written) == pytest.approx(0.8)
    assert answer_confidence(calibration(answers=(0.0, 0.0)), written) == pytest.approx(0.5)


def test_sentences_have_their_place_and_section():
    found = split_report(REPORT)
    assert [(s.section, s.text) for s in found] == [
        ("Technique", "CT."),
        ("Findings", "Left pleural effusion."),
        ("Findings", "No consolidation."),
        ("Findings", "The bones are normal."),
    ]
    assert all(REPORT[s.start : s.end] == s.text for s in found)
    assert split_report("") == [] and split_report("One. Two")[1].section == ""


def test_a_sentence_is_true_if_its_findings_are_there_and_on_that_side():
    index = next(
        i
        for i in range(200)
        for p in make_study(i).truth.findings
        if p.name == "Pleural effusion" and p.attributes["side"] == "left"
    )
    placed = make_study(index).truth.findings
    assert is_true("There is a left pleural effusion.", placed) is True
    assert is_true("There is a right pleural effusion.", placed) is False
    assert is_true("No pleural effusion.", placed) is False
    assert is_true("The bones are normal.", placed) is None
    report = make_study(index).report
    judged = [is_true(s.text, placed) for s in split_report(report)]
    assert set(judged) == {True, None}  # a study's own report is true


def test_features_turn_round_for_a_denied_finding():
    model, scan = tiny.vlm(), tiny.scan(1)
    visual = model.see(scan)
    texts = ["There is a left pleural effusion.", "No pleural effusion.", "The bones are normal."]
    rows = sentence_features(model, visual, texts, PHANTOM_TERMS)
    yes, _ = model.likelihoods(visual, "Is there pleural effusion?", ["yes", "no"])
    assert rows[0] == pytest.approx([log_odds(yes), 1, 1], abs=1e-3)
    assert rows[1] == pytest.approx([-log_odds(yes), 0, 0], abs=1e-3)
    assert rows[2] is None


def test_cannot_tell_below_the_threshold():
    model = tiny.vlm()
    visual = model.see(tiny.scan(1))
    with pytest.raises(NoCalibrationError, match="evaluate calibration"):
        rate_report(model, visual, REPORT)
    model.calibration = calibration(sentences=(0.0, -2.0, 0.0, 1.0))  # asserting costs
    rated = rate_report(model, visual, REPORT)
    assert [r.confidence is None for r in rated] == [True, False, False, True]
    assert rated[1].confidence == pytest.approx(1 / (1 + np.e), abs=1e-6)
    assert rated[2].confidence == pytest.approx(1 / (1 + 1 / np.e), abs=1e-6)
    assert with_withheld(REPORT, rated, 0.7) == (
        "Technique: [cannot tell]  Findings: [cannot tell] No consolidation. [cannot tell]"
    )
    assert with_withheld(REPORT, rated, 0.2).count("[cannot tell]") == 2  # what cannot be rated
    assert not Rated(Sentence("a", 0, 1), None).withheld(None)


def test_a_calibration_is_saved_and_loaded_with_its_weights(tmp_path):
    model = tiny.vlm()
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    assert load(tmp_path).calibration is None
    made = calibration(weights=model.fingerprint(), facts={"studies": 3})
    made.save(tmp_path)
    assert load(tmp_path).calibration == made
    calibration(weights="f" * 16).save(tmp_path)
    with pytest.warns(UserWarning, match="other weights"):
        assert load(tmp_path).calibration is None
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": -1}))
    with pytest.raises(ValueError, match=r"calibration\.json: it is no calibration"):
        load(tmp_path)
