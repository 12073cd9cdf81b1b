"""What every model of the package shares: a processor beside the weights and a fingerprint."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

if TYPE_CHECKING:
    from med3dvlm.models.processor import Med3DVLMProcessor
    from med3dvlm.scan import Preparation


def as_config(value: PretrainedConfig | dict | None, *, default: str) -> PretrainedConfig:
    """A config from an object, a dict with `model_type`, or nothing (`default`'s defaults)."""
    if isinstance(value, PretrainedConfig):
        return value
    settings = dict(value or {})
    return AutoConfig.for_model(settings.pop("model_type", default), **settings)


class HasProcessor:
    """Mixed into the models, so that one can be handed scans and texts as they are."""

    _processor = None
    calibration: Any = None  # a med3dvlm.evidence.Calibration, where the checkpoint has one

    @property
    def processor(self) -> Med3DVLMProcessor:
        """How scans are prepared and texts become tokens for this very model.

        Raises:
            ValueError: if the model was made without one.
        """
        if self._processor is None:
            raise ValueError(
                f"model {self.label!r} has no processor: load it with med3dvlm.load(), or set "
                "model.processor."
            )
        return self._processor

    @processor.setter
    def processor(self, processor: Med3DVLMProcessor) -> None:
        self._processor = processor

    @property
    def preparation(self) -> Preparation:
        return self.processor.preparation

    @property
    def label(self) -> str:
        """A name for people: where the weights came from."""
        return getattr(self, "_label", None) or self.config.name_or_path or type(self).__name__

    @label.setter
    def label(self, value: str) -> None:
        self._label = value

    def fingerprint(self) -> str:
        """Sixteen hex digits of a hash over every weight: which model made this?"""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def optimize_for_inference(self, precision: str | None = None) -> Self:
        """Let the encoder compute the same several times faster; see `DCFormer`'s.

        Args:
            precision: "fp32" or "bf16", of the encoder's products; its weights' own if not given.

        Raises:
            ValueError: for another precision, in training mode, or for a precision where the
                encoder is no DCFormer: another one stays as it is.
        """
        if hasattr(self.vision_encoder, "optimize_for_inference"):
            self.vision_encoder.optimize_for_inference(precision)
        elif precision is not None:
            raise ValueError(
                f"the encoder is a {type(self.vision_encoder).__name__}, which computes in the "
                "precision of its weights only: give no precision."
            )
        return self

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)

    if TYPE_CHECKING:
        config: Any
        vision_encoder: Any
        device: Any
        dtype: Any

        def state_dict(self) -> dict[str, Tensor]: ...
