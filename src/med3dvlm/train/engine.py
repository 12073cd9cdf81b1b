"""The one engine under all three stages: the Trainer of transformers, told what a recipe says."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from med3dvlm.files import atomic_file, write_json
from med3dvlm.train.average import WeightAverage
from med3dvlm.train.checkpoints import (
    UNFINISHED,
    TrainingError,
    guarded,
    keep_only,
    last_checkpoint,
    publish,
    result_folder,
)
from med3dvlm.train.memory import freed_memory_kept
from med3dvlm.train.ranks import as_on_main, is_main, main_first
from med3dvlm.train.recipe import Recipe, RecipeError

SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class Validation:
    """How a stage looks at its model during a run.

    Attributes:
        dataset: the studies; none of them is trained on.
        measure: the model, in evaluation mode, to figures by name ("loss" among them) and
            samples of what it writes, each with the study's `id`.
    """

    dataset: Dataset
    measure: Callable[[nn.Module], tuple[dict[str, float], list[dict[str, str]]]]


@dataclass(frozen=True)
class Job:
    """All that a run needs, ready to begin.

    Attributes:
        model: what the run makes.
        learner: what is trained: the model, or the model within its adapters.
        collate: items to a batch.
        decode: what is done with a batch where the model is.
        encoding_s: seconds spent on what a frozen encoder makes of the studies.
    """

    model: Any
    learner: nn.Module
    dataset: Any
    collate: Any
    decode: Callable[[dict[str, Any]], dict[str, Any]]
    validation: Validation | None = None
    encoding_s: float = 0.0


def fit(job: Job, recipe: Recipe) -> dict[str, float]:
    """Train in place; goes on from the last checkpoint in the output folder, if any.

    What a run that was killed goes on with (weights, optimizer, schedule, order of the studies,
    random numbers, the mean of the weights) is what it had, so on one machine it ends in the same
    weights, bit for bit. Only `max_minutes` is not repeatable: it cuts by the clock.

    Returns:
        What the Trainer measured: loss, seconds, samples per second.

    Raises:
        TrainingError: where the loss is no number any more, or a checkpoint cannot be saved.
    """
    output = Path(recipe.output)
    checkpoints = output / "checkpoints"
    with main_first():
        last = last_checkpoint(checkpoints)
    trainer = _Trainer(
        job.learner,
        training_arguments(recipe),
        train_dataset=job.dataset,
        eval_dataset=job.validation.dataset if job.validation else None,
        data_collator=_WithIds(job.collate),
        callbacks=[_TimeLimit(recipe.training.max_minutes)],
    )
    trainer.validation, trainer.decode = job.validation, job.decode
    if recipe.training.ema is not None:
        trainer.average = WeightAverage(job.learner, recipe.training.ema)
        trainer.add_callback(_Averaging(trainer.average))
        if last is not None:
            trainer.average.load(last)
    disable_progress_bar()  # of writing the files of a model, in the midst of the Trainer's own
    with freed_memory_kept():
        result = trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.average is not None:
        trainer.average.copy_to_model()
    if is_main():
        write_json(output / "history.json", trainer.state.log_history)
    return result.metrics


def training_arguments(recipe: Recipe) -> TrainingArguments:
    settings = recipe.training
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
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        seed=settings.seed,
        save_steps=settings.save_steps,
        eval_strategy="steps" if settings.evaluate_steps else "no",
        eval_steps=settings.evaluate_steps,
        metric_for_best_model=settings.best_metric if settings.evaluate_steps else None,
        greater_is_better=settings.best_metric != "loss",
        logging_steps=settings.log_steps,
        report_to=settings.loggers or "none",
        remove_unused_columns=False,
        dataloader_drop_last=True,
        dataloader_num_workers=settings.loader_workers,
        use_cpu=not torch.cuda.is_available(),
        label_names=["labels"],
    )


class _WithIds:
    """A stage's collator, with the items' study ids beside what it makes of them."""

    def __init__(self, collate: Any):
        self.collate = collate

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.collate(items), "ids": [item["id"] for item in items]}


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
    """The Trainer with whole checkpoints or none, our order of studies and our validation."""

    validation: Validation | None = None
    average: WeightAverage | None = None
    decode: Callable[[dict[str, Any]], dict[str, Any]]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.studies: list[str] = []  # of the step that is being computed
        self.staging = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return EpochSampler(len(train_dataset or self.train_dataset), seed=self.args.seed)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.decode(super()._prepare_inputs(inputs))

    # --- a loss that is no number -------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        self.studies += inputs.pop("ids")
        return super().training_step(model, inputs, *args)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self._check("loss", loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._check("gradient", norm)
        self.studies = []
        return norm

    def _check(self, what: str, value: Any) -> None:
        """Stop before a weight is spoiled, so that the last checkpoint is a good one."""
        number = float(value.detach() if isinstance(value, Tensor) else value)
        if math.isfinite(number):
            return
        raise TrainingError(
            f"step {self.state.global_step + 1}: the {what} is {number} for studies "
            f"{', '.join(self.studies)}; the last checkpoint is from before it: look at these "
            "studies (data.skip leaves some out), or lower training.learning_rate."
        )

    # --- checkpoints --------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder, UNFINISHED)) if self.staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))
        unfinished = folder / UNFINISHED
        name = f"checkpoint-{self.state.global_step}"
        best = self.state.best_global_step
        if best:
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
        with guarded(unfinished, f"checkpoint {self.state.global_step}"):
            self.staging = True
            try:
                super()._save_checkpoint(model, trial)
                if self.average is not None and self.args.should_save:
                    self.average.save(unfinished / name)
            finally:
                self.staging = False
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish(unfinished / name, folder / name)
        if self.args.should_save:
            unfinished.rmdir()
            keep_only(folder, {self.state.global_step, best or 0})
        self.accelerator.wait_for_everyone()

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= best
        return best

    # --- validation ---------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure with the averaged weights, where there are any; leaves no trace in the run."""
        assert self.validation is not None and self.model is not None
        model = self.model
        model.eval()
        averaged: AbstractContextManager = self.average or nullcontext()
        with averaged, torch.random.fork_rng(), torch.no_grad():
            figures, samples = self.validation.measure(model)
        model.train()
        metrics = {f"eval_{name}": value for name, value in figures.items()}
        self.log(dict(metrics))
        if samples and self.args.should_save:
            self._keep_samples(samples)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _keep_samples(self, samples: list[dict[str, str]]) -> None:
        """To samples.jsonl, which a resumed run does not fill twice, and to TensorBoard."""
        step = self.state.global_step
        path = Path(self.args.output_dir).parent / SAMPLES
        lines = path.read_text("utf-8").splitlines() if path.is_file() else []
        rows = [row for row in map(json.loads, lines) if row["step"] < step]
        rows += [{"step": step, **sample} for sample in samples]
        with atomic_file(path) as temporary:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            temporary.write_text(text, "utf-8")
        for callback in self.callback_handler.callbacks:
            writer = getattr(callback, "tb_writer", None)
            if writer is not None:
                for sample in samples:
                    fields = (f"**{name}:** {text}" for name, text in sample.items())
                    writer.add_text(f"samples/{sample['id']}", "\n\n".join(fields), step)


