"""The index: exact, incremental, refusing what does not fit, whole after any crash."""

from __future__ import annotations

import json
import os
import signal
import time

import numpy as np
import pytest

from med3dvlm.data.sources import SourceError, find_scans
from med3dvlm.scan import PRESETS, Scan
from med3dvlm.search import SearchIndex, SearchIndexError, Study, build_index


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
    other = Histogram()
    other.preparation = PRESETS["ct-rate"]
    with pytest.raises(SearchIndexError, match=r"preparation.*size \[128.*against \[240"):
        SearchIndex.open(tmp_path / "index", model=other)


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


def edit_head(folder, **changes):
    head = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**head, **changes}))


def damage_claim(folder):
    """A header that claims six terabytes."""
    path = next(folder.glob("embeddings-*.npy"))
    path.write_bytes(
        path.read_bytes().replace(b"(5, 16), }           ", b"(99999999999, 16), } ", 1)
    )


def damage_header(folder):
    path = next(folder.glob("embeddings-*.npy"))
    path.write_bytes(path.read_bytes().replace(b"}", b" ", 1))


def damage_values(folder):
    path = next(folder.glob("embeddings-*.npy"))
    np.save(path, np.full((5, 16), np.nan, np.float32))


def damage_names(folder):
    outside = folder.parent / "outside.npy"
    np.save(outside, np.zeros((5, 16), np.float32))
    edit_head(folder, embeddings="../outside.npy")


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncate,
        damage_lines,
        damage_missing,
        damage_head,
        damage_claim,
        damage_header,
        damage_values,
        damage_names,
        lambda folder: edit_head(folder, count=4),
        lambda folder: edit_head(folder, dim=15),
        lambda folder: (folder / "index.json").write_text("[]"),
        lambda folder: next(folder.glob("studies-*")).write_text('{"id": 1}\n' * 5),
    ],
)
def test_a_damaged_index_says_so(archive, tmp_path, damage):
    build_index(archive, Histogram(), tmp_path / "index")
    damage(tmp_path / "index")
    with pytest.raises(SearchIndexError, match="is damaged"):
        SearchIndex.open(tmp_path / "index")


def test_another_format_is_named(archive, tmp_path):
    build_index(archive, Histogram(), tmp_path / "index")
    edit_head(tmp_path / "index", format=99)
    with pytest.raises(SearchIndexError, match="format 99, this version reads 1: delete"):
        SearchIndex.open(tmp_path / "index")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_writer_leaves_a_whole_index_and_its_rubbish_goes(tmp_path):
    rows = np.eye(300, 40, dtype=np.float32)

    def write_for_ever():
        count = 10
        while True:
            index = SearchIndex.open(tmp_path)
            count = 10 + (count + 37) % 290
            index.discard([study.path for study in index.studies])
            index.add([Study(str(i), str(i), "") for i in range(count)], rows[:count])
            index.save()

    index = SearchIndex.create(tmp_path, Histogram())
    index.add([Study("0", "0", "")], rows[:1])
    index.save()
    for delay in (0.01, 0.02, 0.03, 0.05, 0.08):
        child = os.fork()
        if not child:
            try:
                write_for_ever()
            finally:
                os._exit(1)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        index = SearchIndex.open(tmp_path)
        assert (index.embeddings == rows[: len(index)]).all()
    index.save()
    assert len(list(tmp_path.iterdir())) == 3


def test_two_writers_do_not_undo_each_other(archive, tmp_path):
    build_index(archive, Histogram(), tmp_path / "i")
    first, second = SearchIndex.open(tmp_path / "i"), SearchIndex.open(tmp_path / "i")
    first.discard([first.studies[0].path])
    first.save()
    with pytest.raises(SearchIndexError, match="open it again"):
        second.save()
    assert len(SearchIndex.open(tmp_path / "i")) == 4
    with pytest.raises(SearchIndexError, match="open it again"):
        SearchIndex.create(tmp_path / "i", Histogram()).save()


def test_what_does_not_fit_is_refused(archive, tmp_path):
    build_index(archive, Histogram(), tmp_path / "i")
    index = SearchIndex.open(tmp_path / "i")
    for query in (np.ones(15), np.ones((1, 16)), np.full(16, np.nan)):
        with pytest.raises(SearchIndexError, match="dimension 16"):
            index.search(query)
    with pytest.raises(SearchIndexError, match="one study or more"):
        index.search(np.ones(16), top=0)
    for rows in (np.ones((2, 16)), np.ones((1, 15)), np.full((1, 16), np.inf)):
        with pytest.raises(SearchIndexError, match="one row of finite numbers"):
            index.add([Study("a", "a", "")], rows)


def test_a_moved_scan_and_a_new_report_need_no_embedding(archive, tmp_path):
    model = Histogram()
    build_index(archive, model, tmp_path / "i")
    (archive / "v0.npy").rename(archive / "moved.npy")
    (archive / "v4.txt").write_text("A late report.")
    result = build_index(archive, model, tmp_path / "i")
    assert (result.total, result.added, result.unchanged, result.updated) == (5, 1, 4, 1)
    assert model.seen == 5
    studies = {study.id: study for study in SearchIndex.open(tmp_path / "i").studies}
    assert "v0" not in studies and studies["moved"].metadata["shape"] == [8, 9, 10]
    assert studies["v4"].report == "A late report."


