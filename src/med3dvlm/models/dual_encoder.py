"""The contrastive model: volumes and texts in one space (arXiv 2503.20047, section 3.2).

Image embedding: the encoder's pooled state, a linear layer, length 1. Text embedding: the first
token's last hidden state of any Hugging Face encoder, a linear layer, length 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from med3dvlm.losses import LOSSES
from med3dvlm.models.checkpoint import HasProcessor, as_config

if TYPE_CHECKING:
    from med3dvlm.scan import Scan


class DualEncoderConfig(PretrainedConfig):
    """Settings of a :class:`VolumeTextDualEncoder`.

    Args:
        vision_config: of a :class:`DCFormer` or :class:`ViT3D`, as an object or a dict.
        text_config: of any encoder of transformers.
        projection_dim: width of the shared space.
        loss: "siglip" or "infonce".
        concepts: names of yes/no labels that a linear head predicts from the pooled volume
            beside the contrastive loss; empty for the published model.
        concept_loss_weight: what the mean binary cross-entropy of the concepts counts.
    """

    model_type = "med3dvlm_dual_encoder"
    sub_configs = {  # pyright: ignore[reportAssignmentType]
        "vision_config": AutoConfig,
        "text_config": AutoConfig,
    }

    def __init__(
        self,
        vision_config: PretrainedConfig | dict | None = None,
        text_config: PretrainedConfig | dict | None = None,
        projection_dim: int = 768,
        loss: str = "siglip",
        concepts: list[str] | tuple[str, ...] = (),
        concept_loss_weight: float = 1.0,
        **kwargs,
    ):
        if loss not in LOSSES:
            raise ValueError(f"loss {loss!r} is unknown: choose one of {', '.join(LOSSES)}.")
        self.vision_config = as_config(vision_config, default="med3dvlm_dcformer")
        self.text_config = as_config(text_config, default="distilbert")
        self.projection_dim = projection_dim
        self.loss = loss
        self.concepts = list(concepts)
        self.concept_loss_weight = concept_loss_weight
        super().__init__(**kwargs)


@dataclass
class DualEncoderOutput(ModelOutput):
    loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    concept_loss: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    concept_logits: Tensor | None = None


class VolumeTextDualEncoder(PreTrainedModel, HasProcessor):
    """Embeds scans and texts; nearest neighbours in that space are search results."""

    config_class = DualEncoderConfig
    main_input_name = "volumes"
    _no_split_modules = ["Block"]
    supports_gradient_checkpointing = True

    def __init__(self, config: DualEncoderConfig):
        super().__init__(config)
        self.vision_encoder = AutoModel.from_config(config.vision_config)
        self.text_encoder = AutoModel.from_config(config.text_config)
        self.vision_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim)
        self.loss = LOSSES[config.loss]()
        self.concept_head = (
            nn.Linear(config.vision_config.hidden_size, len(config.concepts))
            if config.concepts
            else None
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def pool_volumes(self, volumes: Tensor) -> Tensor:
        """(B, 1, D, H, W) prepared volumes -> (B, C) pooled states, before the projection."""
        return self.vision_encoder.pool(self.vision_encoder(volumes))

    def get_image_features(self, volumes: Tensor) -> Tensor:
        """(B, 1, D, H, W) prepared volumes -> (B, dim), rows of length 1."""
        return F.normalize(self.vision_projection(self.pool_volumes(volumes)), dim=-1)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, N) token ids -> (B, dim), rows of length 1."""
        states = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask)
        return F.normalize(self.text_projection(states.last_hidden_state[:, 0]), dim=-1)

    def forward(
        self,
        volumes: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        concepts: Tensor | None = None,
        return_loss: bool = True,
        pooled: Tensor | None = None,
    ) -> DualEncoderOutput:
        """Embed a batch of pairs; row i of `volumes` and `input_ids` belong together.

        Args:
            pooled: (B, C), what `pool_volumes` gives, in place of the volumes.
            concepts: (B, number of concepts), 0 or 1, optional extra supervision.
        """
        if pooled is None:
            pooled = self.pool_volumes(volumes)
        images = F.normalize(self.vision_projection(pooled), dim=-1)
        texts = self.get_text_features(input_ids, attention_mask)
        out = DualEncoderOutput(image_embeds=images, text_embeds=texts)
        if self.concept_head is not None:
            out["concept_logits"] = self.concept_head(pooled)
        if return_loss:
            loss = out["contrastive_loss"] = self.loss(images, texts)
            if concepts is not None and out.concept_logits is not None:
                out["concept_loss"] = F.binary_cross_entropy_with_logits(
                    out.concept_logits, concepts.to(out.concept_logits.dtype)
                )
                loss = loss + self.config.concept_loss_weight * out["concept_loss"]
            out["loss"] = loss
        return out

    @torch.inference_mode()
    def embed_scans(self, scans: Scan | list[Scan], *, batch_size: int = 8) -> np.ndarray:
        """(n, dim) float32, rows of length 1; a scan, a path or a list of either."""
        volumes = self.processor.volumes(scans)
        parts = [
            self.get_image_features(self._to_device(volumes[i : i + batch_size]))
            for i in range(0, len(volumes), batch_size)
        ]
        return _as_array(parts)

    @torch.inference_mode()
    def embed_texts(self, texts: str | list[str], *, batch_size: int = 64) -> np.ndarray:
        """(n, dim) float32, rows of length 1; texts too long are cut by whole sentences."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        parts = []
        for i in range(0, len(texts), batch_size):
            tokens = self.processor.tokens(texts[i : i + batch_size]).to(self.device)
            parts.append(self.get_text_features(tokens["input_ids"], tokens["attention_mask"]))
        return _as_array(parts)

    @torch.inference_mode()
    def concept_probabilities(self, scans: Scan | list[Scan]) -> list[dict[str, float]]:
        """For each scan the probability of every concept that the head was trained on.

        Raises:
            ValueError: for a model without a concept head.
        """
        if self.concept_head is None:
            raise ValueError(f"model {self.label!r} has no concept head: it was trained without.")
        volumes = self._to_device(self.processor.volumes(scans))
        probabilities = self.concept_head(self.pool_volumes(volumes)).sigmoid().tolist()
        return [dict(zip(self.config.concepts, row, strict=True)) for row in probabilities]


def _as_array(parts: list[Tensor]) -> np.ndarray:
    return cast(Any, torch.cat(parts)).float().cpu().numpy()
