"""Eight-bit language models: close to the whole one, smaller, saved and loaded."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from med3dvlm import hub
from med3dvlm.models.quantized import FEW_ROWS, Linear8bit
from tests.models import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 40])
def test_a_layer_is_within_the_rounding_of_its_weights(dtype, rows):
    torch.manual_seed(0)
    linear = nn.Linear(48, 35).to(dtype)
    layer = Linear8bit.of(linear)
    x = torch.randn(2, rows, 48).to(dtype)[:1] if rows < 3 else torch.randn(rows, 48).to(dtype)
    with torch.inference_mode():
        found, expected = layer(x).float(), linear(x).float()
    assert found.shape == expected.shape
    largest = linear.weight.float().abs().amax(1)  # of each output
    bound = x.float().abs().sum(-1, keepdim=True) * largest / 254
    slack = 0.02 * expected.abs().max() if dtype == torch.bfloat16 else 1e-5
    assert bool(((found - expected).abs() <= bound + slack).all())


def test_quantized_answers_are_close_and_the_file_is_small(run, tmp_path):
    """By the command a user types, on the demo model."""
    result = run("model", "quantize", "demo", "-o", tmp_path / "q", "--bits", 8)
    assert result.code == 0, result.err
    whole, small = hub.load("demo", device="cpu"), hub.load(tmp_path / "q", device="cpu")
    assert small.config.language_bits == 8
    weights = load_file(tmp_path / "q" / "model.safetensors")
    layers = {n: t for n, t in weights.items() if n.startswith("language_model.model.layers")}
    kept = sum(t.numel() for n, t in layers.items() if t.dtype == torch.int8)
    assert kept > 0.98 * sum(t.numel() for t in layers.values())
    with torch.inference_mode():
        visual = whole.get_visual_tokens(torch.rand(2, 1, *whole.preparation.size))
        prompts = whole.processor.prompts(["Is there a pleural effusion?"] * 2)
        logits, expected = (
            model(**prompts, visual_tokens=visual).logits.log_softmax(-1)
            for model in (small, whole)
        )
    words = slice(whole.num_visual_tokens, None)  # what follows a visual token is never used
    divergence = (expected.exp() * (expected - logits)).sum(-1)[:, words]
    assert float(divergence.max()) < 0.02
    shares = small.score(visual, ["Which phase?"] * 2, [["arterial", "delayed"]] * 2)
    for found, right in zip(
        shares,
        whole.score(visual, ["Which phase?"] * 2, [["arterial", "delayed"]] * 2),
        strict=True,
    ):
        assert found == pytest.approx(right, abs=0.05)


def test_quantized_models_are_saved_and_refused_where_they_do_not_fit(run, tmp_path):
    model = tiny.vlm()
    model.quantize()
    expected = model.report(tiny.scan(), max_new_tokens=8)
    model.save_pretrained(tmp_path / "q")
    model.processor.save_pretrained(tmp_path / "q")
    loaded = hub.load(tmp_path / "q", device="cpu")
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.report(tiny.scan(), max_new_tokens=8) == expected
    with pytest.raises(ValueError, match="quantized already"):
        loaded.quantize()
    result = run("model", "quantize", tmp_path / "q", "-o", tmp_path / "again")
    assert result.code == 1 and "quantized already" in result.err
    assert not (tmp_path / "again").exists()
    result = run("model", "export", tmp_path / "q", "-o", tmp_path / "e", "--format", "engine")
    assert result.code == 1 and "export the whole one" in result.err
    assert run("model", "quantize", "demo", "-o", tmp_path / "q").code == 2  # exists
    assert run("model", "quantize", "demo", "-o", tmp_path / "x", "--bits", 3).code == 2
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["language_bits"] = 5
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="language_bits 5 is unknown"):
        hub.load(tmp_path / "q", device="cpu")
