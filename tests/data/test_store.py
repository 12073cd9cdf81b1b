"""Preparing archives into stores: what comes back, what is refused, what a kill leaves."""

from __future__ import annotations

import csv
import hashlib
import json
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from med3dvlm.cli import app
from med3dvlm.data.layouts import LAYOUTS, phantom_sources
from med3dvlm.data.phantoms import FINDINGS, make_study, write_studies
from med3dvlm.data.prepare import (
    Prepared,
    prepare_archive,
    prepare_phantoms,
    prepare_sources,
)
from med3dvlm.data.store import Quantisation, Store, StoreError
from med3dvlm.scan import PRESETS, Preparation, prepare

COUNT = 10
M3D = Preparation(
    size=(16, 32, 32), intensity="minmax", window=((0, 0), (1, 1)), crop="foreground"
)
SMALL = Preparation(
    size=(16, 32, 32), window=((-1000, -1), (1000, 1)), spacing_mm=(24, 12.6, 12.6), fit="pad"
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("m3d")
    write_studies(COUNT, folder, layout="m3d", split="test")
    return folder


@pytest.fixture(scope="module")
def store(archive, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "cap"
    result = prepare_archive("m3d-cap", archive, folder, preparation=M3D, shard=4)
    assert result == Prepared(COUNT, [], COUNT)  # a remark each: pictures have no spacing
    return folder


def published_preparation(folder: Path, size: tuple[int, int, int]) -> np.ndarray:
    """M3D's own, written from its description: grey / 255, min–max, foreground, trilinear."""
    files = sorted(folder.iterdir(), key=lambda file: int(file.stem))
    volume = np.stack([np.asarray(Image.open(file).convert("L")) for file in files]) / 255.0
    volume = (volume - volume.min()) / (volume.max() - volume.min())
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        filled = np.flatnonzero(volume.any(axis=others))
        volume = volume.take(range(filled[0], filled[-1] + 1), axis=axis)
    tensor = torch.from_numpy(volume)[None, None]
    return torch.nn.functional.interpolate(tensor, size=size, mode="trilinear")[0, 0].numpy()


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_m3d_volumes_are_the_published_preparation_within_the_quantisation(archive, store):
    opened = Store(store)
    for index, source in enumerate(LAYOUTS["m3d-cap"].find(archive)):
        expected = published_preparation(source.path, M3D.size)
        difference = abs(opened.volume(index) - expected)
        assert difference.max() <= 0.5 / 255 + 1e-5
        assert difference.mean() < 1e-3
        study = opened.study(index)
        truth = make_study(index, split="test")
        assert study["id"] == source.id and study["report"] == truth.report
        assert study["splits"] == ["test"] and study["case"] == truth.study_id


def test_float16_holds_the_values_themselves(archive, tmp_path):
    prepare_archive("m3d-cap", archive, tmp_path / "s", preparation=M3D, dtype="float16")
    opened = Store(tmp_path / "s")
    source = LAYOUTS["m3d-cap"].find(archive)[3]
    expected = published_preparation(source.path, M3D.size)
    np.testing.assert_allclose(opened.volume(3), expected, atol=5e-4)


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_the_stated_error_of_uint8(low):
    quantisation = Quantisation("uint8", low, 1.0)
    values = np.linspace(low, 1, 100_001, dtype=np.float32)
    error = abs(quantisation.decode(quantisation.encode(values)) - values)
    step = (1 - low) / 255
    assert error.max() <= step / 2 * 1.001
    assert abs(error.mean() - step / 4) < step / 200
    tensor = torch.from_numpy(quantisation.encode(values))
    torch.testing.assert_close(
        quantisation.decode(tensor).numpy(), quantisation.decode(tensor.numpy())
    )


def test_parts_pickles_and_urls(store):
    opened = Store(store)
    whole = opened.volume(7)
    part = (slice(3, 9), slice(None), slice(30, 32))
    np.testing.assert_array_equal(opened.volume(7, part), whole[part])
    assert np.array_equal(pickle.loads(pickle.dumps(opened)).volume(7), whole)  # noqa: S301
    remote = fsspec.filesystem("memory")
    for path in store.rglob("*"):
        if path.is_file():
            remote.pipe(f"/bucket/{path.relative_to(store).as_posix()}", path.read_bytes())
    np.testing.assert_array_equal(Store("memory://bucket").volume(7), whole)


def test_questions_of_m3d_vqa_are_in_the_store(archive, tmp_path):
    prepare_archive("m3d-vqa", archive, tmp_path / "s", preparation=M3D)
    truth = make_study(2, split="test")
    asked = Store(tmp_path / "s").study(2)["questions"]
    closed = [(q["text"], q["choices"], q["answer_choice"]) for q in asked if q["kind"] == "closed"]
    expected = [q for q in truth.questions if q.kind == "closed"]
    assert closed == [(q.text, list(q.choices), q.answer_choice) for q in expected]


@pytest.mark.parametrize("layout", ["nifti", "dicom"])
def test_a_folder_of_scans(tmp_path, layout):
    write_studies(3, tmp_path / "scans", layout=layout, split="validation")
    arguments = ["prepare", "folder", str(tmp_path / "scans"), "-o", str(tmp_path / "s")]
    SMALL.save(tmp_path / "small.json")
    run = CliRunner().invoke(app, [*arguments, "--preparation", str(tmp_path / "small.json")])
    assert run.exit_code == 0 and "3 studies kept" in run.stdout
    opened = Store(tmp_path / "s")
    for index in range(3):
        truth = make_study(index, split="validation")
        expected = prepare(truth.scan(), SMALL)[0]
        assert abs(opened.volume(index) - expected).max() <= 1 / 255 + 1e-5
        assert opened.study(index)["report"] == truth.report
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 2 and "say --preparation" in run.stderr


def test_ct_rate(tmp_path):
    """Volumes stored before their rescale, in one or two reconstructions, with their labels."""
    write_studies(7, tmp_path / "ct", layout="ct-rate", split="train")
    result = prepare_archive("ct-rate", tmp_path / "ct", tmp_path / "s", preparation=SMALL)
    opened = Store(tmp_path / "s")
    assert result.refused == [] and len(opened) == 8  # one patient has a second reconstruction
    assert sorted(map(len, opened.groups())) == [1] * 6 + [2]
    for index in range(7):
        truth = make_study(index, split="train")
        place = opened.index_of(f"train_{index + 1}_a_1")
        expected = prepare(truth.scan(), SMALL)[0]
        assert abs(opened.volume(place) - expected).max() <= 1 / 255 + 1e-5
        findings = truth.report.split("Findings: ")[1]
        assert opened.study(place)["report"] == f"Findings: {findings}"
        there = {name for name, on in zip(opened.labels, opened.label_matrix()[place]) if on}
        assert there == {p.name for p in truth.truth.findings} & set(opened.labels)


def test_studies_on_two_sides_of_the_splits_are_held_back(archive, tmp_path):
    """The same slices under another name, and mirrored ones, are in the training split too."""
    copy = tmp_path / "m3d"
    shutil.copytree(archive, copy)
    root = copy / "M3D_Cap"
    table = json.loads((root / "M3D_Cap.json").read_text("utf-8"))
    table["train"] = []
    for place, mirrored in ((0, False), (3, True)):
        entry = table["test"][place]
        case = root / "ct_quizze" / f"copy{place}"
        shutil.copytree((root / entry["image"]).parent, case)
        series = case / Path(entry["image"]).name
        for file in series.iterdir() if mirrored else ():
            Image.fromarray(np.asarray(Image.open(file))[:, ::-1]).save(file)
        name = series.relative_to(root).as_posix()
        table["train"].append({"image": name, "text": f"ct_quizze/copy{place}/text.txt"})
    (root / "M3D_Cap.json").write_text(json.dumps(table))
    larger = Preparation.from_dict({**M3D.to_dict(), "size": [32, 64, 64]})
    result = prepare_archive("m3d-cap", copy, tmp_path / "s", preparation=larger)
    opened = Store(tmp_path / "s")
    leaking = [table["test"][0]["image"], table["test"][3]["image"]]
    kinds = {crossing.second: crossing.kind for crossing in opened.crossings}
    assert kinds == {leaking[0]: "identical", leaking[1]: "near"} and result.held_back == 2
    assert len(opened.in_split("test")) == COUNT - 2
    assert len(opened.in_split("test", leaks=True)) == COUNT and len(opened.in_split("train")) == 2
    run = CliRunner().invoke(app, ["data", "leaks", str(tmp_path / "s")])
    assert "2 crossings, 2 studies held back" in run.stdout and leaking[0] in run.stdout


def test_two_workers_make_the_same_bytes(archive, store, tmp_path):
    prepare_archive("m3d-cap", archive, tmp_path / "w", preparation=M3D, shard=4, workers=2)
    assert content(tmp_path / "w") == content(store)


SCRIPT = """
import sys
from pathlib import Path
from med3dvlm.data.layouts import LAYOUTS, phantom_sources
from med3dvlm.data.prepare import prepare_sources
from med3dvlm.scan import PRESETS, Preparation, prepare

preparation = Preparation.load(sys.argv[2])
prepare_sources(
    LAYOUTS["phantoms"], phantom_sources(24, split="train", seed=0), sys.argv[1],
    root=Path("phantoms"), preparation=preparation, shard=1, workers=int(sys.argv[3]),
)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments_it_ends_in_the_same_bytes(tmp_path, workers):
    """Each run is killed a moment after it has done a few more of the 24 units."""
    sources = phantom_sources(24, split="train", seed=0)
    SMALL.save(tmp_path / "small.json")
    options = {"root": Path("phantoms"), "preparation": SMALL, "shard": 1}
    prepare_sources(LAYOUTS["phantoms"], sources, tmp_path / "whole", **options)
    folder, moments, kills = tmp_path / "killed", random.Random(workers), 0
    while not (folder / "store.json").exists():
        arguments = (str(folder), str(tmp_path / "small.json"), str(workers))
        run = subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments])
        rows = folder / "work" / "rows"
        enough = len(list(rows.glob("*.jsonl"))) + moments.randint(8, 11)
        while run.poll() is None and len(list(rows.glob("*.jsonl"))) < enough:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.15))
        kills += run.poll() is None
        run.send_signal(signal.SIGKILL)
        run.wait()
    assert kills >= 2
    # a run more: the last may have been killed between its last write and its tidying up
    subprocess.run([sys.executable, "-c", SCRIPT, *arguments], check=True)
    assert content(folder) == content(tmp_path / "whole")


def test_ten_kinds_of_damage_are_each_refused_and_the_rest_is_kept(archive, tmp_path):
    damaged = tmp_path / "m3d"
    write_studies(14, damaged, layout="m3d", split="test")
    root = damaged / "M3D_Cap"
    sources = LAYOUTS["m3d-cap"].find(damaged)
    series = [source.path for source in sources]
    table = json.loads((root / "M3D_Cap.json").read_text("utf-8"))

    shutil.rmtree(series[0])
    for file in series[1].iterdir():
        file.unlink()
    for file in series[2].iterdir():
        file.write_bytes(file.read_bytes()[:40])
    for file in series[3].iterdir():
        file.write_text("no picture")
    for file in sorted(series[4].iterdir())[1:]:
        file.unlink()
    for file in series[5].iterdir():
        Image.new("L", (64, 64)).save(file)
    (series[6].parent / "text.txt").unlink()
    (series[7].parent / "text.txt").write_text(" \n")
    (series[8].parent / "text.txt").write_bytes(b"\xff\xfe\xff")
    table["test"].append(table["test"][9])
    (root / "M3D_Cap.json").write_text(json.dumps(table))

    result = CliRunner().invoke(
        app,
        ["prepare", "m3d-cap", str(damaged), "-o", str(tmp_path / "s"), "--workers", "1", "--json"],
    )
    assert result.exit_code == 1, result.output
    told = json.loads(result.stdout)
    assert told["kept"] == 5 and len(told["refused"]) == 10
    by_id = {refused["id"]: refused["reason"] for refused in told["refused"]}
    words = ["no such", "no scan", "opened", "opened", "2D", "every voxel", "missing", "empty"]
    for source, word in zip(sources, [*words, "UTF-8", "twice"], strict=False):
        assert word in by_id[source.id] and str(source.path.parent) in by_id[source.id], word
    with (tmp_path / "s" / "refused.csv").open(encoding="utf-8", newline="") as file:
        assert {row["id"]: row["reason"] for row in csv.DictReader(file)} == by_id
    kept = Store(tmp_path / "s")
    assert kept.ids == [source.id for source in sources[9:14]]
    expected = published_preparation(series[12], (128, 256, 256))
    assert abs(kept.volume(kept.index_of(sources[12].id)) - expected).max() < 0.5 / 255 + 1e-4


def test_a_damaged_shard_names_the_study_and_is_never_replaced(store, tmp_path):
    copy = shutil.copytree(store, tmp_path / "copy")
    shards = sorted(path for path in (copy / "volumes.zarr" / "c").rglob("*") if path.is_file())
    shards[1].write_bytes(shards[1].read_bytes()[: shards[1].stat().st_size // 2])
    opened = Store(copy)
    broken = opened.ids[5]
    with pytest.raises(StoreError, match=broken.replace("/", "/")):
        opened.stored(5)
    skipping = Store(copy, skip=[broken])
    assert len(skipping) == COUNT - 1 and broken not in skipping.ids
    with pytest.raises(StoreError, match="'nobody'"):
        Store(copy, skip=["nobody"])


def test_a_store_is_not_mixed_with_anything_else(archive, store, tmp_path):
    with pytest.raises(StoreError, match="dtype: uint8 against float16"):
        prepare_archive("m3d-cap", archive, store, preparation=M3D, shard=4, dtype="float16")
    assert prepare_archive("m3d-cap", archive, store, preparation=M3D, shard=4).kept == COUNT
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"notes\.txt"):
        prepare_archive("m3d-cap", archive, tmp_path, preparation=M3D)
    with pytest.raises(StoreError, match="the scans themselves"):
        prepare_archive("m3d-cap", archive, archive, preparation=M3D)
    with pytest.raises(StoreError, match="no finished store"):
        Store(tmp_path)


def test_show_and_stats(store, tmp_path):
    opened = Store(store)
    picture, plot = tmp_path / "sheet.png", tmp_path / "plot.png"
    run = CliRunner().invoke(
        app, ["data", "show", str(store), "--study", opened.ids[0], "-o", str(picture)]
    )
    assert run.exit_code == 0 and make_study(0, split="test").report in run.stdout
    pixels = np.asarray(Image.open(picture).convert("L"))
    assert pixels.mean() > 10  # something is to be seen on it
    run = CliRunner().invoke(app, ["data", "stats", str(store), "--plot", str(plot), "--json"])
    figures = json.loads(run.stdout)
    assert figures["studies"] == COUNT and figures["splits"] == {"test": COUNT}
    words = [len(make_study(i, split="test").report.split()) for i in range(COUNT)]
    assert figures["words in a report"]["highest"] == [max(words)]
    assert Image.open(plot).width == 1200
    run = CliRunner().invoke(app, ["data", "show", str(store), "--study", "x", "-o", str(picture)])
    assert run.exit_code == 1 and "holds no study 'x'" in str(run.exception)


def test_the_store_knows_where_findings_can_be_seen(tmp_path):
    preparation = replace(PRESETS["demo"], size=(48, 96, 96), spacing_mm=(8.0, 4.2, 4.2))
    store = prepare_phantoms(tmp_path / "s", 6, split="test", preparation=preparation, workers=1)
    assert store.placed == list(FINDINGS)
    solid = 0
    for index in range(len(store)):
        study = make_study(index, split="test")
        places = store.places(index)
        assert places.shape == (len(FINDINGS), 6, 12, 12)
        there = [study.truth.has(name) for name in FINDINGS]
        assert places.any(axis=(1, 2, 3)).tolist() == there
        mm = np.array(preparation.spacing_mm)
        for placed in study.truth.findings:
            if placed.size_mm is None or placed.name == "Lymphadenopathy":  # of several parts
                continue
            centre = np.array(placed.centre_mm[::-1]) / mm + (np.array(preparation.size) - 1) / 2
            cell = tuple((centre / 8).astype(int))
            assert places[list(FINDINGS).index(placed.name)][cell] > 128, placed
            solid += 1
    assert solid >= 4
