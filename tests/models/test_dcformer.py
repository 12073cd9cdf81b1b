"""The encoder: sizes of the variants, what the stem reads, gradients, saving."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

from med3dvlm.models import DCFormer, DCFormerConfig, ViT3D, ViT3DConfig
from med3dvlm.models.dcformer import VARIANTS, DecomposedConv3d, PatchConv3d, convolve_as_matrix
from med3dvlm.models.windows import through_windows

# Parameters as counted in the published implementation.
PARAMETERS = {
    "nano": 789_216,
    "naive": 5_851_680,
    "tiny": 14_657_472,
    "small": 18_244_800,
    "base": 33_868_864,
    "large": 185_125_440,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_have_the_published_numbers_of_parameters(variant):
    with torch.device("meta"):
        model = DCFormer(DCFormerConfig(variant=variant))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[variant]


def tiny(**settings) -> DCFormer:
    config = DCFormerConfig(variant="nano", volume_size=(32, 64, 64), **settings)
    torch.manual_seed(0)
    return DCFormer(config).eval()


def test_streams_have_the_sizes_the_config_says():
    model = tiny()
    streams = model(torch.rand(2, 1, 32, 64, 64))
    assert [tuple(s.shape[1:]) for s in streams[:2]] == [(8 * 16 * 16, 32), (4 * 8 * 8, 32)]
    low, high = model.streams(streams)
    assert (low.shape[1], high.shape[1]) == model.config.stream_tokens
    assert (low.shape[2], high.shape[2]) == model.config.stream_channels


@pytest.mark.parametrize("size", [(1, 16, 16), (16, 2, 16), (16, 16, 3), (1, 2, 3)])
@torch.no_grad()
def test_an_antialiased_stem_takes_volumes_thinner_than_its_stride(size):
    model = tiny(stem_antialias=True)
    volumes = torch.rand(1, 1, *size)
    streams = model(volumes)
    assert streams[-1].shape == (1, 1, 256)
    for one, other in zip(streams, model.optimize_for_inference()(volumes), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "multiscale", "streams"])
def test_pooled_state_has_the_width_the_config_says(pooling):
    model = tiny(pooling=pooling)
    streams = model(torch.rand(2, 1, 32, 64, 64))
    pooled = model.pool(streams)
    assert pooled.shape == (2, model.config.hidden_size)
    mean = pooled[:, 256:512] if pooling == "streams" else pooled[:, :256]
    assert torch.equal(mean, streams[-1].mean(dim=1))
    if pooling == "multiscale":
        assert torch.equal(pooled[:, 256:320], streams[2].amax(dim=1))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.tuples(*[st.integers(17, 70)] * 3))
def test_any_volume_size_works_and_the_config_knows_its_tokens(size):
    model = tiny(stem_patches=size[0] % 2 == 0)
    low, high = model.streams(model(torch.rand(1, 1, *size)))
    config = DCFormerConfig(variant="nano", volume_size=size)
    assert (low.shape[1], high.shape[1]) == config.stream_tokens


def read_by_stem(model: DCFormer) -> float:
    """The share of voxels whose value has a gradient through the stem."""
    x = torch.rand(1, 1, 32, 32, 32, requires_grad=True)
    model.stem(x).square().sum().backward()
    assert x.grad is not None
    return float((x.grad != 0).float().mean())


def test_the_published_stem_skips_voxels_and_the_antialiased_one_reads_all():
    assert read_by_stem(tiny(stem_activation="none")) == pytest.approx(0.156, abs=0.01)
    assert read_by_stem(tiny(stem_antialias=True)) == 1.0
    assert read_by_stem(tiny(stem_patches=True)) == 1.0


def test_the_published_stem_is_affine_and_the_own_one_is_not():
    a, b = torch.rand(2, 1, 1, 16, 32, 32)
    for activation, affine in (("none", True), ("gelu", False)):
        stem = tiny(stem_activation=activation).stem
        middle = stem((a + b) / 2)
        assert torch.allclose(middle, (stem(a) + stem(b)) / 2, atol=1e-5) is affine


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    size=st.tuples(*[st.integers(1, 15)] * 3),
    batch=st.integers(1, 3),
    kernel_size=st.sampled_from([1, 3, 7, 13]),
    axis=st.integers(0, 2),
)
def test_a_depthwise_convolution_is_a_product_with_a_matrix(size, batch, kernel_size, axis):
    along = [kernel_size if k == axis else 1 for k in range(3)]
    torch.manual_seed(0)
    conv = torch.nn.Conv3d(
        4, 4, along, padding=[k // 2 for k in along], groups=4, dtype=torch.float64
    )
    x = torch.randn(batch, 4, *size, dtype=torch.float64, requires_grad=True)
    found = convolve_as_matrix(x, conv.weight, conv.bias, axis=axis)
    expected = conv(x)
    assert torch.allclose(found, expected, atol=1e-12)
    inputs = [x, conv.weight, conv.bias]
    weight = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-11)


def test_patches_are_a_convolution_with_stride_and_kernel_alike():
    torch.manual_seed(0)
    patches = PatchConv3d(2, 5, size=4).eval()
    x = torch.randn(3, 2, 9, 8, 6)
    weight = patches.proj.weight.view(5, 2, 4, 4, 4)
    padded = torch.nn.functional.pad(x, (0, 2, 0, 0, 0, 3))
    expected = torch.nn.functional.conv3d(padded, weight, patches.proj.bias, stride=4)
    with torch.inference_mode():
        assert torch.allclose(patches(x) * (1 + 1e-5) ** 0.5, expected, atol=1e-5)


@pytest.mark.parametrize("kernel_size", [13, 9, 3])
@pytest.mark.parametrize("groups", [1, 8])
def test_gradients_equal_float64(kernel_size, groups):
    torch.manual_seed(0)
    conv = DecomposedConv3d(8, 8, kernel_size=kernel_size, groups=groups).train()
    x = torch.randn(2, 8, 10, 12, 14)
    conv(x).square().mean().backward()
    single = [p.grad.double() for p in conv.parameters()]
    exact = conv.double()
    exact.zero_grad()
    exact(x.double()).square().mean().backward()
    # A bias before a batch norm has no gradient but rounding: compare against the largest.
    largest = max(float(p.grad.abs().max()) for p in exact.parameters())
    for found, p in zip(single, exact.parameters(), strict=True):
        assert float((found - p.grad).abs().max()) < 1e-4 * largest


def test_decomposed_convolution_is_the_sum_of_three_lines():
    conv = DecomposedConv3d(1, 1, kernel_size=3).eval()
    for p in conv.parameters():
        torch.nn.init.zeros_(p)
    for name in ("depth", "height", "width"):
        torch.nn.init.ones_(getattr(conv, f"along_{name}").weight)
        torch.nn.init.ones_(getattr(conv, f"norm_{name}").weight)
    x = torch.zeros(1, 1, 5, 5, 5)
    x[0, 0, 2, 2, 2] = 1
    with torch.inference_mode():
        out = conv(x)[0, 0] * (1 + 1e-5) ** 0.5
    assert out[2, 2, 2] == pytest.approx(3, rel=1e-5)
    assert float(out.sum()) == pytest.approx(9, rel=1e-5)
    assert out[1, 2, 2] == pytest.approx(1) and out[1, 1, 2] == 0


@pytest.mark.parametrize(
    "model",
    [
        lambda: tiny(),
        lambda: ViT3D(
            ViT3DConfig(
                volume_size=(16, 32, 32),
                patch_size=(8, 16, 16),
                hidden_size=32,
                num_layers=2,
                num_heads=4,
            )
        ).eval(),
    ],
    ids=["dcformer", "vit3d"],
)
def test_saved_and_loaded_by_the_auto_classes(model, tmp_path):
    model = model()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()
    x = torch.rand(1, 1, *model.config.volume_size)
    with torch.inference_mode():
        for a, b in zip(model(x), again(x), strict=True):
            assert torch.equal(a, b)


def test_vit_has_87_million_parameters_and_matching_streams():
    with torch.device("meta"):
        big = ViT3D(ViT3DConfig())
    assert 85e6 < sum(p.numel() for p in big.parameters()) < 92e6
    config = ViT3DConfig(
        volume_size=(16, 32, 32), patch_size=(8, 16, 16), hidden_size=32, num_layers=3, num_heads=4
    )
    model = ViT3D(config).eval()
    streams = model(torch.rand(2, 1, 16, 32, 32))
    low, high = model.streams(streams)
    assert low.shape == high.shape == (2, 8, 32)
    assert model.pool(streams).shape == (2, 32)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="variant 'huge' is unknown"):
        DCFormerConfig(variant="huge")
    with pytest.raises(ValueError, match="stem_activation"):
        DCFormerConfig(stem_activation="relu")
    with pytest.raises(ValueError, match="exclude each other"):
        DCFormerConfig(stem_antialias=True, stem_patches=True)
    with pytest.raises(ValueError, match="pooling 'sum'"):
        DCFormerConfig(pooling="sum")
    with pytest.raises(ValueError, match="does not divide"):
        ViT3DConfig(volume_size=(100, 256, 256))


def test_the_stem_sees_each_voxel_through_every_window():
    values = torch.tensor([-1.0, 0.0, 0.25, 0.55, 2.0]).view(1, 1, 5, 1, 1)
    seen = through_windows(values, [[0.0, 0.5], [0.5, 0.6]])
    assert seen.shape == (1, 2, 5, 1, 1)
    torch.testing.assert_close(seen[0, 0].flatten(), torch.tensor([0, 0, 0.5, 1, 1]))
    torch.testing.assert_close(seen[0, 1].flatten(), torch.tensor([0, 0, 0, 0.5, 1]))
    assert through_windows(values, []) is values


@pytest.mark.parametrize("kind", ["dcformer", "vit3d"])
def test_an_encoder_with_windows_tells_apart_only_what_they_show(kind):
    windows = [[0.2, 0.4]]
    if kind == "dcformer":
        model = tiny(stem_patches=True, stem_windows=windows)
    else:
        size = {"volume_size": (16, 16, 16), "patch_size": (8, 8, 8), "hidden_size": 16}
        model = ViT3D(ViT3DConfig(**size, num_layers=2, num_heads=2, stem_windows=windows))
    model = model.eval()
    x = torch.rand(1, 1, 16, 16, 16) / 2
    same = torch.where(x > 0.4, x + 10, x)
    assert torch.equal(model(x)[-1], model(same)[-1])
    assert not torch.equal(model(x)[-1], model(x + 0.05)[-1])


@pytest.mark.parametrize("config", [DCFormerConfig, ViT3DConfig])
@pytest.mark.parametrize("windows", [[[0.5, 0.5]], [[1.0, 0.0]], [[0.0]]])
def test_a_window_is_a_low_and_a_higher_value(config, windows):
    with pytest.raises(ValueError, match="stem_windows"):
        config(stem_windows=windows)


def test_a_cpu_finds_maxima_in_fp32_under_autocast():
    torch.manual_seed(0)
    model = tiny(layer_scale_init=1.0).train()
    volumes = torch.rand(2, 1, 32, 32, 32)

    def gradient(bf16: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            streams = model(volumes)
        loss = model.pool(streams).float().square().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        return streams[0], torch.cat([g.flatten() for g in gradients]).double()

    (stem, exact), (same, rounded) = gradient(bf16=False), gradient(bf16=True)
    assert torch.equal(stem, same)
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.999
