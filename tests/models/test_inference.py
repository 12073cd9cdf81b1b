"""The encoder arranged for inference: equal to the plain form, and never in training's way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import med3dvlm
from med3dvlm.benchmark import closeness
from med3dvlm.benchmark.plain import PlainDCFormer
from med3dvlm.models import DCFormer, DCFormerConfig
from med3dvlm.models.dcformer import VARIANTS
from tests.models import tiny


def encoder(variant: str = "nano", **config) -> DCFormer:
    """Its statistics and scales far from where they start, so that folding them matters."""
    torch.manual_seed(0)
    model = DCFormer(DCFormerConfig(variant=variant, **config)).eval()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("layer_scale", "running_var")) or ("norm" in name and value.ndim):
                value.uniform_(0.3, 1.2)
            if name.endswith(("bias", "running_mean")):
                value.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def stems() -> list[tuple[DCFormer, PlainDCFormer]]:
    patches = {"stem_patches": True, "stem_layers": 2}
    windows = {**patches, "stem_windows": [[0.0, 0.3], [0.2, 0.9]]}
    kinds = ({}, {"stem_antialias": True}, patches, windows)
    made = [
        encoder(stem_activation=activation, **kind)
        for activation in ("gelu", "none")
        for kind in (*kinds, {"stem_layers": 1})
    ]
    return [(model, PlainDCFormer.like(model)) for model in made]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    kind=st.integers(0, 9),
    batch=st.integers(1, 3),
    size=st.tuples(*[st.integers(1, 36)] * 3),
    slab=st.sampled_from([1, 50, 4096]),
)
@torch.no_grad()
def test_fused_equals_plain_for_every_stem_and_size(stems, kind, batch, size, slab):
    model, plain = stems[kind]
    if model.config.stem_antialias:
        size = tuple(max(n, 4) for n in size)  # average pooling refuses less than its window
    volumes = torch.rand(batch, 1, *size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("med3dvlm.models.inference.SLAB_TOKENS", slab)
        fused = model.optimize_for_inference()(volumes)
    assert closeness(plain(volumes), fused)["error"] < 1e-5


@pytest.mark.parametrize("variant", ["naive", "tiny"])
@torch.no_grad()
def test_fused_equals_plain_for_other_variants(variant):
    assert variant in VARIANTS
    model = encoder(variant, stem_activation="none")
    volumes = torch.rand(1, 1, 10, 26, 15)
    plain = PlainDCFormer.like(model)(volumes)
    assert closeness(plain, model.optimize_for_inference()(volumes))["error"] < 1e-5


@pytest.mark.parametrize("last", [1, 2, 3, 4, 5])
@torch.no_grad()
def test_only_the_wanted_streams_are_given(last):
    model = encoder("nano")
    volumes = torch.rand(1, 1, 20, 33, 17)
    wanted = model(volumes)[-last:]
    for form in (model, model.optimize_for_inference()):
        streams = form(volumes, last=last)
        assert len(streams) == last
        assert closeness(wanted, streams)["error"] < 1e-5


@torch.no_grad()
def test_bf16_keeps_the_direction_of_the_embedding():
    model = encoder()
    volumes = torch.rand(2, 1, 32, 48, 40)
    plain = model.pool(model(volumes))
    pooled = model.pool(model.optimize_for_inference("bf16")(volumes))
    assert pooled.dtype == torch.float32
    assert not torch.equal(plain, pooled)
    assert float(torch.cosine_similarity(plain, pooled).min()) > 0.9999


def test_follows_the_weights_and_leaves_training_alone():
    model = encoder()
    volumes = torch.rand(2, 1, 16, 16, 16)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.optimize_for_inference()
    with torch.no_grad():
        before = model(volumes)[-1]
    assert not before.requires_grad
    assert model(volumes)[-1].requires_grad  # a gradient is asked for: the ordinary form
    assert all(torch.equal(weights[n], v) for n, v in model.state_dict().items())

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(volumes)[-1].square().mean().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        ordinary = model(volumes)
        assert not torch.allclose(before, ordinary[-1], rtol=1e-3)
        assert closeness(ordinary, model.optimize_for_inference()(volumes))["error"] < 1e-5
        model.load_state_dict(weights)
        assert closeness(before, model(volumes)[-1])["error"] < 1e-6
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model.optimize_for_inference()
    with pytest.raises(ValueError, match="precision 'int8' is unknown"):
        model.eval().optimize_for_inference("int8")


def test_loaded_models_are_optimized_and_save_the_ordinary_checkpoint(tmp_path):
    model = tiny.dual()
    model.save_pretrained(tmp_path / "plain")
    model.processor.save_pretrained(tmp_path / "plain")
    ordinary = model.embed_scans(tiny.scan())
    loaded = med3dvlm.load(tmp_path / "plain", device="cpu")
    assert loaded.vision_encoder._inference is not None
    assert abs(loaded.embed_scans(tiny.scan()) - ordinary).max() < 1e-6
    assert loaded.fingerprint() == model.fingerprint()
    loaded.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
