"""The contrastive model: embeddings, concepts, long texts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from med3dvlm import hub
from med3dvlm.models import DualEncoderConfig
from tests.models import tiny


def test_embeddings_have_length_one_and_batches_do_not_matter():
    model = tiny.dual()
    scans = [tiny.scan(i) for i in range(3)]
    together = model.embed_scans(scans)
    assert together.shape == (3, 16) and together.dtype == np.float32
    assert np.linalg.norm(together, axis=1) == pytest.approx(1)
    alone = np.concatenate([model.embed_scans(s) for s in scans])
    assert np.abs(together - alone).max() < 1e-5
    texts = ["left effusion", "There is a small left pleural effusion. No consolidation."]
    assert model.embed_texts(texts).shape == (2, 16)
    assert np.abs(model.embed_texts(texts)[1] - model.embed_texts(texts[1])[0]).max() < 1e-5


def test_long_texts_are_cut_by_whole_sentences():
    processor = tiny.dual().processor
    sentence = "There is a small left pleural effusion."
    cut = processor.cut_by_sentences(" ".join([sentence] * 40))
    assert cut and set(cut.replace(sentence, "").split()) == set()
    assert len(processor.tokenizer(cut)["input_ids"]) <= 60
    assert processor.tokens(["effusion " * 400])["input_ids"].shape[1] <= 60


def test_concepts_are_learned_beside_the_contrastive_loss():
    model = tiny.dual(concepts=["a", "b"], concept_loss_weight=2.0)
    tokens = model.processor.tokens(["left", "right"])
    out = model(
        volumes=torch.rand(2, 1, *tiny.SIZE),
        concepts=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        **{k: tokens[k] for k in ("input_ids", "attention_mask")},
    )
    expected = out.contrastive_loss + 2 * out.concept_loss
    assert float(out.loss) == pytest.approx(float(expected))
    probabilities = model.concept_probabilities(tiny.scan())
    assert set(probabilities[0]) == {"a", "b"}
    with pytest.raises(ValueError, match="no concept head"):
        tiny.dual().concept_probabilities(tiny.scan())


@pytest.mark.parametrize("loss", ["siglip", "infonce"])
def test_a_few_steps_bring_pairs_together(loss):
    model = tiny.dual(loss=loss).train()
    tokens = model.processor.tokens(["left", "right", "both", "effusion"])
    volumes = torch.rand(4, 1, *tiny.SIZE, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        out = model(volumes, tokens["input_ids"], tokens["attention_mask"])
        out.loss.backward()
        optimizer.step()
        losses.append(float(out.loss))
    assert losses[-1] < 0.8 * losses[0]


def test_saved_and_loaded(tmp_path):
    model = tiny.dual(concepts=["a"])
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    loaded = hub.load(tmp_path, part="search")
    assert loaded.config.concepts == ["a"]
    # loaded for inference, it computes the same in another order
    assert np.allclose(loaded.embed_scans(tiny.scan()), model.embed_scans(tiny.scan()), atol=1e-6)
    assert np.array_equal(loaded.embed_texts("left"), model.embed_texts("left"))


def test_unknown_loss():
    with pytest.raises(ValueError, match="loss 'triplet' is unknown"):
        DualEncoderConfig(loss="triplet")


def test_place_heads_lose_what_the_formula_says():
    model = tiny.dual(places=["nodule", "cyst"], place_loss_weight=2.0)
    torch.manual_seed(0)
    volumes = torch.rand(2, 1, *tiny.SIZE)
    places = torch.zeros(2, 2, 4, 4, 4)
    places[0, 1, 3, 3, 0] = 1.0  # one cell, in a corner
    places[1, 0, 1:3, 2, 2] = 0.5
    tokens = {"input_ids": torch.tensor([[1, 2, 3], [1, 4, 3]])}
    model.eval()
    with torch.no_grad():
        out = model(volumes=volumes, places=places, **tokens)
        plain = model(volumes=volumes, **tokens)
        streams = model.vision_encoder(volumes)[1:]
    total, grid = 0.0, places
    for head, stream in zip(model.place_heads, streams, strict=True):
        p = (head(stream) - 4).transpose(1, 2).reshape(grid.shape).sigmoid()
        count = grid[0, 0].numel()
        for study in range(2):
            for label in range(2):
                there, seen = grid[study, label], p[study, label]
                if there.any():
                    total -= float((there * seen.log()).sum() / there.sum().sqrt()) / 4
                nothing = -((1 - there) * (1 - seen).log()).mean()
                total += float(2 * count**0.5 * nothing) / 4
        grid = F.max_pool3d(grid, 2, ceil_mode=True)
    assert float(out.place_loss) == pytest.approx(total, rel=1e-5)
    assert float(out.loss) == pytest.approx(float(plain.loss) + 2 * total, rel=1e-5)
    assert plain.place_loss is None


def test_texts_are_embedded_from_many_threads_as_from_one():
    """Fast tokenizers keep padding and truncation as a state, which threads would take from each
    other: one search in a thousand failed."""
    model = hub.load("demo", part="search")
    texts = ["left pleural effusion", ["no nodule", "the heart is enlarged in this scan"]]
    alone = [model.embed_texts(text) for text in texts]

    def embed(number: int) -> bool:
        return np.allclose(model.embed_texts(texts[number % 2]), alone[number % 2], atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(embed, range(400)))
