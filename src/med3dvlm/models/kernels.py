"""The depthwise decomposed convolution with its batch norms as fused GPU kernels (Triton).

What `DecomposedConv3d.plain` computes in three convolutions, three batch norms and two sums, in
one kernel that reads its input once and writes its output once. Tensors are channels last,
(B, D, H, W, C), so that each voxel's channels are one contiguous, aligned read on any grid; sums
are in fp32 whatever the input. A program computes a tile of 4³ voxels and a few channels: along
each axis it walks over the slabs that reach into the tile and adds each to all the tile's voxels
within the kernel, so that a slab is loaded once for four outputs. What neighbours read again
comes from the L2 cache.

In evaluation mode the batch norms fold into taps and one offset. In training their statistics
come first, from a kernel that reads the input and writes no convolution. The conv biases cancel
there. The gradient, with z the convolution along one axis, m and 1/r its mean and standard
deviation, g the output's gradient centred over the batch, and s = γr:

    dz = s·g − κ·(z − m),  κ = s·r·dγ / N,  dγ = r·Σ g·z
    dw[j] = Σ_p dz(p)·x(p + j),  dx = Σ over the axes of Wᵀ dz = s·Wᵀg − κ·(WᵀW x − m·Wᵀ1)

so one reduction over (x, g) gives all gradients of parameters, and one kernel, the forward one
with x as its second input, gives dx; nothing of the size of z is ever written. Near a border WᵀW
is no convolution, hence its matrices, n² a channel, are made beforehand.

Importing needs Triton, which comes with PyTorch's CUDA builds. With TRITON_INTERPRET=1 it runs on
a CPU, slowly, which is how it is tested.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

if TYPE_CHECKING:
    from med3dvlm.models.dcformer import DecomposedConv3d

TILE = 4  # voxels along each axis that a program computes
CHANNEL_BYTES = 128  # of a voxel that it reads, a cache line
REDUCING_PROGRAMS = 512  # that share the sums over the batch: fewer partial sums to write


def decomposed_conv(conv: DecomposedConv3d, x: Tensor) -> Tensor:
    """What `conv.plain(x)` gives, for a depthwise `conv` of stride 1; counts the batch in training.

    Args:
        x: (B, C, D, H, W), any layout; channels last is read without a copy.

    Returns:
        (B, C, D, H, W), in channels last; of autocast's type under autocast, else of x's.

    Raises:
        ValueError: one value a channel in training, as :class:`torch.nn.BatchNorm3d`.
    """
    x = x.movedim(1, -1).contiguous()  # (B, D, H, W, C)
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    lines = (conv.along_depth, conv.along_height, conv.along_width)
    norms = (conv.norm_depth, conv.norm_height, conv.norm_width)
    taps = torch.stack([line.weight.flatten(1).T for line in lines]).float()  # (3, k, C)
    bias = torch.stack([line.bias for line in lines]).float()
    gamma = torch.stack([norm.weight for norm in norms]).float()
    beta = torch.stack([norm.bias for norm in norms]).float()
    eps = float(conv.norm_depth.eps)
    if conv.norm_depth.training:
        if x.numel() == x.shape[-1]:
            raise ValueError(f"expected more than 1 value per channel in training: {x.shape}.")
        offset = (beta + 0 * bias).sum(0)  # the biases cancel: their gradient is 0, not None
        y, mean, var = normalised(x, taps, gamma, offset, eps, dtype)
        _count(norms, mean + bias.detach(), var, x.numel() // x.shape[-1])
    else:
        var = torch.stack([norm.running_var for norm in norms]).float()
        mean = torch.stack([norm.running_mean for norm in norms]).float()
        scale = gamma * torch.rsqrt(var + eps)
        offset = (beta + (bias - mean) * scale).sum(0)
        y = decomposed(x, taps * scale[:, None], offset, dtype)
    return y.movedim(-1, 1)


@torch.no_grad()
def _count(norms: tuple[Any, ...], mean: Tensor, var: Tensor, count: int) -> None:
    """Move the running statistics as batch norms do; they keep the unbiased variance."""
    for norm, mean_, var_ in zip(norms, mean, var * (count / (count - 1)), strict=True):
        norm.num_batches_tracked.add_(1)
        share = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean_.to(norm.running_mean.dtype), share)
        norm.running_var.lerp_(var_.to(norm.running_var.dtype), share)


# --- operations -------------------------------------------------------------------------------


@library.custom_op("med3dvlm::decomposed", mutates_args=())
def decomposed(x: Tensor, taps: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """Three depthwise convolutions, one along each axis, summed, and an offset.

    Args:
        x: (B, D, H, W, C), contiguous, fp32, bf16 or fp16.
        taps: (3, k, C) fp32, k odd, padded by k//2: along depth, height and width.
        offset: (C,) fp32.
        dtype: of the output, (B, D, H, W, C).
    """
    return _convolve(x, taps, offset, dtype)


@decomposed.register_fake
def _(x: Tensor, taps: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _keep_decomposed(ctx, inputs, output) -> None:
    x, taps, _, _ = inputs
    ctx.save_for_backward(x, taps)


def _decomposed_backward(ctx, g: Tensor):
    x, taps = ctx.saved_tensors
    return (*decomposed_gradients(x, g.contiguous(), taps), None)


@library.custom_op("med3dvlm::decomposed_gradients", mutates_args=())
def decomposed_gradients(x: Tensor, g: Tensor, taps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of :func:`decomposed`, with g the output's gradient: those of x, taps and offset."""
    zero = torch.zeros_like(taps[0, 0])
    dtaps, _ = _correlate(x, g, zero, taps)
    return _convolve(g, taps, zero, x.dtype, transposed=True), dtaps, _sum(g)


