"""What an experiment found: tables of arms with their spread over seeds, and a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from med3dvlm.evaluate.scores import Auroc, Score, difference
from med3dvlm.evaluate.tables import Results, Row
from med3dvlm.evaluate.tasks.cases import CAVEAT
from med3dvlm.experiment.follow import is_finished, read_cost, read_scores
from med3dvlm.experiment.spec import Planned, Question
from med3dvlm.files import atomic_file, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Arm = dict[str, Any]
COLOURS = ("#1f6feb", "#d9730d", "#2da44e", "#8250df", "#bf3989", "#6e7781")


@dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        facts: what the figures are about.
        arms: for each question and arm {"scores": {name: {"chance", "seeds": {seed: value},
            "mean", and against the reference "difference", "low", "high"}}, "cost": {…}}.
        each: for each question that has AUROCs, rows of the findings.
    """

    facts: dict[str, Any]
    titles: dict[str, str]
    references: dict[str, str]
    arms: dict[str, dict[str, Arm]]
    each: dict[str, list[Row]]

    def to_dict(self) -> dict[str, Any]:
        questions = {
            key: {
                "title": self.titles[key],
                "reference": self.references[key],
                "arms": arms,
                **({"findings": self.each[key]} if key in self.each else {}),
            }
            for key, arms in self.arms.items()
        }
        return {**self.facts, "questions": questions}

    def results(self) -> Results:
        """Tables to read: a row an arm, its scores as mean (lowest to highest seed)."""
        results = Results(self.facts)
        for key, arms in self.arms.items():
            title, reference = self.titles[key], self.references[key]
            results.add(title, [_row(name, arm) for name, arm in arms.items()])
            less = [_less(name, arm) for name, arm in arms.items() if name != reference]
            end = "" if title.endswith("?") else "."
            results.add(f"{title}{end} Points more than {reference}", less)
            if key in self.each:
                results.add(f"{title} AUROC of each finding", self.each[key])
        return results

    def save(self, folder: Path) -> None:
        """results.json with every number, results.md, comparison.png; each written atomically."""
        from med3dvlm.evaluate.tasks.plots import png

        write_json(folder / "results.json", self.to_dict())
        with atomic_file(folder / "results.md") as temporary:
            temporary.write_text(self.results().to_markdown() + "\n", "utf-8")
        with atomic_file(folder / "comparison.png") as temporary:
            temporary.write_bytes(png(self.plot(), dpi=130))

    def plot(self) -> Figure:
        """A panel for each question: a row a score, a colour an arm, a point a seed, a line at
        the mean; dotted where chance is."""
        from matplotlib.figure import Figure

        columns = 2 if len(self.arms) > 1 else 1
        rows = [list(self.arms)[k : k + columns] for k in range(0, len(self.arms), columns)]
        heights = [max(_height(self.arms[key]) for key in row) for row in rows]
        figure = Figure(figsize=(5.6 * columns, sum(heights)), layout="constrained")
        panels = figure.subplots(len(rows), columns, height_ratios=heights, squeeze=False)
        for axes in panels.flat[len(self.arms) :]:
            axes.remove()
        for axes, (key, arms) in zip(panels.flat, self.arms.items(), strict=False):
            _panel(axes, self.titles[key], arms)
        return figure


def outcome(planned: Planned, seeds: Sequence[int] | None = None) -> Outcome:
    """Read what the finished runs of some seeds have measured, and set arms against arms."""
    experiment = planned.experiment
    seeds = list(experiment.seeds if seeds is None else seeds)
    questions = experiment.questions
    arms, each = {}, {}
    for key, question in questions.items():
        scores = {arm: _scores(planned, question, arm, seeds) for arm in question.arms}
        reference = scores[question.reference]
        arms[key] = {
            arm: {
                "scores": {
                    name: _score(of, None if arm == question.reference else reference[name], seeds)
                    for name, of in by_name.items()
                },
                "cost": _cost(planned, question.arms[arm], seeds),
            }
            for arm, by_name in scores.items()
        }
        found = _each_finding(scores)
        if found:
            each[key] = found
    facts = {
        "experiment": experiment.title,
        "seeds": len(seeds),
        "studies to train on": experiment.train_studies,
        "held out": experiment.test_studies,
        "of these drafted and asked about": experiment.asked_studies,
        "data": CAVEAT,
    }
    titles = {key: question.title for key, question in questions.items()}
    references = {key: question.reference for key, question in questions.items()}
    return Outcome(facts, titles, references, arms, each)


def plan_rows(planned: Planned) -> list[Row]:
    """What is to be trained: a row a run, and of how many seeds it is finished."""
    experiment = planned.experiment
    rows: list[Row] = []
    for name, run in experiment.runs.items():
        recipes = [planned.recipes[seed, name] for seed in experiment.seeds]
        rows.append(
            {
                "run": name,
                "stage": recipes[0].stage,
                "starts from": run.start,
                "seeds": len(recipes),
                "finished": sum(map(is_finished, recipes)),
                "studies seen": planned.studies_seen(experiment.seeds[0], name),
                "batch": recipes[0].training.batch_size,
                "questions": ", ".join(
                    key
                    for key, question in experiment.questions.items()
                    if any(name in experiment.chain(arm) for arm in question.arms.values())
                ),
            }
        )
    return rows


# --- figures ----------------------------------------------------------------------------------


def _scores(
    planned: Planned, question: Question, arm: str, seeds: Sequence[int]
) -> dict[str, list[Score]]:
    """By name a score for each seed."""
    found: dict[str, list[Score]] = {}
    for measure in question.measure:
        (run,) = planned.runs_of(question.arms[arm], measure)
        for seed in seeds:
            for name, score in read_scores(planned, seed, run, measure).items():
                found.setdefault(name, []).append(score)
    return found


