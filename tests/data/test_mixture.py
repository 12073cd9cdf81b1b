"""Several stores as one: shares, order, and what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from med3dvlm.data.mixture import Mixture
from med3dvlm.data.prepare import prepare_phantoms
from med3dvlm.data.store import StoreError
from tests.train.test_train import SMALL


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    return [
        prepare_phantoms(folder / name, count, split=split, preparation=SMALL, workers=1)
        for name, count, split in (("a", 5, "train"), ("b", 3, "validation"))
    ]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.floats(0.05, 20), st.integers(0, 5))
def test_an_epoch_has_its_shares_and_nothing_comes_twice_too_soon(stores, weight, seed):
    mixture = Mixture(dict(zip(stores, (1.0, weight), strict=True)), seed=seed)
    assert len(mixture) == 8
    share = 8 / (1 + weight)
    seen: Counter[int] = Counter()
    for epoch in range(6):
        drawn = [mixture.drawn(epoch * 8 + i) for i in range(8)]
        assert abs(sum(index < 5 for index in drawn) - share) < 1
        seen.update(drawn)
        for first, last in ((0, 5), (5, 8)):
            counts = [seen[index] for index in range(first, last)]
            assert max(counts) - min(counts) <= 1


def test_the_seed_alone_says_what_is_drawn(stores):
    def order(seed: int) -> list[int]:
        mixture = Mixture({stores[0]: 1.0, stores[1]: 3.0}, seed=seed)
        return [mixture.drawn(i) for i in range(40)]

    assert order(1) == order(1) != order(2)


def test_weights_by_size_show_each_study_once_in_order(stores):
    mixture = Mixture({store: float(len(store)) for store in stores})
    assert [mixture.drawn(i) for i in range(16)] == [*range(8), *range(8)]


def test_every_study_is_that_of_its_store(stores):
    mixture = Mixture({stores[0]: 1.0, stores[1]: 1.0})
    assert mixture.ids == stores[0].ids + stores[1].ids
    assert mixture.study(6) == stores[1].study(1)
    assert np.array_equal(mixture.stored(4), stores[0].stored(4))
    assert np.array_equal(mixture.places(7), stores[1].places(2))
    assert mixture.column("report")[5] == stores[1].study(0)["report"]
    assert np.array_equal(mixture.label_matrix()[5:], stores[1].label_matrix())
    done = []
    batches = list(mixture.batches(4, progress=lambda *counts: done.append(counts)))
    assert [len(batch) for batch in batches] == [4, 1, 3]
    assert torch.equal(torch.cat(batches)[5:], next(stores[1].batches(3)))
    assert done == [(4, 8), (5, 8), (8, 8)]


def test_stores_that_do_not_go_together(stores, tmp_path):
    other = replace(SMALL, window=((-500, 0), (500, 1)))
    store = prepare_phantoms(tmp_path / "c", 2, split="train", preparation=other, workers=1)
    with pytest.raises(ValueError, match="window"):
        Mixture({stores[0]: 1.0, store: 1.0})
    stores[1].labels, kept = stores[1].labels[:-1], stores[1].labels
    try:
        with pytest.raises(StoreError, match="differ in their labels"):
            Mixture({stores[0]: 1.0, stores[1]: 1.0})
    finally:
        stores[1].labels = kept
