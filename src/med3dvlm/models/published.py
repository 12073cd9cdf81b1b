"""Published Med3DVLM checkpoints: read as they are, and written back bit for bit.

Two things differ from the project's own layout: the names, for which there is one table of
rewriting rules per part, read in both directions; and the order of the axes, for published
convolutions keep (height, width, depth) where the project keeps (depth, height, width).

What is peculiar to the released weights becomes a named setting of the config: the linear stem
(`stem_activation: none`) and the shifted prompt (`prompt_layout: published`).
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    DistilBertConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.utils.logging import disable_progress_bar

from med3dvlm.files import atomic_folder, write_json
from med3dvlm.hub import CheckpointError
from med3dvlm.models.dcformer import VARIANTS, DCFormer, DCFormerConfig
from med3dvlm.models.dual_encoder import DualEncoderConfig, VolumeTextDualEncoder
from med3dvlm.models.med3dvlm import Med3DVLM, Med3DVLMConfig
from med3dvlm.models.processor import IMAGE_TOKEN, Med3DVLMProcessor, VolumeFeatureExtractor
from med3dvlm.scan import PRESETS, Preparation

PUBLISHED_MODEL_TYPES = ("dec_clip", "vlm_qwen")

# Widths of well-known text encoders and their numbers of attention heads, which no shape tells.
HEADS_OF_WIDTH = {768: 12, 1024: 16, 512: 8, 384: 12, 312: 12, 256: 4, 128: 2}


# --- names ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Rewrites one family of names, both ways.

    `published` and `own` are templates in which {n} stands for a number and {rest} for the end.
    """

    published: str
    own: str

    def rename(self, name: str, *, to_own: bool) -> str | None:
        source, target = (self.published, self.own) if to_own else (self.own, self.published)
        match = _pattern(source).fullmatch(name)
        return target.format(**match.groupdict()) if match else None


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    groups = {"n": r"(?P<n>\d+)", "i": r"(?P<i>\d+)", "rest": r"(?P<rest>.+)"}
    for name, group in groups.items():
        escaped = escaped.replace("{" + name + "}", group)
    return re.compile(escaped)


def _convolution(published: str, own: str) -> list[Rule]:
    """c1, c2, c3 lie along height, width, depth; in each, 0 is the convolution, 1 its norm."""
    return [
        Rule(f"{published}.{branch}.{index}.{{rest}}", f"{own}.{kind}_{axis}.{{rest}}")
        for branch, axis in (("c1", "height"), ("c2", "width"), ("c3", "depth"))
        for index, kind in ((0, "along"), (1, "norm"))
    ]


def _encoder_rules() -> list[Rule]:
    rules = _convolution("encoder.s0.0.{n}", "stem.layers.{n}")
    for stage in range(1, 5):
        block, own = f"encoder.s{stage}.{{n}}", f"stages.{stage - 1}.blocks.{{n}}"
        rules += _convolution(f"{block}.dwconv", f"{own}.conv")
        rules += [
            Rule(
                f"encoder.s{stage}.0.proj.{{rest}}", f"stages.{stage - 1}.downsample.proj.{{rest}}"
            ),
            Rule(f"{block}.scale", f"{own}.layer_scale"),
            Rule(f"{block}.mlp.mlp.0.{{rest}}", f"{own}.expand.{{rest}}"),
            Rule(f"{block}.mlp.mlp.3.{{rest}}", f"{own}.contract.{{rest}}"),
        ]
    return rules


def _mixer_rules() -> list[Rule]:
    rules = []
    for stream in ("low", "high"):
        published, own = f"{stream}_mixer.{{n}}", f"{stream}.{{n}}"
        rules += [
            Rule(f"{published}.ln1.{{rest}}", f"{own}.token_norm.{{rest}}"),
            Rule(f"{published}.ln2.{{rest}}", f"{own}.width_norm.{{rest}}"),
        ]
        for index, mlp in ((1, "token_mlp"), (2, "width_mlp")):
            head = f"{published}.mlp{index}.mm_projector"
            rules += [
                Rule(f"{head}.0.{{rest}}", f"{own}.{mlp}.0.{{rest}}"),
                Rule(f"{head}.1.1.{{rest}}", f"{own}.{mlp}.2.{{rest}}"),
            ]
    return rules


def _prefixed(rules: list[Rule], published: str, own: str) -> list[Rule]:
    return [Rule(published + rule.published, own + rule.own) for rule in rules]


