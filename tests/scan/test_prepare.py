"""Preparation: the published recipes, the settings as data, the grid of the result."""

from __future__ import annotations

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from med3dvlm.scan import (
    PRESETS,
    NotHounsfieldWarning,
    Preparation,
    ScanError,
    compare_preparations,
    prepare,
    prepared_affine,
    read_scan,
)
from tests.scan.samples import DATA, make_scan


def plain(**settings) -> Preparation:
    return Preparation(**{"window": ((-1000, 0), (1000, 1)), "size": (6, 8, 10), **settings})


@pytest.fixture
def chest():
    return read_scan(DATA / "cip_chest64")


# --- settings -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_settings_survive_json(name, tmp_path):
    preset = PRESETS[name]
    preset.save(tmp_path / "a.json")
    again = Preparation.load(tmp_path / "a.json")
    assert again == preset and again.fingerprint() == preset.fingerprint()
    assert hash(again) == hash(preset)
    assert json.loads(json.dumps(preset.to_dict())) == preset.to_dict()


def test_fingerprints_differ_with_any_setting():
    prints = {preset.fingerprint() for preset in PRESETS.values()}
    prints |= {plain().fingerprint(), plain(antialias=True).fingerprint()}
    assert len(prints) == 5


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"windows": 1}, "unknown 'windows'"),
        ({"size": [1, 2]}, "size"),
        ({"size": [0, 2, 2]}, "size"),
        ({"size": [1.5, 2, 2]}, "size"),
        ({"spacing_mm": [1, -1, 1]}, "spacing_mm"),
        ({"intensity": "max"}, "intensity"),
        ({"fit": "zoom"}, "fit"),
        ({"window": [[0, 0]]}, "window"),
        ({"window": [[1, 0], [0, 1]]}, "window"),
        ({"window": [[0, 1], [1, 0]]}, "window"),
        ({"percentiles": [99, 1]}, "percentiles"),
    ],
)
def test_impossible_settings_are_errors_that_name_them(settings, word):
    with pytest.raises(ValueError, match=word):
        Preparation.from_dict(settings)


def test_load_names_the_file(tmp_path):
    (tmp_path / "a.json").write_text('{"tilt": 1}')
    with pytest.raises(ValueError, match=r"a\.json.*'tilt'"):
        Preparation.load(tmp_path / "a.json")


def test_comparison_shows_both_sides():
    compare_preparations(plain(), plain())
    with pytest.raises(ValueError, match=r"size: \[6, 8, 10\] against \[6, 8, 12\]"):
        compare_preparations(plain(), plain(size=(6, 8, 12)))


# --- volumes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_gives_its_shape_and_range(name, chest):
    preset = PRESETS[name]
    before = chest.array.copy()
    volume = prepare(chest, preset)
    assert volume.shape == (1, *preset.size) and volume.dtype == np.float32
    low, high = preset.window[0][1], preset.window[-1][1]
    assert low <= volume.min() < volume.max() <= high
    assert np.array_equal(chest.array, before)


def test_m3d_equals_the_published_steps(chest):
    array = chest.array - chest.array.min()
    array = array / array.max()
    filled = np.argwhere(array > 0)
    (z0, y0, x0), (z1, y1, x1) = filled.min(0), filled.max(0) + 1
    box = torch.from_numpy(array[z0:z1, y0:y1, x0:x1])[None, None]
    expected = interpolate(box, (128, 256, 256), mode="trilinear", align_corners=False)[0]
    assert np.allclose(prepare(chest, PRESETS["m3d"]), expected.numpy(), atol=1e-5)


