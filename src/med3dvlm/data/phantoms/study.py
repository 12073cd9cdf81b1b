"""A generated study: truth, voxels, texts; and its twins, equal but for one finding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import ndtri

from med3dvlm.data.assertions import split_sentences
from med3dvlm.data.phantoms.anatomy import PHASES, PLANES, Anatomy, Torso, make_anatomy
from med3dvlm.data.phantoms.finding import PlacedFinding
from med3dvlm.data.phantoms.findings import FINDINGS, concept_names, is_large
from med3dvlm.data.phantoms.language import (
    Question,
    write_caption,
    write_questions,
    write_report,
)
from med3dvlm.scan.scan import Scan

PHANTOM_VERSION = 2
SPLITS = ("train", "validation", "test")
CONCEPTS = concept_names()
MAX_FINDINGS = 6
PREVALENCE = 0.20  # of each kind before crowded studies are thinned and normal ones made
NORMAL_SHARE = 0.06
SHAPE = (64, 128, 128)
DRAWN_HU = 20
TRIES = 12  # to find a free place for a finding
# of the normal distribution, of unit variance
QUANTILES = ndtri((np.arange(256) + 0.5) / 256)
QUANTILES = (QUANTILES / QUANTILES.std()).astype(np.float32)


class PhantomError(ValueError):
    """A phantom that cannot be made, in one sentence."""


@dataclass(frozen=True)
class PhantomTruth:
    """What is known of a study; `findings` are in the order of `FINDINGS`."""

    plane: str
    phase: str
    findings: tuple[PlacedFinding, ...]

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
    """One study; voxels and texts are made when they are first asked for."""

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
        """Distance between voxel centres along (z, y, x), mm."""
        return self.acquisition.spacing_mm

    @property
    def affine(self) -> np.ndarray:
        """(x, y, z, 1) voxel index to LPS mm, the origin in the middle of the volume."""
        affine = np.eye(4)
        for axis in range(3):
            step, count = self.spacing_mm[2 - axis], self.shape[2 - axis]
            affine[axis, axis], affine[axis, 3] = step, -step * (count - 1) / 2
        return affine

    # --- voxels -------------------------------------------------------------------------------

    @cached_property
    def array(self) -> np.ndarray:
        """Whole HU, float32 (D, H, W): z up, y to the back, x to the patient's left (LPS)."""
        return self._scan(self._torso().hu)

    def scan(self) -> Scan:
        """The study as :func:`med3dvlm.read_scan` gives it from its file."""
        return Scan(
            array=self.array,
            spacing_mm=self.spacing_mm,
            affine=self.affine,
            modality="CT",
            units="HU",
            source=self.study_id,
        )

    def mask(self, finding: str, *, drawn: bool = False) -> np.ndarray:
        """The voxels that a finding changes, bool (D, H, W).

        Args:
            drawn: those changed by more than `DRAWN_HU` on the torso, before slices of some
                thickness and whole HU; else those of :attr:`array`, outside which twins are equal.
        """
        if not self.truth.has(finding):
            raise PhantomError(f"study {self.study_id} has no {finding!r}.")
        if drawn:
            return np.abs(self._torso().hu - self._torso(without=finding).hu) > DRAWN_HU
        return self.array != self._scan(self._torso(without=finding).hu)

    def masks(self) -> dict[str, np.ndarray]:
        """By finding, the voxels it changes as drawn; see :meth:`mask`."""
        hu = self._torso().hu
        return {
            p.name: np.abs(hu - self._torso(without=p.name).hu) > DRAWN_HU
            for p in self.truth.findings
        }

    @property
    def anatomy(self) -> Anatomy:
        """The patient, without findings."""
        return _anatomy(self.stream("anatomy"), self.truth.phase)

    def _torso(self, without: str | None = None) -> Torso:
        placed = [p for p in self.truth.findings if p.name != without]
        anatomy = self.anatomy
        for p in placed:
            anatomy = FINDINGS[p.name].change(anatomy, p)
        torso = Torso(self.shape, self.spacing_mm, anatomy)
        for p in placed:
            FINDINGS[p.name].draw(torso, p)
        return torso

    def _scan(self, hu: np.ndarray) -> np.ndarray:
        """Noise of the kernel, thick slices along the axis of acquisition, whole HU; uses up `hu`.

        Noise is raised by what the averaging takes away, so that planes differ in its grain only.
        """
        axis = PLANES.index(self.truth.plane)
        count = max(2, round(self.acquisition.slice_mm / self.spacing_mm[axis]))
        noise = self.stream("noise").bytes(hu.size)
        levels = np.frombuffer(noise, np.uint8).reshape(hu.shape)
        k = np.float32(self.acquisition.kernel)
        table = QUANTILES * np.float32(self.acquisition.noise_hu * count**0.5 / (1 + k * k))
        for section, level in zip(hu, levels, strict=True):
            grain = np.take(table, level, mode="clip")
            grain[1:] += k * grain[:-1]
            grain[:, 1:] += k * grain[:, :-1]
            section += grain
        return average_slices(hu, count, axis)

    # --- texts --------------------------------------------------------------------------------

    @cached_property
    def report(self) -> str:
        """Technique, findings in radiologists' order with negatives, impression."""
        return write_report(self.stream("report"), *self._facts())

    @cached_property
    def caption(self) -> str:
        """One line: plane, phase and what is there."""
        return write_caption(self.stream("caption"), *self._facts())

    @cached_property
    def questions(self) -> list[Question]:
        return write_questions(self.stream("questions"), *self._facts())

    def _facts(self) -> tuple[str, str, tuple[PlacedFinding, ...]]:
        return self.truth.plane, self.truth.phase, self.truth.findings

    @cached_property
    def concepts(self) -> dict[str, bool]:
        """Every yes/no label, in the order of `CONCEPTS`."""
        true = {f"plane={self.truth.plane}", f"phase={self.truth.phase}"}
        for p in self.truth.findings:
            true.add(p.name)
            true |= {f"{p.name}/{key}={value}" for key, value in p.attributes.items()}
            if p.size_mm is not None and is_large(p.name, p.size_mm):
                true.add(f"{p.name}/size=large")
        return {name: name in true for name in CONCEPTS}

    def stream(self, name: str) -> np.random.Generator:
        """Random numbers for one part of the study, of which twins have the same."""
        return _stream(self.seed, self.split, self.index, name)


