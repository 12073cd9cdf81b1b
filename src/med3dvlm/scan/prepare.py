"""From a scan to the volume a model sees, by settings that are saved with the model.

The steps, in their order: find the box (`crop`), resample to a spacing and fit to a size, map
intensities, pad. Resampling comes before the mapping, so that averages are of physical values.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from med3dvlm.files import write_json
from med3dvlm.scan.scan import NotHounsfieldWarning, Scan, ScanError

if TYPE_CHECKING:
    import torch

CHOICES = {
    "intensity": ("window", "minmax", "percentile"),
    "non_hu": ("percentile", "refuse"),
    "crop": ("none", "foreground"),
    "fit": ("stretch", "pad"),
}
SAMPLED_VOXELS = 2_000_000
"""Percentiles are taken over every n-th voxel, at most this many."""


@dataclass(frozen=True)
class Preparation:
    """How scans become volumes: data, saved with every checkpoint and every store.

    Attributes:
        size: (D, H, W) of the volume, voxels.
        intensity: "window" maps HU by the knots of `window`; "minmax" maps lowest and highest
            value, "percentile" the `percentiles`, to the first and last output of `window`.
        window: (value, output) knots of a rising piecewise-linear map, flat outside; two knots
            are a plain window, more knots are several windows in one.
        non_hu: for a scan that is not in HU, "window" falls back to "percentile" with a
            `NotHounsfieldWarning`, or is refused.
        percentiles: lower and upper, in percent.
        crop: "foreground" cuts to the box of voxels that are not zero after the mapping.
        spacing_mm: (z, y, x) to resample to, or None.
        fit: "stretch" resizes to `size` as `torch.nn.functional.interpolate` does (trilinear,
            align_corners=False); "pad" cuts or pads around the centre.
        pad_value: output value outside the scan.
        antialias: average over what a voxel covers when shrinking, instead of sampling it.
    """

    size: tuple[int, int, int] = (48, 96, 96)
    intensity: Literal["window", "minmax", "percentile"] = "window"
    window: tuple[tuple[float, float], ...] = ((-1000.0, 0.0), (1000.0, 1.0))
    non_hu: Literal["percentile", "refuse"] = "percentile"
    percentiles: tuple[float, float] = (0.5, 99.5)
    crop: Literal["none", "foreground"] = "none"
    spacing_mm: tuple[float, float, float] | None = None
    fit: Literal["stretch", "pad"] = "stretch"
    pad_value: float = 0.0
    antialias: bool = False

    def __post_init__(self) -> None:
        for key, choices in CHOICES.items():
            if getattr(self, key) not in choices:
                raise ValueError(
                    f"preparation: {key} is {getattr(self, key)!r}; choose one of {choices}."
                )
        _set(self, "size", _numbers("size", self.size, int, 3, positive=True))
        if self.spacing_mm is not None:
            spacing = _numbers("spacing_mm", self.spacing_mm, float, 3, positive=True)
            _set(self, "spacing_mm", spacing)
        low, high = _numbers("percentiles", self.percentiles, float, 2)
        if not 0 <= low < high <= 100:
            raise ValueError(f"preparation: percentiles ({low}, {high}) must rise within 0–100.")
        _set(self, "percentiles", (low, high))
        _set(self, "window", _knots(self.window))
        _set(self, "pad_value", float(self.pad_value))
        _set(self, "antialias", bool(self.antialias))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Preparation:
        """From plain values; what is not given has its default.

        Raises:
            ValueError: for an unknown key or an impossible value.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(
                f"preparation: unknown {', '.join(map(repr, unknown))}; known are "
                f"{', '.join(sorted(known))}."
            )
        return cls(**settings)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Preparation:
        """Read from JSON."""
        try:
            settings = json.loads(Path(path).read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: it is no JSON ({error}).") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: it holds no preparation settings.")
        try:
            return cls.from_dict(settings)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def fingerprint(self) -> str:
        """Twelve characters that differ where any setting differs."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def compare_preparations(a: Preparation, b: Preparation) -> None:
    """Check that two preparations, as of a store and a checkpoint, are the same.

    Raises:
        ValueError: with both sides of every setting that differs.
    """
    left, right = a.to_dict(), b.to_dict()
    different = [key for key in left if left[key] != right[key]]
    if different:
        lines = "; ".join(f"{key}: {left[key]} against {right[key]}" for key in different)
        raise ValueError(
            f"the preparations differ ({a.fingerprint()} against {b.fingerprint()}): {lines}; "
            "prepare the scans again with the settings of the model."
        )


def prepare(scan: Scan, preparation: Preparation) -> np.ndarray:
    """The volume (1, D, H, W) float32 that a model with this preparation sees.

    Raises:
        ScanError: where nothing can be seen (constant values), or the scan is not in HU and
            the preparation refuses that.
    """
    mapping = _intensity_map(scan, preparation)
    plan = _plan(scan, preparation, mapping)
    import torch  # here, so that a scan that cannot be read is refused at once

    volume = torch.from_numpy(_readable(scan.array))
    # the axis that shrinks most first, so that the next ones have less to do
    for axis in sorted(range(3), key=lambda axis: plan[axis].shrinks):
        volume = _resample_axis(volume, axis, plan[axis], antialias=preparation.antialias)
    result = np.full(preparation.size, preparation.pad_value, np.float32)
    inside = tuple(slice(axis.start, axis.start + axis.count) for axis in plan)
    result[inside] = mapping(volume.numpy())
    if not np.isfinite(result).all():
        raise ScanError(
            f"{scan.source}: it holds values that are not numbers; read it with read_scan."
        )
    return result[None]


def prepared_affine(scan: Scan, preparation: Preparation) -> np.ndarray:
    """4×4 float64: index (x, y, z, 1) of the prepared volume → LPS mm, for maps on its grid."""
    plan = _plan(scan, preparation, None)
    to_scan = np.eye(4)
    for axis in range(3):
        column = 2 - axis  # axes are (z, y, x), columns (x, y, z)
        first, step = plan[axis].first, plan[axis].step
        to_scan[column, column] = step
        to_scan[column, 3] = first - plan[axis].start * step
    return np.asarray(scan.affine, np.float64) @ to_scan


def to_scan_grid(values: np.ndarray, scan: Scan, preparation: Preparation) -> np.ndarray:
    """A map over the prepared volume on the scan's own voxels: the way of `prepare` back.

    Args:
        values: (D, H, W) of `preparation.size`.

    Returns:
        (D, H, W) float32 of the scan's shape; 0 where the prepared volume does not reach.

    Raises:
        ValueError: for values of another shape.
    """
    if values.shape != preparation.size:
        raise ValueError(
            f"the map has {values.shape} voxels, the prepared volume {preparation.size}."
        )
    import torch

    back = [
        _backwards(axis, n)
        for axis, n in zip(_plan(scan, preparation, None), scan.shape, strict=True)
    ]
    result = np.zeros(scan.shape, np.float32)
    volume = torch.from_numpy(_readable(values))
    for axis in sorted(range(3), key=lambda axis: back[axis].shrinks):
        volume = _resample_axis(volume, axis, back[axis], antialias=True)
    result[tuple(slice(axis.start, axis.start + axis.count) for axis in back)] = volume.numpy()
    return result


# --- the plan -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    """How one axis of the result is taken from one axis of the scan.

    Result voxel start + n is centred on scan voxel first + n · step, for n below count; it may
    reach from scan voxel low up to, not including, high.
    """

    start: int
    count: int
    first: float
    step: float
    low: int
    high: int

    @property
    def shrinks(self) -> float:
        return self.count / (self.high - self.low)


def _plan(
    scan: Scan, preparation: Preparation, mapping: Callable[[np.ndarray], np.ndarray] | None
) -> tuple[_Axis, _Axis, _Axis]:
    """The axes of the result, shared by `prepare` and `prepared_affine`."""
    box = [(0, n) for n in scan.array.shape]
    if preparation.crop == "foreground":
        box = _foreground(scan, mapping or _intensity_map(scan, preparation))
    axes = []
    for axis, (low, high) in enumerate(box):
        extent, size = high - low, preparation.size[axis]
        sampled = extent
        if preparation.spacing_mm is not None:
            ratio = scan.spacing_mm[axis] / preparation.spacing_mm[axis]
            sampled = max(1, math.floor(extent * ratio + 1e-6))
        if preparation.fit == "stretch":
            sampled = size
        step = extent / sampled
        skipped = max(0, (sampled - size) // 2)
        axes.append(
            _Axis(
                start=max(0, (size - sampled) // 2),
                count=min(size, sampled),
                first=low + (skipped + 0.5) * step - 0.5,  # as torch with align_corners=False
                step=step,
                low=low,
                high=high,
            )
        )
    return axes[0], axes[1], axes[2]


def _backwards(axis: _Axis, size: int) -> _Axis:
    """How the scan's axis of `size` voxels is taken from the prepared one: `axis` inverted.

    A scan voxel is in reach where its centre lies within a voxel that the plan filled.
    """
    ends = [(n - 0.5) * axis.step + axis.first for n in (0, axis.count)]
    start = max(0, math.ceil(ends[0] - 1e-6))
    stop = min(size, math.ceil(ends[1] - 1e-6))
    return _Axis(
        start=start,
        count=stop - start,
        first=(start - axis.first) / axis.step + axis.start,
        step=1 / axis.step,
        low=axis.start,
        high=axis.start + axis.count,
    )


def _foreground(scan: Scan, mapping: Callable[[np.ndarray], np.ndarray]) -> list[tuple[int, int]]:
    """Per axis (z, y, x) the range that holds every voxel whose output is not zero."""
    depth, height, width = scan.array.shape
    seen = [np.zeros(depth, bool), np.zeros(height, bool), np.zeros(width, bool)]
    for z in range(depth):
        filled = mapping(scan.array[z]) != 0
        seen[0][z] = filled.any()
        seen[1] |= filled.any(axis=1)
        seen[2] |= filled.any(axis=0)
    if not seen[0].any():
        raise ScanError(f"{scan.source}: nothing is left after the intensity mapping.")
    ranges = [np.flatnonzero(line)[[0, -1]] for line in seen]
    return [(int(low), int(high) + 1) for low, high in ranges]


# --- intensities ----------------------------------------------------------------------------


def _intensity_map(scan: Scan, preparation: Preparation) -> Callable[[np.ndarray], np.ndarray]:
    """The map from the scan's values to output values."""
    kind, knots = preparation.intensity, preparation.window
    if kind == "window" and scan.units != "HU":
        if preparation.non_hu == "refuse":
            raise ScanError(
                f"{scan.source}: it is not in Hounsfield units, which this preparation needs; "
                "give a CT, or a preparation with non_hu='percentile'."
            )
        low, high = preparation.percentiles
        warnings.warn(
            f"{scan.source}: not in Hounsfield units, mapped by percentiles {low:g}–{high:g}",
            NotHounsfieldWarning,
            stacklevel=3,
        )
        kind = "percentile"
    if kind != "window":
        low, high = _range(scan, preparation, kind)
        knots = ((low, knots[0][1]), (high, knots[-1][1]))
    values, outputs = np.array(knots, np.float64).T

    def apply(array: np.ndarray) -> np.ndarray:
        if len(values) == 2:  # in float32 and in place: np.interp would go through float64
            scale = (outputs[1] - outputs[0]) / (values[1] - values[0])
            out = array - np.float32(values[0])
            out *= np.float32(scale)
            out += np.float32(outputs[0])
            return np.clip(out, np.float32(outputs[0]), np.float32(outputs[1]), out=out)
        return np.interp(array, values, outputs).astype(np.float32)

    return apply


