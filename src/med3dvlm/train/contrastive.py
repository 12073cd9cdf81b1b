"""Stage 1: volumes and texts into one space (Med3DVLM, section 3.2).

From nothing, both encoders learn together. From a checkpoint (`start`), the parts that `train`
names learn; with the volume encoder frozen its pooled states are computed once, and a text encoder
is fitted to them in minutes (locked-image tuning, arXiv 2111.07991).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModel, AutoTokenizer

from med3dvlm.data.augment import MIRRORS, Augmentation, VolumeDecoder, is_mirrored
from med3dvlm.data.laterality import mirrored_labels, swap_sides
from med3dvlm.data.sources import Progress
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
from med3dvlm.train.engine import (
    Job,
    Validation,
    fit,
    freeze_all_but,
    learn_in_fp32,
    save_result,
)
from med3dvlm.train.ranks import encoder_at_work
from med3dvlm.train.recipe import DataRecipe, Recipe, RecipeError, check_keys
from med3dvlm.train.studies import AnyStore, all_texts, open_studies
from med3dvlm.train.tokenizer import train_tokenizer

MAX_TEXT_TOKENS = 512


def train_contrastive(job: Job, recipe: Recipe) -> VolumeTextDualEncoder | None:
    """Train what `contrastive_job` made; the model is also saved in `recipe.output`."""
    model, metrics = fit(job, recipe)
    if model is None:
        return None
    save_result(model, recipe, metrics, studies=len(job.dataset))
    return model.eval()


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
    learn_in_fp32(model)
    frozen = bool(recipe.train) and "vision_encoder" not in recipe.train
    if frozen and recipe.data.flips != "off":
        raise RecipeError("data.flips needs a vision_encoder that learns: it sees no volumes else.")

    def dataset(store: AnyStore, data: DataRecipe) -> PairDataset:
        pooled = pool_store(model, store, progress=progress) if frozen else None
        places = bool(model.config.places) and not frozen
        return PairDataset(store, data, pooled, seed=recipe.training.seed, places=places)

    collate = PairCollator(model.processor)
    decode = VolumeDecoder(studies.train.quantisation)
    began = time.monotonic()
    train = dataset(studies.train, recipe.data)
    encoding_s = time.monotonic() - began if frozen else 0.0
    validation = None
    if studies.validation is not None:
        as_is = replace(recipe.data, intensity=0.0, shift_voxels=0, flips="off", caption_share=0.0)
        held_out = dataset(studies.validation, as_is)
        measure = PairMeasure(held_out, collate, decode, recipe.training.batch_size)
        validation = Validation(held_out, measure)
    return Job(model, model, train, collate, decode, validation, encoding_s)


def _from_nothing(recipe: Recipe, store: AnyStore) -> VolumeTextDualEncoder:
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
    model = load(recipe.start, part="search", device="cpu")
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
    store: AnyStore,
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> np.ndarray:
    """The encoder's pooled states of every study: (n, C) float32."""
    parts = []
    with encoder_at_work(model):
        for volumes in store.batches(batch_size, progress=progress):
            pooled = model.pool_volumes(model._to_device(volumes))
            parts.append(pooled.float().cpu().numpy())
    return np.concatenate(parts)


