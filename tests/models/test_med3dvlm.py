"""The language model that sees: batches, choices, prompts, saving, limits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor

from med3dvlm import hub
from med3dvlm.models import Med3DVLM
from med3dvlm.models.processor import IGNORED
from med3dvlm.models.projector import PROJECTORS
from tests.models import tiny

QUESTIONS = [
    "Which side?",
    "Please write the report of this scan. left right",
    "Is there effusion?",
]


@pytest.fixture(scope="module")
def model() -> Med3DVLM:
    return tiny.vlm()


def test_a_batch_of_different_lengths_equals_one_by_one(model):
    scans = [tiny.scan(i) for i in range(3)]
    together = model.ask(scans, QUESTIONS, max_new_tokens=12)
    alone = [model.ask(s, q, max_new_tokens=12) for s, q in zip(scans, QUESTIONS, strict=True)]
    assert together == alone
    for a, b in zip(together, alone, strict=True):
        assert a.confidence == pytest.approx(b.confidence, rel=1e-4)


def test_what_is_written_depends_on_the_scan(model):
    reports = model.report([tiny.scan(i) for i in range(4)], max_new_tokens=12)
    assert len(set(reports)) > 1


def test_one_scan_with_many_questions_is_encoded_once(model, monkeypatch):
    calls = []
    encode = Med3DVLM.encode
    monkeypatch.setattr(Med3DVLM, "encode", lambda self, v: calls.append(len(v)) or encode(self, v))
    answers = model.ask(tiny.scan(7), QUESTIONS, max_new_tokens=4)
    assert calls == [1] and len(answers) == 3


def test_choices_are_scored_by_their_likelihood(model):
    choices = ["left", "right", "both sides"]
    answer = model.ask(tiny.scan(), "Which side is the effusion on?", choices)
    assert sum(share for _, share in answer.choices) == pytest.approx(1)
    assert answer.confidence == max(share for _, share in answer.choices)
    visual = model.see(tiny.scan())
    prompt = model.processor.closed_question("Which side is the effusion on?", choices)
    by_hand = []
    for text in model.processor.lettered(choices):
        batch = model.processor.training_batch([[(prompt, text)]])
        with torch.inference_mode():
            loss = model(
                input_ids=batch["input_ids"], visual_tokens=visual, labels=batch["labels"]
            ).loss
        by_hand.append(-float(loss) * int((batch["labels"] != IGNORED).sum()))
    shares = torch.tensor(by_hand).softmax(0).tolist()
    assert [share for _, share in answer.choices] == pytest.approx(shares, rel=1e-3)


def test_greedy_is_deterministic_and_sampling_follows_the_seed(model):
    scan = tiny.scan()
    assert model.report(scan, max_new_tokens=10) == model.report(scan, max_new_tokens=10)

    def draw(seed):
        torch.manual_seed(seed)
        return model.report(scan, max_new_tokens=10, do_sample=True, temperature=1.5)

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(6)}) > 1


def test_own_layout_loses_no_token_and_the_published_one_loses_the_first(model):
    ids = model.processor.prompts(["left"])["input_ids"]
    n = model.num_visual_tokens
    marks = torch.full((1, n, 32), 7.0)
    own = model._place(marks, ids, model.get_input_embeddings()(ids))
    placeholder = ids[0] == model.config.image_token_id
    assert bool((own[0, placeholder] == 7).all())
    words = model.get_input_embeddings()(ids)
    assert torch.equal(own[0, ~placeholder], words[0, ~placeholder])
    published = tiny.vlm(prompt_layout="published")
    shifted = published._place(marks, ids, words)
    first = int(placeholder.int().argmax())
    assert torch.equal(shifted[0, first], words[0, first])
    assert bool((shifted[0, first + 1 : first + 1 + n] == 7).all())
    assert torch.equal(shifted[0, first + 1 + n :], words[0, first + 1 + n :])


def test_labels_count_the_answer_and_its_end_only(model):
    batch = model.processor.training_batch([[("Which side?", "left")], [("Side?", "right both")]])
    tokenizer = model.processor.tokenizer
    for row, answer in zip(batch["labels"], ["left", "right both"], strict=True):
        counted = row[row != IGNORED].tolist()
        assert counted[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(counted[:-1]).strip() == answer


def test_turns_about_one_scan_are_read_as_if_each_were_alone(model):
    turns = [("Which side?", "left"), ("Side?", "right both"), ("Which side is it?", "both")]
    visual = model.see([tiny.scan(0), tiny.scan(1)])
    together = model.processor.training_batch([turns, turns[1:]])
    with torch.no_grad():
        inputs = {k: v for k, v in together.items() if k not in ("turns", "labels")}
        logits = model(**inputs, visual_tokens=visual).logits
        for row, first in ((0, 0), (1, 1)):
            shared = int((together["turns"][row] == 0).sum())
            for number, turn in enumerate(turns[first:], start=1):
                alone = model.processor.training_batch([[turn]])
                expected = model(
                    input_ids=alone["input_ids"], visual_tokens=visual[row : row + 1]
                ).logits[0, shared:]
                mine = together["turns"][row] == number
                assert torch.allclose(logits[row, mine], expected, atol=1e-5)
                tokens = together["input_ids"][row, mine]
                assert torch.equal(tokens, alone["input_ids"][0, shared:])
                labels = alone["labels"][0, shared:]
                assert torch.equal(together["labels"][row, mine], labels)


def test_gradients_reach_every_part_that_learns(model):
    model = tiny.vlm().train()
    batch = model.processor.training_batch([[("Which side?", "left")], [("Where?", "right")]])
    volumes = torch.rand(2, 1, *tiny.SIZE)
    model(**batch, volumes=volumes).loss.backward()
    for name in ("vision_encoder", "projector", "language_model"):
        grads = [p.grad for p in getattr(model, name).parameters() if p.grad is not None]
        assert sum(float(g.abs().sum()) for g in grads) > 0, name


@pytest.mark.parametrize("kind", PROJECTORS)
def test_every_projector_gives_a_model_that_writes(kind):
    model = tiny.vlm(projector=kind)
    assert model.see(tiny.scan()).shape == (1, model.num_visual_tokens, 32)
    assert isinstance(model.report(tiny.scan(), max_new_tokens=3), str)


def test_saved_and_loaded_three_ways(model, tmp_path):
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    expected = model.report(tiny.scan(), max_new_tokens=8)
    loaded = hub.load(tmp_path)
    assert loaded.report(tiny.scan(), max_new_tokens=8) == expected
    assert loaded.fingerprint() == model.fingerprint()
    for auto in (AutoModel, AutoModelForCausalLM):
        again = auto.from_pretrained(tmp_path).eval()
        again.processor = AutoProcessor.from_pretrained(tmp_path)
        assert again.report(tiny.scan(), max_new_tokens=8) == expected


def test_questions_that_cannot_be_asked(model):
    scan = tiny.scan()
    with pytest.raises(ValueError, match="question is empty"):
        model.ask(scan, "  ")
    with pytest.raises(ValueError, match="shorten the question"):
        model.ask(scan, "left " * 500)
    with pytest.raises(ValueError, match="shorten the question"):
        model.ask(scan, "left " * 500, ["a", "b"])
    with pytest.raises(ValueError, match="between 2 and 26"):
        model.ask(scan, "Which?", ["only one"])
    with pytest.raises(ValueError, match="2 scans with 3 questions"):
        model.ask([scan, scan], QUESTIONS)


def test_a_prompt_without_enough_placeholders_is_refused(model):
    with pytest.raises(ValueError, match="image placeholders"):
        model(input_ids=torch.tensor([[1, 5, 6]]), visual_tokens=torch.zeros(1, 8, 32))


def test_lora_trains_adapters_only(model):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        tiny.vlm(), LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj")
    )
    batch = model.processor.training_batch([[("Which side?", "left")], [("Where?", "right")]])
    adapted(**batch, volumes=torch.rand(2, 1, *tiny.SIZE)).loss.backward()
    learned = [n for n, p in adapted.named_parameters() if p.requires_grad]
    assert learned and all("lora" in name for name in learned)


def test_weights_of_labels_make_answers_count_alike(model):
    batch = model.processor.training_batch(
        [[("What?", "left effusion on the left")], [("Where?", "no")]]
    )
    inputs = {
        "input_ids": batch["input_ids"],
        "visual_tokens": model.see([tiny.scan(0), tiny.scan(1)]),
    }
    labels = batch["labels"]
    counts = (labels != IGNORED).float()
    with torch.no_grad():
        plain = model(**inputs, labels=labels).loss
        even = model(**inputs, labels=labels, loss_weights=7 * counts).loss
        by_answer = counts / counts.sum(1, keepdim=True)
        answers = model(**inputs, labels=labels, loss_weights=by_answer).loss
        each = [
            model(input_ids=ids[None], visual_tokens=visual[None], labels=row[None]).loss
            for ids, visual, row in zip(*inputs.values(), labels, strict=True)
        ]
        part = model(**inputs, labels=labels, loss_weights=by_answer, num_items_in_batch=100).loss
    assert float(even) == pytest.approx(float(plain), rel=1e-5)
    assert float(answers) == pytest.approx(float(sum(each)) / 2, rel=1e-5)
    assert float(part) == pytest.approx(float(answers) * 2 / 100, rel=1e-5)  # of two answers
