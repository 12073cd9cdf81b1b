"""Drafted reports: wording, findings, CRG; beside them the simple ways to draft one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from med3dvlm.data.sources import Progress
from med3dvlm.evaluate.report import baseline_table, crg, finding_table, micro_f1
from med3dvlm.evaluate.statistics import interval_of
from med3dvlm.evaluate.tables import Row
from med3dvlm.evaluate.tasks.answerers import Answerer
from med3dvlm.evaluate.tasks.cases import Cases
from med3dvlm.evaluate.tasks.controls import (
    BLANK,
    SCAN,
    Score,
    Scorer,
    Seen,
    look,
    mean_score,
)
from med3dvlm.evaluate.tasks.plots import bars
from med3dvlm.evaluate.tasks.retrieval import embeddings, see_with
from med3dvlm.evaluate.tasks.run import EXAMPLES, Example, Run, add_evidence, begin
from med3dvlm.evaluate.tasks.wording import TextScorer, Wording, average_rows, usable_metrics
from med3dvlm.models import VolumeTextDualEncoder

MODEL, NEAREST, TEMPLATE = "model", "nearest report", "template"
F1_OF_A_REPORT = "finding F1 of a report"  # the score of one study


@dataclass(frozen=True)
class Search:
    """What the drafts without a language model need.

    Attributes:
        dual: embeds scans and reports.
        reports: to draft from, none of them of the studies evaluated on.
        threshold: a template asserts the findings whose probability is above.
    """

    dual: VolumeTextDualEncoder
    reports: Sequence[str] = ()
    threshold: float = 0.5


def evaluate_report(
    answerer: Answerer,
    cases: Cases,
    *,
    search: Search | None = None,
    scorers: Mapping[str, TextScorer] | None = None,
    controls: int = 200,
    by: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Run:
    """Drafts of every study's report, with evidence controls on the first `controls` studies.

    Args:
        scorers: metrics of wording beside the counted ones, by name; they may be models, and see
            each pair of a report and a draft once.

    Raises:
        ValueError: if no study has a report.
    """
    cases = cases.with_reports()
    run = begin("report", answerer, cases.facts, controls=controls, seed=seed)
    wording = Wording(usable_metrics(run.results), scorers)
    encoders = {"language": answerer.see}
    if search is not None:
        encoders["search"] = see_with(search.dual)
    seen = look(
        encoders, cases, controls=controls, batch_size=batch_size, seed=seed, progress=progress
    )
    drafts = {
        condition: draft(answerer, rows, once=condition == BLANK, batch_size=batch_size)
        for condition, rows in seen["language"].items()
    }
    texts = {MODEL: drafts[SCAN]}
    if search is not None:
        texts |= _drafts_without_language(run, search, cases, seen["search"])
    scored = _Scored(cases, wording)
    _add_tables(run, scored, texts)
    scorer = report_scorer(scored, drafts)
    add_evidence(run, scorer, cases, controls=controls, by=by)
    run.samples = _samples(scored, texts)
    run.examples = [
        Example(
            cases.ids[i], cases.volume(i), ("true", *texts), [[cases.reports[i], *_nth(texts, i)]]
        )
        for i in range(min(EXAMPLES, len(cases)))
    ]
    return run


def draft(
    answerer: Answerer, seen: Tensor, *, once: bool = False, batch_size: int = 8
) -> list[str]:
    """A report for every row of `seen`; `once` where all rows are the same."""
    if once:
        return answerer.report(seen[:1]) * len(seen)
    parts = [answerer.report(seen[i : i + batch_size]) for i in range(0, len(seen), batch_size)]
    return [text for part in parts for text in part]


# --- drafts without a language model ----------------------------------------------------------


def _drafts_without_language(
    run: Run, search: Search, cases: Cases, seen: Seen
) -> dict[str, list[str]]:
    """Those that can be made; the results note why another cannot."""
    found = {}
    if search.reports:
        images = embeddings(search.dual, seen[SCAN])
        found[NEAREST] = nearest_reports(search.dual, images, search.reports)
    else:
        run.results.notes.append(
            "No draft by the nearest report: there is no report of the split train to take; give "
            "a store with some in --reports."
        )
    names = [name for name in search.dual.config.concepts if name in (cases.terms or {})]
    if search.dual.concept_head is not None and names:
        given = expit(concept_logits(search.dual, seen[SCAN], names))
        found[TEMPLATE] = [template_report(names, row > search.threshold) for row in given]
    else:
        run.results.notes.append(
            f"No draft by template: model {search.dual.label!r} has no head that gives "
            "probabilities of these findings."
        )
    return found


def nearest_reports(
    dual: VolumeTextDualEncoder, images: np.ndarray, reports: Sequence[str]
) -> list[str]:
    """For each embedded scan (n, dim) the report whose embedding is nearest."""
    kept = sorted(set(reports))
    texts = dual.embed_texts(kept)
    return [kept[k] for k in (images @ texts.T).argmax(axis=1)]


@torch.inference_mode()
def concept_logits(dual: VolumeTextDualEncoder, pooled: Tensor, names: Sequence[str]) -> np.ndarray:
    """(n, C) pooled states -> (n, names) float64 logits of the concept head."""
    assert dual.concept_head is not None
    places = [dual.config.concepts.index(name) for name in names]
    logits = dual.concept_head(dual._to_device(pooled))
    return logits.double().cpu().numpy()[:, places]


def template_report(names: Sequence[str], present: Sequence[bool]) -> str:
    """A sentence for each finding; the impression names those that are there."""
    there = [name for name, is_there in zip(names, present, strict=True) if is_there]
    lines = [
        f"{name} is present." if is_there else f"No {name[0].lower()}{name[1:]}."
        for name, is_there in zip(names, present, strict=True)
    ]
    impression = " ".join(f"{name}." for name in there) or "No abnormal finding."
    return f"Findings: {' '.join(lines)} Impression: {impression}"


# --- scores -----------------------------------------------------------------------------------


class _Scored:
    """Scores of texts against the true reports of some studies; each is counted once."""

    def __init__(self, cases: Cases, wording: Wording):
        self.cases, self._wording = cases, wording
        self.true = None if cases.terms is None else cases.finding_matrix()
        self._said = lru_cache(maxsize=None)(lambda text: cases.said([text])[0])

    def wording(self, chosen: Sequence[int], texts: Sequence[str]) -> dict[str, list[float]]:
        """For each metric the scores of the texts of some studies."""
        return self._wording([self.cases.reports[i] for i in chosen], texts)

    def said(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([self._said(text) for text in texts], dtype=bool)


def report_scorer(scored: _Scored, drafts: Mapping[str, Sequence[str]]) -> Scorer:
    """Wording, micro F1 of findings and CRG of some studies' drafts, with one kind of volume.

    Chance of a wording metric is what the true report of another study scores.
    """

    def scores(condition: str, chosen: Sequence[int]) -> list[Score]:
        wanted = list(chosen)
        texts = [drafts[condition][i] for i in wanted]
        others = _other_reports([scored.cases.reports[i] for i in wanted])
        chance = scored.wording(wanted, others) if others else {}
        found = [
            mean_score(name, values, float(np.mean(chance[name])) if chance else None)
            for name, values in scored.wording(wanted, texts).items()
        ]
        if scored.true is not None:
            found += finding_scores(scored.true[wanted], scored.said(texts))
        return found

    return scores


def _other_reports(reports: Sequence[str]) -> list[str]:
    """For each report the next one that is another; nothing where all are the same."""
    if len(set(reports)) < 2:
        return []
    twice = [*reports, *reports]
    return [
        next(other for other in twice[i + 1 :] if other != report)
        for i, report in enumerate(reports)
    ]


def finding_scores(true: np.ndarray, said: np.ndarray) -> list[Score]:
    """Micro F1 and CRG of (texts, findings) bool, as far as there are findings to find."""
    found = []
    if true.any():
        found.append(Score("finding F1, micro", *micro_f1(true, said)))
    if true.any() and not true.all():
        low, high = interval_of(lambda chosen: crg(true[chosen], said[chosen]), len(true))
        found.append(Score("CRG", crg(true, said), float(low), float(high), 1 / 3))
    return found


def _add_tables(run: Run, scored: _Scored, texts: Mapping[str, Sequence[str]]) -> None:
    everyone = range(len(scored.cases))
    wording: list[Row] = [
        {"who": who, **row}
        for who, of in texts.items()
        for row in average_rows(scored.wording(everyone, of))
    ]
    run.results.add("Wording of reports", wording)
    if scored.true is None:
        run.results.notes.append(
            "No finding is scored: the store's labels are neither CT-RATE's 18 findings nor the "
            "phantoms'."
        )
        return
    said = {who: scored.said(of) for who, of in texts.items()}
    add_finding_tables(run, list(scored.cases.terms or {}), scored.true, said)


def add_finding_tables(
    run: Run, names: Sequence[str], true: np.ndarray, said: Mapping[str, np.ndarray]
) -> None:
    """What texts assert of some findings, by who wrote them; for the first, finding by finding.

    Args:
        true, said: (texts, findings) bool.
    """
    truth, first = _named(names, true), next(iter(said.values()))
    run.results.add("Findings of drafted reports", finding_table(truth, _named(names, first)))
    each: list[Row] = []
    for i, name in enumerate(names):
        f1, low, high, chance = micro_f1(true[:, [i]], first[:, [i]])
        each.append({"finding": name, "F1": f1, "low": low, "high": high, "chance": chance})
    run.results.add("F1 of each finding", each)
    run.plots.append(("Findings of drafted reports, F1", bars(each, "finding", "F1", "chance")))
    rows: list[Row] = [
        {"who": who, "score": score.name, **score.row()}
        for who, of in said.items()
        for score in finding_scores(true, of)
    ]
    run.results.add("Findings, by who drafts", rows)
    run.results.add("Findings of those who have not looked", baseline_table(truth))


def _named(names: Sequence[str], matrix: np.ndarray) -> list[dict[str, bool]]:
    return [dict(zip(names, map(bool, row), strict=True)) for row in matrix]


def _samples(scored: _Scored, texts: Mapping[str, Sequence[str]]) -> list[dict]:
    """One a study."""
    everyone = range(len(scored.cases))
    wording = scored.wording(everyone, texts[MODEL])
    samples = []
    for i, name in enumerate(scored.cases.ids):
        scores = {metric: values[i] for metric, values in wording.items()}
        if scored.true is not None:
            said = scored.said([texts[MODEL][i]])[0]
            scores[F1_OF_A_REPORT] = f1_of_a_report(scored.true[i], said)
        sample = {
            "study": name,
            "sample": name,
            "report": scored.cases.reports[i],
            "drafts": dict(zip(texts, _nth(texts, i), strict=True)),
            "scores": scores,
        }
        if scored.true is not None:
            sample |= {"true": scored.true[i].tolist(), "said": said.tolist()}
        samples.append(sample)
    return samples


def f1_of_a_report(true: np.ndarray, said: np.ndarray) -> float:
    """F1 of (findings,) bool, 1 where nothing is there or said."""
    together = int(true.sum() + said.sum())
    return 2 * int((true & said).sum()) / together if together else 1.0


def _nth(texts: Mapping[str, Sequence[str]], index: int) -> list[str]:
    return [of[index] for of in texts.values()]
