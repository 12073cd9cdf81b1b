"""Experiments by the command line on a handful of phantoms, against values computed directly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from med3dvlm.cli import app
from med3dvlm.data.store import Store
from med3dvlm.evaluate.report import micro_f1
from med3dvlm.evaluate.scores import Auroc, Ratio, difference, from_dict
from med3dvlm.evaluate.tasks import LanguageModel, cases_of_store, evaluate_report, evaluate_vqa
from med3dvlm.evaluate.tasks.retrieval import evaluate_retrieval
from med3dvlm.evaluate.vqa import yes_no_table
from med3dvlm.evaluate.zero_shot import auroc
from med3dvlm.experiment import ExperimentError, follow, load_experiment, outcome
from med3dvlm.experiment.follow import read_cost, read_scores
from med3dvlm.experiment.spec import Experiment, Planned
from med3dvlm.hub import load
from med3dvlm.train import Recipe, begin, load_recipe
from med3dvlm.train.plan import step_flop
from med3dvlm.train.recipe import DataRecipe, TrainingRecipe

CONTRASTIVE = {
    "stage": "contrastive",
    "output": "unused",
    "preparation": {
        "size": [16, 32, 32],
        "window": [[-1000, 0], [1000, 1]],
        "spacing_mm": [24.0, 12.6, 12.6],
        "fit": "pad",
        "antialias": True,
    },
    "tokenizer_size": 500,
    "model": {
        "text_config": {"dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2},
        "projection_dim": 16,
    },
    "data": {"store": "unused", "phantoms": 1, "workers": 1},
    "training": {"batch_size": 4, "max_steps": 2, "save_steps": 1, "loggers": []},
}
ALIGNMENT = {
    "stage": "alignment",
    "output": "unused",
    "start": "unused",
    "train": ["projector", "language_model"],
    "model": {
        "low_tokens": [6, 4],
        "high_tokens": [3, 4],
        "text_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
        },
    },
    "data": {"store": "unused", "phantoms": 1, "workers": 1, "tasks": {"caption": 1.0}},
    "training": {"batch_size": 4, "max_steps": 2, "save_steps": 1, "loggers": []},
}
DCFORMER = {"variant": "t", "depths": [1] * 5, "channels": [8, 8, 8, 16, 16]}
VIT = {
    "model_type": "med3dvlm_vit3d",
    "patch_size": [8, 16, 16],
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
}
EXPERIMENT = {
    "title": "A minute",
    "seeds": [0, 1],
    "train_studies": 8,
    "test_studies": 12,
    "asked_studies": 2,
    "runs": {
        "siglip": {
            "recipe": "contrastive.yaml",
            "set": {"model.vision_config": DCFORMER, "model.concept_loss_weight": 1.0},
        },
        "vit": {
            "recipe": "contrastive.yaml",
            "set": {
                "model.loss": "infonce",
                "model.vision_config": VIT,
            },
        },
        "linear": {
            "recipe": "alignment.yaml",
            "start": "siglip",
            "set": {"model.projector": "linear"},
        },
        "mixer": {"recipe": "alignment.yaml", "start": "siglip"},
    },
    "questions": {
        "retrieval": {
            "title": "Which loss?",
            "measure": ["retrieval"],
            "reference": "InfoNCE",
            "arms": {"InfoNCE": ["vit"], "SigLIP": ["siglip"]},
        },
        "projector": {
            "title": "Which projector?",
            "measure": ["findings", "language"],
            "reference": "linear",
            "arms": {"linear": ["siglip", "linear"], "mixer": ["siglip", "mixer"]},
        },
    },
}


def write(folder: Path, **changes) -> Path:
    files = {"contrastive": CONTRASTIVE, "alignment": ALIGNMENT}
    files["experiment"] = {**EXPERIMENT, **changes}
    for name, value in files.items():
        (folder / f"{name}.yaml").write_text(json.dumps(value))
    return folder / "experiment.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """(the experiment's file, its folder, what was said): stopped once, then done to its end."""
    folder = tmp_path_factory.mktemp("experiment")
    path, output = write(folder), folder / "out"
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if "vit: trained" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(load_experiment(path, output), say=stop)
    done = CliRunner().invoke(app, ["experiment", str(path), "-o", str(output), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((output / "results.json").read_text())
    return path, output, [*said, *done.stderr.splitlines()]


@pytest.fixture(scope="module")
def planned(made):
    return load_experiment(made[0], made[1])


def test_what_is_finished_is_not_made_again(made, planned):
    path, output, said = made
    trained = [line.split("] ")[1].split(",")[0:2] for line in said if "trained" in line]
    names = [f"{seed}{name.split(':')[0]}" for seed, name in trained]
    assert sorted(names) == sorted(
        f"seed {seed} {name}" for seed in (0, 1) for name in ("siglip", "vit", "linear", "mixer")
    )  # each once, though the first try was stopped
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*") if p.is_file()}
    lines: list[str] = []
    follow(planned, say=lines.append)
    assert lines == [] and before == {p: p.stat().st_mtime_ns for p in before}


def test_a_run_that_was_cut_off_goes_on_from_its_checkpoint_and_has_no_minutes(made, tmp_path):
    path, output = made[0], tmp_path / "out"
    first = load_experiment(path, output, only=["retrieval"], seeds=1)
    shutil.copytree(made[1] / "phantoms-train", output / "phantoms-train")
    shutil.copytree(made[1] / "phantoms-test", output / "phantoms-test")
    recipe = first.recipes[0, "vit"]
    recipe.training.max_steps = 1  # as one that was killed after its first checkpoint
    from med3dvlm.train import train

    train(recipe)
    Path(recipe.output, "training.json").unlink()
    Path(recipe.output, "checkpoints", "run.json").unlink()  # which tells of the one step
    again = load_experiment(path, output, only=["retrieval"], seeds=1)
    follow(again)
    cost = read_cost(again, 0, "vit")
    assert cost["steps"] == 2 and cost["seconds"] is None
    assert not Path(recipe.output, "checkpoints").exists()
    assert outcome(again).arms["retrieval"]["InfoNCE"]["cost"]["seconds"] is None
    assert outcome(again).arms["retrieval"]["SigLIP"]["cost"]["seconds"] > 0
    assert "| – |" in outcome(again).results().to_markdown()


def test_a_folder_with_runs_of_another_recipe_is_refused(made, tmp_path):
    other = write(tmp_path)
    for path in (tmp_path / "contrastive.yaml", tmp_path / "alignment.yaml"):
        path.write_text(path.read_text().replace('"batch_size": 4', '"batch_size": 2'))
    with pytest.raises(ExperimentError, match="seed-0.* holds a run of another recipe"):
        follow(load_experiment(other, made[1]))


def test_scores_are_those_of_the_evaluation(made, planned):
    store = Store(made[1] / "phantoms-test")
    cases = cases_of_store(store, "test", leaks=True)
    dual = load(made[1] / "seed-1" / "siglip")
    run = evaluate_retrieval(dual, cases, controls=0)
    wanted = np.mean([s["scores"]["R@5 scan to text"] for s in run.samples])
    wanted = (wanted + np.mean([s["scores"]["R@5 text to scan"] for s in run.samples])) / 2
    found = read_scores(planned, 1, "siglip", "retrieval")["R@5"]
    assert found.value() == pytest.approx(wanted) and found.chance == 5 / 12

    logits = dual.concept_head(dual.pool_volumes(next(store.batches(12))))
    place = dual.config.concepts.index("Pleural effusion")
    head = read_scores(planned, 1, "siglip", "findings")["AUROC"]
    given = logits.sigmoid().detach().numpy()[:, [place]]
    truth = cases.finding_matrix()[:, [list(cases.terms).index("Pleural effusion")]]
    mine = head.each()[head.names.index("Pleural effusion")]
    assert mine == pytest.approx(auroc(truth, given)[0], nan_ok=True)

    few = cases.only(range(2))
    answerer = LanguageModel(load(made[1] / "seed-1" / "mixer"))
    vqa = evaluate_vqa(answerer, few, controls=0)
    closed = [s["given"] == s["right"] for s in vqa.samples if s["kind"] == "closed"]
    asked = [s for s in vqa.samples if s["kind"] == "yes_no"]
    table = yes_no_table([s["right"] == "yes" for s in asked], [s["given"] == "yes" for s in asked])
    report = evaluate_report(answerer, few, controls=0)
    language = read_scores(planned, 1, "mixer", "language")
    assert language["closed questions"].value() == pytest.approx(np.mean(closed))
    assert language["yes or no, balanced"].value() == pytest.approx(table[-1]["accuracy"])
    meteor = np.mean([s["scores"]["METEOR"] for s in report.samples])
    assert language["METEOR"].value() == pytest.approx(meteor)
    said = few.said([s["drafts"]["model"] for s in report.samples])
    assert language["finding F1"].value() == micro_f1(few.finding_matrix(), said)[0]


def test_results_are_means_over_the_seeds_with_the_costs_of_the_whole_arm(made, planned):
    found = json.loads((made[1] / "results.json").read_text())
    arm = found["questions"]["projector"]["arms"]["mixer"]
    for name, of in arm["scores"].items():
        run, measure = ("siglip", "findings") if "AUROC" in name else ("mixer", "language")
        values = [read_scores(planned, seed, run, measure)[name].value() for seed in (0, 1)]
        assert of["seeds"] == {"0": values[0], "1": values[1]}
        assert of["mean"] == pytest.approx(np.mean(values))
        assert of["low"] <= of["difference"] <= of["high"]
    parts = [read_cost(planned, seed, name) for seed in (0, 1) for name in ("siglip", "mixer")]
    assert arm["cost"]["flop"] == sum(part["flop"] for part in parts) / 2
    assert arm["cost"]["studies_seen"] == 16
    model = load(made[1] / "seed-0" / "mixer")
    assert arm["cost"]["parameters"] == sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.vision_encoder.parameters())
    assert arm["cost"]["parameters_trained"] == arm["cost"]["parameters"] - frozen
    page = (made[1] / "results.md").read_text()
    for arms in EXPERIMENT["questions"].values():
        assert all(f"| {name} |" in page for name in arms["arms"])
    assert (made[1] / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_dry_run_counts_and_writes_nothing(tmp_path):
    command = ["experiment", str(write(tmp_path)), "-o", str(tmp_path / "out"), "--dry-run"]
    done = CliRunner().invoke(app, [*command, "--only", "projector", "--seeds", "1", "--json"])
    rows = json.loads(done.stdout)
    assert [row["run"] for row in rows] == ["siglip", "linear", "mixer"]
    assert all(row["studies seen"] == 8 and row["seeds"] == 1 for row in rows)
    assert not (tmp_path / "out").exists()


def test_flop_are_counted_as_by_hand_and_leave_the_model_as_it_is(made, planned):
    """A class token and 8 patches of 2048 voxels, width 16, two layers; one linear projection."""
    recipe = planned.recipes[0, "vit"]
    job = begin(recipe)
    before = {k: v.clone() for k, v in job.model.state_dict().items()}
    encoder = job.model.vision_encoder
    whole = step_flop(job, recipe)
    for name, tensor in job.model.state_dict().items():
        assert tensor.equal(before[name])
    assert all(p.grad is None for p in job.model.parameters())
    encoder.requires_grad_(False)
    without = step_flop(job, recipe)
    tokens, width, patches = 9, 16, 8
    patchify, layers = patches * 2048 * width, 2 * tokens * 12 * width**2  # multiply-adds
    attention = 2 * 2 * tokens**2 * width  # of two factors that both need a gradient
    projection = width * 16  # hands its gradient down to the encoder
    multiply_adds = patchify + 2 * layers + 2 * attention + projection  # none for the volume
    assert whole - without == 2 * multiply_adds * 4


def test_an_experiment_that_cannot_be_followed_is_refused(tmp_path):
    def refused(match: str, **changes) -> None:
        with pytest.raises(ExperimentError, match=match):
            load_experiment(write(tmp_path, **changes), tmp_path / "out")

    runs, questions = EXPERIMENT["runs"], EXPERIMENT["questions"]
    retrieval = questions["retrieval"]
    refused("title", titel="x")
    refused("seeds", seeds=[0, 0])
    refused(
        "cannot start from 'nobody'",
        runs={**runs, "mixer": {"recipe": "alignment.yaml", "start": "nobody"}},
    )
    refused(
        "training.seed is the experiment's to set",
        runs={**runs, "mixer": {"recipe": "alignment.yaml", "set": {"training.seed": 3}}},
    )
    refused("reference 'CLIP'", questions={"q": {**retrieval, "reference": "CLIP"}})
    refused("measure 'accuracy'", questions={"q": {**retrieval, "measure": ["accuracy"]}})
    refused("no run 'vitt'", questions={"q": {**retrieval, "arms": {"InfoNCE": ["vitt"]}}})
    refused(
        "must have one run that 'retrieval' can measure",
        questions={"q": {**retrieval, "arms": {"InfoNCE": ["linear"]}}},
    )
    refused(
        "run 'vit' has none of",
        questions={"q": {**retrieval, "measure": ["findings"]}},
    )
    longer = {**runs["vit"], "set": {**runs["vit"]["set"], "training.max_steps": 3}}
    refused("different numbers of studies", runs={**runs, "vit": longer})
    with pytest.raises(ExperimentError, match="'tuning' is unknown: choose from retrieval"):
        load_experiment(write(tmp_path), tmp_path / "out", only=["tuning"])
    with pytest.raises(ExperimentError, match="2 seeds, not 3"):
        load_experiment(write(tmp_path), tmp_path / "out", seeds=3)


def test_the_committed_experiment_can_be_followed(tmp_path):
    path = Path(__file__).parents[2] / "recipes" / "comparison" / "phantoms.yaml"
    planned = load_experiment(path, tmp_path)
    assert planned.experiment.seeds == [0, 1, 2]
    linear = planned.recipes[2, "supervised-linear"].model
    assert linear["vision_config"]["stem_activation"] == "none"
    assert planned.recipes[1, "mixer"].start == str(tmp_path / "seed-1" / "mixer-aligned")
    for name in ("contrastive", "alignment", "instruction"):
        assert load_recipe(path.parent / f"{name}.yaml").stage == name


# --- scores -----------------------------------------------------------------------------------


def test_a_ratio_of_sums_is_not_a_mean_of_ratios():
    score = Ratio.of(([1, 0, 3], [1, 2, 3]), ([0, 1, 1], [1, 1, 2]), chance=0.5)
    assert score.value() == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert score.value(np.array([0, 0])) == pytest.approx((1 + 0) / 2)
    assert from_dict(json.loads(json.dumps(score.to_dict()))).value() == score.value()
    assert np.isnan(Ratio.of(([0, 1], [0, 1])).value(np.array([0])))


def test_an_auroc_counts_the_studies_that_it_should():
    truth = np.array([[1], [1], [0], [0]], dtype=bool)
    given = np.array([[0.9], [0.2], [0.5], [0.1]])
    everyone = Auroc(["nodule"], truth, given, np.ones_like(truth))
    large = Auroc(["nodule"], truth, given, np.array([[1], [0], [1], [1]], dtype=bool))
    assert everyone.value() == 0.75 and large.value() == 1.0
    assert large.positives().tolist() == [1]
    assert from_dict(json.loads(json.dumps(large.to_dict()))).value() == 1.0
    assert np.isnan(large.value(np.array([2, 3])))


def test_a_difference_is_paired_over_studies_and_knows_the_seeds():
    random = np.random.default_rng(0)
    hard = random.random((3, 200)) < 0.5  # the same studies are hard for both
    first = [Ratio.mean(row.astype(float)) for row in hard]
    assert difference(first, first) == (0, 0, 0)
    same = [Ratio.mean(row + 0.1) for row in hard]
    assert difference(first, same) == pytest.approx((0.1, 0.1, 0.1))
    seeds = [Ratio.mean(row + step) for row, step in zip(hard, (0.0, 0.1, 0.2), strict=True)]
    mean, low, high = difference(first, seeds)
    assert mean == pytest.approx(0.1) and low == pytest.approx(0) and high == pytest.approx(0.2)


def test_a_budget_is_what_the_trainer_will_see():
    """20 studies, 5 batches, 3 steps of two batches each epoch, the last of one."""
    training = TrainingRecipe(batch_size=4, accumulation=2, epochs=2)
    recipe = Recipe(training=training, data=DataRecipe(phantoms=20))
    planned = Planned(Experiment(), Path(), {(0, "run"): recipe})
    assert training.steps(20) == 6 and planned.studies_seen(0, "run") == 48
