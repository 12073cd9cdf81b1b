"""DCFormer for inference: the same function, arranged for speed.

What :class:`med3dvlm.models.dcformer.DCFormer` computes in evaluation mode, with
- batch norms and layer scales folded into the weights beside them;
- channels last throughout, so that every product is one of matrices: (tokens, C) @ (C, C');
- the stem in slabs of planes that stay in the cache, its convolutions as products of shifted
  views: one for each of the 3k - 2 distinct voxels of a decomposed convolution, not 3k. Only the
  voxels that the stem reads are touched, and no layer of it exists as a whole;
- the first two layers of a linear (published) stem merged into one;
- depthwise convolutions as 2-D ones, which oneDNN computes ten times as fast as 3-D ones; on a GPU
  as one kernel for the three directions.

The measurements behind each are in docs/performance.md and docs/decisions/0011-inference.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from med3dvlm.models.fused import kernels, runs_fused
from med3dvlm.models.lines import lines_through
from med3dvlm.models.windows import through_windows

if TYPE_CHECKING:
    from med3dvlm.models.dcformer import (
        Block,
        DCFormer,
        DecomposedConv3d,
        PatchConv3d,
        Stage,
        Stem,
    )

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

SLAB_TOKENS = 4096
"""Tokens of the stem computed at once on a CPU: 1 MiB of 64 channels in fp32, a core's cache."""

MLP_TOKENS = 1024
"""Tokens whose hidden values, four times as wide, exist at once on a CPU."""

Offset = tuple[int, int, int]


class Inference:
    """A DCFormer's way to compute in inference; it follows the weights when they change.

    They are folded at the first use, and again whenever a parameter or a statistic was replaced
    or changed in place since (not where `.data` was written to: torch does not count that).
    """

    def __init__(self, precision: str | None = None):
        if precision is not None and precision not in PRECISIONS:
            raise ValueError(f"precision {precision!r} is unknown: use {' or '.join(PRECISIONS)}.")
        self.precision = precision
        self._folded: tuple[list[tuple[int, int]], InferenceEncoder] | None = None

    def __call__(self, model: DCFormer, volumes: Tensor, last: int) -> list[Tensor]:
        state = [_version(tensor) for tensor in (*model.parameters(), *model.buffers())]
        if self._folded is None or self._folded[0] != state:
            self._folded = state, InferenceEncoder(model, self.precision)
        return self._folded[1](volumes, last)


