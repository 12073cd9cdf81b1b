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
    Table,
    baseline_table,
    closed_table,
    crg_table,
    finding_table,
    interval,
    letter_in,
    paired_test,
    places_of_matches,
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


def test_a_constant_embedding_scores_chance_exactly():
    x = np.repeat(unit(1), 100, axis=0)
    row = retrieval_table(x, x, pools=[100])[0]
    for k in (1, 5, 10):
        assert row[f"R@{k}"] == pytest.approx(k / 100) == row[f"chance@{k}"]
    assert places_of_matches(x @ x.T).expected_rank() == pytest.approx(50.5)


def test_a_tie_counts_by_the_share_of_orders_in_which_it_is_a_hit():
    similarity = np.array([[0.5, 0.5, 0.9], [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]])
    places = places_of_matches(similarity)
    assert places.hit_at(1) == pytest.approx([0, 1 / 3, 1])
    assert places.hit_at(2) == pytest.approx([1 / 2, 2 / 3, 1])
    # two matches tie with one rival: the first of three is a match in two orders of three
    both = places_of_matches(np.full((3, 3), 0.5), groups=["a", "a", "b"])
    assert both.hit_at(1) == pytest.approx([2 / 3, 2 / 3, 1 / 3])


def test_broken_embeddings_do_not_pass_for_perfect_ones():
    with pytest.raises(ValueError, match="not all finite"):
        retrieval_table(np.full((5, 3), np.nan), np.full((5, 3), np.nan))
    with pytest.raises(ValueError, match="as many"):
        retrieval_table(unit(5), unit(4))


def test_too_few_studies_for_any_pool_are_one_pool():
    rows = retrieval_table(unit(20), unit(20))
    assert [row["pool"] for row in rows] == [20, 20]
    rows = retrieval_table(unit(250), unit(250), pools=[100, 500])
    assert [(row["pool"], row["pools"], row["queries"]) for row in rows] == [(100, 2, 200)] * 2


def test_chance_of_a_group_is_that_of_any_of_its_members():
    x = unit(4)
    row = retrieval_table(x, unit(4, seed=3), groups=["a", "a", "b", "c"], pools=[4])[0]
    assert row["chance@1"] == pytest.approx((2 / 4 + 2 / 4 + 1 / 4 + 1 / 4) / 4)
    assert retrieval_table(x, x[::-1], groups=["a"] * 4, pools=[4])[0]["chance@1"] == 1


def test_unrelated_embeddings_score_chance():
    rows = retrieval_table(unit(2000, seed=1), unit(2000, seed=2), pools=[100])
    for row in rows:
        assert row["queries"] == 2000
        assert row["R@10"] == pytest.approx(0.1, abs=0.03)
        assert row["chance@10"] == pytest.approx(0.1)
        spread = 1.96 * (row["R@10"] * (1 - row["R@10"]) / 2000) ** 0.5
        assert row["low@10"] == pytest.approx(row["R@10"] - spread, abs=0.003)
        assert row["high@10"] == pytest.approx(row["R@10"] + spread, abs=0.003)


def test_a_sibling_series_counts_as_a_hit_when_grouped():
    similarity = np.array([[0.5, 0.9, 0.1], [0.9, 0.5, 0.1], [0.1, 0.2, 0.3]])
    assert places_of_matches(similarity).expected_rank().tolist() == [2, 2, 1]
    grouped = places_of_matches(similarity, groups=["a", "a", "b"])
    assert grouped.expected_rank().tolist() == [1, 1, 1]


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


def test_the_string_rule_and_the_baselines_of_closed_questions():
    answers = [
        Answered(1, "A", "A", text="A. axial", answer="axial"),
        Answered(1, "C", "A", text="It is C. axial", answer="axial"),
        Answered(1, "A", "B", text="B. sagittal", answer="axial"),
        Answered(5, "D", "D", text="left", answer="left"),
    ]
    rows = {row["type"]: row for row in closed_table(answers)}
    assert rows["plane"]["accuracy"] == pytest.approx(1 / 3)
    assert rows["plane"]["string rule"] == pytest.approx(2 / 3)
    assert rows["plane"]["commonest letter"] == pytest.approx(2 / 3)
    assert rows["plane"]["commonest answer"] == 1
    assert rows["location"]["string rule"] == 0
    assert rows["all"]["accuracy"] == 1 / 2
    assert rows["all"]["commonest letter"] == pytest.approx(3 / 4)
    assert rows["mean of types"]["accuracy"] == pytest.approx((1 / 3 + 1) / 2)
    assert closed_table([]) == [] and yes_no_table([], []) == []


