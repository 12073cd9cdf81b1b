"""The figures of a model on held-out phantoms: retrieval, questions, reports, each with chance.

Every volume is encoded once per encoder; the same studies serve all three tasks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from med3dvlm.data.phantoms import FINDINGS, PHANTOM_VERSION, find_findings, make_study
from med3dvlm.data.sources import Progress
from med3dvlm.evaluate.report import finding_table
from med3dvlm.evaluate.retrieval import retrieval_table
from med3dvlm.evaluate.tables import Results
from med3dvlm.evaluate.vqa import Answered, closed_table, yes_no_table
from med3dvlm.models import Med3DVLM, VolumeTextDualEncoder

CAVEAT = "generated phantoms, the same generator as in training; no patients"


def evaluate_on_phantoms(
    dual: VolumeTextDualEncoder,
    vlm: Med3DVLM,
    *,
    count: int = 500,
    seed: int = 0,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Results:
    """Retrieval at 100 and more, closed and yes/no questions, and finding F1 of drafted reports.

    Args:
        count: the first so many studies of the split `test`.
        seed: of the generator; 0 is what the model card reports.
    """
    studies = [make_study(i, seed=seed, split="test") for i in range(count)]
    images, reports = [], []
    closed: list[Answered] = []
    yes_no: list[tuple[bool, bool]] = []
    for start in range(0, count, batch_size):
        part = studies[start : start + batch_size]
        scans = [study.scan() for study in part]
        images.append(dual.embed_scans(scans, batch_size=batch_size))
        visual = vlm.see(scans)
        reports += vlm.report(visual)
        for i, study in enumerate(part):
            _answer(vlm, visual[i : i + 1], study, closed, yes_no)
        for study in part:
            study.__dict__.pop("array", None)  # 4 MB each, not needed again
        if progress:
            progress(start + len(part), count)
    texts = dual.embed_texts([study.report for study in studies])
    results = Results(
        {
            "model": vlm.label,
            "weights": vlm.fingerprint(),
            "studies": count,
            "phantom version": PHANTOM_VERSION,
            "data": CAVEAT,
        }
    )
    results.add("Retrieval", retrieval_table(np.concatenate(images), texts))
    results.add("Closed questions, by likelihood", closed_table(closed))
    right, given = zip(*yes_no, strict=True)
    results.add("Yes or no, by likelihood", yes_no_table(right, given))
    truth = [{name: study.truth.has(name) for name in FINDINGS} for study in studies]
    said = [find_findings(report) for report in reports]
    results.add("Findings of drafted reports", finding_table(truth, said))
    return results


def _answer(
    vlm: Med3DVLM,
    visual: torch.Tensor,
    study: Any,
    closed: list[Answered],
    yes_no: list[tuple[bool, bool]],
) -> None:
    for question in study.questions:
        if question.kind == "closed":
            given = vlm.ask(visual, question.text, list(question.choices))
            closed.append(
                Answered(
                    type=question.type,
                    right=question.answer_choice,
                    given=given[0],
                    choices=len(question.choices),
                    answer=question.answer,
                )
            )
        elif question.kind == "yes_no":
            yes, no = vlm.likelihoods(visual, question.text, ["yes", "no"])
            yes_no.append((question.answer == "yes", yes > no))
