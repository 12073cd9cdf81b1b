"""What a run would take, found out before it: parameters, tokens, steps, memory, time.

The recipe is followed on a few of its studies up to the first step, so whatever would stop the
run there stops the plan. What is generated for it lies in a temporary folder that is removed.
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from med3dvlm.data.sources import Progress
from med3dvlm.data.store import STORE, Store
from med3dvlm.train import begin
from med3dvlm.train.engine import Job, trainable_parameters
from med3dvlm.train.memory import freed_memory_kept
from med3dvlm.train.ranks import own_device, processes
from med3dvlm.train.recipe import Recipe, RecipeError, TrainingRecipe, check_needs
from med3dvlm.train.sharding import Shards, own
from med3dvlm.train.studies import check_enough, held_out_ids, ids, weights

STUDIES = 32  # that are looked at
TIMED_STEPS = 3
TIMED_BYTES = 2**30  # of activations; a larger batch is timed by a part of it
GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Attributes:
    parts: for each part of the model (parameters that learn, parameters in all).
    visual_tokens: in front of each prompt; 0 for a dual encoder.
    text_tokens: mean and largest number of tokens of a text, as the model reads it.
    steps, samples: optimizer steps and studies seen, of one process.
    memory: bytes of weights, gradients, optimizer, average, activations, of one process; of a
        model that several share, its pieces, and what is gathered for a time.
    seconds_per_step, seconds: of the steps, and of the whole run.
    notes: how the figures were found.
    """

    stage: str
    device: str
    studies: int
    parts: dict[str, tuple[int, int]]
    visual_tokens: int
    text_tokens: dict[str, float]
    steps: int
    samples: int
    memory: dict[str, int]
    seconds_per_step: float
    seconds: float
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        parts = {name: {"trained": t, "parameters": n} for name, (t, n) in self.parts.items()}
        return {**asdict(self), "parts": parts, "memory_total": sum(self.memory.values())}

    def to_text(self) -> str:
        lines = [f"{'part':<20}{'parameters':>16}{'trained':>16}"]
        lines += [f"{name:<20}{n:>16,}{t:>16,}" for name, (t, n) in self.parts.items()]
        memory = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.memory.items())
        tokens = self.text_tokens
        lines += [
            f"tokens of a sample: {self.visual_tokens} visual, {tokens['mean']:.0f} of text "
            f"(at most {tokens['most']:.0f})",
            f"{self.studies:,} studies, {self.steps:,} steps, {self.samples:,} samples",
            f"memory on {self.device}: {sum(self.memory.values()) / GIB:.2f} GiB ({memory})",
            f"time: {self.seconds_per_step:.3g} s a step, {self.seconds / 3600:.2g} h in all",
            *(f"note: {note}" for note in self.notes),
            "nothing was written.",
        ]
        return "\n".join(lines)


def plan(recipe: Recipe, *, progress: Progress | None = None) -> Plan:
    """Find out what a recipe would take.

    Raises:
        RecipeError: for a recipe that cannot be followed.
    """
    check_needs(recipe)
    with tempfile.TemporaryDirectory() as scratch:
        count, probe = _probe(recipe, Path(scratch))
        check_enough(count, recipe)
        job = begin(probe, progress=progress)
        return _measure(recipe, job, count)


def _probe(recipe: Recipe, scratch: Path) -> tuple[int, Recipe]:
    """How many studies the run would train on, and the same recipe for a few of them.

    Its output is another, for what lies in the recipe's is not gone on with.
    """
    data = recipe.data
    looked_at = max(STUDIES, processes())  # begin refuses fewer than one a process
    training = replace(recipe.training, batch_size=1, evaluate_steps=None)
    validation = replace(data.validation, studies=0)
    there = all("://" in location or Path(location, STORE).is_file() for location in weights(data))
    if there:
        held_out = [[]] if data.phantoms else held_out_ids(data)
        count, skip = 0, []
        for location, out in zip(weights(data), held_out, strict=True):
            chosen = [name for name in ids(Store(location), data.split) if name not in out]
            chosen = [name for name in chosen if name not in data.skip]
            count += len(chosen)
            skip += chosen[looked_at:]
        few = replace(data, phantoms=0, skip=[*data.skip, *skip], validation=validation)
    else:
        count, folder = data.phantoms, str(scratch / "phantoms")
        few = replace(data, store=folder, phantoms=min(looked_at, count), validation=validation)
    return count, replace(recipe, data=few, training=training, output=str(scratch / "run"))