def _config(settings: dict[str, Any], store: AnyStore, text_config: Any) -> DualEncoderConfig:
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

    Raises:
        RecipeError: if a study has no report, which any scan would fit.
    """

    def __init__(
        self,
        store: AnyStore,
        recipe: DataRecipe,
        pooled: np.ndarray | None = None,
        *,
        seed: int,
        places: bool = False,
    ):
        reports = zip(store.ids, store.column("report"), strict=True)
        silent = [name for name, report in reports if not report.strip()]
        if silent:
            raise RecipeError(
                f"{store.location}: {len(silent)} of {len(store)} studies have no report, the "
                f"first is {silent[0]!r}: name them in data.skip."
            )
        self.pooled = pooled
        self.store = store
        self.caption_share = recipe.caption_share
        self.seed = seed
        self.labels = store.label_matrix() if store.labels else None
        self.places = places
        self.augmentation = Augmentation(recipe.intensity, recipe.shift_voxels, recipe.flips)
        self.mirrored = mirrored_labels(store.labels)
        self.mirrored_places = mirrored_labels(store.placed)

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, number: int) -> dict[str, Any]:
        index = self.store.drawn(number)
        random = np.random.default_rng((self.seed, number))
        study = self.store.study(index)
        caption = study["caption"] and random.random() < self.caption_share
        text = study["caption"] if caption else study["report"]
        item: dict[str, Any] = {"id": study["id"], "text": text}
        if self.pooled is not None:
            return {**item, "pooled": self.pooled[index]}
        item |= {"stored": self.store.stored(index), "drawn": self.augmentation.draw(random)}
        if self.labels is not None:
            item["concepts"] = self.labels[index]
        if self.places:
            item["places"] = self.store.places(index)
        if self.augmentation.flips == "swap" and is_mirrored(item["drawn"]):
            return self._mirrored(item)
        return item

    def _mirrored(self, item: dict[str, Any]) -> dict[str, Any]:
        """What is said of a study whose volume will be mirrored.

        One with a label that has no counterpart on the other side is left as it is.
        """
        concepts = item.get("concepts")
        if concepts is not None:
            if (concepts[self.mirrored < 0] > 0).any():
                item["drawn"][MIRRORS] = 0
                return item
            item["concepts"] = np.where(self.mirrored < 0, 0, concepts[self.mirrored])
        if "places" in item:
            item["places"] = item["places"][self.mirrored_places][..., ::-1]
        return {**item, "text": swap_sides(item["text"])}


class PairCollator:
    """Items to a batch; the volumes stay as they are stored, for `VolumeDecoder`."""

    def __init__(self, processor: Med3DVLMProcessor):
        self.processor = processor

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        tokens = self.processor.tokens([item["text"] for item in items])
        batch = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
        for name in ("pooled", "stored", "drawn", "concepts", "places"):
            if name in items[0]:
                batch[name] = torch.from_numpy(np.stack([item[name] for item in items]))
        if "places" in batch:  # cells are large enough for the shifts to be left out of account
            batch["places"] = batch["places"].float() / 255
        return batch


class PairMeasure:
    """The mean loss of batches in order, and recall at 1 with all studies as the pool.

    Args:
        batch_size: that of training, for the contrastive loss grows with the batch.
    """

    def __init__(
        self,
        dataset: PairDataset,
        collate: PairCollator,
        decode: VolumeDecoder,
        batch_size: int,
    ):
        self.dataset, self.collate, self.decode = dataset, collate, decode
        self.batch_size = batch_size

    def __call__(self, model: Any) -> tuple[dict[str, float], list[dict[str, str]]]:
        losses, images, texts = [], [], []
        loader = batches(self.dataset, self.collate, self.decode, self.batch_size, model.device)
        for batch, size in loader:
            out = model(**batch)
            losses.append(out.loss.item() * size)
            images.append(out.image_embeds.float().cpu().numpy())
            texts.append(out.text_embeds.float().cpu().numpy())
        similarity = np.concatenate(images) @ np.concatenate(texts).T
        groups = self.dataset.store.column("report")
        hits = places_of_matches(similarity, groups=groups).hit_at(1)
        loss = sum(losses) / len(self.dataset)
        return {"loss": loss, "r_at_1": float(hits.mean())}, []


def batches(
    dataset: Any, collate: Any, decode: VolumeDecoder, size: int, device: torch.device
) -> Iterator[tuple[dict[str, Tensor], int]]:
    """All items in order, each batch on the device and with its number of items."""
    for first in range(0, len(dataset), size):
        items = [dataset[i] for i in range(first, min(first + size, len(dataset)))]
        batch = {name: tensor.to(device) for name, tensor in collate(items).items()}
        yield decode(batch), len(items)
