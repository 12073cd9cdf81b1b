"""Calibration: what it must reach on made-up scores whose truth is known, and what it refuses."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.calibration import calibration_curve

from med3dvlm.evaluate.calibration import (
    Calibration,
    CalibrationError,
    Platt,
    calibration_error,
    calibration_table,
)
from med3dvlm.hub import load, resolve


@pytest.fixture(scope="module")
def scores():
    """Probabilities that are too sure by a factor of 4 in the logit, and shifted."""
    random = np.random.default_rng(0)
    right = random.uniform(0.02, 0.98, 6000)
    return random.random(6000) < right, expit(4 * logit(right) + 2), right


def test_platt_finds_what_was_done_to_the_scores(scores):
    truth, wrong, right = scores
    fitted = Platt.fit(truth[:3000], wrong[:3000])
    assert fitted.slope == pytest.approx(0.25, abs=0.03)
    assert fitted.offset == pytest.approx(-0.5, abs=0.1)
    assert np.abs(fitted(wrong) - right).mean() < 0.02
    assert calibration_error(truth[3000:], wrong[3000:]) > 0.15
    assert calibration_error(truth[3000:], fitted(wrong[3000:])) < 0.03


def test_the_error_is_the_one_of_even_bins(scores):
    truth, wrong, _ = scores
    share, mean = calibration_curve(truth, wrong, n_bins=15)
    counts = np.bincount(np.minimum((wrong * 15).astype(int), 14), minlength=15)
    expected = np.sum(np.abs(share - mean) * counts[counts > 0]) / len(wrong)
    assert calibration_error(truth, wrong) == pytest.approx(expected, abs=1e-9)
    assert calibration_error([1, 1, 0, 0], [1, 1, 0, 0]) == 0


def test_one_class_alone_keeps_the_order_and_stays_finite():
    fitted = Platt.fit(np.zeros(50), np.linspace(0.1, 0.9, 50))
    assert fitted.slope == 1.0 and fitted(np.array([0.5]))[0] < 0.1
    assert np.isfinite(fitted(np.array([0.0, 1.0]))).all()


def test_the_table_has_both_sides_and_their_mean(scores):
    truth, wrong, right = scores
    both = np.column_stack([truth, truth])
    rows = calibration_table(
        both, np.column_stack([wrong, right]), np.column_stack([right, right]), ["a", "b"]
    )
    assert [row["finding"] for row in rows] == ["a", "b", "mean"]
    assert rows[0]["error before"] > 0.15 > 0.03 > rows[0]["error after"]
    assert rows[2]["error before"] == pytest.approx(
        (rows[0]["error before"] + rows[1]["error before"]) / 2
    )
    assert rows[0]["error before low"] < rows[0]["error before"] < rows[0]["error before high"]


def test_a_file_is_read_back_or_refused(tmp_path):
    prompts = (("There is {finding}.", "There is no {finding}."),)
    made = Calibration("m", "w", "p", prompts, {"nodule": Platt(0.5, 1.0)}, Platt(), {"n": 3})
    made.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == made
    given = np.array([[0.2, 0.2]])
    assert made.apply(["Nodule", "mass"], given)[0, 1] == pytest.approx(0.2)
    with pytest.raises(CalibrationError, match="does not exist"):
        Calibration.load(tmp_path / "none.json")
    (tmp_path / "c.json").write_text('{"format": 1}')
    with pytest.raises(CalibrationError, match="is no calibration"):
        Calibration.load(tmp_path / "c.json")


def test_a_model_with_its_calibration_beside_it_is_loaded(tmp_path):
    folder = tmp_path / "search"
    shutil.copytree(resolve("demo") / "dual_encoder", folder)
    dual = load(folder, part="search")
    made_for = (dual.label, dual.fingerprint(), dual.preparation.fingerprint())
    prompts = (("There is {finding}.", "There is no {finding}."),)
    Calibration(*made_for, prompts, {}, Platt(0.5)).save(folder / "findings_calibration.json")
    again = load(folder, part="search")
    assert again.calibration is None
    Calibration.load(folder / "findings_calibration.json").check_model(again)
