"""The voxels that the first, strided convolutions of a decomposed stem read."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def lines_through(
    x: Tensor, axis: int, *, kernel_size: int, stride: int, antialias: bool = False
) -> Tensor:
    """For each output of a 1-D convolution along one of D, H, W, the voxels under its kernel.

    Args:
        x: (..., C, D, H, W).
        axis: 0, 1 or 2, what the kernel spans; zeros lie beyond the edges.
        stride: on all three axes.
        antialias: average over the stride on the two axes that the kernel does not span, in place
            of reading every stride-th voxel.

    Returns:
        (..., C, ⌈D/stride⌉, ⌈H/stride⌉, ⌈W/stride⌉, kernel_size), as views where that is possible.
    """
    for other in range(3):
        if other != axis:
            x = _thin(x, other - 3, stride, antialias)
    padding = [0] * 6
    padding[4 - 2 * axis : 6 - 2 * axis] = [kernel_size // 2] * 2  # the last axis comes first
    return F.pad(x, padding).unfold(axis - 3, kernel_size, stride)


def _thin(x: Tensor, axis: int, stride: int, antialias: bool) -> Tensor:
    """Every stride-th voxel, or the mean of each `stride` voxels (the last of fewer)."""
    if not antialias:
        index = [slice(None)] * -axis
        index[0] = slice(None, None, stride)
        return x[(..., *index)]
    size = x.shape[axis]
    missing = -size % stride
    groups = F.pad(x, [0, 0] * (-1 - axis) + [0, missing]).unflatten(axis, (-1, stride))
    counts = x.new_full((groups.shape[axis - 1],), stride)
    counts[-1] -= missing
    return groups.sum(axis) / counts.view(-1, *[1] * (-1 - axis))
