"""Models as ONNX graphs, for whoever runs them without torch; checked equal before they count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from med3dvlm.models.dual_encoder import VolumeTextDualEncoder

TOLERANCE = 1e-4
"""Largest difference to torch, of the largest value."""

BATCHES = (1, 3)
"""Sizes of batches that are compared; the graph is traced with another."""


class ExportError(ValueError):
    """A graph that cannot be made, or does not compute what the model computes."""


def export_onnx(model: Any, folder: Path) -> dict[str, float]:
    """Write a model's graphs and its processor into an existing folder.

    A dual encoder gives `image.onnx`, volumes (B, 1, D, H, W) -> `image_embeds` (B, dim), and
    `text.onnx`, `input_ids` and `attention_mask` (B, N) -> `text_embeds` (B, dim), rows of
    length 1. A language model gives `encoder.onnx`, volumes -> the streams `low` and `high`, and
    `visual_tokens`, what its language model takes. The batch, and N, may be any; D, H and W are
    those of the preparation.

    Returns:
        Graph -> its largest error against torch, over batches of 1 and 3.

    Raises:
        ExportError: where a graph differs from the model by more than 1e-4 of its largest value,
            or the libraries are missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError("exporting needs more libraries: pip install 'med3dvlm[onnx]'") from error
    size = model.preparation.size
    volumes = [torch.rand(n, 1, *size) for n in (2, *BATCHES)]
    if isinstance(model, VolumeTextDualEncoder):
        graphs = {
            "image": (_Images(model), ["volumes"], ["image_embeds"], [(v,) for v in volumes]),
            "text": (
                _Texts(model),
                ["input_ids", "attention_mask"],
                ["text_embeds"],
                [_tokens(model, n) for n in (2, *BATCHES)],
            ),
        }
    else:
        names = ["low", "high", "visual_tokens"]
        graphs = {"encoder": (_Streams(model), ["volumes"], names, [(v,) for v in volumes])}
    errors = {}
    for name, (module, inputs, outputs, examples) in graphs.items():
        path = folder / f"{name}.onnx"
        _write(module, path, examples[0], inputs, outputs)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        errors[name] = max(_error(session, module, inputs, example) for example in examples[1:])
        if not errors[name] < TOLERANCE:
            raise ExportError(
                f"{path.name} differs from the model by {errors[name]:.1e} of its largest value: "
                "it was not kept."
            )
    model.processor.save_pretrained(folder)
    return errors


class _Images(nn.Module):
    def __init__(self, model: VolumeTextDualEncoder):
        super().__init__()
        self.model = model

    def forward(self, volumes: Tensor) -> Tensor:
        return self.model.get_image_features(volumes)


class _Texts(nn.Module):
    def __init__(self, model: VolumeTextDualEncoder):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.get_text_features(input_ids, attention_mask)


class _Streams(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, volumes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high = self.model.encode(volumes)
        return low, high, self.model.project(low, high)


def _tokens(model: VolumeTextDualEncoder, count: int) -> tuple[Tensor, Tensor]:
    """Random texts of different lengths."""
    length = 4 + 3 * count
    ids = torch.randint(model.config.text_config.vocab_size, (count, length))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return ids, mask


def _write(
    module: nn.Module,
    path: Path,
    example: tuple[Tensor, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> None:
    from torch.export import Dim

    axes = {0: Dim("batch")}
    if len(inputs) > 1:
        axes[1] = Dim("length", min=2, max=512)
    with torch.no_grad():
        torch.onnx.export(
            module.eval(),
            example,
            path,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple(axes for _ in inputs),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _error(
    session: Any, module: Callable[..., Any], inputs: Sequence[str], example: tuple[Tensor, ...]
) -> float:
    with torch.no_grad():
        wanted = module(*example)
    found = session.run(None, {n: t.numpy() for n, t in zip(inputs, example, strict=True)})
    several = wanted if isinstance(wanted, tuple) else (wanted,)
    pairs = [(np.asarray(a), b) for a, b in zip(several, found, strict=True)]
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)
