"""Where the real scans are, and how to generate small ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from med3dvlm.scan import Scan

DATA = Path(__file__).parent / "data"


def make_scan(shape=(6, 8, 10), spacing=(2.5, 0.7, 0.8), *, seed=0, modality="CT") -> Scan:
    """A scan of random HU whose every voxel differs from its neighbours."""
    generator = np.random.default_rng(seed)
    array = generator.integers(-1000, 1500, shape).astype(np.float32)
    array[0, 0, 0] = -1000
    affine = np.diag([spacing[2], spacing[1], spacing[0], 1.0])
    affine[:3, 3] = (-12.5, 30.25, -100.0)
    return Scan(array, spacing, affine, modality=modality, units="HU", source="made")
