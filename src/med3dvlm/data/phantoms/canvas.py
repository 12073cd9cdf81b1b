"""A grid in patient coordinates on which shapes are painted in HU."""

from __future__ import annotations

import numpy as np

Triple = tuple[float, float, float]
Box = tuple[slice, slice, slice]


class Canvas:
    """A volume (D, H, W) in HU with the coordinates of its voxels.

    Coordinates are mm from the centre of the volume: z up (superior), y back (posterior), x to
    the patient's left, as in LPS. Shapes are painted on the small box they reach, never on the
    whole grid: that is what makes a study cheap.
    """

    def __init__(self, shape: tuple[int, int, int], spacing_mm: Triple):
        self.hu = np.empty(shape, dtype=np.float32)
        self.spacing_mm = spacing_mm
        self.axes = [
            ((np.arange(n) - (n - 1) / 2) * s).astype(np.float32)
            for n, s in zip(shape, spacing_mm, strict=True)
        ]
        self.z = self.axes[0][:, None, None]
        self.y = self.axes[1][None, :, None]
        self.x = self.axes[2][None, None, :]

    def box(self, centre: Triple, reach: Triple) -> Box:
        """The voxels within `reach` mm of `centre` on each axis, (z, y, x)."""
        slices = []
        for n, s, c, r in zip(self.hu.shape, self.spacing_mm, centre, reach, strict=True):
            middle = (n - 1) / 2
            low, high = int(np.ceil((c - r) / s + middle)), int(np.floor((c + r) / s + middle))
            slices.append(slice(min(max(low, 0), n), min(max(high + 1, 0), n)))
        return slices[0], slices[1], slices[2]

    def at(self, box: Box) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The coordinates of a box, each ready to broadcast over (D, H, W), mm."""
        return self.z[box[0]], self.y[:, box[1]], self.x[:, :, box[2]]

    def paint(self, box: Box, cover: np.ndarray, value: float) -> None:
        """Mix `value` into a box by `cover`, 0 to 1: soft edges are partial volume."""
        part = self.hu[box]
        part += cover * (np.float32(value) - part)

    def ellipsoid_cover(
        self, centre: Triple, radii: Triple, *, lean: tuple[float, float] = (0.0, 0.0)
    ) -> tuple[Box, np.ndarray]:
        """The box of an ellipsoid, (z, y, x) mm, and how much of each voxel is in it.

        `lean` shears it: mm of y and of x per mm upwards.
        """
        margin = self.spacing_mm[2]
        lean_y, lean_x = lean
        reach_y = radii[1] + abs(lean_y) * radii[0] + margin
        reach_x = radii[2] + abs(lean_x) * radii[0] + margin
        box = self.box(centre, (radii[0] + self.spacing_mm[0] / 2, reach_y, reach_x))
        z, y, x = self.at(box)
        up = z - np.float32(centre[0])
        square = (up / np.float32(radii[0])) ** 2
        square = square + ((y - centre[1] - lean_y * up) / np.float32(radii[1])) ** 2
        square = square + ((x - centre[2] - lean_x * up) / np.float32(radii[2])) ** 2
        # (1 - r²) / 2 is the distance to the surface, to first order, without a root
        return box, soft((1 - square) * np.float32(min(radii) / 2), margin)

    def ellipsoid(
        self,
        centre: Triple,
        radii: Triple,
        value: float,
        *,
        lean: tuple[float, float] = (0.0, 0.0),
        over: tuple[float, float] | None = None,
    ) -> None:
        """Paint an ellipsoid; `over` keeps to voxels that are between two HU now."""
        box, cover = self.ellipsoid_cover(centre, radii, lean=lean)
        if over is not None:
            now = self.hu[box]
            cover = cover * ((now > over[0]) & (now < over[1]))
        self.paint(box, cover, value)

    def tube(
        self,
        centre_yx: tuple[float, float],
        radii_yx: tuple[float, float],
        value: float,
        *,
        low: float,
        high: float,
        lean: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        """Paint an upright (or leaning) oval cylinder between two heights, mm."""
        (cy, cx), (ry, rx) = centre_yx, radii_yx
        margin, half = self.spacing_mm[2], (high - low) / 2
        middle = (low + high) / 2
        reach = (half, ry + abs(lean[0]) * half + margin, rx + abs(lean[1]) * half + margin)
        box = self.box((middle, cy, cx), reach)
        z, y, x = self.at(box)
        up = z - middle if any(lean) else np.zeros((1, 1, 1), np.float32)
        square = ((y - cy - lean[0] * up) / np.float32(ry)) ** 2
        square = square + ((x - cx - lean[1] * up) / np.float32(rx)) ** 2
        self.paint(box, soft((1 - square) * np.float32(min(ry, rx) / 2), margin), value)

    def dots(self, points: np.ndarray, share: np.ndarray, value: float, below: float) -> None:
        """Mix `value` by `share` into the voxels at points (N, 3), where HU are under `below`."""
        index = [
            np.rint(points[:, k] / s + (n - 1) / 2).astype(np.intp)
            for k, (n, s) in enumerate(zip(self.hu.shape, self.spacing_mm, strict=True))
        ]
        inside = np.ones(len(points), bool)
        for axis, n in zip(index, self.hu.shape, strict=True):
            inside &= (axis >= 0) & (axis < n)
        z, y, x = (axis[inside] for axis in index)
        now, mix = self.hu[z, y, x], share[inside]
        keep = now < below
        self.hu[z[keep], y[keep], x[keep]] = (now + mix * (value - now))[keep]


def soft(distance: np.ndarray, width: float) -> np.ndarray:
    """1 inside, 0 outside, a ramp of `width` mm across the surface."""
    ramp = distance * np.float32(1 / width)
    ramp += np.float32(0.5)
    return np.clip(ramp, 0, 1, out=ramp)
