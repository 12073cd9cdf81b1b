"""Maps: on the scan's grid, inside what a model looks at, and agreeing with occlusion."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from med3dvlm.evidence import METHODS, as_scan, evidence_map, explain, query_target
from med3dvlm.evidence.faithfulness import area, block_order, curves, distance_mm, share_within
from med3dvlm.evidence.maps import occlusion, save_report_maps
from med3dvlm.evidence.targets import answer_target, report_targets, text_target, token_log_probs
from med3dvlm.models import DCFormer, DCFormerConfig
from med3dvlm.scan import (
    Preparation,
    Scan,
    prepare,
    prepared_affine,
    read_scan,
    save_nifti,
    to_scan_grid,
)
from tests.models import tiny

QUESTION = "Which side is the effusion on?"


@pytest.fixture(scope="module")
def vlm():
    return tiny.vlm()


@pytest.fixture(scope="module")
def volume(vlm):
    return vlm.processor.volumes(tiny.scan(1))


# --- back to the scan's grid ------------------------------------------------------------------


def oblique(spacing=(5.0, 0.8, 0.9), shape=(20, 60, 70), degrees=20.0) -> Scan:
    """Air with a bright box, whose axes are turned about the head's."""
    turn = np.deg2rad(degrees)
    rotation = np.array(
        [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.array(spacing[::-1])
    affine[:3, 3] = (-30, 40, 100)
    array = np.full(shape, -1000, np.float32)
    array[8:13, 20:35, 40:55] = 300
    return Scan(array, spacing, affine, "CT", "HU", "oblique")


PREPARATIONS = {
    "stretched": Preparation(size=(24, 48, 40)),
    "padded": Preparation(size=(48, 48, 48), spacing_mm=(4.0, 2.0, 2.0), fit="pad"),
    "cut": Preparation(size=(12, 24, 24), spacing_mm=(5.0, 1.5, 1.5), fit="pad"),
    "cropped": Preparation(size=(20, 32, 32), crop="foreground", intensity="window"),
    "finer": Preparation(size=(50, 120, 120), spacing_mm=(2.0, 0.5, 0.5), fit="pad"),
}


@pytest.mark.parametrize("name", PREPARATIONS)
@pytest.mark.parametrize("degrees", [0.0, 20.0])
def test_a_map_lies_where_the_scan_shows_what_it_marks(name, degrees):
    scan, preparation = oblique(degrees=degrees), PREPARATIONS[name]
    seen = prepare(scan, preparation)[0]
    marked = (seen > 0.35).astype(np.float32)  # the bright box, on the prepared grid
    back = to_scan_grid(marked, scan, preparation)
    truth = scan.array > 0
    assert back.shape == scan.array.shape
    overlap = back[truth].sum() / back.sum()
    assert overlap > 0.5  # the rest is the width of a prepared voxel around the box
    middle = [float(np.average(axis, weights=back)) for axis in np.indices(back.shape)]
    assert middle == pytest.approx([10, 27, 47], abs=0.75)


def test_the_way_back_agrees_with_the_affine_of_the_prepared_volume():
    scan, preparation = oblique(), PREPARATIONS["cut"]
    values = np.zeros(preparation.size, np.float32)
    values[3, 7, 9] = 1
    back = to_scan_grid(values, scan, preparation)
    peak = np.unravel_index(back.argmax(), back.shape)
    wanted = prepared_affine(scan, preparation) @ [9, 7, 3, 1]
    found = scan.affine @ [*peak[::-1], 1]
    assert np.abs(found - wanted).max() < max(preparation.spacing_mm)
    with pytest.raises(ValueError, match="prepared volume"):
        to_scan_grid(values[:-1], scan, preparation)


def test_outside_of_what_the_model_sees_a_map_is_zero():
    scan, preparation = oblique(), PREPARATIONS["cut"]
    back = to_scan_grid(np.ones(preparation.size, np.float32), scan, preparation)
    assert set(np.unique(back.round(5))) == {0.0, 1.0}
    seen_mm = [n * mm for n, mm in zip(preparation.size, preparation.spacing_mm, strict=True)]
    lengths = [back.any(axis=tuple({0, 1, 2} - {a})).sum() * scan.spacing_mm[a] for a in range(3)]
    assert lengths == pytest.approx(np.minimum(seen_mm, [100, 48, 63]), abs=2.5)


def test_a_saved_map_lies_on_the_scan_in_space(tmp_path):
    scan = oblique()
    values = (scan.array > 0) * np.float32(0.5)
    save_nifti(as_scan(scan, values), tmp_path / "map.nii.gz")
    read = read_scan(tmp_path / "map.nii.gz")
    assert read.affine == pytest.approx(scan.affine, abs=1e-4)
    assert set(np.unique(read.array)) == {0, 50}  # whole percent
    assert np.array_equal(read.array > 0, scan.array > 0)


# --- what the maps show -----------------------------------------------------------------------

BOX = (slice(16, 28), slice(32, 48), slice(8, 24))


def linear_in_box(volumes: torch.Tensor) -> torch.Tensor:
    return volumes[(slice(None), 0, *BOX)].sum(dim=(1, 2, 3))


class Plain(torch.nn.Module):
    """Passes the volume on, so that a target is a function of the voxels."""

    def forward(self, volumes: torch.Tensor) -> list[torch.Tensor]:
        return [volumes]


@pytest.mark.parametrize("method", ["integrated-gradients", "occlusion"])
def test_what_depends_on_a_box_gives_a_map_in_that_box(method):
    volume = torch.rand(1, 1, 48, 64, 64, generator=torch.manual_seed(0))
    volume[(0, 0, *BOX)] += 2
    values = evidence_map(Plain(), volume, lambda s: linear_in_box(s[0]), method=method)
    inside = np.zeros(values.shape, bool)
    inside[BOX] = True
    assert inside[np.unravel_index(values.argmax(), values.shape)]
    assert values[inside].mean() > 3 * values[~inside].mean()
    assert values.max() == 1 and values.min() >= 0


def test_layercam_points_at_the_cell_that_is_read():
    """The target reads one cell of stage 3: a map of it must lie around that cell's voxels."""
    torch.manual_seed(0)
    config = DCFormerConfig(variant="t", depths=[1] * 5, channels=[8] * 5, volume_size=[48, 64, 64])
    encoder = DCFormer(config).eval()
    for cell in ((0, 0, 1), (1, 1, 0)):  # of (2, 2, 2), centred on voxel 32 · cell

        def target(streams, cell=cell):
            grid = streams[3].transpose(1, 2).reshape(len(streams[3]), -1, 2, 2, 2)
            return grid[(slice(None), slice(None), *cell)].abs().sum(dim=1)

        values = evidence_map(encoder, torch.rand(1, 1, 48, 64, 64), target)
        peak = np.array(np.unravel_index(values.argmax(), values.shape))
        assert np.abs(peak - 32 * np.array(cell)).max() <= 24


def test_integrated_gradients_agree_with_occlusion_where_the_model_is_linear():
    volume = torch.rand(1, 1, 32, 32, 32, generator=torch.manual_seed(1))
    weights = torch.zeros(32, 32, 32)
    weights[4:12, 16:28, 8:20] = 1.0
    volume[0, 0, 4:12, 16:28, 8:20] += 1

    def target(streams):
        return (streams[0][:, 0] * weights).sum(dim=(1, 2, 3))

    maps = [
        evidence_map(Plain(), volume, target, method=method).ravel()
        for method in ("integrated-gradients", "occlusion")
    ]
    assert np.corrcoef(maps)[0, 1] > 0.6


def test_captums_occlusion_is_the_drop_of_the_target():
    from med3dvlm.evidence.maps import blurred

    volume = torch.rand(1, 1, 8, 8, 8, generator=torch.manual_seed(2))
    found = occlusion(Plain(), volume, lambda s: s[0].sum(dim=(1, 2, 3, 4)))
    corner = volume - blurred(volume)  # boxes of 2³ that move by 1: the corner is in one alone
    assert found[0, 0, 0] == pytest.approx(float(corner[0, 0, :2, :2, :2].sum()), abs=1e-4)


def test_every_method_explains_answers_sentences_and_queries(vlm):
    dual, scan = tiny.dual(), tiny.scan(1)
    report = "Findings: There is a small left pleural effusion. No consolidation."
    targets = report_targets(vlm, report)
    assert len(targets) == 2
    for method in METHODS:
        values = explain(vlm, scan, targets[0], method=method)
        assert values.shape == scan.array.shape and values.max() <= 1, method
        assert values.any() or method == "grad-cam"  # of one cell here, which may weigh nothing
    answer = vlm.ask(scan, QUESTION, ["left", "right"])
    chosen = explain(vlm, scan, answer_target(vlm, QUESTION, answer, ["left", "right"]))
    assert 0 < chosen.max() <= 1
    by_text = explain(dual, scan, query_target(dual, "left pleural effusion"))
    by_scan = explain(dual, scan, query_target(dual, dual.embed_scans(tiny.scan(2))[0]))
    assert by_text.max() > 0 and not np.array_equal(by_text, by_scan)
    with pytest.raises(ValueError, match="unknown"):
        evidence_map(vlm.vision_encoder, vlm.processor.volumes(scan), targets[0], method="guess")


def test_a_vit_is_explained_too():
    from med3dvlm.models import ViT3D, ViT3DConfig

    torch.manual_seed(0)
    config = ViT3DConfig(
        volume_size=[16, 32, 32], patch_size=[8, 8, 8], hidden_size=16, num_layers=3, num_heads=2
    )
    encoder = ViT3D(config).eval()
    volume = torch.rand(1, 1, 16, 32, 32)
    values = evidence_map(encoder, volume, lambda streams: streams[-1][:, 0, 0])
    assert values.shape == (16, 32, 32) and values.max() == pytest.approx(1)


def test_a_target_is_the_likelihood_that_the_model_gives(vlm, volume):
    with torch.inference_mode():
        visual = vlm.get_visual_tokens(volume)
        streams = vlm.vision_encoder(volume)
        log_probs, spans = token_log_probs(vlm, visual, QUESTION, "left")
        margin = text_target(vlm, QUESTION, "left", others=["right"])(streams)
        other, _ = token_log_probs(vlm, visual, QUESTION, "right")
        whole = text_target(vlm, QUESTION, "left")(streams)
        with pytest.raises(ValueError, match="nothing to explain"):
            text_target(vlm, QUESTION, "left", part=(4, 4))(streams)
    assert whole.item() == pytest.approx(log_probs.sum().item(), abs=1e-4)
    assert spans[-1][1] == 4
    assert margin.item() == pytest.approx((log_probs.sum() - other.sum()).item(), abs=1e-4)


def test_the_model_is_left_as_it_was(vlm, volume):
    before = vlm.fingerprint()
    evidence_map(vlm.vision_encoder, volume, text_target(vlm, QUESTION, "left"))
    assert vlm.fingerprint() == before
    assert all(p.grad is None for p in vlm.parameters())
    assert not any(m._forward_hooks for m in vlm.vision_encoder.modules())


# --- faithfulness -----------------------------------------------------------------------------


def test_distance_is_in_mm_from_the_highest_voxel():
    values, mask = np.zeros((10, 10, 10)), np.zeros((10, 10, 10), bool)
    values[2, 3, 4] = 1
    mask[4, 3, 4] = mask[2, 9, 9] = True
    assert distance_mm(values, mask, (5.0, 1.0, 1.0)) == pytest.approx(np.hypot(6, 5))
    assert distance_mm(values * 0, mask, (1.0, 1.0, 1.0)) == np.inf
    with pytest.raises(ValueError, match="no voxel"):
        distance_mm(values, mask & False, (1.0, 1.0, 1.0))
    assert share_within(mask, (5.0, 1.0, 1.0), tolerance_mm=0.5) == pytest.approx(0.002)


def test_a_perfect_map_beats_a_random_one_in_both_curves():
    volume = torch.zeros(1, 1, 24, 24, 24)
    box = (0, 0, slice(4, 8), slice(10, 14), slice(2, 6))
    volume[box] = 1

    def target(streams):
        inside = streams[0][:, 0, 4:8, 10:14, 2:6].mean(dim=(1, 2, 3))
        return 20 * (inside - 0.5)  # log-odds: sure where the box is there

    perfect = volume[0, 0].numpy()
    random = np.random.default_rng(0).random((24, 24, 24))
    found = {}
    for name, values in (("perfect", perfect), ("random", random)):
        deletion, insertion = curves(Plain(), volume, target, values)
        assert deletion[0] > 0.99 and insertion[-1] > 0.99  # all there
        assert deletion[-1] < 0.1 and insertion[0] < 0.1  # all blurred
        found[name] = (area(deletion), area(insertion))
    assert found["perfect"][0] < 0.1 < found["random"][0] - 0.1
    assert found["perfect"][1] > 0.9 > found["random"][1] + 0.1


def test_blocks_are_ranked_by_what_is_in_them():
    values = np.zeros((24, 24, 24))
    values[0:2, 0:2, 0:2] = 1
    values[22:, 22:, 22:] = 2
    rank = block_order(values)
    assert set(np.unique(rank[22:, 22:, 22:])) == {0} and set(np.unique(rank[:2, :2, :2])) == {1}
    assert rank.max() == 12**3 - 1
    assert (rank == 0).sum() == 8


def test_nothing_to_see_is_an_empty_map():
    assert not evidence_map(
        Plain(),
        torch.rand(1, 1, 8, 8, 8),
        lambda s: 0 * s[0].sum(dim=(1, 2, 3, 4)),
        method="occlusion",
    ).any()


def test_a_map_of_what_the_model_does_not_look_at_peaks_nowhere(tmp_path):
    blind = tiny.vlm()
    for parameter in blind.projector.parameters():
        torch.nn.init.zeros_(parameter)
    save_report_maps(blind, tiny.scan(1), "The heart is enlarged.", tmp_path / "maps")
    (entry,) = json.loads((tmp_path / "maps" / "evidence.json").read_text())["sentences"]
    assert not read_scan(tmp_path / "maps" / entry["file"]).array.any()
    assert entry["peak_lps_mm"] is None


def test_as_scan_keeps_the_geometry():
    scan = replace(oblique(), warnings=("a",))
    found = as_scan(scan, np.full(scan.array.shape, 0.256, np.float32))
    assert found.affine is scan.affine and found.units is None and found.warnings == ()
    assert set(np.unique(found.array)) == {26}
