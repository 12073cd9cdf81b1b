"""The losses against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from med3dvlm.losses import InfoNCELoss, SigLIPLoss, infonce_loss, siglip_loss


def pairs(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, n, 8, generator=generator, dtype=torch.float64)
    return F.normalize(x, dim=-1), F.normalize(y, dim=-1)


def test_siglip_is_its_formula():
    x, y = pairs(5)
    t_prime, bias = torch.tensor(1.3, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    total = 0.0
    for i in range(5):
        for j in range(5):
            z = 1 if i == j else -1
            logit = float(t_prime.exp() * (x[i] @ y[j]) + bias)
            total -= math.log(1 / (1 + math.exp(-z * logit)))
    assert float(siglip_loss(x, y, t_prime=t_prime, bias=bias)) == pytest.approx(total / 5)


def test_siglip_starts_where_the_paper_says():
    loss = SigLIPLoss()
    assert float(loss.t_prime.detach().exp()) == pytest.approx(10)
    assert float(loss.bias) == -10


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(2, 12), st.permutations(range(12)))
def test_the_order_of_pairs_does_not_matter(n, order):
    x, y = pairs(n)
    index = [i for i in order if i < n]
    for loss in (SigLIPLoss().double(), InfoNCELoss().double()):
        assert float(loss(x, y)) == pytest.approx(float(loss(x[index], y[index])))


def test_right_pairs_cost_less_than_wrong_ones():
    x, _ = pairs(6)
    for loss in (SigLIPLoss().double(), InfoNCELoss().double()):
        assert float(loss(x, x)) < float(loss(x, x.roll(1, 0)))


def test_infonce_of_unrelated_pairs_is_log_n():
    x = F.normalize(torch.ones(7, 8), dim=-1)
    assert float(infonce_loss(x, x, logit_scale=torch.tensor(5.0))) == pytest.approx(math.log(7))
