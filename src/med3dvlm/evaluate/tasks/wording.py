"""Wording metrics in runs: which can be counted here, and scorers from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module

import numpy as np

from med3dvlm.evaluate.radiology import RADEVAL, radeval_scorer
from med3dvlm.evaluate.statistics import interval
from med3dvlm.evaluate.tables import Results, Row
from med3dvlm.evaluate.wording import PAIRWISE, read_wordnet

TextScorer = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


def usable_metrics(results: Results) -> list[str]:
    """The wording metrics that can be counted here; what is absent is noted in the results.

    Raises:
        ValueError: if the libraries that count are missing.
    """
    try:
        import nltk
        import rouge_score
        import sacrebleu
    except ImportError as error:
        raise ValueError(
            f"wording is scored with {error.name}, which is not installed: "
            "pip install 'med3dvlm[evaluate]'."
        ) from error
    del nltk, rouge_score, sacrebleu
    try:
        read_wordnet()
    except FileNotFoundError as error:
        note = f"METEOR is absent: {error}"
        if note not in results.notes:
            results.notes.append(note)
        return [name for name in PAIRWISE if name != "METEOR"]
    return list(PAIRWISE)


def average_rows(scores: Mapping[str, Sequence[float]]) -> list[Row]:
    """Each metric's mean with its interval."""
    rows: list[Row] = []
    for name, values in scores.items():
        low, high = interval(values)
        mean = float(np.mean(values))
        rows.append({"metric": name, "texts": len(values), "mean": mean, "low": low, "high": high})
    return rows


def load_scorer(name: str) -> TextScorer:
    """The callable behind `package.module:function`, or one of RadEval's by its name.

    It takes a list of references and one of candidates and returns a number for each pair; what
    it returns is checked when it is called.

    Raises:
        ValueError: for a name of another form, or that leads to nothing callable.
    """
    scorer = radeval_scorer(name) if name in RADEVAL else _imported(name)

    def checked(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
        found = scorer(list(references), list(candidates))
        try:
            values = np.asarray(found, dtype=float)
        except (TypeError, ValueError):
            values = np.array([])
        if values.shape != (len(references),) or not np.isfinite(values).all():
            raise ValueError(
                f"scorer {name!r} returned {type(found).__name__} of {values.size} numbers for "
                f"{len(references)} pairs: it must return one finite number for each."
            )
        return values.tolist()

    return checked


def _imported(name: str) -> Callable:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"scorer {name!r} cannot be loaded ({error}): give {', '.join(RADEVAL)} (RadEval's) or "
            "package.module:function."
        ) from error
    if not callable(found):
        raise ValueError(f"scorer {name!r} is no function: give package.module:function.")
    return found
