"""Recipes: what is refused, with which sentence, and before anything is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from med3dvlm import hub
from med3dvlm.scan import PRESETS, Preparation
from med3dvlm.train import Recipe, RecipeError, check_needs, load_recipe, train
from tests.train.test_train import language_recipe, recipe, store  # noqa: F401

RECIPES = Path(__file__).parents[2] / "recipes"
PUBLISHED = RECIPES / "published"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("training.lerning_rate=1", r"'lerning_rate' .* 'training': .*'learning_rate'"),
        ("data.phantom=3", r"'phantom' is unknown in section 'data': .*'phantoms'"),
        ("data.validation.study=3", r"'study' .* section 'data.validation': .*'studies'"),
        ("trainig.batch_size=3", r"'trainig' is unknown in a recipe: .*'training'"),
        ("zzz=3", r"'zzz' is unknown in a recipe: it knows anew, data, "),
        ("training.precision=fp8", r"training.precision 'fp8' is unknown: .*fp32, bf16"),
        ("training.schedule=cosinus", r"training.schedule 'cosinus' is unknown"),
        ("training.warmup_share=1", r"training.warmup_share is 1.0: it is a share"),
        ("training.batch_size=0", r"training.batch_size is 0: it must be 1 or more"),
        ("training.learning_rate=.nan", r"training.learning_rate is nan"),
        ("training.ema=1", r"training.ema is 1.0"),
        ("training.evaluate_steps=2", r"data.validation.studies belong together"),
        ("training.loggers=[wand]", r"training.loggers 'wand' is unknown"),
        ("training.best_metric=f1", r"training.best_metric 'f1' is unknown: .*loss, r_at_1"),
        ("data.tasks={reports: 1}", r"data.tasks 'reports' is unknown: choose one of report, "),
        ("lora={r: 2}", r"lora needs a language model"),
        ("quantize=nf4", r"quantize needs lora"),
        ("keep_adapter=true", r"keep_adapter needs lora"),
        ("data.tasks={open: 1}", r"data.tasks is for the language stages: leave it out"),
        ("data.turns=2", r"data.turns is for the language stages"),
        ("data.vary_prompts=true", r"data.vary_prompts is for the language stages"),
        ("data.shuffle_choices=true", r"data.shuffle_choices is for the language stages"),
        ("training.loss_average=root", r"training.loss_average is for the language stages"),
        ("training.samples=1", r"training.samples is for the language stages"),
        ("anew=[loss]", r"anew needs a start"),
        ("start=demo", r"preparation: the checkpoint to start from has its own"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_named_with_what_could(tmp_path, change, sentence):
    with pytest.raises(RecipeError, match=sentence) as raised:
        load_recipe(recipe(tmp_path, tmp_path / "none"), [change])
    assert "\n" not in str(raised.value) and str(tmp_path / "recipe.yaml") in str(raised.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("lora.rank=4", r"key 'rank' is unknown in section 'lora': did you mean '.*rank.*'"),
        ("lora.target_module=[q_proj]", r"section 'lora': did you mean 'target_modules'"),
        ("lora.modules_to_save=[projector]", r"lora.modules_to_save: name the parts .* train"),
        ("lora={} train=[language_model]", r"train: with lora the language model"),
        ("preparation.crop=none", r"preparation: the checkpoint to start from has its own"),
        ("tokenizer_size=300", r"tokenizer_size: the checkpoint to start from has its own"),
        ("anew=[projector]", r"anew is for the contrastive stage: leave it out"),
        ("data.caption_share=0.5", r"data.caption_share is for the contrastive stage"),
        ("data.intensity=0.2", r"data.intensity is for the contrastive stage"),
        ("data.shift_voxels=1", r"data.shift_voxels is for the contrastive stage"),
        ("data.flips=swap", r"data.flips is for the contrastive stage"),
    ],
)  # fmt: skip
def test_what_a_language_stage_would_not_read_is_refused(tmp_path, change, sentence):
    path = language_recipe(tmp_path, tmp_path / "none", "alignment", "start", train=["projector"])
    with pytest.raises(RecipeError, match=sentence) as raised:
        load_recipe(path, change.split())
    assert "\n" not in str(raised.value)


def test_a_start_with_settings_of_its_own_refuses_others(tmp_path, store):  # noqa: F811
    path = recipe(tmp_path, store, start="demo", train=["loss"])
    load_recipe(path)
    for change in ("model.loss=infonce", "tokenizer_size=300", "preparation.crop=none"):
        key = change.split("=")[0].split(".")[0]
        with pytest.raises(RecipeError, match=f"{key}: the checkpoint to start from has its own"):
            load_recipe(path, [change])
    path = language_recipe(tmp_path, store, "alignment", "")
    demo = load_recipe(path, ["start=demo", "model={projector: linear}", "data.in_memory=true"])
    with pytest.raises(RecipeError, match="model: demo is a language model with settings of its"):
        train(demo)


def test_parts_of_the_model_that_come_whole_have_no_settings(tmp_path, store):  # noqa: F811
    train(load_recipe(recipe(tmp_path, store), ["training.max_steps=1"]))
    path = language_recipe(tmp_path, store, "alignment", "contrastive")
    for change, sentence in [
        ("model.vision_config={variant: nano}", "model.vision_config: start has its own"),
        (f"model.language_model={tmp_path / 'contrastive'}", "model.text_config: .*drop one"),
    ]:
        with pytest.raises(RecipeError, match=sentence):
            train(load_recipe(path, [change]))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.yaml")), ids=str)
def test_every_committed_recipe_can_be_followed(path):
    if path.name != "phantoms.yaml":  # the experiment
        load_recipe(path)


def test_what_is_missing_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "load_exact", lambda *_, **__: pytest.fail("a model was loaded"))
    none = tmp_path / "none"
    path = language_recipe(tmp_path, none, "alignment", "no-such-run")
    with pytest.raises(RecipeError, match=r"start: folder .*no-such-run does not exist"):
        train(load_recipe(path))
    with pytest.raises(RecipeError, match="start is missing"):
        train(load_recipe(path, ["start=null"]))
    path = language_recipe(tmp_path, none, "alignment", "")
    with pytest.raises(RecipeError, match=r"model.language_model: owner/no-such .*HF_HUB_OFFLINE"):
        train(load_recipe(path, ["model={language_model: owner/no-such}"]))
    path = recipe(tmp_path, none)
    with pytest.raises(RecipeError, match=r"data.store: .*none is no finished store"):
        train(load_recipe(path, ["data.phantoms=0"]))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "med3dvlm.train.recipe.find_spec", lambda name: None if name == "wandb" else found(name)
    )
    with pytest.raises(RecipeError, match="wandb is not installed: pip install wandb"):
        train(load_recipe(path, ["training.loggers=[wandb]"]))


def test_settings_that_a_model_does_not_have_are_refused(tmp_path, store):  # noqa: F811
    for change, sentence in [
        ("model.projection_dimm=8", r"'model': did you mean 'projection_dim'"),
        ("model.vision_config.depth=[1]", r"'model.vision_config': did you mean 'depths'"),
        ("model.text_config.n_layer=1", r"'model.text_config': did you mean 'n_layers'"),
    ]:
        with pytest.raises(RecipeError, match=sentence):
            train(load_recipe(recipe(tmp_path, store), [change]))


@pytest.mark.parametrize(
    ("stage", "missing"),
    [
        ("contrastive", r"model.text_encoder: medicalai/ClinicalBERT"),
        ("alignment", r"start: folder runs/published/contrastive does not exist"),
        ("instruction", r"start: folder runs/published/alignment does not exist"),
    ],
)
def test_published_recipes_lack_only_weights_and_stores(tmp_path, monkeypatch, stage, missing):
    monkeypatch.chdir(tmp_path)
    followed = load_recipe(PUBLISHED / f"{stage}.yaml")
    assert followed.stage == stage
    if followed.preparation:
        assert Preparation.from_dict(followed.preparation) == PRESETS["m3d"]
    with pytest.raises(RecipeError, match=missing):
        train(followed)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_a_launch_that_would_spread_the_model_is_refused(name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(
        RecipeError, match=f"{name}: start without it, and with training.shard=true"
    ):
        check_needs(Recipe())
