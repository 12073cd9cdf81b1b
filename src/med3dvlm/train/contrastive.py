"""Stage 1: volumes and texts into one space (Med3DVLM, section 3.2).

From nothing, both encoders learn together. From a checkpoint (`start`), the parts that `train`
names learn; with the volume encoder frozen its pooled states are computed once, and a text encoder
is fitted to them in minutes (locked-image tuning, arXiv 2111.07991).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModel, AutoTokenizer

from med3dvlm.data.prepare import prepare_phantoms
from med3dvlm.data.sources import Progress
from med3dvlm.data.store import Quantisation, Store
from med3dvlm.evaluate.retrieval import places_of_matches
from med3dvlm.hub import load
from med3dvlm.models import (
    DualEncoderConfig,
    Med3DVLMProcessor,
    VolumeFeatureExtractor,
    VolumeTextDualEncoder,
)
from med3dvlm.models.checkpoint import as_config
from med3dvlm.scan import Preparation
from med3dvlm.train.engine import Job, Validation, fit, freeze_all_but, save_result
from med3dvlm.train.ranks import main_first
from med3dvlm.train.recipe import DataRecipe, Recipe, RecipeError, check_keys
from med3dvlm.train.tokenizer import train_tokenizer

MAX_TEXT_TOKENS = 512


def train_contrastive(recipe: Recipe, *, progress: Progress | None = None) -> VolumeTextDualEncoder:
    """Follow a contrastive recipe; the model is also saved in `recipe.output`."""
    job = contrastive_job(recipe, progress=progress)
    metrics = fit(job, recipe)
    save_result(job.model, recipe, metrics, studies=len(job.dataset))
    return job.model.eval()


def contrastive_job(recipe: Recipe, *, progress: Progress | None = None) -> Job:
    """The model and the studies of a contrastive recipe."""
    torch.manual_seed(recipe.training.seed)
    if recipe.start is None:
        preparation = Preparation.from_dict(recipe.preparation)
        studies = open_studies(recipe, preparation, progress=progress)
        model = _from_nothing(recipe, studies.train)
    else:
        model = _from_checkpoint(recipe)
        studies = open_studies(recipe, model.preparation, progress=progress)
    frozen = bool(recipe.train) and "vision_encoder" not in recipe.train

    def dataset(store: Store, data: DataRecipe) -> PairDataset:
        pooled = pool_store(model, store, progress=progress) if frozen else None
        places = bool(model.config.places) and not frozen
        return PairDataset(store, data, pooled, seed=recipe.training.seed, places=places)

    def collate(store: Store, data: DataRecipe) -> PairCollator:
        return PairCollator(model.processor, data, store.quantisation)

    began = time.monotonic()
    train = dataset(studies.train, recipe.data)
    encoding_s = time.monotonic() - began if frozen else 0.0
    validation = None
    if studies.validation is not None:
        as_is = replace(recipe.data, intensity=0.0, shift_voxels=0, caption_share=0.0)
        held_out = dataset(studies.validation, as_is)
        batch = collate(studies.validation, as_is)
        measure = PairMeasure(held_out, batch, recipe.training.batch_size)
        validation = Validation(held_out, measure)
    return Job(model, model, train, collate(studies.train, recipe.data), validation, encoding_s)


def _from_nothing(recipe: Recipe, store: Store) -> VolumeTextDualEncoder:
    """A new model; its text encoder is `model.text_encoder`'s where the recipe names one."""
    settings = dict(recipe.model)
    pretrained = settings.pop("text_encoder", None)
    if pretrained:
        tokenizer, text_encoder = _load_text_encoder(pretrained)
        text_config = text_encoder.config
        if "text_config" in settings:
            raise RecipeError("model.text_config: model.text_encoder has one already; drop one.")
    else:
        tokenizer, text_encoder = (
            train_tokenizer(all_texts(store), size=recipe.tokenizer_size),
            None,
        )
        text_config = {
            **part_settings(settings.pop("text_config", {}), default="distilbert"),
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
        }
    model = VolumeTextDualEncoder(_config(settings, store, text_config))
    if text_encoder is not None:
        model.text_encoder.load_state_dict(text_encoder.state_dict())
    if recipe.train:
        freeze_all_but(model, recipe.train)
    positions = getattr(model.config.text_config, "max_position_embeddings", MAX_TEXT_TOKENS)
    model.processor = Med3DVLMProcessor(
        VolumeFeatureExtractor(store.preparation),
        tokenizer,
        max_text_tokens=min(MAX_TEXT_TOKENS, positions),
    )
    return model


def _load_text_encoder(name: str) -> tuple[Any, Any]:
    """Tokenizer and encoder of a folder, or of a name on the hub."""
    try:
        return AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n", 1)[0][:160]
        raise RecipeError(
            f"model.text_encoder: {name} cannot be loaded ({reason}): give the folder of a text "
            "encoder with its tokenizer, or its name on the hub."
        ) from error


