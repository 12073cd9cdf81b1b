"""Questions asked together get the answers that each gets alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from med3dvlm.models import Med3DVLM, decoding
from med3dvlm.models.decoding import Recent, score_plainly, shares_prefixes, write
from tests.models import tiny

QUESTIONS = [
    "Which side?",
    "Please write the report of this scan. left right",
    "Is there effusion?",
    "The heart is enlarged. Which side is the effusion on?",
    "left",
]
TEXTS = [
    ["yes", "no"],
    ["A. left", "B. right", "C. both left and right"],
    ["yes", "no"],
    ["left right left right both", "right"],
    ["no"],
]
LONG = 24  # tokens
OTHERS = {  # language models that take the same masks, and some that do not
    "llama": True,
    "qwen3": True,
    "mistral": False,  # looks back over a window
    "gpt2": False,  # no rotary positions
}


@pytest.fixture(scope="module")
def model() -> Med3DVLM:
    return tiny.vlm()


@pytest.fixture(scope="module")
def published() -> Med3DVLM:
    return tiny.vlm(prompt_layout="published")


@pytest.fixture(scope="module")
def visual(model) -> torch.Tensor:
    seen = model.see([tiny.scan(0), tiny.scan(1)])
    return seen[[0, 0, 1, 0, 1]]  # five questions about two scans


@pytest.mark.parametrize("layout", ["model", "published"])
def test_choices_in_one_pass_are_as_likely_as_one_by_one(layout, visual, request, monkeypatch):
    model = request.getfixturevalue(layout)
    together = model.score(visual, QUESTIONS, TEXTS)
    for row, (question, texts) in enumerate(zip(QUESTIONS, TEXTS, strict=True)):
        by_hand = []
        for text in texts:
            batch = model.processor.training_batch([[(question, text)]])
            with torch.inference_mode():
                loss = model(
                    input_ids=batch["input_ids"],
                    labels=batch["labels"],
                    visual_tokens=visual[[row]],
                ).loss
            by_hand.append(-float(loss) * int((batch["labels"] >= 0).sum()))
        assert together[row] == pytest.approx(torch.tensor(by_hand).softmax(0).tolist(), rel=1e-4)
        assert model.likelihoods(visual[[row]], question, texts) == pytest.approx(
            together[row], rel=1e-4
        )
    # in passes of one row each, too
    monkeypatch.setattr(decoding, "COLUMNS_AT_ONCE", 1)
    for one, all_at_once in zip(model.score(visual, QUESTIONS, TEXTS), together, strict=True):
        assert one == pytest.approx(all_at_once, rel=1e-4)


@pytest.mark.parametrize("layout", ["model", "published"])
def test_what_is_written_together_equals_the_librarys_generate_one_by_one(
    layout, visual, request, monkeypatch
):
    """Token for token, in a batch so small that rows leave it and others join it."""
    model = request.getfixturevalue(layout)
    monkeypatch.setattr(decoding, "ROWS_AT_ONCE", 3)
    prompts = model.processor.prompt_tokens(QUESTIONS[:4])
    nothing = len(model.processor.tokenizer)  # no token: every row goes on to the limit
    with torch.inference_mode():
        alone = [
            model._generate(visual[[i]], [p], max_new_tokens=LONG, eos_token_id=nothing)[0][0]
            for i, p in enumerate(prompts)
        ]
        # the end is a token that rows come to at different times, or never
        ends = {
            t: [row.index(t) if t in row else LONG for row in alone] for row in alone for t in row
        }
        end = max(ends, key=lambda token: len(set(ends[token])))
        together = write(model, visual[:4], prompts, max_new_tokens=LONG, end=end)
    assert len(set(ends[end])) >= 3
    assert [tokens for tokens, _ in together] == [
        row[: place + 1] for row, place in zip(alone, ends[end], strict=True)
    ]


def test_confidence_is_that_of_the_librarys_generate(model, visual):
    prompts = model.processor.prompt_tokens(QUESTIONS[:4])
    by_library = model._generate(visual[:4], prompts, max_new_tokens=LONG)
    with torch.inference_mode():
        end = model.processor.tokenizer.eos_token_id
        ours = write(model, visual[:4], prompts, max_new_tokens=LONG, end=end)
    confidences = [c for _, c in by_library]
    assert [confidence for _, confidence in ours] == pytest.approx(confidences, rel=1e-4)


@pytest.mark.parametrize(("kind", "shares"), OTHERS.items())
def test_any_language_model_answers_the_same_together_and_alone(model, visual, kind, shares):
    other = with_language_model(model, kind)
    prompts = model.processor.prompt_tokens(QUESTIONS[:4])
    assert shares_prefixes(other, prompts) is shares
    targets = [model.processor.target_tokens(texts) for texts in TEXTS[:4]]
    shares_of_texts = other.score(visual[:4], QUESTIONS[:4], TEXTS[:4])
    with torch.inference_mode():
        plain = score_plainly(other, visual[:4], prompts, targets)
    for found, expected in zip(shares_of_texts, plain, strict=True):
        assert found == pytest.approx(expected.softmax(0).tolist(), rel=1e-4)
    written = other.ask(visual[:4], QUESTIONS[:4], max_new_tokens=8)
    assert written == [other.ask(visual[[i]], QUESTIONS[i], max_new_tokens=8) for i in range(4)]
    alone = other._generate(visual[[1]], [prompts[1]], max_new_tokens=8)[0][0]
    assert written[1] == model.processor.tokenizer.decode(alone, skip_special_tokens=True).strip()


def with_language_model(model: Med3DVLM, kind: str) -> Med3DVLM:
    """The same model over another language model, of as few weights."""
    text = model.config.text_config.to_dict()
    keys = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "intermediate_size", "max_position_embeddings")
    keys += ("bos_token_id", "eos_token_id", "pad_token_id")
    if kind == "gpt2":
        keys = tuple(key for key in keys if key not in ("num_key_value_heads", "intermediate_size"))
    config = copy.deepcopy(model.config)
    config.text_config = AutoConfig.for_model(kind, **{key: text[key] for key in keys})
    torch.manual_seed(1)
    other = Med3DVLM(config).eval()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.25) if parameter.ndim > 1 else None
    other.processor = model.processor
    return other


def test_eager_attention_scores_the_same(model, visual):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert eager.language_model.config._attn_implementation == "eager"
    for found, expected in zip(
        eager.score(visual, QUESTIONS, TEXTS), model.score(visual, QUESTIONS, TEXTS), strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-4)


# --- what is remembered -----------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many volumes each call of the encoder took."""
    calls: list[int] = []
    encode = Med3DVLM.encode
    monkeypatch.setattr(Med3DVLM, "encode", lambda self, v: calls.append(len(v)) or encode(self, v))
    return calls


