"""Augmentation, of whole batches where the model is: what is drawn travels, the work stays there.

The draws belong to an item and not to a batch or a device, so that a run that is resumed, or that
reads with other workers, sees the same volumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from med3dvlm.data.store import Quantisation

PARAMETERS = 9  # shifts along D, H, W; scale and shift of values; flips of D, H, W; turn
SHIFTS, SCALE, SHIFT, MIRRORS, TURN = slice(0, 3), 3, 4, slice(5, 8), 8


@dataclass(frozen=True)
class Augmentation:
    """How volumes are varied.

    Attributes:
        intensity: scale and shift of the values by up to this share of their range of 0 to 1.
        shift_voxels: shift in space, by up to this many voxels along each axis; what leaves on
            one side comes in on the other.
        flips: "swap" mirrors left and right in every second study, whose words are then
            exchanged; "published" turns every second one by 90° in its slices and flips each axis
            of one in ten, whose words stay (arXiv 2503.20047's code).
    """

    intensity: float = 0.0
    shift_voxels: int = 0
    flips: str = "off"

    def draw(self, random: np.random.Generator) -> np.ndarray:
        """(PARAMETERS,) float32 for one study."""
        drawn = np.zeros(PARAMETERS, np.float32)
        drawn[SHIFTS] = random.integers(-self.shift_voxels, self.shift_voxels + 1, 3)
        scale, shift = self.intensity * random.uniform(-1, 1, 2)
        drawn[SCALE], drawn[SHIFT] = 1 + scale, shift
        if self.flips == "swap":
            drawn[MIRRORS] = (0, 0, random.random() < 0.5)
        elif self.flips == "published":
            drawn[MIRRORS] = random.random(3) < 0.1
            drawn[TURN] = random.random() < 0.5
        return drawn


def is_mirrored(drawn: np.ndarray) -> bool:
    """Whether left and right are exchanged."""
    return bool(drawn[MIRRORS][2])


def augment(volumes: Tensor, drawn: Tensor) -> Tensor:
    """Turn, flip and shift, each study by its own draw.

    Args:
        volumes: (B, D, H, W), of any dtype.
        drawn: (B, PARAMETERS), on the same device.

    Raises:
        ValueError: for a turn of slices that are not square.
    """
    turns = drawn[:, TURN] > 0
    if bool(turns.any()):
        if volumes.shape[2] != volumes.shape[3]:
            raise ValueError("slices that are not square cannot be turned: use other flips.")
        turned = volumes.transpose(2, 3).flip(2)
        volumes = torch.where(turns[:, None, None, None], turned, volumes)
    index = []
    for axis, size in enumerate(volumes.shape[1:]):
        place = torch.arange(size, device=volumes.device) - drawn[:, axis : axis + 1].long()
        flipped = drawn[:, MIRRORS][:, axis : axis + 1] > 0
        place = torch.where(flipped, size - 1 - place, place) % size
        index.append(place.view(len(volumes), *(size if k == axis else 1 for k in range(3))))
    study = torch.arange(len(volumes), device=volumes.device).view(-1, 1, 1, 1)
    return volumes[study, index[0], index[1], index[2]]


@dataclass(frozen=True)
class VolumeDecoder:
    """Stored values in a batch to the model's volumes, on the device where the batch lies."""

    quantisation: Quantisation

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """With `stored` (B, D, H, W), and `drawn` where volumes are varied -> with `volumes`."""
        if "stored" not in batch:
            return batch
        batch = dict(batch)
        stored, drawn = batch.pop("stored"), batch.pop("drawn", None)
        if drawn is None:
            batch["volumes"] = self.quantisation.decode(stored).unsqueeze(1)
            return batch
        values = augment(stored, drawn).float()
        scale, shift = (drawn[:, k].view(-1, 1, 1, 1) for k in (SCALE, SHIFT))
        gain, low = self.quantisation.affine
        # decoded and varied in one, in place: at 16 volumes a batch, memory is what takes time
        batch["volumes"] = values.mul_(gain * scale).add_(low * scale + shift).unsqueeze(1)
        return batch
