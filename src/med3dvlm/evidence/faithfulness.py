"""Whether a map shows what an answer rests on: the pointing game, deletion and insertion."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from med3dvlm.evidence.maps import BATCH, blurred
from med3dvlm.evidence.targets import Target
from med3dvlm.scan import peak_of

TOLERANCE_MM = 15.0  # as published: 15 pixels of a photograph (Zhang et al., IJCV 2018)
BLOCK = 12  # blocks along each side of a volume
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)  # of the blocks that are changed


def distance_mm(
    values: np.ndarray, mask: np.ndarray, spacing_mm: tuple[float, float, float]
) -> float:
    """From a map's highest voxel to the nearest voxel of the truth, mm; infinite for an empty map.

    Args:
        values, mask: (D, H, W) on the same grid; a mask without voxels is an error.
    """
    if not mask.any():
        raise ValueError("the truth has no voxel: nothing can be pointed at.")
    peak = peak_of(values)
    if peak is None:
        return float("inf")
    steps = (np.argwhere(mask) - np.array(peak)) * np.array(spacing_mm)
    return float(np.linalg.norm(steps, axis=1).min())


def share_within(
    mask: np.ndarray, spacing_mm: tuple[float, float, float], *, tolerance_mm: float = TOLERANCE_MM
) -> float:
    """The share of all voxels within the tolerance of a mask: what a random map hits."""
    from scipy.ndimage import distance_transform_edt

    distance = np.asarray(distance_transform_edt(~mask, sampling=spacing_mm))
    return float((distance <= tolerance_mm).mean())


def block_order(values: np.ndarray) -> np.ndarray:
    """The volume's voxels in order of the blocks they lie in, the block with the most map first.

    Returns:
        (D, H, W) int: the rank of each voxel's block.
    """
    labels = _blocks(values.shape)
    total = np.bincount(labels.reshape(-1), values.reshape(-1).astype(float))
    total /= np.bincount(labels.reshape(-1))
    rank = np.empty(len(total), int)
    rank[np.argsort(-total, kind="stable")] = np.arange(len(total))
    return rank[labels]


def _blocks(shape: tuple[int, ...]) -> np.ndarray:
    """(D, H, W) int: which of BLOCK³ boxes each voxel lies in (of as many as there are voxels)."""
    per_axis = [np.arange(n) * min(BLOCK, n) // n for n in shape]
    z, y, x = np.meshgrid(*per_axis, indexing="ij")
    return (z * min(BLOCK, shape[1]) + y) * min(BLOCK, shape[2]) + x


@torch.inference_mode()
def curves(
    encoder: Any,
    volume: Tensor,
    target: Target,
    values: np.ndarray,
    *,
    shown: Callable[[Tensor], Tensor] = torch.sigmoid,
) -> tuple[np.ndarray, np.ndarray]:
    """What becomes of a target as a map's first blocks are taken out, or are all there is.

    (Petsiuk et al., RISE, BMVC 2018.) A faithful map lets the deletion curve fall early and the
    insertion curve rise early. What is taken out is replaced by the blurred volume.

    Args:
        volume: (1, 1, D, H, W), prepared.
        values: (D, H, W), the map on its grid.
        shown: from the target to what is drawn; log-odds to a probability where not given.

    Returns:
        (deletion, insertion), a value for each of `SHARES`.
    """
    rank, smooth = block_order(values), blurred(volume)
    count = int(rank.max()) + 1
    mixed = []
    for share in SHARES:
        first = torch.from_numpy(rank < round(share * count)).to(volume.device)
        mixed += [torch.where(first, smooth, volume), torch.where(first, volume, smooth)]
    stack = torch.cat(mixed)
    found = torch.cat([target(encoder(part)) for part in stack.split(BATCH)])
    both = shown(found.float()).cpu().numpy().reshape(-1, 2)
    return both[:, 0], both[:, 1]


def area(curve: np.ndarray) -> float:
    """The area under a curve over `SHARES`, 0 to 1 for a probability."""
    return float(np.trapezoid(curve, SHARES))
