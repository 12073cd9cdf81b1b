"""The figures of a model on held-out phantoms: retrieval, questions, reports, twins, controls.

Every volume is encoded once per encoder; the same studies serve all three tasks.
"""

from __future__ import annotations

from med3dvlm.data.sources import Progress
from med3dvlm.evaluate.report import finding_table
from med3dvlm.evaluate.retrieval import retrieval_table
from med3dvlm.evaluate.tables import Results
from med3dvlm.evaluate.tasks.answerers import LanguageModel
from med3dvlm.evaluate.tasks.cases import cases_of_phantoms
from med3dvlm.evaluate.tasks.controls import BLANK, SCAN, Scorer, control_table, look
from med3dvlm.evaluate.tasks.report import draft, finding_scores
from med3dvlm.evaluate.tasks.retrieval import embeddings, retrieval_scorer, see_with
from med3dvlm.evaluate.tasks.twins import evaluate_twins
from med3dvlm.evaluate.tasks.vqa import answer_conditions, closed_of, vqa_scorer, yes_no_of
from med3dvlm.evaluate.vqa import closed_table, yes_no_table
from med3dvlm.models import Med3DVLM, VolumeTextDualEncoder
from med3dvlm.scan import compare_preparations


def evaluate_on_phantoms(
    dual: VolumeTextDualEncoder,
    vlm: Med3DVLM,
    *,
    count: int = 500,
    seed: int = 0,
    batch_size: int = 32,
    controls: int = 40,
    twins: int = 36,
    progress: Progress | None = None,
) -> Results:
    """Retrieval at 100 and more, closed and yes/no questions, and finding F1 of drafted reports.

    Args:
        count: the first so many studies of the split `test`.
        seed: of the generator; 0 is what the model card reports.
        controls: studies that are looked for, asked about and reported on with other volumes,
            too; 0 for none.
        twins: pairs of either kind; 0 for none.
    """
    compare_preparations(dual.preparation, vlm.preparation)
    answerer = LanguageModel(vlm)
    cases = cases_of_phantoms(count, vlm.preparation, seed=seed)
    seen = look(
        {"search": see_with(dual), "language": answerer.see},
        cases,
        controls=controls,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    results = Results({"model": vlm.label, "weights": vlm.fingerprint(), **cases.facts})
    texts = dual.embed_texts(cases.reports)
    images = embeddings(dual, seen["search"][SCAN])
    results.add("Retrieval", retrieval_table(images, texts))
    answered = answer_conditions(
        answerer, cases, seen["language"], written=False, progress=progress
    )
    results.add("Closed questions, by likelihood", closed_table(closed_of(answered[SCAN])))
    results.add("Yes or no, by likelihood", yes_no_table(*yes_no_of(answered[SCAN])))
    said = {
        condition: cases.said(draft(answerer, rows, once=condition == BLANK, batch_size=batch_size))
        for condition, rows in seen["language"].items()
    }
    names, true = list(cases.terms or {}), cases.finding_matrix()
    truth, drafted = (
        [dict(zip(names, map(bool, row), strict=True)) for row in matrix]
        for matrix in (true, said[SCAN])
    )
    results.add("Findings of drafted reports", finding_table(truth, drafted))
    if controls:
        pool = {c: embeddings(dual, of[:controls]) for c, of in seen["search"].items()}
        scorers: dict[str, Scorer] = {
            "retrieval": retrieval_scorer(pool, texts),
            "the questions": vqa_scorer(answered),
            "drafted reports": lambda condition, chosen: finding_scores(
                true[list(chosen)], said[condition][list(chosen)]
            ),
        }
        for name, scorer in scorers.items():
            rows = control_table(scorer, min(controls, count))
            results.add(f"Evidence controls of {name}", rows)
    if twins:
        results.tables += evaluate_twins(
            answerer, count=twins, seed=seed, progress=progress
        ).results.tables
    return results
