"""Phantoms: reproducible, true to what they say, with twins that differ in one finding only."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from med3dvlm.data.phantoms import (
    CONCEPTS,
    FINDINGS,
    PHASES,
    PLANES,
    PhantomError,
    PhantomTruth,
    Placed,
    concept_vector,
    find_findings,
    make_study,
    twin,
    write_studies,
)
from med3dvlm.data.phantoms.anatomy import ENHANCEMENT, make_anatomy
from med3dvlm.data.phantoms.language import NEGATION
from med3dvlm.data.phantoms.study import SPLITS
from med3dvlm.scan import read_scan

STUDIES = [make_study(i, split="test") for i in range(300)]


def with_finding(name: str, index: int = 0, **attributes):
    """Study `index` with one finding only, its attributes set."""
    study = make_study(index, split="test")
    drawn = FINDINGS[name].sample(np.random.default_rng(index))
    truth = PhantomTruth(
        study.truth.plane, study.truth.phase, (Placed(name, {**drawn, **attributes}),)
    )
    return replace(study, truth=truth)


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def test_a_study_is_the_same_in_another_process():
    code = (
        "import hashlib; from med3dvlm.data.phantoms import make_study; "
        "s = make_study(5, split='test'); "
        "print(hashlib.sha256(s.array.tobytes()).hexdigest(), s.report, sep='|')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    study = make_study(5, split="test")
    assert out.stdout.strip() == f"{digest(study.array)}|{study.report}"


def test_splits_and_seeds_share_no_study():
    digests = {
        digest(make_study(i, split=split, seed=seed, shape=(16, 32, 32)).array)
        for split in SPLITS
        for seed in (0, 1)
        for i in range(5)
    }
    assert len(digests) == len(SPLITS) * 2 * 5


def test_shape_spacing_and_range():
    study = make_study(0)
    assert study.array.shape == (64, 128, 128)
    assert study.array.dtype == np.float32
    assert -1024 <= study.array.min() and study.array.max() <= 3071
    assert np.allclose(np.diag(study.affine)[:3], study.spacing_mm[::-1])


@pytest.mark.parametrize("phase", PHASES)
def test_hu_per_tissue_and_phase(phase):
    study = make_study(1)
    study = replace(study, truth=PhantomTruth("axial", phase, ()))
    anatomy = make_anatomy(study._stream("anatomy"), PHASES.index(phase))
    z, y, x = anatomy.liver
    index = [round(c / s + (n - 1) / 2) for c, s, n in zip((z, y, x), study.spacing_mm, study.shape)]
    d, h, w = index
    liver = study.array[d - 2 : d + 3, h - 4 : h + 5, w - 4 : w + 5].mean()
    assert liver == pytest.approx(ENHANCEMENT["liver"][PHASES.index(phase)], abs=20)
    assert study.array[:, 0, 0].mean() == pytest.approx(-1000, abs=20)


@pytest.mark.parametrize("name", FINDINGS)
def test_every_finding_is_visible_where_its_mask_is(name):
    for index in range(3):
        study = with_finding(name, index)
        mask = study.mask(name)
        volume_ml = mask.sum() * np.prod(study.spacing_mm) / 1000
        assert volume_ml > 0.4, (name, study.truth)
        healthy = replace(study, truth=replace(study.truth, findings=()))
        change = np.abs(study.array - healthy.array)[mask]
        assert np.percentile(change, 90) > 25, (name, study.truth, change.mean())


@pytest.mark.parametrize("name", ["Lung nodule", "Renal cyst", "Liver lesion"])
@pytest.mark.parametrize("size", [24, 34])
def test_the_size_stated_is_the_size_drawn(name, size):
    study = with_finding(name, 2, size=size)
    mask = study.mask(name)
    extents = [
        np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))).size * study.spacing_mm[axis]
        for axis in range(3)
    ]
    assert max(extents) == pytest.approx(size, abs=3 * study.spacing_mm[2])


@pytest.mark.parametrize(
    "name", [n for n, f in FINDINGS.items() if "left" in f.attributes.get("side", ())]
)
def test_left_is_the_high_end_of_x(name):
    for side, expected in (("left", True), ("right", False)):
        mask = with_finding(name, 4, side=side).mask(name)
        x = np.flatnonzero(mask.any(axis=(0, 1))).mean()
        assert bool(x > (mask.shape[2] - 1) / 2) is expected


def test_the_plane_shows_as_thick_slices():
    for plane in PLANES:
        for index in (3, 4):
            study = make_study(index, split="test")
            study = replace(study, truth=replace(study.truth, plane=plane))
            air = study.array[5:-5, :12, :] + 1000  # in front of the patient: noise alone
            likeness = []
            for axis in range(3):
                a, b = np.moveaxis(air, axis, 0)[:-1], np.moveaxis(air, axis, 0)[1:]
                likeness.append(np.corrcoef(a.ravel(), b.ravel())[0, 1])
            assert int(np.argmax(likeness)) == PLANES.index(plane)


def test_the_extractor_reads_every_report_right():
    for study in STUDIES:
        found = find_findings(study.report)
        assert found == {name: study.truth.has(name) for name in FINDINGS}, study.report
        found = find_findings(study.caption)
        assert found == {name: study.truth.has(name) for name in FINDINGS}, study.caption


@pytest.mark.parametrize("finding", FINDINGS.values(), ids=lambda f: f.name)
def test_wordings(finding):
    assert len(set(finding.present)) >= 4 and len(set(finding.absent)) >= 4
    for template in (*finding.present, *finding.impression):
        assert not NEGATION.search(template)
    for template in finding.absent:
        assert find_findings(template)[finding.name] is False
        assert finding.recognised(template)


def test_answers_follow_from_the_truth():
    types = set()
    for study in STUDIES:
        truth = study.truth
        organs = {p.finding.organ for p in truth.findings}
        for q in study.questions:
            types.add((q.kind, q.type))
            if q.kind == "closed":
                assert q.choices is not None and len(set(q.choices)) == 4
                assert q.choices["ABCD".index(q.answer_choice or "")] == q.answer
                wrong = set(q.choices) - {q.answer}
                if q.type == 3:
                    assert not wrong & organs
                if q.type == 4:
                    assert not wrong & {p.name.lower() for p in truth.findings}
            if q.type == 1:
                assert q.answer == truth.plane
            if q.type == 2:
                assert q.answer == truth.phase
            if q.kind == "yes_no":
                assert (q.answer == "yes") is truth.has(q.finding or "")
            if q.type == 5:
                placed = next(p for p in truth.findings if p.name == q.finding)
                assert q.answer.removesuffix(" mm") in map(str, placed.attributes.values())
    assert types >= {(kind, t) for kind in ("closed", "open") for t in range(1, 6)}
    assert ("yes_no", 4) in types


def test_yes_and_no_are_balanced():
    answers = [q.answer for s in STUDIES for q in s.questions if q.kind == "yes_no"]
    assert 0.45 < answers.count("yes") / len(answers) < 0.55
    letters = [q.answer_choice for s in STUDIES for q in s.questions if q.kind == "closed"]
    for letter in "ABCD":
        assert 0.2 < letters.count(letter) / len(letters) < 0.3


@pytest.mark.parametrize("change", ["remove", "add", "move", "resize"])
def test_twins_are_equal_but_for_the_finding(change):
    done = 0
    for study in STUDIES[:40]:
        try:
            other = twin(study, change)
        except PhantomError:
            continue
        name = next(
            n
            for n in FINDINGS
            if {p.name: p for p in study.truth.findings}.get(n)
            != {p.name: p for p in other.truth.findings}.get(n)
        )
        both = np.zeros(study.shape, bool)
        for one in (study, other):
            if one.truth.has(name):
                both |= one.mask(name)
        both |= np.abs(study.torso() - other.torso()) > 0
        axis = PLANES.index(study.truth.plane)
        reach = np.ones([9 if i == axis else 1 for i in range(3)], bool)  # the slice's thickness
        outside = ~binary_dilation(both, reach)
        assert np.allclose(study.array[outside], other.array[outside], atol=0.01)
        assert not np.array_equal(study.array, other.array)
        done += 1
        if done == 4:
            break
    assert done == 4


def test_twins_that_cannot_be():
    normal = next(s for s in STUDIES if not s.truth.findings)
    with pytest.raises(PhantomError, match="no finding to remove"):
        twin(normal, "remove")
    with pytest.raises(PhantomError, match="unknown"):
        twin(normal, "improve")
    with pytest.raises(PhantomError, match="split"):
        make_study(0, split="dev")


def test_concepts_name_findings_attributes_plane_and_phase():
    study = next(s for s in STUDIES if s.truth.has("Pleural effusion"))
    placed = next(p for p in study.truth.findings if p.name == "Pleural effusion")
    assert study.concepts[f"Pleural effusion/side={placed.attributes['side']}"]
    assert study.concepts[f"phase={study.truth.phase}"]
    vector = concept_vector(study)
    assert vector.shape == (len(CONCEPTS),)
    assert sum(vector[[c.startswith("plane=") for c in CONCEPTS]]) == 1


def test_prevalence_and_variety():
    shares = {n: np.mean([s.truth.has(n) for s in STUDIES]) for n in FINDINGS}
    assert all(0.08 < share < 0.27 for share in shares.values()), shares
    assert max(len(s.truth.findings) for s in STUDIES) <= 6
    assert any(not s.truth.findings for s in STUDIES)
    assert len({tuple(p.name for p in s.truth.findings) for s in STUDIES}) > 150


def test_written_as_nifti_and_read_back(tmp_path):
    combinations = write_studies(3, tmp_path, layout="nifti", split="test")
    assert 1 <= combinations <= 3
    for index in range(3):
        study = make_study(index, split="test")
        scan = read_scan(tmp_path / study.study_id / "ct.nii.gz")
        assert np.abs(scan.array - study.array).max() <= 0.51
        assert np.allclose(scan.spacing_mm, study.spacing_mm, rtol=1e-5)
        assert np.allclose(scan.affine, study.affine, atol=1e-3)
        assert scan.units == "HU"
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"test-{i:06d}" for i in range(3)]


def test_written_in_the_layout_of_m3d(tmp_path):
    write_studies(2, tmp_path, layout="m3d", split="test")
    listing = json.loads((tmp_path / "M3D_Cap" / "M3D_Cap.json").read_text())
    assert len(listing["test"]) == 2
    for index, row in enumerate(listing["test"]):
        study = make_study(index, split="test")
        series = tmp_path / "M3D_Cap" / row["image"]
        slices = study.shape[PLANES.index(study.truth.plane)]
        assert len(list(series.glob("*.png"))) == slices
        text = (tmp_path / "M3D_Cap" / row["text"]).read_text()
        assert text == f"study_findings:{study.report}\n"
        scan = read_scan(series)
        assert scan.array.shape[0] == slices and scan.array.max() <= 255
    with (tmp_path / "M3D_VQA" / "M3D_VQA_test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows and all(row[f"Choice {row['Answer Choice']}"] == row["Answer"] for row in rows)