def test_a_model_that_always_says_no_is_seen_through():
    rows = {r["right answer"]: r for r in yes_no_table([True] * 5 + [False] * 5, [False] * 10)}
    assert rows["yes"]["accuracy"] == 0 and rows["no"]["accuracy"] == 1
    assert rows["all"]["accuracy"] == 0.5 and rows["all"]["says yes"] == 0
    uneven = {r["right answer"]: r for r in yes_no_table([True] + [False] * 9, [False] * 10)}
    assert uneven["all"]["accuracy"] == 0.9 == uneven["all"]["always the commoner"]
    assert uneven["balanced"]["accuracy"] == 0.5
    with pytest.raises(ValueError, match="pair up"):
        yes_no_table([True], [])


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


def test_findings_by_chance_are_the_mean_of_random_reports():
    random = np.random.default_rng(0)
    truth = [{"common": i % 10 < 8, "rare": i % 10 == 0} for i in range(50)]
    scores = []
    for _ in range(300):
        columns = {name: random.permutation([t[name] for t in truth]) for name in truth[0]}
        said = [{name: bool(columns[name][i]) for name in columns} for i in range(50)]
        scores.append([row["F1"] for row in finding_table(truth, said)])
    expected = [row["F1 by chance"] for row in finding_table(truth, truth)]
    assert np.mean(scores, axis=0) == pytest.approx(expected, abs=0.02)
    assert expected[-1] == pytest.approx((0.8**2 + 0.1**2) / 0.9)


def test_a_finding_that_never_occurs_is_not_in_the_macro_mean():
    truth = [{"a": True, "b": False}, {"a": False, "b": False}]
    rows = {row["finding"]: row for row in finding_table(truth, [{"a": True}, {"b": True}])}
    assert rows["macro mean"]["F1"] == 1
    assert rows["micro, all"]["F1"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="c"):
        finding_table(truth, [{"c": True}, {}])
    with pytest.raises(ValueError, match="as many"):
        finding_table(truth, [])


def test_never_asserting_is_accurate_and_worthless():
    rows = baseline_table([{"a": i == 0} for i in range(10)])
    never, at_random, always = rows
    assert (never["F1"], never["accuracy"]) == (0, 0.9)
    assert at_random["F1"] == pytest.approx(0.1)
    assert always["F1"] == pytest.approx(2 * 0.1 / 1.1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_scores_stay_in_bounds_and_do_not_depend_on_the_order(pairs):
    def scores(pairs):
        truth, said = [{"a": t} for t, _ in pairs], [{"a": s} for _, s in pairs]
        row = finding_table(truth, said)[-1]
        answers = yes_no_table(*zip(*pairs, strict=True))
        everything = next(row for row in answers if row["right answer"] == "all")
        of_reports = [row[key] for key in row if key not in ("finding", "positives")]
        return [*of_reports, everything["accuracy"]]

    found = scores(pairs)
    assert all(0 <= score <= 1 for score in found if score is not None)
    there = any(truth for truth, _ in pairs)  # without it nothing could be found
    assert [score is None for score in found[:3]] == [not there] * 3
    assert found == pytest.approx(scores(pairs[::-1]))


def test_what_belongs_together_is_drawn_together():
    studies = [f"s{i}" for i in range(40) for _ in range(10)]
    right = np.repeat(np.arange(40) % 2, 10)  # a study's ten questions stand or fall together
    low, high = interval(right, groups=studies)
    apart = interval(right)
    # of 40 and not of 400: the interval is as wide as that of the studies' own scores
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(40), rel=0.15)
    assert high - low > 2.5 * (apart[1] - apart[0])
    answers = [
        Answered(1 + i % 2, "A", "A" if r else "B", study=s)
        for i, (r, s) in enumerate(zip(right, studies, strict=True))
    ]
    rows = closed_table(answers)
    assert rows[-2]["low"] == pytest.approx(low) and rows[-1]["low"] == pytest.approx(low, abs=0.02)
    polar = {
        r["right answer"]: r
        for r in yes_no_table([True] * 400, right.astype(bool).tolist(), studies)
    }
    assert polar["all"]["high"] == pytest.approx(high)


def test_differences_are_shown_in_points_and_p_as_a_number():
    row = {"first": 0.967, "difference": -0.6471, "difference high": 0.05, "p": 0.00021}
    shown = Table("two runs", [row]).to_markdown().splitlines()[-1]
    assert shown == "| 96.7% | -64.7 | +5.0 | 0.00021 |"