def average_slices(hu: np.ndarray, count: int, axis: int) -> np.ndarray:
    """The mean of `count` neighbours along an axis, in whole HU, edges repeated: (D, H, W).

    A plain sum of shifts, and not a running sum, so that a voxel depends on its neighbours only:
    twins are equal bit for bit away from what was changed.
    """
    n, before = hu.shape[axis], (count - 1) // 2
    widths = [(before, count - 1 - before) if k == axis else (0, 0) for k in range(3)]
    total = np.empty_like(hu)
    step = len(hu) if axis == 0 else 4  # slices at a time, to stay in the processor's cache
    for start in range(0, len(hu), step):
        padded = np.pad(hu[start : start + step], widths, mode="edge")
        shifts = [
            padded[(slice(None),) * axis + (slice(shift, shift + n),)] for shift in range(count)
        ]
        part = np.add(shifts[0], shifts[1], out=total[start : start + step])
        for shifted in shifts[2:]:
            part += shifted
        part *= np.float32(1 / count)
        np.rint(part, out=part)
        np.clip(part, -1024, 3071, out=part)
    return total


def _stream(seed: int, split: str, index: int, name: str) -> np.random.Generator:
    """Random numbers of their own for each part, so that changing one leaves the others."""
    key = (PHANTOM_VERSION, SPLITS.index(split), index, *name.encode())
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def _anatomy(random: np.random.Generator, phase: str) -> Anatomy:
    return make_anatomy(random, PHASES.index(phase))