def test_a_build_goes_on_from_its_last_save(archive, tmp_path):
    class Breaks(Histogram):
        def embed_scans(self, scans):
            if self.seen == 4:
                raise RuntimeError("power cut")
            return super().embed_scans(scans)

    with pytest.raises(RuntimeError):
        build_index(archive, Breaks(), tmp_path / "i", batch_size=2, save_every=2)
    assert len(SearchIndex.open(tmp_path / "i")) == 4
    model = Histogram()
    assert build_index(archive, model, tmp_path / "i").total == 5 and model.seen == 1


def test_one_scan_that_the_model_refuses_does_not_cost_the_batch(archive, tmp_path):
    class Picky(Histogram):
        def embed_scans(self, scans):
            if any("v3" in scan.source for scan in scans):
                raise ValueError("nothing to see")
            rows = super().embed_scans(scans)
            rows[["v1" in scan.source for scan in scans]] = np.nan
            return rows

    seen = []
    result = build_index(archive, Picky(), tmp_path / "i", on_error=lambda *it: seen.append(it))
    assert result.total == 3 and seen == result.refused
    reasons = {os.path.basename(path): reason for path, reason in result.refused}
    assert reasons["v3.npy"] == "nothing to see" and "finite" in reasons["v1.npy"]


def test_ids_keep_their_dots_and_differ(tmp_path):
    for name in ("1.2.3.npy", "1.2.4.npy", "a.npy", "a.nrrd", ".hidden.npy"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "1.2.4.txt").write_bytes(b"\xef\xbb\xbfFour.")
    found = {source.id: source.report for source in find_scans(tmp_path)}
    assert found == {"1.2.3": "", "1.2.4": "Four.", "a.npy": "", "a.nrrd": ""}


def test_folders_of_slices_and_their_reports(tmp_path):
    dicom = b"\0" * 128 + b"DICM"
    for name in ("ct/s1/IM1", "ct/s2/IM.2.5", "png/1.png", "png/2.png", "v/a.nii", "v/p.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(dicom if "IM" in name else b"x")
    (tmp_path / "ct/s1/report.txt").write_text("Inside.")
    (tmp_path / "ct/s2.txt").write_text("Beside.")
    found = {source.id: source.report for source in find_scans(tmp_path)}
    assert found == {"ct/s1": "Inside.", "ct/s2": "Beside.", "png": "", "v/a": ""}


def test_an_index_inside_the_archive_is_no_scan(archive):
    model = Histogram()
    for _ in range(2):
        result = build_index(archive, model, archive / "index")
        assert (result.total, result.refused) == (5, [])
    with pytest.raises(SearchIndexError, match="give the index its own"):
        build_index(archive, model, archive)


def test_links_out_of_the_folder_are_refused_unless_allowed(archive, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "s.txt").write_text("secret")
    np.save(secret / "s.npy", np.random.default_rng(5).normal(0, 9, (8, 9, 10)))
    (archive / "v0.txt").symlink_to(secret / "s.txt")
    (archive / "link.npy").symlink_to(secret / "s.npy")
    (archive / "folder").symlink_to(secret)
    (archive / "circle").symlink_to(archive)
    result = build_index(archive, Histogram(), tmp_path / "i")
    assert result.total == 5
    assert sorted(os.path.basename(path) for path, _ in result.refused) == ["folder", "link.npy"]
    assert not any(s.report == "secret" for s in SearchIndex.open(tmp_path / "i").studies)
    assert build_index(archive, Histogram(), tmp_path / "j", allow_outside=True).total == 7


def test_a_report_of_several_lines_survives_a_spreadsheet(archive):
    text = '\ufeffpath,report,age\r\nv0.npy,"Findings: one.\nImpression: two.",61\r\n'
    (archive / "m.csv").write_bytes(text.encode())
    (source,) = find_scans(archive / "m.csv")
    assert source.report == "Findings: one.\nImpression: two."
    assert source.metadata == {"age": "61"}


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
    with pytest.raises(SourceError, match="outside"):
        find_scans(archive / "m.csv")
    assert len(find_scans(archive / "m.csv", allow_outside=True)) == 1
    (archive / "m.csv").write_text("path\nv0.npy\n./v0.npy\n")
    with pytest.raises(SourceError, match="second time"):
        find_scans(archive / "m.csv")
    (archive / "m.jsonl").write_text('{"path": "a\\u0000b"}\n')
    with pytest.raises(SourceError, match="row 1"):
        find_scans(archive / "m.jsonl")
    (archive / "m.csv").write_text("file\nv0.npy\n")
    with pytest.raises(SourceError, match="no path"):
        find_scans(archive / "m.csv")


def test_nothing_to_index(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        find_scans(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="holds no scan"):
        find_scans(tmp_path)
    with pytest.raises(SearchIndexError, match="is no index"):
        SearchIndex.open(tmp_path)