def test_interval_covers_the_mean_and_collapses_without_spread():
    low, high = interval(np.array([0, 1] * 50))
    assert 0.38 < low < 0.5 < high < 0.62
    assert interval(np.ones(10)) == (1.0, 1.0)
    assert interval([0, 1, 1], seed=1) == interval([0, 1, 1], seed=1)
    for broken in ([], [1, np.nan]):
        with pytest.raises(ValueError, match="give a list of numbers"):
            interval(broken)


def test_crg_by_hand():
    truth = [{"a": True, "b": False}, {"a": False, "b": False}]
    said = [{"a": True, "b": True}, {"a": False, "b": False}]
    # X = 4, A = 1: r = U = 3/2, s = 3/2 - 1, CRG = 3/2 / (3 - 1/2)
    rows = {row["who"]: row for row in crg_table(truth, said)}
    assert rows["drafted reports"]["CRG"] == pytest.approx(0.6)
    assert rows["never asserts"]["CRG"] == rows["always asserts"]["CRG"] == pytest.approx(1 / 3)
    assert crg_table(truth, truth)[0]["CRG"] == 1
    with pytest.raises(ValueError, match="not defined"):
        crg_table([{"a": False}], [{"a": False}])


def test_the_interval_of_crg_narrows_with_more_studies():
    random = np.random.default_rng(0)
    truth = [{f: bool(random.random() < 0.3) for f in "abc"} for _ in range(400)]
    said = [{f: t[f] if random.random() < 0.7 else not t[f] for f in "abc"} for t in truth]
    few, many = (crg_table(truth[:n], said[:n])[0] for n in (25, 400))
    assert few["low"] < few["CRG"] < few["high"]
    assert few["high"] - few["low"] > 2 * (many["high"] - many["low"])


def test_paired_runs_differ_where_their_samples_do():
    # all 2³ signs: only +++ and --- are as far from 0
    exact = paired_test([0, 0, 0], [1, 1, 1])
    assert exact["p"] == pytest.approx(2 / 8)
    assert (exact["difference"], exact["low"], exact["high"]) == (1, 1, 1)
    hard = np.random.default_rng(0).normal(0, 10, 100)  # samples differ more than runs do
    better = paired_test(hard, hard + np.random.default_rng(1).normal(0.5, 1, 100))
    assert better["p"] < 0.001 and 0 < better["low"] < better["difference"] < better["high"]
    assert paired_test(hard, hard)["p"] == 1
    with pytest.raises(ValueError, match="pair up"):
        paired_test([1, 2], [1])


def test_the_p_value_of_equal_runs_is_below_a_tenth_a_tenth_of_the_time():
    random = np.random.default_rng(0)
    runs = random.normal(size=(200, 2, 20))
    p = [paired_test(a, b, resamples=199)["p"] for a, b in runs]
    assert np.mean(np.array(p) < 0.1) == pytest.approx(0.1, abs=0.06)


def test_tables_are_saved_in_three_forms(tmp_path):
    results = Results({"model": "m"})
    results.add("Closed questions, all", [{"type": "plane", "accuracy": 0.5}])
    results.save(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["model"] == "m"
    assert "| plane | 50.0% |" in (tmp_path / "results.md").read_text()
    with (tmp_path / "closed-questions-all.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"type": "plane", "accuracy": "0.5"}]


def test_a_table_holds_whatever_a_cell_may_be(tmp_path):
    table = Table("t", [{"a|b": "x|y\nz", "n": 3}, {"n": float("nan"), "late": 12.5}])
    assert table.to_markdown().splitlines()[2:] == [
        "| a\\|b | n | late |",
        "| --- | --- | --- |",
        "| x\\|y z | 3 | – |",
        "| – | – | 12.5 |",
    ]
    assert table.to_list()[1] == {"n": None, "late": 12.5}
    assert next(csv.DictReader(table.to_csv().splitlines(True)))["a|b"] == "x|y\nz"
    assert "0.25" in Table("seconds", [{"s": 0.25}], shares=False).to_markdown()
    assert "no rows" in Table("empty", []).to_markdown()


def test_a_title_cannot_lead_out_of_the_folder_nor_hide_another(tmp_path):
    results = Results({"x": float("inf")})
    results.add("../../Up, there", [{"a": 1}])
    results.save(tmp_path / "in")
    assert (tmp_path / "in" / "up-there.csv").is_file() and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="already"):
        results.add("up there", [])