def test_a_second_question_about_a_scan_costs_no_encoder_time(encoded):
    model = tiny.vlm()
    first = model.ask(tiny.scan(0), QUESTIONS[0], max_new_tokens=4)
    again = tiny.scan(0)  # as if it had been read again
    assert model.ask(again, QUESTIONS[0], max_new_tokens=4) == first
    assert model.ask(again, QUESTIONS[2], ["yes", "no"]) in ("A. yes", "B. no")
    assert encoded == [1]
    both = model.see([tiny.scan(1), again, tiny.scan(1)])
    assert encoded == [1, 1]  # the new one only, and once
    assert torch.equal(both[0], both[2]) and torch.equal(both[1:2], model.see(again))


def test_what_changes_a_scan_or_the_weights_is_seen_anew(encoded):
    model = tiny.vlm()
    scan = tiny.scan(0)
    model.see(scan)
    scan.array[0, 0, 0] += 1  # in place
    model.see(scan)
    model.see(replace(scan, spacing_mm=(2.0, 1.0, 1.5)))
    assert encoded == [1, 1, 1]
    before = model.ask(scan, "Which side?", max_new_tokens=8)
    assert encoded == [1, 1, 1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)
    assert model.ask(scan, "Which side?", max_new_tokens=8) != before
    assert encoded == [1, 1, 1, 1]
    fresh = tiny.vlm()
    fresh.load_state_dict(model.state_dict())
    assert fresh.ask(scan, "Which side?", max_new_tokens=8) == model.ask(
        scan, "Which side?", max_new_tokens=8
    )


def test_moving_or_replacing_the_weights_forgets(encoded):
    model = tiny.vlm()
    for act in (lambda: model.to(torch.float32), lambda: model.load_state_dict(model.state_dict())):
        model.see(tiny.scan())
        encoded.clear()
        act()
        model.see(tiny.scan())
        assert encoded == [1]


def test_the_prefix_of_a_scan_is_read_once(model, visual, monkeypatch):
    model = copy.deepcopy(model)
    lengths = []
    forward = Med3DVLM.forward

    def counted(self, *args, **kwargs):
        lengths.append(tuple(kwargs["input_ids"].shape))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Med3DVLM, "forward", counted)
    model.ask(visual[:1], QUESTIONS[:4], ["left", "right"])
    model.ask(visual[:1], QUESTIONS[:4], max_new_tokens=1)
    prefix = decoding.prefix_length(model, model.processor.prompt_tokens(["left"])[0])
    assert lengths[0] == (1, prefix)
    assert all(shape[1] < prefix + 60 and shape[0] == 4 for shape in lengths[1:])
    assert len(lengths) == 3


def test_only_the_last_used_are_kept():
    made = []

    def make(places):
        made.append(list(places))
        return [f"value {place}" for place in places]

    recent = Recent(2)
    assert recent.get(["a", "b", "a"], make) == ["value 0", "value 1", "value 0"]
    assert recent.get(["b", "a"], make) == ["value 1", "value 0"]
    recent.get(["c"], make)  # b was used longest ago
    assert list(recent.kept) == ["a", "c"] and made == [[0, 1], [0]]
    assert recent.get(["d", "e", "f"], make) == ["value 0", "value 1", "value 2"]
    assert len(recent.kept) == 2
    assert copy.deepcopy(recent).kept == {}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_texts_can_be_followed_and_ended_early(model, visual, kind):
    other = with_language_model(model, kind)
    whole = [t for t, _ in other._write_tokens(visual, QUESTIONS, max_new_tokens=LONG)]
    heard: list[list[int]] = [[] for _ in QUESTIONS]

    def watch(rows: list[int], tokens: list[int]) -> set[int]:
        for row, token in zip(rows, tokens, strict=True):
            heard[row].append(token)
        return {2} if len(heard[2]) >= 3 else set()

    other._write_tokens(visual, QUESTIONS, max_new_tokens=LONG, watch=watch)
    for row, tokens in enumerate(heard):
        expected = whole[row][:3] if row == 2 else whole[row][: len(tokens)]
        assert tokens == expected and len(tokens) in (3, LONG, 1 + find_end(other, whole[row]))


def find_end(model: Med3DVLM, tokens: list[int]) -> int:
    end = model._greedy().eos_token_id
    return tokens.index(end) if end in tokens else len(tokens)
