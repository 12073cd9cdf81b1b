"""Adapters: which layers get them, and what is refused in one sentence."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft.utils import save_and_load
from transformers import AutoConfig, AutoModelForCausalLM

from med3dvlm import hub
from med3dvlm.models.quantized import quantize_linear_layers
from med3dvlm.train import Recipe, RecipeError, load_recipe, train
from med3dvlm.train.lora import adapted_layers, with_adapters
from tests.models import tiny
from tests.train.test_engine import TRAINING, aligned  # noqa: F401
from tests.train.test_train import language_recipe, store  # noqa: F401

SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


def family(name: str):
    """A tiny model with a language model of another family."""
    model = tiny.vlm()
    config = AutoConfig.for_model(
        name,
        **SMALL,
        **({} if name == "gpt2" else {"intermediate_size": 64, "num_key_value_heads": 2}),
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model.language_model = AutoModelForCausalLM.from_config(config)
    return model


def with_lora(**settings) -> Recipe:
    return Recipe(stage="instruction", output="", train=["projector"], lora=settings)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_linear_layers_of_the_blocks_get_adapters(name):
    model = family(name)
    layers = adapted_layers(model)
    per_block = {layer.rpartition(".")[2] for layer in layers}
    assert per_block == set(FAMILIES[name])
    assert all(layer.startswith("language_model.") for layer in layers)
    assert len(layers) == 2 * (4 if name == "gpt2" else len(FAMILIES[name]))  # c_proj is twice
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        learner = with_adapters(model, with_lora(r=2))
    adapted = {key.split(".lora_A")[0] for key in learner.state_dict() if ".lora_A." in key}
    assert adapted == {f"base_model.model.{layer}" for layer in layers}
    ids = torch.arange(6).unsqueeze(0)
    for key, parameter in learner.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        before = learner.eval()(input_ids=ids).logits
        merged = learner.merge_and_unload()(input_ids=ids).logits
    torch.testing.assert_close(merged, before, rtol=0, atol=1e-4)


def test_the_recipe_can_name_the_layers():
    model = tiny.vlm()
    named = adapted_layers(model, ["q_proj", "layers.0.mlp.up_proj", "embed_tokens"])
    assert [name.split("model.", 2)[2] for name in named] == [
        "layers.0.self_attn.q_proj",
        "layers.1.self_attn.q_proj",
        "layers.0.mlp.up_proj",
        "embed_tokens",
    ]
    assert adapted_layers(model, r".*\.(q|v)_proj") == [
        f"language_model.model.layers.{n}.self_attn.{which}_proj" for n in (0, 1) for which in "qv"
    ]
    assert adapted_layers(model, "all-linear") == adapted_layers(model)
    learner = with_adapters(model, with_lora(target_modules=["v_proj"], r=2))
    assert sum("lora_A" in name for name, _ in learner.named_parameters()) == 2


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"target_modules": ["w_proj"]}, "lora.target_modules: 'w_proj' is no layer .* q_proj"),
        ({"target_modules": "w_proj"}, "lora.target_modules: 'w_proj' is no layer"),
        ({"target_modules": "(w_proj"}, r"lora.target_modules: '\(w_proj' is no pattern"),
        ({"target_modules": []}, r"lora.target_modules is \[\]: give ends of names"),
        ({"target_modules": 3}, r"lora.target_modules is 3: give ends of names"),
        ({"r": 0}, "lora cannot be followed: .*r"),
        ({"init_lora_weights": "no-such"}, "lora cannot be followed: "),
    ],
)
def test_adapters_that_cannot_be(settings, sentence):
    with pytest.raises(RecipeError, match=sentence) as raised:
        with_adapters(tiny.vlm(), with_lora(**settings))
    assert "\n" not in str(raised.value)


def test_a_language_model_in_8_bits_has_no_layer_to_adapt():
    model = tiny.vlm()
    quantize_linear_layers(model.language_model)
    with pytest.raises(RecipeError, match="no linear layer of whole weights"):
        with_adapters(model, with_lora())


def test_a_run_with_settings_as_they_are_trains_adapters_and_asks_no_hub(
    aligned,  # noqa: F811
    store,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    monkeypatch.setattr(
        save_and_load, "check_file_exists_on_hf_hub", lambda *_, **__: pytest.fail("a hub is asked")
    )
    path = language_recipe(
        tmp_path,
        store,
        "instruction",
        str(aligned / "alignment"),
        train=["projector"],
        lora={},
        keep_adapter=True,
        training={**TRAINING, "save_steps": 1, "learning_rate": 1e-2},
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = train(load_recipe(path))
    assert not [str(w.message) for w in said if "config file" in str(w.message)]
    before = hub.load(aligned / "alignment").state_dict()
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert 0 < torch.linalg.matrix_rank(model.state_dict()[name] - before[name]) <= 16
    adapter = tmp_path / "instruction" / "adapter"
    assert str(aligned / "alignment") in (adapter / "adapter_config.json").read_text("utf-8")


def test_qwen_gets_the_layers_of_the_published_run():
    """Those that were named before, on one with a layer of the same name elsewhere."""
    model = tiny.vlm()
    model.vision_encoder.q_proj = torch.nn.Linear(2, 2)
    names = [name for name, _ in model.named_modules()]
    ends = FAMILIES["qwen2"]
    expected = [n for n in names if n.startswith("language_model") and n.endswith(ends)]
    assert adapted_layers(model) == expected
