"""A scan as the rest of the package sees it: canonical voxels with their geometry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class ScanError(ValueError):
    """A file that cannot be read as a volume: which file, what is wrong and what to do."""


class NotHounsfieldWarning(UserWarning):
    """A window in Hounsfield units was asked of a scan that is not in Hounsfield units."""


@dataclass(frozen=True, eq=False, repr=False)
class Scan:
    """A CT or MR volume whose axes run to the patient's head, back and left (LPS).

    Attributes:
        array: (D, H, W) float32; axis 0 inferior→superior, axis 1 anterior→posterior,
            axis 2 right→left (for an oblique scan, the nearest order of its own axes).
        spacing_mm: distance between voxel centres along (z, y, x), mm.
        affine: 4×4 float64, voxel index (x, y, z, 1) to LPS position in mm.
        modality: DICOM modality ("CT", "MR", …), None where the file does not say.
        units: "HU" for Hounsfield units, None for anything else.
        source: path the scan was read from.
        orientation: "LPS", or "unknown" where the file does not say; the axes are then a guess.
        warnings: what a user of this scan should know, one sentence each.
        meta: facts of the acquisition that do not identify the patient.
    """

    array: np.ndarray
    spacing_mm: tuple[float, float, float]
    affine: np.ndarray
    modality: str | None = None
    units: str | None = None
    source: str = ""
    orientation: str = "LPS"
    warnings: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, W) in voxels."""
        depth, height, width = self.array.shape
        return depth, height, width

    def __repr__(self) -> str:
        size = "×".join(map(str, self.array.shape))
        spacing = "×".join(f"{mm:.4g}" for mm in self.spacing_mm)
        kind = self.modality or "modality unknown"
        units = self.units or "no physical units"
        notes = f", {len(self.warnings)} warnings" if self.warnings else ""
        return (
            f"Scan({size} voxels of {spacing} mm (z, y, x), {kind}, {units}, "
            f"{self.orientation}, {self.source!r}{notes})"
        )
