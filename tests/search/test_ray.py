"""A Ray cluster embeds what this process embeds."""

from __future__ import annotations

import numpy as np
import pytest

from med3dvlm import load
from med3dvlm.data.phantoms import write_studies
from med3dvlm.search import How, SearchIndex, build_index


@pytest.mark.timeout(300)
def test_a_cluster_fills_an_index_as_this_process_does(tmp_path):
    import ray

    model = load("demo", part="search")
    write_studies(3, tmp_path / "a", split="test")
    (tmp_path / "a" / "manifest.jsonl").unlink()
    (tmp_path / "a" / "broken.nii.gz").write_bytes(b"no scan")
    here = build_index(tmp_path / "a", model, tmp_path / "here")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        how = How(batch_size=2, workers=1, engine="ray")
        there = build_index(tmp_path / "a", model, tmp_path / "there", how=how)
        again = build_index(tmp_path / "a", model, tmp_path / "there", how=how)
    finally:
        ray.shutdown()
    assert (there.total, there.added, len(there.refused)) == (3, 3, 1)
    assert there.refused == here.refused
    assert (again.added, again.unchanged) == (0, 3)
    made = [
        {entry.study.path: entry.vector for entry in _entries(tmp_path / name)}
        for name in ("here", "there")
    ]
    assert made[0].keys() == made[1].keys()
    for path, vector in made[0].items():
        np.testing.assert_allclose(vector, made[1][path], atol=1e-5)


def _entries(folder):
    return SearchIndex.open(folder).entries([])
