"""Published checkpoints: same outputs as the published implementation, and back bit for bit."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from med3dvlm import hub
from med3dvlm.losses import infonce_loss
from med3dvlm.models import DCFormer, Med3DVLM, VolumeTextDualEncoder
from med3dvlm.models.projector import make_projector
from med3dvlm.models.published import (
    CheckpointError,
    encoder_to_published,
    fill_model,
    load_projector_weights,
    read_weights,
    save_published,
)
from tests.models import tiny
from tests.models.parity_fill import rng, volume
from tests.models.published_folders import (
    clip_folder,
    fixture,
    published_weights,
    relative_error,
    vlm_folder,
)

TOLERANCE = 1e-4
pytestmark = pytest.mark.filterwarnings("ignore:.*text encoder is.*", "ignore:.*no tokenizer.*")


@pytest.fixture(scope="module")
def small_streams() -> list[torch.Tensor]:
    encoder = DCFormer.from_published(published_weights("encoder_small"))
    with torch.inference_mode():
        return encoder(torch.from_numpy(volume("input", (1, 1, 128, 256, 256))))


def assert_streams_equal(streams: list[torch.Tensor], expected: dict[str, np.ndarray]) -> None:
    for i, stream in enumerate(streams):
        head = expected[f"stage{i}_head"]
        assert relative_error(stream[0, : head.shape[0], : head.shape[1]], head) < TOLERANCE
        stats = [stream.mean(), stream.std(), stream.abs().max()]
        assert np.allclose(stats, expected[f"stage{i}_stats"], rtol=1e-3, atol=1e-4)
    for i in (3, 4):
        assert relative_error(streams[i][0], expected[f"stage{i}"]) < TOLERANCE


def test_encoder_small_equals_the_published_one(small_streams):
    assert_streams_equal(small_streams, fixture("encoder_small_128x256x256"))


def test_encoder_nano_equals_the_published_one():
    encoder = DCFormer.from_published(published_weights("encoder_nano"))
    assert encoder.config.variant == "nano"
    assert encoder.config.stem_activation == "none"
    with torch.inference_mode():
        streams = encoder(torch.from_numpy(volume("input", (1, 1, 64, 128, 128))))
    assert_streams_equal(streams, fixture("encoder_nano_64x128x128"))


def test_encoder_goes_back_bit_for_bit():
    weights = published_weights("encoder_nano")
    back = encoder_to_published(DCFormer.from_published(weights))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("kind", ["mixer", "low_high_mlp"])
def test_projector_equals_the_published_one(kind, small_streams):
    projector = make_projector(
        kind, stream_tokens=(256, 32), stream_channels=(384, 768), width_out=3584
    )
    load_projector_weights(projector, published_weights(f"projector_{kind}"), kind=kind)
    with torch.inference_mode():
        out = projector(small_streams[3], small_streams[4])
    expected = fixture(f"projector_{kind}")
    assert tuple(out.shape) == tuple(expected["shape"])
    assert relative_error(out[0, :, :32], expected["head"]) < TOLERANCE


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder, weights = clip_folder(tmp_path_factory.mktemp("clip"))
    return hub.load(folder), weights, folder


def test_contrastive_model_equals_the_published_one(clip):
    model, _, _ = clip
    images = volume("clip_images", (4, 1, 64, 128, 128))
    images = images * np.linspace(0.3, 1, 4, dtype=np.float32).reshape(4, 1, 1, 1, 1)
    ids = torch.from_numpy(rng("clip_ids").integers(5, 512, (4, 24)))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    mask[3, 11:] = 0
    with torch.inference_mode():
        out = model(volumes=torch.from_numpy(images), input_ids=ids, attention_mask=mask)
        nce = infonce_loss(out.image_embeds, out.text_embeds, logit_scale=torch.tensor(1 / 0.07))
    expected = fixture("clip")
    assert relative_error(out.image_embeds, expected["image_features"]) < TOLERANCE
    assert relative_error(out.text_embeds, expected["text_features"]) < TOLERANCE
    assert float(out.loss) == pytest.approx(float(expected["sigmoid_loss_mean"]), rel=1e-4)
    assert float(nce) == pytest.approx(float(expected["nce_loss"]), rel=1e-4)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder, weights = vlm_folder(tmp_path_factory.mktemp("vlm"))
    return hub.load(folder), weights, folder


def test_language_model_equals_the_published_one(vlm):
    model, _, _ = vlm
    expected = fixture("vlm_tiny_qwen2")
    assert model.config.prompt_layout == "published"
    assert model.config.image_token_id == expected["image_token_id"]
    question = torch.from_numpy(expected["question_ids"])
    ids = torch.cat([torch.full((1, 256), 516), question], dim=1)
    volumes = torch.from_numpy(volume("vlm_image", (1, 1, 128, 256, 256)))
    with torch.inference_mode():
        visual = model.get_visual_tokens(volumes)
        logits = model(input_ids=ids, volumes=volumes).logits[0, -12:]
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            visual_tokens=visual,
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
        )
    assert relative_error(visual[0], expected["visual_tokens"]) < TOLERANCE
    assert relative_error(logits, expected["last_logits"]) < TOLERANCE
    assert written[:, ids.shape[1] :].tolist() == expected["greedy"].tolist()


def test_left_padding_does_not_change_what_is_written(vlm):
    model, _, _ = vlm
    expected = fixture("vlm_tiny_qwen2")
    question = torch.from_numpy(expected["question_ids"])
    ids = torch.cat([torch.full((1, 3), 2), torch.full((1, 256), 516), question], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        visual_tokens=torch.from_numpy(expected["visual_tokens"])[None],
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
    )
    assert written[:, ids.shape[1] :].tolist() == expected["greedy"].tolist()


@pytest.mark.parametrize("which", ["clip", "vlm"])
def test_own_layout_and_back_is_bit_exact(which, request, tmp_path):
    model, weights, folder = request.getfixturevalue(which)
    model.save_pretrained(tmp_path / "own")
    model.processor.save_pretrained(tmp_path / "own")
    own = hub.load(tmp_path / "own")
    assert type(own) is type(model)
    assert own.preparation == model.preparation
    save_published(own, tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text())


def test_bfloat16_weights_keep_their_bits(tmp_path):
    folder, weights = vlm_folder(tmp_path / "vlm")
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in weights.items()}
    save_file(half, folder / "model.safetensors")
    save_published(hub.load_exact(folder), tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[name], half[name]) for name in half)


def test_each_weight_keeps_the_precision_of_its_file(tmp_path):
    """A language model in bf16 between parts in fp32, whose updates bf16 could not hold."""
    model = tiny.vlm()
    model.language_model.bfloat16()
    with torch.no_grad():
        model.vision_encoder.stem.layers[0].norm_depth.weight += 1e-4
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    loaded = hub.load_exact(tmp_path)
    kept = model.state_dict()
    assert {t.dtype for t in kept.values()} == {torch.float32, torch.bfloat16, torch.int64}
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == kept[name].dtype and torch.equal(tensor, kept[name]), name
    assert loaded.fingerprint() == model.fingerprint()
    scan = tiny.scan()
    assert loaded.report(scan, max_new_tokens=4) == model.report(scan, max_new_tokens=4)
    assert loaded.ask(scan, "Which side?", ["left", "right"]).choices
    loaded.vision_encoder.bfloat16()
    loaded.report(scan, max_new_tokens=4)


def test_weights_of_one_precision_are_not_copied():
    model = tiny.vlm().bfloat16()
    weights = {n: t for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
    loaded = fill_model(Med3DVLM, model.config, weights, [])
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.data_ptr() == weights[name].data_ptr(), name


def test_sharded_weights_and_pickles_load_alike(tmp_path, clip):
    _, weights, folder = clip
    names = sorted(weights)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    for file, part in shards.items():
        save_file({n: weights[n] for n in part}, sharded / file)
    index = {"weight_map": {n: file for file, part in shards.items() for n in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    for found in (read_weights(sharded), read_weights(tmp_path / "pytorch_model.bin")):
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[n], weights[n]) for n in weights)


def test_the_encoder_is_found_inside_other_checkpoints():
    alone = DCFormer.from_published(published_weights("encoder_small"))
    inside = DCFormer.from_published(published_weights("clip"))
    assert inside.state_dict().keys() == alone.state_dict().keys()


# --- checkpoints that are wrong -------------------------------------------------------------


def broken(tmp_path, change) -> str:
    folder, weights = vlm_folder(tmp_path / "broken")
    change(weights)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        hub.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_key_is_named(tmp_path):
    name = "model.mm_projector.low_mixer.0.ln1.weight"
    assert f"{name!r} is missing" in broken(tmp_path, lambda w: w.pop(name))


def test_an_unexpected_key_is_named(tmp_path):
    def add(weights):
        weights["model.vision_tower.vision_tower.encoder.s9.0.scale"] = torch.zeros(3)

    message = broken(tmp_path, add)
    assert "encoder.s9.0.scale' is unexpected" in message


def test_a_misshapen_key_is_named(tmp_path):
    def reshape(weights):
        weights["lm_head.weight"] = torch.zeros(3, 64)

    message = broken(tmp_path, reshape)
    assert "'lm_head.weight' has shape (3, 64)" in message


def test_a_truncated_file_is_named(tmp_path):
    folder, _ = vlm_folder(tmp_path / "cut")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        hub.load(folder)


def test_mixed_up_config_and_weights(tmp_path):
    folder, _ = vlm_folder(tmp_path / "mixed")
    save_file(published_weights("clip"), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="'t_prime' is unexpected|key '.*' is"):
        hub.load(folder)


class _Evil:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path, capsys):
    folder, _ = vlm_folder(tmp_path / "evil")
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"weight": _Evil()}, file)
    with pytest.raises(CheckpointError, match="not a file of plain weights"):
        hub.load(folder)
    assert "must never run" not in capsys.readouterr().out


def test_a_shard_outside_the_folder_is_refused(tmp_path):
    index = {"weight_map": {"a": "../../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_weights(tmp_path)


@pytest.mark.parametrize("name", ["demoo", "no/such/folder", "./nowhere", "owner/not-a-model"])
def test_an_unknown_name_without_network_is_one_sentence(name):
    with pytest.raises(CheckpointError) as error:
        hub.load(name)
    assert name in str(error.value)


def test_config_that_is_no_json(tmp_path):
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        hub.load(tmp_path)


def test_the_wrong_kind_of_model_is_refused(clip):
    _, _, folder = clip
    with pytest.raises(CheckpointError, match="needs a Med3DVLM"):
        hub.load(folder, part="language")


def test_kinds(clip, vlm):
    assert isinstance(clip[0], VolumeTextDualEncoder)
    assert isinstance(vlm[0], Med3DVLM)
