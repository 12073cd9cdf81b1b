"""One model spread over the processes of a run (FSDP2), for those that fit on no single device.

Every weight is cut along its first axis, a piece for each process, and its gradient and what the
optimizer keeps of it alike. A layer is put together for as long as it computes. Checkpoints are
written in pieces too, by all processes; the trained model is gathered on the main one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from med3dvlm.models import Med3DVLM
from med3dvlm.train.ranks import is_main, own_device, processes

FOLDER = "shards"  # in a checkpoint


class Shards:
    """A learner spread over the processes of a run, in place."""

    def __init__(self, learner: nn.Module):
        """Cut `learner`, the same on every process, and move each process's pieces to its device.

        Its batch statistics stay whole: buffers are not cut.
        """
        self.learner: Any = learner
        self.double = _without_weights(learner)
        _lengthen_scalars(learner)
        mesh = init_device_mesh(own_device().type, (processes(),))
        for unit in _units(learner):
            fully_shard(unit, mesh=mesh)
        fully_shard(learner, mesh=mesh)

    def share_buffers(self) -> None:
        """Give all processes the main one's batch statistics, as DistributedDataParallel does."""
        buffers = [b for b in self.learner.buffers() if b.is_floating_point()]
        if buffers:
            together = torch.cat([b.detach().float().flatten() for b in buffers])
            dist.broadcast(together, 0)
            for buffer, part in zip(
                buffers, together.split([b.numel() for b in buffers]), strict=True
            ):
                buffer.copy_(part.view_as(buffer))

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Parts of the model may be called on their own while it lasts, on all processes alike."""
        self._put_away()
        self.learner.unshard()
        try:
            yield
        finally:
            self._put_away()

    def _put_away(self) -> None:
        """Free what a forward without a backward has left put together."""
        for module in self.learner.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
            if isinstance(module, Med3DVLM):
                module.forget()  # it knows weights by their places, which pieces come back to

    def gather(self) -> Any:
        """The whole learner as it was before it was cut, on the CPU of the main process.

        None on the others, which have to call it too.
        """
        self._put_away()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.learner, options=options)
        if not is_main():
            return None
        double = self.double
        weights = {
            name: weights[name].view(tensor.shape) for name, tensor in double.state_dict().items()
        }
        double.load_state_dict(weights, assign=True)
        for module in double.modules():
            if isinstance(module, PreTrainedModel):
                module.tie_weights()
        return double

    # --- checkpoints --------------------------------------------------------------------------

    def save(self, checkpoint: Path, optimizer: Any, mean: dict[str, Tensor]) -> None:
        """Write what learns, what the optimizer keeps, and the running mean, if any.

        Raises:
            OSError: if it cannot be written, on every process.
        """
        state = {**self._weights(), **self._optimizer(optimizer), **_mean(mean)}
        with _one_error():
            dcp.save(state, checkpoint_id=checkpoint / FOLDER)

    def load_weights(self, checkpoint: Path) -> None:
        state = self._weights()
        with _one_error():
            dcp.load(state, checkpoint_id=checkpoint / FOLDER)
        partial = StateDictOptions(strict=False)  # frozen weights are not in it
        set_model_state_dict(self.learner, state["model"], options=partial)

    def load_optimizer(self, checkpoint: Path, optimizer: Any) -> None:
        state = self._optimizer(optimizer)
        with _one_error():
            dcp.load(state, checkpoint_id=checkpoint / FOLDER)
        set_optimizer_state_dict(self.learner, optimizer, state["optimizer"])

    def load_mean(self, checkpoint: Path, mean: dict[str, Tensor]) -> None:
        with _one_error():
            dcp.load(_mean(mean), checkpoint_id=checkpoint / FOLDER)

    def _weights(self) -> dict[str, Any]:
        self._put_away()
        learning = StateDictOptions(ignore_frozen_params=True)
        return {"model": get_model_state_dict(self.learner, options=learning)}

    def _optimizer(self, optimizer: Any) -> dict[str, Any]:
        return {"optimizer": get_optimizer_state_dict(self.learner, optimizer)}


def own(tensor: Tensor) -> Tensor:
    """This process's piece of a tensor that is spread over several; else the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _mean(mean: dict[str, Tensor]) -> dict[str, Any]:
    return {"mean": mean} if mean else {}


def _without_weights(learner: nn.Module) -> nn.Module:
    """Its double, with parameters that have a shape and no values."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in learner.parameters()
    }
    return copy.deepcopy(learner, empty)


def _lengthen_scalars(learner: nn.Module) -> None:
    """Make parameters without an axis, which cannot be cut, ones with an axis of length 1."""
    for module in learner.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.ndim == 0:
                longer = nn.Parameter(p.detach().reshape(1), requires_grad=p.requires_grad)
                setattr(module, name, longer)


def _units(learner: nn.Module) -> list[nn.Module]:
    """The layers that are put together one at a time, the inner ones first.

    They are what the parts of the model name as not to be split, and the embeddings and the last
    layer of a language model that has them apart.
    """
    parts = [module for module in learner.modules() if isinstance(module, PreTrainedModel)]
    names = {name for part in parts for name in part._no_split_modules or ()}
    units = [module for module in learner.modules() if type(module).__name__ in names]
    for part in parts:
        last = part.get_output_embeddings()
        if last is not None and last.weight is not part.get_input_embeddings().weight:
            units += [part.get_input_embeddings(), last]
    return list(dict.fromkeys(reversed(units)))


@contextmanager
def _one_error() -> Iterator[None]:
    """Turn what the processes report together, which is no Exception, into the first's error."""
    try:
        yield
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise OSError(f"{type(first).__name__}: {first}".strip(": ")) from error
