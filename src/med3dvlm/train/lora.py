"""Adapters on the language model (LoRA), over 16-bit weights or over 4-bit ones (QLoRA)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from med3dvlm.files import atomic_folder
from med3dvlm.hub import CheckpointError, load_exact
from med3dvlm.models import Med3DVLM
from med3dvlm.train.engine import freeze_all_but, learn_in_fp32
from med3dvlm.train.ranks import is_main, own_device
from med3dvlm.train.recipe import Recipe, RecipeError

OWN = "language_model."  # where its layers are found in the model


def with_adapters(model: Med3DVLM, recipe: Recipe) -> Any:
    """PEFT's model around this one: adapters learn, and in full the parts the recipe names.

    Raises:
        RecipeError: for layers that the language model does not have, and what PEFT refuses.
    """
    from peft import LoraConfig, get_peft_model

    settings = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, **(recipe.lora or {})}
    layers = adapted_layers(model, settings.pop("target_modules", None))
    turned = {isinstance(model.get_submodule(name), Conv1D) for name in layers}
    settings.setdefault("fan_in_fan_out", turned == {True})  # Conv1D keeps its weights so
    try:
        config = LoraConfig(
            target_modules=layers, modules_to_save=list(recipe.train) or None, **settings
        )
        learner = get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        reason = str(error).split("\n", 1)[0].rstrip(".")
        raise RecipeError(f"lora cannot be followed: {reason}.") from error
    # of any other, None too, PEFT looks for the config at each save, on a hub if it must
    learner.peft_config["default"].base_model_name_or_path = ""
    return learner


def adapted_layers(model: Med3DVLM, wanted: Any = None) -> list[str]:
    """The layers of the language model that get adapters, by their names in the model.

    Args:
        wanted: ends of names, or a pattern of a whole name; where it is None or "all-linear", all
            linear layers but the last, which gives the logits.

    Raises:
        RecipeError: if there is none, or one that is wanted is not there.
    """
    last = model.get_output_embeddings()
    layers = {
        OWN + name: layer
        for name, layer in model.language_model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D | nn.Embedding)
    }
    if wanted not in (None, "all-linear"):
        return _wanted_layers(list(layers), wanted)
    found = [
        name
        for name, layer in layers.items()
        if layer is not last and not isinstance(layer, nn.Embedding)
    ]
    if not found:
        raise RecipeError("lora: the language model has no linear layer of whole weights.")
    return found


def _wanted_layers(there: list[str], wanted: Any) -> list[str]:
    """Those that `lora.target_modules` means, in its order."""
    if not wanted or not isinstance(wanted, str | list | tuple):
        raise RecipeError(
            f"lora.target_modules is {wanted!r}: give ends of names, such as [q_proj, v_proj], or "
            "leave it out for all."
        )
    whole = isinstance(wanted, str)
    found: dict[str, None] = {}
    for item in [wanted] if whole else wanted:
        try:
            pattern = re.compile(item if whole else rf"(.*\.)?{re.escape(str(item))}")
        except re.error as error:
            raise RecipeError(f"lora.target_modules: {item!r} is no pattern ({error}).") from error
        matches = [name for name in there if pattern.fullmatch(name)]
        if not matches:
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in there}))
            raise RecipeError(
                f"lora.target_modules: {item!r} is no layer of the language model: it has {ends}."
            )
        found |= dict.fromkeys(matches)
    return list(found)


def quantize(model: Med3DVLM) -> None:
    """Hold the linear layers of the language model's blocks in 4 bits (NF4), in place.

    They are frozen; what is computed with them stays in the precision of the run (QLoRA, arXiv
    2305.14314). Embeddings, the last layer, encoder and projector keep their precision.
    """
    import bitsandbytes

    for name, layer in list(model.language_model.named_modules()):
        if (
            not isinstance(layer, nn.Linear)
            or layer is model.language_model.get_output_embeddings()
        ):
            continue
        small = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            quant_type="nf4",
        )
        small.load_state_dict(layer.state_dict())
        small.weight = bitsandbytes.nn.Params4bit(
            layer.weight.data, requires_grad=False, quant_type="nf4"
        )
        small.requires_grad_(False).to(own_device())  # moving is what packs the weights
        parent, _, own = name.rpartition(".")
        setattr(model.language_model.get_submodule(parent), own, small)
    model.is_loaded_in_4bit = True  # by which PEFT chooses its adapters


def merged(learner: Any, recipe: Recipe, base: Callable[[], Med3DVLM]) -> Med3DVLM:
    """The model with its adapters merged into the weights.

    Args:
        base: makes the model that the run began with; adapters that were trained over 4 bits are
            merged into its weights, which are whole, and not into those rounded ones.
    """
    if not recipe.quantize:
        return learner.merge_and_unload()
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    whole = with_adapters(base(), recipe)
    set_peft_model_state_dict(whole, get_peft_model_state_dict(learner))
    return whole.merge_and_unload()


def save_adapter(learner: Any, recipe: Recipe) -> None:
    """PEFT's own format, with the parts that were trained in full, in `<output>/adapter`."""
    if not is_main():
        return
    learner.peft_config["default"].base_model_name_or_path = str(recipe.start)
    with atomic_folder(Path(recipe.output, "adapter")) as folder:
        learner.save_pretrained(folder, save_embedding_layers=False)  # True asks a hub


def merge_adapter(adapter: Path, base: str | None = None) -> Med3DVLM:
    """The model that a run with `keep_adapter` ended in, from its adapter and what it began with.

    Args:
        base: the checkpoint the run began with, where it is not any more where the run found it.

    Raises:
        CheckpointError: for a folder that is no adapter, or a base that it does not belong to.
    """
    from peft import PeftConfig, PeftModel

    if not (adapter / "adapter_config.json").is_file():
        raise CheckpointError(f"{adapter} is no adapter: it has no adapter_config.json.")
    config: Any = PeftConfig.from_pretrained(str(adapter))
    name = base or config.base_model_name_or_path
    if not name:
        raise CheckpointError(f"{adapter} does not say what it was trained on: give --base.")
    model = load_exact(name)
    if not isinstance(model, Med3DVLM):
        raise CheckpointError(f"{name} is no language model: give --base, what {adapter} began as.")
    try:
        freeze_all_but(model, list(config.modules_to_save or []))
        learn_in_fp32(model)
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{adapter} does not belong to {name}: give --base, what its run began with."
        ) from error