def test_ct_rate_equals_the_published_steps(chest):
    target = (1.5, 0.75, 0.75)
    shape = [
        int(n * mm / want)
        for n, mm, want in zip(chest.shape, chest.spacing_mm, target, strict=True)
    ]
    volume = torch.from_numpy(chest.array)[None, None]
    volume = interpolate(volume, shape, mode="trilinear", align_corners=False)[0, 0].numpy()
    volume = np.clip(volume, -1000, 1000) / 1000
    expected = np.full((240, 480, 480), -1, np.float32)
    source, result = [], []
    for have, want in zip(volume.shape, expected.shape, strict=True):
        start, pad = max((have - want) // 2, 0), max((want - have) // 2, 0)
        count = min(have, want)
        source.append(slice(start, start + count))
        result.append(slice(pad, pad + count))
    expected[tuple(result)] = volume[tuple(source)]
    assert np.allclose(prepare(chest, PRESETS["ct-rate"])[0], expected, atol=1e-5)


def test_knots_are_a_piecewise_linear_map(scan):
    knots = ((-1000, 0.0), (-160, 0.3), (240, 0.9), (1000, 1.0))
    volume = prepare(scan, plain(window=knots))[0]
    assert np.allclose(volume, np.interp(scan.array, *np.array(knots).T), atol=1e-6)


def test_one_knot_pair_is_a_window(scan):
    volume = prepare(scan, plain(window=((-160, 0), (240, 1))))[0]
    assert np.allclose(volume, np.clip((scan.array + 160) / 400, 0, 1), atol=1e-6)


def test_pad_and_crop_keep_the_centre(scan):
    same = prepare(scan, plain())[0]
    large = prepare(scan, plain(size=(10, 12, 14), fit="pad", pad_value=-1.0))[0]
    assert np.array_equal(large[2:8, 2:10, 2:12], same)
    assert (large[:2] == -1).all() and (large[:, :, 12:] == -1).all()
    small = prepare(scan, plain(size=(4, 4, 4), fit="pad"))[0]
    assert np.array_equal(small, same[1:5, 2:6, 3:7])


def test_antialiasing_averages_what_a_voxel_covers():
    scan = make_scan((4, 64, 64), (1.0, 1.0, 1.0))
    scan.array[:] = np.where(np.indices(scan.shape).sum(0) % 2, 1000, -1000)  # a chequerboard
    sampled = prepare(scan, plain(size=(4, 9, 9)))
    averaged = prepare(scan, plain(size=(4, 9, 9), antialias=True))
    assert sampled.std() > 0.05 and averaged.std() < 0.02
    expected = interpolate(
        torch.from_numpy(scan.array)[:, None], (9, 9), mode="bilinear", antialias=True
    )
    assert np.allclose(averaged[0], (expected[:, 0].numpy() + 1000) / 2000, atol=1e-4)


def test_scans_without_hu_fall_back_loudly_or_are_refused(scan):
    mr = dataclasses.replace(scan, units=None, modality="MR")
    with pytest.warns(NotHounsfieldWarning, match="Hounsfield"):
        volume = prepare(mr, plain())
    low, high = np.percentile(mr.array, (0.5, 99.5))
    assert np.allclose(volume[0], np.clip((mr.array - low) / (high - low), 0, 1), atol=1e-5)
    with pytest.raises(ScanError, match="Hounsfield"):
        prepare(mr, plain(non_hu="refuse"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(mr, plain(intensity="percentile"))
        prepare(mr, PRESETS["m3d"])


def test_nothing_to_see_is_an_error():
    constant = read_scan(DATA / "nifti_derived" / "27_constant_volume.nii.gz")
    for preset in (PRESETS["m3d"], plain(intensity="percentile")):
        with pytest.raises(ScanError, match="nothing to see"):
            prepare(constant, preset)


def test_values_that_are_no_numbers_never_get_through(scan):
    scan.array[2, 2, 2] = np.nan
    with pytest.raises(ScanError, match="not numbers"):
        prepare(scan, plain())


def test_units_of_length_gone_wrong_stay_bounded(scan):
    metres = dataclasses.replace(
        scan, spacing_mm=(2500.0, 700.0, 800.0), affine=scan.affine * [[1e3], [1e3], [1e3], [1]]
    )
    assert prepare(metres, PRESETS["ct-rate"]).shape == (1, 240, 480, 480)
    microns = dataclasses.replace(scan, spacing_mm=(0.0025, 0.0007, 0.0008))
    assert prepare(microns, PRESETS["demo"]).shape == (1, 64, 96, 128)


# --- the grid of the result -----------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"size": (12, 16, 9)},
        {"size": (12, 16, 9), "fit": "pad"},
        {"size": (20, 20, 20), "fit": "pad", "spacing_mm": (2.0, 0.5, 0.6)},
        {"size": (3, 5, 20), "fit": "pad", "spacing_mm": (2.0, 0.5, 0.6)},
        {"size": (7, 7, 7), "crop": "foreground"},
    ],
)
def test_prepared_affine_says_where_each_voxel_is(settings, scan):
    # each voxel holds its own position along one axis, which linear resampling keeps
    for axis in range(3):
        index = np.indices(scan.shape)[2 - axis].astype(np.float32)
        scan.array[:] = scan.affine[axis, axis] * index + scan.affine[axis, 3]
        if "crop" in settings:
            scan.array[0] = scan.array[:, :2] = -5000
        preparation = plain(window=((-5000, 0), (5000, 1)), **settings)
        volume = prepare(scan, preparation)[0] * 10000 - 5000
        affine = prepared_affine(scan, preparation)
        grid = np.indices(volume.shape)[::-1].reshape(3, -1)
        where = (affine[:3, :3] @ grid + affine[:3, 3:])[axis].reshape(volume.shape)
        first, last = sorted((scan.array[scan.array > -5000].min(), scan.array.max()))
        inside = (where >= first) & (where <= last) & (volume > -4999)
        assert inside.sum() > 20
        assert np.allclose(volume[inside], where[inside], atol=0.05)