def make_study(
    index: int,
    *,
    seed: int = 0,
    split: str = "train",
    shape: tuple[int, int, int] = SHAPE,
    findings: Sequence[str] | None = None,
) -> PhantomStudy:
    """The study that (version, seed, split, index) stands for.

    Args:
        shape: (D, H, W); another grid shows the same patient in other voxels.
        findings: names of the findings to have, instead of those drawn for this index.

    Raises:
        PhantomError: for an unknown split or finding, a negative index or seed, or findings
            that leave one another no place.
    """
    _check(index, seed, split, findings)
    random = _stream(seed, split, index, "truth")
    plane = PLANES[int(random.integers(len(PLANES)))]
    phase = PHASES[int(random.integers(len(PHASES)))]
    drawn = _draw_names(random)
    names = drawn if findings is None else [name for name in FINDINGS if name in findings]
    anatomy = _anatomy(_stream(seed, split, index, "anatomy"), phase)
    placed: list[PlacedFinding] = []
    for name in names:
        found = _place(name, _stream(seed, split, index, f"finding {name}"), anatomy, placed)
        if found is not None:
            placed.append(found)
        elif findings is not None:
            raise PhantomError(f"{name} finds no free place beside {', '.join(names)}.")
    in_plane = random.uniform(2.95, 3.2)
    spacing = (random.uniform(5.7, 6.6), in_plane, in_plane)
    acquisition = Acquisition(
        spacing_mm=tuple(  # type: ignore[assignment]
            float(mm * usual / n) for mm, usual, n in zip(spacing, SHAPE, shape, strict=True)
        ),
        slice_mm=float(random.uniform(17, 21) if plane == "axial" else random.uniform(14, 18)),
        noise_hu=float(random.uniform(9, 17)),
        kernel=float(random.uniform(0.3, 0.8)),
    )
    truth = PhantomTruth(plane, phase, tuple(placed))
    return PhantomStudy(index, seed, split, tuple(shape), truth, acquisition)


def _check(index: int, seed: int, split: str, findings: Sequence[str] | None) -> None:
    if split not in SPLITS:
        raise PhantomError(f"split {split!r} is unknown: use one of {', '.join(SPLITS)}.")
    if index < 0 or seed < 0:
        raise PhantomError(f"index {index} and seed {seed} must not be negative.")
    unknown = [name for name in findings or () if name not in FINDINGS]
    if unknown:
        raise PhantomError(f"finding {unknown[0]!r} is unknown: use {', '.join(FINDINGS)}.")


def _draw_names(random: np.random.Generator) -> list[str]:
    """Which findings a study has: each on its own, at most six, some studies none."""
    there = random.random(len(FINDINGS)) < PREVALENCE
    order = random.permutation(len(FINDINGS))
    if random.random() < NORMAL_SHARE:
        return []
    kept = set([k for k in order if there[k]][:MAX_FINDINGS])
    return [name for k, name in enumerate(FINDINGS) if k in kept]


def _place(
    name: str, random: np.random.Generator, anatomy: Anatomy, others: Sequence[PlacedFinding]
) -> PlacedFinding | None:
    """A finding where no other hides it; None where every place is taken."""
    finding = FINDINGS[name]
    taken = set().union(*(FINDINGS[p.name].places(p) for p in others))
    for _ in range(TRIES):
        placed = finding.sample(random)
        if not finding.places(placed) & taken:
            return _with_centre(placed, anatomy)
    return None


def _with_centre(placed: PlacedFinding, anatomy: Anatomy) -> PlacedFinding:
    z, y, x = FINDINGS[placed.name].centre(anatomy, placed)
    return replace(placed, centre_mm=(float(x), float(y), float(z)))


# --- twins ------------------------------------------------------------------------------------

CHANGES = ("remove", "add", "move", "resize")


