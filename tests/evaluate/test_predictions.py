"""`evaluate predictions`: files of texts that any model has written."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from med3dvlm.cli import app
from med3dvlm.evaluate import CT_RATE_TERMS, asserted, extract_findings, finding_table, paired_test
from med3dvlm.evaluate.tasks import read_predictions
from med3dvlm.evaluate.wording import BERT_SCORE, bert_score_f1, wording_scores
from tests.evaluate.tiny import tiny_bert

REPORTS = [
    ("s1", "There is a pleural effusion. Mild emphysema.", "There is a pleural effusion."),
    ("s2", "No pleural effusion. Bronchiectasis is seen.", "Consolidation and bronchiectasis."),
    ("s3", "The lungs are clear.", "The lungs are clear."),
]
PAIRED = "Second run minus first"
ORGANS = ["liver", "lung", "heart", "spleen"]


def reports() -> list[dict]:
    return [dict(zip(("study", "reference", "prediction"), row, strict=True)) for row in REPORTS]


def questions() -> list[dict]:
    """Two open ones of one study, and three closed ones of two types."""
    closed = {"choices": ORGANS, "answer_choice": "B", "reference": "lung", "type": 3}
    return [
        {"study": "s1", "type": 3, "reference": "left lung", "prediction": "the left lung"},
        {"study": "s1", "type": "size", "reference": "12 mm", "prediction": "large"},
        {"study": "s1", **closed, "prediction": "B. lung"},
        {"study": "s2", **closed, "prediction": "the lung"},
        {"study": "s2", **closed, "type": 1, "choices": ORGANS[:2], "prediction": "A. B. both"},
    ]


def write(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row) + "\n" for row in rows)
            return path
        columns = list(dict.fromkeys(column for row in rows for column in row))
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        listed = ({k: json.dumps(v) if k == "choices" else v for k, v in r.items()} for r in rows)
        writer.writerows(listed)
    return path


def run(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def tables_of(*arguments: object) -> dict:
    result = run("predictions", *arguments, "--json")
    assert result.exit_code == 0, result.exception
    return json.loads(result.stdout)["tables"]


def saved(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_the_wording_of_reports_is_that_of_the_metrics(tmp_path):
    file = write(tmp_path / "theirs.jsonl", reports())
    rows = tables_of(file, "-o", tmp_path / "run")["Wording of predictions"]
    _, references, texts = zip(*REPORTS, strict=True)
    expected = wording_scores(references, texts)
    assert [row["metric"] for row in rows] == list(expected)
    for row in rows:
        values = expected[row["metric"]]
        assert row["mean"] == pytest.approx(np.mean(values)) and row["texts"] == 3
        assert row["low"] <= row["mean"] <= row["high"]
    samples = saved(tmp_path / "run")
    assert [s["study"] for s in samples] == ["s1", "s2", "s3"]
    assert [s["scores"]["ROUGE-L"] for s in samples] == pytest.approx(expected["ROUGE-L"])
    assert "Mild emphysema" in (tmp_path / "run" / "report.html").read_text()
    again = tables_of(tmp_path / "run" / "predictions.jsonl")["Wording of predictions"]
    assert again == rows  # what was saved is such a file


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_closed_answers_are_scored_by_their_letter_and_the_others_by_their_words(suffix, tmp_path):
    tables = tables_of(write(tmp_path / f"f{suffix}", questions()), "-o", tmp_path / "run")
    closed = {row["type"]: row for row in tables["Closed questions, string rule"]}
    assert list(closed) == ["plane", "organ", "all"]
    assert [closed[k]["value"] for k in closed] == [1, 0.5, pytest.approx(2 / 3)]
    assert closed["all"]["chance"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 4) / 3)
    assert closed["organ"]["questions"] == 2 and closed["all"]["low"] < 2 / 3
    wording = {(r["type"], r["metric"]): r["mean"] for r in tables["Wording of predictions"]}
    expected = wording_scores(["left lung", "12 mm"], ["the left lung", "large"], ["ROUGE-1"])
    first, second = expected["ROUGE-1"]
    assert wording["organ", "ROUGE-1"] == pytest.approx(first) and first > second
    assert wording["size", "ROUGE-1"] == pytest.approx(second)
    assert wording["all", "ROUGE-1"] == pytest.approx((first + second) / 2)
    scores = [s["scores"].get("closed string rule") for s in saved(tmp_path / "run")]
    assert scores == [None, None, 1, 0, 1]


def test_without_choices_chance_is_not_known(tmp_path):
    rows = [{"reference": "lung", "answer_choice": "A", "prediction": "A. lung"}]
    tables = tables_of(write(tmp_path / "f.jsonl", rows))
    assert list(tables) == ["Closed questions, string rule"]
    assert tables["Closed questions, string rule"][0]["chance"] is None


def test_findings_are_read_out_of_both_texts(tmp_path):
    file = write(tmp_path / "f.jsonl", reports())
    result = run("predictions", file, "--findings", "ct-rate", "--json", "-o", tmp_path / "run")
    results = json.loads(result.stdout)
    truth, said = (
        [asserted(extract_findings(row[column], CT_RATE_TERMS)) for row in reports()]
        for column in ("reference", "prediction")
    )
    expected = finding_table(truth, said)
    assert results["tables"]["Findings of drafted reports"] == expected
    micro = next(row for row in expected if row["finding"] == "micro, all")
    assert (micro["precision"], micro["recall"]) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    scores = {r["score"]: r for r in results["tables"]["Findings, by who drafts"]}
    assert scores["finding F1, micro"]["value"] == pytest.approx(2 / 3)
    assert scores["CRG"]["chance"] == pytest.approx(1 / 3)
    assert "read out of the texts by rules" in results["notes"][-1]
    of_each = [s["scores"]["finding F1 of a report"] for s in saved(tmp_path / "run")]
    assert of_each == pytest.approx([2 / 3, 2 / 3, 1])


def test_findings_without_a_text_to_read_them_in_are_refused(tmp_path):
    file = write(tmp_path / "f.jsonl", questions()[2:])
    result = run("predictions", file, "--findings", "phantoms")
    assert result.exit_code == 1 and "closed questions only" in str(result.exception)
    assert run("predictions", file, "--findings", "chexpert").exit_code == 2


def test_bert_score_and_scorers_are_counted_if_asked_for(tmp_path):
    encoder = tiny_bert(tmp_path, [text for row in REPORTS for text in row[1:]])
    file = write(tmp_path / "f.jsonl", reports())
    extra = ["--bert", encoder, "--bert-layer", 1, "--scorer", f"{__name__}:lengths"]
    rows = tables_of(file, *extra, "--device", "cpu")["Wording of predictions"]
    assert [row["metric"] for row in rows][-2:] == [BERT_SCORE, f"{__name__}:lengths"]
    _, references, texts = zip(*REPORTS, strict=True)
    expected = np.mean(bert_score_f1(references, texts, encoder, layers=1))
    assert rows[-2]["mean"] == pytest.approx(expected, abs=1e-6)
    assert rows[-1]["mean"] == pytest.approx(np.mean([len(text) for text in texts]))


def lengths(references, candidates):
    return [len(text) for text in candidates]


def test_two_files_are_compared_study_by_study(tmp_path):
    better = [{**row, "prediction": row["reference"]} for row in reports()]
    for name, rows in (("a", reports()), ("b", better)):
        file = write(tmp_path / f"{name}.jsonl", rows)
        tables_of(file, "--findings", "ct-rate", "-o", tmp_path / name)
    result = run("compare", tmp_path / "a", tmp_path / "b", "--json")
    assert result.exit_code == 0, result.exception
    tables = json.loads(result.stdout)["tables"]
    rows = {row["score"]: row for row in tables[PAIRED]}
    _, references, texts = zip(*REPORTS, strict=True)
    before, after = (wording_scores(references, t, ["BLEU-1"]) for t in (texts, references))
    expected = paired_test(before["BLEU-1"], after["BLEU-1"])
    assert rows["BLEU-1"]["difference"] == pytest.approx(expected["difference"])
    assert rows["BLEU-1"]["studies"] == 3 and rows["BLEU-1"]["p"] == expected["p"]
    whole = {row["score"]: row for row in tables[f"{PAIRED}, counted over all studies"]}
    micro = whole["finding F1, micro"]
    assert (micro["first"], micro["second"]) == (pytest.approx(2 / 3), 1)


def test_rows_without_a_study_are_each_their_own(tmp_path):
    rows = [{"reference": "a b", "prediction": ""}] * 2
    read = read_predictions(write(tmp_path / "f.csv", rows))
    assert [row.study for row in read.rows] == ["row 1", "row 2"]
    assert {r["mean"] for r in tables_of(tmp_path / "f.csv")["Wording of predictions"]} == {0}


GOOD = '{"reference": "a", "prediction": "b"}\n'
ASKED = '{"reference": "a", "prediction": "b", '


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("f.jsonl", None, r"f\.jsonl cannot be read as a table"),
        ("f.jsonl", "", r"f\.jsonl has no row"),
        ("f.csv", "reference,prediction\n", r"f\.csv has no row"),
        ("f.jsonl", '{"truth": "a", "prediction": "b"}', r"no column reference, only truth, pred"),
        ("f.csv", "a,b\n1,2\n", "no column reference and no prediction, only a, b"),
        ("f.jsonl", f'{GOOD}\n{{"reference": "a",\n', r"f\.jsonl, line 3: it is no JSON"),
        ("f.jsonl", f"{GOOD}[1]\n", r"f\.jsonl, line 2: it is no object"),
        ("f.csv", 'reference,prediction\na,b\n"a,b\n', r"f\.csv, line \d: it is no CSV"),
        ("f.csv", "reference,prediction\na,b\nc\n", "row 2: it has no text as its prediction"),
        ("f.csv", "reference,prediction\na,b,c\n", "row 1: it has more fields than the head"),
        ("f.jsonl", f'{GOOD}{{"reference": "a", "prediction": 3}}', "row 2: it has no text as its"),
        ("f.jsonl", f'{GOOD}{{"reference": " ", "prediction": "b"}}', "row 2: its reference is em"),
        ("f.jsonl", f'{ASKED}"choices": ["a", "b"]}}', "row 1: it has choices, but no answer_choi"),
        ("f.jsonl", f'{ASKED}"choices": "a|b", "answer_choice": "A"}}', "row 1: its choices are"),
        ("f.jsonl", f'{ASKED}"answer_choice": "lung"}}', "'lung' is not the letter of a choice"),
        ("f.jsonl", f'{ASKED}"choices": ["a"], "answer_choice": "B"}}', "one of its 1 choices"),
    ],
)
def test_a_faulty_file_is_one_sentence(name, text, message, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    result = run("predictions", tmp_path / name)
    assert result.exit_code == 1
    with pytest.raises(ValueError, match=message):
        raise result.exception
