"""Contrastive losses over a batch of paired, L2-normalised embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from med3dvlm.losses.ring import data_group, gathered_infonce_loss, ring_siglip_loss


def siglip_loss(images: Tensor, texts: Tensor, *, t_prime: Tensor, bias: Tensor) -> Tensor:
    """The pairwise sigmoid loss (SigLIP, ICCV 2023, algorithm 1).

    ``-(1/B) sum_ij log sigmoid(z_ij (t x_i.y_j + b))`` with z = 1 on the diagonal and -1 off it,
    and t = exp(t_prime).

    Args:
        images, texts: (B, dim), rows of length 1; row i of both belong together.
        t_prime, bias: scalars.

    Returns:
        A scalar.
    """
    logits = images @ texts.T * t_prime.exp() + bias  # (B, B)
    signs = 2 * torch.eye(len(images), device=logits.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(images)


def infonce_loss(images: Tensor, texts: Tensor, *, logit_scale: Tensor) -> Tensor:
    """The symmetric softmax loss of CLIP: mean of image-to-text and text-to-image.

    Args:
        images, texts: (B, dim), rows of length 1; row i of both belong together.
        logit_scale: scalar, the inverse temperature itself (not its logarithm).
    """
    logits = images @ texts.T * logit_scale
    targets = torch.arange(len(images), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class SigLIPLoss(nn.Module):
    """:func:`siglip_loss` with its two learned scalars, t' from log 10 and b from -10.

    Computed in blocks; in training over the pairs of all ranks, else over this process's own.
    """

    def __init__(self):
        super().__init__()
        self.t_prime = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        group = data_group() if self.training else None
        with torch.autocast(images.device.type, enabled=False):
            images, texts = _at_least_float32(images), _at_least_float32(texts)
            return ring_siglip_loss(
                images, texts, t_prime=self.t_prime, bias=self.bias, group=group
            )


class InfoNCELoss(nn.Module):
    """:func:`infonce_loss` with a learned logit scale, from 1/0.07, at most 100 as in CLIP.

    In training over the pairs of all ranks, else over this process's own.
    """

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        scale = self.log_scale.exp().clamp(max=100)
        group = data_group() if self.training else None
        # as in CLIP: the logits of near embeddings differ by less than bf16 can tell
        with torch.autocast(images.device.type, enabled=False):
            images, texts = _at_least_float32(images), _at_least_float32(texts)
            if group is None:
                return infonce_loss(images, texts, logit_scale=scale)
            return gathered_infonce_loss(images, texts, logit_scale=scale, group=group)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


LOSSES: dict[str, type[nn.Module]] = {"siglip": SigLIPLoss, "infonce": InfoNCELoss}
