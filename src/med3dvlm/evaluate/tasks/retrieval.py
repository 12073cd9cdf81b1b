"""Retrieval over a store: scans and their reports find each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from med3dvlm.data.sources import Progress
from med3dvlm.evaluate.retrieval import RANKS, Places, places_of_matches, retrieval_table
from med3dvlm.evaluate.tasks.cases import Cases
from med3dvlm.evaluate.tasks.controls import SCAN, Score, Scorer, look, mean_score
from med3dvlm.evaluate.tasks.plots import curves
from med3dvlm.evaluate.tasks.run import EXAMPLES, Example, Run, add_evidence, begin
from med3dvlm.models import VolumeTextDualEncoder

CURVE = 50  # ranks


def see_with(dual: VolumeTextDualEncoder):
    """(n, 1, D, H, W) prepared volumes -> (n, C) pooled states, on the CPU."""

    @torch.inference_mode()
    def see(volumes: Tensor) -> Tensor:
        return dual.pool_volumes(dual._to_device(volumes)).cpu()

    return see


@torch.inference_mode()
def embeddings(dual: VolumeTextDualEncoder, pooled: Tensor) -> np.ndarray:
    """(n, C) pooled states -> (n, dim) float32, rows of length 1."""
    projected = dual.vision_projection(dual._to_device(pooled))
    return F.normalize(projected, dim=-1).float().cpu().numpy()


def evaluate_retrieval(
    dual: VolumeTextDualEncoder,
    cases: Cases,
    *,
    controls: int = 200,
    by: str | None = None,
    batch_size: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> Run:
    """R@1, 5 and 10 at the published pool sizes, with own pairs only and with siblings as hits.

    Controls and columns are scored in one pool of the studies concerned.

    Raises:
        ValueError: if no study has a report.
    """
    cases = cases.with_reports()
    see = {"search": see_with(dual)}
    seen = look(see, cases, controls=controls, batch_size=batch_size, seed=seed, progress=progress)[
        "search"
    ]
    images = {condition: embeddings(dual, pooled) for condition, pooled in seen.items()}
    texts = dual.embed_texts(cases.reports)
    groups = cases.groups()
    run = begin("retrieval", dual, cases.facts, controls=controls, seed=seed)
    run.results.add("Retrieval, own pair only", retrieval_table(images[SCAN], texts, seed=seed))
    shared = retrieval_table(images[SCAN], texts, groups=groups, seed=seed)
    run.results.add("Retrieval, a shared report counts", shared)
    if controls:
        pool = {condition: found[:controls] for condition, found in images.items()}
        add_evidence(run, retrieval_scorer(pool, texts), cases, controls=controls, by=None)
    whole = retrieval_scorer({SCAN: images[SCAN]}, texts)
    add_evidence(run, whole, cases, controls=0, by=by)
    places = _places(images[SCAN], texts)
    run.samples = [
        {"study": name, "sample": name, "scores": _hits(places, index)}
        for index, name in enumerate(cases.ids)
    ]
    run.plots.append(("Recall in one pool of all studies", _curve(places, len(cases))))
    run.examples = _examples(cases, images[SCAN], texts)
    return run


def retrieval_scorer(images: dict[str, np.ndarray], texts: np.ndarray) -> Scorer:
    """R@k of some studies in one pool of all that were seen under a condition."""
    known = {condition: _places(found, texts[: len(found)]) for condition, found in images.items()}

    def scores(condition: str, chosen: Sequence[int]) -> list[Score]:
        wanted, count = list(chosen), len(images[condition])
        return [
            mean_score(f"R@{k} {name}", of.hit_at(k)[wanted], min(1.0, k / count))
            for name, of in known[condition].items()
            for k in RANKS
        ]

    return scores


def _places(images: np.ndarray, texts: np.ndarray) -> dict[str, Places]:
    similarity = images.astype(np.float64) @ texts.astype(np.float64).T
    return {
        "scan to text": places_of_matches(similarity),
        "text to scan": places_of_matches(similarity.T),
    }


def _hits(places: dict[str, Places], index: int) -> dict[str, float]:
    return {
        f"R@{k} {name}": float(of.hit_at(k)[index]) for name, of in places.items() for k in RANKS
    }


def _curve(places: dict[str, Places], count: int):
    ranks = range(1, min(CURVE, count) + 1)
    lines = [
        (name, np.array([of.hit_at(k).mean() for k in ranks]), False) for name, of in places.items()
    ]
    lines.append(("chance", np.array(ranks) / count, True))
    return curves(lines, "rank", "recall")


def _examples(cases: Cases, images: np.ndarray, texts: np.ndarray) -> list[Example]:
    examples = []
    for index in range(min(EXAMPLES, len(cases))):
        nearest = int((texts @ images[index]).argmax())
        row = [cases.reports[index], f"{cases.ids[nearest]}: {cases.reports[nearest]}"]
        columns = ("its report", "the nearest report")
        examples.append(Example(cases.ids[index], cases.volume(index), columns, [row]))
    return examples
