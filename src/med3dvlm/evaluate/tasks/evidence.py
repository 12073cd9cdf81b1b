"""Evidence maps against the truth: phantoms with one lesion, whose voxels are known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count as numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

from med3dvlm.data.phantoms import (
    FINDINGS,
    PHANTOM_VERSION,
    PhantomError,
    PhantomStudy,
    ask_whether,
    make_study,
)
from med3dvlm.data.sources import Progress
from med3dvlm.evaluate.statistics import interval
from med3dvlm.evaluate.tables import Row
from med3dvlm.evaluate.tasks.cases import CAVEAT
from med3dvlm.evaluate.tasks.plots import bars
from med3dvlm.evaluate.tasks.run import Run, begin
from med3dvlm.evidence.faithfulness import (
    SHARES,
    TOLERANCE_MM,
    area,
    curves,
    distance_mm,
    share_within,
)
from med3dvlm.evidence.maps import METHODS, evidence_map
from med3dvlm.evidence.targets import Target, query_target, text_target
from med3dvlm.models import Med3DVLM, VolumeTextDualEncoder
from med3dvlm.scan import compare_preparations, prepare, to_scan_grid

QUESTION, SENTENCE, QUERY = "answer", "report sentence", "search query"
DEFAULT = "layercam"
SLOW = ("integrated-gradients", "occlusion")
CENTRE, RANDOM = "centre", "random"
Sample = dict[str, Any]


def one_lesion(count: int, *, seed: int = 0, split: str = "test") -> Iterator[PhantomStudy]:
    """Studies with one finding each, all kinds in turn."""
    names, made = list(FINDINGS), 0
    for index in numbers():
        if made == count:
            return
        try:
            yield make_study(index, seed=seed, split=split, findings=[names[made % len(names)]])
        except PhantomError:
            continue  # no free place in this patient: the next one has the finding
        made += 1


def evaluate_evidence(
    vlm: Med3DVLM,
    dual: VolumeTextDualEncoder,
    *,
    count: int = 200,
    methods: Sequence[str] = ("layercam", "grad-cam"),
    slow: int = 0,
    curve_studies: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> Run:
    """Do maps point at the lesion, and do answers hang on what they show?

    Of each study are explained: the answer "yes" to whether the lesion is there (against "no"),
    the sentence that reports it, and the query that looks for it. The answer by every method, the
    other two by the default method.

    Args:
        slow: on how many studies integrated gradients and occlusion run, too.
        curve_studies: on how many studies the deletion and insertion curves are drawn.
    """
    compare_preparations(dual.preparation, vlm.preparation)
    about = {"studies": count, "phantom version": PHANTOM_VERSION, "data": CAVEAT}
    run = begin("evidence", vlm, {"tolerance in mm": TOLERANCE_MM, **about})
    drawn: list[Sample] = []
    for number, study in enumerate(one_lesion(count, seed=seed)):
        chosen = [*methods, *(SLOW if number < slow else ())]
        samples, lines = _study(
            vlm, dual, study, chosen, with_curves=number < curve_studies, seed=seed
        )
        run.samples += samples
        drawn += lines
        study.__dict__.pop("array", None)  # 4 MB each, not needed again
        if progress:
            progress(number + 1, count)
    run.results.add("Pointing game", pointing_table(run.samples))
    of_default = [s for s in run.samples if (s["explained"], s["method"]) == (QUESTION, DEFAULT)]
    if of_default:
        rows = finding_rows(of_default)
        run.results.add(f"Pointing game by finding, {DEFAULT} of answers", rows)
        run.plots.append(("Lesions pointed at", bars(rows, "finding", "hit", RANDOM)))
    if slow:
        some = {s["study"] for s in run.samples if s["method"] in SLOW}
        same = [s for s in run.samples if s["study"] in some and s["explained"] == QUESTION]
        run.results.add("Pointing game, with the slow methods", pointing_table(same))
    if drawn:
        run.results.add("Deletion and insertion, answers yes", curve_table(drawn))
    return run


def _study(
    vlm: Med3DVLM,
    dual: VolumeTextDualEncoder,
    study: PhantomStudy,
    methods: Sequence[str],
    *,
    with_curves: bool,
    seed: int,
) -> tuple[list[Sample], list[Sample]]:
    scan, (placed,) = study.scan(), study.truth.findings
    mask = study.mask(placed.name, drawn=True)
    volume = vlm._to_device(torch.from_numpy(prepare(scan, vlm.preparation)[None]))
    targets = _targets(vlm, dual, study)
    with torch.inference_mode():
        yes = float(targets[QUESTION](vlm.vision_encoder(volume))) > 0
    about = {
        "study": study.study_id,
        "finding": placed.name,
        "says yes": yes,
        RANDOM: share_within(mask, study.spacing_mm),
    }
    samples, kept = [], {}
    for explained, target in targets.items():
        encoder = (dual if explained == QUERY else vlm).vision_encoder
        for method in methods if explained == QUESTION else [DEFAULT]:
            values = evidence_map(encoder, volume, target, method=method)
            samples.append(_sample(about, explained, method, values, study, mask, vlm))
            if explained == QUESTION:
                kept[method] = values
    kept[CENTRE] = centre_map(volume.shape[2:])
    samples.append(_sample(about, QUESTION, CENTRE, kept[CENTRE], study, mask, vlm))
    if not (with_curves and yes):
        return samples, []
    kept[RANDOM] = np.random.default_rng([seed, study.index]).random(volume.shape[2:])
    return samples, [
        _curve(vlm, volume, targets[QUESTION], method, values) for method, values in kept.items()
    ]


def _targets(vlm: Med3DVLM, dual: VolumeTextDualEncoder, study: PhantomStudy) -> dict[str, Target]:
    (placed,) = study.truth.findings
    finding = FINDINGS[placed.name]
    question = ask_whether(study.stream("evidence"), placed.name, "yes").text
    sentence = placed.say(finding.present[0])
    verb = "are" if finding.plural else "is"
    return {
        QUESTION: text_target(vlm, question, "yes", others=["no"]),
        SENTENCE: text_target(vlm, vlm.config.report_prompt, sentence),
        QUERY: query_target(dual, f"There {verb} {finding.asked}."),
    }


def _sample(
    about: Sample,
    explained: str,
    method: str,
    values: np.ndarray,
    study: PhantomStudy,
    mask: np.ndarray,
    vlm: Med3DVLM,
) -> Sample:
    on_scan = to_scan_grid(values, study.scan(), vlm.preparation)
    distance = distance_mm(on_scan, mask, study.spacing_mm)
    inside = float(on_scan[mask].mean() / max(float(on_scan.mean()), 1e-12))
    return {
        **about,
        "sample": f"{about['study']} {explained} {method}",
        "explained": explained,
        "method": method,
        "distance mm": distance if np.isfinite(distance) else None,
        "contrast": inside,
        "scores": {f"{explained}, {method}: hit": float(distance <= TOLERANCE_MM)},
    }


def _curve(
    vlm: Med3DVLM, volume: Tensor, target: Target, method: str, values: np.ndarray
) -> Sample:
    deletion, insertion = curves(vlm.vision_encoder, volume, target, values)
    return {"method": method, "deletion": area(deletion), "insertion": area(insertion)}


def centre_map(shape: Sequence[int]) -> np.ndarray:
    """(D, H, W): 1 in the middle, falling to 0 in the corners; who has not looked guesses so."""
    steps = [np.linspace(-1, 1, n) for n in shape]
    z, y, x = np.meshgrid(*steps, indexing="ij", sparse=True)
    return 1 - np.sqrt((z**2 + y**2 + x**2) / 3)


# --- tables -----------------------------------------------------------------------------------


def pointing_table(samples: Sequence[Sample]) -> list[Row]:
    """Columns: explained, method, studies, `hit` (the highest voxel is within the tolerance of the
    lesion) with its 95% interval, the median distance, `contrast` (the map's mean inside the
    lesion by its mean over the scan, the median), `hit where yes` (of studies where the model sees
    the lesion). The row `random` is what a map without sense would hit."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample["explained"], sample["method"]), []).append(sample)
    rows = [_pointing_row(*key, group) for key, group in sorted(groups.items(), key=_order)]
    answers = [s for s in samples if (s["explained"], s["method"]) == (QUESTION, CENTRE)]
    if answers:
        chance = [s[RANDOM] for s in answers]
        low, high = interval(chance)
        rows.append(
            {
                "explained": QUESTION,
                "method": RANDOM,
                "studies": len(answers),
                "hit": float(np.mean(chance)),
                "low": low,
                "high": high,
                "contrast": "1.0",
            }
        )
    return rows


