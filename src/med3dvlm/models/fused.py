"""Whether the fused GPU kernels are there and run: on CUDA with Triton, unless switched off."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs the kernels, on a CPU too: for tests."""

SWITCHED_OFF = os.environ.get("MED3DVLM_TRITON") == "0"

kernels: Any = None
"""The module :mod:`med3dvlm.models.kernels`, or None."""

if (torch.cuda.is_available() or INTERPRETED) and not SWITCHED_OFF and find_spec("triton"):
    kernels = import_module("med3dvlm.models.kernels")


def runs_fused(x: Tensor) -> bool:
    """Whether depthwise convolutions of x go through the fused kernels."""
    short = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return kernels is not None and (x.is_cuda or INTERPRETED) and short
