"""A grid in patient coordinates on which shapes are drawn in HU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Triple = tuple[float, float, float]


class Canvas:
    """A volume (D, H, W) in HU with the coordinates of its voxels.

    Coordinates are mm from the centre of the volume: z up (superior), y back (posterior), x to
    the patient's left, as in LPS.
    """

    def __init__(self, shape: tuple[int, int, int], spacing_mm: Triple, fill: float = -1000.0):
        self.hu = np.full(shape, fill, dtype=np.float32)
        self.spacing_mm = spacing_mm
        axes = [
            ((np.arange(n) - (n - 1) / 2) * s).astype(np.float32)
            for n, s in zip(shape, spacing_mm, strict=True)
        ]
        self.axes = axes
        self.z = axes[0][:, None, None]
        self.y = axes[1][None, :, None]
        self.x = axes[2][None, None, :]

    def box(self, centre: Triple, reach: Triple) -> tuple[slice, slice, slice]:
        """The voxels within `reach` mm of `centre` on each axis, (z, y, x)."""
        slices = []
        for axis, c, r in zip(self.axes, centre, reach, strict=True):
            slices.append(slice(*np.searchsorted(axis, [c - r, c + r]).tolist()))
        return slices[0], slices[1], slices[2]

    def at(self, box: tuple[slice, slice, slice]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.z[box[0]], self.y[:, box[1]], self.x[:, :, box[2]]

    def paint(self, box: tuple[slice, slice, slice], cover: np.ndarray, value: float) -> None:
        """Mix `value` into a box by `cover`, 0 to 1: soft edges are partial volume."""
        part = self.hu[box]
        part += cover * (np.float32(value) - part)

    def ellipsoid(
        self,
        centre: Triple,
        radii: Triple,
        value: float,
        *,
        only: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        """Draw an ellipsoid, (z, y, x) mm; `only` restricts it by the HU that are there."""
        margin = max(self.spacing_mm)
        reach = (radii[0] + margin, radii[1] + margin, radii[2] + margin)
        box = self.box(centre, reach)
        z, y, x = self.at(box)
        cz, cy, cx = centre
        rz, ry, rx = radii
        r = np.sqrt(((z - cz) / rz) ** 2 + ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2)
        cover = soft((1 - r) * min(radii), self.spacing_mm[2])
        if only is not None:
            cover = cover * only(self.hu[box])
        self.paint(box, cover, value)

    def tube(
        self,
        centre_yx: tuple[float, float],
        radius: float,
        value: float,
        *,
        low: float,
        high: float,
    ) -> None:
        """Draw an upright cylinder between two heights, mm."""
        cy, cx = centre_yx
        margin = radius + self.spacing_mm[2]
        box = self.box(((low + high) / 2, cy, cx), ((high - low) / 2, margin, margin))
        _, y, x = self.at(box)
        r = np.sqrt((y - cy) ** 2 + (x - cx) ** 2)
        cover = soft(radius - r, self.spacing_mm[2])
        self.paint(box, np.broadcast_to(cover, self.hu[box].shape), value)


def soft(distance: np.ndarray, width: float) -> np.ndarray:
    """1 inside, 0 outside, a ramp of `width` mm across the surface."""
    return np.clip(distance / width + 0.5, 0, 1)