def _measure(recipe: Recipe, job: Job, count: int) -> Plan:
    settings = recipe.training
    model, learner = job.model, job.learner
    shards = Shards(learner) if settings.shard else None
    if shards is None:
        learner.to(own_device())
    device = own_device().type
    if settings.gradient_checkpointing:
        learner.activation_checkpointing_enable({"use_reentrant": False})
    lengths, positions = _text_lengths(job)
    _check_length(model, positions)
    learner.train()
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    two, three = (
        _activations(learner, _batch(job, [longest] * n), settings.precision) for n in (2, 3)
    )
    each = max(three - two, 1)  # the rest does not grow with the batch: weights in bf16
    activations = two + (settings.batch_size - 2) * each
    fitting = max(1, min(settings.batch_size, int(TIMED_BYTES / each)))
    step = _step_seconds(job, fitting, settings.precision) * settings.batch_size / fitting
    step *= settings.accumulation
    steps = settings.steps(count)
    encoding = job.encoding_s * count / len(job.dataset)
    seconds = steps * step + encoding
    notes = [
        f"texts, time and activations are those of {len(job.dataset)} studies.",
        "activations: the tensors that one forward keeps for its backward, measured with the "
        "longest sample and multiplied; weights, gradients and optimizer (AdamW): counted.",
        f"time: the median of {TIMED_STEPS} steps of {fitting} samples"
        + (", multiplied to the batch." if fitting < settings.batch_size else "."),
    ]
    if encoding > 1:
        notes.append(f"of the time, {encoding:.0f} s go to the frozen encoder, once.")
    if settings.max_minutes is not None and seconds > 60 * settings.max_minutes:
        steps = max(1, int((60 * settings.max_minutes) / step))
        seconds = 60 * settings.max_minutes + encoding
        notes.append(_cut_short(settings, steps, settings.steps(count)))
    return Plan(
        stage=recipe.stage,
        device=device,
        studies=count,
        parts=trainable_parameters(model),
        visual_tokens=getattr(model, "num_visual_tokens", 0),
        text_tokens={"mean": statistics.fmean(lengths), "most": max(lengths)},
        steps=steps,
        samples=steps * settings.batch_size * settings.accumulation,
        memory=_memory(learner, settings.ema, shards) | {"activations": activations},
        seconds_per_step=step,
        seconds=seconds,
        notes=notes,
    )


def _cut_short(settings: TrainingRecipe, steps: int, laid_out: int) -> str:
    """What it means for the rate that the clock ends a run after so many steps of its schedule."""
    note = (
        f"training.max_minutes ends the run after {settings.max_minutes:g} minutes, about step "
        f"{steps:,} of the {laid_out:,} that the schedule is laid out for"
    )
    share = 0 if settings.schedule == "constant" else settings.warmup_share
    warm_up = math.ceil(share * laid_out)
    if steps > warm_up:
        return f"{note}."
    return (
        f"{note}, in a warm-up of {warm_up:,}: the rate never comes to training.learning_rate; "
        "lower training.warmup_share, or lay out fewer steps (training.epochs, training.max_steps)."
    )


