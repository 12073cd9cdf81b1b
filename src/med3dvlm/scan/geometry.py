"""Axes, directions and spacings: from any file's order to the canonical one."""

from __future__ import annotations

import math

import numpy as np
from nibabel.orientations import io_orientation
from scipy.ndimage import affine_transform

from med3dvlm.scan.blocks import MAX_VOXELS
from med3dvlm.scan.scan import ScanError

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""NIfTI's world is right, anterior, superior; DICOM's is left, posterior, superior."""

SHEAR_DEGREES = 0.1
"""Axes further from a right angle than this are resampled; below, half a voxel is not reached."""

OBLIQUE_DEGREES = 1.0


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Voxel spacing (z, y, x) in mm of an (x, y, z) index → mm affine."""
    x, y, z = np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)
    return float(z), float(y), float(x)


def peak_of(values: np.ndarray) -> tuple[int, int, int] | None:
    """The voxel (z, y, x) where a map is highest; None for one that is nowhere above 0."""
    z, y, x = (int(n) for n in np.unravel_index(int(values.argmax()), values.shape))
    return (z, y, x) if values[z, y, x] > 0 else None


def check_affine(name: str, affine: np.ndarray) -> None:
    """Refuse an affine that places no volume in space.

    Raises:
        ScanError: where it is not finite, has a zero axis, or is singular.
    """
    if not np.isfinite(affine).all():
        raise ScanError(
            f"{name}: the orientation matrix holds values that are not numbers; "
            "write the file again with a valid affine."
        )
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if (lengths < 1e-6).any() or (lengths > 1e5).any():
        raise ScanError(
            f"{name}: the voxel spacing is {' × '.join(f'{mm:.3g}' for mm in lengths)} mm, "
            "which is no volume; write the file again with a valid affine."
        )
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3:
        raise ScanError(
            f"{name}: the orientation matrix is singular (two axes point the same way); "
            "write the file again with a valid affine."
        )


def shear_degrees(affine: np.ndarray) -> float:
    """Largest deviation from a right angle between two axes."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = np.abs(axes.T @ axes)[np.triu_indices(3, 1)]
    return math.degrees(math.asin(min(1.0, float(cosines.max()))))


def oblique_degrees(affine: np.ndarray) -> float:
    """Largest angle between an axis of the grid and the patient axis nearest to it."""
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return math.degrees(math.acos(min(1.0, float(np.abs(axes).max(axis=0).min()))))


def canonical(voxels: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Permute and flip axes to the canonical order, without copying.

    Args:
        voxels: (I, J, K), indexed as the affine says.
        affine: 4×4, index (i, j, k, 1) → LPS mm.

    Returns:
        A view (D, H, W) of the same voxels and its affine, index (x, y, z, 1) → LPS mm.
    """
    order = io_orientation(affine)  # per file axis: the patient axis it runs along, and its sign
    if np.isnan(order).any():
        raise ScanError("the axes of the volume cannot be told apart; check its affine.")
    source = np.argsort(order[:, 0])  # source[c]: the file axis of patient axis c
    to_file = np.zeros((4, 4))  # canonical index → file index
    to_file[3, 3] = 1.0
    flips = []
    for target, axis in enumerate(source):
        sign = order[axis, 1]
        to_file[axis, target] = sign
        to_file[axis, 3] = 0.0 if sign > 0 else voxels.shape[axis] - 1
        flips.append(slice(None, None, int(sign)))
    view = voxels.transpose(source)[tuple(flips)].transpose(2, 1, 0)
    return view, affine @ to_file


def straighten(
    voxels: np.ndarray, affine: np.ndarray, *, fill: float
) -> tuple[np.ndarray, np.ndarray]:
    """Resample a sheared grid (gantry tilt) to right angles, keeping axes i and j.

    The new grid holds the whole of the old one; what lies outside gets `fill`.

    Args:
        voxels: (I, J, K).
        affine: 4×4, index (i, j, k, 1) → mm, its axes not at right angles.

    Returns:
        (I', J', K') float32 and its affine, axes at right angles.
    """
    # QR keeps direction i, the plane (i, j), and makes k normal to it
    directions, scale = np.linalg.qr(affine[:3, :3])
    signs = np.sign(np.diag(scale))
    directions, spacing = directions * signs, np.abs(np.diag(scale))
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in voxels.shape], indexing="ij"))
    world = affine[:3, :3] @ corners.reshape(3, -1) + affine[:3, 3:]
    along = (directions.T @ world) / spacing[:, None]  # in new voxels
    low, high = along.min(axis=1), along.max(axis=1)
    size = tuple(int(n) for n in np.floor(high - low + 1e-3) + 1)
    if math.prod(size) > min(MAX_VOXELS, 8 * voxels.size):
        raise ScanError("its axes are so far from right angles that it cannot be straightened.")
    straight = np.eye(4)
    straight[:3, :3] = directions * spacing
    straight[:3, 3] = directions @ (low * spacing)
    to_old = np.linalg.inv(affine) @ straight
    resampled = affine_transform(
        voxels, to_old[:3, :3], to_old[:3, 3], size, np.float32, order=1, cval=fill
    )
    return resampled, straight
