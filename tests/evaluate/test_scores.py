"""Scores on cases whose answer is known."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from med3dvlm.evaluate import (
    Answered,
    Results,
    closed_table,
    finding_table,
    interval,
    letter_in,
    ranks_of_matches,
    retrieval_table,
    yes_no_table,
)


def unit(n: int, dim: int = 32, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_equal_embeddings_are_found_first():
    x = unit(100)
    for row in retrieval_table(x, x, pools=[50, 100]):
        assert row["R@1"] == 1.0


def test_a_constant_embedding_scores_chance_and_not_the_top():
    x = np.repeat(unit(1), 100, axis=0)
    row = retrieval_table(x, x, pools=[100])[0]
    assert row["R@1"] == 0.0
    assert ranks_of_matches(x @ x.T) == pytest.approx(50.5)


def test_unrelated_embeddings_score_chance():
    rows = retrieval_table(unit(2000, seed=1), unit(2000, seed=2), pools=[100])
    for row in rows:
        assert row["queries"] == 2000
        assert row["R@10"] == pytest.approx(0.1, abs=0.03)
        assert row["chance@10"] == 0.1


def test_a_sibling_series_counts_as_a_hit_when_grouped():
    similarity = np.array([[0.5, 0.9, 0.1], [0.9, 0.5, 0.1], [0.1, 0.2, 0.3]])
    assert ranks_of_matches(similarity).tolist() == [2, 2, 1]
    assert ranks_of_matches(similarity, groups=["a", "a", "b"]).tolist() == [1, 1, 1]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(2, 30), st.integers(0, 5))
def test_recall_grows_with_k_and_does_not_depend_on_the_order(n, seed):
    a, b = unit(n, 8, seed), unit(n, 8, seed + 1)
    order = np.random.default_rng(seed).permutation(n)
    for row, other in zip(
        retrieval_table(a, b, pools=[n]),
        retrieval_table(a[order], b[order], pools=[n]),
        strict=True,
    ):
        assert 0 <= row["R@1"] <= row["R@5"] <= row["R@10"] <= 1
        assert row == pytest.approx(other)


def test_closed_accuracy_by_type():
    answers = [Answered(1, "A", "A"), Answered(1, "B", "A"), Answered(2, "C", "C", choices=2)]
    rows = {row["type"]: row for row in closed_table(answers)}
    assert rows["plane"]["accuracy"] == 0.5 and rows["plane"]["chance"] == 0.25
    assert rows["phase"]["accuracy"] == 1.0 and rows["phase"]["chance"] == 0.5
    assert rows["all"]["questions"] == 3
    assert letter_in("The answer is B. coronal", "B") and not letter_in("Because", "B")


def test_a_model_that_always_says_no_is_seen_through():
    rows = {r["right answer"]: r for r in yes_no_table([True] * 5 + [False] * 5, [False] * 10)}
    assert rows["yes"]["accuracy"] == 0 and rows["no"]["accuracy"] == 1
    assert rows["all"]["accuracy"] == 0.5 and rows["all"]["says yes"] == 0


def test_finding_f1_by_hand():
    truth = [{"a": True, "b": False}, {"a": True, "b": True}, {"a": False, "b": False}]
    said = [{"a": True, "b": True}, {"a": False, "b": True}, {"a": False, "b": False}]
    rows = {row["finding"]: row for row in finding_table(truth, said)}
    assert rows["a"]["precision"] == 1 and rows["a"]["recall"] == 0.5
    assert rows["a"]["F1"] == pytest.approx(2 / 3)
    assert rows["b"]["F1"] == pytest.approx(2 / 3)
    assert rows["micro, all"]["F1"] == pytest.approx(2 / 3)
    assert rows["a"]["F1 by chance"] == pytest.approx(2 / 3)
    assert rows["b"]["F1 always asserted"] == pytest.approx(0.5)


def test_interval_covers_the_mean_and_collapses_without_spread():
    low, high = interval(np.array([0, 1] * 50))
    assert 0.38 < low < 0.5 < high < 0.62
    assert interval(np.ones(10)) == (1.0, 1.0)


def test_tables_are_saved_in_three_forms(tmp_path):
    results = Results({"model": "m"})
    results.add("Closed questions, all", [{"type": "plane", "accuracy": 0.5}])
    results.save(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["model"] == "m"
    assert "| plane | 50.0% |" in (tmp_path / "results.md").read_text()
    with (tmp_path / "closed-questions-all.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"type": "plane", "accuracy": "0.5"}]
