"""Invented patients and scanners: what the header of a file says beside its voxels.

Everything follows from the study's (seed, split, index); twins are scans of the same patient.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import TypeVar

import numpy as np

from med3dvlm.data.phantoms.study import SPLITS, PhantomStudy

Value = TypeVar("Value")

FAMILY_NAMES = (
    "Arkwell", "Brenholt", "Caldervale", "Dunmarrow", "Esterling", "Fjordås", "Grünwaldt",
    "Hollinsby", "Ibarrondo", "Jørnsdal", "Kestrelli", "Łomnicz", "Morvayne", "Núñarte",
    "Ombresse", "Pellingham", "Quistorp", "Šedlarová", "Tarnowic", "Umbridge-Lowe", "Велесов",
    "Yılmazer", "山原",
)  # fmt: skip
GIVEN_NAMES = {
    "F": ("Adela", "Birgit", "Clémence", "Daria", "Ingrid", "Maïté", "Noor", "Zoë"),
    "M": ("Anselm", "Björn", "Cassian", "Dmitri", "Emil", "Joaquín", "Søren", "Tobias"),
}
INSTITUTIONS = ("Phantom General Hospital", "Clínica Fantasma", "Universitätsklinikum Attrappe")


@dataclass(frozen=True)
class Scanner:
    """A scanner with its two kernels."""

    manufacturer: str
    model: str
    soft: str
    sharp: str


SCANNERS = (
    Scanner("SIEMENS", "SOMATOM Definition AS", "B30f", "B60f"),
    Scanner("GE MEDICAL SYSTEMS", "Revolution EVO", "STANDARD", "LUNG"),
    Scanner("Philips", "Ingenuity CT", "B", "YB"),
    Scanner("TOSHIBA", "Aquilion PRIME", "FC08", "FC51"),
)
SOFT_KERNEL = 0.55  # an acquisition's softness above which its kernel is called soft


@dataclass(frozen=True)
class Identity:
    """Who was scanned, when, where and on what. Names are DICOM person names, family first."""

    name: str
    patient_id: str
    sex: str
    birth: date
    when: datetime
    accession: str
    institution: str
    referring: str
    scanner: Scanner
    kernel: str
    kvp: int

    @property
    def age(self) -> str:
        """At the scan, as DICOM has it: 063Y."""
        birthday = (self.when.month, self.when.day) >= (self.birth.month, self.birth.day)
        return f"{self.when.year - self.birth.year - (not birthday):03d}Y"


def make_identity(study: PhantomStudy) -> Identity:
    random = study.stream("identity")
    sex = "FM"[int(random.integers(2))]
    day = datetime(2016, 1, 1) + timedelta(days=int(random.integers(3650)))
    when = day + timedelta(seconds=int(random.integers(7 * 3600, 20 * 3600)))
    birth = day.date() - timedelta(days=int(random.integers(19 * 365, 90 * 365)))
    scanner = _pick(random, SCANNERS)
    soft = study.acquisition.kernel > SOFT_KERNEL
    seed = f"-{study.seed}" if study.seed else ""
    return Identity(
        name=f"{_pick(random, FAMILY_NAMES)}^{_pick(random, GIVEN_NAMES[sex])}",
        patient_id=f"PH{SPLITS.index(study.split)}{study.index:06d}{seed}",
        sex=sex,
        birth=birth,
        when=when,
        accession=f"{when:%y%m%d}{int(random.integers(10**8)):08d}",
        institution=_pick(random, INSTITUTIONS),
        referring=f"{_pick(random, FAMILY_NAMES)}^{_pick(random, GIVEN_NAMES['F'])}^^Dr.",
        scanner=scanner,
        kernel=scanner.soft if soft else scanner.sharp,
        kvp=_pick(random, (100, 120, 120, 140)),
    )


def _pick(random: np.random.Generator, values: tuple[Value, ...]) -> Value:
    return values[int(random.integers(len(values)))]
