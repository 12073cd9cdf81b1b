"""The depthwise decomposed convolution on a GPU: the fused kernels against eager and compiled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from med3dvlm.benchmark.measure import DTYPES, Ceiling, Form, Work, compare, machine
from med3dvlm.evaluate.tables import Results
from med3dvlm.models import DCFormerConfig
from med3dvlm.models.dcformer import AXES, DecomposedConv3d
from med3dvlm.models.fused import runs_fused

FORMS = ("eager", "torch.compile", "fused")

INFERENCE_PASSES = 2
"""Times the tensor is moved at least: x is read, y written."""

TRAINING_PASSES = 8
"""x is read for the statistics and again for y, which is written; x and dy are read for the
gradients of the parameters and again for that of x, which is written."""


def benchmark_kernel(
    *,
    variant: str = "small",
    size: Sequence[int] = (128, 256, 256),
    batch: int = 8,
    precision: str = "bf16",
    runs: int = 20,
) -> Results:
    """Inference and training step of one convolution of each of the stages 1-4.

    The share of the ceiling is that of the measured copy bandwidth, for the passes above.

    Raises:
        ValueError: the precision is unknown.
        OSError: there is no CUDA GPU, or no Triton.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision {precision!r} is unknown: use {' or '.join(DTYPES)}.")
    if not torch.cuda.is_available() or not runs_fused(torch.empty(0, device="cuda")):
        raise OSError(
            "benchmark kernel needs a CUDA GPU and Triton, which comes with PyTorch's CUDA "
            "builds; MED3DVLM_TRITON must not be 0."
        )
    bandwidth = Ceiling.measure("cuda").bandwidth
    copying = Ceiling(dict.fromkeys(DTYPES, math.inf), bandwidth)
    results = Results({**machine("cuda"), "copy, GB/s": round(bandwidth / 1e9, 1)})
    for stage, (shape, kernel) in enumerate(stage_shapes(variant, size, batch), start=1):
        for training in (False, True):
            what = {"shape": shape, "kernel": kernel, "precision": precision, "training": training}
            forms = [Form(name, make_conv, {"name": name, **what}, precision) for name in FORMS]
            passes = TRAINING_PASSES if training else INFERENCE_PASSES
            work = Work(flop=0, bytes=4 * passes * math.prod(shape))
            rows = compare(forms, runs=runs, work=work, ceiling=copying)
            title = f"Stage {stage}, {'training step' if training else 'inference'}, {precision}"
            results.add(f"{title}, {'×'.join(map(str, shape))}, k={kernel}", rows, shares=False)
    return results


def stage_shapes(
    variant: str, size: Sequence[int], batch: int
) -> list[tuple[tuple[int, ...], int]]:
    """Of stages 1-4 the (B, C, D, H, W) that a block's convolution takes, and its kernel."""
    config = DCFormerConfig(variant=variant)
    shapes = []
    for stage in range(1, 5):
        stride = config.stem_stride * 2**stage
        grid = (-(-n // stride) for n in size)
        shapes.append(((batch, config.channels[stage], *grid), config.kernel_sizes[stage - 1]))
    return shapes


def make_conv(
    name: str, shape: tuple[int, ...], kernel: int, precision: str, training: bool
) -> Callable[[], list[Tensor]]:
    """Gives the output and in training the gradients, of the input and the parameters."""
    torch.manual_seed(0)
    conv = DecomposedConv3d(shape[1], shape[1], kernel_size=kernel, groups=shape[1])
    conv = conv.cuda().train(training)
    x = torch.randn(shape).to("cuda", DTYPES[precision])
    g = torch.randn_like(x)
    if name == "fused":
        x = x.contiguous(memory_format=torch.channels_last_3d)
        g = g.contiguous(memory_format=torch.channels_last_3d)
    separate = _three_convolutions(conv)
    form = {"fused": conv, "eager": separate, "torch.compile": torch.compile(separate)}[name]
    # not of the biases that batch norms cancel: those gradients are rounding
    cancelled = {f"along_{axis}.bias" for axis in AXES}
    wanted = [p for key, p in conv.named_parameters() if key not in cancelled]
    wanted.append(x.requires_grad_(training))

    def run() -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            if not training:
                with torch.inference_mode():
                    return [form(x)]
            y = form(x)
        return [y.detach(), *torch.autograd.grad(y, wanted, g)]

    run()
    return run


def _three_convolutions(conv: DecomposedConv3d) -> Callable[[Tensor], Tensor]:
    """The published form: three calls of conv3d, each with its batch norm."""

    def forward(x: Tensor) -> Tensor:
        depth, height, width = (
            getattr(conv, f"norm_{axis}")(getattr(conv, f"along_{axis}")(x)) for axis in AXES
        )
        return depth + height + width

    return forward
