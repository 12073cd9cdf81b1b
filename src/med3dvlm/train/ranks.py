"""Several processes as one run: who writes, who goes first, what all must agree on.

`torchrun` or `accelerate launch` starts them; the Trainer of transformers, which spreads the
batches and averages the gradients, finds them through Accelerate, and so does this.

A run's model is loaded on the CPU, for it may not fit on one device; the Trainer moves it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState


def _state() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())


def processes() -> int:
    """How many share the run."""
    return _state().num_processes


def is_main() -> bool:
    """Whether this process writes what the run leaves behind; true for one on its own."""
    return _state().is_main_process


def own_device() -> torch.device:
    """The device that this process computes on: each rank of a machine has another."""
    return torch.device(_state().device or "cpu")


@contextmanager
def encoder_at_work(model: Any) -> Iterator[None]:
    """While it lasts, the volume encoder is on this process's own device, ready to encode."""
    encoder, device = model.eval().vision_encoder, own_device()
    if device.type != "cpu":
        encoder.train().eval().to(device)  # train() ends what `load` arranged for a CPU
    yield
    encoder.to("cpu")


@contextmanager
def main_first() -> Iterator[None]:
    """The block is run by the main process, and by the others when that is done."""
    with _state().main_process_first():
        yield


def as_on_main(value: float) -> float:
    """The main process's value, on all."""
    state = _state()
    if state.num_processes == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=state.device)
    dist.broadcast(shared, 0)
    return float(shared)
