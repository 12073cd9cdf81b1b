"""Studies that cross splits: same case, identical volumes, near-identical volumes.

A fingerprint is a small picture of the body: cut to the body's box, averaged to 12×12×12 cells,
each cell replaced by its rank. The box takes out shifts and fields of view, the averages noise and
voxel sizes, the ranks windows and scales. To compare, fingerprints are whitened within their set:
what all studies share (the anatomy of a torso) is taken out and what tells patients apart stays.

A flip changes but the sign of the odd cosine terms of a picture along its axis. Terms are kept in
eight parts by their parity along (z, y, x); the products of two fingerprints, part by part, then
give the similarity under all eight flips by sums and differences, for the price of one.

Often missed: quarter turns, a window without lungs, a body cut shorter by more than some percent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from typing import Any, Literal

import numpy as np
from scipy import ndimage
from scipy.fft import dctn
from scipy.stats import rankdata

IN_PLANE = np.zeros((3, 3, 3), bool)
IN_PLANE[1, 1, :] = IN_PLANE[1, :, 1] = True  # neighbours in the same slice
GRID = 12  # cells of a fingerprint along each axis
BODY_GRID = 32  # cells along each axis in which the body's box is looked for
BODY_LEVEL = 0.12  # of the range from air to bone: between air and fat for every usual window
BODY_TAIL = 0.07  # share of the body outside its box on each side; noise and arms move it little
FINEST = 12  # cosine terms above this frequency (half waves, length of (z, y, x)) are left out
PRIOR_STUDIES = 30  # how many studies the prior spectrum weighs
RIDGE = 0.05  # of the mean variance: no direction is blown up more than this allows
FITTED = 20_000  # studies from which the whitening is learnt
ROWS, COLUMNS = 512, 1024  # studies compared at a time
THRESHOLD = 0.65  # measured on phantoms: strangers reach 0.56 among 200 of them, 0.67 among 2,500

Kind = Literal["identical", "case", "near"]


@dataclass(frozen=True)
class Crossing:
    """Two studies, or one study twice, on two sides of the splits.

    Attributes:
        first, second: ids; the second is on the side that is more held out (train, validation,
            test).
        first_split, second_split: the names of the splits in which they meet.
        kind: why they are taken for the same, the strongest reason: "identical" (content),
            "case", or "near" (fingerprints).
        similarity: of the fingerprints, -1 to 1; 1 for identical ones.
    """

    first: str
    second: str
    first_split: str
    second_split: str
    kind: Kind
    similarity: float


# --- fingerprints -----------------------------------------------------------------------------


def fingerprint(volume: np.ndarray) -> np.ndarray:
    """What a volume shows, in 1728 bytes, whatever its grid, window and noise.

    Args:
        volume: prepared, (D, H, W), any size; air darker than tissue.

    Returns:
        (12, 12, 12) uint8, the ranks of the cells.

    Raises:
        ValueError: if the volume has not three axes, or a value is not a number.
    """
    volume = np.asarray(volume, np.float32)
    if volume.ndim != 3 or not volume.size:
        raise ValueError(f"a fingerprint is of a volume (D, H, W), not of shape {volume.shape}.")
    cells = _average(volume, [(0.0, float(n)) for n in volume.shape], BODY_GRID)
    if not np.isfinite(cells).all():
        raise ValueError("the volume holds values that are not numbers: prepare it again.")
    ranks = rankdata(_average(volume, _body_box(cells, volume.shape), GRID))
    return ((ranks - 0.5) * (256 / GRID**3)).astype(np.uint8).reshape(GRID, GRID, GRID)


def _average(volume: np.ndarray, box: Sequence[tuple[float, float]], cells: int) -> np.ndarray:
    """Means over the cells of a box given in voxels, fractions of voxels counted as such."""
    for axis, (low, high) in enumerate(box):
        n = volume.shape[axis]
        edges, voxels = np.linspace(low, high, cells + 1)[:, None], np.arange(n)
        weights = np.minimum(edges[1:], voxels + 1) - np.maximum(edges[:-1], voxels)
        weights = weights.clip(0)
        weights /= weights.sum(axis=1, keepdims=True)
        weighted = np.tensordot(weights.astype(np.float32), volume, (1, axis))
        volume = np.moveaxis(weighted, 0, axis)
    return volume


def _body_box(cells: np.ndarray, shape: tuple[int, ...]) -> list[tuple[float, float]]:
    """The middle of the body along each axis, in voxels of a volume of that shape."""
    air, bone = np.percentile(cells, (10, 99.5))
    # the couch goes: thin, or apart from the body
    body = ndimage.binary_opening(cells > air + BODY_LEVEL * (bone - air), IN_PLANE)
    pieces = _pieces(body)
    body = pieces == 1 + np.argmax(np.bincount(pieces.ravel(), minlength=2)[1:])
    # lungs may be as dark as air: what no path in plane joins to the border is body
    holes = _pieces(~body, IN_PLANE)
    border = np.concatenate([holes[:, [0, -1]].ravel(), holes[:, :, [0, -1]].ravel()])
    body |= ~np.isin(holes, border)
    box = []
    for axis, n in enumerate(shape):
        mass = np.cumsum(body.sum(axis=tuple({0, 1, 2} - {axis})))
        if not mass[-1]:  # nothing stands out
            return [(0.0, float(n)) for n in shape]
        tails = np.array([BODY_TAIL, 1 - BODY_TAIL]) * mass[-1]
        low, high = np.interp(tails, [0, *mass], np.arange(BODY_GRID + 1)) * (n / BODY_GRID)
        box.append((float(low), float(high)))
    return box


def _pieces(mask: np.ndarray, joined: np.ndarray | None = None) -> np.ndarray:
    """The connected pieces of a mask, numbered from 1; 0 outside."""
    labels: Any = ndimage.label(mask, joined)
    return labels[0]


# --- near duplicates --------------------------------------------------------------------------


def find_near_duplicates(
    fingerprints: np.ndarray,
    *,
    threshold: float = THRESHOLD,
    groups: Sequence[int] | np.ndarray | None = None,
) -> list[tuple[int, int, float]]:
    """Pairs of studies that show the same, flipped or not.

    Memory is about 4.5 kB a study and 20 MB; time grows with the number of pairs compared.

    Args:
        fingerprints: (n, 12, 12, 12) uint8.
        threshold: least similarity.
        groups: n sets of groups as bits (1, 2, 4, …); only studies that are in two different
            groups are compared. Without it all are.

    Returns:
        (i, j, similarity) with i < j, in that order.

    Raises:
        ValueError: if the shapes do not fit.
    """
    n = len(fingerprints)
    groups = np.full(n, 3) if groups is None else np.asarray(groups)
    if groups.shape != (n,):
        raise ValueError(f"{n} fingerprints and groups of shape {groups.shape}: give one each.")
    return _near(_parts(fingerprints), threshold, groups)


def _parts(fingerprints: np.ndarray) -> list[np.ndarray]:
    """Whitened cosine terms, eight parts of (n, terms) float32; the parts together have length 1.

    A part's covariance is shrunk towards the spectrum of pictures in general (power falling with
    the square of frequency), so that small sets are compared sensibly too. The mean is one over
    all flips as well: only the wholly even part has one. So whitening and flipping commute.
    """
    fingerprints = np.asarray(fingerprints)
    n = len(fingerprints)
    if fingerprints.shape != (n, GRID, GRID, GRID):
        raise ValueError(
            f"fingerprints are of shape {fingerprints.shape}, not (n, {GRID}, {GRID}, {GRID}): "
            "make them with med3dvlm.data.leakage.fingerprint."
        )
    frequency = np.indices((GRID,) * 3)
    square = (frequency**2).sum(axis=0)
    parity = np.tensordot((4, 2, 1), frequency % 2, 1)
    kept = [(parity == p) & (square > 0) & (square <= FINEST**2) for p in range(8)]
    parts = [np.empty((n, int(keep.sum())), np.float32) for keep in kept]
    for start in range(0, n, COLUMNS):
        block = fingerprints[start : start + COLUMNS].astype(np.float32)
        terms = dctn(block, axes=(1, 2, 3), norm="ortho")
        for part, keep in zip(parts, kept, strict=True):
            part[start : start + COLUMNS] = terms[:, keep]
    if n == 0:
        return parts
    every = -(-n // FITTED)
    parts[0] -= parts[0][::every].mean(axis=0)
    priors = [1.0 / (1.0 + square[keep]) for keep in kept]
    power = sum(float((part[::every] ** 2).sum()) for part in parts) / len(parts[0][::every])
    scale = power / sum(float(prior.sum()) for prior in priors)
    for part, prior in zip(parts, priors, strict=True):
        _whiten(part, prior * scale, part[::every])
    length = np.sqrt(sum(np.einsum("ij,ij->i", part, part) for part in parts))
    for part in parts:
        part /= np.maximum(length, 1e-6)[:, None]
    return parts


def _whiten(part: np.ndarray, prior: np.ndarray, sample: np.ndarray) -> None:
    """Multiply by the inverse root of the covariance, in place and by blocks."""
    covariance = sample.T @ sample + PRIOR_STUDIES * np.diag(prior)
    covariance /= len(sample) + PRIOR_STUDIES
    values, vectors = np.linalg.eigh(covariance)
    root = np.sqrt(values.clip(0) + RIDGE * values.mean() + 1e-12)
    whitening = ((vectors / root) @ vectors.T).astype(np.float32)
    for start in range(0, len(part), COLUMNS):
        part[start : start + COLUMNS] = part[start : start + COLUMNS] @ whitening


def _best_flip(products: np.ndarray) -> np.ndarray:
    """Products of eight parts (8, …) → greatest similarity over the eight flips (…).

    Uses up `products`. A flip along one axis turns the sign of the parts that are odd along it.
    """
    cube = products.reshape(2, 2, 2, *products.shape[1:])
    for even, odd in (
        (cube[0], cube[1]),
        (cube[:, 0], cube[:, 1]),
        (cube[:, :, 0], cube[:, :, 1]),
    ):
        difference = even - odd
        even += odd
        odd[...] = difference
    return products.max(axis=0)


def _near(
    parts: list[np.ndarray], threshold: float, groups: np.ndarray
) -> list[tuple[int, int, float]]:
    """Compare every two kinds of membership that cross, in blocks."""
    found = []
    members = {int(mask): np.flatnonzero(groups == mask) for mask in np.unique(groups)}
    for a, b in combinations_with_replacement(members, 2):
        if not _cross(a, b):
            continue
        for rows, columns in _blocks(members[a], members[b]):
            products = np.stack([part[rows] @ part[columns].T for part in parts])
            similarity = _best_flip(products)
            for i, j in np.argwhere(similarity >= threshold):
                first, second = sorted((int(rows[i]), int(columns[j])))
                if a != b or rows[i] < columns[j]:
                    found.append((first, second, min(1.0, float(similarity[i, j]))))
    return sorted(found)


def _blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks that hold each pair; where both are the same, those below the diagonal are left."""
    same = a is b
    for row in range(0, len(a), ROWS):
        for column in range(row if same else 0, len(b), COLUMNS):
            yield a[row : row + ROWS], b[column : column + COLUMNS]


