"""The studies that a recipe names: what a run learns from, and what it is watched with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from med3dvlm.data.mixture import Mixture
from med3dvlm.data.prepare import prepare_phantoms
from med3dvlm.data.sources import Progress
from med3dvlm.data.store import Store
from med3dvlm.scan import Preparation
from med3dvlm.train.ranks import main_first, processes
from med3dvlm.train.recipe import DataRecipe, Recipe, RecipeError

AnyStore = Store | Mixture


@dataclass(frozen=True)
class Studies:
    """What a run learns from, and, where its recipe says so, what it is watched with."""

    train: AnyStore
    validation: AnyStore | None


def open_studies(
    recipe: Recipe, preparation: Preparation, *, progress: Progress | None = None
) -> Studies:
    """The recipe's prepared studies; phantoms are generated where they are not there yet.

    Of stores that are there, those of `data.split` alone, less the ones that are watched.

    Raises:
        RecipeError: if there are fewer studies than the recipe needs.
        StoreError: if a store cannot be used, or not together with another.
    """
    data = recipe.data
    if data.phantoms:
        studies = _phantoms(data, preparation, progress)
    else:
        studies = _from_stores(data, preparation, recipe.training.seed)
    check_enough(len(studies.train), recipe)
    if data.in_memory:
        studies.train.keep_in_memory()
    return studies


def check_enough(count: int, recipe: Recipe) -> None:
    """Refuse a run whose studies are too few for one batch on each of its processes.

    Raises:
        RecipeError: saying how many there are, and how many it takes.
    """
    batch, ranks, split = recipe.training.batch_size, processes(), recipe.data.split
    if count >= batch * ranks:
        return
    if ranks > 1:
        raise RecipeError(
            f"training.batch_size is {batch} on each of {ranks} processes, which takes "
            f"{batch * ranks} studies a step, but there are only {count} studies of split "
            f"{split!r} to train on: start fewer processes, lower it, or choose another data.split."
        )
    raise RecipeError(
        f"training.batch_size is {batch}, but there are only {count} studies of split {split!r} to "
        "train on: lower it, or choose another data.split."
    )


def _phantoms(data: DataRecipe, preparation: Preparation, progress: Progress | None) -> Studies:
    wanted = data.validation
    if wanted.studies and wanted.split == data.split:
        raise RecipeError(
            f"data.validation.split is {wanted.split!r}, which the run trains on: choose "
            "another split."
        )

    def make(folder: str, count: int, split: str) -> Store:
        with main_first():
            return prepare_phantoms(
                folder,
                count,
                split=split,
                seed=data.seed,
                preparation=preparation,
                workers=data.workers,
                progress=progress,
            )

    train = make(data.store, data.phantoms, data.split)
    if not wanted.studies:
        return Studies(train, None)
    return Studies(train, make(f"{data.store}-validation", wanted.studies, wanted.split))


def _from_stores(data: DataRecipe, preparation: Preparation, seed: int) -> Studies:
    train, held_out = {}, {}
    watched = held_out_ids(data)
    for (location, weight), out in zip(weights(data).items(), watched, strict=True):
        whole = Store(location)
        whole.check_preparation(preparation)
        known = set(whole.ids)
        skip = [name for name in data.skip if name in known]
        train[_only(whole, set(ids(whole, data.split)) - set(out) - set(skip))] = weight
        if out:
            held_out[_only(whole, out)] = float(len(out))  # each once
    unknown = set(data.skip) - {name for location in weights(data) for name in Store(location).ids}
    if unknown:
        raise RecipeError(
            f"data.skip: no store holds study {min(unknown)!r}: correct it, or leave it out."
        )
    return Studies(_one(train, seed), _one(held_out, seed) if held_out else None)


def weights(data: DataRecipe) -> dict[str, float]:
    """The stores of a recipe, and how much of an epoch is drawn from each."""
    return data.mixture or {data.store: 1.0}


def held_out_ids(data: DataRecipe) -> list[list[str]]:
    """For each store the studies that a run is watched with: as many of each as there can be.

    Raises:
        RecipeError: if they are fewer than wanted.
    """
    wanted = data.validation
    skip = set(data.skip)
    there = [
        [name for name in ids(Store(location), wanted.split) if name not in skip]
        for location in weights(data)
    ]
    counts = [0] * len(there)
    for _ in range(wanted.studies):
        open_ones = [k for k, names in enumerate(there) if counts[k] < len(names)]
        if not open_ones:
            raise RecipeError(
                f"data.validation.studies is {wanted.studies}, but {', '.join(weights(data))} has "
                f"{sum(counts)} of split {wanted.split!r}: ask for fewer."
            )
        counts[min(open_ones, key=lambda k: counts[k])] += 1
    return [names[:count] for names, count in zip(there, counts, strict=True)]


def ids(store: Store, split: str) -> list[str]:
    return [store.ids[index] for index in store.in_split(split)]


def _only(store: Store, chosen: Collection[str]) -> Store:
    """The store with none but these studies."""
    return Store(store.location, skip=[name for name in store.ids if name not in chosen])


def _one(stores: dict[Store, float], seed: int) -> AnyStore:
    return next(iter(stores)) if len(stores) == 1 else Mixture(stores, seed=seed)


def all_texts(store: AnyStore) -> list[str]:
    """Every text that a model of this store reads or writes."""
    texts = store.column("report") + store.column("caption")
    for questions in store.column("questions"):
        for question in questions:
            texts += [question["text"], question["answer"]]
    return [text for text in texts if text]
