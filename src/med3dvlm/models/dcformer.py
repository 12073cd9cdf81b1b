"""DCFormer: a 3D encoder of decomposed convolutions (arXiv 2502.05091).

Read from top to bottom: the configuration and its six variants, the decomposed convolution, the
stem, the block, the encoder. Shapes use B batch, C channels, D H W depth, height, width, and
N tokens. Everything here keeps the axes as (B, C, D, H, W), the order of a prepared volume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial, wraps

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from med3dvlm.models import cpu_training
from med3dvlm.models.fused import kernels, runs_fused
from med3dvlm.models.inference import Inference
from med3dvlm.models.lines import lines_through
from med3dvlm.models.windows import check_windows, through_windows

# Blocks and channels of stages 0-4; the stem is the one "block" of stage 0.
VARIANTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "nano": ((1, 1, 1, 1, 1), (32, 32, 64, 128, 256)),
    "naive": ((1, 2, 2, 2, 2), (32, 64, 128, 256, 512)),
    "tiny": ((1, 2, 3, 3, 2), (64, 96, 192, 384, 768)),
    "small": ((1, 2, 3, 6, 2), (64, 96, 192, 384, 768)),
    "base": ((1, 2, 6, 6, 2), (64, 128, 256, 512, 1024)),
    "large": ((1, 2, 6, 12, 2), (64, 256, 512, 1024, 2048)),
}
STREAMS = 5  # one of each stage
STEM_ACTIVATIONS = ("gelu", "none")
POOLINGS = ("mean", "multiscale", "streams")
AXES = ("depth", "height", "width")
LONGEST_BAND = 64  # voxels along an axis up to which a depthwise kernel is applied as a matrix


class DCFormerConfig(PretrainedConfig):
    """Settings of a :class:`DCFormer`.

    Args:
        variant: one of :data:`VARIANTS`; gives `depths` and `channels` where they are not given.
        depths: blocks in stages 0-4 (stage 0 is the stem and counts as one).
        channels: width of stages 0-4.
        kernel_sizes: kernel of the depthwise decomposed convolutions in stages 1-4, voxels.
        stem_kernel_size, stem_stride: the first layer of the stem.
        stem_layers: convolutions of the stem, the strided one among them; the paper has four.
        stem_activation: "gelu" as the paper means it, or "none" as in the published weights,
            whose stem is linear.
        stem_antialias: let the first layer of the stem average over what it strides across.
            Without it the stem reads only 15.6% of the voxels, so small lesions can fall
            between its samples. Never with published weights.
        stem_patches: let the first layer of the stem be one convolution over whole patches of
            stem_stride³ voxels in place of the decomposed one, whose averages wash out what is
            smaller than a patch (docs/decisions/0010). Never with published weights.
        stem_windows: (low, high) prepared intensities; the stem sees each voxel through each of
            these windows side by side, as a reader looks at a scan in a lung, a soft tissue and a
            bone window, so that a contrast of a few HU is no smaller than one of a thousand. None
            for the intensity itself. Never with published weights.
        pooling: what stands for the whole volume. "mean" is the paper's: the mean over the stage-4
            tokens. "multiscale" puts the maxima over the tokens of stages 2, 3 and 4 beside it, so
            that a small lesion is not averaged away; "streams" takes means and maxima of stages 3
            and 4, the streams that a language model reads, so that what it is to know is in them.
        volume_size: (D, H, W) the model was made for; the encoder itself takes any size.
    """

    model_type = "med3dvlm_dcformer"

    def __init__(
        self,
        variant: str = "small",
        depths: list[int] | None = None,
        channels: list[int] | None = None,
        in_channels: int = 1,
        kernel_sizes: tuple[int, ...] | list[int] = (13, 11, 9, 7),
        stem_kernel_size: int = 7,
        stem_stride: int = 4,
        stem_layers: int = 4,
        stem_activation: str = "gelu",
        stem_antialias: bool = False,
        stem_patches: bool = False,
        stem_windows: list[list[float]] | None = None,
        pooling: str = "mean",
        layer_scale_init: float = 1e-6,
        initializer_range: float = 0.02,
        volume_size: tuple[int, ...] | list[int] = (128, 256, 256),
        **kwargs,
    ):
        if variant not in VARIANTS and (depths is None or channels is None):
            raise ValueError(
                f"variant {variant!r} is unknown: choose one of {', '.join(VARIANTS)}, "
                "or give both depths and channels."
            )
        if stem_activation not in STEM_ACTIVATIONS:
            raise ValueError(
                f"stem_activation {stem_activation!r} is unknown: use 'gelu' or, for published "
                "weights, 'none'."
            )
        if stem_antialias and stem_patches:
            raise ValueError("stem_antialias and stem_patches exclude each other: choose one.")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r} is unknown: use one of {', '.join(POOLINGS)}.")
        self.variant = variant
        self.depths = list(depths or VARIANTS[variant][0])
        self.channels = list(channels or VARIANTS[variant][1])
        self.in_channels = in_channels
        self.kernel_sizes = list(kernel_sizes)
        self.stem_kernel_size = stem_kernel_size
        self.stem_stride = stem_stride
        self.stem_layers = stem_layers
        self.stem_activation = stem_activation
        self.stem_antialias = stem_antialias
        self.stem_patches = stem_patches
        self.stem_windows = check_windows(stem_windows or [])
        self.pooling = pooling
        self.layer_scale_init = layer_scale_init
        self.initializer_range = initializer_range
        self.volume_size = list(volume_size)
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the pooled state."""
        if self.pooling == "mean":
            return self.channels[-1]
        if self.pooling == "streams":
            return 2 * sum(self.channels[3:])
        return self.channels[-1] + sum(self.channels[2:])

    @property
    def pool_reads(self) -> int:
        """How many of the last streams the pooled state is made of."""
        return {"mean": 1, "streams": 2, "multiscale": 3}[self.pooling]

    @property
    def language_reads(self) -> int:
        """How many of the last streams a language model reads."""
        return 2

    @property
    def stream_channels(self) -> tuple[int, int]:
        """Widths of the (low, high) token streams: stages 3 and 4."""
        return self.channels[-2], self.channels[-1]

    @property
    def stream_tokens(self) -> tuple[int, int]:
        """Numbers of tokens of the (low, high) streams for a volume of `volume_size`."""
        grids = [[_ceil_div(size, self.stem_stride) for size in self.volume_size]]
        for _ in range(4):
            grids.append([_ceil_div(size, 2) for size in grids[-1]])
        low, high = (d * h * w for d, h, w in grids[-2:])
        return low, high


