"""The sigmoid loss, forward and backward: in blocks, against the whole matrix at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from med3dvlm.benchmark.measure import Ceiling, Form, Work, compare, machine
from med3dvlm.evaluate.tables import Results
from med3dvlm.losses import ring_siglip_loss, siglip_loss

FORMS = {"one matrix": siglip_loss, "in blocks": ring_siglip_loss}


def benchmark_loss(
    *, batch: int = 4096, dim: int = 768, runs: int = 5, memory: bool = True
) -> Results:
    """Loss and gradients of `batch` pairs of `dim` features, on the CPU."""
    ceiling = Ceiling.measure()
    # three products: the logits, and what they give to the gradient of either side
    work = Work(flop=3 * 2 * batch**2 * dim, bytes=4 * 4 * batch * dim)
    forms = [Form(name, make_loss, {"name": name, "batch": batch, "dim": dim}) for name in FORMS]
    results = Results({**machine(), **ceiling.facts(), "pairs": batch, "features": dim})
    rows = compare(forms, runs=runs, work=work, ceiling=ceiling, memory=memory)
    results.add("Sigmoid loss, forward and backward, fp32", rows, shares=False)
    return results


def make_loss(name: str, batch: int, dim: int) -> Callable[[], list[Tensor]]:
    """Gives the loss and its gradients, of the features, t' and b."""
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(2, batch, dim, generator=generator), dim=-1)

    def run(count: int = batch) -> list[Tensor]:
        images, texts = (part[:count].detach().requires_grad_() for part in features)
        t, b = (torch.tensor(value, requires_grad=True) for value in (2.3, -10.0))
        loss = FORMS[name](images, texts, t_prime=t, bias=b)
        return [loss, *torch.autograd.grad(loss, (images, texts, t, b))]

    run(8)  # so that memory is that of the work, not of loading libraries
    return run
