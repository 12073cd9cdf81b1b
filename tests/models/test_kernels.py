"""The fused kernels against the plain form, in Triton's interpreter, which needs no GPU.

The interpreter is chosen by an environment variable before Triton is imported, so the checks run
in a process of their own: this file, called as a program. Its results are read here.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

# the last one turns the kernels off
CHECKS = ("training", "evaluation", "random", "bf16", "registered", "inference", "switch")
pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; it exists for Linux only"
)


@pytest.fixture(scope="module")
def found():
    environment = {k: v for k, v in os.environ.items() if k != "MED3DVLM_TRITON"}
    done = subprocess.run(
        [sys.executable, __file__, *CHECKS],
        env={**environment, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_equals_the_plain_form_in_float64_with_all_gradients_and_statistics(found, mode):
    errors = found[mode]
    assert set(errors) >= {"output", "input", "along_depth.weight", "norm_width.running_var"}
    assert max(errors.values()) < 1e-5, errors


def test_agrees_at_odd_sizes_sizes_below_the_kernel_and_any_batch(found):
    assert len(found["random"]) >= 4
    assert max(found["random"].values()) < 1e-5, found["random"]


def test_reads_and_writes_bf16_with_sums_in_fp32(found):
    # against float64 of the same rounded input: half a unit in bf16's last place is 0.2 to 0.4%
    assert found["bf16"]["output"] < 4e-3
    assert found["bf16"]["input"] < 4e-3
    assert found["bf16"]["autocast"] == "torch.bfloat16"


def test_serves_the_encoder_arranged_for_inference(found):
    assert found["inference"] < 1e-5


def test_is_registered_so_that_torch_compile_can_trace_it(found):
    assert set(found["registered"].values()) == {"SUCCESS"}


def test_one_variable_turns_it_off(found):
    assert found["switch"] == {"unset": True, "0": False}


# --- what runs in the process of the interpreter ----------------------------------------------


def _pair(channels, kernel, *, train):
    """(a decomposed convolution of random weights and statistics, its copy in float64)."""
    import torch

    from med3dvlm.models.dcformer import DecomposedConv3d

    conv = DecomposedConv3d(channels, channels, kernel_size=kernel, groups=channels)
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter)
    for name, buffer in conv.named_buffers():
        if "running" in name:
            torch.nn.init.uniform_(buffer, 0.5, 2)
    conv.train(train)
    return conv, copy.deepcopy(conv).double()


def _errors(conv, plain, x, *, gradients=True):
    """The largest difference of each tensor, over the largest value of the plain form's."""
    import torch

    mine, its = x.clone().requires_grad_(gradients), x.double().requires_grad_(gradients)
    y, y_plain = conv(mine), plain.plain(its)
    pairs = {"output": (y, y_plain)}
    if gradients:
        g = torch.randn(y.shape).to(x.dtype) + 1
        y.backward(g)
        y_plain.backward(g.double())
        pairs["input"] = (mine.grad, its.grad)
        for (name, p), p_plain in zip(conv.named_parameters(), plain.parameters(), strict=True):
            pairs[name] = (p.grad, p_plain.grad)
    for (name, b), b_plain in zip(conv.named_buffers(), plain.buffers(), strict=True):
        pairs[name] = (b, b_plain)
    pairs = {name: (a.detach().double(), b.detach()) for name, (a, b) in pairs.items()}
    return {
        name: float((a - b).abs().max() / b.abs().max().clamp(min=1e-3))
        for name, (a, b) in pairs.items()
    }


def check_training():
    import torch

    # two tiles along two axes and two strips of channels: 33 of 32
    return _errors(*_pair(33, 3, train=True), torch.randn(1, 33, 5, 2, 5) + 1)


def check_evaluation():
    import torch

    return _errors(*_pair(2, 5, train=False), torch.randn(1, 2, 5, 2, 3))


def check_random():
    import torch
    from hypothesis import given, settings
    from hypothesis import strategies as st

    found = {}
    size = st.integers(1, 6)

    @settings(max_examples=5, deadline=None, derandomize=True, database=None)
    @given(size, size, size, st.sampled_from([3, 7, 13]), st.booleans())
    def run(d, h, w, kernel, train):
        torch.manual_seed(0)
        x = torch.randn(2, 3, d, h, w)
        errors = _errors(*_pair(3, kernel, train=train), x, gradients=False)
        found[f"{d}x{h}x{w}, k={kernel}, {train}"] = max(errors.values())

    run()
    return found


def check_bf16():
    import torch

    conv, plain = _pair(2, 3, train=True)
    errors = _errors(conv, plain, torch.randn(1, 2, 2, 3, 2).bfloat16())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        return {**errors, "autocast": str(conv.eval()(torch.randn(1, 2, 1, 1, 1)).dtype)}


def check_registered():
    import torch
    from torch import library

    from med3dvlm.models import kernels

    x, taps, per_channel = torch.randn(1, 1, 2, 2, 2), torch.randn(3, 3, 2), torch.randn(2)
    gamma = torch.rand(3, 2) + 0.5
    differentiable = [x, taps, gamma, per_channel]
    for tensor in differentiable:
        tensor.requires_grad_()
    which = ("test_schema", "test_autograd_registration", "test_faketensor")
    dtype = torch.float32
    calls = {
        kernels.decomposed: (x, taps, per_channel, dtype),
        kernels.normalised: (*differentiable, 1e-5, dtype),
    }
    results = [library.opcheck(op, args, test_utils=which) for op, args in calls.items()]
    return {f"{i} {name}": said for i, r in enumerate(results) for name, said in r.items()}


def check_inference():
    import torch

    from med3dvlm.models.dcformer import Block
    from med3dvlm.models.inference import _Block

    block = Block(4, kernel_size=5, layer_scale_init=1.0).eval()
    block.conv, plain = _pair(4, 5, train=False)
    x = torch.randn(1, 4, 2, 3, 1)
    with torch.no_grad():
        mine = _Block(block, torch.float32)(x.movedim(1, -1).contiguous()).movedim(-1, 1)
        block.double().conv.forward = plain.plain
        return float((mine - (block(x.double()) - x)).abs().max())


def check_switch():
    import importlib

    import torch

    from med3dvlm.models import fused

    x = torch.zeros(1)
    found = {"unset": fused.runs_fused(x)}
    os.environ["MED3DVLM_TRITON"] = "0"
    return {**found, "0": importlib.reload(fused).runs_fused(x)}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    results = {}
    for check in sys.argv[1:]:
        torch.manual_seed(0)
        results[check] = globals()[f"check_{check}"]()
    print(json.dumps(results))
