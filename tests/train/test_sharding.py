"""Runs whose processes share one model among them (FSDP2), over gloo."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from med3dvlm.hub import load
from med3dvlm.train import RecipeError, load_recipe, train
from med3dvlm.train.recipe import check_needs
from tests.train.test_ranks import LEARNING, TRAINING, by_torchrun
from tests.train.test_train import language_recipe, recipe, store  # noqa: F401


def test_runs_that_share_one_model(tmp_path, store):  # noqa: F811
    """Stopped and gone on with, validated, with adapters over bf16: see `sharded_runs`.

    And one that makes what a process makes alone of the same four pairs a step.
    """
    still = ["model.text_config.dropout=0", "model.text_config.attention_dropout=0"]
    train(load_recipe(recipe(tmp_path, store), ["training.max_steps=1", *still]))
    alone = recipe(
        tmp_path,
        store,
        start=str(tmp_path / "contrastive"),
        output=str(tmp_path / "alone"),
        train=[*LEARNING, "concept_head"],  # which sees no concepts, and gets no gradient
        training={**TRAINING, "batch_size": 4},
    ).rename(tmp_path / "alone.yaml")
    train(load_recipe(alone))
    start = language_recipe(tmp_path, store, "alignment", "contrastive", train=["projector"])
    untied = "model.text_config.tie_word_embeddings=false"
    aligned = train(load_recipe(start, ["training.max_steps=1", untied]))
    aligned.language_model.bfloat16()
    aligned.save_pretrained(tmp_path / "aligned")
    aligned.processor.save_pretrained(tmp_path / "aligned")
    del aligned
    assert load(tmp_path / "aligned").language_model.dtype.itemsize == 2
    watched = {
        **TRAINING,
        "shard": True,
        "batch_size": 2,
        "ema": 0.5,
        "evaluate_steps": 1,
        "gradient_checkpointing": True,
    }
    data = {"store": str(store), "phantoms": 8, "workers": 1, "validation": {"studies": 3}}
    recipe(
        tmp_path,
        store,
        data=data,
        training={**watched, "max_steps": 4, "accumulation": 2, "best_metric": "r_at_1"},
    ).rename(tmp_path / "contrastive.yaml")
    language_recipe(
        tmp_path,
        store,
        "instruction",
        "aligned",
        train=["projector"],
        lora={"r": 4},
        keep_adapter=True,
        data={**data, "turns": 2, "tasks": {"report": 1.0, "yes_no": 1.0}},
        training={**watched, "max_steps": 2, "precision": "bf16", "samples": 1, "result": "best"},
    ).rename(tmp_path / "lora.yaml")
    language_recipe(
        tmp_path,
        store,
        "alignment",
        "contrastive",
        training={**TRAINING, "batch_size": 2, "max_steps": 1},
    ).rename(tmp_path / "tied.yaml")
    run = by_torchrun("tests.train.sharded_runs", str(tmp_path))
    assert run.stdout.count("done") == 2
    before, alone, halves = (
        load_file(tmp_path / name / "model.safetensors")
        for name in ("contrastive", "alone", "halves")
    )
    moved = {name for name in alone if not torch.equal(alone[name], before[name])}
    assert len(moved) > 10 and {"loss.t_prime", "loss.bias"} < moved
    for name, tensor in alone.items():
        torch.testing.assert_close(halves[name], tensor, rtol=1e-5, atol=1e-6)


def test_one_process_has_nobody_to_share_with(tmp_path, store):  # noqa: F811
    path = recipe(tmp_path, store)
    with pytest.raises(RecipeError, match="this is one: start with torchrun"):
        check_needs(load_recipe(path, ["training.shard=true"]))
    lora = {"train": ["projector"], "lora": {"r": 4}, "quantize": "nf4"}
    path = language_recipe(tmp_path, store, "instruction", "aligned", **lora)
    with pytest.raises(RecipeError, match="training.shard cuts whole weights"):
        load_recipe(path, ["training.shard=true"])
