"""Runs over a store and over twins, by the command line, against values computed directly."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from med3dvlm.cli import app
from med3dvlm.data.layouts import LAYOUTS, phantom_sources
from med3dvlm.data.phantoms import FINDINGS, PHANTOM_TERMS
from med3dvlm.data.prepare import prepare_phantoms, prepare_sources
from med3dvlm.data.store import Store
from med3dvlm.evaluate import (
    CT_RATE_TERMS,
    Results,
    classification_table,
    extract_findings,
    letter_in,
    paired_test,
    retrieval_table,
    wording_scores,
)
from med3dvlm.evaluate.tasks import (
    AlwaysNo,
    Cases,
    Example,
    QuestionOnly,
    Run,
    Score,
    cases_of_store,
    evaluate_retrieval,
    evaluate_zero_shot,
    load_scorer,
    make_pairs,
    verdict,
)
from med3dvlm.evaluate.tasks.controls import (
    blank_volume,
    control_table,
    other_patients,
    shuffled_volume,
)
from med3dvlm.evaluate.tasks.report import template_report
from med3dvlm.evaluate.tasks.run import EXAMPLES
from med3dvlm.evaluate.tasks.twins import twin_table
from med3dvlm.evaluate.tasks.vqa import answer_conditions, wording_by_chance
from med3dvlm.evaluate.tasks.wording import Wording
from med3dvlm.evaluate.tasks.zero_shot import prompt_margins
from med3dvlm.hub import load
from med3dvlm.scan import Preparation

TEST, TRAIN, CONTROLS = 5, 5, 3
OTHER = Preparation(size=(8, 16, 16))


@pytest.fixture(scope="module")
def dual():
    return load("demo", part="search", device="cpu")


@pytest.fixture(scope="module")
def vlm():
    return load("demo", part="language", device="cpu")


@pytest.fixture(scope="module")
def store(dual, tmp_path_factory) -> Path:
    """Studies of two splits, those of test from two sites."""
    folder = tmp_path_factory.mktemp("runs") / "store"
    test = [
        replace(source, metadata={**source.metadata, "site": "AAB"[number % 3]})
        for number, source in enumerate(phantom_sources(TEST, split="test", seed=0))
    ]
    sources = [*test, *phantom_sources(TRAIN, split="train", seed=0)]
    prepare_sources(
        LAYOUTS["phantoms"],
        sources,
        folder,
        root=Path("phantoms"),
        preparation=dual.preparation,
        workers=1,
    )
    return folder


@pytest.fixture(scope="module")
def volumes(store) -> torch.Tensor:
    opened = Store(store)
    return torch.from_numpy(
        np.stack([opened.volume(int(i)) for i in opened.in_split("test")])
    ).unsqueeze(1)


def run(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def evaluated(folder: Path, *arguments: object) -> dict:
    result = run(*arguments, "--controls", CONTROLS, "--json", "-o", folder)
    assert result.exit_code == 0, result.exception
    return json.loads((folder / "results.json").read_text())


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def by(rows: list[dict], column: str) -> dict:
    return {row[column]: row for row in rows}


@pytest.fixture(scope="module")
def vqa(store, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vqa")
    evaluated(folder, "vqa", store, "--by", "site")
    return folder


# --- questions --------------------------------------------------------------------------------


def test_vqa_scores_are_those_of_the_model_asked_directly(vqa, store, vlm, volumes):
    tables = json.loads((vqa / "results.json").read_text())["tables"]
    with torch.inference_mode():
        seen = vlm.get_visual_tokens(volumes)
    closed, rule, yes_no = [], [], {"yes": [], "no": []}
    opened = Store(store)
    for index in range(TEST):
        for question in opened.study(index)["questions"]:
            row, text = seen[index : index + 1], question["text"]
            if question["kind"] == "closed":
                right = question["answer_choice"]
                closed.append(vlm.ask(row, text, question["choices"])[0] == right)
                asked = vlm.processor.closed_question(text, question["choices"])
                rule.append(letter_in(vlm.ask(row, asked), right))
            elif question["kind"] == "yes_no":
                yes, no = vlm.likelihoods(row, text, ["yes", "no"])
                right = question["answer"]
                yes_no[right].append((yes > no) == (right == "yes"))
    found = by(tables["Closed questions"], "type")["all"]
    assert found["accuracy"] == pytest.approx(np.mean(closed))
    assert found["string rule"] == pytest.approx(np.mean(rule))
    balance = by(tables["Yes or no"], "right answer")
    for answer, correct in yes_no.items():
        assert balance[answer]["accuracy"] == pytest.approx(np.mean(correct))
        assert balance[answer]["questions"] == len(correct)
    written = [s for s in predictions(vqa) if s["kind"] == "open"]
    expected = wording_scores([s["answer"] for s in written], [s["text"] for s in written])
    rows = [r for r in tables["Open questions"] if r["type"] == "all"]
    for row in rows:
        assert row["mean"] == pytest.approx(np.mean(expected[row["metric"]]))


def test_the_controls_of_questions_are_asked_with_a_blank_and_without_the_scan(vqa, store, vlm):
    tables = json.loads((vqa / "results.json").read_text())["tables"]
    rows = by(tables["Evidence controls"], "score")
    with torch.inference_mode():
        blank = vlm.get_visual_tokens(blank_volume(vlm.preparation))
    opened = Store(store)
    correct = [
        vlm.ask(blank, question["text"], question["choices"])[0] == question["answer_choice"]
        for index in range(CONTROLS)
        for question in opened.study(index)["questions"]
        if question["kind"] == "closed"
    ]
    row = rows["closed, all"]
    assert row["blank"] == pytest.approx(np.mean(correct)) and row["studies"] == CONTROLS
    phase = rows["closed, phase"]  # the demo model knows phases, and not from their questions
    assert phase["scan"] == 1
    assert max(phase["blank"], phase["other patient"], phase["shuffled"]) < 1
    assert all(
        r["verdict"] in ("falls", "survives blank", "not above chance") for r in rows.values()
    )
    assert rows["yes or no, balanced"]["low"] <= rows["yes or no, balanced"]["scan"]


def test_results_by_a_column_of_the_metadata(vqa, store):
    rows = json.loads((vqa / "results.json").read_text())["tables"]["By site"]
    samples = [s for s in predictions(vqa) if s["kind"] == "closed"]
    site = {study: Store(store).study(i)["metadata"]["site"] for i, study in studies(store)}
    for name, count in (("A", 4), ("B", 1)):
        row = by([r for r in rows if r["site"] == name], "score")["closed, all"]
        of_site = [s["given"] == s["right"] for s in samples if site[s["study"]] == name]
        assert row["studies"] == count and row["value"] == pytest.approx(np.mean(of_site))


def studies(store: Path) -> list[tuple[int, str]]:
    opened = Store(store)
    return [(int(i), opened.ids[i]) for i in opened.in_split("test")]


def test_the_page_holds_everything_and_runs_nothing(vqa):
    page = (vqa / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 + EXAMPLES  # plots, and a study each
    assert "<script" not in page and "http" not in page
    for text in ("Evidence controls", "survives blank", "Yes or no", "test-000000"):
        assert text in page


def test_text_of_a_report_is_no_markup_on_the_page(tmp_path):
    wicked = "<script>alert(1)</script>"
    made = Run("report", Results({"model": wicked}, notes=[wicked]))
    made.results.add(wicked, [{wicked: wicked}])
    made.examples = [Example(wicked, None, [wicked], [[wicked]])]
    made.save(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") == 8


@pytest.mark.parametrize("model", ["always-no", "question-only"])
def test_control_models_are_right_about_no_pair_of_twins(model, tmp_path):
    result = run("twins", "--model", model, "-n", 54, "-o", tmp_path)
    assert result.exit_code == 0, result.exception
    tables = json.loads((tmp_path / "results.json").read_text())["tables"]
    for title in ("Twins with the finding removed", "Twins with the finding moved"):
        whole = by(tables[title], "finding")["all"]
        assert whole["pairs"] == 54
        assert whole["right on both"] == whole["answer changed"] == 0
    removed = by(tables["Twins with the finding removed"], "finding")["all"]
    # yet on one side it is right about every pair
    assert removed["right on first"] + removed["right on second"] == pytest.approx(1)


def test_always_no_is_exposed_by_polarity(store, tmp_path):
    tables = evaluated(tmp_path, "vqa", store, "--model", "always-no")["tables"]
    rows = by(tables["Yes or no"], "right answer")
    assert (rows["yes"]["accuracy"], rows["no"]["accuracy"]) == (0, 1)
    assert rows["balanced"]["accuracy"] == 0.5
    controls = by(tables["Evidence controls"], "score")
    assert all(row["scan"] == row["blank"] == row["shuffled"] for row in controls.values())
    assert not any(row["verdict"] == "falls" for row in controls.values())


def test_question_only_gives_what_was_commonest_in_training():
    def asked(text, answer, kind="open"):
        return {"text": text, "answer": answer, "kind": kind}

    open_ones = [("Where?", "left"), ("Where?", "left"), ("Where?", "right"), ("A?", "right")]
    others = [("B?", "right", "open"), ("Is it?", "yes", "yes_no"), ("Which?", "b", "closed")]
    control = QuestionOnly(asked(*of) for of in (*open_ones, *others))
    none = torch.zeros(1, 1)
    assert control.write(none, ["Where?", "Never seen?"]) == ["left", "right"]
    assert control.says_yes(none, ["Is it?"]) == [True]
    assert control.choose(none, ["Which?"], [["a", "b"]]) == [1]
    assert control.write(none, ["Which?"], [["a", "b"]]) == ["B. b"]
    with pytest.raises(ValueError, match="--reports"):
        QuestionOnly([])
    with pytest.raises(ValueError, match="drafts no report"):
        AlwaysNo().report(none)


# --- twins ------------------------------------------------------------------------------------


def test_twins_have_one_question_and_two_answers_that_are_true():
    pairs = make_pairs(36)
    removed = [pair for pair in pairs if pair.kind == "removed"]
    assert sorted(pair.finding for pair in removed) == sorted([*FINDINGS, *FINDINGS])
    for pair in pairs:
        (first, second), (one, two) = pair.studies, pair.questions
        assert one.text == two.text and one.choices == two.choices and one.answer != two.answer
        if pair.kind == "removed":
            assert first.truth.has(pair.finding) and not second.truth.has(pair.finding)
            assert (one.answer, two.answer) == ("yes", "no")
            continue
        for study, question in zip(pair.studies, pair.questions, strict=True):
            placed = next(p for p in study.truth.findings if p.name == pair.finding)
            place = placed.attributes[FINDINGS[pair.finding].location]
            assert question.answer.startswith(place) and question.answer in question.choices
            assert len(set(question.choices)) == 4


def test_twins_by_hand():
    def sample(given, finding="Ascites"):
        return {"finding": finding, "right": ["yes", "no"], "given": given, "choices": None}

    rows = by(twin_table([sample(["yes", "no"]), sample(["no", "no"])]), "finding")
    assert rows["Ascites"] == rows["all"] | {"finding": "Ascites"}
    assert rows["all"]["right on both"] == rows["all"]["answer changed"] == 0.5
    assert (rows["all"]["right on first"], rows["all"]["right on second"]) == (0.5, 1)
    assert rows["all"]["guessing"] == 0.25
    changed = twin_table([sample(["no", "yes"])])[-1]
    assert changed["answer changed"] == 1 and changed["right on both"] == 0


def test_twins_of_the_demo_model_are_those_of_the_model_asked_directly(vlm, tmp_path):
    result = run("twins", "-n", 2, "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.exception
    samples = {s["sample"]: s for s in predictions(tmp_path)}
    for pair in make_pairs(2):
        for side, question in enumerate(pair.questions):
            seen = vlm.see(pair.studies[side].scan())
            if question.choices:
                given = vlm.ask(seen, question.text, list(question.choices))[3:]
            else:
                yes, no = vlm.likelihoods(seen, question.text, ["yes", "no"])
                given = "yes" if yes > no else "no"
            assert samples[pair.name]["given"][side] == given


# --- reports ----------------------------------------------------------------------------------


def first_word_is_shared(references, candidates):
    return [
        float(r.split()[0] == c.split()[0]) for r, c in zip(references, candidates, strict=True)
    ]


def test_reports_are_scored_beside_the_simple_drafts(store, vlm, dual, volumes, tmp_path):
    scorer = f"{__name__}:first_word_is_shared"
    tables = evaluated(tmp_path, "report", store, "--scorer", scorer)["tables"]
    opened = Store(store)
    truth = [opened.study(index)["report"] for index in range(TEST)]
    with torch.inference_mode():
        drafts = vlm.report(vlm.get_visual_tokens(volumes))
        images = dual.get_image_features(volumes).numpy()
        pooled = dual.pool_volumes(volumes)
        given = dual.concept_head(pooled).sigmoid().numpy()
    train = [opened.study(int(i))["report"] for i in opened.in_split("train")]
    nearest = [train[k] for k in (images @ dual.embed_texts(train).T).argmax(1)]
    wording = {(row["who"], row["metric"]): row["mean"] for row in tables["Wording of reports"]}
    for who, texts in (("model", drafts), ("nearest report", nearest)):
        for metric, values in wording_scores(truth, texts).items():
            assert wording[who, metric] == pytest.approx(np.mean(values))
    shared = first_word_is_shared(truth, drafts)
    assert wording["model", scorer] == pytest.approx(np.mean(shared))
    there = [
        [opened.study(i)["labels"][opened.labels.index(n)] for n in FINDINGS] for i in range(TEST)
    ]
    said = given[:, [dual.config.concepts.index(name) for name in FINDINGS]] > 0.5
    hits = (np.array(there, bool) & said).sum()
    who = {(row["who"], row["score"]): row for row in tables["Findings, by who drafts"]}
    expected = 2 * hits / (np.sum(there) + said.sum())
    assert who["template", "finding F1, micro"]["value"] == pytest.approx(expected)
    controls = by(tables["Evidence controls"], "score")
    assert controls["finding F1, micro"]["scan"] > controls["finding F1, micro"]["blank"]


@pytest.mark.parametrize("terms", [PHANTOM_TERMS, CT_RATE_TERMS])
def test_a_template_asserts_what_it_is_told_to(terms):
    names = list(terms)
    for chosen in range(len(names)):
        present = [index == chosen for index in range(len(names))]
        found = extract_findings(template_report(names, present), terms)
        assert [status == "present" for status in found.values()] == present


def test_meteor_is_said_to_be_absent(store, tmp_path, monkeypatch):
    monkeypatch.setenv("MED3DVLM_WORDNET", str(tmp_path))
    results = evaluated(tmp_path / "o", "vqa", store, "--model", "always-no", "--limit", 4)
    assert "METEOR is absent" in results["notes"][0] and "wordnet-base" in results["notes"][0]
    assert "METEOR" not in {row["metric"] for row in results["tables"]["Open questions"]}


def test_a_scorer_must_exist_and_return_a_number_for_each_pair():
    with pytest.raises(ValueError, match=r"package.module:function"):
        load_scorer("nowhere.to:find")
    with pytest.raises(ValueError, match="one finite number for each"):
        load_scorer("builtins:zip")(["a", "b"], ["1", "2"])
    with pytest.raises(ValueError, match="one finite number for each"):
        load_scorer("operator:concat")(["1", "2"], ["3"])
    assert load_scorer(f"{__name__}:first_word_is_shared")(["a b", "c"], ["a d", "e"]) == [1, 0]


def test_radeval_s_metrics_are_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "radeval", None)
    with pytest.raises(ValueError, match=r"needs RadEval .*med3dvlm\[radeval\]"):
        load_scorer("green")

    class RadEval:  # RadEval 2.2.1's own signature and answer
        def __init__(self, metrics, per_sample, show_progress):
            if metrics == ["green"]:
                raise OSError("no such model in the cache")
            assert (metrics, per_sample) == (["radgraph"], True)

        def __call__(self, refs, hyps):
            scores = [float(one == other) for one, other in zip(refs, hyps, strict=True)]
            return {"radgraph_simple": [], "radgraph_partial": scores, "radgraph_complete": []}

    monkeypatch.setitem(sys.modules, "radeval", SimpleNamespace(RadEval=RadEval))
    assert load_scorer("radgraph")(["a", "b"], ["a", "c"]) == [1, 0]
    with pytest.raises(ValueError, match=r"model of scorer 'green'.*HF_HOME"):
        load_scorer("green")


# --- retrieval and zero-shot ------------------------------------------------------------------


def test_retrieval_is_that_of_the_embeddings_and_a_blank_falls_to_chance(
    store, dual, volumes, tmp_path
):
    tables = evaluated(tmp_path, "retrieval", store, "--by", "site")["tables"]
    with torch.inference_mode():
        images = dual.get_image_features(volumes).numpy()
    texts = dual.embed_texts([Store(store).study(index)["report"] for index in range(TEST)])
    for found, row in zip(
        tables["Retrieval, own pair only"], retrieval_table(images, texts), strict=True
    ):
        numbers = [key for key in row if key != "direction"]
        assert found["direction"] == row["direction"]
        assert [found[key] for key in numbers] == pytest.approx([row[key] for key in numbers])
    for row in tables["Evidence controls"]:
        assert row["blank"] == pytest.approx(row["chance"])
    assert by(tables["Evidence controls"], "score")["R@1 text to scan"]["verdict"] == "falls"
    assert [r["studies"] for r in tables["By site"]] == [4] * 6 + [1] * 6
    assert len(predictions(tmp_path)) == TEST


def test_studies_that_share_a_report_are_hits_where_that_is_asked(store, dual):
    cases = cases_of_store(Store(store), "test")
    twice = cases.only([0, 1, 2, 0])
    twice.studies[3]["id"] = "sibling"
    made = evaluate_retrieval(dual, twice, controls=0).results.to_dict()["tables"]
    own, shared = made["Retrieval, own pair only"], made["Retrieval, a shared report counts"]
    assert own[0]["R@1"] <= 0.75  # of two with one text, half each
    assert shared[0]["R@1"] == pytest.approx(own[0]["R@1"] + 0.25)
    assert shared[0]["chance@1"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4 + 2 / 4) / 4)


def test_zero_shot_is_the_softmax_over_two_prompts(store, dual, volumes, tmp_path):
    tables = evaluated(tmp_path, "zero-shot", store)["tables"]
    with torch.inference_mode():
        images = dual.get_image_features(volumes).numpy()
    scale = dual.loss.t_prime.exp().item()
    there, absent = (
        np.exp(scale * images @ dual.embed_texts([f"{start} {n.lower()}." for n in FINDINGS]).T)
        for start in ("There is", "There is no")
    )
    opened = Store(store)
    truth = opened.label_matrix()[:TEST, [opened.labels.index(name) for name in FINDINGS]]
    expected = classification_table(truth, there / (there + absent), list(FINDINGS))
    for found, row in zip(tables["Findings from prompts"], expected, strict=True):
        for score in ("AUROC", "F1", "weighted F1", "accuracy", "precision", "recall"):
            assert found[score] == pytest.approx(row[score])
    controls = by(tables["Evidence controls"], "score")
    for score in ("AUROC", "F1", "weighted F1", "accuracy", "precision", "recall"):
        assert f"{score}, mean of findings" in controls
    assert controls["AUROC, mean of findings"]["blank"] == pytest.approx(0.5)  # the same for all
    head = by(tables["Evidence controls, findings from the concept head"], "score")
    each = [row for score, row in head.items() if score.startswith("AUROC, ")]
    assert len(each) > 3 and all(row["blank"] == pytest.approx(0.5) for row in each)


def test_scans_far_from_the_threshold_are_still_ranked():
    images = np.eye(4, 8, dtype=np.float32)
    prompts = (np.zeros((1, 8), np.float32), np.zeros((1, 8), np.float32))
    prompts[0][0, :4] = 0.20, 0.21, 0.22, 0.23  # 20 to 23 at CLIP's scale of 100
    model = SimpleNamespace(loss=SimpleNamespace(log_scale=torch.tensor(100.0).log()))
    margins = prompt_margins(model, images, prompts)
    assert margins[:, 0] == pytest.approx([20, 21, 22, 23], rel=1e-4)
    truth = np.array([[0], [0], [1], [1]])
    table = classification_table(truth, 1 / (1 + np.exp(-margins)), ["a"], scores=margins)
    assert table[0]["AUROC"] == 1


class Yes:
    """Says yes to all."""

    def says_yes(self, seen, questions):
        return np.ones(len(questions), bool)

    def write(self, seen, questions, choices=None):
        return ["a nodule"] * len(questions)


@pytest.mark.parametrize("order", [("yes_no", "open"), ("open", "yes_no")])
def test_a_question_of_two_kinds_in_the_same_words_is_asked_of_the_blank_as_either(order):
    asked = {"text": "Is there a nodule?", "type": 4, "choices": None, "answer_choice": None}
    questions = [
        {**asked, "kind": kind, "answer": "yes" if kind == "yes_no" else "a nodule"}
        for kind in order
    ]
    cases = SimpleNamespace(studies=[{"id": "a", "questions": questions}])
    seen = {"scan": torch.zeros(1, 1), "blank": torch.zeros(1, 1)}
    for samples in answer_conditions(Yes(), cases, seen).values():
        assert by(samples, "kind")["yes_no"]["scores"] == {"yes_no accuracy": 1.0}
        assert by(samples, "kind")["open"]["text"] == "a nodule"


def test_by_chance_an_answer_about_another_study_is_given():
    def sample(study: str, kind: int, answer: str) -> dict:
        return {"study": study, "type": kind, "answer": answer}

    alone = [sample("a", 1, "the liver"), sample("a", 1, "the spleen"), sample("a", 2, "axial")]
    assert wording_by_chance(alone, Wording(["BLEU-1"])) == {}
    two = [*alone, sample("b", 1, "the liver")]
    expected = wording_scores(
        ["the liver", "the spleen", "the liver"], ["the liver"] * 3, ["BLEU-1"]
    )
    assert wording_by_chance(two, Wording(["BLEU-1"])) == pytest.approx(
        {"BLEU-1": np.mean(expected["BLEU-1"])}
    )


# --- controls ---------------------------------------------------------------------------------


def test_when_a_score_survives_its_volume():
    scan = Score("s", 0.8, 0.75, 0.85, chance=0.25)
    assert verdict(scan, Score("s", 0.3, 0.25, 0.35)) == "falls"
    assert verdict(scan, Score("s", 0.7, 0.6, 0.76)) == "survives blank"  # the intervals meet
    assert verdict(scan, Score("s", 0.9, 0.87, 0.93)) == "survives blank"
    assert verdict(scan, Score("s", 0.6, 0.55, 0.65)) == "survives blank"  # 64% of the margin
    assert verdict(scan, Score("s", 0.5, 0.45, 0.55)) == "falls"  # 45%
    assert verdict(Score("s", 0.2, 0.1, 0.3, chance=0.25), scan) == "not above chance"
    assert verdict(Score("s", 0.8), Score("s", 0.8)) == "survives blank"
    rows = control_table(lambda condition, _: [Score("s", float(condition == "scan"))], 3)
    assert rows[0]["scan"] == 1 and rows[0]["blank"] == rows[0]["other patient"] == 0
    assert rows[0]["verdict"] == "falls" and rows[0]["studies"] == 3


def test_a_shuffled_volume_keeps_its_voxels_and_follows_the_seed():
    volume = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)
    mixed = shuffled_volume(volume, 3, 1)
    assert not np.array_equal(mixed, volume)
    assert np.array_equal(np.sort(mixed, axis=None), np.sort(volume, axis=None))
    assert np.array_equal(mixed, shuffled_volume(volume, 3, 1))
    assert not np.array_equal(mixed, shuffled_volume(volume, 3, 2))


def made_up(patients: list[str], reports: list[str]) -> Cases:
    rows = [
        {"id": f"s{i}", "case": p, "report": r, "questions": [], "metadata": {}}
        for i, (p, r) in enumerate(zip(patients, reports, strict=True))
    ]
    return Cases(rows, OTHER, lambda index: np.zeros(OTHER.size, np.float32))


def test_another_patient_is_another_patient():
    cases = made_up(["p", "p", "q", "r", "r"], ["a", "b", "a", "c", "d"])
    for seed in range(5):
        for index, other in enumerate(other_patients(cases, seed)):
            assert cases.patient(other) != cases.patient(index)
            assert cases.reports[other] != cases.reports[index]
    assert other_patients(cases, 1) == other_patients(cases, 1)
    with pytest.raises(ValueError, match="--controls 0"):
        other_patients(made_up(["p", "p"], ["a", "b"]), 0)


# --- two runs ---------------------------------------------------------------------------------


def test_two_runs_are_compared_study_by_study(vqa, store, tmp_path):
    evaluated(tmp_path / "b", "vqa", store, "--model", "question-only")
    result = run("compare", vqa, tmp_path / "b", "--json", "-o", tmp_path / "c")
    assert result.exit_code == 0, result.exception
    rows = by(json.loads(result.stdout)["tables"]["Second run minus first"], "score")
    means = []
    for folder in (vqa, tmp_path / "b"):
        of: dict[str, list[bool]] = {}
        for s in predictions(folder):
            if s["kind"] == "closed":
                of.setdefault(s["study"], []).append(s["given"] == s["right"])
        means.append([np.mean(of[study]) for study in sorted(of)])
    expected = paired_test(*means)
    row = rows["closed accuracy"]
    assert row["studies"] == TEST and row["p"] == expected["p"]
    assert row["difference"] == pytest.approx(np.mean(means[1]) - np.mean(means[0]))
    assert (tmp_path / "c" / "second-run-minus-first.csv").is_file()
    whole = by(
        json.loads(result.stdout)["tables"]["Second run minus first, counted over all studies"],
        "score",
    )
    of_runs = [json.loads((f / "results.json").read_text()) for f in (vqa, tmp_path / "b")]
    balanced = [by(of["tables"]["Yes or no"], "right answer")["balanced"] for of in of_runs]
    row = whole["yes or no, balanced"]
    assert [row["first"], row["second"]] == pytest.approx([r["accuracy"] for r in balanced])
    assert row["difference low"] <= row["difference"] <= row["difference high"]
    evaluated(tmp_path / "short", "vqa", store, "--model", "always-no", "--limit", 4)
    refused = run("compare", vqa, tmp_path / "short")
    assert refused.exit_code == 1 and "other studies" in str(refused.exception)
    run("twins", "--model", "always-no", "-n", 2, "-o", tmp_path / "t")
    refused = run("compare", vqa, tmp_path / "t")
    assert refused.exit_code == 1 and "of the same task" in str(refused.exception)
    refused = run("compare", vqa, tmp_path)
    assert refused.exit_code == 1 and "holds no saved run" in str(refused.exception)


# --- bad input --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--split", "validation"), "its splits are test, train"),
        (("--by", "hospital"), "these studies have .*modality.*site"),
    ],
)
def test_wrong_options_name_what_there_is(store, arguments, message):
    for command in ("vqa", "report", "retrieval", "zero-shot"):
        result = run(command, store, *arguments)
        assert result.exit_code == 1
        with pytest.raises(ValueError, match=message):
            raise result.exception


def test_a_store_that_was_prepared_otherwise_is_refused(tmp_path):
    prepare_phantoms(tmp_path / "s", 2, split="test", preparation=OTHER, workers=1)
    for command in ("vqa", "report", "retrieval", "zero-shot"):
        result = run(command, tmp_path / "s")
        assert result.exit_code == 1 and "preparations differ" in str(result.exception)
        assert "size: [8, 16, 16] against [64, 96, 128]" in str(result.exception)
    # one that looks at no volume takes any
    assert run("vqa", tmp_path / "s", "--model", "always-no", "--controls", 0).exit_code == 0
    result = run("vqa", tmp_path / "s", "--model", "question-only")
    assert result.exit_code == 1 and "--reports" in str(result.exception)


def test_what_is_missing_is_said(dual):
    with pytest.raises(ValueError, match="labels of a known vocabulary"):
        evaluate_zero_shot(dual, made_up(["p"], ["a"]))
    with pytest.raises(ValueError, match="no study has a report"):
        evaluate_retrieval(dual, made_up(["p"], [""]))


def test_leaking_studies_are_out_unless_they_are_asked_for(store, tmp_path):
    folder = tmp_path / "leaky"
    shutil.copytree(store, folder)
    opened = Store(store)
    ids = opened.ids[0], opened.ids[TEST]
    with (folder / "crossings.csv").open(newline="") as file:
        columns = next(csv.reader(file))
    values = {"first": ids[1], "second": ids[0], "first_split": "train", "second_split": "test"}
    values |= {"kind": "identical", "similarity": "1.0"}
    with (folder / "crossings.csv").open("a", newline="") as file:
        csv.writer(file).writerow([values[column] for column in columns])
    without = cases_of_store(Store(folder), "test")
    assert ids[0] not in without.ids and without.facts["held back"] == 1
    assert (
        cases_of_store(Store(folder), "test", leaks=True).ids == cases_of_store(opened, "test").ids
    )
