"""Projectors: the encoder's token streams to visual tokens of the language model's width.

The dual-stream MLP-Mixer is Med3DVLM's (arXiv 2503.20047, section 3.3); the other three are the
baselines it is compared with. All take the low stream (B, N_low, C_low) and the high stream
(B, N_high, C_high) and give (B, N, D) visual tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PROJECTORS = ("mixer", "linear", "mlp", "low_high_mlp")


class TwoLayerMLP(nn.Sequential):
    """linear n_in -> n_out, GELU, linear n_out -> n_out, over the last axis."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(nn.Linear(n_in, n_out), nn.GELU(), nn.Linear(n_out, n_out))


class MixerLayer(nn.Module):
    """Mix over tokens, then over the width: (B, n_in, d_in) -> (B, n_out, d_out).

    `residual` adds the input back where the sizes allow it, as the MLP-Mixer paper does and the
    published projector does not.
    """

    def __init__(
        self,
        *,
        tokens_in: int,
        tokens_out: int,
        width_in: int,
        width_out: int,
        residual: bool = False,
    ):
        super().__init__()
        self.token_norm = nn.LayerNorm(width_in)
        self.token_mlp = TwoLayerMLP(tokens_in, tokens_out)
        self.width_norm = nn.LayerNorm(width_in)
        self.width_mlp = TwoLayerMLP(width_in, width_out)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.token_mlp(self.token_norm(x).transpose(1, 2)).transpose(1, 2)
        if self.residual and y.shape == x.shape:
            y = y + x
        z = self.width_mlp(self.width_norm(y))
        if self.residual and z.shape == y.shape:
            z = z + y
        return z


def mixer_stack(
    tokens: list[int], *, width_in: int, width_out: int, residual: bool = False
) -> nn.Sequential:
    """Mixer layers through the token counts `tokens`; the widths end at `width_out`.

    Layer i of L ends at width_out / 2^(L-1-i).
    """
    count = len(tokens) - 1
    layers, width = [], width_in
    for i in range(count):
        out = width_out // 2 ** (count - 1 - i)
        layers.append(
            MixerLayer(
                tokens_in=tokens[i],
                tokens_out=tokens[i + 1],
                width_in=width,
                width_out=out,
                residual=residual,
            )
        )
        width = out
    return nn.Sequential(*layers)


class MixerProjector(nn.Module):
    """A mixer stack per stream, the two outputs side by side along the tokens."""

    def __init__(
        self,
        *,
        low_tokens: list[int],
        high_tokens: list[int],
        low_width: int,
        high_width: int,
        width_out: int,
        residual: bool = False,
    ):
        super().__init__()
        self.low = mixer_stack(
            low_tokens, width_in=low_width, width_out=width_out, residual=residual
        )
        self.high = mixer_stack(
            high_tokens, width_in=high_width, width_out=width_out, residual=residual
        )
        self.num_tokens = low_tokens[-1] + high_tokens[-1]

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return torch.cat([self.low(low), self.high(high)], dim=1)


class LinearProjector(nn.Module):
    """Baseline: one linear layer on the high stream."""

    def __init__(self, *, high_tokens: int, high_width: int, width_out: int):
        super().__init__()
        self.linear = nn.Linear(high_width, width_out)
        self.num_tokens = high_tokens

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.linear(high)


class MLPProjector(nn.Module):
    """Baseline: a two-layer MLP on the high stream (32 tokens for the published sizes)."""

    def __init__(self, *, high_tokens: int, high_width: int, width_out: int):
        super().__init__()
        self.mlp = TwoLayerMLP(high_width, width_out)
        self.num_tokens = high_tokens

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self.mlp(high)


class LowHighMLPProjector(nn.Module):
    """Baseline: each stream to the same width, joined, then GELU and linear; no mixing."""

    def __init__(
        self, *, low_tokens: int, high_tokens: int, low_width: int, high_width: int, width_out: int
    ):
        super().__init__()
        self.low = nn.Linear(low_width, width_out)
        self.high = nn.Linear(high_width, width_out)
        self.activation = nn.GELU()
        self.out = nn.Linear(width_out, width_out)
        self.num_tokens = low_tokens + high_tokens

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        x = torch.cat([self.low(low), self.high(high)], dim=1)
        return self.out(self.activation(x))


def make_projector(
    kind: str,
    *,
    stream_tokens: tuple[int, int],
    stream_channels: tuple[int, int],
    width_out: int,
    low_tokens: list[int] | None = None,
    high_tokens: list[int] | None = None,
    residual: bool = False,
) -> nn.Module:
    """The projector called `kind` for an encoder's (low, high) streams.

    Args:
        low_tokens, high_tokens: token counts after each mixer layer, for example [192, 128];
            for the mixer only.

    Raises:
        ValueError: for an unknown kind.
    """
    (low_n, high_n), (low_c, high_c) = stream_tokens, stream_channels
    if kind == "mixer":
        return MixerProjector(
            low_tokens=[low_n, *(low_tokens or [192, 128])],
            high_tokens=[high_n, *(high_tokens or [64, 128])],
            low_width=low_c,
            high_width=high_c,
            width_out=width_out,
            residual=residual,
        )
    if kind == "linear":
        return LinearProjector(high_tokens=high_n, high_width=high_c, width_out=width_out)
    if kind == "mlp":
        return MLPProjector(high_tokens=high_n, high_width=high_c, width_out=width_out)
    if kind == "low_high_mlp":
        return LowHighMLPProjector(
            low_tokens=low_n,
            high_tokens=high_n,
            low_width=low_c,
            high_width=high_c,
            width_out=width_out,
        )
    raise ValueError(f"projector {kind!r} is unknown: choose one of {', '.join(PROJECTORS)}.")


def init_projector_weights(projector: nn.Module) -> None:
    """Glorot's: a projector keeps the size of what it is given.

    With the 0.02 that suits the wide layers of language models, visual tokens begin twenty times
    smaller, nearly alike from study to study, and a narrow language model learns to write without
    looking at them (docs/decisions/0010).
    """
    for module in projector.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
