"""A training step on a CPU against the paper's form, its values and its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from med3dvlm.benchmark.plain import PlainDCFormer
from med3dvlm.models import DCFormer, DCFormerConfig
from med3dvlm.models.cpu_training import RoundedGradients, convolve_planes, normalize_and_add
from med3dvlm.models.lines import lines_through

SIZES = st.tuples(*[st.integers(1, 9)] * 3)
LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]


def lines(channels: int) -> list[nn.Conv3d]:
    """Along D, H and W, in float64."""
    kernels = ((3, 1, 1), (1, 3, 1), (1, 1, 3))
    return [nn.Conv3d(channels, channels, k, padding="same").double() for k in kernels]


def parameters(convs: list[nn.Conv3d], dtype: torch.dtype) -> list[Tensor]:
    both = (p for conv in convs for p in conv.parameters())  # weight and bias
    return [p.detach().to(dtype).requires_grad_() for p in both]


def gradients(outputs, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    weights = [torch.randn(y.shape, dtype=torch.float64).to(y.dtype) for y in outputs]
    return list(torch.autograd.grad(outputs, inputs, weights))


def largest(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-3)).item()


@settings(max_examples=25, deadline=None)
@given(SIZES, st.integers(1, 3), st.sampled_from([2, 3, 8, 16]), st.sampled_from(LAYOUTS))
@example((2, 5, 5), 1, 24, torch.channels_last_3d)  # conv3d in bf16: a weight's gradient of 1e37
def test_convolutions_equal_conv3d_and_their_rounded_gradients_are_near(size, batch, width, layout):
    torch.manual_seed(0)
    convs = lines(width)
    x = torch.randn(batch, width, *size, dtype=torch.float64, requires_grad=True)
    exact = [conv(x) for conv in convs]
    right = gradients(exact, [x, *(p for conv in convs for p in conv.parameters())])

    same = x.detach().to(memory_format=layout).requires_grad_()
    weights = parameters(convs, torch.float64)
    pairs = zip(weights[::2], weights[1::2], strict=True)
    planes = [convolve_planes(same, w, b, axis) for axis, (w, b) in enumerate(pairs)]
    for one, other in zip(
        [*planes, *gradients(planes, [same, *weights])], [*exact, *right], strict=True
    ):
        torch.testing.assert_close(one, other)

    rough = x.detach().float().to(memory_format=layout).requires_grad_()
    weights = parameters(convs, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = RoundedGradients.apply(rough, *weights)
    for one, other in zip(rounded, exact, strict=True):
        assert one.dtype == torch.float32
        assert largest(one, other) < 1e-5
    found = gradients(rounded, [rough, *weights])
    assert [g.dtype for g in found] == [torch.float32] * 7
    for i, (one, other) in enumerate(zip(found, right, strict=True)):
        if i not in (2, 4, 6):  # a bias's is a sum that may be near zero
            assert largest(one, other) < 0.05


def norms(channels: int) -> list[nn.BatchNorm3d]:
    torch.manual_seed(2)
    made = [nn.BatchNorm3d(channels, momentum=0.3).double() for _ in range(3)]
    for norm in made:
        nn.init.uniform_(norm.weight)
        nn.init.normal_(norm.bias)
    return made


@settings(max_examples=25, deadline=None)
@given(SIZES, st.integers(2, 3), st.sampled_from([1, 5, 8]), st.sampled_from(LAYOUTS))
def test_normalize_and_add_is_the_sum_of_three_batch_norms(size, batch, width, layout):
    torch.manual_seed(0)
    parts = [
        torch.randn(batch, width, *size, dtype=torch.float64).to(memory_format=layout) + i
        for i in range(3)
    ]
    results = []
    for add in (
        normalize_and_add,
        lambda x, n: sum(f(part) for f, part in zip(n, x, strict=True)),
    ):
        mine, inputs = norms(width), [part.clone().requires_grad_() for part in parts]
        for _ in range(2):
            y = add(inputs, mine)
        leaves = [*inputs, *(p for norm in mine for p in norm.parameters())]
        buffers = [b for norm in mine for b in norm.buffers()]
        results.append([y, *gradients([y], leaves), *buffers])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_sums_of_many_rows_lose_no_digits():
    torch.manual_seed(0)
    x = torch.randn(1, 8, 64, 64, 64) + 10
    (one,) = norms(8)[:1]
    y = normalize_and_add([x.to(memory_format=torch.channels_last_3d)], [one.float()])
    exact = norms(8)[0](x.double())
    assert largest(y, exact) < 6e-6  # 3e-5 where all are summed in one


def test_a_single_voxel_has_no_variance():
    with pytest.raises(ValueError, match="more than one value per channel"):
        normalize_and_add([torch.randn(1, 4, 1, 1, 1)] * 3, [n.float() for n in norms(4)])


@settings(max_examples=25, deadline=None)
@given(SIZES, st.sampled_from([1, 2, 4]), st.sampled_from([3, 7]), st.integers(0, 2))
def test_lines_are_what_a_strided_convolution_reads(size, stride, kernel, axis):
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    shape = [1, 1, 1]
    shape[axis] = kernel
    weight = torch.randn(4, 3, *shape, dtype=torch.float64)
    read = lines_through(x, axis, kernel_size=kernel, stride=stride)
    padding = [n // 2 for n in shape]
    torch.testing.assert_close(
        torch.einsum("bcdhwk,ock->bodhw", read, weight.flatten(2)),
        F.conv3d(x, weight, stride=stride, padding=padding),
    )


@pytest.mark.parametrize(
    "stem",
    [
        {"stem_activation": "none"},
        {"stem_activation": "gelu"},
        {"stem_antialias": True},
        {"stem_patches": True, "stem_windows": [[-1.0, 0.5], [0.0, 1.0]]},
        {"stem_stride": 1},
    ],
)
@pytest.mark.parametrize("size", [(13, 22, 17), (8, 8, 40)])
def test_a_step_equals_the_paper_s_form(stem, size):
    torch.manual_seed(0)
    model = DCFormer(DCFormerConfig(variant="nano", layer_scale_init=0.5, **stem)).double().train()
    plain = PlainDCFormer.like(model).double()
    volumes = torch.rand(2, 1, *size, dtype=torch.float64)
    found = []
    for form in (model, plain):
        pooled = model.pool(form(volumes))
        found.append([pooled, *gradients([pooled], list(form.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other.view(one.shape), rtol=1e-6, atol=1e-9)
    buffers = zip(model.buffers(), plain.buffers(), strict=True)
    for one, other in buffers:
        torch.testing.assert_close(one, other)