ENCODER_RULES = _encoder_rules()
PROJECTOR_RULES = {
    "mixer": _mixer_rules(),
    "low_high_mlp": [
        Rule("low_up_mlp.{rest}", "low.{rest}"),
        Rule("high_up_mlp.{rest}", "high.{rest}"),
        Rule("mm_projector.1.{rest}", "out.{rest}"),
    ],
}
DUAL_ENCODER_RULES = [
    *_prefixed(ENCODER_RULES, "vision_encoder.", "vision_encoder."),
    Rule("language_encoder.{rest}", "text_encoder.{rest}"),
    Rule("mm_vision_proj.{rest}", "vision_projection.{rest}"),
    Rule("mm_language_proj.{rest}", "text_projection.{rest}"),
    Rule("t_prime", "loss.t_prime"),
    Rule("bias", "loss.bias"),
]


def _vlm_rules(projector: str) -> list[Rule]:
    return [
        *_prefixed(ENCODER_RULES, "model.vision_tower.vision_tower.", "vision_encoder."),
        *_prefixed(PROJECTOR_RULES[projector], "model.mm_projector.", "projector."),
        Rule("model.{rest}", "language_model.model.{rest}"),
        Rule("lm_head.{rest}", "language_model.lm_head.{rest}"),
    ]


def _translate(weights: Mapping[str, Tensor], rules: list[Rule], *, to_own: bool) -> dict:
    """Rename every entry and turn the axes of convolutions; nothing is computed.

    Raises:
        CheckpointError: naming the first entry that no rule knows.
    """
    out = {}
    for name, tensor in weights.items():
        new = next(filter(None, (rule.rename(name, to_own=to_own) for rule in rules)), None)
        if new is None:
            raise CheckpointError(
                f"key {name!r} is unexpected: this is not a checkpoint of that kind, or one of "
                "another version."
            )
        out[new] = _turn_axes(tensor, to_own=to_own) if tensor.ndim == 5 else tensor
    return out


def _turn_axes(kernel: Tensor, *, to_own: bool) -> Tensor:
    """(out, in, H, W, D) of published kernels <-> (out, in, D, H, W)."""
    order = (0, 1, 4, 2, 3) if to_own else (0, 1, 3, 4, 2)
    return kernel.permute(order).contiguous()


# --- files ------------------------------------------------------------------------------------


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        CheckpointError: if it is missing or no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json: give the folder of a checkpoint.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold a JSON object: download it again.")
    return config


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """All tensors of a weights file, or of a folder's single or sharded weights.

    Pickles are read with `weights_only=True`, so nothing in them runs.

    Raises:
        CheckpointError: for missing, truncated or unreadable files.
    """
    path = Path(path)
    if path.is_file():
        return _read_weights_file(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist: give a checkpoint folder or weights file.")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return _read_weights_file(path / name)
        index = path / f"{name}.index.json"
        if index.is_file():
            return _read_shards(index)
    raise CheckpointError(
        f"{path} has neither model.safetensors nor pytorch_model.bin: download the weights too."
    )


def _read_shards(index: Path) -> dict[str, Tensor]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a weights index: download it again.") from error
    weights: dict[str, Tensor] = {}
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names a shard outside its folder: {name!r}.")
        weights.update(_read_weights_file(index.parent / name))
    missing = next((key for key in weight_map if key not in weights), None)
    if missing is not None:
        raise CheckpointError(
            f"key {missing!r} is missing from {weight_map[missing]}: download that shard again."
        )
    return weights


def _read_weights_file(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: download it.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file ({error}): download it again."
            ) from error
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; each means the same for the user
        reason = str(error).split("\n", 1)[0][:200]
        raise CheckpointError(
            f"{path} is not a file of plain weights ({reason}): download it again, or convert it "
            "to safetensors where it was made."
        ) from error
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise CheckpointError(f"{path} does not hold a state dict of tensors.")
    return weights


def check_weights(
    weights: Mapping[str, Tensor], model: nn.Module, *, rules: list[Rule] | None = None
) -> None:
    """Compare names and shapes with what the model needs, before anything is loaded.

    Args:
        rules: to speak of published names where the weights came with those.

    Raises:
        CheckpointError: naming the first missing, unexpected or misshapen key.
    """
    needed = model.state_dict()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())

    def called(name: str) -> str:
        names = (rule.rename(name, to_own=False) for rule in rules or [])
        return next(filter(None, names), name)

    for name, tensor in needed.items():
        if name not in weights:
            if name in tied:
                continue
            raise CheckpointError(f"key {called(name)!r} is missing: the checkpoint is incomplete.")
        if weights[name].shape != tensor.shape:
            raise CheckpointError(
                f"key {called(name)!r} has shape {tuple(weights[name].shape)} where the config "
                f"asks for {tuple(tensor.shape)}: config and weights do not belong together."
            )
    for name in weights:
        if name not in needed:
            raise CheckpointError(
                f"key {called(name)!r} is unexpected: config and weights do not belong together."
            )


