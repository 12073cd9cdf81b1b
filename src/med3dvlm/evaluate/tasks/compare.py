"""Two saved runs on the same studies: does one score higher than the other?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from med3dvlm.evaluate.scores import Auroc, Crg, Ratio, difference
from med3dvlm.evaluate.statistics import paired_test
from med3dvlm.evaluate.tables import P_VALUE, Results, Row
from med3dvlm.evaluate.tasks.run import PREDICTIONS

Scores = dict[str, dict[str, float]]  # score -> study -> mean
WholeScore = Ratio | Auroc | Crg


def compare_runs(first: Path | str, second: Path | str) -> Results:
    """A paired test of every score that two runs of one task have, study by study.

    A study's questions hang together, so each study counts once, with the mean of its scores.
    What is no mean over studies (AUROC, micro F1, CRG, accuracy balanced over answers or types of
    questions) is counted on all of them, and its difference has the bootstrap's interval alone.

    Raises:
        ValueError: for a folder without a run, runs of two tasks, or on other studies.
    """
    facts = [_facts(folder) for folder in (first, second)]
    if facts[0]["task"] != facts[1]["task"]:
        raise ValueError(
            f"{first} is a run of {facts[0]['task']}, {second} of {facts[1]['task']}: give two of "
            "the same task."
        )
    samples = [_samples(folder) for folder in (first, second)]
    before, after = (_scores(of) for of in samples)
    shared = [name for name in before if name in after]
    if not shared:
        raise ValueError(f"{first} and {second} have no score in common.")
    rows = [_row(name, before[name], after[name], first, second) for name in shared]
    results = Results(
        {
            "task": facts[0]["task"],
            "first": f"{first} ({facts[0]['model']}, weights {facts[0]['weights']})",
            "second": f"{second} ({facts[1]['model']}, weights {facts[1]['weights']})",
            "p": "two-sided, sign-flip permutation over studies, not corrected for many scores",
        }
    )
    results.add("Second run minus first", rows)
    before, after = (_whole_scores(of) for of in samples)
    if shared := [name for name in before if name in after]:
        rows = [_whole_row(name, before[name], after[name]) for name in shared]
        results.add("Second run minus first, counted over all studies", rows)
    return results


def _row(name: str, before: dict, after: dict, first: Any, second: Any) -> Row:
    alone = sorted(before.keys() ^ after.keys())
    if alone:
        where = first if alone[0] in before else second
        raise ValueError(
            f"{name} was scored on other studies: {len(alone)} are in one run only, such as "
            f"{alone[0]} in {where}; evaluate both on the same."
        )
    studies = sorted(before)
    test = paired_test([before[s] for s in studies], [after[s] for s in studies])
    return {
        "score": name,
        "studies": test["samples"],
        "first": test["first"],
        "second": test["second"],
        "difference": test["difference"],
        "difference low": test["low"],
        "difference high": test["high"],
        P_VALUE: test["p"],
    }


def _facts(folder: Path | str) -> dict[str, Any]:
    path = Path(folder) / "results.json"
    if not path.is_file() or not (Path(folder) / PREDICTIONS).is_file():
        raise ValueError(
            f"{folder} holds no saved run: give the --output of an evaluation, which has "
            f"results.json and {PREDICTIONS}."
        )
    facts = json.loads(path.read_text("utf-8"))
    missing = [key for key in ("task", "model", "weights") if key not in facts]
    if missing:
        raise ValueError(f"{path} has no {missing[0]!r}: it is no run that can be compared.")
    return facts


def _samples(folder: Path | str) -> list[dict[str, Any]]:
    """The predictions, in the order of their studies."""
    found = []
    path = Path(folder) / PREDICTIONS
    lines = path.read_text("utf-8").removesuffix("\n").split("\n")  # a text may hold U+2028
    for number, line in enumerate(lines, start=1):
        try:
            sample = json.loads(line)
            sample["scores"] = {name: float(value) for name, value in sample["scores"].items()}
            sample["study"] = str(sample["study"])
            found.append(sample)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: it is no prediction ({error}).") from error
    return sorted(found, key=lambda sample: sample["study"])


def _scores(samples: Sequence[dict[str, Any]]) -> Scores:
    found: dict[str, dict[str, list[float]]] = {}
    for sample in samples:
        for name, value in sample["scores"].items():
            found.setdefault(name, {}).setdefault(sample["study"], []).append(value)
    return {
        name: {study: float(np.mean(values)) for study, values in of.items()}
        for name, of in found.items()
    }


def _whole_scores(samples: Sequence[dict[str, Any]]) -> dict[str, WholeScore]:
    """Scores that are no means over studies, of whatever the predictions hold."""
    found: dict[str, WholeScore] = {}
    closed, asked = ([s for s in samples if s.get("kind") == kind] for kind in ("closed", "yes_no"))
    if closed:
        found["closed accuracy, mean of types"] = _mean_of_groups(closed, "type")
    if asked:
        found["yes or no, balanced"] = _mean_of_groups(asked, "right")
    labelled = [s for s in samples if "true" in s]
    if labelled:
        true = np.array([s["true"] for s in labelled], dtype=bool)
        if "margins" in labelled[0]:
            margins = np.array([s["margins"] for s in labelled])
            names, counted = labelled[0]["findings"], np.ones_like(true)
            found["AUROC, mean of findings"] = Auroc(names, true, margins, counted)
        if "said" in labelled[0]:
            said = np.array([s["said"] for s in labelled], dtype=bool)
            hits, together = (true & said).sum(axis=1), true.sum(axis=1) + said.sum(axis=1)
            found["finding F1, micro"] = Ratio.of((2 * hits, together))
            found["CRG"] = Crg(true, said)
    return found


def _mean_of_groups(samples: Sequence[dict[str, Any]], key: str) -> Ratio:
    """The mean of the accuracies of the groups of samples that have the same value of `key`."""
    groups = sorted({str(s[key]) for s in samples})
    studies = {study: i for i, study in enumerate(dict.fromkeys(s["study"] for s in samples))}
    above, below = np.zeros((2, len(groups), len(studies)))
    for sample in samples:
        place = groups.index(str(sample[key])), studies[sample["study"]]
        above[place] += sample["given"] == sample["right"]
        below[place] += 1
    return Ratio(above, below)


def _whole_row(name: str, before: WholeScore, after: WholeScore) -> Row:
    mean, low, high = difference([before], [after])
    return {
        "score": name,
        "studies": before.studies,
        "first": before.value(),
        "second": after.value(),
        "difference": mean,
        "difference low": low,
        "difference high": high,
    }
