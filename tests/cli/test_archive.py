"""`index`, `search` and `classify` with the bundled model, end to end."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from med3dvlm import load
from med3dvlm.data.phantoms import make_study, write_studies
from med3dvlm.evaluate.calibration import Calibration, Platt

COUNT = 6


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantoms")
    write_studies(COUNT, folder, split="test")
    return folder


@pytest.fixture(scope="module")
def index(phantoms, tmp_path_factory):
    from med3dvlm.search import build_index

    folder = tmp_path_factory.mktemp("index") / "i"
    build_index(phantoms, load("demo", part="search"), folder)
    return folder


def hits(result) -> list[dict]:
    assert result.code == 0, result.err
    return json.loads(result.out)["hits"]


def test_words_filters_denials_and_pages(run, index):
    found = hits(run("search", index, "ct", "--where", "phase!=arterial", "--json"))
    phases = [make_study(i, split="test").truth.phase for i in range(COUNT)]
    assert len(found) == sum(phase != "arterial" for phase in phases)
    name = next(p.name for i in range(COUNT) for p in make_study(i, split="test").truth.findings)
    found = hits(run("search", index, f"no {name.lower()}", "--json"))
    without = {
        f"test-{i:06d}" for i in range(COUNT) if not make_study(i, split="test").truth.has(name)
    }
    assert {hit["id"] for hit in found} == without
    pages = [hits(run("search", index, "ct", "--top", 4, "--page", k, "--json")) for k in (1, 2)]
    assert [len(page) for page in pages] == [4, 2]
    assert len({hit["id"] for page in pages for hit in page}) == COUNT
    shown = run("search", index, "emphysema without nodule")
    assert "wanted: emphysema; without: nodule" in shown.err


def test_a_scan_and_words_together_and_what_they_look_like(run, index, phantoms, tmp_path):
    scan = phantoms / "test-000004" / "ct.nii.gz"
    picture, page = tmp_path / "hits.png", tmp_path / "hits.html"
    options = ("--scan", scan, "--top", 2, "--picture", picture, "--html", page, "--json")
    found = hits(run("search", index, make_study(4, split="test").caption, *options))
    assert found[0]["id"] == "test-000004" and 0 < found[1]["score"] <= found[0]["score"] <= 1
    assert Image.open(picture).width == 1400
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 2 and "http" not in text.split("</style>")[0]
    assert "phantoms" in text  # the notice of the bundled model


def test_adding_removing_and_what_is_unknown(run, index, phantoms, tmp_path):
    more = tmp_path / "more"
    write_studies(1, more, split="train")
    copy = tmp_path / "i"
    assert run("index", "add", copy, more).code == 1  # there is none to add to
    assert not copy.exists()
    built = run("index", "build", phantoms / "test-000000", "-o", copy, "--json")
    assert json.loads(built.out)["studies"] == 1
    added = json.loads(run("index", "add", copy, more, "--json").out)
    assert (added["studies"], added["added"]) == (2, 1)
    assert "holds no study 'nothing'" in run("index", "remove", copy, "nothing").err
    os.remove(next(more.rglob("*.nii.gz")))
    removed = json.loads(run("index", "remove", copy, "--missing", "--json").out)
    assert removed["studies"] == 1 and "more" in removed["removed"][0]
    assert run("index", "verify", copy).out.strip().endswith("1 studies, whole")
    next(copy.glob("studies-1.lance/_versions/*")).parent.rename(copy / "gone")
    broken = run("index", "verify", copy)
    assert broken.code == 1 and "damaged" in broken.err
    mended = run("index", "rebuild", copy, "--allow-unreadable")  # more/ is gone for good
    assert mended.code == 0 and "damage" in mended.err
    assert run("index", "verify", copy).code == 0
    unknown = run("search", index, "x", "--where", "town=x")
    assert unknown.code == 1 and "known are" in unknown.err and "phase" in unknown.err


def test_hostile_text_stays_text(run, tmp_path, phantoms):
    report = '</script><img src=x onerror=alert(1)> "pleural effusion"'
    manifest = phantoms / "hostile.jsonl"
    rows = [
        {"path": f"test-00000{i}/ct.nii.gz", "id": f"<b>{i}</b>", "report": report}
        for i in range(2)
    ]
    manifest.write_text("\n".join(json.dumps(row) for row in rows))
    assert run("index", "build", manifest, "-o", tmp_path / "i").code == 0
    manifest.unlink()
    page = tmp_path / "p.html"
    assert run("search", tmp_path / "i", "effusion", "--html", page).code == 0
    assert "<img src=x" not in page.read_text() and "<b>" not in page.read_text()
    few = run("index", "map", tmp_path / "i", "-o", tmp_path / "map.html")
    assert few.code == 1 and "10 studies or more" in few.err


def test_classify_from_prompts_with_and_without_calibration(run, phantoms, tmp_path):
    scan = phantoms / "test-000001" / "ct.nii.gz"
    prompts = ("--present", "{Finding} seen.", "--absent", "No {finding}.")
    labels = ("--labels", "pleural effusion, cardiomegaly", "--labels", "ascites")
    raw = json.loads(run("classify", scan, *labels, *prompts, "--json").out)
    assert not raw["calibrated"] and len(raw["findings"]) == 3
    model = load("demo", part="search")
    made = Calibration(
        "demo",
        model.fingerprint(),
        model.preparation.fingerprint(),
        (("{Finding} seen.", "No {finding}."),),
        {"ascites": Platt(0.0, -1.0)},
        Platt(1.0, 0.0),
    )
    made.save(tmp_path / "c.json")
    option = ("--calibration", tmp_path / "c.json")
    found = json.loads(run("classify", scan, *labels, *option, "--json").out)
    before = {row["finding"]: row["probability"] for row in raw["findings"]}
    after = {row["finding"]: row["probability"] for row in found["findings"]}
    assert found["calibrated"] and after["ascites"] == pytest.approx(0.26894, abs=1e-4)
    assert after["cardiomegaly"] == pytest.approx(before["cardiomegaly"], abs=1e-6)
    assert found["calibrated by all findings together"] == ["pleural effusion", "cardiomegaly"]
    text = json.loads((tmp_path / "c.json").read_text())
    (tmp_path / "c.json").write_text(json.dumps({**text, "weights": "ffff"}))
    refused = run("classify", scan, *labels, *option)
    assert refused.code == 1 and "weights ffff" in refused.err and "fit it again" in refused.err
    assert run("classify", scan).code == 2
    assert run("classify", scan, *labels, "--present", "{finding}").code == 2
    many = json.loads(run("classify", scan, "-l", "ct-rate", *prompts, "--json").out)
    assert len(many["findings"]) == 18
