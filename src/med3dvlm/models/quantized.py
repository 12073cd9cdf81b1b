"""Linear layers of 8-bit weights, for language models that are too large or too slow in 16."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BITS = (8,)
FEW_ROWS = 4  # up to which PyTorch's kernel is faster than a product with the weights made whole


class Linear8bit(nn.Module):
    """y = (x · Wᵀ) s + b with int8 W and a scale s for each output.

    On a CPU and for few rows, as in writing token by token, the product reads one byte a weight
    (PyTorch's `_weight_int8pack_mm`); for many rows, and elsewhere, the weights of this layer are
    made whole for the moment. Weights are rounded to nearest, symmetrically, to within half of
    1/127 of the largest of their output.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear) -> Linear8bit:
        """The layer whose weights are nearest to those of `linear`."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        layer.weight = (weight / scale.unsqueeze(1)).round().to(torch.int8)
        layer.scale = scale.to(linear.weight.dtype)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if x.device.type == "cpu" and len(rows) <= FEW_ROWS:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)


def quantize_linear_layers(language_model: nn.Module, *, empty: bool = False) -> None:
    """Replace the linear layers of its blocks, in place; embeddings and the last layer stay.

    Args:
        empty: for weights that are loaded afterwards.
    """
    last = language_model.get_output_embeddings()
    for name, layer in list(language_model.named_modules()):
        if not isinstance(layer, nn.Linear) or layer is last:
            continue
        if empty:
            bias = layer.bias is not None
            small = Linear8bit(layer.in_features, layer.out_features, bias=bias)
        else:
            small = Linear8bit.of(layer)
        parent, _, own = name.rpartition(".")
        setattr(language_model.get_submodule(parent), own, small)
