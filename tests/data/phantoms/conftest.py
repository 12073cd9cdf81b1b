from __future__ import annotations

import pytest

from med3dvlm.data.phantoms import PhantomStudy, make_study


@pytest.fixture(scope="session")
def studies() -> list[PhantomStudy]:
    """Three hundred studies whose texts are read; voxels are made only where asked for."""
    return [make_study(index, split="test") for index in range(300)]
