"""A probe learns labels from the embeddings of an index, and says how well on held-out studies."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from med3dvlm.search import SearchIndex
from med3dvlm.train.probe import Probe, ProbeError, train_probe
from tests.search.embedder import Histogram
from tests.search.test_index import filled, random_entries

COUNT = 400


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> SearchIndex:
    return filled(tmp_path_factory.mktemp("probe") / "i", random_entries(COUNT))


@pytest.fixture
def labels(index, tmp_path):
    """A label that a line parts, one that only a curve parts, each with gaps and some noise."""
    random, table = np.random.default_rng(0), tmp_path / "labels.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "line", "curve"])
        for entry in index.entries([]):
            x = entry.vector
            line, curve = int(x[0] + x[1] > 0), int(abs(x[2]) > 0.16)
            line = 1 - line if random.random() < 0.05 else line
            writer.writerow([entry.study.id, line, "" if random.random() < 0.1 else curve])
    return table


def auroc(results, name: str) -> float:
    table = next(t for t in results.tables if t.title == "Held-out studies")
    return next(row for row in table.rows if row["finding"] == name)["AUROC"]


def test_a_line_is_found_by_the_probe_and_a_curve_by_the_head(index, labels, tmp_path):
    probe, results = train_probe(index, labels)
    assert auroc(results, "line") > 0.9 and auroc(results, "curve") < 0.65
    _, deep = train_probe(index, labels, hidden=32)
    assert auroc(deep, "curve") > 0.8
    assert 60 < results.facts["held out"] < 100
    probe.save(tmp_path / "p", results)
    again = Probe.load(tmp_path / "p")
    vectors = np.stack([entry.vector for entry in random_entries(5, seed=8)])
    assert (again.probabilities(vectors) == probe.probabilities(vectors)).all()
    again.check_model(Histogram())
    with pytest.raises(ProbeError, match=r"histogram.*aaaa.*other.*bbbb"):
        again.check_model(Histogram("other", "bbbb"))
    assert (tmp_path / "p" / "results.json").is_file()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,nodule\n0,1\n", "id or path"),
        ("id\n0\n", "no column of labels"),
        ("id,nodule\n0,maybe\n", "row 1: nodule is 'maybe'"),
        ("id,nodule\nnobody,1\n", "no study"),
        ("id,nodule\n" + "".join(f"{i},0\n" for i in range(COUNT)), "needs 10"),
    ],
)
def test_tables_that_do_not_fit(index, tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ProbeError, match=words):
        train_probe(index, tmp_path / "t.csv")


def test_a_folder_that_holds_no_probe(tmp_path):
    with pytest.raises(ProbeError, match="holds no probe"):
        Probe.load(tmp_path)
    (tmp_path / "probe.json").write_text("{}")
    with pytest.raises(ProbeError, match="cannot be read"):
        Probe.load(tmp_path)