class _Averaging(TrainerCallback):
    def __init__(self, average: WeightAverage):
        self.average = average

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update()


class _TimeLimit(TrainerCallback):
    """Stops after a number of minutes, and lowers the rate so that it ends low by then.

    The cosine schedule counts steps; a run cut short by the clock would end at a high rate. So
    the last fifth of the time scales the rate down to zero in a straight line. All ranks go by
    the main process's clock, or their weights would part.
    """

    def __init__(self, minutes: float | None):
        self.seconds = None if minutes is None else 60 * minutes
        self.start = time.monotonic()
        self.passed = 0.0  # share of the time

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seconds is None:
            return
        self.passed = as_on_main((time.monotonic() - self.start) / self.seconds)
        scheduler, optimizer = kwargs["lr_scheduler"], kwargs["optimizer"]
        factor = min(1.0, max(0.0, 5 * (1 - self.passed)))
        for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate * factor

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.seconds is not None and self.passed > 1:
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


def save_result(model: Any, recipe: Recipe, metrics: dict[str, float], **facts: Any) -> None:
    """Write the trained model and training.json: the recipe, what was measured, the facts."""
    from omegaconf import OmegaConf

    if not is_main():
        return
    settings = OmegaConf.to_container(OmegaConf.structured(recipe))
    with result_folder(Path(recipe.output)) as folder:
        model.save_pretrained(folder)
        model.processor.save_pretrained(folder)
        summary = {"recipe": settings, "metrics": metrics, **facts}
        write_json(folder / "training.json", json.loads(json.dumps(summary)))
