"""Training: recipes, the three stages end to end on a handful of phantoms, resuming."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from med3dvlm import hub
from med3dvlm.data.prepare import prepare_phantoms
from med3dvlm.data.prompts import REPORT_PROMPTS
from med3dvlm.data.store import Store, StoreError
from med3dvlm.models import VolumeTextDualEncoder
from med3dvlm.models.processor import IGNORED
from med3dvlm.scan import PRESETS, Preparation
from med3dvlm.train import RecipeError, load_recipe, train
from med3dvlm.train.engine import freeze_all_but
from med3dvlm.train.language import TaskCollator, TaskDataset
from tests.models import tiny

RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = Preparation(
    size=(16, 32, 32),
    window=((-1000, 0), (1000, 1)),
    spacing_mm=(24.0, 12.6, 12.6),
    fit="pad",
    antialias=True,
)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "phantoms"
    prepare_phantoms(folder, 8, split="train", preparation=SMALL, workers=1)
    return folder


def recipe(tmp_path: Path, store: Path, **changes) -> Path:
    settings = {
        "stage": "contrastive",
        "output": str(tmp_path / "contrastive"),
        "preparation": SMALL.to_dict(),
        "tokenizer_size": 500,
        "model": {
            "vision_config": {
                "variant": "t",
                "depths": [1] * 5,
                "channels": [8, 8, 8, 16, 16],
            },
            "text_config": {"dim": 32, "hidden_dim": 32, "n_layers": 1, "n_heads": 2},
            "projection_dim": 16,
            "concept_loss_weight": 1.0,
        },
        "data": {"store": str(store), "phantoms": 8, "workers": 1},
        "training": {
            "batch_size": 4,
            "epochs": 2,
            "loggers": [],
            "save_steps": 2,
            "log_steps": 1,
        },
        **changes,
    }
    if "start" in changes:  # which brings these
        for key in ("preparation", "tokenizer_size", *({"model"} - changes.keys())):
            settings.pop(key)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def language_recipe(tmp_path: Path, store: Path, stage: str, start: str, **changes) -> Path:
    model = {
        "low_tokens": [6, 4],
        "high_tokens": [3, 4],
        "text_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
        },
    }
    settings = {
        "stage": stage,
        "start": str(tmp_path / start),
        "output": str(tmp_path / stage),
        "train": ["projector", "language_model"],
        "model": model if stage == "alignment" else {},
        **changes,
    }
    return recipe(tmp_path, store, **settings)


def weights(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_three_stages_end_to_end(tmp_path, store):
    dual = train(load_recipe(recipe(tmp_path, store)))
    aligned = train(load_recipe(language_recipe(tmp_path, store, "alignment", "contrastive")))
    for name, tensor in dual.vision_encoder.state_dict().items():
        assert torch.equal(aligned.vision_encoder.state_dict()[name], tensor), name
    tasks = {"report": 1, "closed": 1, "open": 1, "yes_no": 1}
    path = language_recipe(
        tmp_path,
        store,
        "instruction",
        "alignment",
        train=["projector", "language_model", "vision_encoder"],
        data={"store": str(store), "phantoms": 8, "tasks": tasks},
    )
    tuned = train(load_recipe(path))
    moved = [
        name
        for name, tensor in aligned.state_dict().items()
        if not torch.equal(tensor, tuned.state_dict()[name])
    ]
    assert {name.split(".")[0] for name in moved} == {
        "vision_encoder",
        "projector",
        "language_model",
    }
    saved = hub.load(tmp_path / "instruction")
    assert saved.fingerprint() == tuned.fingerprint()
    summary = json.loads((tmp_path / "instruction" / "training.json").read_text())
    assert summary["recipe"]["data"]["tasks"] == tasks


def test_a_text_encoder_is_fitted_to_a_frozen_volume_encoder(tmp_path, store):
    before = weights(train(load_recipe(recipe(tmp_path, store))))
    learning = ["text_encoder", "text_projection", "vision_projection", "loss"]
    path = recipe(
        tmp_path,
        store,
        start=str(tmp_path / "contrastive"),
        output=str(tmp_path / "search"),
        train=learning,
        anew=["text_encoder"],
    )
    after = weights(train(load_recipe(path, ["training.seed=1"])))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(learning)
    embedding = "text_encoder.embeddings.word_embeddings.weight"
    near = torch.nn.functional.cosine_similarity(before[embedding], after[embedding]).abs()
    assert near.mean() < 0.5  # anew: nothing of what it was
    with pytest.raises(RecipeError, match="anew: 'vision_encoder'"):
        train(load_recipe(path, ["anew=[vision_encoder]", f"output={tmp_path / 'x'}"]))
    with pytest.raises(RecipeError, match="train is empty"):
        train(load_recipe(path, ["train=[]", f"output={tmp_path / 'x'}"]))


def test_prompts_vary_only_where_the_recipe_says_so(store):
    def instructions(**options) -> set[str]:
        dataset = TaskDataset(Store(store), {"report": 1.0}, "Report.", None, **options)
        return {dataset[number]["turns"][0][0] for number in range(200)}

    assert instructions() == {"Report."}
    assert instructions(vary_prompts=True) == {"Report.", *REPORT_PROMPTS}


def test_several_tasks_of_a_study_at_one_look_are_weighed_each_by_its_own_length(store):
    tasks = {"report": 1.0, "yes_no": 1.0, "open": 1.0}
    dataset = TaskDataset(Store(store), tasks, "Report.", None, turns=5)
    drawn = [dataset[number] for number in range(8)]
    assert max(len(item["turns"]) for item in drawn) > 3
    assert all(len(set(item["turns"])) == len(item["turns"]) for item in drawn)
    processor = tiny.vlm().processor
    batch = TaskCollator(processor, average="answer")(drawn)
    labels, weights = batch["labels"], batch["loss_weights"]
    assert float(weights.sum()) == pytest.approx(sum(len(item["turns"]) for item in drawn))
    assert bool((weights[labels == IGNORED] == 0).all())
    one = TaskCollator(processor, average="root")(drawn[:1])
    lengths = [
        int((processor.training_batch([[turn]])["labels"] != IGNORED).sum())
        for turn in drawn[0]["turns"]
    ]
    assert float(one["loss_weights"].sum()) == pytest.approx(sum(n**0.5 for n in lengths))


def test_volumes_kept_in_memory_train_the_same_model(tmp_path, store):
    path = recipe(tmp_path, store)
    first = weights(train(load_recipe(path)))
    kept = ["data.in_memory=true", f"output={tmp_path / 'kept'}"]
    second = weights(train(load_recipe(path, kept)))
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def test_lora_changes_the_language_model_through_adapters_alone(tmp_path, store):
    train(load_recipe(recipe(tmp_path, store)))
    before = train(load_recipe(language_recipe(tmp_path, store, "alignment", "contrastive")))
    before = weights(before)
    path = language_recipe(
        tmp_path,
        store,
        "instruction",
        "alignment",
        train=["projector"],
        lora={"r": 2},
        training={"batch_size": 4, "epochs": 2, "loggers": [], "learning_rate": 1e-2},
    )
    after = weights(train(load_recipe(path)))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("q_proj.weight" in name for name in changed)
    assert any(name.startswith("projector.") for name in changed)
    assert not any("embed_tokens" in name or "vision_encoder" in name for name in changed)


class Interrupted(Exception):
    """Stands for whatever ends a run."""


@pytest.mark.parametrize(("workers", "steps"), [(0, (1, 3, 4, 5, 7)), (1, (2, 4, 6)), (4, (3, 5))])
def test_interrupted_runs_see_the_same_batches_and_end_in_the_same_weights(
    tmp_path, store, monkeypatch, workers, steps
):
    """Two epochs of four steps, interrupted at a step and resumed."""
    training = {"batch_size": 2, "epochs": 2, "loggers": [], "save_steps": 1, "log_steps": 1}
    path = recipe(tmp_path, store, training={**training, "loader_workers": workers})
    forward = VolumeTextDualEncoder.forward
    seen: list[str] = []

    def run(stop: int | None = None) -> dict[str, torch.Tensor]:
        def recording(self, *args, **batch):
            if len(seen) == stop:
                raise Interrupted
            content = batch["volumes"].numpy().tobytes() + batch["input_ids"].numpy().tobytes()
            seen.append(hashlib.sha256(content).hexdigest())
            return forward(self, *args, **batch)

        monkeypatch.setattr(VolumeTextDualEncoder, "forward", recording)
        return weights(train(load_recipe(path)))

    whole, batches = run(), list(seen)
    assert len(set(batches)) == 8
    for step in steps:
        shutil.rmtree(tmp_path / "contrastive")
        seen.clear()
        with pytest.raises(Interrupted):
            run(stop=step)
        resumed = run()
        assert seen == batches
        assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]


def test_time_limit_ends_a_run(tmp_path, store):
    path = recipe(
        tmp_path,
        store,
        training={"batch_size": 4, "epochs": 10000, "max_minutes": 0.03, "loggers": []},
    )
    train(load_recipe(path))
    assert (tmp_path / "contrastive" / "model.safetensors").is_file()


@pytest.mark.parametrize("path", sorted(RECIPES.glob("demo*/*.yaml")), ids=str)
def test_the_committed_recipes_can_be_read(path):
    recipe = load_recipe(path)
    stages = dict.fromkeys(("search", "longer", "baseline"), "contrastive")
    stages["letters"] = "instruction"
    assert recipe.stage == stages.get(path.stem, path.stem)
    if recipe.preparation:
        preparation = Preparation.from_dict(recipe.preparation)
        assert (preparation == PRESETS["demo"]) is (path.parent.name == "demo")


def test_recipes_that_cannot_be_followed(tmp_path, store):
    path = recipe(tmp_path, store)
    with pytest.raises(RecipeError, match="lerning_rate"):
        load_recipe(path, ["training.lerning_rate=1"])
    with pytest.raises(RecipeError, match="batch_size"):
        load_recipe(path, ["training.batch_size=many"])
    with pytest.raises(RecipeError, match="is no file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="stage 'pretraining' is unknown"):
        load_recipe(path, ["stage=pretraining"])
    with pytest.raises(RecipeError, match="precision"):
        train(load_recipe(path, ["training.precision=fp8"]))
    with pytest.raises(RecipeError, match="'decoder' is no part"):
        freeze_all_but(torch.nn.Sequential(), ["decoder"])


def test_a_pair_needs_a_report(tmp_path, store):
    copy = shutil.copytree(store, tmp_path / "copy")
    table = pq.read_table(copy / "manifest.parquet")
    reports = [
        "" if number == 3 else text for number, text in enumerate(table["report"].to_pylist())
    ]
    place = table.schema.get_field_index("report")
    pq.write_table(table.set_column(place, "report", [reports]), copy / "manifest.parquet")
    name = Store(copy).ids[3]
    data = {"store": str(copy), "workers": 1}
    with pytest.raises(RecipeError, match=f"1 of 8 studies have no report, the first is '{name}'"):
        train(load_recipe(recipe(tmp_path, copy, data=data)))
    train(load_recipe(recipe(tmp_path, copy, data={**data, "skip": [name]})))
    assert (tmp_path / "contrastive" / "model.safetensors").is_file()


def test_the_store_is_kept_and_checked(tmp_path, store):
    opened = Store(store)
    assert len(opened) == 8 and opened.volumes.dtype == np.uint8
    stamp = (store / "store.json").stat().st_mtime_ns
    prepare_phantoms(store, 8, split="train", preparation=SMALL, workers=1)
    assert (store / "store.json").stat().st_mtime_ns == stamp
    other = Preparation.from_dict({**SMALL.to_dict(), "size": [8, 8, 8]})
    with pytest.raises(ValueError, match="size"):
        opened.check_preparation(other)
    (tmp_path / "broken").mkdir()
    with pytest.raises(StoreError, match="no finished store"):
        Store(tmp_path / "broken")
