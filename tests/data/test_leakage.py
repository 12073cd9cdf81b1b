"""Studies that cross splits are found, and others are left alone; all on phantoms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import zoom

from med3dvlm.data.leakage import (
    THRESHOLD,
    Crossing,
    find_crossings,
    find_near_duplicates,
    fingerprint,
    leaking,
)
from med3dvlm.data.phantoms import PhantomStudy, make_study, twin
from med3dvlm.scan import PRESETS, Scan, prepare

DEMO = PRESETS["demo"]
WIDE = replace(DEMO, window=((-1000.0, 0.0), (1000.0, 1.0)))
STRETCHED = replace(DEMO, size=(40, 80, 80), spacing_mm=None, fit="stretch", intensity="minmax")
COUNT, TRAINING = 200, 160


def study(index: int, split: str = "train") -> PhantomStudy:
    return make_study(index, split=split, shape=(48, 96, 96))  # fewer voxels than usual: faster


def resampled(scan: Scan, factors: tuple[float, float, float]) -> Scan:
    array = zoom(scan.array, factors, order=1, grid_mode=True, mode="nearest")
    spacing = [
        mm * n / m for mm, n, m in zip(scan.spacing_mm, scan.array.shape, array.shape, strict=True)
    ]
    return replace(scan, array=array, spacing_mm=tuple(spacing))


def narrower(scan: Scan) -> Scan:
    """About 3% less to see on each side."""
    return replace(scan, array=scan.array[2:-2, 4:-4, 4:-4].copy())


def seen(scan: Scan, preparation=DEMO) -> np.ndarray:
    return prepare(scan, preparation)[0]


def noisy(volume: np.ndarray, amount: float = 0.03) -> np.ndarray:
    noise = np.random.default_rng(1).standard_normal(volume.shape, np.float32)
    return np.clip(volume + amount * noise, 0, 1)


COPIES = {
    "as it is": lambda s: seen(s),
    "as it is, again": lambda s: seen(s),
    "finer": lambda s: seen(resampled(s, (1.3, 1.2, 1.2))),
    "coarser": lambda s: seen(resampled(s, (0.7, 0.8, 0.8))),
    "other grid": lambda s: seen(s, STRETCHED),
    "narrower": lambda s: seen(narrower(s)),
    "wide window": lambda s: seen(s, WIDE),
    "brighter": lambda s: seen(s) ** 0.6,
    "darker": lambda s: seen(s) ** 1.6,
    "upside down": lambda s: seen(s)[::-1],
    "front to back": lambda s: seen(s)[:, ::-1],
    "left to right": lambda s: seen(s)[:, :, ::-1],
    "noise": lambda s: noisy(seen(s)),
    "much noise": lambda s: noisy(seen(s), 0.06),
    "coarser, left to right": lambda s: seen(resampled(s, (0.7, 0.8, 0.8)))[:, :, ::-1],
    "finer, wide window": lambda s: seen(resampled(s, (1.3, 1.2, 1.2)), WIDE),
    "wide window, noise": lambda s: noisy(seen(s, WIDE)),
    "upside down, brighter": lambda s: seen(s)[::-1] ** 0.6,
    "narrower, noise": lambda s: noisy(seen(narrower(s))),
    "other grid, front to back": lambda s: seen(s, STRETCHED)[:, ::-1],
}


@pytest.fixture(scope="module")
def phantoms() -> np.ndarray:
    """Fingerprints of 200 distinct studies; the last 40 are held out."""
    return np.stack(
        [
            fingerprint(seen(study(k, "train" if k < TRAINING else "test").scan()))
            for k in range(COUNT)
        ]
    )


@pytest.fixture(scope="module")
def planted(phantoms):
    """20 copies of training studies, 10 in validation and 10 in test: arguments, expected pairs."""
    copies, hashes = [], [f"volume {k}" for k in range(COUNT)]
    for k, (name, copy) in enumerate(COPIES.items()):
        copies.append(fingerprint(copy(study(7 * k).scan())))
        hashes.append(f"volume {7 * k}" if name.startswith("as it is") else name)
    ids = [f"study {k}" for k in range(COUNT)] + list(COPIES)
    splits = [("train",)] * TRAINING + [("test", "test1k")] * (COUNT - TRAINING)
    splits += [("validation",), ("test",)] * (len(COPIES) // 2)
    arguments = (ids, splits, [None] * len(ids), hashes, np.concatenate([phantoms, copies]))
    return arguments, {(f"study {7 * k}", name) for k, name in enumerate(COPIES)}


def test_planted_copies_are_found_and_nothing_else(planted):
    arguments, expected = planted
    crossings = find_crossings(*arguments)
    found = {(c.first, c.second): c for c in crossings}
    identical = {pair for pair, crossing in found.items() if crossing.kind == "identical"}
    assert identical == {("study 0", "as it is"), ("study 7", "as it is, again")}
    near = expected - identical
    missed = near - set(found)
    assert len(missed) <= 0.1 * len(near), missed
    false = {name for pair in set(found) - expected for name in pair}
    assert len(false) <= 0.01 * (COUNT - len(COPIES)), false
    # of each pair the copy is held out, so it is what must not be evaluated
    assert leaking(crossings) >= {copy for _, copy in expected - missed}


def test_without_copies_no_study_is_flagged(phantoms):
    assert find_near_duplicates(phantoms) == []


@pytest.mark.parametrize("count", [2, 5, 20])
def test_small_sets_are_compared_too(planted, count):
    *_, fingerprints = planted[0]
    copies = fingerprints[COUNT:][[6, 10]]  # wide window, front to back
    some = np.concatenate([fingerprints[[42, 70]], fingerprints[COUNT - count : COUNT], copies])
    found = {(i, j) for i, j, _ in find_near_duplicates(some)}
    assert found == {(0, count + 2), (1, count + 3)}


def test_twins_are_near(phantoms):
    for change in ("add", "remove"):
        volume = seen(twin(study(3), change).scan())
        pairs = find_near_duplicates(np.concatenate([phantoms, [fingerprint(volume)]]))
        assert [pair[:2] for pair in pairs] == [(3, COUNT)]


def test_only_different_groups_are_compared(phantoms):
    some = np.concatenate([phantoms[:30], phantoms[:2], phantoms[:1]])
    every = [pair[:2] for pair in find_near_duplicates(some)]
    assert every == [(0, 30), (0, 32), (1, 31), (30, 32)]
    groups = [1] * 30 + [1, 4, 1 | 4]
    assert [p[:2] for p in find_near_duplicates(some, groups=groups)] == [
        (0, 32),
        (1, 31),
        (30, 32),
    ]


def test_blocks_change_nothing(phantoms, monkeypatch):
    some = np.concatenate([phantoms[:60], phantoms[:60, ::-1]])
    before = find_near_duplicates(some, threshold=0.3)
    assert len(before) >= 60
    monkeypatch.setattr("med3dvlm.data.leakage.ROWS", 7)
    monkeypatch.setattr("med3dvlm.data.leakage.COLUMNS", 16)
    after = find_near_duplicates(some, threshold=0.3)
    assert [pair[:2] for pair in after] == [pair[:2] for pair in before]


def crossings_of(splits, cases, hashes, phantoms):
    ids = [f"s{k}" for k in range(len(splits))]
    return find_crossings(ids, splits, cases, hashes, phantoms[: len(splits)])


def test_kinds_and_sides(phantoms):
    found = crossings_of(
        [("train",), ("test", "test1k"), ("test1k",), ("valid",), ("train_extra",), ("test",)],
        ["a", "a", "a", "b", "", None],
        ["x", "y", "z", "y", "x", "x"],
        phantoms,
    )
    kinds = [(c.first, c.second, c.first_split, c.second_split, c.kind) for c in found]
    assert kinds == [
        ("s0", "s1", "train", "test", "case"),
        ("s0", "s2", "train", "test1k", "case"),
        ("s0", "s5", "train", "test", "identical"),
        ("s3", "s1", "valid", "test", "identical"),
        ("s4", "s5", "train_extra", "test", "identical"),
    ]
    assert all(c.similarity < THRESHOLD for c in found if c.kind == "case")
    assert leaking(found) == {"s1", "s2", "s5"}


def test_content_is_stronger_than_case(phantoms):
    (crossing,) = crossings_of([("val",), ("train",)], ["a", "a"], ["x", "x"], phantoms)
    assert crossing == Crossing("s1", "s0", "train", "val", "identical", 1.0)
    assert leaking([crossing]) == {"s0"}


def test_a_study_on_two_sides_crosses_itself(phantoms):
    (crossing,) = crossings_of([("train", "test"), ()], [None] * 2, ["x", "x"], phantoms)
    assert crossing == Crossing("s0", "s0", "train", "test", "identical", 1.0)


def test_fingerprints_are_small_and_turn_with_the_volume():
    volume = seen(study(0).scan())
    print_ = fingerprint(volume)
    assert (print_.dtype, print_.nbytes) == (np.uint8, 1728)
    turned = fingerprint(volume[:, ::-1]).astype(int)
    assert abs(turned[:, ::-1] - print_).max() <= 2


def test_nothing_to_see_is_no_error():
    empty = fingerprint(np.zeros((8, 9, 10), np.float32))
    assert find_near_duplicates(np.stack([empty])) == []
    assert find_near_duplicates(np.empty((0, 12, 12, 12), np.uint8)) == []


def test_wrong_input_is_refused(phantoms):
    with pytest.raises(ValueError, match="of a volume"):
        fingerprint(np.zeros((1, 8, 8, 8)))
    with pytest.raises(ValueError, match="not numbers"):
        fingerprint(np.full((8, 8, 8), np.nan))
    with pytest.raises(ValueError, match="shape"):
        find_near_duplicates(np.zeros((3, 100)))
    with pytest.raises(ValueError, match="groups"):
        find_near_duplicates(phantoms[:3], groups=[1, 2])
    with pytest.raises(ValueError, match="3 ids and 2 cases"):
        find_crossings(["a", "b", "c"], [()] * 3, ["x", "y"], ["", "", ""], phantoms[:3])
