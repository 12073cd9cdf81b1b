"""Adapters on the language model (LoRA), over 16-bit weights or over 4-bit ones (QLoRA)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from med3dvlm.files import atomic_folder
from med3dvlm.hub import CheckpointError, load_exact
from med3dvlm.models import Med3DVLM
from med3dvlm.train.ranks import is_main
from med3dvlm.train.recipe import Recipe

LINEAR = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def with_adapters(model: Med3DVLM, recipe: Recipe) -> Any:
    """PEFT's model around this one: adapters learn, and in full the parts the recipe names."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, **(recipe.lora or {})}
    config = LoraConfig(
        target_modules=LINEAR, modules_to_save=list(recipe.train) or None, **settings
    )
    return get_peft_model(model, config)


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
        small.requires_grad_(False).to(layer.weight.device)  # moving is what packs the weights
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
        learner.save_pretrained(folder)


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
    name = base or PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if name is None:
        raise CheckpointError(f"{adapter} does not say what it was trained on: give --base.")
    model = load_exact(name)
    if not isinstance(model, Med3DVLM):
        raise CheckpointError(f"{name} is no language model: give --base, what {adapter} began as.")
    try:
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().eval()
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{adapter} does not belong to {name}: give --base, what its run began with."
        ) from error
