"""The engine: plans, gradient checkpointing, the mean of the weights, validation, adapters."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import BertTokenizer, DistilBertConfig, DistilBertModel
from typer.testing import CliRunner

from med3dvlm import hub
from med3dvlm.cli import app
from med3dvlm.data.prepare import prepare_phantoms
from med3dvlm.data.store import MANIFEST, Store
from med3dvlm.models import DCFormer, DCFormerConfig, Med3DVLM
from med3dvlm.models.published import save_published
from med3dvlm.train import RecipeError, load_recipe, train
from med3dvlm.train.average import WeightAverage
from med3dvlm.train.contrastive import contrastive_job
from med3dvlm.train.language import language_job
from med3dvlm.train.lora import merge_adapter, with_adapters
from med3dvlm.train.plan import plan
from med3dvlm.train.recipe import Recipe
from tests.models.published_folders import vlm_folder
from tests.train.test_train import SMALL, language_recipe, recipe, store, weights  # noqa: F401

TRAINING = {"batch_size": 4, "epochs": 2, "loggers": [], "log_steps": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, store) -> Path:  # noqa: F811
    """A folder with a run of each of the first two stages."""
    folder = tmp_path_factory.mktemp("aligned")
    train(load_recipe(recipe(folder, store)))
    train(load_recipe(language_recipe(folder, store, "alignment", "contrastive")))
    return folder


def everything_in(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# --- plans ------------------------------------------------------------------------------------


def test_a_plan_counts_what_the_run_then_does_and_writes_nothing(tmp_path, store):  # noqa: F811
    training = {**TRAINING, "batch_size": 3, "accumulation": 2, "epochs": 3, "ema": 0.5}
    path = recipe(tmp_path, store, training=training)
    before = everything_in(tmp_path)
    planned = plan(load_recipe(path))
    assert everything_in(tmp_path) == before
    model = train(load_recipe(path))
    history = json.loads((tmp_path / "contrastive" / "history.json").read_text())
    assert planned.steps == history[-1]["step"]
    assert planned.samples == planned.steps * 6 and planned.studies == 8
    for name, child in model.named_children():
        count = sum(p.numel() for p in child.parameters())
        assert planned.parts[name] == (count, count)
    trained = 4 * sum(p.numel() for p in model.parameters())
    memory = planned.memory
    assert (memory["gradients"], memory["optimizer"]) == (trained, 2 * trained)
    assert memory["average"] == trained < memory["weights"]
    # at the least the stem's outputs are kept: 4 layers of 3 branches, 8 channels, 4·8·8 voxels
    assert memory["activations"] > 3 * 4 * 3 * 8 * 256 * 4
    assert 0 < planned.seconds_per_step < 10
    lengths = [len(model.processor.tokenizer(t)["input_ids"]) for t in _reports(store)]
    assert planned.text_tokens["most"] == max(lengths)


def _reports(folder: Path) -> list[str]:
    return Store(folder).table["report"].to_pylist()


def test_a_plan_of_phantoms_that_are_not_there_yet_leaves_none(tmp_path):
    path = recipe(tmp_path, tmp_path / "later", training={**TRAINING, "max_minutes": 0.001})
    planned = plan(load_recipe(path, ["data.phantoms=4000"]))
    assert planned.studies == 4000 and not (tmp_path / "later").exists()
    assert planned.seconds == pytest.approx(0.06) and planned.steps < 2000
    assert any("max_minutes" in note for note in planned.notes)


def test_a_plan_of_a_language_stage(aligned, store):  # noqa: F811
    path = language_recipe(
        aligned, store, "instruction", "alignment", train=["projector"], lora={"r": 2}
    )
    planned = plan(load_recipe(path))
    assert planned.visual_tokens == 8
    model = hub.load(aligned / "alignment")
    projector = sum(p.numel() for p in model.projector.parameters())
    adapters = 2 * (4 * (32 + 32) - 2 * 16 + 3 * (32 + 64))  # q, k, v, o; gate, up, down
    assert planned.parts["vision_encoder"][0] == 0
    assert planned.parts["projector"][0] == projector
    assert planned.parts["language_model"][0] == adapters
    assert not (aligned / "instruction").exists()


def test_plans_that_cannot_be(aligned, store, tmp_path):  # noqa: F811
    with pytest.raises(RecipeError, match="only 8 studies"):
        plan(load_recipe(recipe(tmp_path, store), ["training.batch_size=9"]))
    with pytest.raises(RecipeError, match="'decoder' is no part of the model"):
        plan(load_recipe(recipe(tmp_path, store), ["train=[decoder]"]))
    path = language_recipe(tmp_path, store, "alignment", str(aligned / "contrastive"))
    with pytest.raises(RecipeError, match=r"longest sample is \d+ tokens .*embeddings = 16"):
        plan(load_recipe(path, ["model.text_config.max_position_embeddings=16"]))


# --- gradient checkpointing -------------------------------------------------------------------


def encoder() -> DCFormer:
    torch.manual_seed(0)
    config = DCFormerConfig("t", depths=[1, 2, 1, 1, 1], channels=[4, 4, 8, 8, 8])
    config.layer_scale_init = 0.5
    return DCFormer(config).train()


@pytest.mark.parametrize("passes", [1, 2])
def test_checkpointed_gradients_and_statistics_are_those_of_the_plain_encoder(passes):
    """Statistics are counted once a forward, although the blocks are computed twice."""
    plain, checkpointed = encoder(), encoder()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    kept = {}
    for name, model in (("plain", plain), ("checkpointed", checkpointed)):
        sizes = []

        def note(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        for seed in range(passes):
            volumes = torch.randn(2, 1, 16, 32, 32, generator=torch.Generator().manual_seed(seed))
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss = sum(stream.square().mean() for stream in model(volumes))
            loss.backward()
        kept[name] = sum(sizes)
    assert kept["checkpointed"] < kept["plain"]
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    for (name, one), other in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(one, other), name
    moved = plain.stages[0].blocks[0].conv.norm_depth
    assert moved.num_batches_tracked == passes and moved.running_mean.abs().sum() > 0


def test_runs_with_and_without_gradient_checkpointing_end_in_the_same_weights(
    aligned,
    store,  # noqa: F811
    tmp_path,
):
    ends = []
    for wanted in (False, True):
        path = language_recipe(
            tmp_path,
            store,
            "instruction",
            str(aligned / "alignment"),
            train=["vision_encoder", "projector", "language_model"],
            training={**TRAINING, "max_steps": 2, "gradient_checkpointing": wanted},
        )
        ends.append(weights(train(load_recipe(path, [f"output={tmp_path / str(wanted)}"]))))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=0, atol=1e-7, msg=name)


# --- the mean of the weights ------------------------------------------------------------------


def test_the_mean_is_that_of_torch_and_stands_in_for_the_weights():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    average = WeightAverage(model, 0.9)
    expected = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(4):
        with torch.no_grad():
            model[0].weight.add_(torch.randn(3, 3))
        model(torch.randn(8, 3))
        average.update()
        expected.update_parameters(model)
    own = copy.deepcopy(model.state_dict())
    with average:
        for name, tensor in expected.module.state_dict().items():
            if tensor.is_floating_point():
                assert torch.equal(model.state_dict()[name], tensor), name
    for name, tensor in own.items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert "0.bias" not in average.mean  # frozen


def test_the_result_of_a_run_with_ema_is_the_mean(tmp_path, store):  # noqa: F811
    path = recipe(tmp_path, store, training={**TRAINING, "save_steps": 2, "ema": 0.9})
    model = train(load_recipe(path))
    last = tmp_path / "contrastive" / "checkpoints" / "checkpoint-4"
    mean, raw = load_file(last / "ema.safetensors"), load_file(last / "model.safetensors")
    result = load_file(tmp_path / "contrastive" / "model.safetensors")
    changed = [name for name in mean if not torch.equal(mean[name], raw[name])]
    assert len(changed) > len(mean) / 2
    for name, tensor in mean.items():
        assert torch.equal(result[name], tensor) and torch.equal(model.state_dict()[name], tensor)


# --- validation -------------------------------------------------------------------------------


def test_a_contrastive_run_is_watched_and_its_best_checkpoint_kept(tmp_path, store):  # noqa: F811
    training = {**TRAINING, "batch_size": 2, "save_steps": 100, "evaluate_steps": 1}
    training |= {"best_metric": "r_at_1", "loggers": ["tensorboard"]}
    path = recipe(tmp_path, store, training=training)
    data = [f"data.store={tmp_path / 'phantoms'}", "data.phantoms=8", "data.validation.studies=5"]
    model = train(load_recipe(path, data))
    output = tmp_path / "contrastive"
    history = json.loads((output / "history.json").read_text())
    watched = {e["step"]: float(e["eval_r_at_1"]) for e in history if "eval_r_at_1" in e}
    assert list(watched) == list(range(1, 9))
    best = max(watched, key=lambda step: (watched[step], -step))
    kept = {path.name for path in (output / "checkpoints").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", "checkpoint-8"}
    held_out = Store(tmp_path / "phantoms-validation")
    assert len(held_out) == 5 and all(
        "validation" in s for s in held_out.table["splits"].to_pylist()
    )
    images = model.get_image_features(next(held_out.batches(5))).detach()
    tokens = model.processor.tokens(held_out.table["report"].to_pylist())
    texts = model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).detach()
    hits = ((images @ texts.T).argmax(1) == torch.arange(5)).float().mean()
    assert watched[8] == pytest.approx(float(hits))
    (log,) = {file.parent for file in output.rglob("events.out.tfevents*")}
    scalars = EventAccumulator(str(log)).Reload()
    assert "eval/r_at_1" in scalars.Tags()["scalars"]


def test_watching_leaves_no_trace_in_what_is_learned(aligned, store, tmp_path):  # noqa: F811
    ends = []
    for watch in ({}, {"evaluate_steps": 1, "samples": 2, "loggers": ["tensorboard"]}):
        path = language_recipe(
            tmp_path,
            store,
            "instruction",
            str(aligned / "alignment"),
            train=["projector"],
            lora={"r": 2, "lora_dropout": 0.3},
            training={**TRAINING, "ema": 0.5, **watch},
            output=str(tmp_path / str(len(ends))),
            data={
                "store": str(tmp_path / "phantoms"),
                "phantoms": 8,
                "tasks": {"closed": 1.0},
                "validation": {"studies": 3 if watch else 0},
            },
        )
        ends.append(weights(train(load_recipe(path))))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    rows = [json.loads(row) for row in (tmp_path / "1" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 1, 2, 2, 3, 3, 4, 4]
    held_out = Store(tmp_path / "phantoms-validation").ids
    assert [row["id"] for row in rows[:2]] == held_out[:2]
    assert all(row["answer"] and "Choices: A." in row["instruction"] for row in rows)
    (log,) = {file.parent for file in (tmp_path / "1").rglob("events.out.tfevents*")}
    texts = EventAccumulator(str(log)).Reload()
    assert f"samples/{held_out[0]}/text_summary" in texts.Tags()["tensors"]


def test_studies_that_are_watched_are_not_trained_on(aligned, tmp_path, store):  # noqa: F811
    """Of a store that is there, the first of the split are held out."""
    path = language_recipe(aligned, store, "instruction", "alignment", train=["projector"])
    changes = ["data.phantoms=0", "data.validation={studies: 3, split: train}"]
    job = language_job(load_recipe(path, [*changes, "training.evaluate_steps=1"]))
    held_out, trained = job.validation.dataset.store.ids, job.dataset.store.ids
    assert len(held_out) == 3 and len(trained) == 5 and not set(held_out) & set(trained)
    loss, samples = job.validation.measure(job.model.eval())
    assert math.isfinite(loss["loss"]) and len(samples) == 3
    with pytest.raises(RecipeError, match="has 0 of split 'validation'"):
        changes = ["data.phantoms=0", "data.validation.studies=3", "training.evaluate_steps=1"]
        contrastive_job(load_recipe(recipe(tmp_path, store), changes))


def test_only_the_split_that_is_named_is_trained_on(tmp_path, store):  # noqa: F811
    folder = tmp_path / "store"
    shutil.copytree(store, folder)
    table = parquet.read_table(folder / MANIFEST)
    splits = pa.array([["train"]] * 5 + [["test"]] * 3, table.schema.field("splits").type)
    column = table.schema.get_field_index("splits")
    parquet.write_table(table.set_column(column, "splits", splits), folder / MANIFEST)
    path, ids = recipe(tmp_path, folder), table["id"].to_pylist()

    def trained(*changes: str) -> list[str]:
        return contrastive_job(load_recipe(path, ["data.phantoms=0", *changes])).dataset.store.ids

    assert trained() == ids[:5]
    assert trained(f"data.skip=[{ids[1]}]") == [ids[0], *ids[2:5]]
    assert trained("data.split=test", "training.batch_size=2") == ids[5:]
    with pytest.raises(RecipeError, match="only 0 studies of split 'validation'"):
        trained("data.split=validation")


# --- language models and text encoders --------------------------------------------------------


def test_merged_adapters_compute_what_the_adapters_computed(aligned, store, tmp_path):  # noqa: F811
    path = language_recipe(
        aligned, store, "instruction", "alignment", train=["projector"], lora={"r": 4}
    )
    followed = load_recipe(path)
    torch.manual_seed(0)
    model = hub.load(aligned / "alignment")
    learner = with_adapters(model, followed)
    for name, parameter in learner.named_parameters():
        if "lora_B" in name:  # zero at first
            torch.nn.init.normal_(parameter, std=0.1)
    batch = model.processor.training_batch([[("Is it so?", "Yes, it is.")]])
    visual = torch.randn(1, model.num_visual_tokens, 32)
    inputs = {"input_ids": batch["input_ids"], "visual_tokens": visual}
    learner.eval()
    with torch.no_grad():
        before = learner(**inputs).logits
        with learner.disable_adapter():
            base = learner(**inputs).logits
        merged = learner.merge_and_unload()
        after = merged(**inputs).logits
    assert (before - base).abs().max() > 1e-2
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert isinstance(merged, Med3DVLM)
    assert merged.state_dict().keys() == hub.load(aligned / "alignment").state_dict().keys()


def test_merged_adapters_are_exported_to_the_published_layout_and_back(tmp_path):
    folder, _ = vlm_folder(tmp_path / "published")
    model = hub.load(folder)
    lora = Recipe(stage="instruction", output="", train=[], lora={"r": 2})
    learner = with_adapters(model, lora)
    torch.manual_seed(0)
    for name, parameter in learner.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    merged = learner.merge_and_unload().eval()
    save_published(merged, tmp_path / "exported")
    loaded, original = hub.load(tmp_path / "exported"), hub.load(folder)
    assert loaded.fingerprint() == merged.fingerprint() != original.fingerprint()
    ids = torch.arange(6).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, merged(input_ids=ids).logits)
        assert not torch.allclose(original(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_an_adapter_that_is_kept_merges_to_the_same_model(aligned, store, tmp_path):  # noqa: F811
    path = language_recipe(
        tmp_path,
        store,
        "instruction",
        str(aligned / "alignment"),
        train=["projector", "vision_encoder"],
        lora={"r": 2},
        keep_adapter=True,
        training=TRAINING,
    )
    trained = train(load_recipe(path))
    adapter, merged = tmp_path / "instruction" / "adapter", tmp_path / "merged"
    result = CliRunner().invoke(app, ["model", "merge", str(adapter), "-o", str(merged)])
    assert result.exit_code == 0, result.output
    again = hub.load(merged).state_dict()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(again[name], tensor), name
    with pytest.raises(hub.CheckpointError, match="is no adapter"):
        merge_adapter(tmp_path)
    with pytest.raises(hub.CheckpointError, match="is no language model"):
        merge_adapter(adapter, str(aligned / "contrastive"))


def text_encoder_folder(folder: Path, reports: list[str]) -> Path:
    words = sorted({word for text in reports for word in text.lower().replace(".", " .").split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary), "utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = DistilBertConfig(
        vocab_size=len(vocabulary),
        dim=16,
        hidden_dim=16,
        n_layers=1,
        n_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(5)
    DistilBertModel(config).save_pretrained(folder)
    return folder


def test_a_text_encoder_comes_with_its_weights_and_tokenizer(tmp_path, store):  # noqa: F811
    folder = text_encoder_folder(tmp_path / "bert", _reports(store))
    path = recipe(tmp_path, store, training={**TRAINING, "max_steps": 1, "learning_rate": 1e-9})
    followed = load_recipe(path)
    followed.model.pop("text_config")
    followed.model["text_encoder"] = str(folder)
    model = train(followed)
    assert model.config.text_config.dim == 16
    for name, tensor in DistilBertModel.from_pretrained(folder).state_dict().items():
        torch.testing.assert_close(model.text_encoder.state_dict()[name], tensor, atol=1e-6, rtol=0)
    saved = hub.load(tmp_path / "contrastive")
    tokens = saved.processor.tokens(_reports(store))
    assert tokens["input_ids"].shape[1] <= 64 and int(tokens["input_ids"][0, 0]) == 2  # [CLS]
    assert saved.fingerprint() == model.fingerprint()
    followed.model["text_encoder"] = str(tmp_path / "none")
    with pytest.raises(RecipeError, match=r"model.text_encoder: folder .*none does not exist"):
        train(followed)


def test_adapters_over_4_bits_are_merged_into_the_whole_weights(aligned, store, tmp_path):  # noqa: F811
    path = language_recipe(
        tmp_path,
        store,
        "instruction",
        str(aligned / "alignment"),
        train=["projector"],
        lora={"r": 2},
        quantize="nf4",
        training={"batch_size": 4, "epochs": 2, "loggers": [], "learning_rate": 1e-2},
    )
    job = language_job(load_recipe(path))
    packed = [p for p in job.learner.parameters() if p.dtype == torch.uint8]
    assert len(packed) == 7 and not any(p.requires_grad for p in packed)  # of one block
    before = hub.load(aligned / "alignment").state_dict()
    after = train(load_recipe(path)).state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype, name
    change = {name: after[name] - before[name] for name in before if "_proj.weight" in name}
    assert all(0 < torch.linalg.matrix_rank(delta) <= 2 for delta in change.values())
    assert torch.equal(
        after["language_model.model.embed_tokens.weight"],
        before["language_model.model.embed_tokens.weight"],
    )


def test_a_run_over_a_mixture_sees_its_stores_by_weight(tmp_path, store):  # noqa: F811
    other = tmp_path / "other"
    prepare_phantoms(other, 12, split="train", seed=1, preparation=SMALL, workers=1)
    data = {
        "mixture": {str(store): 3.0, str(other): 1.0},
        "flips": "swap",
        "validation": {"studies": 5, "split": "train"},
    }
    path = recipe(tmp_path, store, data=data)
    job = contrastive_job(load_recipe(path, ["training.evaluate_steps=1"]))
    assert len(job.validation.dataset) == 5 and len(job.dataset) == 15
    names = {job.dataset[i]["id"] for i in range(15)}
    ours = {i for i in range(15) if "seed1" not in job.dataset[i]["id"]}
    assert len(ours) == 11  # three quarters
    watched = {job.validation.dataset[i]["id"] for i in range(5)}
    assert not names & watched
    assert sum("seed1" in name for name in watched) == 2
    texts = [job.dataset[i] for i in range(15)]
    assert 0 < sum(item["drawn"][7] for item in texts) < 15
    model = train(load_recipe(path, ["training.evaluate_steps=2", "training.batch_size=5"]))
    assert torch.isfinite(model.vision_projection.weight).all()
    planned = plan(load_recipe(path, ["training.evaluate_steps=2"]))
    assert planned.studies == 15


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": {}}, "either a store or a mixture"),
        ({"data": {"mixture": {"a": 1.0}, "phantoms": 3}}, "phantoms are generated into"),
        ({"data": {"mixture": {"a": 0.0}}}, "weight of a is 0.0"),
        ({"data": {"mixture": {"nowhere": 1.0}}}, "nowhere is no finished store"),
        ({"data": {"store": "s", "flips": "sometimes"}}, "data.flips 'sometimes' is unknown"),
    ],
)
def test_mixtures_and_flips_that_cannot_be(tmp_path, store, settings, message):  # noqa: F811
    with pytest.raises(RecipeError, match=message):
        train(load_recipe(recipe(tmp_path, store, **settings)))