def _from_checkpoint(recipe: Recipe) -> VolumeTextDualEncoder:
    """The checkpoint with its frozen parts, and anew those that the recipe wants anew."""
    model = load(recipe.start, part="search")
    if not isinstance(model, VolumeTextDualEncoder):
        raise RecipeError(f"start: {recipe.start} is no dual encoder; name one.")
    if not recipe.train:
        raise RecipeError("train is empty: name the parts that learn, for example text_encoder.")
    freeze_all_but(model, recipe.train)
    unused = VolumeTextDualEncoder(model.config)  # drawn from the recipe's seed
    for part in recipe.anew:
        if part not in recipe.train:
            raise RecipeError(f"anew: {part!r} is not among the parts that learn ({recipe.train}).")
        getattr(model, part).load_state_dict(getattr(unused, part).state_dict())
    return model


@torch.inference_mode()
def pool_store(
    model: VolumeTextDualEncoder,
    store: Store,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> np.ndarray:
    """The encoder's pooled states of every study: (n, C) float32."""
    model.eval()
    parts = []
    for volumes in store.batches(batch_size, progress=progress):
        parts.append(model.pool_volumes(model._to_device(volumes)).cpu().numpy())
    return np.concatenate(parts)


@dataclass(frozen=True)
class Studies:
    """What a run learns from, and, where its recipe says so, what it is watched with."""

    train: Store
    validation: Store | None


def open_studies(
    recipe: Recipe, preparation: Preparation, *, progress: Progress | None = None
) -> Studies:
    """The recipe's prepared studies; phantoms are generated where they are not there yet.

    Of a store that is there, those of `data.split` alone, less the ones that are watched.

    Raises:
        RecipeError: if there are fewer studies than the recipe needs.
    """
    data, wanted = recipe.data, recipe.data.validation
    validation = None
    if data.phantoms:

        def phantoms(folder: str, count: int, split: str) -> Store:
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

        if wanted.studies and wanted.split == data.split:
            raise RecipeError(
                f"data.validation.split is {wanted.split!r}, which the run trains on: choose "
                "another split."
            )
        train = phantoms(data.store, data.phantoms, data.split)
        if wanted.studies:
            validation = phantoms(f"{data.store}-validation", wanted.studies, wanted.split)
    else:
        store = Store(data.store, skip=data.skip)
        store.check_preparation(preparation)
        held_out = _ids(store, wanted.split)[: wanted.studies]
        if len(held_out) < wanted.studies:
            raise RecipeError(
                f"data.validation.studies is {wanted.studies}, but {data.store} has "
                f"{len(held_out)} of split {wanted.split!r}: ask for fewer."
            )
        if wanted.studies:
            validation = _only(store, held_out, data)
        train = _only(store, set(_ids(store, data.split)) - set(held_out), data)
    if len(train) < recipe.training.batch_size:
        raise RecipeError(
            f"training.batch_size is {recipe.training.batch_size}, but there are only "
            f"{len(train)} studies of split {data.split!r} to train on: lower it, or choose "
            "another data.split."
        )
    return Studies(train, validation)


def _ids(store: Store, split: str) -> list[str]:
    return [store.ids[index] for index in store.in_split(split)]


def _only(store: Store, ids: Collection[str], data: DataRecipe) -> Store:
    """The store with none but these studies."""
    chosen = set(ids)
    return Store(data.store, skip=[*data.skip, *(i for i in store.ids if i not in chosen)])


def all_texts(store: Store) -> list[str]:
    """Every text that a model of this store reads or writes."""
    texts = store.table["report"].to_pylist() + store.table["caption"].to_pylist()
    for questions in store.table["questions"].to_pylist():
        for question in questions:
            texts += [question["text"], question["answer"]]
    return [text for text in texts if text]


def _config(settings: dict[str, Any], store: Store, text_config: Any) -> DualEncoderConfig:
    settings = dict(settings)
    vision = part_settings(
        settings.pop("vision_config", {}), default="med3dvlm_dcformer", section="vision_config"
    )
    check_keys(settings, DualEncoderConfig().to_dict(), section="model")
    if settings.get("place_loss_weight") and not store.placed:
        raise RecipeError(
            f"model.place_loss_weight: {store.location} does not say where its labels can be seen; "
            "leave it out."
        )
    return DualEncoderConfig(
        vision_config={**vision, "volume_size": list(store.preparation.size)},
        text_config=text_config,
        concepts=store.labels if settings.get("concept_loss_weight", 0) else [],
        places=store.placed if settings.get("place_loss_weight", 0) else [],
        **settings,
    )


def part_settings(
    settings: dict[str, Any], *, default: str, section: str = "text_config"
) -> dict[str, Any]:
    """Settings of a part of the model, with its model_type and none that it does not have."""
    settings = {"model_type": default, **settings}
    known = as_config({"model_type": settings["model_type"]}, default=default).to_dict()
    check_keys(settings, known, section=f"model.{section}")
    return settings


class PairDataset(Dataset):
    """Item `epoch · len + i`: study i's volume (D, H, W) as stored, one of its texts, its labels.

    With `pooled`, what a frozen encoder makes of the volumes stands in for them; with `places`,
    where the labels can be seen goes along.

    What is drawn at random depends on the recipe's seed and the item's number alone, so a run
    that is resumed, or that has other workers, sees the same batches.
    """

    def __init__(
        self,
        store: Store,
        recipe: DataRecipe,
        pooled: np.ndarray | None = None,
        *,
        seed: int,
        places: bool = False,
    ):
        self.pooled = pooled
        self.store = store
        self.caption_share = recipe.caption_share
        self.seed = seed
        self.labels = store.label_matrix() if store.labels else None
        self.places = places

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, number: int) -> dict[str, Any]:
        index = number % len(self)
        random = np.random.default_rng((self.seed, number))
        study = self.store.study(index)
        caption = study["caption"] and random.random() < self.caption_share
        text = study["caption"] if caption else study["report"]
        item: dict[str, Any] = {"id": study["id"], "text": text}
        if self.pooled is not None:
            return {**item, "pooled": self.pooled[index]}
        item |= {"volume": self.store.stored(index), "draw": int(random.integers(2**62))}
        if self.labels is not None:
            item["concepts"] = self.labels[index]
        if self.places:
            item["places"] = self.store.places(index)
        return item


