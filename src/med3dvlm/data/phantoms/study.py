"""A generated study: truth, voxels, texts; and its twins, equal but for one finding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.ndimage import uniform_filter1d

from med3dvlm.data.phantoms.anatomy import PHASES, PLANES, draw_anatomy, make_anatomy
from med3dvlm.data.phantoms.canvas import Canvas
from med3dvlm.data.phantoms.findings import FINDINGS, LOBES, concept_names
from med3dvlm.data.phantoms.language import (
    Placed,
    Question,
    write_caption,
    write_questions,
    write_report,
)
from med3dvlm.scan import Scan

PHANTOM_VERSION = 1
SPLITS = ("train", "validation", "test")
CONCEPTS = concept_names()
MAX_FINDINGS = 6
PREVALENCE = 0.17
NORMAL_SHARE = 0.05
LARGE = 0.5  # share of the size range above which a size counts as large


class PhantomError(ValueError):
    """A phantom that cannot be made, in one sentence."""


@dataclass(frozen=True)
class PhantomTruth:
    """What is known of a study."""

    plane: str
    phase: str
    findings: tuple[Placed, ...]

    def has(self, name: str) -> bool:
        return any(placed.name == name for placed in self.findings)


@dataclass(frozen=True)
class Acquisition:
    """How the torso was scanned: voxels, thickness of slices, noise, softness of the kernel."""

    spacing_mm: tuple[float, float, float]
    slice_mm: float
    noise_hu: float
    kernel: float


@dataclass(frozen=True)
class PhantomStudy:
    """One study; voxels and texts are made when they are first asked for.

    array: HU, float32 (D, H, W), LPS order (z up, y back, x to the patient's left).
    """

    index: int
    seed: int
    split: str
    shape: tuple[int, int, int]
    truth: PhantomTruth
    acquisition: Acquisition
    changed: str = ""

    @property
    def study_id(self) -> str:
        name = f"{self.split}-{self.index:06d}"
        if self.seed:
            name = f"{name}-seed{self.seed}"
        return f"{name}-{self.changed}" if self.changed else name

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        return self.acquisition.spacing_mm

    @property
    def affine(self) -> np.ndarray:
        """(x, y, z, 1) voxel index to LPS mm, the origin in the middle of the volume."""
        affine = np.eye(4)
        for axis in range(3):
            step, count = self.spacing_mm[2 - axis], self.shape[2 - axis]
            affine[axis, axis], affine[axis, 3] = step, -step * (count - 1) / 2
        return affine

    @cached_property
    def array(self) -> np.ndarray:
        scanned = self._blur(self.torso() + self._noise())
        return np.clip(scanned, -1024, 3071, out=scanned)

    def scan(self) -> Scan:
        """The study as :func:`med3dvlm.read_scan` would give it for its file."""
        return Scan(
            array=self.array,
            spacing_mm=self.spacing_mm,
            affine=self.affine,
            modality="CT",
            units="HU",
            source=self.study_id,
        )

    def torso(self, without: str | None = None) -> np.ndarray:
        """The torso before the scanner, HU (D, H, W), optionally without one finding."""
        placed = [p for p in self.truth.findings if p.name != without]
        anatomy = make_anatomy(self._stream("anatomy"), PHASES.index(self.truth.phase))
        for p in placed:
            anatomy = p.finding.change(anatomy, p.attributes)
        canvas = Canvas(self.shape, self.spacing_mm)
        draw_anatomy(canvas, anatomy)
        for p in placed:
            p.finding.draw(canvas, anatomy, p.attributes)
        return canvas.hu

    def mask(self, finding: str) -> np.ndarray:
        """The voxels that a finding changes by more than 5 HU, before the scanner's blur."""
        return np.abs(self.torso() - self.torso(without=finding)) > 5

    def _noise(self) -> np.ndarray:
        """Noise of the stated standard deviation whose in-plane neighbours are correlated."""
        noise = self._stream("noise").standard_normal(self.shape, dtype=np.float32)
        k = np.float32(self.acquisition.kernel)
        noise[:, 1:] += k * noise[:, :-1]
        noise[:, :, 1:] += k * noise[:, :, :-1]
        noise *= self.acquisition.noise_hu / (1 + k * k)
        return noise

    def _blur(self, hu: np.ndarray) -> np.ndarray:
        """Thick slices: a moving average along the axis of acquisition."""
        axis = PLANES.index(self.truth.plane)
        voxels = max(2, round(self.acquisition.slice_mm / self.spacing_mm[axis]))
        return uniform_filter1d(hu, voxels, axis=axis, mode="nearest")

    @cached_property
    def report(self) -> str:
        return write_report(self._stream("report"), *self._facts())

    @cached_property
    def caption(self) -> str:
        return write_caption(self._stream("caption"), *self._facts())

    @cached_property
    def questions(self) -> list[Question]:
        return write_questions(self._stream("questions"), *self._facts())

    def _facts(self) -> tuple[str, str, tuple[Placed, ...]]:
        return self.truth.plane, self.truth.phase, self.truth.findings

    @property
    def concepts(self) -> dict[str, bool]:
        """Every yes/no label: findings, their attributes, plane and phase."""
        true = {f"plane={self.truth.plane}", f"phase={self.truth.phase}"}
        for p in self.truth.findings:
            true.add(p.name)
            true |= {f"{p.name}/{k}={v}" for k, v in p.attributes.items() if k not in ("u", "size")}
            if p.finding.sizes is not None:
                low, high = p.finding.sizes
                if p.attributes["size"] > low + LARGE * (high - low):
                    true.add(f"{p.name}/size=large")
        return {name: name in true for name in CONCEPTS}

    def _stream(self, name: str) -> np.random.Generator:
        return _stream(self.seed, self.split, self.index, name)


def _stream(seed: int, split: str, index: int, name: str) -> np.random.Generator:
    """Random numbers of their own for each part, so that changing one leaves the others."""
    key = (PHANTOM_VERSION, SPLITS.index(split), index, *name.encode())
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def make_study(
    index: int,
    *,
    seed: int = 0,
    split: str = "train",
    shape: tuple[int, int, int] = (64, 128, 128),
) -> PhantomStudy:
    """The study that (version, seed, split, index) stands for.

    Raises:
        PhantomError: for an unknown split or a negative index.
    """
    if split not in SPLITS:
        raise PhantomError(f"split {split!r} is unknown: use one of {', '.join(SPLITS)}.")
    if index < 0:
        raise PhantomError(f"index {index} is negative: count from 0.")
    random = _stream(seed, split, index, "truth")
    plane, phase = str(random.choice(PLANES)), str(random.choice(PHASES))
    present = random.random(len(FINDINGS)) < PREVALENCE
    if random.random() < NORMAL_SHARE:
        present[:] = False
    names = [name for name, there in zip(FINDINGS, present, strict=True) if there]
    if len(names) > MAX_FINDINGS:
        kept = set(random.choice(names, MAX_FINDINGS, replace=False))
        names = [name for name in names if name in kept]
    placed = [_place(name, seed, split, index) for name in names]
    scale = 64 / shape[0], 128 / shape[1], 128 / shape[2]
    spacing = (random.uniform(5.8, 6.6), *[random.uniform(2.9, 3.2)] * 2)
    acquisition = Acquisition(
        spacing_mm=(spacing[0] * scale[0], spacing[1] * scale[1], spacing[2] * scale[2]),
        slice_mm=float(random.uniform(18, 24) if plane == "axial" else random.uniform(14, 18)),
        noise_hu=float(random.uniform(18, 34)),
        kernel=float(random.uniform(0.4, 0.8)),
    )
    truth = PhantomTruth(plane, phase, _settle(placed))
    return PhantomStudy(index, seed, split, shape, truth, acquisition)


def _place(name: str, seed: int, split: str, index: int) -> Placed:
    return Placed(name, FINDINGS[name].sample(_stream(seed, split, index, f"finding {name}")))


def _settle(placed: list[Placed]) -> tuple[Placed, ...]:
    """Move what would hide behind something else, so that every finding can be seen."""
    there = {p.name: p for p in placed}
    effusion, consolidation = there.get("Pleural effusion"), there.get("Consolidation")
    taken = set()
    if effusion is not None and effusion.attributes["degree"] != "small":
        side = effusion.attributes["side"]
        taken |= {
            lobe for lobe in LOBES if "lower" in lobe and side in ("bilateral", lobe.split()[0])
        }
    if consolidation is not None:
        there["Consolidation"] = _elsewhere(consolidation, taken)
        taken |= {there["Consolidation"].attributes["lobe"]}
    if "Lung nodule" in there:
        there["Lung nodule"] = _elsewhere(there["Lung nodule"], taken)
    return tuple(there[p.name] for p in placed)


def _elsewhere(placed: Placed, taken: set[str]) -> Placed:
    lobe = placed.attributes["lobe"]
    if lobe not in taken:
        return placed
    free = [other for other in LOBES if other not in taken]
    chosen = free[int(placed.attributes["u"][3] * len(free))]
    return replace(placed, attributes={**placed.attributes, "lobe": chosen})


def twin(study: PhantomStudy, change: str, finding: str | None = None) -> PhantomStudy:
    """The same study but for one finding; all else is equal voxel for voxel.

    Args:
        change: "remove", "add", "move" (to another side or lobe) or "resize".
        finding: which; the first that the change fits, where not given.

    Raises:
        PhantomError: if no finding of the study can be changed so.
    """
    there = {p.name: p for p in study.truth.findings}
    if change == "add":
        fitting = [name for name in FINDINGS if name not in there]
    elif change == "remove":
        fitting = list(there)
    elif change == "move":
        fitting = [n for n, p in there.items() if {"side", "lobe"} & set(p.attributes)]
    elif change == "resize":
        fitting = [n for n, p in there.items() if p.size_mm is not None]
    else:
        raise PhantomError(f"change {change!r} is unknown: use remove, add, move or resize.")
    name = finding or next(iter(fitting), None)
    if name is None or name not in fitting:
        raise PhantomError(f"study {study.study_id}: no finding to {change} ({finding or 'any'}).")
    if change == "add":
        placed = [*there.values(), _place(name, study.seed, study.split, study.index)]
        order = list(FINDINGS)
        placed.sort(key=lambda p: order.index(p.name))
    elif change == "remove":
        placed = [p for p in there.values() if p.name != name]
    else:
        changed = _moved(there[name]) if change == "move" else _resized(there[name])
        placed = [changed if p.name == name else p for p in there.values()]
    truth = replace(study.truth, findings=tuple(placed))
    label = f"{change}-{name.lower().replace(' ', '-')}"
    return replace(study, truth=truth, changed=label)


def _moved(placed: Placed) -> Placed:
    key = "side" if "side" in placed.attributes else "lobe"
    values = placed.finding.attributes[key]
    old = placed.attributes[key]
    if old in ("right", "left"):
        new = "left" if old == "right" else "right"
    else:
        new = values[(values.index(old) + 1) % len(values)]
    return replace(placed, attributes={**placed.attributes, key: new})


def _resized(placed: Placed) -> Placed:
    low, high = placed.finding.sizes or (0, 0)
    size = high if placed.attributes["size"] < (low + high) / 2 else low
    return replace(placed, attributes={**placed.attributes, "size": size})


def concept_vector(study: PhantomStudy) -> np.ndarray:
    """(number of CONCEPTS,) float32, 0 or 1."""
    return np.array(list(study.concepts.values()), dtype=np.float32)
