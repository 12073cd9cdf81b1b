"""Several stores as one, from which training draws by weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from med3dvlm.data.sources import Progress
from med3dvlm.data.store import Store, StoreError

if TYPE_CHECKING:
    import torch


class Mixture:
    """The studies of several stores, numbered through, with what a `Store` gives of each.

    An epoch has as many items as there are studies. Each store has its share of them by weight: of
    one that has less than its studies, an epoch shows a part and the next epoch goes on; one that
    has more shows some twice, none before all were shown.

    Args:
        stores: with their weights, which are shares of an epoch and need not sum to one.
        seed: of the order in which a store is drawn from.

    Raises:
        StoreError: for stores of other preparations, value ranges or labels than the first.
    """

    def __init__(self, stores: Mapping[Store, float], *, seed: int = 0):
        self.stores = list(stores)
        self.seed = seed
        first = self.stores[0]
        for store in self.stores[1:]:
            _check_alike(first, store)
        self.preparation, self.quantisation = first.preparation, first.quantisation
        self.labels, self.placed = first.labels, first.placed
        self.location = ", ".join(store.location for store in self.stores)
        self.ids = [study_id for store in self.stores for study_id in store.ids]
        self.starts = np.cumsum([0, *(len(store) for store in self.stores)])
        self.shares = np.cumsum([0, *_quotas(list(stores.values()), len(self.ids))])

    def __len__(self) -> int:
        return len(self.ids)

    def drawn(self, number: int) -> int:
        """Which study item `epoch · len + i` is."""
        epoch, place = divmod(number, len(self))
        source = int(np.searchsorted(self.shares, place, side="right")) - 1
        quota = int(self.shares[source + 1] - self.shares[source])
        count = len(self.stores[source])
        lap, position = divmod(epoch * quota + place - int(self.shares[source]), count)
        if quota != count:  # else each study once an epoch, in the order in which they lie there
            position = int(_order(self.seed, source, lap, count)[position])
        return int(self.starts[source]) + position

    def study(self, index: int) -> dict[str, Any]:
        store, place = self._at(index)
        return store.study(place)

    def stored(self, index: int) -> np.ndarray:
        store, place = self._at(index)
        return store.stored(place)

    def keep_in_memory(self) -> None:
        for store in self.stores:
            store.keep_in_memory()

    def places(self, index: int) -> np.ndarray:
        store, place = self._at(index)
        return store.places(place)

    def column(self, name: str) -> list[Any]:
        return [value for store in self.stores for value in store.column(name)]

    def label_matrix(self) -> np.ndarray:
        return np.concatenate([store.label_matrix() for store in self.stores])

    def batches(self, size: int, *, progress: Progress | None = None) -> Iterator[torch.Tensor]:
        """As `Store.batches`; no batch spans two stores."""
        for start, store in zip(self.starts, self.stores, strict=False):

            def counted(done: int, _: int, start: int = int(start)) -> None:
                if progress:
                    progress(start + done, len(self))

            yield from store.batches(size, progress=counted)

    def _at(self, index: int) -> tuple[Store, int]:
        source = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.stores[source], index - int(self.starts[source])


def _quotas(weights: list[float], items: int) -> list[int]:
    """Whole shares of `items`; what rounding leaves goes to the largest remainders."""
    exact = np.array(weights, dtype=np.float64) / sum(weights) * items
    quotas = np.floor(exact).astype(int)
    short = np.argsort(quotas - exact, kind="stable")[: items - int(quotas.sum())]
    quotas[short] += 1
    return quotas.tolist()


@lru_cache(maxsize=16)
def _order(seed: int, source: int, lap: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, source, lap)).permutation(count)


def _check_alike(first: Store, other: Store) -> None:
    other.check_preparation(first.preparation)
    for what in ("quantisation", "labels", "placed"):
        if getattr(first, what) != getattr(other, what):
            raise StoreError(
                f"{first.location} and {other.location} differ in their {what}: prepare both in "
                "the same way, or train on them one after the other."
            )
