"""How well the finding extractor reads sentences written by hand: F1 by kind and part.

    python benchmarks/finding_extractor.py [--errors]

Parts are tuned (their errors were mended) or held out (nothing was): see docs/evaluation.md.
A finding that a sentence is not listed with is not mentioned in it; saying otherwise is an error.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter, defaultdict
from pathlib import Path

from med3dvlm.evaluate.findings import extract_findings

SENTENCES = Path(__file__).parents[1] / "tests" / "evaluate" / "finding_sentences.csv"
PARTS = ("tuned", "held-out", "tuned-2", "held-out-2")


def read_sentences(part: str) -> dict[str, dict[str, str]]:
    """Sentence → {finding: expected status} of one of `PARTS`."""
    sentences: dict[str, dict[str, str]] = defaultdict(dict)
    with SENTENCES.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["part"] == part:
                told = sentences[row["sentence"]]
                if row["finding"]:
                    told[row["finding"]] = row["expected"]
    return dict(sentences)


def errors(part: str) -> list[tuple[str, str, str, str]]:
    """(sentence, finding, expected, read) of everything that is read wrongly."""
    wrong = []
    for sentence, told in read_sentences(part).items():
        for finding, status in extract_findings(sentence).items():
            expected = told.get(finding, "not mentioned")
            if status != expected:
                wrong.append((sentence, finding, expected, status))
    return wrong


def f1_scores(part: str) -> dict[str, float]:
    """F1 of each status, and micro over the three, counted over (sentence, finding) pairs."""
    hits, told, said = Counter(), Counter(), Counter()
    for sentence, expected in read_sentences(part).items():
        told.update(expected.values())
        for finding, status in extract_findings(sentence).items():
            if status != "not mentioned":
                said[status] += 1
                hits[status] += expected.get(finding) == status
    kinds = ("present", "absent", "uncertain")
    scores = {kind: 2 * hits[kind] / max(1, told[kind] + said[kind]) for kind in kinds}
    return {**scores, "micro": 2 * hits.total() / (told.total() + said.total())}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--errors", action="store_true", help="show errors of the tuned parts")
    show = parser.parse_args().errors
    for part in PARTS:
        pairs = sum(map(len, read_sentences(part).values()))
        scores = ", ".join(f"{kind} {score:.3f}" for kind, score in f1_scores(part).items())
        print(f"{part}: {len(read_sentences(part))} sentences, {pairs} findings; F1 {scores}")
    shown = [error for part in PARTS if show and part.startswith("tuned") for error in errors(part)]
    for sentence, finding, expected, status in shown:
        print(f"{finding}: {status}, should be {expected}: {sentence}")