class PairCollator:
    """Items to a batch; augments the volumes (paper: intensity; no flips, reports have sides)."""

    def __init__(
        self, processor: Med3DVLMProcessor, recipe: DataRecipe, quantisation: Quantisation
    ):
        self.processor = processor
        self.recipe = recipe
        self.quantisation = quantisation

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        tokens = self.processor.tokens([item["text"] for item in items])
        batch = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        if "pooled" in items[0]:
            pooled = torch.from_numpy(np.stack([item["pooled"] for item in items]))
            return {**batch, "pooled": pooled}
        volumes = torch.from_numpy(np.stack([item["volume"] for item in items]))
        volumes = self.quantisation.decode(volumes)
        for volume, item in zip(volumes, items, strict=True):
            self._augment(volume, torch.Generator().manual_seed(item["draw"]))
        batch["volumes"] = volumes.unsqueeze(1)
        if "concepts" in items[0]:
            batch["concepts"] = torch.from_numpy(np.stack([item["concepts"] for item in items]))
        if "places" in items[0]:  # cells are large enough for the shifts to be left out of account
            places = torch.from_numpy(np.stack([item["places"] for item in items]))
            batch["places"] = places.float() / 255
        return batch

    def _augment(self, volume: Tensor, random: torch.Generator) -> None:
        """(D, H, W), in place: shift in space by whole voxels, scale and shift in value."""
        strength, reach = self.recipe.intensity, self.recipe.shift_voxels
        if reach:
            steps = torch.randint(-reach, reach + 1, (3,), generator=random).tolist()
            volume.copy_(volume.roll(steps, dims=(0, 1, 2)))
        if strength:
            scale, shift = torch.rand(2, generator=random).mul_(2).sub_(1).tolist()
            volume.mul_(1 + strength * scale).add_(strength * shift)


class PairMeasure:
    """The mean loss of batches in order, and recall at 1 with all studies as the pool.

    Args:
        batch_size: that of training, for the contrastive loss grows with the batch.
    """

    def __init__(self, dataset: PairDataset, collate: PairCollator, batch_size: int):
        self.dataset, self.collate, self.batch_size = dataset, collate, batch_size

    def __call__(self, model: Any) -> tuple[dict[str, float], list[dict[str, str]]]:
        losses, images, texts = [], [], []
        for batch, size in batches(self.dataset, self.collate, self.batch_size, model.device):
            out = model(**batch)
            losses.append(out.loss.item() * size)
            images.append(out.image_embeds.float().cpu().numpy())
            texts.append(out.text_embeds.float().cpu().numpy())
        similarity = np.concatenate(images) @ np.concatenate(texts).T
        groups = self.dataset.store.table["report"].to_pylist()
        hits = places_of_matches(similarity, groups=groups).hit_at(1)
        loss = sum(losses) / len(self.dataset)
        return {"loss": loss, "r_at_1": float(hits.mean())}, []


def batches(
    dataset: Any, collate: Any, size: int, device: torch.device
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """All items in order, each batch on the device and with its number of items."""
    for first in range(0, len(dataset), size):
        items = [dataset[i] for i in range(first, min(first + size, len(dataset)))]
        yield {name: tensor.to(device) for name, tensor in collate(items).items()}, len(items)
