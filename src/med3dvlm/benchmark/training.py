"""One training step of the encoder, forward and backward, against the paper's form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from med3dvlm.benchmark.encoder import encoder_work, example_encoder
from med3dvlm.benchmark.measure import Ceiling, Form, Work, closeness, compare, machine
from med3dvlm.benchmark.plain import PlainDCFormer
from med3dvlm.evaluate.tables import Results, Row


def benchmark_training_step(
    *,
    variant: str = "small",
    size: Sequence[int] = (128, 256, 256),
    batch: int = 2,
    device: str = "cpu",
    runs: int = 3,
    memory: bool = True,
) -> Results:
    """Time and memory of a step, and how far its gradients agree with the plain form's in fp32.

    The plain form is a loop of PyTorch; the other has what `med3dvlm train` puts around it.
    """
    shared = {"variant": variant, "size": tuple(size), "batch": batch, "device": device}
    forms = [
        Form(
            f"{'plain' if plain else 'DCFormer'}, {precision}",
            make_step,
            {"plain": plain, "bf16": precision == "bf16", **shared},
            precision,
            trains=not plain,
        )
        for precision in ("fp32", "bf16")
        for plain in (True, False)
    ]
    ceiling = Ceiling.measure(device)
    forward = encoder_work(variant, size, batch)
    # the backward pass has two products for each of the forward pass
    work = Work(flop=3 * forward.flop, bytes=3 * forward.bytes)
    results = Results({**machine(device), **ceiling.facts(), "variant": variant})
    rows = compare(forms, runs=runs, agree=agree, work=work, ceiling=ceiling, memory=memory)
    grid = "×".join(map(str, size))
    results.add(f"Training step, {batch} × {grid}", rows, shares=False)
    return results


def make_step(
    plain: bool, bf16: bool, variant: str, size: tuple, batch: int, device: str
) -> Callable[[], list[Tensor]]:
    """Gives a loss and its gradient for every parameter, as one vector."""
    model = example_encoder(variant).train()
    form = (PlainDCFormer.like(model) if plain else model).to(device)
    parameters = dict(form.named_parameters())
    generator = torch.Generator().manual_seed(0)
    volumes = torch.rand(batch, 1, *size, generator=generator).to(device)
    aim = torch.randn(batch, model.config.hidden_size, generator=generator).to(device)

    def run() -> list[Tensor]:
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16):
            pooled = model.pool(form(volumes))
        loss = (pooled.float() - aim).square().mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        return [loss, torch.cat([gradient.flatten() for gradient in gradients])]

    return run


def agree(plain: list[Tensor], other: list[Tensor]) -> Row:
    """How far loss and gradient agree."""
    return {
        "error of the loss": closeness(plain[0], other[0])["error"],
        "cosine of the gradient": closeness(plain[1], other[1])["cosine"],
    }
