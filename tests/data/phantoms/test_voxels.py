"""The voxels: reproducible, in HU, and every finding is where and as large as the truth says."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from med3dvlm.data.phantoms import (
    FINDINGS,
    PHASES,
    PLANES,
    SPLITS,
    PhantomError,
    PhantomStudy,
    PhantomTruth,
    make_study,
    twin,
)
from med3dvlm.data.phantoms.study import average_slices

SMALL = (16, 32, 32)
SIDED = [name for name, f in FINDINGS.items() if f.location == "side"]
SIZED = [name for name, f in FINDINGS.items() if f.sizes is not None]
# Least mean change over a finding's drawn voxels in any phase, HU.
LEAST_HU = {"Hydronephrosis": 12, "Renal cyst": 20, "Liver lesion": 30, "Hiatal hernia": 40}

ENLARGED = ("Cardiomegaly", "Splenomegaly")  # change at their rim, far from their middle


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def index_of(study: PhantomStudy, point_zyx: tuple[float, float, float]) -> tuple[int, ...]:
    return tuple(
        round(mm / step + (n - 1) / 2)
        for mm, step, n in zip(point_zyx, study.spacing_mm, study.shape, strict=True)
    )


def mean_at(study: PhantomStudy, point_zyx: tuple[float, float, float]) -> float:
    z, y, x = index_of(study, point_zyx)
    return float(study.array[z - 1 : z + 2, y - 2 : y + 3, x - 2 : x + 3].mean())


def with_phase(study: PhantomStudy, phase: str) -> PhantomStudy:
    return replace(study, truth=PhantomTruth(study.truth.plane, phase, ()))


def test_same_in_another_process():
    code = (
        "import hashlib; from med3dvlm.data.phantoms import make_study;"
        "s = make_study(5, split='test');"
        "print(hashlib.sha256(s.array.tobytes()).hexdigest(), s.report, s.caption)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    study = make_study(5, split="test")
    assert out.stdout.strip() == f"{digest(study.array)} {study.report} {study.caption}"


def test_splits_and_seeds_share_no_study():
    made = [
        digest(make_study(index, split=split, seed=seed, shape=SMALL).array)
        for split in SPLITS
        for seed in (0, 1)
        for index in range(20)
    ]
    assert len(set(made)) == len(made)
    ids = {make_study(3, split=split, seed=seed).study_id for split in SPLITS for seed in (0, 1)}
    assert len(ids) == 6


def test_array_is_whole_hu_with_its_geometry():
    study = make_study(0)
    assert study.array.shape == (64, 128, 128)
    assert study.array.dtype == np.float32
    assert np.array_equal(study.array, np.rint(study.array))
    assert study.array.min() >= -1024
    assert study.array.max() <= 3071
    assert np.allclose(np.diag(study.affine)[:3], study.spacing_mm[::-1])
    assert 5 <= study.spacing_mm[0] <= 7
    assert 2.8 <= study.spacing_mm[1] <= 3.3
    assert study.scan().units == "HU"


@pytest.mark.parametrize("phase", PHASES)
def test_tissues_have_the_hu_of_their_phase(phase):
    study = with_phase(make_study(1, findings=[]), phase)
    anatomy = study.anatomy
    liver = mean_at(study, (anatomy.liver[0] - 8, -25, anatomy.liver[2] - 20))
    assert liver == pytest.approx(anatomy.hu("liver"), abs=12)
    y, x = anatomy.aorta
    aorta = mean_at(study, (anatomy.dome + 70, y, x))
    assert aorta == pytest.approx(anatomy.hu("aorta"), rel=0.35, abs=12)
    lung = mean_at(study, (anatomy.dome + 95, 10, 0.66 * anatomy.half_width))
    assert -870 < lung < -700
    assert study.array[:, :3, :3].mean() == pytest.approx(-1000, abs=10)


def test_phases_are_told_apart_by_aorta_and_kidney():
    study = make_study(2, findings=[])
    anatomy = study.anatomy
    y, x = anatomy.aorta
    aorta = {p: mean_at(with_phase(study, p), (anatomy.dome + 70, y, x)) for p in PHASES}
    assert aorta["arterial"] > aorta["portal venous"] + 60
    assert aorta["portal venous"] > aorta["delayed"] + 15
    assert aorta["delayed"] > aorta["non-contrast"] + 30
    z, y, x = anatomy.kidney("left")
    pelvis = {p: mean_at(with_phase(study, p), (z, y, x - 9)) for p in PHASES}
    assert pelvis["delayed"] > max(pelvis[p] for p in PHASES[:3]) + 40


@pytest.mark.parametrize("name", FINDINGS)
def test_every_finding_is_visible_at_its_place_in_every_phase(name):
    for number, phase in enumerate(PHASES):
        study = make_study(10 + number, findings=[name])
        study = replace(study, truth=replace(study.truth, phase=phase))
        mask = study.mask(name, drawn=True)
        without = twin(study, "remove", name)
        change = np.abs(study.array - without.array)[mask].mean()
        assert change > LEAST_HU.get(name, 50), (phase, change)
        volume_ml = mask.sum() * np.prod(study.spacing_mm) / 1000
        assert volume_ml > 0.9
        middle = np.array(study.truth.findings[0].centre_mm[::-1])
        points = (np.argwhere(mask) - (np.array(study.shape) - 1) / 2) * study.spacing_mm
        reach = 60 if name in ENLARGED else 20
        assert np.linalg.norm(points - middle, axis=1).min() < reach


@pytest.mark.parametrize("name", SIZED)
def test_size_in_the_voxels_is_the_size_stated(name):
    for index in range(4):
        study = make_study(index, findings=[name])
        mask = study.mask(name, drawn=True)
        if name == "Lymphadenopathy":  # the largest of four nodes, in front of the aorta
            anatomy = study.anatomy
            z, y, x = FINDINGS[name].centre(anatomy, study.truth.findings[0])
            d, h, w = index_of(study, (z, y, x))
            # other nodes lie behind it
            mask = mask[:, : index_of(study, (z, -20, x))[1]]
            assert mask[d, h, w]
        size = study.truth.findings[0].size_mm
        if name == "Hiatal hernia":
            size *= 0.75 ** (1 / 3)  # flat from front to back
        diameter = (6 / np.pi * mask.sum() * np.prod(study.spacing_mm)) ** (1 / 3)
        assert diameter == pytest.approx(size, rel=0.25), index


@pytest.mark.parametrize("name", SIDED)
def test_left_is_at_high_x(name):
    for index in range(6):
        study = make_study(index, findings=[name])
        side = study.truth.findings[0].attributes["side"]
        x = np.argwhere(study.mask(name))[:, 2]
        middle = study.shape[2] / 2
        assert (x > middle).any() == (side in ("left", "bilateral"))
        assert (x < middle).any() == (side in ("right", "bilateral"))


@pytest.mark.parametrize("change", ["remove", "add", "move", "resize"])
def test_twins_are_equal_outside_the_finding(change):
    compared = 0
    for index in range(30):
        study = make_study(index, split="validation")
        try:
            other = twin(study, change)
        except PhantomError:
            continue
        before = {p.name: p for p in study.truth.findings}
        after = {p.name: p for p in other.truth.findings}
        names = [n for n in FINDINGS if before.get(n) != after.get(n)]
        assert len(names) == 1
        mask = np.zeros(study.shape, bool)
        for one in (study, other):
            if one.truth.has(names[0]):
                mask |= one.mask(names[0])
        differs = study.array != other.array
        assert differs.any()
        assert not (differs & ~mask).any()
        assert other.study_id != study.study_id
        compared += 1
        if compared == 6:
            return
    pytest.fail(f"only {compared} studies could {change}")


def test_a_moved_finding_is_on_the_other_side():
    study = make_study(0, findings=["Kidney stone"])
    sides = [s.truth.findings[0].attributes["side"] for s in (study, twin(study, "move"))]
    assert sorted(sides) == ["left", "right"]


def test_removing_what_was_added_gives_the_study_back():
    study = make_study(3, split="test")
    added = twin(study, "add")
    new = {p.name for p in added.truth.findings} - {p.name for p in study.truth.findings}
    assert np.array_equal(twin(added, "remove", new.pop()).array, study.array)


def test_each_plane_is_averaged_along_its_own_axis():
    for axis, plane in enumerate(PLANES):
        study = make_study(1, findings=[])
        study = replace(study, truth=replace(study.truth, plane=plane))
        grain = study.array[:, :8, :].astype(float)  # air before the patient: noise only
        likeness = []
        for k in range(3):
            shifted = np.roll(grain, 2, axis=k)
            likeness.append(np.corrcoef(grain.ravel(), shifted.ravel())[0, 1])
        assert int(np.argmax(likeness)) == axis


def test_averaging_is_a_plain_mean():
    ramp = np.arange(20, dtype=np.float32)[None, :, None] * 10 * np.ones((6, 1, 5), np.float32)
    assert np.array_equal(average_slices(ramp.copy(), 3, 1)[:, 1:-1], ramp[:, 1:-1])
    assert np.array_equal(average_slices(ramp.copy(), 4, 0), ramp)


def test_a_study_takes_well_under_a_second():
    make_study(0).array  # noqa: B018
    start = time.process_time()
    for index in range(1, 6):
        make_study(index).array  # noqa: B018
    assert (time.process_time() - start) / 5 < 0.3


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"split": "training"}, "validation"),
        ({"index": -1}, "negative"),
        ({"findings": ["Gout"]}, "Gout"),
    ],
)
def test_what_cannot_be_made_says_why(arguments, word):
    with pytest.raises(PhantomError, match=word):
        make_study(**{"index": 0, **arguments})


def test_twin_that_cannot_be_made_says_why():
    with pytest.raises(PhantomError, match="no finding to remove"):
        twin(make_study(0, findings=[]), "remove")
    with pytest.raises(PhantomError, match="unknown"):
        twin(make_study(0), "paint")