@decomposed_gradients.register_fake
def _(x: Tensor, g: Tensor, taps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(taps), torch.empty_like(taps[0, 0])


decomposed.register_autograd(_decomposed_backward, setup_context=_keep_decomposed)


@library.custom_op("med3dvlm::normalised", mutates_args=())
def normalised(
    x: Tensor, taps: Tensor, gamma: Tensor, offset: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`decomposed`, each convolution normalised over the batch and scaled by gamma.

    Args:
        gamma: (3, C) fp32.

    Returns:
        The sum, (B, D, H, W, C); mean and (biased) variance of the convolutions, (3, C) each,
        which carry no gradient.
    """
    mean, var = _moments(x, taps)
    scale = gamma * torch.rsqrt(var + eps)
    y = _convolve(x, taps * scale[:, None], offset - (mean * scale).sum(0), dtype)
    return y, mean, var


@normalised.register_fake
def _(
    x: Tensor, taps: Tensor, gamma: Tensor, offset: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), torch.empty_like(gamma), torch.empty_like(gamma)


def _keep_normalised(ctx, inputs, output) -> None:
    x, taps, gamma, _, eps, _ = inputs
    _, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.save_for_backward(x, taps, gamma, mean, var)
    ctx.eps = eps


def _normalised_backward(ctx, g: Tensor, _mean, _var):
    return (*normalised_gradients(*ctx.saved_tensors, g.contiguous(), ctx.eps), None, None)


@library.custom_op("med3dvlm::normalised_gradients", mutates_args=())
def normalised_gradients(
    x: Tensor, taps: Tensor, gamma: Tensor, mean: Tensor, var: Tensor, g: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of :func:`normalised`: those of x, taps, gamma and offset. The formulas stand above."""
    count = x.numel() // x.shape[-1]
    r = torch.rsqrt(var + eps)
    s = gamma * r
    doffset = _sum(g)
    centre = doffset / count
    gx, zx = _correlate(x, g, centre, taps, mean)
    dgamma = r * (taps * gx).sum(1)
    kappa = s * r * dgamma / count
    dtaps = s[:, None] * gx - kappa[:, None] * zx
    own = _own_terms(x.shape[1:4], taps, kappa, constant=kappa * mean - s * centre)
    zero = torch.zeros_like(centre)
    dx = _convolve(g, taps * s[:, None], zero, x.dtype, transposed=True, own=(x, own))
    return dx, dtaps, dgamma, doffset


@normalised_gradients.register_fake
def _(
    x: Tensor, taps: Tensor, gamma: Tensor, mean: Tensor, var: Tensor, g: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    like = torch.empty_like
    return like(x), like(taps), like(gamma), like(taps[0, 0])


normalised.register_autograd(_normalised_backward, setup_context=_keep_normalised)


def _sum(g: Tensor) -> Tensor:
    return g.sum((0, 1, 2, 3), dtype=torch.float32)


def _own_terms(
    sizes: torch.Size, taps: Tensor, kappa: Tensor, *, constant: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Per axis of n voxels −κ·WᵀW, (n, n, C), and Wᵀ1 times a constant, (n, C)."""
    from med3dvlm.models.dcformer import band_matrix

    terms = []
    for size, kernel, factor, value in zip(sizes, taps, kappa, constant, strict=True):
        w = band_matrix(kernel.T, size)  # (C, n, n)
        square = -factor[:, None, None] * (w.transpose(1, 2) @ w)
        edge = value[:, None] * w.sum(1)
        terms.append((square.permute(1, 2, 0).contiguous(), edge.T.contiguous()))
    return terms


# --- launches ---------------------------------------------------------------------------------


class _Grid:
    """How a tensor (B, D, H, W, C) is cut into tiles."""

    def __init__(self, x: Tensor):
        self.batch, *sizes, self.channels = x.shape
        self.sizes = sizes
        edges = [min(TILE, triton.next_power_of_2(size)) for size in sizes]
        wide = min(CHANNEL_BYTES // x.element_size(), triton.next_power_of_2(self.channels))
        self.tile = dict(zip(("TD", "TH", "TW", "TC"), (*edges, wide), strict=True))
        self.tiles = 1
        for size, edge in zip(sizes, edges, strict=True):
            self.tiles *= triton.cdiv(size, edge)
        self.strips = triton.cdiv(self.channels, wide)
        self.device = torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _convolve(
    x: Tensor,
    taps: Tensor,
    offset: Tensor,
    dtype: torch.dtype,
    *,
    transposed: bool = False,
    own: tuple[Tensor, list[tuple[Tensor, Tensor]]] | None = None,
) -> Tensor:
    """The fused kernel; `own` adds a second input through one matrix a channel and axis."""
    grid = _Grid(x)
    y = torch.empty_like(x, dtype=dtype)
    second, terms = own or (None, [(None, None)] * 3)
    (square_d, edge_d), (square_h, edge_h), (square_w, edge_w) = terms
    with grid.device:
        _convolve_kernel[(grid.tiles, grid.strips, grid.batch)](
            x,
            taps.contiguous(),
            offset.contiguous(),
            y,
            second,
            square_d,
            square_h,
            square_w,
            edge_d,
            edge_h,
            edge_w,
            *grid.sizes,
            grid.channels,
            K=taps.shape[1],
            TRANSPOSED=transposed,
            OWN=own is not None,
            **grid.tile,
        )
    return y


def _moments(x: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the batch of the three convolutions, (3, C) each.

    Of each tile sum and squared deviation from its own mean, put together as in Chan et al.,
    "Updating formulae" (1979): exact to rounding however large the mean is.
    """
    grid = _Grid(x)
    tiles = grid.batch * grid.tiles
    parts = taps.new_empty(tiles, 2, 3, grid.channels)
    counts = taps.new_empty(tiles)
    with grid.device:
        _moments_kernel[(grid.tiles, grid.strips, grid.batch)](
            x,
            taps.contiguous(),
            parts,
            counts,
            *grid.sizes,
            grid.channels,
            K=taps.shape[1],
            **grid.tile,
        )
    sums, deviations = parts.unbind(1)
    count = x.numel() // grid.channels
    mean = sums.sum(0) / count
    counts = counts[:, None, None]
    between = counts * (sums / counts - mean).square()
    return mean, (deviations + between).sum(0) / count


def _correlate(
    x: Tensor, g: Tensor, centre: Tensor, taps: Tensor, mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Σ (g − centre)(p)·x(p + j), (3, k, C), and, given their mean, the same with z − mean."""
    grid = _Grid(x)
    programs = min(grid.tiles, max(1, REDUCING_PROGRAMS // (grid.strips * grid.batch)))
    kernel = taps.shape[1]
    parts = taps.new_zeros(grid.batch * programs, 2, 3, kernel, grid.channels)
    with grid.device:
        _correlate_kernel[(programs, grid.strips, grid.batch)](
            x,
            g,
            centre.contiguous(),
            taps.contiguous(),
            mean,
            parts,
            *grid.sizes,
            grid.channels,
            grid.tiles,
            K=kernel,
            KP=triton.next_power_of_2(kernel),
            CONVOLUTIONS=mean is not None,
            num_warps=8,  # with four its sums do not fit the registers
            **grid.tile,
        )
    with_g, with_z = parts.sum(0)
    return with_g, with_z


# --- kernels ----------------------------------------------------------------------------------
# Blocks are (TD, TH, TW, TC), or 1 in the place of an axis; z, y, x are the tile's coordinates.


@triton.jit
def _corner(tile, H, W, TD: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    wide, high = tl.cdiv(W, TW), tl.cdiv(H, TH)
    return (tile // (wide * high)) * TD, ((tile // wide) % high) * TH, (tile % wide) * TW


@triton.jit
def _axis(first, COUNT: tl.constexpr, PLACE: tl.constexpr):
    """first … first + COUNT − 1 along one of the four places of a block."""
    values = first + tl.arange(0, COUNT)
    if PLACE == 0:  # Triton wants one chain of branches: it reads on after a return within one
        return values[:, None, None, None]
    elif PLACE == 1:  # noqa: RET505
        return values[None, :, None, None]
    elif PLACE == 2:
        return values[None, None, :, None]
    else:
        return values[None, None, None, :]


@triton.jit
def _total(block):
    return tl.sum(tl.sum(tl.sum(block, 0), 0), 0)


@triton.jit
def _add_line(
    acc, source, rest, inside, weights, per_input, per_output, c, C,
    along, first, COUNT: tl.constexpr, size, stride, REACH: tl.constexpr,
):  # fmt: skip
    """Add to a tile what the voxels of one axis within REACH give to it.

    `rest` and `inside` say where a slab's voxels are on the other axes and whether they exist;
    the weight of input i for output o lies at weights + i·per_input + o·per_output + c.
    """
    for i in range(tl.maximum(first - REACH, 0), tl.minimum(first + COUNT + REACH, size)):
        slab = tl.load(source + rest + i * stride, mask=inside, other=0.0).to(tl.float32)
        near = (along - i <= REACH) & (i - along <= REACH) & (along < size) & (c < C)
        at = i * per_input + along * per_output + c
        acc += slab * tl.load(weights + at, mask=near, other=0.0)
    return acc


@triton.jit
def _convolve_kernel(
    x_ptr, taps, offset, y_ptr, second_ptr,
    square_d, square_h, square_w, edge_d, edge_h, edge_w,
    D, H, W, C,
    K: tl.constexpr, TRANSPOSED: tl.constexpr, OWN: tl.constexpr,
    TD: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    z0, y0, x0 = _corner(tl.program_id(0), H, W, TD, TH, TW)
    z, y, x = _axis(z0, TD, 0), _axis(y0, TH, 1), _axis(x0, TW, 2)
    c = _axis(tl.program_id(1) * TC, TC, 3)
    sample = tl.program_id(2).to(tl.int64) * D * H * W * C
    R: tl.constexpr = K // 2
    acc = tl.zeros((TD, TH, TW, TC), tl.float32)
    acc += tl.load(offset + c, mask=c < C, other=0.0)
    sz, sy = H * W * C, W * C
    at_d, at_h, at_w = y * sy + x * C + c, z * sz + x * C + c, z * sz + y * sy + c
    in_d = (y < H) & (x < W) & (c < C)
    in_h = (z < D) & (x < W) & (c < C)
    in_w = (z < D) & (y < H) & (c < C)
    source = x_ptr + sample
    step = -C if TRANSPOSED else C  # tap j of output o reads input o + j − R, or o − j + R
    w = taps + R * C
    acc = _add_line(acc, source, at_d, in_d, w, step, -step, c, C, z, z0, TD, D, sz, R)
    w += K * C
    acc = _add_line(acc, source, at_h, in_h, w, step, -step, c, C, y, y0, TH, H, sy, R)
    w += K * C
    acc = _add_line(acc, source, at_w, in_w, w, step, -step, c, C, x, x0, TW, W, C, R)
    if OWN:
        own = second_ptr + sample
        R2: tl.constexpr = K - 1
        acc = _add_line(acc, own, at_d, in_d, square_d, C, D * C, c, C, z, z0, TD, D, sz, R2)
        acc = _add_line(acc, own, at_h, in_h, square_h, C, H * C, c, C, y, y0, TH, H, sy, R2)
        acc = _add_line(acc, own, at_w, in_w, square_w, C, W * C, c, C, x, x0, TW, W, C, R2)
        acc += tl.load(edge_d + z * C + c, mask=(z < D) & (c < C), other=0.0)
        acc += tl.load(edge_h + y * C + c, mask=(y < H) & (c < C), other=0.0)
        acc += tl.load(edge_w + x * C + c, mask=(x < W) & (c < C), other=0.0)
    at = sample + z * sz + y * sy + x * C + c
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=(z < D) & in_d)


@triton.jit
def _moments_kernel(
    x_ptr, taps, parts, counts,
    D, H, W, C,
    K: tl.constexpr,
    TD: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """Of each convolution's tile the sum and the squared deviation from its mean."""
    tile = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    z0, y0, x0 = _corner(tl.program_id(0), H, W, TD, TH, TW)
    z, y, x = _axis(z0, TD, 0), _axis(y0, TH, 1), _axis(x0, TW, 2)
    c = _axis(tl.program_id(1) * TC, TC, 3)
    source = x_ptr + tl.program_id(2).to(tl.int64) * D * H * W * C
    R: tl.constexpr = K // 2
    sz, sy = H * W * C, W * C
    at_d, at_h, at_w = y * sy + x * C + c, z * sz + x * C + c, z * sz + y * sy + c
    in_d = (y < H) & (x < W) & (c < C)
    in_h = (z < D) & (x < W) & (c < C)
    in_w = (z < D) & (y < H) & (c < C)
    count = tl.minimum(TD, D - z0) * tl.minimum(TH, H - y0) * tl.minimum(TW, W - x0)
    tl.store(counts + tile, count.to(tl.float32))
    out = parts + tile.to(tl.int64) * 6 * C
    none = tl.zeros((TD, TH, TW, TC), tl.float32)
    w = taps + R * C
    line = _add_line(none, source, at_d, in_d, w, C, -C, c, C, z, z0, TD, D, sz, R)
    _store_moments(line, (z < D) & in_d, count, out, C, TC)
    w += K * C
    line = _add_line(none, source, at_h, in_h, w, C, -C, c, C, y, y0, TH, H, sy, R)
    _store_moments(line, (z < D) & in_d, count, out + C, C, TC)
    w += K * C
    line = _add_line(none, source, at_w, in_w, w, C, -C, c, C, x, x0, TW, W, C, R)
    _store_moments(line, (z < D) & in_d, count, out + 2 * C, C, TC)


@triton.jit
def _store_moments(line, inside, count, out, C, TC: tl.constexpr):
    c = tl.program_id(1) * TC + tl.arange(0, TC)
    total = _total(tl.where(inside, line, 0.0))
    away = tl.where(inside, line - (total / count)[None, None, None, :], 0.0)
    tl.store(out + c, total, mask=c < C)
    tl.store(out + 3 * C + c, _total(away * away), mask=c < C)


@triton.jit
def _add_products(
    with_g, with_z, g, line, source, rest, inside, along, size, stride,
    K: tl.constexpr, KP: tl.constexpr, CONVOLUTIONS: tl.constexpr,
):  # fmt: skip
    """Add to (KP, TC) the products of a tile with the input, moved by each of K taps."""
    taps = tl.arange(0, KP)[:, None]
    for j in range(K):
        there = along + j - K // 2
        mask = inside & (there >= 0) & (there < size)
        moved = tl.load(source + rest + there * stride, mask=mask, other=0.0).to(tl.float32)
        with_g += tl.where(taps == j, _total(g * moved)[None, :], 0.0)
        if CONVOLUTIONS:
            with_z += tl.where(taps == j, _total(line * moved)[None, :], 0.0)
    return with_g, with_z


@triton.jit
def _centred_line(
    source, rest, inside, taps, mean, c, C, along, first, everywhere, size, stride,
    K: tl.constexpr, COUNT: tl.constexpr,
    TD: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    line = tl.zeros((TD, TH, TW, TC), tl.float32)
    line = _add_line(
        line, source, rest, inside, taps + (K // 2) * C, C, -C, c, C,
        along, first, COUNT, size, stride, K // 2,
    )  # fmt: skip
    return tl.where(everywhere, line - tl.load(mean + c, mask=c < C, other=0.0), 0.0)


@triton.jit
def _correlate_kernel(
    x_ptr, g_ptr, centre, taps, mean, parts,
    D, H, W, C, tiles,
    K: tl.constexpr, KP: tl.constexpr, CONVOLUTIONS: tl.constexpr,
    TD: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64) * D * H * W * C
    source = x_ptr + sample
    c = _axis(tl.program_id(1) * TC, TC, 3)
    middle = tl.load(centre + c, mask=c < C, other=0.0)
    sz, sy = H * W * C, W * C
    g_d = tl.zeros((KP, TC), tl.float32)
    g_h = tl.zeros((KP, TC), tl.float32)
    g_w = tl.zeros((KP, TC), tl.float32)
    z_d = tl.zeros((KP, TC), tl.float32)
    z_h = tl.zeros((KP, TC), tl.float32)
    z_w = tl.zeros((KP, TC), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        z0, y0, x0 = _corner(tile, H, W, TD, TH, TW)
        z, y, x = _axis(z0, TD, 0), _axis(y0, TH, 1), _axis(x0, TW, 2)
        at_d, at_h, at_w = y * sy + x * C + c, z * sz + x * C + c, z * sz + y * sy + c
        in_d = (y < H) & (x < W) & (c < C)
        in_h = (z < D) & (x < W) & (c < C)
        in_w = (z < D) & (y < H) & (c < C)
        here = (z < D) & in_d
        g = tl.load(g_ptr + sample + z * sz + at_d, mask=here, other=0.0).to(tl.float32)
        g = tl.where(here, g - middle, 0.0)
        line = g
        if CONVOLUTIONS:
            line = _centred_line(
                source, at_d, in_d, taps, mean, c, C, z, z0, here, D, sz,
                K, TD, TD, TH, TW, TC,
            )  # fmt: skip
        g_d, z_d = _add_products(
            g_d, z_d, g, line, source, at_d, in_d, z, D, sz, K, KP, CONVOLUTIONS
        )
        if CONVOLUTIONS:
            line = _centred_line(
                source, at_h, in_h, taps + K * C, mean + C, c, C, y, y0, here, H, sy,
                K, TH, TD, TH, TW, TC,
            )  # fmt: skip
        g_h, z_h = _add_products(
            g_h, z_h, g, line, source, at_h, in_h, y, H, sy, K, KP, CONVOLUTIONS
        )
        if CONVOLUTIONS:
            line = _centred_line(
                source, at_w, in_w, taps + 2 * K * C, mean + 2 * C, c, C, x, x0, here, W, C,
                K, TW, TD, TH, TW, TC,
            )  # fmt: skip
        g_w, z_w = _add_products(
            g_w, z_w, g, line, source, at_w, in_w, x, W, C, K, KP, CONVOLUTIONS
        )
    program = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    tap = tl.arange(0, KP)[:, None]
    strip = tl.program_id(1) * TC + tl.arange(0, TC)[None, :]
    mask = (tap < K) & (strip < C)
    out = parts + program.to(tl.int64) * 6 * K * C + tap * C + strip
    tl.store(out, g_d, mask=mask)
    tl.store(out + K * C, g_h, mask=mask)
    tl.store(out + 2 * K * C, g_w, mask=mask)
    if CONVOLUTIONS:
        tl.store(out + 3 * K * C, z_d, mask=mask)
        tl.store(out + 4 * K * C, z_h, mask=mask)
        tl.store(out + 5 * K * C, z_w, mask=mask)
