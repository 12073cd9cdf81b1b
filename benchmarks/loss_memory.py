"""Peak memory and time of the sigmoid loss, forward and backward: in blocks, and as one matrix.

    python benchmarks/loss_memory.py [--batch 4096] [--dim 768]

Each form in a process of its own; memory is what its resident size grew by at its highest, over
what it was with the features made and a small loss computed once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import time

import torch
from torch.nn import functional as F

from med3dvlm.losses import ring_siglip_loss, siglip_loss

FORMS = {"one matrix": siglip_loss, "in blocks": ring_siglip_loss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=768)
    options = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{options.batch} pairs of {options.dim}, float32, forward and backward")
    spawn = multiprocessing.get_context("spawn")
    found = {}
    for name in FORMS:
        with spawn.Pool(1) as pool:
            found[name] = pool.apply(measure, (name, options.batch, options.dim))
        mb, seconds = found[name]
        print(f"{name:<12} {mb:8.1f} MB  {seconds:6.2f} s")
    (whole, slow), (blocks, fast) = found.values()
    print(f"blocks need 1/{whole / blocks:.1f} of the memory and {fast / slow:.2f} of the time")


def measure(name: str, batch: int, dim: int) -> tuple[float, float]:
    """(MB, seconds)."""
    t, b = (torch.tensor(value, requires_grad=True) for value in (2.3, -10.0))

    def run(count: int) -> None:
        x, y = (part[:count].detach().requires_grad_() for part in features)
        FORMS[name](x, y, t_prime=t, bias=b).backward()

    features = F.normalize(torch.randn(2, batch, dim), dim=-1)
    spare = torch.ones(2, batch, dim)  # the gradients themselves, which either form needs
    run(8)
    del spare
    before = peak_mb()
    began = time.perf_counter()
    run(batch)
    return peak_mb() - before, time.perf_counter() - began


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