def _cross(a: int, b: int) -> bool:
    """Whether a member of the groups `a` and one of the groups `b` are in two different ones."""
    return bool(a and b) and (a | b).bit_count() > 1


# --- crossings --------------------------------------------------------------------------------


def find_crossings(
    ids: Sequence[str],
    splits: Sequence[Sequence[str]],
    cases: Sequence[Hashable],
    content_hashes: Sequence[Hashable],
    fingerprints: np.ndarray,
    *,
    threshold: float = THRESHOLD,
) -> list[Crossing]:
    """Every pair of studies that are the same and on different sides of the splits, once.

    Args:
        ids: n names.
        splits: the splits that each study is in; names that begin with "test" or "val" are the
            test and the validation side, all others the training side. A study that is itself on
            two sides is a crossing with itself.
        cases: the patient or case of each; None or "" where it is not known.
        content_hashes: of the voxels of each; None or "" where not known.
        fingerprints: (n, 12, 12, 12) uint8, by :func:`fingerprint`.
        threshold: least similarity of a near duplicate.

    Returns:
        In the order of the studies.

    Raises:
        ValueError: if the lengths or shapes differ.
    """
    n = len(ids)
    for name, values in (
        ("splits", splits),
        ("cases", cases),
        ("content_hashes", content_hashes),
        ("fingerprints", fingerprints),
    ):
        if len(values) != n:
            raise ValueError(f"{n} ids and {len(values)} {name}: give one for each study.")
    sides = np.array([sum({1 << side_of(name) for name in names}) for names in splits], dtype=int)
    parts = _parts(fingerprints)
    found: dict[tuple[int, int], tuple[Kind, float]] = {}
    for i, j, similarity in _near(parts, threshold, sides):
        found[i, j] = "near", similarity
    same_case = [pair for pair in _equal_pairs(cases) if _cross(*map(int, sides[list(pair)]))]
    for i, j in same_case:
        products = np.array([part[i] @ part[j] for part in parts])
        found[i, j] = "case", min(1.0, float(_best_flip(products)))
    for i, j in _equal_pairs(content_hashes):
        if _cross(int(sides[i]), int(sides[j])):
            found[i, j] = "identical", 1.0
    for i in range(n):
        if _cross(int(sides[i]), int(sides[i])):
            found[i, i] = "identical", 1.0
    return [
        _crossing((ids[i], splits[i]), (ids[j], splits[j]), *found[i, j]) for i, j in sorted(found)
    ]


