"""The contrastive losses in blocks and over ranks.

The sigmoid loss is a sum over pairs, so it needs no row or column of the matrix of logits at once
(SigLIP, ICCV 2023, section 3.3). Here each process walks through its matrix block by block; with
several, the texts travel around the ring of ranks, their gradients with them, and no rank ever
holds all features. A softmax needs whole rows: for it the features are gathered.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

BLOCK = 512  # pairs along either side of a block of logits


def data_group() -> Any:
    """The process group over whose ranks a batch is spread; None for a process on its own."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def ring_siglip_loss(
    images: Tensor,
    texts: Tensor,
    *,
    t_prime: Tensor,
    bias: Tensor,
    group: Any = None,
    block: int = BLOCK,
) -> Tensor:
    """This rank's share of the pairwise sigmoid loss; the mean over the ranks is the whole.

    ``-(1/b) sum_ij log sigmoid(z_ij (t x_i.y_j + c))``, i over this rank's b images, j over the
    texts of all ranks. Gradients are those of the sum over the ranks, as data-parallel training
    expects, which takes their mean. Equal to :func:`siglip_loss` of the whole batch up to the
    order of the sums.

    Args:
        images, texts: (b, dim), rows of length 1, as many on every rank; row i of both belong
            together.
        t_prime, bias: scalars; t = exp(t_prime).
        group: the ranks; None for this process alone.
        block: images and texts a block of logits has at most.

    Returns:
        A scalar.

    Raises:
        RuntimeError: from the process group, where the ranks' batches differ in size.
    """
    loss: Tensor = _RingSigLIP.apply(images, texts, t_prime, bias, group, block)
    return loss


class _RingSigLIP(torch.autograd.Function):
    """Loss and gradients in one pass, so that the logits are made once.

    The gradients are the largest of what is kept, so the backward pass hands them on, scaled in
    place, and keeps no copy. A second pass over a graph that was kept makes them anew.
    """

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        t_prime: Tensor,
        bias: Tensor,
        group: Any,
        block: int,
    ) -> Tensor:
        ctx.save_for_backward(images, texts, t_prime, bias)
        ctx.group, ctx.block = group, block
        loss, ctx.gradients = _loss_and_gradients(images, texts, t_prime, bias, group, block)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            _, gradients = _loss_and_gradients(*ctx.saved_tensors, ctx.group, ctx.block)
        return (*(gradient.mul_(scale) for gradient in gradients), None, None)


def _loss_and_gradients(
    images: Tensor, texts: Tensor, t_prime: Tensor, bias: Tensor, group: Any, block: int
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients along images, texts, t' and bias."""
    ranks = 1 if group is None else dist.get_world_size(group)
    sums = _Sums(images, t_prime, bias, block)
    travelling, gradient = texts, torch.zeros_like(texts)
    for step in range(ranks):
        sums.add(travelling, gradient, own=step == 0)
        if ranks > 1:  # the last step brings this rank's texts home, their gradient complete
            travelling, gradient = _pass_on(travelling, gradient, group)
    return sums.loss, [sums.images_gradient, gradient, sums.t_gradient, sums.bias_gradient]


class _Sums:
    """What is added up over the blocks: the loss and its gradients."""

    def __init__(self, images: Tensor, t_prime: Tensor, bias: Tensor, block: int):
        self.images, self.t, self.bias, self.block = images, t_prime.exp(), bias, block
        self.loss = images.new_zeros(())
        self.images_gradient = torch.zeros_like(images)
        self.t_gradient, self.bias_gradient = torch.zeros_like(t_prime), torch.zeros_like(bias)

    def add(self, texts: Tensor, gradient: Tensor, *, own: bool) -> None:
        """The images with some rank's texts, whose gradient is added to.

        Args:
            own: they are this rank's, so that text i belongs to image i.
        """
        for rows in _ranges(len(self.images), self.block):
            for columns in _ranges(len(texts), self.block):
                paired = own and rows == columns
                self._add_block(rows, texts[columns], gradient[columns], paired=paired)

    def _add_block(self, rows: slice, texts: Tensor, gradient: Tensor, *, paired: bool) -> None:
        images = self.images[rows]
        scaled = (images @ texts.T).mul_(self.t)
        logits = scaled + self.bias
        # z·logit: the diagonal of a paired block keeps its sign, all else is turned
        signed = logits.neg_()
        if paired:
            signed.diagonal().neg_()
        count = len(self.images)
        self.loss -= F.logsigmoid(signed).sum() / count
        slope = signed.neg_().sigmoid_().div_(count)  # of the loss along each logit
        if paired:
            slope.diagonal().neg_()
        self.bias_gradient += slope.sum()
        self.t_gradient += scaled.mul_(slope).sum()
        slope.mul_(self.t)  # now along each product of an image with a text
        self.images_gradient[rows].addmm_(slope, texts)
        gradient.addmm_(slope.T, images)


def _ranges(length: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


def _pass_on(texts: Tensor, gradient: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Both to the next rank of the ring, for those of the rank before."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    after, before = ((rank + step) % ranks for step in (1, -1))
    outgoing = torch.stack([texts, gradient])
    incoming = torch.empty_like(outgoing)
    transfers = [
        dist.P2POp(dist.isend, outgoing, group=group, group_peer=after),
        dist.P2POp(dist.irecv, incoming, group=group, group_peer=before),
    ]
    for transfer in dist.batch_isend_irecv(transfers):
        transfer.wait()
    return incoming[0], incoming[1]


def gathered_infonce_loss(
    images: Tensor, texts: Tensor, *, logit_scale: Tensor, group: Any
) -> Tensor:
    """This rank's share of the symmetric softmax loss; the mean over the ranks is the whole.

    Args:
        images, texts: (b, dim), rows of length 1, as many on every rank.
        logit_scale: scalar, the inverse temperature itself.
        group: the ranks, whose features are gathered.
    """
    from torch.distributed.nn.functional import all_gather

    all_images, all_texts = (
        torch.cat(all_gather(part.contiguous(), group=group)) for part in (images, texts)
    )
    first = dist.get_rank(group) * len(images)
    targets = torch.arange(first, first + len(images), device=images.device)
    to_text = F.cross_entropy(images @ all_texts.T * logit_scale, targets)
    to_image = F.cross_entropy(texts @ all_images.T * logit_scale, targets)
    return (to_text + to_image) / 2
