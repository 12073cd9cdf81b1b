"""Stage 1: volumes and texts into one space (Med3DVLM, section 3.2).

From nothing, both encoders learn together. From a checkpoint (`start`), the parts that `train`
names learn; with the volume encoder frozen its pooled states are computed once, and a text encoder
is fitted to them in minutes (locked-image tuning, arXiv 2111.07991).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from med3dvlm.data.prepare import prepare_phantoms
from med3dvlm.data.sources import Progress
from med3dvlm.data.store import Quantisation, Store
from med3dvlm.hub import load
from med3dvlm.models import (
    DualEncoderConfig,
    Med3DVLMProcessor,
    VolumeFeatureExtractor,
    VolumeTextDualEncoder,
)
from med3dvlm.scan import Preparation
from med3dvlm.train.engine import fit, freeze_all_but, save_summary
from med3dvlm.train.recipe import DataRecipe, Recipe, RecipeError
from med3dvlm.train.tokenizer import train_tokenizer


def train_contrastive(recipe: Recipe, *, progress: Progress | None = None) -> VolumeTextDualEncoder:
    """Follow a contrastive recipe; the model is also saved in `recipe.output`."""
    torch.manual_seed(recipe.training.seed)
    if recipe.start is None:
        store = open_store(recipe, Preparation.from_dict(recipe.preparation), progress=progress)
        model = _from_nothing(recipe, store)
    else:
        model = _from_checkpoint(recipe)
        store = open_store(recipe, model.preparation, progress=progress)
    pooled = None
    if recipe.train and "vision_encoder" not in recipe.train:
        pooled = pool_store(model, store, progress=progress)
    dataset = PairDataset(store, recipe.data, pooled, seed=recipe.training.seed)
    metrics = fit(
        model, recipe, dataset, PairCollator(model.processor, recipe.data, store.quantisation)
    )
    output = Path(recipe.output)
    model.save_pretrained(output)
    model.processor.save_pretrained(output)
    save_summary(recipe, metrics, studies=len(store))
    return model.eval()


def _from_nothing(recipe: Recipe, store: Store) -> VolumeTextDualEncoder:
    tokenizer = train_tokenizer(all_texts(store), size=recipe.tokenizer_size)
    model = VolumeTextDualEncoder(_config(recipe, store, tokenizer))
    model.processor = Med3DVLMProcessor(
        VolumeFeatureExtractor(store.preparation), tokenizer, max_text_tokens=512
    )
    return model


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


def open_store(
    recipe: Recipe, preparation: Preparation, *, progress: Progress | None = None
) -> Store:
    """The recipe's prepared studies; phantoms are generated where they are not there yet."""
    data = recipe.data
    if data.phantoms:
        store = prepare_phantoms(
            data.store,
            data.phantoms,
            split=data.split,
            seed=data.seed,
            preparation=preparation,
            workers=data.workers,
            progress=progress,
        )
    else:
        store = Store(data.store, skip=data.skip)
        store.check_preparation(preparation)
    return store


def all_texts(store: Store) -> list[str]:
    """Every text that a model of this store reads or writes."""
    texts = store.table["report"].to_pylist() + store.table["caption"].to_pylist()
    for questions in store.table["questions"].to_pylist():
        for question in questions:
            texts += [question["text"], question["answer"]]
    return [text for text in texts if text]


def _config(recipe: Recipe, store: Store, tokenizer: Any) -> DualEncoderConfig:
    settings = dict(recipe.model)
    vision = {"model_type": "med3dvlm_dcformer", **settings.pop("vision_config", {})}
    text = {"model_type": "distilbert", **settings.pop("text_config", {})}
    concepts = store.labels if settings.get("concept_loss_weight", 0) else []
    return DualEncoderConfig(
        vision_config={**vision, "volume_size": list(store.preparation.size)},
        text_config={
            **text,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
        },
        concepts=concepts,
        **settings,
    )


class PairDataset(Dataset):
    """Item `epoch · len + i`: study i's volume (D, H, W) as stored, one of its texts, its labels.

    With `pooled`, what a frozen encoder makes of the volumes stands in for them.

    What is drawn at random depends on the recipe's seed and the item's number alone, so a run
    that is resumed, or that has other workers, sees the same batches.
    """

    def __init__(
        self, store: Store, recipe: DataRecipe, pooled: np.ndarray | None = None, *, seed: int
    ):
        self.pooled = pooled
        self.store = store
        self.caption_share = recipe.caption_share
        self.seed = seed
        self.labels = store.label_matrix() if store.labels else None

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, number: int) -> dict[str, Any]:
        index = number % len(self)
        random = np.random.default_rng((self.seed, number))
        study = self.store.study(index)
        caption = study["caption"] and random.random() < self.caption_share
        item: dict[str, Any] = {"text": study["caption"] if caption else study["report"]}
        if self.pooled is not None:
            return {**item, "pooled": self.pooled[index]}
        item |= {"volume": self.store.stored(index), "draw": int(random.integers(2**62))}
        return item if self.labels is None else {**item, "concepts": self.labels[index]}


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