ALIGNMENT = 64  # bytes, of the memory that torch allocates


def fill_model(
    cls: type[PreTrainedModel],
    config: PretrainedConfig,
    weights: dict[str, Tensor],
    rules: list[Rule],
) -> Any:
    """A model of `config` that holds exactly `weights`, each in its own precision.

    Raises:
        CheckpointError: naming the first missing, unexpected or misshapen key.
    """
    with torch.device("meta"):
        check_weights(weights, cls(config), rules=rules)
    disable_progress_bar()  # the weights are in memory already; callers show their own
    most = _commonest_dtype(weights)
    model = cls.from_pretrained(None, config=config, state_dict=weights, dtype=most)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        own = weights.get(name, tensor)  # one that is not in the file is no part of a checkpoint
        if own.dtype != tensor.dtype:
            tensor.data = own
        # in a file they lie anywhere; a CPU's products round by where their factors start
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
    return model.eval()


def _commonest_dtype(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The floating dtype of most weights: only the others exist twice while they are placed."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in weights.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0] if counts else torch.float32


# --- encoder and projector alone --------------------------------------------------------------


def encoder_config(weights: Mapping[str, Tensor], **overrides: Any) -> DCFormerConfig:
    """The DCFormer config that published encoder weights (own names) belong to.

    Raises:
        CheckpointError: naming the first missing key.
    """

    def shape(name: str) -> torch.Size:
        if name not in weights:
            published = next(filter(None, (r.rename(name, to_own=False) for r in ENCODER_RULES)))
            raise CheckpointError(f"key {published!r} is missing: this is no DCFormer encoder.")
        return weights[name].shape

    first = shape("stem.layers.0.along_depth.weight")
    depths, channels, kernels = [1], [first[0]], []
    for stage in range(4):
        pattern = re.compile(rf"stages\.{stage}\.blocks\.(\d+)\.layer_scale")
        blocks = [m for m in map(pattern.fullmatch, weights) if m]
        kernel = shape(f"stages.{stage}.blocks.0.conv.along_depth.weight")
        depths.append(max([int(m[1]) for m in blocks], default=0) + 1)
        channels.append(kernel[0])
        kernels.append(kernel[2])
    variant = next(
        (name for name, v in VARIANTS.items() if v == (tuple(depths), tuple(channels))), "custom"
    )
    settings = {
        "variant": variant,
        "depths": depths,
        "channels": channels,
        "kernel_sizes": kernels,
        "in_channels": first[1],
        "stem_kernel_size": first[2],
        "stem_activation": "none",
    }
    return DCFormerConfig(**{**settings, **overrides})


def encoder_from_published(state_dict: Mapping[str, Tensor], **overrides: Any) -> DCFormer:
    """A DCFormer from published weights: alone, or inside a contrastive or language model.

    Args:
        state_dict: names as published, for example `encoder.s0.0.0.c1.0.weight`; what stands in
            front of `encoder.` and whatever is not of the encoder is left out.
        overrides: settings of :class:`DCFormerConfig`, for example `volume_size`.

    Raises:
        CheckpointError: naming the first missing, unexpected or misshapen key.
    """
    marker = "encoder.s0."
    prefix = next((k[: k.index(marker)] for k in state_dict if marker in k), None)
    if prefix is None:
        raise CheckpointError(
            "key 'encoder.s0.0.0.c1.0.weight' is missing: this is no DCFormer encoder."
        )
    own_part = f"{prefix}encoder."
    alone = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(own_part)}
    weights = _translate(alone, ENCODER_RULES, to_own=True)
    return fill_model(DCFormer, encoder_config(weights, **overrides), weights, ENCODER_RULES)


