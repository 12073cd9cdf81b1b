"""Metrics of reports that a model of its own judges: RadGraph-F1, RaTEScore and GREEN.

They come from RadEval (extra `radeval`); their models come from a hub, or from its cache on a
machine without a network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

RADEVAL = {"radgraph": "radgraph_partial", "ratescore": "ratescore", "green": "green"}
"""RadEval's name of each metric and of its score for a pair (RadGraph: entities with relations)."""


def radeval_scorer(name: str) -> Callable[[Sequence[str], Sequence[str]], list[float]]:
    """One of :data:`RADEVAL`, its model loaded: references and candidates -> a score a pair.

    Raises:
        ValueError: if RadEval or the metric's model is not there.
    """
    try:
        judge = import_module("radeval").RadEval(
            metrics=[name], per_sample=True, show_progress=False
        )
    except ImportError as error:
        raise ValueError(
            f"scorer {name!r} needs RadEval ({error}): pip install 'med3dvlm[radeval]'."
        ) from error
    except OSError as error:
        raise ValueError(
            f"the model of scorer {name!r} cannot be loaded ({error}): let RadEval fetch it once "
            "on a machine with a network and copy that machine's HF_HOME."
        ) from error

    def score(references: Sequence[str], candidates: Sequence[str]) -> list[float]:
        return judge(refs=list(references), hyps=list(candidates))[RADEVAL[name]]

    return score
