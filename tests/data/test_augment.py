"""Augmentation of batches, and words that follow a mirrored scan."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from med3dvlm.data.augment import Augmentation, VolumeDecoder, augment, is_mirrored
from med3dvlm.data.laterality import mirrored_labels, swap_sides
from med3dvlm.data.phantoms import CONCEPTS, make_study
from med3dvlm.data.store import Quantisation


def one_by_one(volume: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """A volume by the words of the docstring: turn, flip, shift."""
    if drawn[8]:
        volume = np.rot90(volume, axes=(1, 2))
    volume = np.flip(volume, [axis for axis in range(3) if drawn[5 + axis]])
    return np.roll(volume, drawn[:3].astype(int), (0, 1, 2))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 10_000),
    st.sampled_from(["off", "swap", "published"]),
    st.integers(0, 3),
    st.sampled_from(["uint8", "float16"]),
)
def test_a_batch_is_its_studies_one_by_one(seed, flips, reach, dtype):
    random = np.random.default_rng(seed)
    volumes = random.integers(0, 256, (3, 4, 6, 6)).astype(dtype)
    augmentation = Augmentation(0.1, reach, flips)
    drawn = np.stack([augmentation.draw(random) for _ in volumes])
    stored, parameters = torch.from_numpy(volumes), torch.from_numpy(drawn)
    expected = np.stack([one_by_one(*pair) for pair in zip(volumes, drawn, strict=True)])
    assert np.array_equal(augment(stored, parameters).numpy(), expected)
    decoder = VolumeDecoder(Quantisation(dtype, 0.0, 1.0))
    batch = decoder({"stored": stored, "drawn": parameters, "other": 1})
    values = decoder.quantisation.decode(expected)
    values = values * drawn[:, 3, None, None, None] + drawn[:, 4, None, None, None]
    assert batch.keys() == {"volumes", "other"}
    assert batch["volumes"].shape == (3, 1, 4, 6, 6)
    assert np.abs(batch["volumes"][:, 0].numpy() - values).max() < 1e-5


def test_draws_are_as_often_as_they_say():
    random = np.random.default_rng(0)
    published = np.stack([Augmentation(0.1, 2, "published").draw(random) for _ in range(4000)])
    assert published[:, 5:].mean(0) == pytest.approx([0.1, 0.1, 0.1, 0.5], abs=0.03)
    assert set(published[:, :3].ravel()) == {-2, -1, 0, 1, 2}
    assert np.abs(published[:, 3] - 1).max() <= 0.1 and np.abs(published[:, 4]).max() <= 0.1
    swap = [is_mirrored(Augmentation(flips="swap").draw(random)) for _ in range(1000)]
    assert np.mean(swap) == pytest.approx(0.5, abs=0.05)
    assert not Augmentation().draw(random)[[0, 1, 2, 4, 5, 6, 7, 8]].any()


def test_slices_that_are_not_square_cannot_be_turned():
    drawn = torch.zeros(1, 9)
    drawn[:, 8] = 1
    with pytest.raises(ValueError, match="not square"):
        augment(torch.zeros(1, 2, 4, 6), drawn)


@settings(max_examples=100, derandomize=True)
@given(st.text(st.sampled_from("leftrigh LRU.ul-\n"), max_size=60))
def test_sides_exchanged_twice_are_the_text_again(text):
    assert swap_sides(swap_sides(text)) == text


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("Left-sided effusion; the RIGHT lung is clear.", "Right-sided effusion; the LEFT lung is clear."),
        ("Nodule in the RUL, 6 mm. LLL atelectasis.", "Nodule in the LUL, 6 mm. RLL atelectasis."),
        ("Bilateral, brightness and cleft unchanged.", "Bilateral, brightness and cleft unchanged."),
        ("rightward shift", "leftward shift"),
    ],
)  # fmt: skip
def test_words_of_side(text, mirrored):
    assert swap_sides(text) == mirrored


def test_a_phantom_s_texts_and_labels_are_mirrored_alike():
    other = mirrored_labels(CONCEPTS)
    alone = [name for name, k in zip(CONCEPTS, other, strict=True) if k < 0]
    assert alone == [name for name in CONCEPTS if "right middle lobe" in name]
    paired = other >= 0
    assert np.array_equal(other[other[paired]], np.flatnonzero(paired))
    study = next(s for i in range(50) if "left" in (s := make_study(i)).report)
    assert swap_sides(study.report) != study.report
