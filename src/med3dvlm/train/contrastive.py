"""Stage 1: volumes and texts into one space (FACTS of the paper: section 3.2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from med3dvlm.data.store import Progress, Store, prepare_phantoms
from med3dvlm.models import (
    DualEncoderConfig,
    Med3DVLMProcessor,
    VolumeFeatureExtractor,
    VolumeTextDualEncoder,
)
from med3dvlm.scan import Preparation
from med3dvlm.train.engine import fit, save_summary
from med3dvlm.train.recipe import DataRecipe, Recipe
from med3dvlm.train.tokenizer import train_tokenizer


def train_contrastive(recipe: Recipe, *, progress: Progress | None = None) -> VolumeTextDualEncoder:
    """Follow a contrastive recipe; the model is also saved in `recipe.output`."""
    store = open_store(recipe, Preparation.from_dict(recipe.preparation), progress=progress)
    torch.manual_seed(recipe.training.seed)
    tokenizer = train_tokenizer(all_texts(store), size=recipe.tokenizer_size)
    model = VolumeTextDualEncoder(_config(recipe, store, tokenizer))
    model.processor = Med3DVLMProcessor(
        VolumeFeatureExtractor(store.preparation), tokenizer, max_text_tokens=512
    )
    dataset = PairDataset(store, recipe.data, seed=recipe.training.seed)
    metrics = fit(model, recipe, dataset, PairCollator(model.processor, recipe.data))
    output = Path(recipe.output)
    model.save_pretrained(output)
    model.processor.save_pretrained(output)
    save_summary(recipe, metrics, studies=len(store))
    return model.eval()


def open_store(
    recipe: Recipe, preparation: Preparation, *, progress: Progress | None = None
) -> Store:
    """The recipe's prepared studies, generated where they are not there yet."""
    data = recipe.data
    return prepare_phantoms(
        data.store,
        data.studies,
        split=data.split,
        seed=data.seed,
        preparation=preparation,
        workers=data.workers,
        progress=progress,
    )


def all_texts(store: Store) -> list[str]:
    """Every text that a model of this store reads or writes."""
    texts = []
    for study in store.studies:
        texts += [study["report"], study["caption"]]
        for question in study["questions"]:
            texts += [question["text"], question["answer"]]
    return texts


def _config(recipe: Recipe, store: Store, tokenizer: Any) -> DualEncoderConfig:
    settings = dict(recipe.model)
    vision = {"model_type": "med3dvlm_dcformer", **settings.pop("vision_config", {})}
    text = {"model_type": "distilbert", **settings.pop("text_config", {})}
    concepts = store.concepts if settings.get("concept_loss_weight", 0) else []
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
    """Item i: a prepared volume (D, H, W) uint8, one of its texts, its concepts."""

    def __init__(self, store: Store, recipe: DataRecipe, *, seed: int):
        self.store = store
        self.caption_share = recipe.caption_share
        self.random = np.random.default_rng(seed)
        self.concepts = store.concept_matrix()

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> dict[str, Any]:
        study = self.store.studies[index]
        kind = "caption" if self.random.random() < self.caption_share else "report"
        return {
            "volume": self.store.volumes[index],
            "text": study[kind],
            "concepts": self.concepts[index],
        }


class PairCollator:
    """Items to a batch; augments the volumes (paper: intensity; no flips, reports have sides)."""

    def __init__(self, processor: Med3DVLMProcessor, recipe: DataRecipe, *, seed: int = 0):
        self.processor = processor
        self.recipe = recipe
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        volumes = torch.from_numpy(np.stack([item["volume"] for item in items]))
        tokens = self.processor.tokens([item["text"] for item in items])
        return {
            "volumes": self._augment(volumes.float().div_(255)).unsqueeze(1),
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "concepts": torch.from_numpy(np.stack([item["concepts"] for item in items])),
        }

    def _augment(self, volumes: Tensor) -> Tensor:
        """(B, D, H, W) in [0, 1]: shift in space by whole voxels, scale and shift in value."""
        strength, reach = self.recipe.intensity, self.recipe.shift_voxels
        for volume in volumes:
            if reach:
                steps = torch.randint(-reach, reach + 1, (3,), generator=self.random).tolist()
                volume.copy_(volume.roll(steps, dims=(0, 1, 2)))
            if strength:
                scale, shift = torch.rand(2, generator=self.random).mul_(2).sub_(1).tolist()
                volume.mul_(1 + strength * scale).add_(strength * shift)
        return volumes