def _order(item: tuple[tuple[str, str], Any]) -> tuple[int, int]:
    explained, method = item[0]
    return (
        (QUESTION, SENTENCE, QUERY).index(explained),
        [*METHODS, CENTRE].index(method),
    )


def _pointing_row(explained: str, method: str, group: Sequence[Sample]) -> Row:
    hits = np.array([next(iter(s["scores"].values())) for s in group])
    distances = [np.inf if s["distance mm"] is None else s["distance mm"] for s in group]
    yes = np.array([s["says yes"] for s in group])
    low, high = interval(hits)
    return {
        "explained": explained,
        "method": method,
        "studies": len(group),
        "hit": float(hits.mean()),
        "low": low,
        "high": high,
        "median mm": f"{np.median(distances):.0f}",
        "contrast": f"{np.median([s['contrast'] for s in group]):.1f}",
        "studies where yes": int(yes.sum()),
        "hit where yes": float(hits[yes].mean()) if yes.any() else None,
    }


def finding_rows(samples: Sequence[Sample]) -> list[Row]:
    """By finding: studies, hit, what a random map would hit, how often yes is said."""
    rows: list[Row] = []
    for name in FINDINGS:
        group = [s for s in samples if s["finding"] == name]
        if group:
            rows.append(
                {
                    "finding": name,
                    "studies": len(group),
                    "hit": float(np.mean([next(iter(s["scores"].values())) for s in group])),
                    RANDOM: float(np.mean([s[RANDOM] for s in group])),
                    "says yes": float(np.mean([s["says yes"] for s in group])),
                }
            )
    return rows


def curve_table(drawn: Sequence[Sample]) -> list[Row]:
    """By method the area under the curves of the probability of yes, with 95% intervals: low is
    good for deletion, high for insertion."""
    rows: list[Row] = []
    for method in [m for m in (*METHODS, CENTRE, RANDOM) if any(d["method"] == m for d in drawn)]:
        group = [d for d in drawn if d["method"] == method]
        row: Row = {"method": method, "studies": len(group), "points": len(SHARES)}
        for name in ("deletion", "insertion"):
            values = [d[name] for d in group]
            low, high = interval(values)
            row |= {name: float(np.mean(values)), f"{name} low": low, f"{name} high": high}
        rows.append(row)
    return rows
