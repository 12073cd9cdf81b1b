"""The stem's training step on a CPU: what its convolutions and batch norms compute, faster.

Three quarters of a step go into the stem. All of it is channels last, so that voxels are rows of
channels; docs/performance.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

GROUPS = 16
"""Parts in which rows are summed: in one, fp32 loses two digits over 262,144 of them."""


def convolve_planes(x: Tensor, weight: Tensor, bias: Tensor, axis: int) -> Tensor:
    """A dense 1-D convolution along one of D, H, W as a 2-D one that keeps the grid.

    Along D on images of D rows of H·W voxels, else on images of H rows of W. In bf16 and channels
    last the weights' gradient of `conv3d` is wrong in torch 2.13.0 where D is below the kernel.

    Args:
        x: (B, C, D, H, W), best channels last.
        weight: (C', C, k, 1, 1), or with the k on another axis; k odd.
        bias: (C',).
    """
    y = F.conv2d(_images(x, axis), _plane(weight, axis), bias, padding="same")
    return _volumes(y, axis, x.shape)


def _images(x: Tensor, axis: int) -> Tensor:
    rows = x.movedim(1, -1)
    return (rows.flatten(2, 3) if axis == 0 else rows.flatten(0, 1)).movedim(-1, 1)


def _volumes(images: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    grid = (2, shape[3:]) if axis == 0 else (0, (shape[0], shape[2]))
    return images.movedim(1, -1).unflatten(*grid).movedim(-1, 1)


def _plane(weight: Tensor, axis: int) -> Tensor:
    return weight.squeeze(4 if axis == 0 else 2)


class RoundedGradients(torch.autograd.Function):
    """The three convolutions of one input in fp32, whose gradients are products in bf16.

    So each activation and maximum sees exact values, and two thirds of the products take half
    the time. The input is kept once, in bf16.
    """

    @staticmethod
    @partial(torch.amp.custom_fwd, device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """x as for :func:`convolve_planes`; weight and bias along D, along H and along W."""
        weights, biases = parameters[::2], parameters[1::2]
        ctx.save_for_backward(x.bfloat16(), *weights)
        pairs = zip(weights, biases, strict=True)
        return tuple(convolve_planes(x, w, b, axis) for axis, (w, b) in enumerate(pairs))

    @staticmethod
    @partial(torch.amp.custom_bwd, device_type="cpu")
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, *weights = ctx.saved_tensors
        of_x, of_parameters = 0, []
        for axis, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            plane = _plane(weight, axis).bfloat16()
            padding = [size // 2 for size in plane.shape[2:]]
            part, of_plane, of_bias = torch.ops.aten.convolution_backward(
                *(_images(gradient.bfloat16(), axis), _images(x, axis), plane),
                *([len(plane)], [1, 1], padding, [1, 1], False, [0, 0], 1, [True] * 3),
            )
            of_x = of_x + _volumes(part, axis, x.shape)
            of_parameters += [of_plane.float().view(weight.shape), of_bias.float()]
        return of_x.float(), *of_parameters


def normalize_and_add(parts: Sequence[Tensor], norms: Sequence[nn.BatchNorm3d]) -> Tensor:
    """The sum of the parts, each through its batch norm in training mode.

    Args:
        parts: of equal shape (B, C, D, H, W), best channels last.
        norms: one for each; their running statistics take the batch in.

    Raises:
        ValueError: where there is one voxel, which has no variance.
    """
    shape = parts[0].shape
    if prod(shape) == shape[1]:
        raise ValueError(f"more than one value per channel is needed in training, not {shape}.")
    parameters = (p for norm in norms for p in (norm.weight, norm.bias))
    return _NormalizeAndAdd.apply(norms, *parts, *parameters)


class _NormalizeAndAdd(torch.autograd.Function):
    """Passes over memory are what it takes: a part is read twice forward and twice backward."""

    @staticmethod
    def forward(ctx: Any, norms: Sequence[nn.BatchNorm3d], *tensors: Tensor) -> Tensor:
        parts, parameters = tensors[: len(norms)], tensors[len(norms) :]
        weights, biases = parameters[::2], parameters[1::2]
        statistics, scales, shift = [], [], sum(biases)
        for part, weight, norm in zip(parts, weights, norms, strict=True):
            mean, variance = _statistics(_rows(part))
            _take_in(norm, mean, variance, part.numel() // len(mean))
            deviation = (variance + norm.eps).rsqrt()
            statistics += [mean, deviation]
            scales.append(weight * deviation)
            shift = shift - mean * scales[-1]
        y = torch.addcmul(shift, _rows(parts[0]), scales[0])
        for part, scale in zip(parts[1:], scales[1:], strict=True):
            y.addcmul_(_rows(part), scale)
        ctx.save_for_backward(*parts, *weights, *statistics)
        return _like(y, parts[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        count = len(ctx.saved_tensors) // 4
        parts, weights = ctx.saved_tensors[:count], ctx.saved_tensors[count : 2 * count]
        statistics = ctx.saved_tensors[2 * count :]
        g = _rows(gradient)
        of_parts, of_parameters = [], []
        for i, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            mean, deviation = statistics[2 * i : 2 * i + 2]
            rows, scale = _rows(part), weight * deviation
            of_weight, of_bias = _sums(g, rows, mean, deviation)
            slope = -scale * deviation * of_weight / len(rows)
            offset = -scale * of_bias / len(rows) - slope * mean
            of_rows = torch.addcmul(offset, g, scale).addcmul_(rows, slope)
            of_parts.append(_like(of_rows, part))
            of_parameters += [of_weight, of_bias]
        return None, *of_parts, *of_parameters


def _rows(x: Tensor) -> Tensor:
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _like(rows: Tensor, x: Tensor) -> Tensor:
    return rows.view(x.movedim(1, -1).shape).movedim(-1, 1)


def _groups(rows: Tensor) -> int:
    return gcd(GROUPS, len(rows))


def _statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of (N, C) over N."""
    groups = _groups(rows)
    side_by_side = rows.view(-1, groups * rows.shape[1])
    unused = rows.new_zeros(side_by_side.shape[1])
    both = torch.batch_norm_update_stats(side_by_side, unused, unused.clone(), 1.0)
    means, variances = (each.view(groups, -1) for each in both)
    mean = means.mean(0)
    return mean, (variances + (means - mean).square()).mean(0)


def _sums(g: Tensor, rows: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Over N, of g times what the rows are normalized, and of g."""
    groups = _groups(rows)
    both = torch.ops.aten.native_batch_norm_backward(
        g.view(-1, groups * rows.shape[1]),
        rows.view(-1, groups * rows.shape[1]),
        *(None, None, None, mean.repeat(groups), deviation.repeat(groups)),
        *(True, 0.0, [False, True, True]),
    )[1:]
    of_weight, of_bias = (each.view(groups, -1).sum(0) for each in both)
    return of_weight, of_bias


def _take_in(norm: nn.BatchNorm3d, mean: Tensor, variance: Tensor, count: int) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.num_batches_tracked is not None and norm.momentum is not None
    norm.num_batches_tracked += 1
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
