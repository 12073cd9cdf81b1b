"""ONNX graphs compute what the models compute, or are not written."""

from __future__ import annotations

import numpy as np
import onnxruntime
import torch

from med3dvlm.models import Med3DVLMProcessor
from med3dvlm.models.export import export_onnx
from tests.models import tiny


def run(path, **inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {name: np.asarray(value) for name, value in inputs.items()})


def test_dual_encoder_as_graphs(tmp_path):
    model = tiny.dual()
    errors = export_onnx(model, tmp_path)
    assert set(errors) == {"image", "text"} and max(errors.values()) < 1e-4
    scans = [tiny.scan(seed) for seed in range(4)]
    (images,) = run(tmp_path / "image.onnx", volumes=model.processor.volumes(scans))
    np.testing.assert_allclose(images, model.embed_scans(scans), atol=1e-5)
    texts = ["small left pleural effusion", "no consolidation", "The heart is enlarged. right"]
    tokens = model.processor.tokens(texts)
    (words,) = run(tmp_path / "text.onnx", **tokens)
    np.testing.assert_allclose(words, model.embed_texts(texts), atol=1e-5)
    assert Med3DVLMProcessor.from_folder(tmp_path).preparation == model.preparation


def test_encoder_of_a_language_model_as_graph(tmp_path):
    model = tiny.vlm()
    export_onnx(model, tmp_path)
    volumes = model.processor.volumes(tiny.scan())
    low, high, visual = run(tmp_path / "encoder.onnx", volumes=volumes)
    with torch.no_grad():
        for found, wanted in zip((low, high), model.encode(volumes), strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(visual, model.see(tiny.scan()), atol=1e-4, rtol=1e-4)