def step_flop(job: Job, recipe: Recipe) -> int:
    """Floating-point operations of an optimizer step: forward and backward of its batches.

    Counted are matrix products and convolutions, two for a multiplication with its addition; the
    model is left as it is.
    """
    learner = copy.deepcopy(job.learner).train()
    batch = _batch(job, range(recipe.training.batch_size))
    # fused attention is not counted on every device; the plain one computes the same
    with (
        torch.random.fork_rng(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        _forward(learner, batch, "fp32").backward()
    return counter.get_total_flops() * recipe.training.accumulation


def encoding_flop(job: Job) -> int:
    """What a frozen encoder takes to see every study once; 0 where it learns."""
    if getattr(job.dataset, "features", None) is None:
        return 0
    volumes = next(iter(job.dataset.store.batches(2)))
    with (
        torch.inference_mode(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        job.model.eval().encode(job.model._to_device(volumes))
    return counter.get_total_flops() * len(job.dataset) // len(volumes)


def _batch(job: Job, numbers: Iterable[int]) -> dict[str, Tensor]:
    device = next(job.learner.parameters()).device
    return _to_device(job, [job.dataset[i] for i in numbers], device)


def _to_device(job: Job, items: list[Any], device: torch.device) -> dict[str, Tensor]:
    return job.decode({name: tensor.to(device) for name, tensor in job.collate(items).items()})


def _text_lengths(job: Job) -> tuple[list[int], int]:
    """Tokens of each sample's text, and how many positions the longest needs with visual tokens.

    The turns of a sample have the same positions.
    """
    visual = getattr(job.model, "num_visual_tokens", 0)
    batches = [job.collate([job.dataset[i]]) for i in range(4 * len(job.dataset))]
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    positions = [
        int(batch["position_ids"].max()) + 1 if "position_ids" in batch else length
        for batch, length in zip(batches, lengths, strict=True)
    ]
    return [length - visual for length in lengths], max(positions)


def _check_length(model: Any, most: int) -> None:
    limit = getattr(model.config.text_config, "max_position_embeddings", None)
    if limit is not None and most > limit:
        raise RecipeError(
            f"the longest sample is {most} tokens with its visual tokens, but the model reads "
            f"max_position_embeddings = {limit}: choose another language model, fewer visual "
            "tokens (model.low_tokens, model.high_tokens), or shorter tasks."
        )


def _forward(learner: nn.Module, batch: dict[str, Tensor], precision: str) -> Tensor:
    device = next(learner.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
        return learner(**batch).loss


def _activations(learner: nn.Module, batch: dict[str, Tensor], precision: str) -> int:
    """Bytes of what the forward keeps for the backward, weights apart."""
    kept: dict[int, int] = {}
    at_work: list[set[int]] = []  # of the modules that compute, one within the other: the weights

    def place(tensor: Tensor) -> int:
        return own(tensor.detach()).untyped_storage().data_ptr()

    def begins(module: nn.Module, *_: Any) -> None:
        """Of a spread model, weights are where they are only while their layer computes."""
        at_work.append({place(p) for p in module.parameters()})

    def ends(*_: Any) -> None:
        at_work.pop()

    def note(tensor: Tensor) -> Tensor:
        if not any(place(tensor) in weights for weights in at_work):
            kept[place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = [module.register_forward_pre_hook(begins) for module in learner.modules()]
    hooks += [module.register_forward_hook(ends, prepend=True) for module in learner.modules()]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = _forward(learner, batch, precision)
    for hook in hooks:
        hook.remove()
    total = sum(kept.values())  # all are alive as long as the loss is
    loss.backward()  # a spread model puts its layers away by it
    learner.zero_grad()
    return total


def _step_seconds(job: Job, size: int, precision: str) -> float:
    learning = [p for p in job.learner.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.0)
    seconds = []
    with freed_memory_kept():  # as in the run itself
        for number in range(TIMED_STEPS + 1):
            began = time.monotonic()
            items = [job.dataset[(number * size + i) % len(job.dataset)] for i in range(size)]
            device = learning[0].device
            batch = _to_device(job, items, device)
            _forward(job.learner, batch, precision).backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - began)
    return statistics.median(seconds[1:])  # the first warms up


def _memory(learner: nn.Module, ema: float | None, shards: Shards | None) -> dict[str, int]:
    trained = sum(own(p).nbytes for p in learner.parameters() if p.requires_grad)
    return {
        "weights": sum(own(t).nbytes for t in [*learner.parameters(), *learner.buffers()]),
        "gradients": trained,
        "optimizer": 2 * trained,
        **({"average": trained} if ema is not None else {}),
        **({"gathered": shards.gathered} if shards is not None else {}),
    }
