"""The index: incremental, refusing what does not fit, whole after any kill, mended after damage."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from med3dvlm.data.sources import SourceError, find_scans
from med3dvlm.scan import Preparation
from med3dvlm.search import (
    How,
    SearchIndex,
    SearchIndexError,
    Study,
    build_index,
    rebuild_index,
)
from med3dvlm.search.index import make_entry
from med3dvlm.search.map import write_map
from med3dvlm.search.sheet import HEIGHT, middle_slices
from tests.search.embedder import DIM, Histogram

REPO = Path(__file__).parents[2]


def write_scans(folder: Path, count: int, *, first: int = 0) -> None:
    """Volumes, each with values of its own spread."""
    folder.mkdir(exist_ok=True)
    for i in range(first, first + count):
        np.save(folder / f"s{i:03d}.npy", volume(0.2 + 0.1 * (i % 50), seed=i))


def volume(power: float, seed: int = 0) -> np.ndarray:
    """(8, 9, 10) values whose mean is 1 / (power + 1) of the greatest."""
    return (1000 * np.random.default_rng(seed).random((8, 9, 10)) ** power).astype(np.float32)


@pytest.fixture
def archive(tmp_path):
    """Five volumes, each with values of its own spread; one with a report."""
    folder = tmp_path / "archive"
    (folder / "deep").mkdir(parents=True)
    for i in range(5):
        np.save(folder / ("deep" if i % 2 else "") / f"v{i}.npy", volume(2.0 ** (i - 2)))
    (folder / "v2.txt").write_text("Report of two.")
    return folder


def studies(folder) -> list[Study]:
    return SearchIndex.open(folder).select()


def random_entries(count: int, *, seed: int = 1, reports: tuple[str, ...] = ("",)) -> list:
    random = np.random.default_rng(seed)
    rows = random.standard_normal((count, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    model = Histogram()
    entries = []
    for i, row in enumerate(rows):
        report = reports[i % len(reports)]
        study = Study(f"{i}", f"/a/{i:05d}", f"{i}", report, {"site": "ab"[i % 2], "age": i})
        entries.append(make_entry(study, row, model.embed_texts([report])[0] if report else None))
    return entries


def filled(folder, entries) -> SearchIndex:
    index = SearchIndex.create(folder, Histogram())
    index.put(entries)
    index.tend()
    return index


def test_every_scan_finds_itself_first(archive, tmp_path):
    model = Histogram()
    result = build_index(archive, model, tmp_path / "index")
    assert (result.total, result.added, result.refused) == (5, 5, [])
    index = SearchIndex.open(tmp_path / "index", model=model)
    damage: list[str] = []
    for entry in index.entries(damage):
        hit = index.search(vector=entry.vector, top=1)[0]
        assert (hit.rank, hit.path) == (1, entry.study.path)
        assert hit.score == pytest.approx(1, abs=1e-6) == hit.similarity
    assert not damage and not index.verify()
    assert next(s for s in studies(tmp_path / "index") if s.id == "v2").report == "Report of two."
    info = index.info()
    assert (info["studies"], info["with report"], info["search"]) == (5, 1, "exact")


def test_search_equals_brute_force_on_every_page(tmp_path):
    entries = random_entries(300)
    index = filled(tmp_path / "i", entries)
    rows = np.stack([entry.vector for entry in entries])
    query = np.random.default_rng(2).standard_normal(DIM).astype(np.float32)
    expected = np.argsort(-(rows @ query))
    found = [hit for page in (1, 2, 3) for hit in index.search(vector=query, top=7, page=page)]
    assert [int(hit.id) for hit in found] == expected[:21].tolist()
    assert [hit.rank for hit in found] == list(range(1, 22))
    wanted = [int(i) for i in expected if i % 2 == 0 and i >= 100][:5]
    where = ["site=a", "age>=100"]
    assert [int(hit.id) for hit in index.search(vector=query, top=5, where=where)] == wanted
    assert not index.search(vector=query, where=["site=c"])


def test_an_approximate_index_is_made_by_itself_and_finds_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("med3dvlm.search.lance.EXACT_BELOW", 2000)
    monkeypatch.setattr("med3dvlm.search.lance.PARTITION", 100)
    entries = random_entries(3000)
    index = filled(tmp_path / "i", entries)
    assert index.info()["search"].startswith("approximate")
    rows = np.stack([entry.vector for entry in entries])
    queries = np.random.default_rng(2).standard_normal((20, DIM)).astype(np.float32)
    hits = 0
    for query in queries:
        expected = set(np.argsort(-(rows @ query))[:10].tolist())
        hits += len(expected & {int(hit.id) for hit in index.search(vector=query)})
    assert hits >= 0.95 * 200
    late = random_entries(1, seed=9)[0]
    index.put([make_entry(Study("late", "/a/late", "x"), late.vector, None)])
    assert index.search(vector=late.vector)[0].id == "late"
    assert not index.verify()


REPORTS = (
    "Findings: Left pleural effusion. Consolidation in the right lower lobe.",
    "Findings: Left pleural effusion. No consolidation.",
    "Findings: No pleural effusion. Lung nodule, 8 mm.",
    "",
)


def test_words_find_what_reports_assert_and_denied_findings_are_left_out(tmp_path):
    filled(tmp_path / "i", random_entries(40, reports=REPORTS))
    index = SearchIndex.open(tmp_path / "i", model=Histogram())

    def found(text: str | None, **options) -> set[str]:
        return {hit.report for hit in index.search(text, top=10, **options)}

    assert found("pleural effusion") == set(REPORTS[:2])
    assert found("pleural effusion without consolidation") == {REPORTS[1]}
    assert found("lung nodule") == {REPORTS[2]}
    everything = [hit.report for hit in index.search("no pleural effusion", top=40)]
    assert set(everything) == set(REPORTS[2:]) and len(everything) == 20
    assert found(None, vector=np.ones(DIM), where=["finding=lung nodule"]) == {REPORTS[2]}
    assert found("pleural effusion", plain=True) != set(REPORTS[:2])
    both = index.search(
        "pleural effusion", vector=index.search("nodule")[0].similarity * np.ones(DIM)
    )
    assert both and all(0 < hit.score <= 1 for hit in both)


def test_unchanged_scans_are_not_embedded_again(archive, tmp_path):
    model = Histogram()
    build_index(archive, model, tmp_path / "index")
    np.save(archive / "v0.npy", volume(3))
    result = build_index(archive, model, tmp_path / "index")
    assert (result.total, result.added, result.unchanged) == (5, 1, 4)
    assert model.seen == 6


def test_a_moved_scan_and_a_new_report_need_no_embedding(archive, tmp_path):
    model = Histogram()
    build_index(archive, model, tmp_path / "i")
    (archive / "v0.npy").rename(archive / "moved.npy")
    (archive / "v4.txt").write_text("A late report.")
    result = build_index(archive, model, tmp_path / "i")
    assert (result.total, result.added, result.unchanged, result.updated) == (5, 1, 4, 1)
    assert model.seen == 5
    found = {study.id: study for study in studies(tmp_path / "i")}
    assert "v0" not in found and found["moved"].metadata["shape"] == [8, 9, 10]
    assert found["v4"].report == "A late report."


def test_one_unreadable_scan_is_named_and_the_others_are_indexed(archive, tmp_path):
    (archive / "broken.nii.gz").write_text("no volume")
    result = build_index(archive, Histogram(), tmp_path / "index")
    assert result.total == 5
    ((path, reason),) = result.refused
    assert path.endswith("broken.nii.gz") and "broken.nii.gz" in reason


def test_one_scan_that_the_model_refuses_does_not_cost_the_batch(archive, tmp_path):
    class Picky(Histogram):
        def embed_volumes(self, volumes):
            means = volumes.mean(dim=(1, 2, 3, 4))
            if (means < 0.25).any():  # v4
                raise ValueError("nothing to see")
            rows = super().embed_volumes(volumes)
            rows[((means > 0.6) & (means < 0.72)).numpy()] = np.nan
            return rows

    seen = []
    how = How(on_error=lambda *it: seen.append(it))
    result = build_index(archive, Picky(), tmp_path / "i", how=how)
    assert result.total == 3 and seen == result.refused
    reasons = {os.path.basename(path): reason for path, reason in result.refused}
    assert reasons["v4.npy"] == "nothing to see" and "finite" in reasons["v1.npy"]


@pytest.mark.timeout(60)
def test_a_build_killed_at_any_moment_goes_on_with_nothing_missing_or_twice(tmp_path):
    write_scans(tmp_path / "a", 30)
    folder, counts = tmp_path / "i", []
    command = [sys.executable, "-m", "tests.search.embedder", tmp_path / "a", folder, "0.02"]
    for saved in (1, 3, 4):  # kill once it has got so far
        child = subprocess.Popen(command, cwd=REPO)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and child.poll() is None:
            versions = list(folder.glob("studies-1.lance/_versions/*.manifest"))
            if len(versions) > (counts[-1] if counts else 0) + saved:
                break
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        counts.append(len(list(folder.glob("studies-1.lance/_versions/*.manifest"))))
        assert not SearchIndex.open(folder).verify()
    model = Histogram()
    before = len(SearchIndex.open(folder))
    assert 0 < before < 30
    result = build_index(tmp_path / "a", model, folder)
    assert model.seen == 30 - before == result.added
    expected = [str(tmp_path / "a" / f"s{i:03d}.npy") for i in range(30)]
    assert [study.path for study in studies(folder)] == expected
    assert not SearchIndex.open(folder).verify()


@pytest.mark.timeout(60)
def test_searches_go_on_while_another_process_adds(tmp_path):
    write_scans(tmp_path / "a", 4)
    write_scans(tmp_path / "b", 40, first=100)
    build_index(tmp_path / "a", Histogram(), tmp_path / "i")
    index = SearchIndex.open(tmp_path / "i", model=Histogram())
    first = next(index.entries([]))
    command = [sys.executable, "-m", "tests.search.embedder", tmp_path / "b", tmp_path / "i", "0"]
    child = subprocess.Popen(command, cwd=REPO)
    sizes = []
    while child.poll() is None:
        hits = index.search("report", vector=first.vector, top=3)
        assert hits[0].path == first.study.path
        sizes.append(len(index))
    assert child.returncode == 0 and sizes == sorted(sizes)
    assert len(index) == 44 and any(4 < size < 44 for size in sizes)
    assert not index.verify()


def test_two_builds_into_one_index_do_not_undo_each_other(tmp_path):
    write_scans(tmp_path / "a", 10)
    write_scans(tmp_path / "b", 10, first=100)
    errors = []

    def build(name):
        try:
            build_index(tmp_path / name, Histogram(), tmp_path / "i", how=How(1, save_every=2))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=build, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(studies(tmp_path / "i")) == 20


def test_a_full_disk_leaves_the_old_index_whole(archive, tmp_path, monkeypatch):
    build_index(archive, Histogram(), tmp_path / "i")
    before = studies(tmp_path / "i")
    write_scans(archive, 2)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("med3dvlm.search.lance._arrow", full)
        with pytest.raises(SearchIndexError, match="No space left"):
            build_index(archive, Histogram(), tmp_path / "i")
    assert studies(tmp_path / "i") == before
    assert build_index(archive, Histogram(), tmp_path / "i").total == 7


def test_an_index_of_another_model_is_refused_with_both_named(archive, tmp_path):
    build_index(archive, Histogram(), tmp_path / "index")
    other = Histogram("other", "bbbb")
    with pytest.raises(SearchIndexError, match=r"histogram.*aaaa.*other.*bbbb"):
        SearchIndex.open(tmp_path / "index", model=other)
    with pytest.raises(SearchIndexError, match="index rebuild"):
        build_index(archive, other, tmp_path / "index")
    other = Histogram()
    other.preparation = Preparation(size=(4, 8, 8))
    with pytest.raises(SearchIndexError, match=r"preparation.*size \[8, 8, 8\] against \[4"):
        SearchIndex.open(tmp_path / "index", model=other)


def test_rebuild_moves_to_another_model_while_the_old_one_is_searched(archive, tmp_path):
    build_index(archive, Histogram(), tmp_path / "i")
    running = SearchIndex.open(tmp_path / "i", model=Histogram())
    entry = next(running.entries([]))
    other = Histogram("other", "bbbb")

    def while_it_rebuilds(done, total):
        if done == 1:
            assert running.search(vector=entry.vector)[0].path == entry.study.path
            np.save(archive / "late.npy", volume(3))
            build_index(archive / "late.npy", Histogram(), tmp_path / "i")
            running.remove([str(archive / "v4.npy")])

    how = How(batch_size=1, workers=1, progress=while_it_rebuilds)
    result = rebuild_index(tmp_path / "i", other, how=how)
    assert (result.total, result.refused, result.damage) == (5, [], [])
    index = SearchIndex.open(tmp_path / "i", model=other)
    assert index.info()["model"] == "other" and index.info()["still answers"] == ["histogram"]
    ids = {study.id for study in index.select()}
    assert ids == {"late", "v0", "deep/v1", "v2", "deep/v3"}
    assert next(s for s in index.select() if s.id == "v2").report == "Report of two."
    assert running.search(vector=entry.vector)[0].path == entry.study.path  # until it is reloaded
    with pytest.raises(SearchIndexError, match="now of model 'other'"):
        build_index(archive, Histogram(), tmp_path / "i")
    late = SearchIndex.open(tmp_path / "i", model=other)
    assert rebuild_index(tmp_path / "i", other).total == 5
    assert len(list((tmp_path / "i").glob("studies-*"))) == 1  # the old model is given up
    assert late.search(vector=entry.vector)  # follows to the new table
    with pytest.raises(SearchIndexError, match="'other'.*not by 'histogram'"):
        running.search(vector=entry.vector)


def test_a_rebuild_that_was_stopped_goes_on(archive, tmp_path):
    build_index(archive, Histogram(), tmp_path / "i")

    class Breaks(Histogram):
        def embed_volumes(self, volumes):
            if self.seen == 4:
                raise RuntimeError("power cut")
            return super().embed_volumes(volumes)

    how = How(batch_size=2, save_every=2)
    with pytest.raises(RuntimeError):
        rebuild_index(tmp_path / "i", Breaks("other", "bbbb"), how=how)
    assert len(SearchIndex.open(tmp_path / "i", model=Histogram())) == 5
    taken = SearchIndex.open(tmp_path / "i").remove([str(archive / "v0.npy")])  # made already
    other = Histogram("other", "bbbb")
    assert taken == 1
    assert rebuild_index(tmp_path / "i", other, how=how).total == 4 and other.seen == 1
    assert "v0" not in {study.id for study in studies(tmp_path / "i")}


def damage_bits(folder):
    """Another letter in a report, as a failing disk would leave it."""
    (path,) = (p for p in folder.glob("studies-1.lance/data/*") if b"Report" in p.read_bytes())
    path.write_bytes(path.read_bytes().replace(b"Report of two", b"Report of six"))


def damage_truncate(folder):
    path = max(folder.glob("studies-1.lance/data/*.lance"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-100])


def damage_missing(folder):
    for path in folder.glob("studies-1.lance/data/*.lance"):
        path.unlink()


def damage_versions(folder):
    for path in folder.glob("studies-1.lance/_versions/*"):
        path.unlink()


@pytest.mark.parametrize("damage", [damage_bits, damage_truncate, damage_missing, damage_versions])
def test_damage_is_found_and_mended(archive, tmp_path, damage):
    folder = tmp_path / "i"
    build_index(archive, Histogram(), folder)
    before = studies(folder)
    damage(folder)
    try:
        problems = SearchIndex.open(folder).verify()
    except SearchIndexError as error:
        problems = [str(error)]
    assert problems, "nothing was noticed"
    result = rebuild_index(folder, Histogram())
    assert result.total == 5 and result.damage
    assert not SearchIndex.open(folder).verify()
    assert studies(folder) == before


@pytest.mark.parametrize(
    "head",
    [
        "{",
        "[]",
        '{"format": 2}',
        '{"format": 2, "generations": [{"table": "../outside", "dim": 16}], "sources": []}',
        '{"format": 2, "generations": [{"table": "studies-7", "dim": 16}], "sources": []}',
    ],
)
def test_a_damaged_head_says_so(archive, tmp_path, head):
    build_index(archive, Histogram(), tmp_path / "i")
    (tmp_path / "i" / "index.json").write_text(head)
    with pytest.raises(SearchIndexError, match="is damaged"):
        SearchIndex.open(tmp_path / "i")


def test_another_format_is_named(archive, tmp_path):
    build_index(archive, Histogram(), tmp_path / "i")
    (tmp_path / "i" / "index.json").write_text('{"format": 1}')
    with pytest.raises(SearchIndexError, match="format 1, this version reads 2: delete"):
        SearchIndex.open(tmp_path / "i")


def test_what_does_not_fit_is_refused(tmp_path):
    index = filled(tmp_path / "i", random_entries(5))
    for query in (np.ones(15), np.ones((1, 16)), np.full(16, np.nan)):
        with pytest.raises(SearchIndexError, match="dimension 16"):
            index.search(vector=query)
    with pytest.raises(SearchIndexError, match="begin with 1"):
        index.search(vector=np.ones(16), top=0)
    for row in (np.ones((1, 16)), np.ones(15), np.full(16, np.inf)):
        with pytest.raises(SearchIndexError, match="finite numbers"):
            index.put([make_entry(Study("a", "a", ""), row, None)])
    for empty in ("", "  "):
        with pytest.raises(SearchIndexError, match="the text is empty"):
            index.search(empty)
    with pytest.raises(SearchIndexError, match="nothing is asked"):
        index.search()


def test_conditions(archive, tmp_path):
    dates = {0: "2025-12-31", 2: "2026-03-01", 4: ""}
    rows = [
        {
            "path": f"v{i}.npy",
            "id": f"s{i}",
            "Ward's no. 1": f"{9 + i}",
            "date": dates[i],
            "ok": i > 0,
        }
        for i in (0, 2, 4)
    ]
    (archive / "manifest.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    build_index(archive, Histogram(), tmp_path / "index")
    index = SearchIndex.open(tmp_path / "index")

    def ids(*where):
        return [study.id for study in index.select(where)]

    assert ids("Ward's no. 1=9") == ["s0"]
    assert ids("Ward's no. 1 > 9.5") == ["s2", "s4"]  # as numbers: 9 < 11
    assert ids("date>=2026-01-01") == ["s2"] and ids("date!=2026-03-01") == ["s0", "s4"]
    assert ids("ok=true", "id~S") == ["s2", "s4"]
    assert ids("slices=8", "path~V0") == ["s0"]
    assert ids("id=' OR 1=1 --") == []
    with pytest.raises(SearchIndexError, match=r"'town'.*date.*finding.*modality.*slices"):
        ids("town=x")
    with pytest.raises(SearchIndexError, match="column=value"):
        ids("town")
    with pytest.raises(SearchIndexError, match="Pleural effusion"):
        ids("finding=headache")


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
    np.save(secret / "s.npy", volume(3))
    (archive / "v0.txt").symlink_to(secret / "s.txt")
    (archive / "link.npy").symlink_to(secret / "s.npy")
    (archive / "folder").symlink_to(secret)
    (archive / "circle").symlink_to(archive)
    result = build_index(archive, Histogram(), tmp_path / "i")
    assert result.total == 5
    assert sorted(os.path.basename(path) for path, _ in result.refused) == ["folder", "link.npy"]
    assert not any(study.report == "secret" for study in studies(tmp_path / "i"))
    assert build_index(archive, Histogram(), tmp_path / "j", allow_outside=True).total == 7


def test_a_duplicate_is_embedded_once_and_found_twice(archive, tmp_path):
    model = Histogram()
    build_index(archive, model, tmp_path / "i")
    (archive / "copy.npy").write_bytes((archive / "v0.npy").read_bytes())
    result = build_index(archive, model, tmp_path / "i")
    assert (result.total, result.added, model.seen) == (6, 1, 5)
    assert {"copy", "v0"} <= {study.id for study in studies(tmp_path / "i")}


def test_a_prepared_store_is_indexed_without_its_scans(archive, tmp_path):
    from med3dvlm.data.prepare import prepare_archive

    with (archive / "m.csv").open("w", newline="") as file:
        rows = [["path", "id", "report", "split"]]
        rows += [
            [f"{'deep/' if i % 2 else ''}v{i}.npy", f"s{i}", "No nodule.", "test"] for i in range(5)
        ]
        csv.writer(file).writerows(rows)
    model, store = Histogram(), tmp_path / "store"
    prepare_archive(
        "folder", archive / "m.csv", store, preparation=model.preparation, dtype="float16"
    )
    for path in archive.rglob("*.npy"):
        path.unlink()
    assert build_index(store, model, tmp_path / "i").total == 5
    again = build_index(store, model, tmp_path / "i")
    assert (again.unchanged, model.seen) == (5, 5)
    study = studies(tmp_path / "i")[3]
    assert (study.path, study.report) == (f"{store}#s3", "No nodule.")
    assert study.metadata["split"] == "test"
    picture = middle_slices(study.path)
    assert picture.height == HEIGHT and max(picture.getdata()) > 200
    with pytest.raises(SearchIndexError, match="holds no study 's9' any more"):
        middle_slices(f"{store}#s9")
    remote = f"file://{store}"
    build_index(remote, model, tmp_path / "remote")
    found = studies(tmp_path / "remote")[3]
    assert found.path == f"{remote}#s3"
    assert middle_slices(found.path).tobytes() == picture.tobytes()
    other = Histogram()
    other.preparation = Preparation(size=(4, 8, 8))
    refused = build_index_fails(store, other, tmp_path / "j")
    assert "size" in refused and not (tmp_path / "j").exists()
    rebuilt = rebuild_index(tmp_path / "i", Histogram("other", "bbbb"))
    assert (rebuilt.total, rebuilt.refused) == (5, [])


def build_index_fails(*arguments) -> str:
    with pytest.raises(ValueError) as caught:
        build_index(*arguments)
    return str(caught.value)


def test_nothing_to_index(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        find_scans(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="holds no scan"):
        find_scans(tmp_path)
    with pytest.raises(SearchIndexError, match="is no index"):
        SearchIndex.open(tmp_path)
    (tmp_path / "broken.npy").write_bytes(b"x")
    assert "broken.npy" in build_index_fails(tmp_path, Histogram(), tmp_path / "i")
    assert not (tmp_path / "i").exists()


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


def test_a_report_of_several_lines_survives_a_spreadsheet(archive):
    text = '\ufeffpath,report,age\r\nv0.npy,"Findings: one.\nImpression: two.",61\r\n'
    (archive / "m.csv").write_bytes(text.encode())
    (source,) = find_scans(archive / "m.csv")
    assert source.report == "Findings: one.\nImpression: two."
    assert source.metadata == {"age": "61"}


def test_a_manifest_that_gives_two_scans_one_id_is_refused(archive):
    (archive / "m.csv").write_text("path,id\nv0.npy,a\nv2.npy,a\n")
    with pytest.raises(SourceError, match=r"m.csv, row 2: id 'a' is there a second time"):
        find_scans(archive / "m.csv")


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


def test_a_map_opens_with_the_column_that_divides_the_studies(tmp_path):
    pytest.importorskip("umap")
    index = SearchIndex.create(tmp_path / "i", Histogram())
    index.put(random_entries(24))  # `age` is another for each, `site` one of two
    assert write_map(index, tmp_path / "map.html") == 24
    text = (tmp_path / "map.html").read_text()
    assert '"colour": "site"' in text and "/a/00000" not in text
    write_map(index, tmp_path / "map.html", colour="age")
    assert '"colour": "age"' in (tmp_path / "map.html").read_text()
