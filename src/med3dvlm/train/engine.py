"""The one engine under all three stages: the Trainer of transformers, told what a recipe says."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from med3dvlm.files import atomic_file, write_json
from med3dvlm.train.average import WeightAverage
from med3dvlm.train.checkpoints import (
    UNFINISHED,
    TrainingError,
    decayed_in,
    guarded,
    keep_only,
    last_checkpoint,
    publish,
    readable,
    result_folder,
)
from med3dvlm.train.clock import TimeLimit
from med3dvlm.train.memory import freed_memory_kept
from med3dvlm.train.ranks import as_on_main, is_main, main_first
from med3dvlm.train.recipe import Recipe, RecipeError
from med3dvlm.train.record import checkpoints_of, differences, has_record, write_record
from med3dvlm.train.sharding import FOLDER, Shards

SAMPLES, HISTORY, SUMMARY = "samples.jsonl", "history.json", "training.json"
SCHEDULER = "scheduler.pt"  # as the Trainer names it


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


def fit(job: Job, recipe: Recipe) -> tuple[Any, dict[str, float] | None]:
    """Train the job's learner; goes on from the last checkpoint in the output folder, if any.

    It then has the weights that `training.result` names.

    What a run that was killed goes on with (weights, optimizer, schedule, order of the studies,
    random numbers, the mean of the weights) is what it had, so on one machine it ends in the same
    weights, bit for bit. Only `max_minutes` is not repeatable: it cuts by the clock.

    Returns:
        The learner; of one that was spread over processes a whole one on the main process, and
        None on the others. And what the Trainer measured since this start (loss, seconds, samples
        per second), the last step, and the one whose weights the learner has; None where the run
        was at its end when it was started again, and its result is written.

    Raises:
        TrainingError: where the loss is no number any more, or a checkpoint cannot be saved or
            read.
    """
    with main_first():
        last = last_checkpoint(checkpoints_of(recipe))
        if last is None and is_main():
            write_record(recipe)
    trainer = _trainer(job, recipe, last)
    disable_progress_bar()  # of writing the files of a model, in the midst of the Trainer's own
    with freed_memory_kept(), redirect_stdout(sys.stderr):  # where the Trainer prints its log
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    step = trainer.state.global_step
    chosen = trainer.load_best() if recipe.training.result == "best" else step
    if trainer.average is not None:
        trainer.average.copy_to_model()
    learner = job.learner if trainer.shards is None else trainer.shards.gather()
    if not trainer.went_on and _is_written(recipe, chosen, step):
        return learner, None
    return learner, {**_close(trainer, Path(recipe.output)), "step": step, "result_step": chosen}


def _trainer(job: Job, recipe: Recipe, last: Path | None) -> _Trainer:
    """Ready to go on from the checkpoint `last`, or to begin."""
    trainer = _Trainer(
        job.learner,
        training_arguments(recipe),
        shards=Shards(job.learner) if recipe.training.shard else None,
        train_dataset=job.dataset,
        eval_dataset=job.validation.dataset if job.validation else None,
        data_collator=_WithIds(job.collate),
        callbacks=[clock := TimeLimit(recipe.training.max_minutes)],
    )
    trainer.validation, trainer.decode, trainer.clock = job.validation, job.decode, clock
    if recipe.training.ema is not None:
        trainer.average = WeightAverage(job.learner, recipe.training.ema)
        trainer.add_callback(_Averaging(trainer.average))
    if last is not None:
        with readable(last):
            TrainerState.load_from_json(str(last / "trainer_state.json"))
            trainer.decayed_before = decayed_in(last)
            trainer.load_average(last)
    return trainer


def _is_written(recipe: Recipe, chosen: int, last: int) -> bool:
    """Whether the model in the output folder is this run's, with the weights of step `chosen`.

    Args:
        last: the step of the run's last checkpoint, whose weights were the result before there
            was a choice.
    """
    summary = Path(recipe.output, SUMMARY)
    if not (summary.is_file() and Path(recipe.output, "config.json").is_file()):
        return False
    written = json.loads(summary.read_text("utf-8"))
    if has_record(recipe) and differences(written["recipe"], recipe):
        return False  # of an earlier run with this output
    return written["metrics"].get("result_step", last) == chosen


def _close(trainer: _Trainer, output: Path) -> dict[str, float]:
    """Write what a run logged to history.json; returns the totals at its end.

    One that was at its end already has the totals of before, or, where a crash came between, none.
    """
    path, log = output / HISTORY, trainer.state.log_history
    if not trainer.went_on and path.is_file():
        known = json.loads(path.read_text("utf-8"))
        if known and known[:-1] == log:
            return known[-1]
    if is_main():
        write_json(path, log)
    return log[-1] if trainer.went_on else {}


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
    clock: TimeLimit
    decayed_before: int | None = None  # tensors, in the checkpoint that the run goes on from

    def __init__(self, *args: Any, shards: Shards | None = None, **kwargs: Any):
        self.shards = shards
        super().__init__(*args, **kwargs)
        # the pieces of a spread model take the mean of their gradients themselves
        self.is_distributed_loading_by_transformers = shards is not None
        if shards is not None:  # or the layers' weights in bf16 would be kept until the last one
            self.accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
        self.studies: list[str] = []  # of the step that is being computed
        self.staging = False

    @property
    def went_on(self) -> bool:
        """Whether a step was taken since this start."""
        return self.state.global_step > self._initial_global_step

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self.shards is None:  # its pieces are where they belong
            super()._move_model_to_device(model, device)

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager:
        """Not at all: whole gradients would be kept until the last part of an accumulated batch."""
        return nullcontext()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return EpochSampler(len(train_dataset or self.train_dataset), seed=self.args.seed)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """What the loss of an accumulated batch is divided by, on all ranks together.

        With weighted labels, the sum of their weights and not their number: else it would matter
        how a batch is cut into parts.
        """
        if not batch_samples or "loss_weights" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        sums = [batch["loss_weights"][:, 1:].sum() for batch in batch_samples]
        return self.accelerator.gather(torch.stack(sums).sum().to(device)).sum()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self.decode(super()._prepare_inputs(inputs))

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """The checkpoint's, but saving, measuring and logging as often as the recipe says now."""
        place = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return place

    def _run_epoch(self, **epoch: Any) -> None:
        """Nothing, where the run was at its end when it was started again.

        The Trainer's own would take a step before it looks: the end can lie within an epoch.
        """
        if self.state.global_step >= self.state.max_steps or self.clock.was_up:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**epoch)

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """A start that found nothing to do logs nothing, or its zeros would be taken for totals."""
        if self.went_on:
            super().log(logs, *args)

    def _get_learning_rate(self) -> float:
        """The rate that the step was taken with: the time limit lowers the schedule's."""
        assert self.optimizer is not None
        return float(self.optimizer.param_groups[0]["lr"])

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices and kernels: scales and shifts, whatever their names, are not to shrink.

        A run that decayed them goes on so, for its optimizer is grouped by it.
        """
        names = super().get_decay_parameter_names(model)
        learning = {name: p.ndim for name, p in model.named_parameters() if p.requires_grad}
        if sum(name in learning for name in names) == self.decayed_before:
            return names
        return [name for name in names if learning.get(name, 0) >= 2]

    # --- a loss that is no number -------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        self.studies += inputs.pop("ids")
        loss = super().training_step(model, inputs, *args)
        if self.shards is not None:
            self.shards.share_statistics()
        return loss

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
                if self.average is not None and self.shards is None and self.args.should_save:
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

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing for a spread model, whose pieces go with the optimizer's."""
        if self.shards is None:
            super().save_model(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.shards is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        mean = {} if self.average is None else self.average.mean
        self.shards.save(Path(output_dir), self._own_optimizer(), mean)
        assert self.lr_scheduler is not None
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER))

    def _own_optimizer(self) -> torch.optim.Optimizer:
        """The one inside of Accelerate's."""
        prepared: Any = self.optimizer
        return prepared.optimizer

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= best
        return best

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with readable(Path(resume_from_checkpoint)):
            self._load_weights(resume_from_checkpoint, model)

    def _load_weights(self, checkpoint: str, model: Any = None) -> None:
        if self.shards is None:
            super()._load_from_checkpoint(checkpoint, model)
        else:
            self.shards.load_weights(Path(checkpoint))

    def load_average(self, checkpoint: Path) -> None:
        """The running mean that the checkpoint was saved with, where this run keeps one."""
        if self.average is None:
            return
        if self.shards is None:
            self.average.load(checkpoint)
        else:
            if not self.average.mean:
                self.average.update()  # tensors of the right kind, to be filled
            self.shards.load_mean(checkpoint, self.average.mean)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with readable(Path(checkpoint)):
            self._check_files(Path(checkpoint))
            if self.shards is None:
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            assert self.lr_scheduler is not None
            self.shards.load_optimizer(Path(checkpoint), self._own_optimizer())
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER)))

    def _check_files(self, checkpoint: Path) -> None:
        """Refuse what the Trainer would go on without, to other weights."""
        optimizer = "optimizer*" if self.shards is None else FOLDER
        for pattern in (optimizer, SCHEDULER, "rng_state*.pth"):
            if not any(checkpoint.glob(pattern)):
                raise FileNotFoundError(f"it has no {pattern}")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with readable(Path(checkpoint)):
                super()._load_rng_state(checkpoint)

    def load_best(self) -> int:
        """Put the weights of the best checkpoint in the place of the last; returns its step.

        Raises:
            TrainingError: if there is none, or it cannot be read.
        """
        best, last = self.state.best_global_step, self.state.global_step
        remedy = "start the run again with training.result=last"
        if not best:
            raise TrainingError(
                f"training.result is best, but none of the {last} steps of the run was measured: "
                f"{remedy}."
            )
        if best != last:
            folder = Path(self.args.output_dir, f"checkpoint-{best}")
            with readable(folder, remedy):
                self._load_weights(str(folder))
                self.load_average(folder)
        return best

    # --- validation ---------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure with the averaged weights, where there are any; leaves no trace in the run.

        Every process measures, and takes the main one's figures: by them all must agree which
        step is the best, and batch statistics differ.
        """
        assert self.validation is not None and self.model is not None
        model = self.model
        model.eval()
        with ExitStack() as stack:
            if self.average is not None:
                stack.enter_context(self.average)
            if self.shards is not None:
                stack.enter_context(self.shards.at_hand())
            stack.enter_context(torch.random.fork_rng())
            stack.enter_context(torch.no_grad())
            figures, samples = self.validation.measure(model)
        model.train()
        metrics = {f"eval_{name}": as_on_main(value) for name, value in figures.items()}
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


def learn_in_fp32(model: nn.Module) -> None:
    """Hold the parts that learn in fp32: most steps of AdamW are less than bf16 can tell.

    The others keep their precision.
    """
    for child in model.children():
        if any(parameter.requires_grad for parameter in child.parameters()):
            child.float()


def trainable_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """For each part of the model (parameters that learn, parameters in all)."""
    return {
        name: (
            sum(p.numel() for p in child.parameters() if p.requires_grad),
            sum(p.numel() for p in child.parameters()),
        )
        for name, child in model.named_children()
    }


def save_result(model: Any, recipe: Recipe, metrics: dict[str, float] | None, **facts: Any) -> None:
    """Write the trained model and training.json: the recipe, what was measured, the facts.

    Args:
        metrics: what `fit` returned; None where all of it is written.
    """
    from omegaconf import OmegaConf

    if metrics is None or not is_main():
        return
    settings = OmegaConf.to_container(OmegaConf.structured(recipe))
    with result_folder(Path(recipe.output)) as folder:
        model.save_pretrained(folder)
        model.processor.save_pretrained(folder)
        summary = {"recipe": settings, "metrics": metrics, **facts}
        write_json(folder / SUMMARY, json.loads(json.dumps(summary)))
