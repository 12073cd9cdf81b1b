"""Names on the hub, from its cache: the machine has no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from med3dvlm.hub import ModelNotFoundError, resolve

NAME = "some-owner/some-model"


def cache(root: Path, parts: dict[str, bytes], wanted: list[str]) -> Path:
    """What a download leaves: a snapshot, of whose parts the index names those that are wanted."""
    model = root / "models--some-owner--some-model"
    folder = model / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs/main").write_text("0" * 40)
    (folder / "config.json").write_text("{}")
    index = {"weight_map": {f"layer.{part}": part for part in wanted}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name, content in parts.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_name_is_its_folder_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    parts = {"one.safetensors": b"1", "two.safetensors": b"2"}
    folder = cache(tmp_path, parts, wanted=list(parts))
    assert resolve(NAME) == folder


def test_an_interrupted_download_is_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache(tmp_path, {"one.safetensors": b"1"}, wanted=["one.safetensors", "two.safetensors"])
    with pytest.raises(ModelNotFoundError, match="is not whole in the local cache"):
        resolve(NAME)