def twin(study: PhantomStudy, change: str, finding: str | None = None) -> PhantomStudy:
    """The same study but for one finding; all else is equal voxel for voxel.

    Args:
        change: "remove", "add", "move" (to the other side or another lobe) or "resize".
        finding: which; the first that the change fits, where not given.

    Raises:
        PhantomError: if no finding of the study can be changed so.
    """
    if change not in CHANGES:
        raise PhantomError(f"change {change!r} is unknown: use {', '.join(CHANGES)}.")
    there = {p.name: p for p in study.truth.findings}
    candidates = [n for n in FINDINGS if (n in there) == (change != "add")]
    for name in candidates if finding is None else [finding]:
        if name not in candidates:
            continue
        others = [p for p in study.truth.findings if p.name != name]
        changed = _change(study, change, name, others)
        if changed is None and change != "remove":
            continue
        placed = others if changed is None else [*others, changed]
        placed.sort(key=lambda p: list(FINDINGS).index(p.name))
        label = f"{change}-{name.lower().replace(' ', '-')}"
        truth = replace(study.truth, findings=tuple(placed))
        return replace(study, truth=truth, changed=label)
    raise PhantomError(f"study {study.study_id}: no finding to {change} ({finding or 'any'}).")


def _change(
    study: PhantomStudy, change: str, name: str, others: list[PlacedFinding]
) -> PlacedFinding | None:
    if change == "remove":
        return None
    if change == "add":
        return _place(name, study.stream(f"finding {name}"), study.anatomy, others)
    now = next(p for p in study.truth.findings if p.name == name)
    taken = set().union(*(FINDINGS[p.name].places(p) for p in others))
    for attributes in _moves(now) if change == "move" else _resizes(now):
        changed = _with_centre(replace(now, attributes=attributes), study.anatomy)
        if not FINDINGS[name].places(changed) & taken:
            return changed
    return None


def _moves(placed: PlacedFinding) -> list[dict[str, Any]]:
    """The attributes it has elsewhere: first on the other side."""
    finding = FINDINGS[placed.name]
    key = finding.location
    if key is None:
        return []
    old = placed.attributes[key]
    new = [value for value in finding.attributes[key] if value not in (old, "bilateral")]
    new.sort(key=lambda value: value.split()[0] == old.split()[0])
    return [{**placed.attributes, key: value} for value in new]


def _resizes(placed: PlacedFinding) -> list[dict[str, Any]]:
    """The attributes it has at the other end of its range of sizes."""
    sizes = FINDINGS[placed.name].sizes
    if sizes is None:
        return []
    size = sizes[0] if is_large(placed.name, placed.attributes["size"]) else sizes[1]
    return [{**placed.attributes, "size": size}]


# --- labels and counts ------------------------------------------------------------------------


def concept_vector(study: PhantomStudy) -> np.ndarray:
    """(number of CONCEPTS,) float32, 0 or 1."""
    return np.array(list(study.concepts.values()), dtype=np.float32)


def describe(n: int, *, seed: int = 0, split: str = "train") -> dict[str, Any]:
    """What the first `n` studies hold: prevalences, distinct combinations, texts."""
    kinds, counts = Counter(), Counter()
    combinations, truths, sentences, words, lengths = set(), set(), set(), set(), []
    answers: Counter[str] = Counter()
    for index in range(n):
        study = make_study(index, seed=seed, split=split)
        names = tuple(p.name for p in study.truth.findings)
        kinds.update(names)
        counts[len(names)] += 1
        combinations.add(names)
        details = [(p.name, *sorted(p.attributes.items())) for p in study.truth.findings]
        truths.add((study.truth.plane, study.truth.phase, *details))
        sentences.update(split_sentences(study.report))
        lengths.append(len(study.report.split()))
        words.update(_words(study))
        answers.update(q.answer for q in study.questions if q.kind == "yes_no")
    return {
        "studies": n,
        "prevalence": {name: kinds[name] / n for name in FINDINGS},
        "findings_per_study": dict(sorted(counts.items())),
        "distinct_combinations": len(combinations),
        "distinct_truths": len(truths),
        "distinct_sentences": len(sentences),
        "report_words": {"least": min(lengths), "mean": sum(lengths) / n, "most": max(lengths)},
        "vocabulary": len(words),
        "yes_no": dict(answers),
    }


def _words(study: PhantomStudy) -> set[str]:
    texts = [study.report, study.caption]
    for question in study.questions:
        texts += [question.text, question.answer, *(question.choices or ())]
    return {word.strip(".,:?()").lower() for text in texts for word in text.split()}