def _range(scan: Scan, preparation: Preparation, kind: str) -> tuple[float, float]:
    """The values that become the first and last output."""
    if kind == "minmax":
        low, high = float(scan.array.min()), float(scan.array.max())
    else:
        values = scan.array.reshape(-1)
        values = values[:: max(1, values.size // SAMPLED_VOXELS)]
        low, high = (float(v) for v in np.percentile(values, preparation.percentiles))
        if low == high:  # nearly all of it background
            low, high = float(scan.array.min()), float(scan.array.max())
    if not low < high:
        raise ScanError(
            f"{scan.source}: every voxel is {low:g}, there is nothing to see; give another scan."
        )
    return low, high


# --- resampling -----------------------------------------------------------------------------


def _resample_axis(
    volume: torch.Tensor, axis: int, plan: _Axis, *, antialias: bool
) -> torch.Tensor:
    """Linear resampling of one axis as a matrix product: exact, and fast for every layout."""
    if plan.step == 1.0 and plan.first == int(plan.first):
        return volume.narrow(axis, int(plan.first), plan.count)
    import torch

    weights = _weights(plan, antialias=antialias)
    used = np.flatnonzero(weights.any(axis=0))
    low, high = int(used[0]), int(used[-1]) + 1
    if len(used) <= (high - low) // 2:  # sampling few of many: gather first
        volume = volume.index_select(axis, torch.from_numpy(used))
        matrix = torch.from_numpy(np.ascontiguousarray(weights[:, used]))
    else:
        volume = volume.narrow(axis, low, high - low)
        matrix = torch.from_numpy(np.ascontiguousarray(weights[:, low:high]))
    if axis == 2:
        return volume @ matrix.T
    if axis == 1:
        return matrix @ volume
    depth, height, width = volume.shape
    return (matrix @ volume.reshape(depth, -1)).reshape(-1, height, width)


def _weights(plan: _Axis, *, antialias: bool) -> np.ndarray:
    """(count, high) float32: how much of each scan voxel is in each result voxel; rows sum to 1.

    Linear interpolation is a triangle one voxel wide; to shrink without aliasing it is as wide
    as the step.
    """
    reach = max(1.0, plan.step) if antialias else 1.0
    centres = plan.first + plan.step * np.arange(plan.count)
    if reach == 1.0:
        centres = np.clip(centres, plan.low, plan.high - 1)  # the edge goes on, as in torch
    voxels = np.arange(plan.high)
    weights = np.clip(1 - abs(voxels - centres[:, None]) / reach, 0, None)
    weights[:, : plan.low] = 0
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _readable(array: np.ndarray) -> np.ndarray:
    """As float32 that torch takes without a copy wherever that can be."""
    array = np.asarray(array, np.float32)
    if any(stride < 0 for stride in array.strides) or not array.flags.writeable:
        return array.copy()
    return array


# --- checks of settings ---------------------------------------------------------------------


def _set(preparation: Preparation, key: str, value: Any) -> None:
    object.__setattr__(preparation, key, value)  # the way of frozen dataclasses


def _numbers(
    key: str, values: Any, kind: type, count: int, *, positive: bool = False
) -> tuple[Any, ...]:
    try:
        numbers = tuple(kind(value) for value in values)
        good = len(numbers) == count and all(math.isfinite(n) for n in numbers)
        good = good and all(n == float(v) for n, v in zip(numbers, values, strict=True))
    except (TypeError, ValueError):
        numbers, good = (), False
    if not good or (positive and min(numbers) <= 0):
        raise ValueError(
            f"preparation: {key} is {values!r}; give {count} "
            f"{'positive ' if positive else ''}{'whole ' if kind is int else ''}numbers."
        )
    return numbers


def _knots(window: Any) -> tuple[tuple[float, float], ...]:
    try:
        knots = tuple((float(value), float(output)) for value, output in window)
    except (TypeError, ValueError):
        knots = ()
    values, outputs = [k[0] for k in knots], [k[1] for k in knots]
    rising = all(a < b for a, b in pairwise(values))
    rising = rising and all(a <= b for a, b in pairwise(outputs))
    if len(knots) < 2 or not rising or not np.isfinite(knots).all() or outputs[0] == outputs[-1]:
        raise ValueError(
            f"preparation: window is {window!r}; give two or more (value, output) knots that rise."
        )
    return knots


PRESETS: dict[str, Preparation] = {
    # M3D, Med3DVLM: min–max, crop to what is not zero, trilinear resize
    "m3d": Preparation(
        size=(128, 256, 256),
        intensity="minmax",
        window=((0.0, 0.0), (1.0, 1.0)),
        crop="foreground",
        fit="stretch",
    ),
    # CT-CLIP: 1.5 × 0.75 × 0.75 mm, ±1000 HU to ±1, centre crop or pad
    "ct-rate": Preparation(
        size=(240, 480, 480),
        intensity="window",
        window=((-1000.0, -1.0), (1000.0, 1.0)),
        spacing_mm=(1.5, 0.75, 0.75),
        fit="pad",
        pad_value=-1.0,
    ),
    # lung, soft tissue and bone in one map: most grey levels for soft tissue
    "demo": Preparation(
        size=(64, 96, 128),
        intensity="window",
        window=((-1000.0, 0.0), (-700.0, 0.22), (-160.0, 0.36), (240.0, 0.92), (1000.0, 1.0)),
        spacing_mm=(6.2, 3.1, 3.1),
        fit="pad",
        pad_value=0.0,
        antialias=True,
    ),
}
