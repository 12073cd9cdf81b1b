"""Names to models: the bundled demo, local folders, and names on the Hugging Face hub."""

from __future__ import annotations

import json
import re
import warnings
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The models are imported when one is loaded: a name that is wrong is refused at once.
if TYPE_CHECKING:
    import torch

    from med3dvlm.models import Med3DVLM, VolumeTextDualEncoder

BUNDLED = ("demo",)
PARTS = {"language": "language_model", "search": "dual_encoder"}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, in one sentence that names the file or the first key."""


class ModelNotFoundError(CheckpointError):
    """No model of that name, in one sentence with what could be meant."""


def load(
    name_or_folder: str | Path,
    *,
    part: str | None = None,
    device: str | torch.device = "auto",
    precision: str | None = None,
) -> Med3DVLM | VolumeTextDualEncoder:
    """Load a model with its processor, ready for inference.

    Args:
        name_or_folder: "demo", a checkpoint folder (own or published layout), or a name on the
            hub such as "MagicXin/Med3DVLM-Qwen-2.5-7B", taken from the local cache where it is
            there and downloaded only where a network is.
        part: "language" or "search", for a folder that holds both a language model and a dual
            encoder; the language model where not given.
        device: "auto" takes a GPU where there is one.
        precision: "fp32" or "bf16", of the encoder's products; its weights' own where not given.

    Raises:
        CheckpointError: one sentence on what is missing or wrong.
        ValueError: for another precision.
    """
    model = load_exact(name_or_folder, part=part)
    from med3dvlm.models import Med3DVLM, VolumeTextDualEncoder

    wanted = {"language": Med3DVLM, "search": VolumeTextDualEncoder}.get(part or "")
    if wanted is not None and not isinstance(model, wanted):
        raise CheckpointError(
            f"model {str(name_or_folder)!r} is a {type(model).__name__}; this needs a "
            f"{wanted.__name__}: give another model."
        )
    model = _place(model, device)
    # on a GPU only where it is asked for: there it was not measured yet
    if model.device.type == "cpu" or precision is not None:
        model.optimize_for_inference(precision)
    return model


def load_exact(
    name_or_folder: str | Path, *, part: str | None = None
) -> Med3DVLM | VolumeTextDualEncoder:
    """Like :func:`load`, but on the CPU and in the very precision of the file."""
    folder = checkpoint_folder(name_or_folder, part)
    from med3dvlm.models.published import is_published, load_published, read_config

    config = read_config(folder)
    model = load_published(folder) if is_published(config) else _load_own(folder, config)
    model.label = str(name_or_folder)
    model.calibration = _calibration(folder, model)
    return model


def resolve(name_or_folder: str | Path) -> Path:
    """The folder behind a name.

    Raises:
        ModelNotFoundError: if there is none.
    """
    name = str(name_or_folder)
    if name in BUNDLED:
        return Path(str(files("med3dvlm") / "assets" / name))
    path = Path(name)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ModelNotFoundError(
            f"model {name!r} is neither a folder here nor a known name: use "
            f"{', '.join(BUNDLED)}, a checkpoint folder, or a hub name such as owner/model."
        )
    return _from_hub(name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.bin"]
    with suppress(LocalEntryNotFoundError):  # not in the cache: ask the hub
        cached = Path(snapshot_download(name, local_files_only=True))
        if _is_whole(cached):
            return cached
    try:
        found = Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=3))
    except Exception as error:  # the hub's client raises many kinds; each means: not to be had
        reason = str(error).split("\n", 1)[0][:160]
        raise ModelNotFoundError(
            f"model {name!r} is not in the local cache and could not be downloaded ({reason}): "
            "download it where a network is and give its folder."
        ) from error
    if not _is_whole(found):  # without a network the hub's client is content with what is there
        raise ModelNotFoundError(
            f"model {name!r} is not whole in the local cache ({found}), and no network is there to "
            "go on: download it where one is and give its folder."
        )
    return found


def _is_whole(folder: Path) -> bool:
    """Whether every part that an index of weights names is there; a download can be interrupted."""
    if not any(folder.rglob("*config.json")):
        return False
    return all(
        (index.parent / part).is_file()
        for index in folder.rglob("*.index.json")
        for part in json.loads(index.read_text("utf-8")).get("weight_map", {}).values()
    )


def checkpoint_folder(name_or_folder: str | Path, part: str | None = None) -> Path:
    """Where the weights of a name are.

    A folder may hold a language model and a dual encoder side by side, as the demo does.
    """
    folder = resolve(name_or_folder)
    if part is not None and part not in PARTS:
        raise ValueError(f"part {part!r} is unknown: use {' or '.join(PARTS)}.")
    if (folder / "config.json").is_file():
        return folder
    inside = folder / PARTS[part or "language"]
    return inside if inside.is_dir() else folder


def _load_own(folder: Path, config: dict[str, Any]) -> Med3DVLM | VolumeTextDualEncoder:
    from med3dvlm.models import (
        DualEncoderConfig,
        Med3DVLM,
        Med3DVLMConfig,
        Med3DVLMProcessor,
        VolumeTextDualEncoder,
    )
    from med3dvlm.models.published import fill_model, read_weights

    kinds = {
        Med3DVLMConfig.model_type: (Med3DVLMConfig, Med3DVLM),
        DualEncoderConfig.model_type: (DualEncoderConfig, VolumeTextDualEncoder),
    }
    model_type = config.get("model_type")
    if model_type not in kinds:
        raise CheckpointError(
            f"{folder}: model_type {model_type!r} is not one of this project's or of the published "
            f"checkpoints: {', '.join(kinds)}, dec_clip and vlm_qwen are."
        )
    config_class, model_class = kinds[model_type]
    try:
        model = fill_model(model_class, config_class.from_dict(config), read_weights(folder), [])
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    model.processor = Med3DVLMProcessor.from_folder(folder)
    return model


def _calibration(folder: Path, model: Any) -> Any:
    """That beside a language model; one for other weights is left out, with a warning."""
    from med3dvlm.models import Med3DVLM

    # a file of that name beside a dual encoder is of `train calibration`, and `classify` reads it
    if not isinstance(model, Med3DVLM) or not (folder / "calibration.json").is_file():
        return None
    from med3dvlm.evidence import Calibration

    try:
        found = Calibration.load(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if found is not None and found.weights != model.fingerprint():
        warnings.warn(
            f"{folder / 'calibration.json'} was made for other weights and is left out: make it "
            "again with 'med3dvlm evaluate calibration --save'",
            stacklevel=3,
        )
        return None
    return found


def _place(model: Any, device: str | torch.device) -> Any:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    if model.device.type == "cpu" and half:
        model.float()  # half precision saves space on disk; a CPU computes it slowly
    return model.eval()
