"""Findings without training for them: is "There is …" or "There is no …" nearer to the scan?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from med3dvlm.data.sources import Progress
from med3dvlm.evaluate.calibration import Calibration, Platt, calibration_table
from med3dvlm.evaluate.tables import Row
from med3dvlm.evaluate.tasks.cases import Cases
from med3dvlm.evaluate.tasks.controls import SCAN, Score, Scorer, look
from med3dvlm.evaluate.tasks.plots import bars
from med3dvlm.evaluate.tasks.report import concept_logits
from med3dvlm.evaluate.tasks.retrieval import embeddings, see_with
from med3dvlm.evaluate.tasks.run import EXAMPLES, Example, Run, add_evidence, begin
from med3dvlm.evaluate.zero_shot import SCORES, classification_table
from med3dvlm.models import VolumeTextDualEncoder
from med3dvlm.notice import provenance

PROMPTS = (("There is {finding}.", "There is no {finding}."),)


def evaluate_zero_shot(
    dual: VolumeTextDualEncoder,
    cases: Cases,
    *,
    prompts: Sequence[tuple[str, str]] = PROMPTS,
    calibration: Calibration | None = None,
    controls: int = 200,
    by: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Run:
    """AUROC, F1, accuracy, precision and recall of every labelled finding, as CT-RATE has them.

    Where the model has a head for the findings, its probabilities are scored beside.

    Args:
        prompts: pairs of prompts, present and absent; see :func:`prompt_embeddings`.
        calibration: is measured beside the scores; its prompts are taken.

    Raises:
        ValueError: for studies without labels of a known vocabulary, or prompts without
            `{finding}`.
    """
    true = cases.finding_matrix()
    names = list(cases.terms or {})
    if calibration is not None:
        calibration.check_model(dual)
        prompts = calibration.prompts
    asked = prompt_embeddings(dual, names, prompts)
    see = {"search": see_with(dual)}
    seen = look(see, cases, controls=controls, batch_size=batch_size, seed=seed, progress=progress)[
        "search"
    ]
    margins = {
        condition: prompt_margins(dual, embeddings(dual, pooled), asked)
        for condition, pooled in seen.items()
    }
    given = expit(margins[SCAN])
    run = begin("zero-shot", dual, cases.facts, controls=controls, seed=seed)
    table = classification_table(true, given, names, scores=margins[SCAN])
    run.results.add("Findings from prompts", table)
    if calibration is not None:
        calibrated = calibration.apply(names, given)
        table_of_errors = calibration_table(true, given, calibrated, names)
        run.results.add("Calibration of the probabilities from prompts", table_of_errors)
    scorer = zero_shot_scorer(true, margins, names, _limits(table))
    add_evidence(run, scorer, cases, controls=controls, by=by)
    if dual.concept_head is not None and set(names) <= set(dual.config.concepts):
        title = "Findings from the concept head"
        heads = {c: concept_logits(dual, pooled, names) for c, pooled in seen.items()}
        table_of_head = classification_table(true, expit(heads[SCAN]), names, scores=heads[SCAN])
        run.results.add(title, table_of_head)
        scorer = zero_shot_scorer(true, heads, names, _limits(table_of_head))
        add_evidence(run, scorer, cases, controls=controls, by=by, title=title.lower())
    said = given > _limits(table)
    run.samples = [
        {
            "study": name,
            "sample": name,
            "findings": names,
            "true": true[i].tolist(),
            "margins": margins[SCAN][i].tolist(),
            "probabilities": given[i].tolist(),
            "scores": {"accuracy": float((said[i] == true[i]).mean())},
        }
        for i, name in enumerate(cases.ids)
    ]
    ends = [{**r, "low": r["AUROC low"], "high": r["AUROC high"], "chance": 0.5} for r in table]
    run.plots.append(("AUROC of findings from prompts", bars(ends, "finding", "AUROC", "chance")))
    run.examples = _examples(cases, names, true, given)
    return run


def prompt_embeddings(
    dual: VolumeTextDualEncoder, names: Sequence[str], prompts: Sequence[tuple[str, str]]
) -> tuple[np.ndarray, np.ndarray]:
    """(names, dim) of what says that a finding is there, and that it is not.

    Of several pairs of prompts the mean is taken, as ensembles of prompts are (CLIP, ICML 2021).

    Args:
        prompts: pairs, present and absent; `{finding}` is replaced by the name in lower case,
            `{Finding}` by the name with a capital.

    Raises:
        ValueError: for a prompt without `{finding}`, or none.
    """
    if not prompts:
        raise ValueError("there is no prompt: give at least one pair.")
    for pair in prompts:
        for prompt in pair:
            if "{finding}" not in prompt.lower():
                raise ValueError(f"the prompt {prompt!r} holds no {{finding}}: say where it goes.")
    there, not_there = (
        np.mean(
            [dual.embed_texts([fill(p[side], name) for name in names]) for p in prompts], axis=0
        )
        for side in (0, 1)
    )
    return there, not_there


def fill(prompt: str, name: str) -> str:
    spoken = name[0].lower() + name[1:] if name[1:2].islower() else name  # "CT" stays
    return prompt.replace("{finding}", spoken).replace("{Finding}", spoken[0].upper() + spoken[1:])


def fit_calibration(
    dual: VolumeTextDualEncoder,
    cases: Cases,
    *,
    prompts: Sequence[tuple[str, str]] = PROMPTS,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Calibration:
    """Fit probabilities to the labels of some studies, which are then not evaluated on.

    Raises:
        ValueError: for studies without labels of a known vocabulary.
    """
    true = cases.finding_matrix()
    names = list(cases.terms or {})
    see = {"search": see_with(dual)}
    seen = look(see, cases, controls=0, batch_size=batch_size, seed=0, progress=progress)
    images = embeddings(dual, seen["search"][SCAN])
    given = prompt_probabilities(dual, images, prompt_embeddings(dual, names, prompts))
    each = {n.lower(): Platt.fit(t, p) for n, t, p in zip(names, true.T, given.T, strict=True)}
    return Calibration(
        **provenance(dual),
        prompts=tuple(prompts),
        findings=each,
        others=Platt.fit(true.ravel(), given.ravel()),
        facts=dict(cases.facts),
    )


def prompt_probabilities(
    dual: VolumeTextDualEncoder, images: np.ndarray, prompts: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """(n, names): the softmax over the two prompts, at the temperature that the model learned."""
    return expit(prompt_margins(dual, images, prompts))


def prompt_margins(
    dual: VolumeTextDualEncoder, images: np.ndarray, prompts: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """(n, names) float64, the logits of :func:`prompt_probabilities`, which rank all studies."""
    loss = dual.loss
    learned = loss.t_prime if hasattr(loss, "t_prime") else loss.log_scale
    nearer = images.astype(np.float64) @ (prompts[0] - prompts[1]).astype(np.float64).T
    # equal volumes are equal: what fp32 leaves behind the sixth decimal of a cosine is no rank
    return nearer.round(6) * float(learned.detach().exp())


def zero_shot_scorer(
    true: np.ndarray,
    margins: dict[str, np.ndarray],
    names: Sequence[str],
    limits: np.ndarray,
) -> Scorer:
    """The scores of some studies with one kind of volume: means over findings, and each AUROC.

    Args:
        margins: by condition, (studies, findings) logits.
        limits: (findings,), the probability above which each is present, as with the scan.
    """

    def scores(condition: str, chosen: Sequence[int]) -> list[Score]:
        wanted = np.asarray(list(chosen))
        logits = margins[condition][wanted]
        *rows, mean = classification_table(
            true[wanted], expit(logits), names, scores=logits, thresholds=limits.tolist()
        )
        found = [_score(mean, key, f"{key}, mean of findings") for key in SCORES]
        return found + [_score(row, "AUROC", f"AUROC, {row['finding']}") for row in rows]

    def known(condition: str, chosen: Sequence[int]) -> list[Score]:
        return [score for score in scores(condition, chosen) if score.value is not None]

    return known


def _score(row: Row, key: str, name: str) -> Score:
    values: Any = (row[key], row[f"{key} low"], row[f"{key} high"])
    return Score(name, *values, 0.5 if key == "AUROC" else None)


def _limits(table: Sequence[Row]) -> np.ndarray:
    return np.array([row["threshold"] for row in table[:-1]], dtype=float)


def _examples(
    cases: Cases, names: Sequence[str], true: np.ndarray, given: np.ndarray
) -> list[Example]:
    columns = ("finding", "true", "probability")
    return [
        Example(
            cases.ids[i],
            cases.volume(i),
            columns,
            [
                [name, "present" if there else "absent", f"{value:.2f}"]
                for name, there, value in zip(names, true[i], given[i], strict=True)
            ],
        )
        for i in range(min(EXAMPLES, len(cases)))
    ]
