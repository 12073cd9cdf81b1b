"""Wording metrics in runs: which can be counted here, and scorers that are models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module

import numpy as np

from med3dvlm.evaluate.radiology import RADEVAL, radeval_scorer
from med3dvlm.evaluate.statistics import interval
from med3dvlm.evaluate.tables import Results, Row
from med3dvlm.evaluate.vqa import TYPES
from med3dvlm.evaluate.wording import PAIRWISE, bert_score_f1, read_wordnet, wording_scores
from med3dvlm.hub import resolve

TextScorer = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


class Wording:
    """The metrics of a run. Each sees a pair of a reference and a text once in the whole run.

    Attributes:
        names: of the metrics, in the order of the tables.
    """

    def __init__(self, metrics: Sequence[str], scorers: Mapping[str, TextScorer] | None = None):
        """
        Args:
            metrics: those to count, out of `PAIRWISE`.
            scorers: others by name, which may be models and costly.
        """
        self._scorers = {name: partial(_count, name) for name in metrics} | dict(scorers or {})
        self._known: dict[str, dict[tuple[str, str], float]] = {name: {} for name in self._scorers}
        self.names = list(self._scorers)

    def __call__(self, references: Sequence[str], texts: Sequence[str]) -> dict[str, list[float]]:
        """For each metric the score of every pair; it is called once, with the pairs it lacks."""
        pairs = list(zip(references, texts, strict=True))
        return {name: self._scores(name, pairs) for name in self.names}

    def _scores(self, name: str, pairs: Sequence[tuple[str, str]]) -> list[float]:
        known = self._known[name]
        new = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        if new:
            found = self._scorers[name]([pair[0] for pair in new], [pair[1] for pair in new])
            known.update(zip(new, found, strict=True))
        return [known[pair] for pair in pairs]


def _count(metric: str, references: Sequence[str], texts: Sequence[str]) -> list[float]:
    return wording_scores(references, texts, [metric])[metric]


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


def average_rows(
    scores: Mapping[str, Sequence[float]], *, groups: Sequence[str] | None = None
) -> list[Row]:
    """Each metric's mean with its interval, over groups of texts where they are given."""
    rows: list[Row] = []
    for name, values in scores.items():
        low, high = interval(values, groups=groups)
        mean = float(np.mean(values))
        rows.append({"metric": name, "texts": len(values), "mean": mean, "low": low, "high": high})
    return rows


def average_rows_by_type(
    scores: Mapping[str, Sequence[float]],
    types: Sequence[int | str | None],
    *,
    groups: Sequence[str],
) -> list[Row]:
    """:func:`average_rows` of the texts of each type, and of all."""
    return [
        {"type": name, **row}
        for name, places in places_by_type(types)
        for row in average_rows(
            {metric: [values[i] for i in places] for metric, values in scores.items()},
            groups=[groups[i] for i in places],
        )
    ]


def places_by_type(types: Sequence[int | str | None]) -> list[tuple[str, list[int]]]:
    """(name, places of its questions) for each type that there is, and then for "all"."""
    known = sorted({kind for kind in types if kind is not None}, key=str)
    found = [
        (_type_name(kind), [i for i, other in enumerate(types) if other == kind]) for kind in known
    ]
    return [*found, ("all", list(range(len(types))))]


def _type_name(kind: int | str) -> str:
    return TYPES.get(kind, f"type {kind}") if isinstance(kind, int) else kind


def load_bert_score(
    encoder: str, *, layer: int | None = None, device: str | None = None
) -> TextScorer:
    """BERTScore F1 by an encoder, which is loaded here and tried.

    Args:
        encoder: its folder, or its name on the hub.
        layer: whose output is compared; the last if not given.
        device: where it computes; on a GPU if there is one, if not given.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if bert-score is not installed, or there is no such encoder or layer.
    """
    scorer = partial(bert_score_f1, model=resolve(encoder), layers=layer, device=device)
    try:
        scorer(["heart"], ["heart"])
    except ImportError as error:
        raise ValueError(f"{error}.") from error
    return scorer


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
