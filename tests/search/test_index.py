"""The index: exact, incremental, refusing what does not fit, whole after any crash."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from med3dvlm.scan import PRESETS, Scan
from med3dvlm.search import SearchIndex, SearchIndexError, Study, build_index, find_scans


class Histogram:
    """A real, tiny embedding: the histogram of a scan's values."""

    def __init__(self, label: str = "histogram", mark: str = "aaaa"):
        self.label, self.mark, self.preparation = label, mark, PRESETS["m3d"]
        self.seen = 0

    def fingerprint(self) -> str:
        return self.mark

    def embed_scans(self, scans: list[Scan]) -> np.ndarray:
        self.seen += len(scans)
        rows = [np.histogram(scan.array, bins=16, range=(-1000, 1000))[0] for scan in scans]
        rows = np.array(rows, dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def archive(tmp_path):
    """Five volumes in HU, each of its own density; one with a report."""
    folder = tmp_path / "archive"
    (folder / "deep").mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(5):
        name = folder / ("deep" if i % 2 else "") / f"v{i}.npy"
        np.save(name, (random.normal(-800 + 400 * i, 30, (8, 9, 10))).astype(np.float32))
    (folder / "v2.txt").write_text("Report of two.")
    return folder


def test_every_scan_finds_itself_first(archive, tmp_path):
    model = Histogram()
    result = build_index(archive, model, tmp_path / "index")
    assert (result.total, result.added, result.refused) == (5, 5, [])
    index = SearchIndex.open(tmp_path / "index", model=model)
    for row, study in zip(index.embeddings, index.studies, strict=True):
        hit = index.search(row, top=1)[0]
        assert (hit.rank, hit.path) == (1, study.path)
        assert hit.score == pytest.approx(1, abs=1e-6)
    assert next(s for s in index.studies if s.id == "v2").report == "Report of two."
    assert index.info()["studies"] == 5 and index.info()["with report"] == 1


def test_search_equals_brute_force():
    random = np.random.default_rng(1)
    rows = random.standard_normal((200, 12)).astype(np.float32)
    index = SearchIndex.create("unused", Histogram())
    index.add([Study(str(i), str(i), "") for i in range(200)], rows)
    query = random.standard_normal(12).astype(np.float32)
    expected = np.argsort(-(rows @ query))[:7]
    assert [int(hit.id) for hit in index.search(query, top=7)] == expected.tolist()


def test_unchanged_scans_are_not_embedded_again(archive, tmp_path):
    model = Histogram()
    build_index(archive, model, tmp_path / "index")
    np.save(archive / "v0.npy", np.full((8, 9, 10), 900, np.float32) + np.eye(10)[:9])
    result = build_index(archive, model, tmp_path / "index")
    assert (result.total, result.added, result.unchanged) == (5, 1, 4)
    assert model.seen == 6


def test_a_scan_that_cannot_be_read_is_named_and_the_others_are_indexed(archive, tmp_path):
    (archive / "broken.nii.gz").write_text("no volume")
    result = build_index(archive, Histogram(), tmp_path / "index")
    assert result.total == 5
    ((path, reason),) = result.refused
    assert path.endswith("broken.nii.gz") and "broken.nii.gz" in reason


@pytest.mark.parametrize("crash_at", range(1, 5))
def test_a_crash_while_saving_leaves_the_old_index_whole(archive, tmp_path, monkeypatch, crash_at):
    model, folder = Histogram(), tmp_path / "index"
    build_index(archive, model, folder)
    before = SearchIndex.open(folder).studies
    np.save(archive / "new.npy", np.random.default_rng(3).normal(0, 99, (8, 9, 10)))
    real, calls = os.replace, 0

    def replace(*args):
        nonlocal calls
        calls += 1
        if calls == crash_at:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(os, "replace", replace)
    if crash_at <= 3:
        with pytest.raises(OSError):
            build_index(archive, model, folder)
        assert SearchIndex.open(folder).studies == before
    monkeypatch.undo()
    assert build_index(archive, model, folder).total == 6
    assert len(list(folder.iterdir())) == 3


def test_an_index_of_another_model_is_refused_with_both_named(archive, tmp_path):
    build_index(archive, Histogram(), tmp_path / "index")
    other = Histogram("other", "bbbb")
    with pytest.raises(SearchIndexError, match=r"histogram.*aaaa.*other.*bbbb"):
        SearchIndex.open(tmp_path / "index", model=other)
    with pytest.raises(SearchIndexError, match="build the index again"):
        build_index(archive, other, tmp_path / "index")


def damage_truncate(folder):
    path = next(folder.glob("embeddings-*.npy"))
    path.write_bytes(path.read_bytes()[:200])


def damage_lines(folder):
    path = next(folder.glob("studies-*.jsonl"))
    path.write_text(path.read_text().split("\n", 1)[1])


def damage_missing(folder):
    next(folder.glob("embeddings-*.npy")).unlink()


def damage_head(folder):
    (folder / "index.json").write_text("{")


@pytest.mark.parametrize("damage", [damage_truncate, damage_lines, damage_missing, damage_head])
def test_a_damaged_index_says_so(archive, tmp_path, damage):
    build_index(archive, Histogram(), tmp_path / "index")
    damage(tmp_path / "index")
    with pytest.raises(SearchIndexError, match="is damaged"):
        SearchIndex.open(tmp_path / "index")


def test_conditions_and_unknown_columns(archive, tmp_path):
    rows = [{"path": f"v{i}.npy", "id": f"s{i}", "site": "ab"[i // 2 % 2]} for i in (0, 2, 4)]
    lines = "\n".join(json.dumps(row) for row in rows)
    (archive / "manifest.jsonl").write_text(lines)
    build_index(archive, Histogram(), tmp_path / "index")
    index = SearchIndex.open(tmp_path / "index")
    hits = index.search(index.embeddings[0], where={"site": "a"})
    assert {hit.id for hit in hits} == {"s0", "s4"}
    with pytest.raises(SearchIndexError, match=r"'town'.*modality.*site"):
        index.search(index.embeddings[0], where={"town": "x"})


def test_a_manifest_cannot_point_outside_its_folder(archive):
    (archive / "m.csv").write_text("path\n../../etc/passwd\n")
    with pytest.raises(SearchIndexError, match="outside"):
        find_scans(archive / "m.csv")
    (archive / "m.csv").write_text("file\nv0.npy\n")
    with pytest.raises(SearchIndexError, match="no path"):
        find_scans(archive / "m.csv")


def test_nothing_to_index(tmp_path):
    with pytest.raises(SearchIndexError, match="does not exist"):
        find_scans(tmp_path / "nowhere")
    with pytest.raises(SearchIndexError, match="holds no scan"):
        find_scans(tmp_path)
    with pytest.raises(SearchIndexError, match="is no index"):
        SearchIndex.open(tmp_path)