def _version(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


class InferenceEncoder:
    """The five token streams of a DCFormer's weights as they are now.

    Args:
        precision: "fp32" or "bf16", of the products; the weights' own where not given. Streams
            are given in the precision of the weights.
    """

    @torch.no_grad()
    def __init__(self, model: DCFormer, precision: str | None = None):
        weight = next(model.parameters())
        self.dtype = PRECISIONS[precision] if precision else weight.dtype
        self.given = weight.dtype
        self.stem = _Stem(model.stem, self.dtype)
        self.stages = [_Stage(stage, self.dtype) for stage in model.stages]

    def __call__(self, volumes: Tensor, last: int) -> list[Tensor]:
        """(B, C, D, H, W) -> the last of five (B, N, C), as DCFormer's forward."""
        whole = last == len(self.stages) + 1
        x = self.stem(volumes, pooled=not whole)
        streams = [x] if whole else []
        for i, stage in enumerate(self.stages):
            if i or whole:
                x = stage.pool(x)
            x = stage.transform(x)
            if len(self.stages) - i <= last:
                streams.append(x)
        return [stream.flatten(1, 3).to(self.given) for stream in streams]


# --- weights ----------------------------------------------------------------------------------


@dataclass
class _Lines:
    """A decomposed convolution with its batch norms folded: kernels per axis, one bias.

    kernels: three of (C_out, C_in / groups, k), along depth, height and width; float64.
    """

    kernels: list[Tensor]
    bias: Tensor

    @classmethod
    def of(cls, conv: DecomposedConv3d) -> _Lines:
        kernels, biases = [], []
        for axis in ("depth", "height", "width"):
            line, (scale, shift) = (
                getattr(conv, f"along_{axis}"),
                _norm(getattr(conv, f"norm_{axis}")),
            )
            kernels.append(line.weight.double().flatten(2) * scale[:, None, None])
            biases.append(line.bias.double() * scale + shift)
        return cls(kernels, torch.stack(biases).sum(0))

    def taps(self) -> dict[Offset, Tensor]:
        """Offset (z, y, x) -> (C_in, C_out); the three lines share the voxel they cross in."""
        taps: dict[Offset, Tensor] = {}
        for axis, kernel in enumerate(self.kernels):
            half = kernel.shape[2] // 2
            for i in range(kernel.shape[2]):
                offset = [0, 0, 0]
                offset[axis] = i - half
                key = (offset[0], offset[1], offset[2])
                taps[key] = taps.get(key, 0) + kernel[:, :, i].T
        return taps


def _norm(norm: torch.nn.BatchNorm3d) -> tuple[Tensor, Tensor]:
    """What a batch norm multiplies with and adds, in evaluation mode; float64."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


class _Layer:
    """A layer of the stem: for each token a sum over offsets, and a bias."""

    def __init__(self, taps: dict[Offset, Tensor], bias: Tensor, dtype: torch.dtype):
        self.offsets = list(taps)
        self.weights = [matrix.to(dtype).contiguous() for matrix in taps.values()]
        self.joint = torch.cat(self.weights).T.contiguous()  # (C_out, offsets · C_in)
        self.bias = bias.to(dtype)

    def __call__(self, buffer: Tensor, slot: int, out: Tensor) -> None:
        """Rows of a padded buffer (planes, H, W, C_in) from plane `slot` on -> `out` (rows, C)."""
        _, height, width, channels = buffer.shape
        begin = slot * height * width
        steps = [(z * height + y) * width + x for z, y, x in self.offsets]
        rows = buffer.view(-1, channels)
        shifted = [rows[begin + step : begin + step + len(out)] for step in steps]
        if out.dtype != torch.float32:  # one product: a sum in halves would round at each offset
            out.copy_(F.linear(torch.cat(shifted, 1), self.joint, self.bias))
            return
        torch.addmm(self.bias, shifted[0], self.weights[0], out=out)
        for part, weight in zip(shifted[1:], self.weights[1:], strict=True):
            out.addmm_(part, weight)


# --- stage 0 ----------------------------------------------------------------------------------


class _Stem:
    """(B, C_in, D, H, W) -> (B, D/s, H/s, W/s, C), a volume at a time; or max-pooled by two.

    Pooled at once, the finest features, as large as the volume, never exist as a whole. Features
    are computed in slabs of planes. Each layer needs one plane more on either side than
    it gives, so it lags one plane behind the layer before, whose last two planes are kept.
    """

    def __init__(self, stem: Stem, dtype: torch.dtype):
        first, *rest = stem.layers
        self.dtype = dtype
        self.windows = stem.windows
        self.voxels = _Patches(first) if hasattr(first, "proj") else _LinesThrough(first)
        self.gelu = isinstance(stem.activation, torch.nn.GELU)
        self.channels = self.voxels.weight.shape[1]
        lines = [_Lines.of(layer) for layer in rest]
        taps = [line.taps() for line in lines]
        self.first = self.voxels.weight.to(dtype)
        if not self.gelu and taps and len(self.first) < self.channels:
            # linear, and less to multiply: the second layer takes the voxels themselves
            taps[0] = {offset: self.voxels.weight @ tap for offset, tap in taps[0].items()}
            self.first = None
        self.layers = [_Layer(tap, line.bias, dtype) for tap, line in zip(taps, lines, strict=True)]

    def __call__(self, volumes: Tensor, *, pooled: bool) -> Tensor:
        views = [self.voxels(through_windows(volume, self.windows)) for volume in volumes]
        grid = views[0][0].shape[:3]
        if pooled:
            grid = [-(-size // 2) for size in grid]
        shape = len(volumes), *grid, self.channels
        result = volumes.new_full(shape, -torch.inf, dtype=self.dtype)
        for parts, target in zip(views, result, strict=True):
            self._encode(parts, target, _pool_into if pooled else _copy_into)
        return result

    def _encode(self, views: list[Tensor], result: Tensor, put: _Put) -> None:
        """One volume's voxels (D/s, H/s, W/s, …) -> (D/s, H/s, W/s, C), plane by plane put."""
        depth, height, width = views[0].shape[:3]
        plane, last = (height + 1) * (width + 1), len(self.layers)
        slab = depth + last
        if result.device.type == "cpu":
            slab = min(slab, max(1, SLAB_TOKENS // plane))
        # Zeros stand in column `width`, row `height` and before the first plane: what lies beyond
        # an edge, on either side, since in memory the next row follows the column.
        grid = (slab + 2, height + 1, width + 1)
        kept = [result.new_zeros(*grid, len(layer.weights[0])) for layer in self.layers]
        sums = result.new_empty(slab * plane, self.channels)
        for start in range(0, depth + last, slab):
            for buffer in kept:
                buffer[0].copy_(buffer[slab])
                buffer[1].copy_(buffer[slab + 1])
            for level in range(last + 1):  # 0: the first layer of the stem, or its voxels
                begin, end = max(0, start - level), max(0, min(start - level + slab, depth))
                slot, count = begin - (start - level), max(0, end - begin)
                if level < last:
                    kept[level][2 + slot + count :].zero_()
                if not count:
                    continue
                if level == 0:
                    values = self._first([view[begin:end] for view in views])
                else:  # plane `begin` lies one slot further in the buffer before
                    rows = sums[: count * plane]
                    self.layers[level - 1](kept[level - 1], slot + 1, rows)
                    values = rows.view(count, height + 1, width + 1, -1)[:, :height, :width]
                # not gelu with out=: it writes nothing where the target has gaps (torch 2.13.0)
                values = F.gelu(values) if self.gelu else values
                if level < last:
                    kept[level][2 + slot : 2 + slot + count, :height, :width] = values
                else:
                    put(result, begin, values)

    def _first(self, views: list[Tensor]) -> Tensor:
        """Voxels of some planes -> (planes, H/s, W/s, C) of the first layer, or as they are."""
        ones = views[0].new_ones(*views[0].shape[:3], 1)
        columns = torch.cat([*(view.flatten(3) for view in views), ones], -1).to(self.dtype)
        return columns if self.first is None else columns @ self.first


_Put = Callable[[Tensor, int, Tensor], None]
"""(result, begin, planes): place the planes from `begin` on in the result."""


def _copy_into(result: Tensor, begin: int, planes: Tensor) -> None:
    result[begin : begin + len(planes)] = planes


def _pool_into(result: Tensor, begin: int, planes: Tensor) -> None:
    """Max-pool by two, kernel 3: plane i of the result is the maximum of 2i - 1, 2i and 2i + 1."""
    planes = _pool(planes, F.max_pool2d)
    for offset in (-1, 0, 1):
        first = -((offset - begin) // 2)  # whose plane 2i + offset is the first at hand
        part = planes[2 * first + offset - begin :: 2]
        target = result[first : first + len(part)]
        torch.maximum(target, part[: len(target)], out=target)


class _LinesThrough:
    """Of a decomposed strided convolution: the voxels along each axis through each token.

    weight: (3 C_in k + 1, C), of the voxels, line by line and channel by channel; the last row is
    the bias, whose 1 unlike a bias proper is absent beyond the edges. float64.
    """

    def __init__(self, conv: DecomposedConv3d):
        lines = _Lines.of(conv)
        rows = [kernel.flatten(1).T for kernel in lines.kernels]
        self.weight = torch.cat([*rows, lines.bias[None]])
        self.kernel, self.stride = lines.kernels[0].shape[2], conv.stride
        self.antialias = conv.antialias

    def __call__(self, volume: Tensor) -> list[Tensor]:
        """(C_in, D, H, W) -> three of (D/s, H/s, W/s, C_in, k)."""
        return [
            lines_through(
                volume,
                axis,
                kernel_size=self.kernel,
                stride=self.stride,
                antialias=self.antialias,
            ).movedim(0, 3)
            for axis in range(3)
        ]


class _Patches:
    """Of a convolution over whole patches: their voxels. weight: (C_in size³ + 1, C), float64."""

    def __init__(self, conv: PatchConv3d):
        scale, shift = _norm(conv.norm)
        weight = conv.proj.weight.double() * scale[:, None]
        self.weight = torch.cat([weight.T, (conv.proj.bias.double() * scale + shift)[None]])
        self.size = conv.size

    def __call__(self, volume: Tensor) -> list[Tensor]:
        """(C_in, D, H, W) -> one of (D/s, H/s, W/s, C_in, s, s, s)."""
        s = self.size
        volume = F.pad(volume, [n for size in reversed(volume.shape[1:]) for n in (0, -size % s)])
        return [volume.unfold(1, s, s).unfold(2, s, s).unfold(3, s, s).movedim(0, 3)]


# --- stages 1 to 4 ----------------------------------------------------------------------------


class _Stage:
    """(B, D, H, W, C) -> (B, D/2, H/2, W/2, C'): pool, then transform."""

    def __init__(self, stage: Stage, dtype: torch.dtype):
        self.proj = stage.downsample.proj.weight.flatten(1).to(dtype)
        self.blocks = [_Block(block, dtype) for block in stage.blocks]

    def pool(self, x: Tensor) -> Tensor:
        return _pool(x.to(self.proj.dtype), F.max_pool3d)

    def transform(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.proj).float()  # what the blocks add to stays in fp32
        for block in self.blocks:
            x += block(x.to(self.proj.dtype))
        return x


def _pool(x: Tensor, pool: Callable[..., Tensor]) -> Tensor:
    """Maxima of 3 by 3 (by 3) tokens at every other one; (…, C) in and out."""
    return pool(x.movedim(-1, 1), kernel_size=3, stride=2, padding=1).movedim(1, -1).contiguous()


class _Block:
    """(B, D, H, W, C) -> the same shape, what the block adds to its input."""

    def __init__(self, block: Block, dtype: torch.dtype):
        lines = _Lines.of(block.conv)
        depth, height, width = (kernel[:, :, :, None].to(dtype) for kernel in lines.kernels)
        self.kernels = depth, height, width.transpose(2, 3)  # (C, 1, k, 1) or (C, 1, 1, k)
        self.taps = torch.stack([k.flatten(1).T for k in lines.kernels]).float()  # (3, k, C)
        scale = block.layer_scale.double()
        bias = block.expand.bias.double() + block.expand.weight.double() @ lines.bias
        self.expand = block.expand.weight.to(dtype)  # the model's own where the precision is
        self.expand_bias = bias.to(dtype)
        self.contract = (block.contract.weight.double() * scale[:, None]).to(dtype)
        self.contract_bias = (block.contract.bias.double() * scale).to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        y = self._convolve(x).view(-1, x.shape[-1])
        rows = len(y) if x.device.type != "cpu" else MLP_TOKENS
        for part in y.split(rows):
            hidden = torch.ops.aten.gelu_(F.linear(part, self.expand, self.expand_bias))
            part.copy_(F.linear(hidden, self.contract, self.contract_bias))
        return y.view(x.shape)

    def _convolve(self, x: Tensor) -> Tensor:
        """Along depth on images (D, H·W), along height and width on images (H, W)."""
        if runs_fused(x):
            return kernels.decomposed(x, self.taps, torch.zeros_like(self.taps[0, 0]), x.dtype)
        batch, depth, height, width, channels = x.shape
        along_depth, along_height, along_width = self.kernels
        y = _depthwise(x.view(batch, depth, height * width, channels), along_depth).view(x.shape)
        planes = x.view(batch * depth, height, width, channels)
        y += _depthwise(planes, along_height).view(x.shape)
        y += _depthwise(planes, along_width).view(x.shape)
        return y


def _depthwise(x: Tensor, kernel: Tensor) -> Tensor:
    """(N, H, W, C) with (C, 1, kh, kw), zeros beyond the edges -> the same shape."""
    padding = kernel.shape[2] // 2, kernel.shape[3] // 2
    image = x.permute(0, 3, 1, 2)  # channels last in memory
    y = F.conv2d(image, kernel, padding=padding, groups=kernel.shape[0])
    return y.permute(0, 2, 3, 1).contiguous()
