"""From a file's voxels and affine to a canonical `Scan`: the last step of every reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from med3dvlm.scan.blocks import check_claim
from med3dvlm.scan.geometry import (
    OBLIQUE_DEGREES,
    SHEAR_DEGREES,
    canonical,
    check_affine,
    oblique_degrees,
    shear_degrees,
    spacing_of,
    straighten,
)
from med3dvlm.scan.scan import Scan, ScanError

AIR_HU = -1024.0
LOWEST_HU = -1500.0
"""Nothing in or around a patient is below this: such values pad what was not reconstructed."""
HIGHEST_HU = 32767.0
NEGATIVE_HU = -200.0
"""Values below this are taken as HU where the file does not say: fat, lung and air have them,
MR and PET do not."""


def assemble(
    voxels: np.ndarray,
    affine: np.ndarray,
    *,
    source: str,
    notes: Sequence[str] = (),
    scale: tuple[float, float] = (1.0, 0.0),
    modality: str | None = None,
    orientation: str = "LPS",
    other_units: str | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Scan:
    """Check, canonicalise and convert a volume.

    Args:
        voxels: (I, J, K) of any real type, indexed as the affine says.
        affine: 4×4, index (i, j, k, 1) → LPS mm.
        notes: warnings found so far.
        scale: (slope, intercept) from stored values to the file's units.
        orientation: "unknown" where the affine is a guess.
        other_units: what the file says its values are, where that is not HU.

    Raises:
        ScanError: where this is not a volume.
    """
    notes = list(notes)
    check_volume(source, voxels.shape)
    check_affine(source, affine)
    if (tilt := shear_degrees(affine)) > SHEAR_DEGREES:
        fill = float(voxels[:: max(1, voxels.shape[0] // 64)].min())
        try:
            voxels, affine = straighten(voxels, affine, fill=fill)
        except ScanError as error:
            raise ScanError(f"{source}: {error}") from error
        notes.append(
            f"sheared grid (gantry tilt) of {tilt:.1f}°: resampled to right angles by linear "
            "interpolation"
        )
    view, affine = canonical(voxels, affine)
    if (angle := oblique_degrees(affine)) > OBLIQUE_DEGREES:
        notes.append(f"oblique by {angle:.0f}°: kept on its own grid, axes are the nearest ones")
    array = to_float32(view, *scale)
    replace_non_finite(source, array, notes)
    units, inferred = None, {}
    if other_units is None:
        units, inferred = judge_values(array, voxels.dtype, modality, notes)
    else:
        notes.append(f"not HU: the file gives its values in {other_units}")
    return Scan(
        array=array,
        spacing_mm=spacing_of(affine),
        affine=affine,
        modality=modality,
        units=units,
        source=source,
        orientation=orientation,
        warnings=tuple(notes),
        meta={**(meta or {}), **inferred},
    )


def check_volume(source: str, shape: Sequence[int]) -> None:
    """Refuse what is not three-dimensional, or too large."""
    if len(shape) != 3 or min(shape) < 2:
        size = "×".join(map(str, shape))
        raise ScanError(
            f"{source}: a single 2D image ({size}) is not a volume; give the whole series or "
            "a 3D file."
        )
    check_claim(source, shape, 0, 0, compressed=False)


def to_float32(view: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """(D, H, W) float32, contiguous; slab by slab, since a scan may be as large as memory."""
    plain = slope == 1.0 and intercept == 0.0
    if plain and view.dtype == np.float32 and view.flags.c_contiguous and view.flags.writeable:
        return view
    array = np.empty(view.shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is replaced and flagged
        for z in range(view.shape[0]):
            array[z] = view[z] if plain else view[z].astype(np.float64) * slope + intercept
    return array


def replace_non_finite(source: str, array: np.ndarray, notes: list[str]) -> None:
    """Put the lowest value where voxels are NaN or infinite, in place."""
    # one bad voxel makes the sum of its slice bad: cheap, and no mask of the whole volume
    with np.errstate(over="ignore", invalid="ignore"):
        bad = [z for z in range(len(array)) if not np.isfinite(array[z].sum(dtype=np.float64))]
    if not bad:
        return
    lowest, count = np.inf, 0
    for z in range(len(array)):
        finite = array[z] if z not in set(bad) else array[z][np.isfinite(array[z])]
        lowest = min(lowest, float(finite.min(initial=np.inf)))
    if not np.isfinite(lowest):
        raise ScanError(f"{source}: no voxel holds a number; write the file again.")
    for z in bad:
        mask = ~np.isfinite(array[z])
        count += int(mask.sum())
        array[z][mask] = lowest
    notes.append(f"{count} voxels that are not numbers (NaN or infinite) set to {lowest:g}")


def judge_values(
    array: np.ndarray, dtype: np.dtype, modality: str | None, notes: list[str]
) -> tuple[str | None, dict[str, Any]]:
    """Decide whether the values are HU, and set what lies outside the scan to air, in place.

    Args:
        dtype: type the file stored.
        modality: as the file says; only CT is in HU.

    Returns:
        "HU" or None, and facts for `Scan.meta`.
    """
    low, high = float(array.min()), float(array.max())
    if low == high:
        notes.append(f"constant: every voxel is {low:g}, there is no content")
        return ("HU" if modality == "CT" and -1100 <= low <= HIGHEST_HU else None), {}
    if modality not in (None, "CT"):
        if low <= -900 and high <= HIGHEST_HU:
            notes.append(f"labelled {modality}, but the values look like CT in HU (from {low:g})")
        return None, {}
    if low < -HIGHEST_HU - 1 or high > HIGHEST_HU:
        notes.append(f"values from {low:.3g} to {high:.3g} are out of the range of HU: not HU")
        return None, {}
    if modality is None and low > NEGATIVE_HU:
        if dtype.itemsize == 1 or (low >= 0 and high <= 255):
            notes.append(
                "not HU: values of 8 bits, as pictures windowed before they were stored have"
            )
        elif low >= 0:
            notes.append(
                f"not HU: no value is negative (from {low:g}); if this is a CT, it is stored "
                "with an offset, usually 1024"
            )
        else:
            notes.append(f"not recognised as HU: the lowest value is {low:g}")
        return None, {}
    if modality == "CT" and low >= 0:
        notes.append(
            f"not HU: labelled CT, but no value is negative (from {low:g}); the rescale "
            "intercept is missing or it is not a CT"
        )
        return None, {}
    if low <= LOWEST_HU:
        count = _pad_to_air(array)
        notes.append(f"{count} voxels of padding (down to {low:g} HU) set to air, {AIR_HU:g} HU")
    return "HU", ({} if modality else {"units_from": "values"})


def _pad_to_air(array: np.ndarray) -> int:
    count = 0
    for plane in array:
        mask = plane <= LOWEST_HU
        count += int(mask.sum())
        plane[mask] = AIR_HU
    return count
