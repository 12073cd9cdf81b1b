"""DCFormer written plainly, as the paper describes it: what the benchmarks compare with.

Eager, one convolution and one batch norm per axis, (B, C, D, H, W) throughout. It takes the
weights of :class:`med3dvlm.models.DCFormer` by name, and shares no code with it, so that neither
gains when the other is made faster.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from med3dvlm.models import DCFormer, DCFormerConfig

AXES = ("depth", "height", "width")


class PlainDCFormer(nn.Module):
    """(B, 1, D, H, W) -> five streams (B, N, C)."""

    def __init__(self, config: DCFormerConfig):
        super().__init__()
        self.stem = _Stem(config)
        widths, kernels = config.channels, config.kernel_sizes
        self.stages = nn.ModuleList(
            _Stage(widths[i], widths[i + 1], config.depths[i + 1], kernels[i]) for i in range(4)
        )

    @classmethod
    def like(cls, model: DCFormer) -> PlainDCFormer:
        """With the weights of `model`, and in its mode."""
        plain = cls(model.config)
        plain.load_state_dict(model.state_dict())
        return plain.train(model.training)

    def forward(self, volumes: Tensor) -> list[Tensor]:
        x = self.stem(volumes)
        streams = [x]
        for stage in self.stages:
            x = stage(x)
            streams.append(x)
        return [stream.flatten(2).transpose(1, 2) for stream in streams]


class _Lines(nn.Module):
    def __init__(self, c_in: int, c_out: int, k: int, stride: int, groups: int, smooth: bool):
        super().__init__()
        self.stride = stride
        self.smooth = smooth
        for axis, name in enumerate(AXES):
            kernel, padding, steps = [1, 1, 1], [0, 0, 0], [stride] * 3
            kernel[axis], padding[axis] = k, k // 2
            if smooth:
                steps = [1, 1, 1]
                steps[axis] = stride
            conv = nn.Conv3d(c_in, c_out, kernel, steps, padding, groups=groups)
            self.add_module(f"along_{name}", conv)
            self.add_module(f"norm_{name}", nn.BatchNorm3d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        total = None
        for axis, name in enumerate(AXES):
            y = x
            if self.smooth:
                window = [self.stride] * 3
                window[axis] = 1
                y = nn.functional.avg_pool3d(y, window, ceil_mode=True, count_include_pad=False)
            y = getattr(self, f"norm_{name}")(getattr(self, f"along_{name}")(y))
            total = y if total is None else total + y
        assert total is not None
        return total


class _Patches(nn.Module):
    def __init__(self, c_in: int, c_out: int, size: int):
        super().__init__()
        self.size = size
        self.proj = nn.Linear(c_in * size**3, c_out)
        self.norm = nn.BatchNorm3d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        s = self.size
        x = nn.functional.pad(x, [n for axis in (4, 3, 2) for n in (0, -x.shape[axis] % s)])
        kernel = self.proj.weight.view(-1, x.shape[1], s, s, s)
        return self.norm(nn.functional.conv3d(x, kernel, self.proj.bias, stride=s))


class _Stem(nn.Module):
    def __init__(self, config: DCFormerConfig):
        super().__init__()
        width, k, stride = config.channels[0], config.stem_kernel_size, config.stem_stride
        self.windows = config.stem_windows
        channels = config.in_channels * max(1, len(self.windows))
        if config.stem_patches:
            first = _Patches(channels, width, stride)
        else:
            first = _Lines(channels, width, k, stride, 1, config.stem_antialias)
        rest = [_Lines(width, width, 3, 1, 1, False) for _ in range(config.stem_layers - 1)]
        self.layers = nn.ModuleList([first, *rest])
        self.gelu = config.stem_activation == "gelu"

    def forward(self, x: Tensor) -> Tensor:
        if self.windows:
            x = torch.cat([((x - a) / (b - a)).clamp(0, 1) for a, b in self.windows], dim=1)
        for layer in self.layers:
            x = layer(x)
            if self.gelu:
                x = nn.functional.gelu(x)
        return x


class _Block(nn.Module):
    def __init__(self, channels: int, k: int):
        super().__init__()
        self.conv = _Lines(channels, channels, k, 1, channels, False)
        self.expand = nn.Linear(channels, 4 * channels)
        self.contract = nn.Linear(4 * channels, channels)
        self.layer_scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).permute(0, 2, 3, 4, 1)
        y = self.layer_scale * self.contract(nn.functional.gelu(self.expand(y)))
        return x + y.permute(0, 4, 1, 2, 3)


class _Downsample(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.proj = nn.Conv3d(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(nn.functional.max_pool3d(x, 3, 2, 1))


class _Stage(nn.Module):
    def __init__(self, c_in: int, c_out: int, depth: int, k: int):
        super().__init__()
        self.downsample = _Downsample(c_in, c_out)
        self.blocks = nn.ModuleList(_Block(c_out, k) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x
