"""What a finding is: how it is sampled, drawn, said, recognised in text and asked about.

A finding is one subclass of :class:`Finding` in the file of its body region, named in
`findings.FINDINGS`. Its wordings are templates over its attributes, so that none needs code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from med3dvlm.data.phantoms.anatomy import Anatomy, Torso
from med3dvlm.data.phantoms.canvas import Triple

SIZE_STEP_MM = 2
# By lobe: side; place from the middle of the lung, in lung heights up and half depths back.
LOBES: dict[str, tuple[str, float, float]] = {
    "right upper lobe": ("right", 0.26, -0.12),
    "right middle lobe": ("right", -0.14, -0.50),
    "right lower lobe": ("right", -0.22, 0.42),
    "left upper lobe": ("left", 0.24, -0.22),
    "left lower lobe": ("left", -0.22, 0.42),
}


@dataclass(frozen=True)
class PlacedFinding:
    """A finding of one study.

    Attributes:
        name: which of `FINDINGS`.
        attributes: side, lobe, degree and size (mm), as far as the finding has them.
        u: four numbers in 0..1 that say where in its organ it lies.
        centre_mm: LPS position (x, y, z) of its middle, or of its largest part.
    """

    name: str
    attributes: dict[str, Any]
    u: tuple[float, ...] = (0.5, 0.5, 0.5, 0.5)
    centre_mm: Triple = (0.0, 0.0, 0.0)

    @property
    def size_mm(self) -> float | None:
        return self.attributes.get("size")

    def say(self, template: str) -> str:
        """Fill a template; a capitalised key gives a capitalised value."""
        values = {k: str(v) for k, v in self.attributes.items()}
        values |= {k.capitalize(): v.capitalize() for k, v in values.items()}
        return template.format(**values)


class Finding(ABC):
    """One kind of finding.

    Class attributes:
        name: as CT-RATE calls it, where it does.
        organ: what is affected, for questions.
        asked: the name as a question has it, with its article; plural: whether it is many.
        attributes: the values that each discrete attribute can have.
        sizes: smallest and largest size in mm; None where no size is stated.
        present, absent: sentences of the findings section; impression: phrases.
        terms: a pattern by which a sentence about this finding is recognised.
    """

    name: ClassVar[str]
    organ: ClassVar[str]
    asked: ClassVar[str]
    plural: ClassVar[bool] = False
    attributes: ClassVar[dict[str, tuple[str, ...]]] = {}
    sizes: ClassVar[tuple[int, int] | None] = None
    present: ClassVar[tuple[str, ...]]
    absent: ClassVar[tuple[str, ...]]
    impression: ClassVar[tuple[str, ...]]
    terms: ClassVar[str]

    def sample(self, random: np.random.Generator) -> PlacedFinding:
        """Draw the attributes; a size is a whole number of steps."""
        drawn: dict[str, Any] = {
            key: values[int(random.integers(len(values)))]
            for key, values in self.attributes.items()
        }
        if self.sizes is not None:
            low, high = (size // SIZE_STEP_MM for size in self.sizes)
            drawn["size"] = int(random.integers(low, high + 1)) * SIZE_STEP_MM
        return PlacedFinding(self.name, drawn, tuple(float(u) for u in random.random(4)))

    def places(self, placed: PlacedFinding) -> set[str]:
        """The places it fills, so that no other finding is drawn where it would be hidden."""
        return set()

    def change(self, anatomy: Anatomy, placed: PlacedFinding) -> Anatomy:
        """What it does to the patient before that patient is drawn."""
        return anatomy

    @abstractmethod
    def centre(self, anatomy: Anatomy, placed: PlacedFinding) -> Triple:
        """Where its middle, or its largest part, lies: (z, y, x) mm. Every kind says its own."""

    def draw(self, torso: Torso, placed: PlacedFinding) -> None:  # noqa: B027 - some only change
        """What it adds to the drawn patient."""

    @property
    def noun(self) -> str:
        """The name inside a sentence, without an article."""
        return self.name[0].lower() + self.name[1:]

    @property
    def location(self) -> str | None:
        """The attribute that says where it is, if it has one."""
        return next((key for key in ("side", "lobe") if key in self.attributes), None)


def both(side: str) -> tuple[str, ...]:
    """The sides that a side stands for."""
    return ("right", "left") if side == "bilateral" else (side,)


def lobes_of(side: str) -> set[str]:
    return {lobe for lobe, (of, _, _) in LOBES.items() if of in both(side)}


def aerated(hu: np.ndarray) -> np.ndarray:
    """How much of each voxel is lung that holds air, 0 to 1."""
    return np.clip((-150 - hu) / 150, 0, 1)
