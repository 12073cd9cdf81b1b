"""Multi-label scores against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest

from med3dvlm.evaluate import classification_table, nearest_corner

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def labelled() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    truth = (random.random((120, 3)) < [0.5, 0.2, 0.1]).astype(int)
    given = np.clip(0.3 * truth * [1, 2, 0] + random.random((120, 3)) * 0.7, 0, 1).round(2)
    return truth, given  # rounded, so that there are ties


@pytest.mark.parametrize("thresholds", ["nearest corner", 0.4, [0.2, 0.5, 0.6]])
def test_every_score_is_scikit_learns(labelled, thresholds):
    from sklearn import metrics

    truth, given = labelled
    rows = classification_table(truth, given, NAMES, thresholds=thresholds, resamples=20)
    assert [row["finding"] for row in rows] == [*NAMES, "mean"]
    for i, row in enumerate(rows[:-1]):
        said = given[:, i] > row["threshold"]
        expected = {
            "AUROC": metrics.roc_auc_score(truth[:, i], given[:, i]),
            "F1": metrics.f1_score(truth[:, i], said),
            "weighted F1": metrics.f1_score(truth[:, i], said, average="weighted"),
            "accuracy": metrics.accuracy_score(truth[:, i], said),
            "precision": metrics.precision_score(truth[:, i], said, zero_division=0),
            "recall": metrics.recall_score(truth[:, i], said),
        }
        assert {score: row[score] for score in expected} == pytest.approx(expected, abs=1e-12)
        for score in expected:
            assert row[f"{score} low"] <= row[f"{score} high"]
    for score in ("AUROC", "weighted F1", "recall"):
        assert rows[-1][score] == pytest.approx(np.mean([row[score] for row in rows[:-1]]))


def test_the_nearest_corner_is_that_of_the_roc_curve(labelled):
    from sklearn.metrics import recall_score

    truth, given = labelled
    distances = []
    for threshold in np.linspace(0, 1, 100):
        said = given[:, 0] > threshold
        hits = recall_score(truth[:, 0], said)
        false = 1 - recall_score(truth[:, 0], said, pos_label=0)
        distances.append((np.hypot(1 - hits, false), -threshold))
    assert nearest_corner(truth[:, 0], given[:, 0]) == pytest.approx(-min(distances)[1])
    # whatever lies between the classes is as near; the last of the hundred is taken
    assert nearest_corner(np.array([0, 1]), np.array([0.2, 0.6])) == pytest.approx(59 / 99)


def test_the_interval_of_auroc_is_as_wide_as_delong_says():
    random = np.random.default_rng(0)
    truth = random.random((300, 1)) < 0.4
    given = 1 / (1 + np.exp(-random.normal(truth * 1.0, 1)))
    row = classification_table(truth, given, ["a"])[0]
    # DeLong, DeLong and Clarke-Pearson, Biometrics 1988
    order = given[truth][:, None] > given[~truth][None]
    there, absent = order.mean(axis=1), order.mean(axis=0)
    error = np.sqrt(there.var(ddof=1) / len(there) + absent.var(ddof=1) / len(absent))
    assert row["AUROC high"] - row["AUROC low"] == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_a_finding_of_one_class_has_no_auroc_and_is_not_in_the_mean():
    truth = np.array([[1, 0], [0, 0], [1, 0], [0, 0]])
    rows = classification_table(truth, np.array([[0.9, 0.2]] * 4), ["a", "never"], resamples=50)
    assert rows[1]["AUROC"] is None and rows[1]["threshold"] == 0.5
    assert rows[1]["accuracy"] == 1 and rows[2]["AUROC"] == rows[0]["AUROC"] == 0.5


@pytest.mark.parametrize(
    ("truth", "given", "message"),
    [
        ([[0, 1]], [[0.1]], "a column per name"),
        ([[0, 2]], [[0.1, 0.2]], "0 and 1"),
        ([[0, 1]], [[0.1, np.nan]], "from 0 to 1"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "empty"),
    ],
)
def test_broken_input_is_refused(truth, given, message):
    with pytest.raises(ValueError, match=message):
        classification_table(truth, given, ["a", "b"])
