"""M3D-Cap and M3D-VQA: phantoms written in that layout, read back, and damaged."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from med3dvlm.data.m3d import read_m3d_cap, read_m3d_vqa, report_of
from med3dvlm.data.phantoms import make_study, write_studies
from med3dvlm.data.sources import SourceError

COUNT = 4


@pytest.fixture
def archive(tmp_path) -> Path:
    write_studies(COUNT, tmp_path, layout="m3d", split="test")
    return tmp_path


def rewrite(path: Path, change) -> None:
    value = json.loads(path.read_text("utf-8"))
    change(value)
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")


def test_reports_and_questions_are_those_of_the_phantoms(archive):
    studies = [make_study(index, split="test") for index in range(COUNT)]
    found = read_m3d_cap(archive)
    assert [source.report for source in found] == [study.report for study in studies]
    assert {source.splits for source in found} == {("test",)}
    assert [source.case for source in found] == [study.study_id for study in studies]
    for source, study in zip(read_m3d_vqa(archive), studies, strict=True):
        assert source.path.is_dir() and source.report == study.report
        for kind in ("closed", "yes_no"):
            asked = [q for q in source.questions if q["kind"] == kind]
            truth = [json.loads(json.dumps(asdict(q))) for q in study.questions if q.kind == kind]
            keys = ("text", "answer", "type", "choices", "answer_choice")
            expected = [{key: q[key] for key in keys} for q in truth]
            assert [{key: q[key] for key in keys} for q in asked] == expected, kind
        opened = [(q["text"], q["answer"]) for q in source.questions if q["kind"] == "open"]
        closed = [(q["text"], q["answer"]) for q in source.questions if q["kind"] == "closed"]
        assert opened == list(dict.fromkeys(closed))


def test_the_archive_may_be_given_with_or_without_the_folder_above(archive):
    assert read_m3d_cap(archive / "M3D_Cap") == read_m3d_cap(archive)


@pytest.mark.parametrize(
    ("text", "report"),
    [
        ("study_findings: Clear lungs.\n", "Clear lungs."),
        ("age: 61\nstudy_findings: Two\nlines here.\ndiscussion: none", "Two\nlines here."),
        ("study_findings: -\ndiscussion: A mass is seen.", "A mass is seen."),
        ("A report without any key.", "A report without any key."),
        ("study_findings:   \n", "study_findings:"),
    ],
)
def test_which_part_of_a_text_is_the_report(text, report):
    assert report_of(text) == report


def test_names_of_the_release_are_found(archive):
    """JSON that still says .npy, with the prefix, non-ASCII names, a study in two splits."""
    table = archive / "M3D_Cap" / "M3D_Cap.json"
    first = archive / "M3D_Cap" / read_m3d_cap(archive)[0].id
    renamed = first.with_name("Achsial_C_Übersicht")
    first.rename(renamed)

    def change(splits):
        case = splits["test"][0]["image"].rsplit("/", 1)[0]
        splits["test"][0]["image"] = f"M3D_Cap/{case}/Achsial_C_Übersicht.npy"
        splits["test500"] = splits["test"][:1]

    rewrite(table, change)
    found = read_m3d_cap(archive)
    assert found[0].path == renamed and found[0].splits == ("test", "test500")
    assert len(found) == COUNT and not any(source.refusal for source in found)


def test_faults_of_an_archive_are_on_its_account(archive):
    root = archive / "M3D_Cap"
    ids = [source.id for source in read_m3d_cap(archive)]
    (root / ids[0]).parent.joinpath("text.txt").unlink()
    (root / ids[1]).parent.joinpath("text.txt").write_text("")
    (root / ids[2]).parent.joinpath("text.txt").write_bytes(b"caf\xe9 in latin-1")

    def change(splits):
        splits["test"].append(splits["test"][3])
        splits["test"].append({"image": "../../etc", "text": "x.txt"})

    rewrite(root / "M3D_Cap.json", change)
    found = read_m3d_cap(archive)
    refused = [source.refusal for source in found if source.refusal]
    for words in ("missing", "empty", "UTF-8", "twice", "outside"):
        assert sum(words in refusal for refusal in refused) == 1, words
    assert len(refused) == 5 and len(found) == COUNT + 2


def test_rows_of_questions_that_say_nothing_are_refused(archive):
    (table,) = [p for p in (archive / "M3D_VQA").glob("*.csv") if "_yn" not in p.name]
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    count = len(read_m3d_vqa(archive)[0].questions)
    rows[0]["Answer"], rows[1]["Answer Choice"] = "", "E"
    rows[3]["Choice A"] = ""  # whose letter is then the next one's
    with table.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows([*rows, rows[2]])
    found = read_m3d_vqa(archive)
    refused = [source for source in found if source.refusal]
    for source, words in zip(refused, ("is empty", "'E'", "a choice before others"), strict=True):
        assert words in source.refusal
    assert len(found[0].questions) == count - 6  # three rows, each asked in two ways


def test_what_is_no_such_archive(tmp_path):
    with pytest.raises(SourceError, match="not M3D-Cap"):
        read_m3d_cap(tmp_path)
    (tmp_path / "M3D_Cap.json").write_text("[1]")
    with pytest.raises(SourceError, match="maps splits"):
        read_m3d_cap(tmp_path)
    (tmp_path / "M3D_Cap.json").write_text('{"train": [3]}')
    with pytest.raises(SourceError, match="entry 1"):
        read_m3d_cap(tmp_path)
    with pytest.raises(SourceError, match=r"no M3D_VQA/\*.csv"):
        read_m3d_vqa(tmp_path)
    (tmp_path / "M3D_VQA").mkdir()
    (tmp_path / "M3D_VQA" / "questions.csv").write_text("Question\nWhy?\n")
    with pytest.raises(SourceError, match="names no split"):
        read_m3d_vqa(tmp_path)
    (tmp_path / "M3D_VQA" / "questions.csv").rename(tmp_path / "M3D_VQA" / "q_test.csv")
    with pytest.raises(SourceError, match="Image Path, Answer"):
        read_m3d_vqa(tmp_path)
