"""Every kind of finding, in the order in which a radiologist goes through them."""

from __future__ import annotations

from med3dvlm.data.phantoms import abdomen, chest
from med3dvlm.data.phantoms.anatomy import PHASES, PLANES
from med3dvlm.data.phantoms.finding import Finding

FINDINGS: dict[str, Finding] = {
    kind.name: kind()
    for kind in (
        chest.LungNodule,
        chest.Consolidation,
        chest.LungOpacity,
        chest.Emphysema,
        chest.PleuralEffusion,
        chest.Pneumothorax,
        chest.Lymphadenopathy,
        chest.HiatalHernia,
        chest.Cardiomegaly,
        chest.PericardialEffusion,
        chest.ArterialWallCalcification,
        abdomen.LiverLesion,
        abdomen.Gallstones,
        abdomen.Splenomegaly,
        abdomen.RenalCyst,
        abdomen.Hydronephrosis,
        abdomen.KidneyStone,
        abdomen.Ascites,
    )
}
ORGANS: tuple[str, ...] = tuple(dict.fromkeys(finding.organ for finding in FINDINGS.values()))
LARGE = 0.5  # share of a finding's range of sizes above which it counts as large


def is_large(name: str, size_mm: float) -> bool:
    low, high = FINDINGS[name].sizes or (0, 0)
    return size_mm > low + LARGE * (high - low)


def concept_names() -> tuple[str, ...]:
    """Every yes/no label a study has: findings, their attributes, plane and phase."""
    names = []
    for finding in FINDINGS.values():
        names.append(finding.name)
        for key, values in finding.attributes.items():
            names += [f"{finding.name}/{key}={value}" for value in values]
        if finding.sizes is not None:
            names.append(f"{finding.name}/size=large")
    names += [f"plane={plane}" for plane in PLANES]
    return (*names, *(f"phase={phase}" for phase in PHASES))
