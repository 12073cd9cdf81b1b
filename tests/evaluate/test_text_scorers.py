"""Metrics that are models, in runs: every pair is scored once, and BERTScore is one of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from med3dvlm.cli import app
from med3dvlm.data.prepare import prepare_phantoms
from med3dvlm.evaluate.tasks import (
    AlwaysNo,
    Cases,
    evaluate_report,
    evaluate_vqa,
    load_bert_score,
)
from med3dvlm.evaluate.tasks.wording import Wording
from med3dvlm.evaluate.wording import BERT_SCORE, bert_score_f1, wording_scores
from med3dvlm.hub import load
from med3dvlm.scan import Preparation
from tests.evaluate.tiny import tiny_bert

SMALL = Preparation(size=(8, 16, 16))
WORDS = "no the heart liver lung is normal enlarged has a nodule"


class Judge:
    """A scorer that remembers what it was asked."""

    def __init__(self):
        self.calls: list[list[tuple[str, str]]] = []

    def __call__(self, references, texts):
        self.calls.append(list(zip(references, texts, strict=True)))
        return [len(text) / (len(text) + len(reference)) for reference, text in self.calls[-1]]

    @property
    def seen(self) -> list[tuple[str, str]]:
        return [pair for call in self.calls for pair in call]


class Drafter(AlwaysNo):
    """Drafts by the first voxel, so that a study's draft differs from the blank's."""

    label, preparation = "drafter", SMALL

    def see(self, volumes):
        return volumes[:, 0, 0, 0, :1]

    def report(self, seen):
        return [f"the heart is normal in {value:.1f}" for value in seen[:, 0].tolist()]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"), [WORDS])


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scorers") / "store"
    prepare_phantoms(folder, 4, split="test", preparation=SMALL, workers=1)
    return folder


def patients(count: int) -> Cases:
    """Studies with a report and two open questions each; the last report is there twice."""
    reports = [f"the liver has a nodule of {i} mm" for i in range(count - 1)]
    asked = {"kind": "open", "type": 1, "choices": None, "answer_choice": None}
    rows = [
        {
            "id": f"s{i}",
            "case": f"p{i}",
            "report": report,
            "questions": [
                {**asked, "text": f"What is {what}?", "answer": f"the {what} of {i % 3}"}
                for what in ("lung", "liver")
            ],
            "metadata": {"site": "AB"[i % 2]},
        }
        for i, report in enumerate([*reports, reports[-1]])
    ]
    return Cases(rows, SMALL, lambda i: np.full(SMALL.size, 1 + i, np.float32))


def test_a_scorer_sees_a_pair_once_and_is_called_once_a_request():
    judge = Judge()
    wording = Wording(["BLEU-1"], {"judge": judge})
    assert wording.names == ["BLEU-1", "judge"]
    first = wording(["a b", "a b", "c"], ["a b", "a b", "d"])
    assert judge.calls == [[("a b", "a b"), ("c", "d")]]
    assert first["judge"] == [0.5, 0.5, 0.5] and first["BLEU-1"] == pytest.approx([1, 1, 0])
    again = wording(["c", "a", "a b"], ["d", "abc", "a b"])
    assert judge.calls[1:] == [[("a", "abc")]]  # only what is new
    assert again["judge"] == [0.5, 0.75, 0.5]
    assert wording(["c"], ["d"])["judge"] == [0.5] and len(judge.calls) == 2


def test_a_judge_of_reports_sees_no_pair_twice_in_a_whole_run():
    judge, cases = Judge(), patients(5)
    run = evaluate_report(
        Drafter(), cases, scorers={"judge": judge}, controls=4, by="site", batch_size=2
    )
    assert judge.seen and len(set(judge.seen)) == len(judge.seen)
    tables = run.results.to_dict()["tables"]
    drafts = Drafter().report(torch.arange(1.0, 6)[:, None])
    expected = dict(zip(cases.ids, Judge()(cases.reports, drafts), strict=True))
    assert {s["study"]: s["scores"]["judge"] for s in run.samples} == expected
    mean = next(r["mean"] for r in tables["Wording of reports"] if r["metric"] == "judge")
    assert mean == pytest.approx(np.mean(list(expected.values())))
    control = next(r for r in tables["Evidence controls"] if r["score"] == "judge")
    blank = Drafter().report(torch.full((4, 1), float(SMALL.pad_value)))
    assert control["blank"] == pytest.approx(np.mean(Judge()(cases.reports[:4], blank)))
    assert control["scan"] == pytest.approx(np.mean(list(expected.values())[:4]))
    assert [r["site"] for r in tables["By site"] if r["score"] == "judge"] == ["A", "B"]


def test_a_judge_of_open_answers_sees_no_pair_twice_in_a_whole_run():
    judge, cases = Judge(), patients(5)
    run = evaluate_vqa(AlwaysNo(), cases, scorers={"judge": judge}, controls=4, by="site")
    assert judge.seen and len(set(judge.seen)) == len(judge.seen)
    assert judge.calls[0] == [
        (f"the {w} of {i}", "no") for i in range(3) for w in ("lung", "liver")
    ]
    tables = run.results.to_dict()["tables"]
    rows = [(r["type"], r["texts"]) for r in tables["Open questions"] if r["metric"] == "judge"]
    assert rows == [("plane", 10), ("all", 10)]
    for sample in run.samples:
        expected = Judge()([sample["answer"]], ["no"])[0]
        assert sample["scores"]["open judge"] == expected
    assert "open, judge" in {r["score"] for r in tables["Evidence controls"]}


def test_bert_score_stands_beside_the_other_metrics_of_answers(store, encoder, tmp_path):
    arguments = ["--model", "always-no", "--controls", 3, "--bert", encoder, "--bert-layer", 1]
    result = evaluate("vqa", store, *arguments, "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.exception
    tables = json.loads(result.stdout)["tables"]
    samples = [json.loads(s) for s in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    opened = [s for s in samples if s["kind"] == "open"]
    expected = bert_score_f1([s["answer"] for s in opened], ["no"] * len(opened), encoder, layers=1)
    found = [s["scores"][f"open {BERT_SCORE}"] for s in opened]
    assert found == pytest.approx(expected, abs=1e-6)
    rows = {(r["type"], r["metric"]): r for r in tables["Open questions"]}
    assert rows["all", BERT_SCORE]["mean"] == pytest.approx(np.mean(expected), abs=1e-6)
    control = next(r for r in tables["Evidence controls"] if r["score"] == f"open, {BERT_SCORE}")
    assert control["scan"] == control["blank"] and control["chance"] > control["scan"]


def test_bert_score_stands_beside_the_other_metrics_of_reports(encoder):
    cases = patients(4)
    scorers = {BERT_SCORE: load_bert_score(str(encoder))}
    run = evaluate_report(Drafter(), cases, scorers=scorers, controls=3)
    drafts = [s["drafts"]["model"] for s in run.samples]
    expected = wording_scores(cases.reports, drafts, [BERT_SCORE], bert=encoder)[BERT_SCORE]
    assert [s["scores"][BERT_SCORE] for s in run.samples] == pytest.approx(expected, abs=1e-6)
    tables = run.results.to_dict()["tables"]
    names = [r["metric"] for r in tables["Wording of reports"]]
    assert names[-1] == BERT_SCORE and "BLEU-4" in names
    assert BERT_SCORE in {r["score"] for r in tables["Evidence controls"]}


@pytest.mark.parametrize("command", ["report", "vqa"])
def test_an_encoder_that_is_not_there_is_refused_before_anything_is_read(
    command, encoder, tmp_path, monkeypatch
):
    for arguments, message in (
        (["--bert", tmp_path], r"no config\.json there; give the folder of a saved encoder"),
        (["--bert", "nobody's"], "neither a folder here nor a known name"),
        (["--bert", encoder, "--bert-layer", 9], "a layer that it has"),
    ):
        result = evaluate(command, tmp_path / "no.store", *arguments)
        assert result.exit_code == 1
        with pytest.raises((ValueError, OSError), match=message):
            raise result.exception
    assert evaluate(command, tmp_path / "no.store", "--bert-layer", 2).exit_code == 2
    monkeypatch.setitem(sys.modules, "bert_score", None)
    result = evaluate(command, tmp_path / "no.store", "--bert", encoder, "--bert-layer", 2)
    assert result.exit_code == 1 and "pip install 'med3dvlm[evaluate]'" in str(result.exception)


def test_the_command_for_reports_asks_for_bert_score(encoder, tmp_path):
    wanted = load("demo", part="search", device="cpu").preparation
    prepare_phantoms(tmp_path / "store", 2, split="test", preparation=wanted, workers=1)
    result = evaluate("report", tmp_path / "store", "--controls", 0, "--json", "--bert", encoder)
    assert result.exit_code == 0, result.exception
    metrics = {row["metric"] for row in json.loads(result.stdout)["tables"]["Wording of reports"]}
    assert {BERT_SCORE, "ROUGE-L"} <= metrics


def evaluate(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
