"""Let an encoder see each voxel through several intensity windows side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_windows(windows: Sequence[Sequence[float]]) -> list[list[float]]:
    """
    Raises:
        ValueError: for one that is not a low and a higher value.
    """
    for window in windows:
        if len(window) != 2 or not window[0] < window[1]:
            raise ValueError(f"stem_windows: {list(window)} must be a low and a higher value.")
    return [list(window) for window in windows]


def through_windows(x: Tensor, windows: Sequence[Sequence[float]]) -> Tensor:
    """What is seen through each window: 0 up to its low value, 1 from its high one.

    (..., C, D, H, W) -> (..., C * windows, D, H, W); without windows, as it was.
    """
    if not windows:
        return x
    seen = [((x - low) / (high - low)).clamp(0, 1) for low, high in windows]
    return torch.cat(seen, dim=-4)