def leaking(crossings: Iterable[Crossing]) -> set[str]:
    """The ids to keep out of evaluation: of each pair the test side, else the validation side."""
    return {
        crossing.second
        if side_of(crossing.second_split) >= side_of(crossing.first_split)
        else crossing.first
        for crossing in crossings
    }


def side_of(split: str) -> int:
    """0 for training, 1 for validation, 2 for test."""
    return 2 if split.startswith("test") else 1 if split.startswith("val") else 0


def _equal_pairs(keys: Sequence[Hashable]) -> Iterator[tuple[int, int]]:
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        if key is not None and key != "":
            members[key].append(index)
    for group in members.values():
        yield from combinations(group, 2)


def _crossing(
    a: tuple[str, Sequence[str]], b: tuple[str, Sequence[str]], kind: Kind, similarity: float
) -> Crossing:
    """The two sides in order; of several names those farthest apart, the first ones."""
    meetings = [(p, q) for p in a[1] for q in b[1] if side_of(p) != side_of(q)]
    p, q = max(meetings, key=lambda names: abs(side_of(names[0]) - side_of(names[1])))
    (first, first_split), (second, second_split) = sorted(
        ((a[0], p), (b[0], q)), key=lambda member: side_of(member[1])
    )
    return Crossing(first, second, first_split, second_split, kind, similarity)