def encoder_to_published(encoder: DCFormer) -> dict[str, Tensor]:
    """The encoder's weights under their published names and axes."""
    return _translate(encoder.state_dict(), ENCODER_RULES, to_own=False)


def load_projector_weights(
    projector: nn.Module, state_dict: Mapping[str, Tensor], *, kind: str = "mixer"
) -> None:
    """Fill a projector from published weights (`mm_projector.bin`, or a part of a checkpoint).

    Raises:
        CheckpointError: naming the first missing, unexpected or misshapen key.
    """
    lead = re.compile(r"^(base_model\.model\.)?(model\.)?mm_projector\.(?=low_|high_|mm_)")
    names = {lead.sub("", name): tensor for name, tensor in state_dict.items()}
    weights = _translate(names, PROJECTOR_RULES[kind], to_own=True)
    check_weights(weights, projector, rules=PROJECTOR_RULES[kind])
    projector.load_state_dict(weights)


# --- whole checkpoints ------------------------------------------------------------------------


def is_published(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in PUBLISHED_MODEL_TYPES


def load_published(
    folder: Path, *, text_config: PretrainedConfig | None = None
) -> Med3DVLM | VolumeTextDualEncoder:
    """Load a published checkpoint folder, its processor with it; no network is used.

    Args:
        text_config: of the contrastive model's text encoder, where it is neither beside the
            weights nor in the local hub cache and its shapes do not tell it.

    Raises:
        CheckpointError: naming the file or the first missing, unexpected or misshapen key.
    """
    config = read_config(folder)
    weights = read_weights(folder)
    try:
        if config.get("model_type") == "dec_clip":
            return _load_dual_encoder(folder, config, weights, text_config)
        return _load_vlm(folder, config, weights)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def _volume_size(config: Mapping[str, Any]) -> list[int]:
    """Published configs give (H, W, D); ours is (D, H, W)."""
    height, width, depth = config.get("input_size") or (256, 256, 128)
    return [depth, height, width]


def _preparation(size: list[int]) -> Preparation:
    settings = PRESETS["m3d"].to_dict()
    return Preparation.from_dict({**settings, "size": size})


def _load_dual_encoder(
    folder: Path,
    config: dict[str, Any],
    published: dict[str, Tensor],
    text_config: PretrainedConfig | None,
) -> VolumeTextDualEncoder:
    weights = _translate(published, DUAL_ENCODER_RULES, to_own=True)
    size = _volume_size(config)
    text_weights = _under("text_encoder.", weights)
    own = DualEncoderConfig(
        vision_config=encoder_config(_under("vision_encoder.", weights), volume_size=size),
        text_config=text_config or _text_config(folder, config, text_weights),
        projection_dim=config.get("hidden_size", 768),
        published_config=config,
    )
    model = fill_model(VolumeTextDualEncoder, own, weights, DUAL_ENCODER_RULES)
    tokenizer = _tokenizer(folder, config.get("language_model_name_or_path"))
    model.processor = Med3DVLMProcessor(VolumeFeatureExtractor(_preparation(size)), tokenizer)
    model.label = folder.name
    return model


def _load_vlm(folder: Path, config: dict[str, Any], published: dict[str, Tensor]) -> Med3DVLM:
    kind = config.get("mm_projector_type", "mixer")
    if kind not in PROJECTOR_RULES:
        raise CheckpointError(
            f"mm_projector_type {kind!r} is not supported: {', '.join(PROJECTOR_RULES)} are."
        )
    if config.get("vision_tower", "dcformer") != "dcformer":
        raise CheckpointError(
            f"vision_tower {config['vision_tower']!r} is not supported: dcformer is."
        )
    rules = _vlm_rules(kind)
    weights = _translate(published, rules, to_own=True)
    size = _volume_size(config)
    text_config = Qwen2Config(**{k: v for k, v in config.items() if k != "model_type"})
    tokenizer = _tokenizer(folder, None)
    own = Med3DVLMConfig(
        vision_config=encoder_config(_under("vision_encoder.", weights), volume_size=size),
        text_config=text_config,
        projector=kind,
        low_tokens=config.get("low_output_size", [192, 128]),
        high_tokens=config.get("high_output_size", [64, 128]),
        image_token_id=_image_token_id(tokenizer, text_config.vocab_size),
        prompt_layout="published",
        published_config=config,
    )
    model = fill_model(Med3DVLM, own, weights, rules)
    model.processor = Med3DVLMProcessor(
        VolumeFeatureExtractor(_preparation(size)),
        tokenizer,
        num_visual_tokens=model.num_visual_tokens,
    )
    model.label = folder.name
    return model


def _under(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}


def _image_token_id(tokenizer: Any, vocab_size: int) -> int:
    """The added token is the last of the vocabulary, unless the tokenizer says otherwise."""
    if tokenizer is not None and IMAGE_TOKEN in tokenizer.get_vocab():
        return tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return vocab_size - 1


def _tokenizer(folder: Path, name: str | None) -> Any:
    """The tokenizer beside the weights, or `name`'s from the local hub cache, or None."""
    if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    if name:
        try:
            return AutoTokenizer.from_pretrained(name, local_files_only=True)
        except (OSError, ValueError):
            warnings.warn(
                f"{folder} has no tokenizer and {name!r} is not on this machine: scans can be "
                "embedded, texts cannot; put the tokenizer's files beside the weights."
            )
    return None


def _text_config(folder: Path, config: dict, weights: dict[str, Tensor]) -> PretrainedConfig:
    """The text encoder's config: beside the weights, by its name, or read off the shapes."""
    name = config.get("language_model_name_or_path")
    for place in (folder / "text_encoder", name):
        if place is None:
            continue
        try:
            return AutoConfig.from_pretrained(str(place), local_files_only=True)
        except (OSError, ValueError):
            continue  # not on this machine: the shapes tell
    return _text_config_from_shapes(weights)


def _text_config_from_shapes(weights: dict[str, Tensor]) -> PretrainedConfig:
    words = "embeddings.word_embeddings.weight"
    if words not in weights:
        raise CheckpointError(
            f"key 'language_encoder.{words}' is missing: only BERT and DistilBERT text encoders "
            "can be read off their shapes, so give text_config."
        )
    vocab_size, width = weights[words].shape
    positions = weights["embeddings.position_embeddings.weight"].shape[0]
    heads = HEADS_OF_WIDTH.get(width)
    if heads is None:
        heads = 4
        warnings.warn(
            f"the text encoder is {width} wide and its number of attention heads is not recorded: "
            f"{heads} are assumed; give text_config if that is wrong."
        )

    def layers(pattern: str) -> int:
        found = [int(m[1]) for m in map(re.compile(pattern).match, weights) if m]
        return max(found, default=-1) + 1

    if any(name.startswith("transformer.layer.") for name in weights):
        return DistilBertConfig(
            vocab_size=vocab_size,
            max_position_embeddings=positions,
            dim=width,
            n_layers=layers(r"transformer\.layer\.(\d+)\."),
            n_heads=heads,
            hidden_dim=weights["transformer.layer.0.ffn.lin1.weight"].shape[0],
        )
    return BertConfig(
        vocab_size=vocab_size,
        max_position_embeddings=positions,
        hidden_size=width,
        num_hidden_layers=layers(r"encoder\.layer\.(\d+)\."),
        num_attention_heads=heads,
        intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
        type_vocab_size=weights["embeddings.token_type_embeddings.weight"].shape[0],
    )


def save_published(model: Med3DVLM | VolumeTextDualEncoder, folder: Path) -> None:
    """Write a model that came from a published checkpoint back in the published layout.

    Raises:
        CheckpointError: for a model that the published layout cannot hold.
    """
    config = getattr(model.config, "published_config", None)
    if not config:
        raise CheckpointError(
            f"model {model.label!r} did not come from a published checkpoint: the published layout "
            "has no place for its settings."
        )
    if isinstance(model, Med3DVLM):
        if model.config.language_bits is not None:
            raise CheckpointError(
                f"model {model.label!r} is quantized, which the published layout has no place for: "
                "convert the whole one."
            )
        rules = _vlm_rules(model.config.projector)
    else:
        rules = DUAL_ENCODER_RULES
    tied = set(model.all_tied_weights_keys or ())
    own = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    weights = _translate(own, rules, to_own=False)
    with atomic_folder(folder) as temporary:
        write_json(temporary / "config.json", config)
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()},
            temporary / "model.safetensors",
            metadata={"format": "pt"},
        )
        if isinstance(model, VolumeTextDualEncoder):
            # The published layout leaves the text encoder's settings out; keep them beside it.
            model.config.text_config.save_pretrained(temporary / "text_encoder")
        if model.processor.tokenizer is not None:
            model.processor.tokenizer.save_pretrained(temporary)
