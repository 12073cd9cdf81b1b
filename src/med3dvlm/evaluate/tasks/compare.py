"""Two saved runs on the same studies: does one score higher than the other?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from med3dvlm.evaluate.statistics import paired_test
from med3dvlm.evaluate.tables import Results, Row
from med3dvlm.evaluate.tasks.run import PREDICTIONS

Scores = dict[str, dict[str, float]]  # score -> study -> mean


def compare_runs(first: Path | str, second: Path | str) -> Results:
    """A paired test of every score that two runs of one task have, study by study.

    A study's questions hang together, so each study counts once, with the mean of its scores.

    Raises:
        ValueError: for a folder without a run, runs of two tasks, or on other studies.
    """
    facts = [_facts(folder) for folder in (first, second)]
    if facts[0]["task"] != facts[1]["task"]:
        raise ValueError(
            f"{first} is a run of {facts[0]['task']}, {second} of {facts[1]['task']}: give two of "
            "the same task."
        )
    before, after = (_scores(folder) for folder in (first, second))
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
    return {"score": name, "studies": test.pop("samples"), **test}


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


def _scores(folder: Path | str) -> Scores:
    found: dict[str, dict[str, list[float]]] = {}
    path = Path(folder) / PREDICTIONS
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            sample = json.loads(line)
            for name, value in sample["scores"].items():
                found.setdefault(name, {}).setdefault(sample["study"], []).append(float(value))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: it is no prediction ({error}).") from error
    return {
        name: {study: float(np.mean(values)) for study, values in of.items()}
        for name, of in found.items()
    }
