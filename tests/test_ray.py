"""A Ray cluster prepares and embeds what this process does. In one file, for one cluster."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from med3dvlm import load
from med3dvlm.data.phantoms import write_studies
from med3dvlm.data.prepare import prepare_archive
from med3dvlm.search import How, SearchIndex, build_index
from tests.data.test_store import M3D, content

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_store_has_the_same_bytes(tmp_path):
    write_studies(4, tmp_path / "m3d", layout="m3d", split="test")
    for engine in ("local", "ray"):
        output = tmp_path / engine
        prepare_archive(
            "m3d-cap", tmp_path / "m3d", output, preparation=M3D, shard=2, engine=engine
        )
    assert content(tmp_path / "ray") == content(tmp_path / "local")


def test_an_index_has_the_same_vectors(tmp_path):
    model = load("demo", part="search")
    write_studies(3, tmp_path / "a", split="test")
    (tmp_path / "a" / "manifest.jsonl").unlink()
    (tmp_path / "a" / "broken.nii.gz").write_bytes(b"no scan")
    here = build_index(tmp_path / "a", model, tmp_path / "here")
    build_index(tmp_path / "a" / "test-000000", model, tmp_path / "there")
    how = How(batch_size=2, workers=1, engine="ray")
    there = build_index(tmp_path / "a", model, tmp_path / "there", how=how)
    assert (there.total, there.added, there.unchanged) == (3, 2, 1)
    assert there.refused == here.refused and len(here.refused) == 1
    made = [
        {entry.study.path: entry.vector for entry in _entries(tmp_path / name)}
        for name in ("here", "there")
    ]
    assert made[0].keys() == made[1].keys()
    for path, vector in made[0].items():
        np.testing.assert_allclose(vector, made[1][path], atol=1e-5)


def _entries(folder):
    return SearchIndex.open(folder).entries([])
