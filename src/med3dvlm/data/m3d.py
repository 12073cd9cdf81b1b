"""M3D-Cap and M3D-VQA as they are published: slice folders, text.txt, one JSON, some CSVs.

M3D_Cap/{ct_case,ct_quizze}/<case>/<series>/<n>.{png,jpeg}    M3D_Cap/M3D_Cap.json
M3D_Cap/{ct_case,ct_quizze}/<case>/text.txt                   M3D_VQA/M3D_VQA_*.csv
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from med3dvlm.data.sources import REPORT_BYTES, Source, SourceError, absolute, inside, read_table

SHORT = 5  # characters; shorter findings are none
COLUMNS = ("Image Path", "Question", "Answer")
LETTERS = "ABCD"
SPLIT_NAMES = {"val": "validation", "valid": "validation"}


def read_m3d_cap(folder: Path | str) -> list[Source]:
    """The studies that M3D_Cap.json lists, each once, with every split that lists it.

    Args:
        folder: M3D_Cap itself, or the folder that holds it.

    Raises:
        SourceError: if M3D_Cap.json is missing or is not of that form.
    """
    root = _cap_root(folder)
    found: dict[str, Source] = {}
    doubles = []
    for split, rows in _splits(root / "M3D_Cap.json").items():
        for number, row in enumerate(rows, start=1):
            where = f"{root / 'M3D_Cap.json'}, {split}, entry {number}"
            if not isinstance(row, dict) or not isinstance(row.get("image"), str):
                raise SourceError(f'{where}: it is no {{"image": …, "text": …}} object.')
            source = _series(root, row["image"], str(row.get("text") or ""), (split,))
            known = found.setdefault(source.id, source)
            if known is source:
                continue
            if split in known.splits:
                reason = f"{source.path}: {split} lists {source.id} twice; the first is kept."
                doubles.append(replace(source, refusal=reason))
            else:
                found[source.id] = replace(known, splits=(*known.splits, split))
    if not found:
        raise SourceError(f"{root / 'M3D_Cap.json'} lists no study.")
    return [*found.values(), *doubles]


def read_m3d_vqa(folder: Path | str) -> list[Source]:
    """The studies that the M3D-VQA tables ask about, with their questions and their reports.

    Args:
        folder: the folder that holds M3D_Cap and M3D_VQA. Every CSV of M3D_VQA is read; its
            name tells the split (train, val, test) and whether it is the yes/no table (yn).

    Raises:
        SourceError: if there is no table, or one lacks a column.
    """
    folder = absolute(folder)
    root = _cap_root(folder)
    tables = sorted((folder / "M3D_VQA").glob("*.csv"))
    if not tables:
        raise SourceError(f"{folder} holds no M3D_VQA/*.csv: give the folder above M3D_VQA.")
    found: dict[str, Source] = {}
    questions: dict[str, dict[str, dict[str, Any]]] = {}
    refused = []
    for table in tables:
        split = _split_of(table)
        yes_no = re.search(r"(^|_)yn(_|$)", table.stem.lower()) is not None
        for number, row in enumerate(_rows(table), start=2):  # line 1 is the header
            source = _series(root, row["Image Path"] or "", "", (split,))
            known = found.setdefault(source.id, source)
            if split not in known.splits:
                found[source.id] = replace(known, splits=(*known.splits, split))
            of_study = questions.setdefault(source.id, {})
            try:
                asked = _questions(row, yes_no=yes_no)
            except ValueError as error:
                reason = f"{table}, row {number}: {error}"
                refused.append(replace(source, id=f"{source.id}#{number}", refusal=reason))
                continue
            for question in asked:  # the key drops rows that are there twice
                of_study.setdefault(json.dumps(question, sort_keys=True), question)
    return [
        *(replace(s, questions=tuple(questions[s.id].values())) for s in found.values()),
        *refused,
    ]


def report_of(text: str) -> str:
    """The report in a text.txt: `study_findings:`, else `discussion:`, else all of it."""
    _, _, findings = text.partition("study_findings:")
    findings = findings.partition("\ndiscussion:")[0]  # a field that may follow on its own line
    _, _, discussion = text.partition("discussion:")
    for part in (findings, discussion):
        if len("".join(part.split())) >= SHORT:
            return part.strip()
    return text.strip()


def _cap_root(folder: Path | str) -> Path:
    folder = absolute(folder)
    for root in (folder, folder / "M3D_Cap"):
        if (root / "M3D_Cap.json").is_file() or (root / "ct_case").is_dir():
            return root
    raise SourceError(f"{folder} is not M3D-Cap: it holds neither M3D_Cap.json nor ct_case.")


def _splits(path: Path) -> dict[str, list[Any]]:
    try:
        splits = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(splits, dict) or not all(isinstance(rows, list) for rows in splits.values()):
        raise SourceError(f"{path} is not of M3D-Cap's form: it maps splits to lists of entries.")
    return splits


def _series(root: Path, image: str, text: str, splits: tuple[str, ...]) -> Source:
    """One series; the tables may name `M3D_Cap/…`, or a `.npy` where the release has slices."""
    relative = image.replace("\\", "/").strip().strip("/").removeprefix("M3D_Cap/")
    path = root / relative
    if path.suffix == ".npy" and not path.exists():
        path = path.with_suffix("")
        relative = relative.removesuffix(".npy")
    case = Path(relative).parent.name  # ct_case and ct_quizze hold some of the same cases
    source = Source(relative, path, splits=splits, case=case)
    if not relative or not inside(path, root):
        return replace(source, refusal=f"{path}: {image!r} lies outside {root}; correct the table.")
    report_file = root / text.replace("\\", "/").removeprefix("M3D_Cap/") if text else None
    if report_file is None:
        report_file = path.parent / "text.txt"
    report, reason = _report(report_file, root)
    if text and reason:
        return replace(source, refusal=reason)
    return replace(source, report=report)


def _report(path: Path, root: Path) -> tuple[str, str]:
    """The report in a file, and what is wrong with that file if something is."""
    if not inside(path, root):
        return "", f"{path}: it lies outside {root}; correct the table."
    if not path.is_file():
        return "", f"{path}: the text is missing; download it again."
    if path.stat().st_size > REPORT_BYTES:
        return "", f"{path}: it is too long for a report."
    try:
        report = report_of(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "", f"{path}: it is not UTF-8 text; convert it."
    return report, "" if report else f"{path}: the text is empty."


def _split_of(table: Path) -> str:
    words = re.split(r"[^a-z]+", table.stem.lower())
    for word in words:
        if word in ("train", "validation", "val", "valid", "test"):
            return SPLIT_NAMES.get(word, word)
    raise SourceError(f"{table} names no split: call it …_train, …_val or …_test.csv.")


def _rows(table: Path) -> list[dict[str, Any]]:
    rows = read_table(table)
    missing = [column for column in COLUMNS if rows and column not in rows[0]]
    if missing:
        raise SourceError(f"{table} has no column {', '.join(missing)}: M3D-VQA's tables do.")
    return rows


def _questions(row: dict[str, Any], *, yes_no: bool) -> Iterable[dict[str, Any]]:
    """A row of a table as questions: with its choices, and openly; or as yes or no.

    Raises:
        ValueError: if the row makes no question.
    """
    text, answer = (str(row[key] or "").strip() for key in ("Question", "Answer"))
    if not text or not answer:
        raise ValueError("the question or the answer is empty.")
    given = str(row.get("Question Type") or "").strip()
    kind = int(given) if given.isdecimal() else 0
    if yes_no:
        if answer.lower().rstrip(".") not in ("yes", "no"):
            raise ValueError(f"the answer {answer!r} is neither yes nor no.")
        return [_question(text, answer.lower().rstrip("."), "yes_no", kind)]
    choices = [str(row.get(f"Choice {letter}") or "").strip() for letter in LETTERS]
    while choices and not choices[-1]:
        choices.pop()
    letter = str(row.get("Answer Choice") or "").strip().upper()[:1]
    opened = _question(text, answer, "open", kind)
    if not choices:
        return [opened]
    if not all(choices):
        raise ValueError("a choice before others is empty, so their letters are not known.")
    if not letter or letter not in LETTERS[: len(choices)]:
        raise ValueError(f"the answer choice {letter!r} is none of the {len(choices)} choices.")
    return [_question(text, answer, "closed", kind, choices, letter), opened]


def _question(
    text: str,
    answer: str,
    kind: str,
    type_: int,
    choices: list[str] | None = None,
    letter: str | None = None,
) -> dict[str, Any]:
    return {
        "text": text,
        "answer": answer,
        "kind": kind,
        "type": type_,
        "choices": choices,
        "answer_choice": letter,
    }
