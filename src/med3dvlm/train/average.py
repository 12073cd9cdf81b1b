"""A running mean of the weights (EMA): what a run has learned, less the noise of its last steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from med3dvlm.train.checkpoints import TrainingError
from med3dvlm.train.sharding import own

FILE = "ema.safetensors"


class WeightAverage:
    """The exponential mean of whatever a run changes: weights that learn, and running statistics.

    Of torch's AveragedModel it has the arithmetic, but not the copy of the whole model, which
    under LoRA would be nearly all frozen. As a context manager it stands in for the weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.mean_in = get_ema_multi_avg_fn(decay)
        kept = model.state_dict().keys()
        statistics = {
            name: buffer
            for name, buffer in model.named_buffers()
            if buffer.is_floating_point() and name in kept
        }
        learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.live: dict[str, Tensor] = {**learning, **statistics}
        self.mean: dict[str, Tensor] = {}
        self.aside: list[Tensor] = []

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are; the first time they are the mean."""
        if not self.mean:
            self.mean = {name: tensor.detach().clone() for name, tensor in self.live.items()}
        else:
            self.mean_in(*(list(map(own, of.values())) for of in (self.mean, self.live)), 1)

    @torch.no_grad()
    def copy_to_model(self) -> None:
        for name, tensor in self.mean.items():
            self.live[name].copy_(tensor)

    def __enter__(self) -> None:
        self.aside = [tensor.detach().clone() for tensor in self.live.values()]
        self.copy_to_model()

    @torch.no_grad()
    def __exit__(self, *_: Any) -> None:
        for tensor, kept in zip(self.live.values(), self.aside, strict=True):
            tensor.copy_(kept)
        self.aside = []

    def save(self, folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in self.mean.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Go on from a checkpoint's mean.

        Raises:
            TrainingError: for a checkpoint of a run that kept none, or of another model.
        """
        path = folder / FILE
        saved = load_file(path) if path.is_file() else {}
        shapes = {name: tensor.shape for name, tensor in self.live.items()}
        if {name: tensor.shape for name, tensor in saved.items()} != shapes:
            raise TrainingError(
                f"{path} does not hold the mean of this run's weights: leave training.ema as it "
                "was when the run began, or choose another output."
            )
        self.mean = {name: saved[name].to(tensor.device) for name, tensor in self.live.items()}
