"""The losses in blocks and over ranks against the same over the whole matrix."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from med3dvlm.benchmark.loss import make_loss
from med3dvlm.benchmark.measure import Form, peak_memory
from med3dvlm.losses import LOSSES, ring_siglip_loss, siglip_loss

BATCH, DIM = 8, 6


def features(count: int = BATCH, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, count, DIM, generator=generator, dtype=torch.float64)
    return x, y


def gradients(loss_of, x: torch.Tensor, y: torch.Tensor, t: float, b: float) -> list[torch.Tensor]:
    """The loss, and its gradients to features before their normalisation, t' and b."""
    leaves = [x.clone(), y.clone(), torch.tensor(t).double(), torch.tensor(b).double()]
    for leaf in leaves:
        leaf.requires_grad_()
    images, texts = (F.normalize(part, dim=-1) for part in leaves[:2])
    loss = loss_of(images, texts, t_prime=leaves[2], bias=leaves[3])
    (3 * loss).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 11), st.integers(1, 12), st.floats(-1, 4), st.floats(-12, 3))
def test_blocks_of_any_size_give_the_whole(count, block, t, b):
    x, y = features(count, seed=count)
    whole = gradients(siglip_loss, x, y, t, b)

    def in_blocks(images, texts, **scalars):
        return ring_siglip_loss(images, texts, block=block, **scalars)

    for expected, actual in zip(whole, gradients(in_blocks, x, y, t, b), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_gradients_are_those_of_finite_differences():
    x, y = features(5)
    t, b = torch.tensor(0.7).double(), torch.tensor(-1.5).double()
    leaves = [leaf.requires_grad_() for leaf in (x, y, t, b)]
    assert torch.autograd.gradcheck(
        lambda x, y, t, b: ring_siglip_loss(x, y, t_prime=t, bias=b, block=2), leaves
    )


def test_a_graph_that_is_kept_gives_its_gradients_again():
    images, texts = (part.requires_grad_() for part in features())
    scalars = [torch.tensor(value).double().requires_grad_() for value in (0.7, -1.5)]
    loss = ring_siglip_loss(images, texts, t_prime=scalars[0], bias=scalars[1], block=3)
    leaves = [images, texts, *scalars]
    first = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for twice, once in zip(first, again, strict=True):
        torch.testing.assert_close(twice, 2 * once, rtol=1e-12, atol=0)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from the kernel's account")
def test_memory_is_an_eighth_of_the_matrix_at_most():
    matrix, blocks = (
        peak_memory(Form(name, make_loss, {"name": name, "batch": 4096, "dim": 768}))[1]
        for name in ("one matrix", "in blocks")
    )
    assert matrix > 4 * 4 * 4096**2 / 1e6  # the logits, and what else is of their shape
    assert blocks < matrix / 8


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_features_lose_nothing_in_the_loss(name):
    x, y = (F.normalize(part.float(), dim=-1).bfloat16() for part in features())
    loss = LOSSES[name]()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(x, y)
    exact = loss.double()(x.double(), y.double())
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(exact), rel=1e-6)


def _rank(rank: int, ranks: int, folder: str) -> None:
    """One rank: both losses on its part of the batch, parameters averaged as DDP does."""
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous-{ranks}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    kept = {}
    for name, kind in LOSSES.items():
        x, y = (part.chunk(ranks)[rank].clone().requires_grad_() for part in features())
        module = kind().double()
        loss = module(F.normalize(x, dim=-1), F.normalize(y, dim=-1))
        loss.backward()
        scalars = [p.grad for p in module.parameters()]
        for value in (mean := loss.detach().clone(), *scalars):
            dist.all_reduce(value)
            value /= ranks
        kept[name] = [mean, x.grad / ranks, y.grad / ranks, *scalars]
    torch.save(kept, f"{folder}/{ranks}-{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # now and then a thread of gloo that still ends aborts an orderly exit


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_what_one_process_gives(ranks: int, tmp_path: Path):
    mp.start_processes(_rank, (ranks, str(tmp_path)), nprocs=ranks, start_method="spawn")
    parts = [torch.load(tmp_path / f"{ranks}-{rank}.pt") for rank in range(ranks)]
    for name, kind in LOSSES.items():
        x, y = (part.clone().requires_grad_() for part in features())
        module = kind().double()
        loss = module(F.normalize(x, dim=-1), F.normalize(y, dim=-1))
        loss.backward()
        expected = [loss.detach(), x.grad, y.grad, *(p.grad for p in module.parameters())]
        for k, value in enumerate(expected):
            together = [part[name][k] for part in parts]
            actual = torch.cat(together) if k in (1, 2) else together[0]
            torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-9, msg=f"{name} {k}")
