"""The one engine under all three stages: the Trainer of transformers, told what a recipe says."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from med3dvlm.files import write_json
from med3dvlm.train.recipe import Recipe, RecipeError


def fit(
    model: nn.Module,
    recipe: Recipe,
    dataset: Dataset,
    collate: Any,
) -> dict[str, float]:
    """Train `model` in place; goes on from the last checkpoint in the output folder, if any.

    Returns:
        What the Trainer measured: loss, seconds, samples per second.
    """
    output = Path(recipe.output)
    trainer = _Trainer(
        model,
        training_arguments(recipe),
        train_dataset=dataset,
        data_collator=collate,
        callbacks=[_TimeLimit(recipe.training.max_minutes)],
    )
    last = get_last_checkpoint(str(output / "checkpoints")) if output.is_dir() else None
    result = trainer.train(resume_from_checkpoint=last)
    write_json(output / "history.json", trainer.state.log_history)
    return result.metrics


def training_arguments(recipe: Recipe) -> TrainingArguments:
    settings = recipe.training
    if settings.precision not in ("fp32", "bf16"):
        raise RecipeError(f"training.precision {settings.precision!r} is unknown: fp32 or bf16.")
    return TrainingArguments(
        output_dir=str(Path(recipe.output) / "checkpoints"),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_share,
        lr_scheduler_type=settings.schedule,
        max_grad_norm=settings.clip_norm,
        bf16=settings.precision == "bf16",
        seed=settings.seed,
        save_steps=settings.save_steps,
        save_total_limit=1,
        logging_steps=settings.log_steps,
        report_to=settings.loggers or "none",
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_num_workers=settings.loader_workers,
        use_cpu=not torch.cuda.is_available(),
        label_names=["labels"],
    )


class EpochSampler(Sampler[int]):
    """Numbers `epoch · n + i` in an order drawn from the seed and the epoch alone.

    A dataset of n that draws by the whole number shows something new each epoch, and the same
    on a resume, whatever was drawn before.
    """

    def __init__(self, length: int, *, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return iter((self.epoch * self.length + order).tolist())


class _Trainer(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return EpochSampler(len(train_dataset or self.train_dataset), seed=self.args.seed)


class _TimeLimit(TrainerCallback):
    """Stops after a number of minutes, and lowers the rate so that it ends low by then.

    The cosine schedule counts steps; a run cut short by the clock would end at a high rate. So
    the last fifth of the time scales the rate down to zero in a straight line.
    """

    def __init__(self, minutes: float | None):
        self.seconds = None if minutes is None else 60 * minutes
        self.start = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seconds is None:
            return
        left = 1 - (time.monotonic() - self.start) / self.seconds
        scheduler, optimizer = kwargs["lr_scheduler"], kwargs["optimizer"]
        factor = min(1.0, max(0.0, 5 * left))
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate * factor

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seconds is not None and time.monotonic() - self.start > self.seconds:
            control.should_training_stop = True


def freeze_all_but(model: nn.Module, parts: list[str]) -> None:
    """Let only the named parts learn.

    Raises:
        RecipeError: for a part that the model does not have.
    """
    known = dict(model.named_children())
    for part in parts:
        if part not in known:
            raise RecipeError(f"train: {part!r} is no part of the model: {', '.join(known)} are.")
    for name, child in known.items():
        child.requires_grad_(name in parts)


def trainable_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """For each part of the model (parameters that learn, parameters in all)."""
    return {
        name: (
            sum(p.numel() for p in child.parameters() if p.requires_grad),
            sum(p.numel() for p in child.parameters()),
        )
        for name, child in model.named_children()
    }


def save_summary(recipe: Recipe, metrics: dict[str, float], **facts: Any) -> None:
    """Write training.json beside the weights: the recipe, what was measured, the facts."""
    from omegaconf import OmegaConf

    settings = OmegaConf.to_container(OmegaConf.structured(recipe))
    summary = {"recipe": settings, "metrics": metrics, **facts}
    write_json(Path(recipe.output) / "training.json", json.loads(json.dumps(summary)))
