"""A plain 3D vision transformer, the baseline that the DCFormer is compared with.

Non-overlapping patches, a class token, learned positions, pre-norm layers: the M3D-CLIP style.
It keeps the encoder interface of :class:`med3dvlm.models.dcformer.DCFormer`: a list of token
streams, the last two being low and high, and `pool`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from med3dvlm.models.dcformer import init_encoder_weights
from med3dvlm.models.windows import check_windows, through_windows


class ViT3DConfig(PretrainedConfig):
    """Settings of a :class:`ViT3D`; the defaults have 87 M parameters.

    Args:
        volume_size: (D, H, W), voxels; fixed, because positions are learned.
        patch_size: (D, H, W) of a patch, voxels; must divide `volume_size`.
        low_stream_layer: which layer's patch tokens are the low stream (the high stream is the
            last layer's).
        stem_windows: as of a :class:`~med3dvlm.models.dcformer.DCFormerConfig`.
    """

    model_type = "med3dvlm_vit3d"

    def __init__(
        self,
        volume_size: tuple[int, ...] | list[int] = (128, 256, 256),
        patch_size: tuple[int, ...] | list[int] = (16, 16, 16),
        hidden_size: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        in_channels: int = 1,
        low_stream_layer: int = -2,
        stem_windows: list[list[float]] | None = None,
        initializer_range: float = 0.02,
        **kwargs,
    ):
        if any(v % p for v, p in zip(volume_size, patch_size, strict=True)):
            raise ValueError(
                f"patch_size {list(patch_size)} does not divide volume_size {list(volume_size)}: "
                "choose a patch that does."
            )
        self.volume_size = list(volume_size)
        self.patch_size = list(patch_size)
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.in_channels = in_channels
        self.low_stream_layer = low_stream_layer
        self.stem_windows = check_windows(stem_windows or [])
        self.initializer_range = initializer_range
        super().__init__(**kwargs)

    @property
    def num_patches(self) -> int:
        d, h, w = (v // p for v, p in zip(self.volume_size, self.patch_size, strict=True))
        return d * h * w

    @property
    def pool_reads(self) -> int:
        """How many of the last streams the pooled state is made of."""
        return 1

    @property
    def language_reads(self) -> int:
        """How many of the last streams a language model reads."""
        return self.num_layers - range(self.num_layers)[self.low_stream_layer]

    @property
    def stream_channels(self) -> tuple[int, int]:
        return self.hidden_size, self.hidden_size

    @property
    def stream_tokens(self) -> tuple[int, int]:
        return self.num_patches, self.num_patches


class ViT3D(PreTrainedModel):
    """(B, 1, D, H, W) -> one stream (B, N, C) per layer; the last has its class token in front."""

    config_class = ViT3DConfig
    main_input_name = "volumes"

    def __init__(self, config: ViT3DConfig):
        super().__init__(config)
        width = config.hidden_size
        patch = tuple(config.patch_size)
        channels = config.in_channels * max(1, len(config.stem_windows))
        self.patchify = nn.Conv3d(channels, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, config.num_patches + 1, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                config.num_heads,
                dim_feedforward=4 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_encoder_weights(module, std=self.config.initializer_range)
        if isinstance(module, nn.MultiheadAttention):
            nn.init.xavier_uniform_(module.in_proj_weight)
            nn.init.zeros_(module.in_proj_bias)
        if module is self:
            nn.init.trunc_normal_(self.positions, std=self.config.initializer_range)
            nn.init.trunc_normal_(self.class_token, std=self.config.initializer_range)

    def forward(self, volumes: Tensor, *, last: int | None = None) -> list[Tensor]:
        """
        Args:
            last: how many streams are wanted, the last ones; all where not given.
        """
        x = self._patches(through_windows(volumes, self.config.stem_windows))
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        states[-1] = self.norm(x)
        return ([state[:, 1:] for state in states[:-1]] + [states[-1]])[-last if last else None :]

    def _patches(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, N, width), as one product: conv3d is slow at this."""
        for axis, size in enumerate(self.config.patch_size):
            x = x.unfold(2 + axis, size, size)
        rows = x.movedim(1, 4).flatten(4).flatten(1, 3)  # (B, N, voxels of a patch)
        return nn.functional.linear(rows, self.patchify.weight.flatten(1), self.patchify.bias)

    def pool(self, streams: list[Tensor]) -> Tensor:
        """The class token of the last layer: (B, C)."""
        return streams[-1][:, 0]

    def streams(self, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(low, high): patch tokens of `low_stream_layer` and of the last layer."""
        return streams[-self.config.language_reads], streams[-1][:, 1:]