def _score(of: list[Score], reference: list[Score] | None, seeds: Sequence[int]) -> dict[str, Any]:
    values = [score.value() for score in of]
    found: dict[str, Any] = {
        "chance": of[0].chance,
        "seeds": dict(zip(map(str, seeds), values, strict=True)),
        "mean": float(np.mean(values)),
    }
    if reference is not None:
        keys = ("difference", "low", "high")
        found |= dict(zip(keys, difference(reference, of), strict=True))
    return found


def _cost(planned: Planned, names: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Of the whole arm: what it starts from counts as well; a mean over the seeds.

    Parameters are those of the arm's last run.
    """
    chain = planned.experiment.chain(names)
    costs = [[read_cost(planned, seed, name) for name in chain] for seed in seeds]
    known = [of for of in costs if all(cost["seconds"] is not None for cost in of)]
    last = costs[0][chain.index(names[-1])]

    def mean(key: str, of: list[list[dict[str, Any]]]) -> float | None:
        return float(np.mean([sum(cost[key] for cost in line) for line in of])) if of else None

    return {
        "studies_seen": sum(cost["studies_seen"] for cost in costs[0]),
        "seconds": mean("seconds", known),
        "cpu_seconds": mean("cpu_seconds", known),
        "flop": mean("flop", costs),
        "parameters": last["parameters"],
        "parameters_trained": last["parameters_trained"],
        "parts": last["parts"],
    }


def _each_finding(scores: dict[str, dict[str, list[Score]]]) -> list[Row]:
    """A row for each finding of each AUROC: of how many studies, and the mean of each arm."""
    rows: list[Row] = []
    first = next(iter(scores.values()))
    for name, of in first.items():
        if not isinstance(of[0], Auroc):
            continue
        kind = name.partition(", ")[2] or "all studies"
        means = {
            arm: np.mean([score.each() for score in by_name[name]], axis=0)  # type: ignore[union-attr]
            for arm, by_name in scores.items()
        }
        for k, finding in enumerate(of[0].names):
            row: Row = {"finding": finding, "which": kind}
            row["studies with it"] = int(of[0].positives()[k])
            rows.append({**row, **{arm: float(mean[k]) for arm, mean in means.items()}})
    return rows


# --- tables and plot --------------------------------------------------------------------------


def _row(name: str, arm: Arm) -> Row:
    row: Row = {"arm": name}
    for score, of in arm["scores"].items():
        values = list(of["seeds"].values())
        spread = f" ({100 * min(values):.1f} to {100 * max(values):.1f})" if len(values) > 1 else ""
        chance = f", chance {100 * of['chance']:.1f}%" if of["chance"] is not None else ""
        row[f"{score}{chance}"] = f"{100 * of['mean']:.1f}%{spread}"
    cost = arm["cost"]
    row["studies seen"] = f"{cost['studies_seen']:,}"
    for name, key in (("minutes", "seconds"), ("CPU minutes", "cpu_seconds")):
        row[name] = None if cost[key] is None else f"{cost[key] / 60:.1f}"
    row["TFLOP"] = f"{cost['flop'] / 1e12:.2f}"
    row["parameters"] = f"{cost['parameters']:,}"
    row["trained last"] = f"{cost['parameters_trained']:,}"
    return row


def _less(name: str, arm: Arm) -> Row:
    """The differences to the reference in points, with their intervals."""
    row: Row = {"arm": name}
    for score, of in arm["scores"].items():
        values = [100 * of[key] for key in ("difference", "low", "high")]
        row[score] = "{:+.1f} ({:+.1f} to {:+.1f})".format(*values)
    return row


def _height(arms: dict[str, Arm]) -> float:
    """Inches of a panel."""
    scores = next(iter(arms.values()))["scores"]
    return 1.2 + len(scores) * (0.16 + 0.13 * len(arms))


def _panel(axes: Any, title: str, arms: dict[str, Arm]) -> None:
    names = list(next(iter(arms.values()))["scores"])
    step = 0.8 / len(arms)
    for k, (arm, of_arm) in enumerate(arms.items()):
        style = {"color": COLOURS[k % len(COLOURS)]}
        for place, name in enumerate(names):
            of = of_arm["scores"][name]
            values = list(of["seeds"].values())
            at = place + (k - (len(arms) - 1) / 2) * step
            label = arm if not place else None
            axes.plot(values, [at] * len(values), "o", alpha=0.5, ms=4.5, label=label, **style)
            reach = [at - 0.45 * step, at + 0.45 * step]
            axes.plot([of["mean"]] * 2, reach, lw=2.2, **style)
    first = next(iter(arms.values()))["scores"]
    for place, name in enumerate(names):
        if first[name]["chance"] is not None:
            axes.plot([first[name]["chance"]] * 2, [place - 0.45, place + 0.45], "k:", lw=1.2)
        if place:
            axes.axhline(place - 0.5, color="#d0d7de", lw=0.6)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(*_limits(arms))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(labelsize=8.5)
    axes.legend(
        fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.1), ncols=2, frameon=False, borderpad=0
    )


def _limits(arms: dict[str, Arm]) -> tuple[float, float]:
    """From nought, or from a little below where all are high."""
    scores = [of for arm in arms.values() for of in arm["scores"].values()]
    values = [v for of in scores for v in (*of["seeds"].values(), of["chance"]) if v is not None]
    values = [value for value in values if math.isfinite(value)]
    low, high = min(values), max(values)
    return (low - 0.05 if low > 0.35 else -0.01), min(1.02, high + 0.03)