def _ceil_div(size: int, by: int) -> int:
    return -(-size // by)


def _lowered_on_cpu(x: Tensor) -> bool:
    """Whether autocast would let products of x be in bf16 on a CPU."""
    return x.device.type == "cpu" and torch.is_autocast_enabled("cpu")


def _fp32_on_cpu(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a method of a tensor compute in fp32 under a CPU's autocast.

    Maxima of rounded values lie elsewhere, and the gradient goes where they lie: with stem and
    max-pool in bf16 a gradient has a cosine of 0.992 with that of fp32, without 0.9993, for a
    third more time (docs/performance.md). A GPU has no fast fp32 to do the same with.
    """

    @wraps(forward)
    def run(self, x: Tensor, *args) -> Tensor:
        if not _lowered_on_cpu(x):
            return forward(self, x, *args)
        with torch.autocast("cpu", enabled=False):
            return forward(self, x.float(), *args)

    return run


class DecomposedConv3d(nn.Module):
    """Three 1-D convolutions side by side, one along each axis, summed (paper, section 3).

    Each has a kernel of k along its own axis and 1 along the others, the stride on all three, a
    bias, and its own batch norm. (B, C_in, D, H, W) -> (B, C_out, D/s, H/s, W/s).

    With `antialias`, each first averages over the stride on the two axes that its kernel does
    not span, so that striding skips no voxel; without it, a stride of 4 reads 15.6% of them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        antialias: bool = False,
    ):
        super().__init__()
        self.antialias = antialias
        self.stride = stride
        self.depthwise = stride == 1 and groups == in_channels == out_channels > 1
        if groups > 1 and not self.depthwise:
            raise ValueError("a decomposed convolution is dense, or depthwise with a stride of 1.")
        for axis, name in enumerate(AXES):
            conv = nn.Conv3d(  # called for long axes alone: see _lines
                in_channels,
                out_channels,
                _along(axis, kernel_size, other=1),
                padding=_along(axis, kernel_size // 2, other=0),
                groups=groups,
            )
            self.add_module(f"along_{name}", conv)
            self.add_module(f"norm_{name}", nn.BatchNorm3d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.depthwise and self._norms_alike() and runs_fused(x):
            return kernels.decomposed_conv(self, x)
        return self.plain(x)

    def _norms(self) -> list[nn.BatchNorm3d]:
        return [getattr(self, f"norm_{name}") for name in AXES]

    def _norms_alike(self) -> bool:
        """Whether the three are batch norms in one mode: not replaced, none frozen on its own."""
        norms = self._norms()
        return all(type(n) is nn.BatchNorm3d and n.training == norms[0].training for n in norms)

    def plain(self, x: Tensor) -> Tensor:
        """The three convolutions one by one: what the fused kernel is held against."""
        lines, norms = self._lines(x), self._norms()
        on_cpu = x.device.type == "cpu"
        if on_cpu and not self.depthwise and norms[0].training and self._norms_alike():
            return cpu_training.normalize_and_add(lines, norms)
        depth, height, width = (norm(line) for norm, line in zip(norms, lines, strict=True))
        y = depth + height + width
        if on_cpu and self.depthwise and y.requires_grad:
            y.register_hook(Tensor.contiguous)  # once, or each norm's gradient would do it
        return y

    def _lines(self, x: Tensor) -> Sequence[Tensor]:
        """The three convolutions; of the stem's, channels last."""
        convs = [getattr(self, f"along_{name}") for name in AXES]
        if self.depthwise:
            return [
                convolve_as_matrix(x, conv.weight, conv.bias, axis=axis)
                if x.shape[2 + axis] <= LONGEST_BAND
                else conv(x)
                for axis, conv in enumerate(convs)
            ]
        if self.stride > 1 or convs[0].in_channels < convs[0].out_channels:
            return [self._strided(x, axis, conv) for axis, conv in enumerate(convs)]
        if _lowered_on_cpu(x):
            parameters = (p for conv in convs for p in (conv.weight, conv.bias))
            return cpu_training.RoundedGradients.apply(x, *parameters)
        return [
            cpu_training.convolve_planes(x, conv.weight, conv.bias, axis)
            for axis, conv in enumerate(convs)
        ]

    @_fp32_on_cpu
    def _strided(self, x: Tensor, axis: int, conv: nn.Conv3d) -> Tensor:
        """As one product: `conv3d` is slow, and crashes in channels last, for one channel."""
        lines = lines_through(
            x,
            axis,
            kernel_size=conv.kernel_size[axis],
            stride=self.stride,
            antialias=self.antialias,
        )
        rows = lines.movedim(1, 4).flatten(4)
        assert conv.bias is not None
        # contiguous, or its gradient is a product that takes four times as long
        y = torch.addmm(conv.bias, rows.flatten(0, 3), conv.weight.flatten(1).T.contiguous())
        return y.view(*rows.shape[:4], -1).movedim(-1, 1)


def convolve_as_matrix(x: Tensor, weight: Tensor, bias: Tensor, *, axis: int) -> Tensor:
    """A depthwise 1-D convolution along one of D, H, W, as a matrix product.

    Along an axis of n voxels it is, for each channel, an n×n matrix with the kernel on its
    diagonals. That is n/k times the arithmetic, but at the speed of matrix products: on a CPU the
    forward and backward pass together take a fifth to a tenth of the time of `conv3d`, and their
    gradients are right in every memory layout (docs/performance.md).

    Args:
        x: (B, C, D, H, W).
        weight: (C, 1, k, 1, 1), or with the k on another axis; k odd, padding k//2.
        bias: (C,).
    """
    band = band_matrix(weight.flatten(1), x.shape[2 + axis])
    if axis == 0:
        y = band @ x.flatten(3)
    elif axis == 1:
        y = band.unsqueeze(1) @ x
    else:
        y = x.flatten(2, 3) @ band.transpose(1, 2)
    return y.view(x.shape) + bias.to(y.dtype).view(-1, 1, 1, 1)


def band_matrix(kernel: Tensor, n: int) -> Tensor:
    """(C, k) -> (C, n, n): entry (i, j) is the weight that voxel j has for voxel i, or 0."""
    place = torch.arange(n, device=kernel.device)
    return F.pad(kernel, (n, n))[:, place - place[:, None] + kernel.shape[1] // 2 + n]


def _along(axis: int, value: int, *, other: int) -> tuple[int, int, int]:
    triple = [other, other, other]
    triple[axis] = value
    return triple[0], triple[1], triple[2]


class PatchConv3d(nn.Module):
    """Each patch of size³ voxels to its channels, then a batch norm; what is cut off is zeros.

    (B, C_in, D, H, W) -> (B, C_out, ⌈D/size⌉, ⌈H/size⌉, ⌈W/size⌉).
    """

    def __init__(self, in_channels: int, out_channels: int, *, size: int):
        super().__init__()
        self.size = size
        self.proj = nn.Linear(in_channels * size**3, out_channels)
        self.norm = nn.BatchNorm3d(out_channels)

    @_fp32_on_cpu
    def forward(self, x: Tensor) -> Tensor:
        s = self.size
        x = F.pad(x, [n for size in reversed(x.shape[2:]) for n in (0, -size % s)])
        patches = x.unfold(2, s, s).unfold(3, s, s).unfold(4, s, s)  # (B, C, D', H', W', s, s, s)
        y = self.proj(patches.movedim(1, 4).flatten(4))  # as one product: conv3d is slow at this
        return self.norm(y.movedim(-1, 1))


class Stem(nn.Module):
    """Stage 0: a strided convolution, then decomposed ones, three; the grid shrinks by 4."""

    def __init__(self, config: DCFormerConfig):
        super().__init__()
        width = config.channels[0]
        self.windows = config.stem_windows
        in_channels = config.in_channels * max(1, len(self.windows))
        if config.stem_patches:
            first = PatchConv3d(in_channels, width, size=config.stem_stride)
        else:
            first = DecomposedConv3d(
                in_channels,
                width,
                kernel_size=config.stem_kernel_size,
                stride=config.stem_stride,
                antialias=config.stem_antialias,
            )
        rest = [
            DecomposedConv3d(width, width, kernel_size=3) for _ in range(config.stem_layers - 1)
        ]
        self.layers = nn.ModuleList([first, *rest])
        self.activation = nn.GELU() if config.stem_activation == "gelu" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = through_windows(x, self.windows)
        for layer in self.layers:
            x = self.activation(layer(x))
        return x


class Downsample(nn.Module):
    """Max-pool by two and change the width; the first thing in stages 1-4."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.pool = nn.MaxPool3d(kernel_size=3, stride=2, padding=1)
        self.proj = nn.Conv3d(in_channels, out_channels, kernel_size=1, bias=False)

    @_fp32_on_cpu
    def forward(self, x: Tensor) -> Tensor:
        # ten times as fast as channels first on a CPU
        return self.proj(self.pool(x.contiguous(memory_format=torch.channels_last_3d)))


class Block(nn.Module):
    """Depthwise decomposed convolution, then an MLP over the channels, scaled and added."""

    def __init__(self, channels: int, *, kernel_size: int, layer_scale_init: float):
        super().__init__()
        self.conv = DecomposedConv3d(channels, channels, kernel_size=kernel_size, groups=channels)
        self.expand = nn.Linear(channels, 4 * channels)
        self.activation = nn.GELU()
        self.contract = nn.Linear(4 * channels, channels)
        self.layer_scale = nn.Parameter(torch.full((channels,), layer_scale_init))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).movedim(1, -1)  # (B, D, H, W, C)
        y = self.contract(self.activation(self.expand(y)))
        return x + (self.layer_scale * y).movedim(-1, 1)


@contextmanager
def _statistics_untouched(module: nn.Module) -> Iterator[None]:
    """Let the batch norms within compute as they do, but not count the batch once more."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm3d)]
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({k: v.clone() for k, v in norm._buffers.items() if v is not None})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


class Stage(nn.Module):
    """Stages 1-4: halve the grid, change the width, then blocks.

    With gradient checkpointing (transformers sets the flag) a block's inner values are computed
    again in the backward pass instead of being kept.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        depth: int,
        kernel_size: int,
        layer_scale_init: float,
    ):
        super().__init__()
        self.downsample = Downsample(in_channels, channels)
        self.blocks = nn.ModuleList(
            Block(channels, kernel_size=kernel_size, layer_scale_init=layer_scale_init)
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        # fused kernels read and write channels last, and so do the blocks' MLPs; the matrices of a
        # depthwise convolution stand along planes and rows
        layout = torch.channels_last_3d if runs_fused(x) else torch.contiguous_format
        x = x.contiguous(memory_format=layout)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                again = partial(_statistics_untouched, block)
                x = self._gradient_checkpointing_func(
                    block, x, context_fn=lambda again=again: (nullcontext(), again())
                )
            else:
                x = block(x)
        return x


class DCFormer(PreTrainedModel):
    """The encoder: a volume to five token streams, fine to coarse."""

    config_class = DCFormerConfig
    main_input_name = "volumes"
    _no_split_modules = ["Block"]
    supports_gradient_checkpointing = True
    _inference: Inference | None = None

    def __init__(self, config: DCFormerConfig):
        super().__init__(config)
        self.stem = Stem(config)
        widths = config.channels
        self.stages = nn.ModuleList(
            Stage(
                widths[i - 1],
                widths[i],
                depth=config.depths[i],
                kernel_size=config.kernel_sizes[i - 1],
                layer_scale_init=config.layer_scale_init,
            )
            for i in range(1, 5)
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_encoder_weights(module, std=self.config.initializer_range)
        if isinstance(module, Block):
            nn.init.constant_(module.layer_scale, self.config.layer_scale_init)

    def optimize_for_inference(self, precision: str | None = None) -> DCFormer:
        """Compute the same several times faster wherever no gradient is recorded.

        The weights stay as they are, so that saving writes the ordinary checkpoint. Training
        ends it: see :mod:`med3dvlm.models.inference`. Hooks on parts of the encoder are not
        called while it lasts.

        Args:
            precision: "fp32" or "bf16", of the products; the weights' own where not given.

        Raises:
            ValueError: for another precision, or in training mode.
        """
        if self.training:
            raise ValueError("the model is in training mode: call eval() before optimizing it.")
        self._inference = Inference(precision)
        return self

    def train(self, mode: bool = True) -> DCFormer:
        if mode:
            self._inference = None
        return super().train(mode)

    def forward(self, volumes: Tensor, *, last: int = STREAMS) -> list[Tensor]:
        """Encode prepared volumes.

        Args:
            volumes: (B, 1, D, H, W), prepared intensities.
            last: how many streams are wanted, the coarsest ones. The finest takes most of the
                memory, and the pooled state and a language model do without it.

        Returns:
            `last` tensors (B, N_i, C_i) of stages 0-4, tokens in (D, H, W) order. The last two
            are the low and the high stream of the projector.
        """
        if self._inference is not None and not torch.is_grad_enabled():
            return self._inference(self, volumes, last)
        x = self.stem(volumes)
        streams = [_tokens(x)] if last == STREAMS else []
        for i, stage in enumerate(self.stages, start=1):
            x = stage(x)
            if i >= STREAMS - last:
                streams.append(_tokens(x))
        return streams

    def pool(self, streams: list[Tensor]) -> Tensor:
        """What stands for the whole volume, (B, hidden_size): see the config's `pooling`."""
        mean = streams[-1].mean(dim=1)
        if self.config.pooling == "mean":
            return mean
        if self.config.pooling == "streams":
            parts = [f(stream) for stream in streams[-2:] for f in (_mean, _highest)]
            return torch.cat(parts, dim=1)
        return torch.cat([mean, *(stream.amax(dim=1) for stream in streams[-3:])], dim=1)

    def streams(self, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(low, high), what the projector reads: stages 3 and 4."""
        return streams[-2], streams[-1]

    @classmethod
    def from_published(cls, state_dict: dict[str, Tensor], **overrides) -> DCFormer:
        """Make an encoder from published weights, its variant read off the shapes.

        See :func:`med3dvlm.models.published.encoder_from_published`, which this calls.
        """
        from med3dvlm.models.published import encoder_from_published

        return encoder_from_published(state_dict, **overrides)


def _mean(stream: Tensor) -> Tensor:
    return stream.mean(dim=1)


def _highest(stream: Tensor) -> Tensor:
    return stream.amax(dim=1)


def _tokens(x: Tensor) -> Tensor:
    return x.movedim(1, -1).flatten(1, 3)  # (B, C, D, H, W) -> (B, N, C)


def init_encoder_weights(module: nn.Module, *, std: float) -> None:
    """Kaiming for convolutions, truncated normal for linear layers, identity for norms."""
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm3d | nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm3d):
            module.reset_running_stats()
