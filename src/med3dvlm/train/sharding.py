"""One model spread over the processes of a run (FSDP2), for those that fit on no single device.

Every weight is cut along its first axis, a piece for each process, and its gradient and what the
optimizer keeps of it alike. A layer is put together for as long as it computes. Checkpoints are
written in pieces too, by all processes; the trained model is gathered on the main one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
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
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import swap_tensors
from transformers import PreTrainedModel

from med3dvlm.models import Med3DVLM
from med3dvlm.train.checkpoints import TrainingError
from med3dvlm.train.ranks import is_main, own_device, processes

FOLDER = "shards"  # in a checkpoint


class Shards:
    """A learner spread over the processes of a run, in place.

    Attributes:
        gathered: bytes of what a process holds whole for a time, beside its pieces: the root from
            forward to backward, and a layer while the next is fetched, with their gradients.
    """

    def __init__(self, learner: nn.Module):
        """Cut `learner`, and move this process's pieces to its device; buffers stay whole.

        Raises:
            TrainingError: if the processes' weights are not the same: the pieces would not fit.
        """
        _check_same(learner)
        self.learner: Any = learner
        self.double = _without_weights(learner)
        _lengthen_scalars(learner)
        units = _units(learner)
        self.gathered = _gathered(learner, units)
        mesh = init_device_mesh(own_device().type, (processes(),))
        for unit in units:
            fully_shard(unit, mesh=mesh)
        fully_shard(learner, mesh=mesh)

    def share_statistics(self) -> None:
        """Give all processes the main one's batch statistics, as DistributedDataParallel does."""
        norms = [m for m in self.learner.modules() if isinstance(m, _BatchNorm) and m.training]
        found = [b for norm in norms for b in (norm.running_mean, norm.running_var)]
        statistics = [b for b in found if b is not None]
        if not statistics:
            return
        together = torch.cat(statistics)
        dist.broadcast(together, 0)
        for own_one, part in zip(
            statistics, together.split([len(b) for b in statistics]), strict=True
        ):
            own_one.copy_(part)

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Parts of the model may be called on their own while it lasts, on all processes alike.

        What a language model says next is the main process's on all: were it to end a text on one
        of them alone, the others would wait for it.
        """
        models = [m.language_model for m in self.learner.modules() if isinstance(m, Med3DVLM)]
        hooks = [model.register_forward_hook(_as_the_main_one_says) for model in models]
        self._put_away()
        self.learner.unshard()
        try:
            yield
        finally:
            self._put_away()
            for hook in hooks:
                hook.remove()

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
        for name, empty in list(self.double.named_parameters()):  # what is tied is there once
            whole = weights[name].view(empty.shape)
            swap_tensors(empty, nn.Parameter(whole, requires_grad=empty.requires_grad))
        for name, buffer in self.double.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])
        return self.double

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
        kept = FileSystemReader(checkpoint / FOLDER).read_metadata().state_dict_metadata
        moments = state["optimizer"]["state"]
        for name in list(moments):  # of what never had a gradient, nothing is kept
            if f"optimizer.state.{name}.step" not in kept:
                del moments[name]
        with _one_error():
            dcp.load(state, checkpoint_id=checkpoint / FOLDER)
        partial = StateDictOptions(strict=False)
        set_optimizer_state_dict(self.learner, optimizer, state["optimizer"], options=partial)

    def load_mean(self, checkpoint: Path, mean: dict[str, Tensor]) -> None:
        with _one_error():
            dcp.load(_mean(mean), checkpoint_id=checkpoint / FOLDER)

    def _weights(self) -> dict[str, Any]:
        self._put_away()
        state = get_model_state_dict(self.learner)
        for name, p in self.learner.named_parameters(remove_duplicate=False):
            if not p.requires_grad:
                state.pop(name, None)
        return {"model": state}

    def _optimizer(self, optimizer: Any) -> dict[str, Any]:
        return {"optimizer": get_optimizer_state_dict(self.learner, optimizer)}


def own(tensor: Tensor) -> Tensor:
    """This process's piece of a tensor that is spread over several; else the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _mean(mean: dict[str, Tensor]) -> dict[str, Any]:
    return {"mean": mean} if mean else {}


def _check_same(learner: nn.Module) -> None:
    """By three values of each parameter, which differ where any was drawn or read otherwise."""
    seen = [p.detach().flatten()[[0, p.numel() // 2, -1]] for p in learner.parameters()]
    marks: list[float] = [0.0] * processes()
    dist.all_gather_object(marks, math.fsum(float(value) for values in seen for value in values))
    if len(set(marks)) > 1:
        raise TrainingError(
            "the processes did not load the same weights: give all of them the same checkpoint to "
            "start from."
        )


def _without_weights(learner: nn.Module) -> nn.Module:
    """Its double in training mode, with parameters that have a shape and no values."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in learner.parameters()
    }
    return copy.deepcopy(learner, empty).train()


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


def _gathered(learner: nn.Module, units: list[nn.Module]) -> int:
    counted: set[int] = set()
    sizes = []  # of each unit, and last of the root: (bytes, bytes of what learns)
    for unit in [*units, learner]:
        own_ones = [p for p in unit.parameters() if id(p) not in counted]
        counted |= {id(p) for p in own_ones}
        learning = sum(p.nbytes for p in own_ones if p.requires_grad)
        sizes.append((sum(p.nbytes for p in own_ones), learning))
    *layers, root = sizes
    return sum(root) + max((2 * whole + learning for whole, learning in layers), default=0)


def _as_the_main_one_says(_: nn.Module, inputs: Any, out: Any) -> Any:
    out.logits = out.logits.contiguous()
    dist.broadcast(out.logits, 0)
    return out


@contextmanager
def _one_error() -> Iterator[None]:
    """Turn what the processes report together, which is no Exception, into the first's error."""
    try:
        yield
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        if isinstance(first, MemoryError | torch.OutOfMemoryError):
            raise first from error
        raise OSError(f"{type(first).__name__}: {first}".strip(": ")) from error
