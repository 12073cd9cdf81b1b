"""Several processes as one run: who writes, who goes first, what all must agree on.

`torchrun` or `accelerate launch` starts them; the Trainer of transformers, which spreads the
batches and averages the gradients, finds them through Accelerate, and so does this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import PartialState


def _state() -> PartialState:
    return PartialState(cpu=not torch.cuda.is_available())


def is_main() -> bool:
    """Whether this process writes what the run leaves behind; true for one on its own."""
    return _state().is_main_process


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
