"""`model export`: a folder of graphs that were compared, or nothing."""

from __future__ import annotations

import json

from med3dvlm.models import export
from tests.models import tiny


def test_export_writes_what_is_equal_and_nothing_else(run, tmp_path, monkeypatch):
    model = tiny.vlm()
    model.save_pretrained(tmp_path / "model")
    model.processor.save_pretrained(tmp_path / "model")
    target = tmp_path / "graphs"
    assert run("model", "export", tmp_path / "model", "-o", target, "--format", "trt").code == 2

    result = run("model", "export", tmp_path / "model", "-o", target, "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["errors"]["encoder"] < 1e-4
    assert (target / "encoder.onnx").is_file() and (target / "processor_config.json").is_file()
    assert run("model", "export", tmp_path / "model", "-o", target).code == 2

    monkeypatch.setattr(export, "_write", lambda *_: None)
    monkeypatch.setattr(export, "_error", lambda *_: 0.5)
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, **__: None)
    other = tmp_path / "other"
    result = run("model", "export", tmp_path / "model", "-o", other)
    assert result.code == 1
    assert "encoder.onnx differs from the model by 5.0e-01" in result.err
    assert not other.exists()
