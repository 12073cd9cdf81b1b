"""What learns is held in fp32, and a batch teaches the same however it is cut into parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from med3dvlm import hub
from med3dvlm.models import Med3DVLM
from med3dvlm.train import load_recipe, train
from med3dvlm.train.contrastive import contrastive_job
from med3dvlm.train.engine import _trainer
from med3dvlm.train.language import language_job, start_model
from med3dvlm.train.plan import plan
from tests.train.test_train import language_recipe, recipe, store  # noqa: F401

TRAINING = {"batch_size": 4, "max_steps": 2, "loggers": [], "log_steps": 1}


@pytest.fixture(scope="module")
def contrastive(tmp_path_factory, store) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("contrastive")
    train(load_recipe(recipe(folder, store, training={**TRAINING, "max_steps": 1})))
    return folder / "contrastive"


@pytest.fixture(scope="module")
def words(tmp_path_factory, contrastive) -> Path:
    """A pretrained language model in bf16 with its tokenizer, as they are published."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = hub.load(contrastive).processor.tokenizer
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(3)
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def over(words: Path, tmp_path: Path, store: Path, start: Path, **changes) -> Path:  # noqa: F811
    model = {"low_tokens": [6, 4], "high_tokens": [3, 4], "language_model": str(words)}
    return language_recipe(
        tmp_path, store, "alignment", str(start), model=model, training=TRAINING, **changes
    )


def dtypes(module: torch.nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in module.parameters()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_language_model_in_bf16_learns_in_fp32_and_stays_as_it_is_where_it_does_not(
    tmp_path,
    store,  # noqa: F811
    contrastive,
    words,
    precision,
):
    path = over(words, tmp_path, store, contrastive)
    settings = [f"training.precision={precision}", "training.learning_rate=1e-5"]
    followed = load_recipe(path, settings)
    before = start_model(followed)
    assert dtypes(before.language_model) == {torch.float32}
    planned = plan(followed)
    learned = sum(trained for trained, _ in planned.parts.values())
    assert planned.memory["gradients"] == 4 * learned
    assert planned.memory["optimizer"] == 8 * learned
    after = train(followed)
    name = "model.layers.0.mlp.up_proj.weight"
    old, new = (model.language_model.state_dict()[name] for model in (before, after))
    moved = (new - old).abs()
    assert float((moved > 0).float().mean()) > 0.9 and float(moved.max()) < 1e-4

    frozen = load_recipe(path, [*settings, "train=[projector]", f"output={tmp_path / 'frozen'}"])
    result = train(frozen)
    assert dtypes(result.language_model) == {torch.bfloat16}
    assert dtypes(result.projector) == {torch.float32}
    saved = hub.load_exact(tmp_path / "frozen")
    assert saved.fingerprint() == result.fingerprint()


def test_a_model_that_goes_on_in_bf16_learns_in_fp32(tmp_path, store, contrastive):  # noqa: F811
    model = hub.load_exact(contrastive).bfloat16()
    model.save_pretrained(tmp_path / "half")
    model.processor.save_pretrained(tmp_path / "half")
    path = recipe(tmp_path, store, start=str(tmp_path / "half"), train=["text_encoder"])
    job = contrastive_job(load_recipe(path))
    assert dtypes(job.model.text_encoder) == {torch.float32}
    assert dtypes(job.model.vision_encoder) == {torch.bfloat16}


def test_the_language_model_that_is_replaced_takes_no_memory(
    tmp_path,
    store,  # noqa: F811
    contrastive,
    words,
    monkeypatch,
):
    made: list[torch.device] = []
    init = Med3DVLM.__init__

    def watched(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self.language_model.get_input_embeddings().weight.device)

    monkeypatch.setattr(Med3DVLM, "__init__", watched)
    followed = load_recipe(over(words, tmp_path, store, contrastive, train=["projector"]))
    model = start_model(followed)
    assert made == [torch.device("meta")]
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    pretrained = Qwen2ForCausalLM.from_pretrained(words)
    for name, tensor in pretrained.state_dict().items():
        own = model.language_model.state_dict()[name]  # embeddings have more rows for new tokens
        assert torch.equal(own[: len(tensor)], tensor), name
    again = start_model(followed).projector.state_dict()  # drawn from the seed
    for name, tensor in model.projector.state_dict().items():
        assert torch.equal(again[name], tensor), name


class Gradients(TrainerCallback):
    def __init__(self):
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert model is not None
        self.found = {
            name: parameter.grad.clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }


@pytest.mark.parametrize("average", ["token", "root", "answer"])
def test_a_batch_in_two_parts_teaches_what_it_teaches_whole(
    tmp_path,
    store,  # noqa: F811
    contrastive,
    average,
):
    data = {
        "store": str(store),
        "phantoms": 8,
        "workers": 1,
        "turns": 3,
        "tasks": {"report": 1.0, "yes_no": 1.0, "closed": 1.0},
    }
    training = {
        **TRAINING,
        "max_steps": 1,
        "loss_average": average,
        "clip_norm": 1e9,
        "save_steps": 9,
    }
    path = language_recipe(
        tmp_path, store, "alignment", str(contrastive), data=data, training=training
    )

    def gradients(batch: int, parts: int) -> dict[str, torch.Tensor]:
        sizes = [f"training.batch_size={batch}", f"training.accumulation={parts}"]
        followed = load_recipe(path, [*sizes, f"output={tmp_path / str(parts)}"])
        trainer = _trainer(language_job(followed), followed, None)
        trainer.add_callback(watch := Gradients())
        trainer.train()
        return watch.found

    whole, cut = gradients(4, 1), gradients(2, 2)
    assert len(whole) > 20 and whole.keys() == cut.keys()
    a, b = (torch.cat([of[name].flatten() for name in whole]) for of in (whole, cut))
    assert float((a - b).norm() / a.norm()) < 1e-5
