"""What can be measured of a trained run, with the evaluation's own parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from med3dvlm.evaluate.scores import Auroc, Ratio, Score

if TYPE_CHECKING:
    from med3dvlm.data.store import Store

BATCH = 32
LARGE = "size=large"
RETRIEVAL_RANKS = (1, 5, 10)


@dataclass(frozen=True)
class Measure:
    """Attributes:
    stages: of the runs that it is for.
    take: the scores of the model in a folder, on the held-out store; of its studies the first
        `asked` where the measure is slow.
    """

    stages: Sequence[str]
    take: Callable[[Path, Store, int], dict[str, Score]]


def retrieval(folder: Path, store: Store, asked: int) -> dict[str, Score]:
    """R@1, 5 and 10, the mean of both directions; all studies are one pool."""
    from med3dvlm.evaluate.tasks import cases_of_store, evaluate_retrieval
    from med3dvlm.hub import load

    cases = cases_of_store(store, "test", leaks=True)
    dual = load(folder, part="search")
    run = evaluate_retrieval(dual, cases, controls=0, batch_size=BATCH)  # type: ignore[arg-type]
    hits = [sample["scores"] for sample in run.samples]
    return {
        f"R@{k}": Ratio.mean(
            [(of[f"R@{k} scan to text"] + of[f"R@{k} text to scan"]) / 2 for of in hits],
            chance=k / len(cases),
        )
        for k in RETRIEVAL_RANKS
    }


def findings(folder: Path, store: Store, asked: int) -> dict[str, Score]:
    """Mean AUROC of the concept head: of all findings, of small and of large lesions.

    Lesions are the findings that have a size in mm; small ones lie in the lower half of its range
    and are told from studies without that finding, as are large ones.
    """
    from med3dvlm.evaluate.tasks import cases_of_store
    from med3dvlm.evaluate.tasks.controls import SCAN, look
    from med3dvlm.evaluate.tasks.report import concept_logits
    from med3dvlm.evaluate.tasks.retrieval import see_with
    from med3dvlm.hub import load

    cases = cases_of_store(store, "test", leaks=True)
    dual = load(folder, part="search")
    seen = look({"search": see_with(dual)}, cases, batch_size=BATCH)["search"][SCAN]  # type: ignore[arg-type]
    names, truth = list(cases.terms or {}), cases.finding_matrix()
    given = concept_logits(dual, seen, names)  # type: ignore[arg-type]
    columns = {label: place for place, label in enumerate(cases.labels)}
    lesions = [name for name in names if f"{name}/{LARGE}" in columns]
    places = [names.index(name) for name in lesions]
    assert cases.truth is not None
    large = cases.truth[:, [columns[f"{name}/{LARGE}"] for name in lesions]]
    there, said = truth[:, places], given[:, places]
    return {
        "AUROC": Auroc(names, truth, given, np.ones_like(truth)),
        "AUROC, small lesions": Auroc(lesions, there, said, ~large),
        "AUROC, large lesions": Auroc(lesions, there, said, large | ~there),
    }


def language(folder: Path, store: Store, asked: int) -> dict[str, Score]:
    """Finding F1 and METEOR of drafted reports; closed and yes/no questions by likelihood."""
    from med3dvlm.evaluate.report import micro_f1
    from med3dvlm.evaluate.tasks import LanguageModel, cases_of_store
    from med3dvlm.evaluate.tasks.controls import SCAN, look
    from med3dvlm.evaluate.tasks.report import draft
    from med3dvlm.evaluate.tasks.vqa import answer_conditions
    from med3dvlm.evaluate.wording import wording_scores
    from med3dvlm.hub import load

    cases = cases_of_store(store, "test", limit=asked, leaks=True)
    answerer = LanguageModel(load(folder, part="language"))  # type: ignore[arg-type]
    seen = look({"language": answerer.see}, cases, batch_size=BATCH)["language"]
    drafts = draft(answerer, seen[SCAN], batch_size=BATCH)
    true, said = cases.finding_matrix(), cases.said(drafts)
    answered = answer_conditions(answerer, cases, seen, written=False)[SCAN]
    closed, yes, no = (np.zeros((2, len(cases))) for _ in range(3))  # right answers, questions
    chances = []
    for sample in answered:
        of = {"yes": yes, "no": no}.get(sample["right"], closed)
        of[:, sample["index"]] += (sample["given"] == sample["right"], 1)
        if sample["kind"] == "closed":
            chances.append(1 / len(sample["choices"]))
    f1 = 2 * (true & said).sum(axis=1), true.sum(axis=1) + said.sum(axis=1)
    return {
        "finding F1": Ratio.of(f1, chance=micro_f1(true, said)[3]),
        "METEOR": Ratio.mean(wording_scores(cases.reports, drafts, ("METEOR",))["METEOR"]),
        "closed questions": Ratio.of((closed[0], closed[1]), chance=float(np.mean(chances))),
        "yes or no, balanced": Ratio.of((yes[0], yes[1]), (no[0], no[1]), chance=0.5),
    }


MEASURES = {
    "retrieval": Measure(("contrastive",), retrieval),
    "findings": Measure(("contrastive",), findings),
    "language": Measure(("alignment", "instruction"), language),
}
