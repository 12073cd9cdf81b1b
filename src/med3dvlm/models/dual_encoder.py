"""The contrastive model: volumes and texts in one space (arXiv 2503.20047, section 3.2).

Image embedding: the encoder's pooled state, a linear layer, length 1. Text embedding: the first
token's last hidden state of any Hugging Face encoder, a linear layer, length 1.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        places: names of labels of which linear heads say, for every token of the encoder's
            stages 1 to 4, whether they are seen there; empty for the published model.
        place_loss_weight: what the loss of these heads counts.
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
        places: list[str] | tuple[str, ...] = (),
        place_loss_weight: float = 1.0,
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
        self.places = list(places)
        self.place_loss_weight = place_loss_weight
        super().__init__(**kwargs)


@dataclass
class DualEncoderOutput(ModelOutput):
    loss: Tensor | None = None
    contrastive_loss: Tensor | None = None
    concept_loss: Tensor | None = None
    place_loss: Tensor | None = None
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
        self.place_heads = PlaceHeads(config) if config.places else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def pool_volumes(self, volumes: Tensor) -> Tensor:
        """(B, 1, D, H, W) prepared volumes -> (B, C) pooled states, before the projection."""
        encoder = self.vision_encoder
        return encoder.pool(encoder(volumes, last=encoder.config.pool_reads))

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
        places: Tensor | None = None,
    ) -> DualEncoderOutput:
        """Embed a batch of pairs; row i of `volumes` and `input_ids` belong together.

        Args:
            pooled: (B, C), what `pool_volumes` gives, in place of the volumes.
            concepts: (B, number of concepts), 0 or 1, optional extra supervision.
            places: (B, number of places, D/8, H/8, W/8), 0 to 1: how far each cell of the volume
                shows each of them; optional extra supervision.
        """
        streams = None
        if pooled is None:
            streams = self.vision_encoder(volumes)
            pooled = self.vision_encoder.pool(streams)
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
            if places is not None and streams is not None and self.place_heads is not None:
                out["place_loss"] = self.place_heads.loss(streams[1:], places)
                loss = loss + self.config.place_loss_weight * out["place_loss"]
            out["loss"] = loss
        return out

    @torch.inference_mode()
    def embed_scans(self, scans: Scan | list[Scan], *, batch_size: int = 8) -> np.ndarray:
        """(n, dim) float32, rows of length 1; a scan, a path or a list of either."""
        return self.embed_volumes(self.processor.volumes(scans), batch_size=batch_size)

    @torch.inference_mode()
    def embed_volumes(self, volumes: Tensor, *, batch_size: int = 8) -> np.ndarray:
        """(n, 1, D, H, W) prepared volumes -> (n, dim) float32, rows of length 1."""
        parts = [
            self.get_image_features(self._to_device(volumes[i : i + batch_size]))
            for i in range(0, len(volumes), batch_size)
        ]
        return _as_array(parts)

    @property
    def reads_text(self) -> bool:
        """Whether the checkpoint came with a tokenizer."""
        return self.processor.tokenizer is not None

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


class PlaceHeads(nn.ModuleList):
    """For each of the encoder's stages 1 to 4 a linear layer from its tokens to the labels.

    What they learn is little; that the tokens must tell where a finding is, is the point: a small
    lesion moves the mean over a volume hardly at all, but fills some cell of it.
    """

    START = -4.0  # added to each logit: most cells show nothing (focal loss, arXiv 1708.02002)

    def __init__(self, config: DualEncoderConfig):
        vision = config.vision_config
        if getattr(vision, "stem_stride", None) != 4:
            raise ValueError("places need a DCFormer with a stem_stride of 4: leave them empty.")
        super().__init__(nn.Linear(width, len(config.places)) for width in vision.channels[1:])

    def loss(self, streams: Sequence[Tensor], places: Tensor) -> Tensor:
        """Summed over the stages, the mean over studies and labels of what each costs.

        A label that fills n of a stage's N cells counts √n, and not n, or large findings would
        drown the small; what a study does not show counts 2√N times the mean over the cells.

        Args:
            streams: (B, N, C) tokens of stages 1 to 4.
            places: (B, labels, D, H, W), 0 to 1, on the grid of stage 1.
        """
        total = places.new_zeros(())
        for k, (head, stream) in enumerate(zip(self, streams, strict=True)):
            if k:
                places = F.max_pool3d(places, 2, ceil_mode=True)
            there = places.flatten(2).transpose(1, 2)  # (B, N, labels)
            logits = head(stream) + self.START
            missed = (there * F.softplus(-logits)).sum(1) / there.sum(1).clamp(min=0.25).sqrt()
            made_up = ((1 - there) * F.softplus(logits)).mean(1) * 2 * stream.shape[1] ** 0.5
            total = total + (missed + made_up).mean()
        return total


def _as_array(parts: list[Tensor]) -> np.ndarray:
    return cast(Any, torch.cat(parts)).float().cpu().numpy()
