"""Reports, answers and choices: together and remembered, against one by one and anew."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from med3dvlm.benchmark.measure import Form, compare, machine
from med3dvlm.data.phantoms import make_study
from med3dvlm.evaluate.tables import Results, Row
from med3dvlm.hub import load
from med3dvlm.models import Med3DVLM
from med3dvlm.models.decoding import score, score_plainly
from med3dvlm.models.med3dvlm import cache_argument
from med3dvlm.models.quantized import quantize_linear_layers

SCANS, QUESTIONS, REPORT_TOKENS, ANSWER_TOKENS = 8, 10, 256, 128
CONTEXT = 300  # tokens before the one that is timed: visual tokens, a question, half a report


def benchmark_generate(*, model: str = "demo", runs: int = 5) -> Results:
    """What the language side costs on the CPU; every form writes the same words.

    Args:
        model: a Med3DVLM, by name or folder.
    """
    results = Results({**machine(), "model": model})

    def add(title: str, make: Any, ways: list[str], agree: Any) -> None:
        forms = [Form(way, make, {"model": model, "way": way}) for way in ways]
        rows = compare(forms, runs=runs, agree=agree, memory=False)
        results.add(title, rows, shares=False)

    add(f"Reports of {SCANS} scans, already seen", make_reports, list(REPORTS), same_words)
    add(f"{QUESTIONS} questions about one scan", make_questions, list(ASKED), same_words)
    add("A scan seen again", make_looks, ["anew", "remembered"], same_tokens)
    add(f"Closed questions of {SCANS} scans", make_choices, list(SCORED), same_choices)
    forms = [Form(way, make_token, {"way": way}, precision=way[:4]) for way in TOKENS]
    for rows_at_once in (1, 8):
        some = [
            Form(f.name, f.make, {**f.arguments, "rows": rows_at_once}, f.precision) for f in forms
        ]
        size = f"{CONTEXT} tokens of context, {rows_at_once} at a time"
        rows = compare(some, runs=3 * runs, memory=rows_at_once == 1)
        results.add(f"One token of a language model of 128 M weights, {size}", rows, shares=False)
    return results


# --- that the forms agree ---------------------------------------------------------------------


def same_words(plain: list[list[int]], other: list[list[int]]) -> Row:
    """How many tokens.

    Raises:
        ValueError: where one differs.
    """
    if plain != other:
        raise ValueError("two ways of writing gave different tokens.")
    return {"tokens": sum(map(len, plain))}


def same_tokens(plain: torch.Tensor, other: torch.Tensor) -> Row:
    if not torch.allclose(plain, other, rtol=1e-4, atol=1e-5):
        raise ValueError("a scan seen again gave other visual tokens.")
    return {}


def same_choices(plain: list[torch.Tensor], other: list[torch.Tensor]) -> Row:
    """How many questions, and the largest difference of a log-likelihood.

    Raises:
        ValueError: where another choice is the likeliest.
    """
    pairs = list(zip(plain, other, strict=True))
    if any(a.argmax() != b.argmax() for a, b in pairs):
        raise ValueError("two ways of scoring chose differently.")
    return {"questions": len(pairs), "error": max(float((a - b).abs().max()) for a, b in pairs)}


# --- reports and answers ----------------------------------------------------------------------


def _scans() -> list[Any]:
    return [make_study(index, split="test").scan() for index in range(SCANS)]


def _plainly(vlm: Med3DVLM, visual: torch.Tensor, asked: list[str], tokens: int) -> list[list[int]]:
    """By the library's generate, all rows until the last has ended."""
    prompts = vlm.processor.prompt_tokens(asked)
    written = vlm._generate(visual, prompts, max_new_tokens=tokens)
    return [row[: int(vlm._until_end(torch.tensor([row])).sum())] for row, _ in written]


def _ours(vlm: Med3DVLM, visual: torch.Tensor, asked: list[str], tokens: int) -> list[list[int]]:
    return [row for row, _ in vlm._write_tokens(visual, asked, max_new_tokens=tokens)]


def _one_by_one(
    write: Any, vlm: Med3DVLM, visual: torch.Tensor, asked: list[str], tokens: int
) -> list[list[int]]:
    return [write(vlm, visual[[i]], [text], tokens)[0] for i, text in enumerate(asked)]


REPORTS = {
    "one by one, transformers": partial(_one_by_one, _plainly),
    "one by one": partial(_one_by_one, _ours),
    "together, transformers": _plainly,
    "together": _ours,
}


def make_reports(model: str, way: str) -> Callable[[], list[list[int]]]:
    vlm = load(model, part="language", device="cpu")
    with torch.inference_mode():
        visual = vlm.see(_scans())
    asked = [vlm.config.report_prompt] * SCANS

    def run() -> list[list[int]]:
        vlm.prefixes.kept.clear()
        with torch.inference_mode():
            return REPORTS[way](vlm, visual, asked, REPORT_TOKENS)

    return run


def _questions() -> list[str]:
    every = (q.text for i in range(SCANS) for q in make_study(i, split="test").questions)
    return list(islice(dict.fromkeys(every), QUESTIONS))


ASKED = {
    "ten calls, transformers": (_plainly, True),
    "ten calls, the scan remembered": (_ours, False),
    "one call": None,
}


def make_questions(model: str, way: str) -> Callable[[], list[list[int]]]:
    vlm = load(model, part="language", device="cpu")
    scan, asked = make_study(0, split="test").scan(), _questions()

    def run() -> list[list[int]]:
        vlm.forget()
        with torch.inference_mode():
            if ASKED[way] is None:
                visual = vlm.see(scan).expand(len(asked), -1, -1)
                return _ours(vlm, visual, asked, ANSWER_TOKENS)
            write, anew = ASKED[way]
            written = []
            for text in asked:
                if anew:
                    vlm.forget()
                written += write(vlm, vlm.see(scan), [text], ANSWER_TOKENS)
            return written

    return run


def make_looks(model: str, way: str) -> Callable[[], torch.Tensor]:
    vlm = load(model, part="language", device="cpu")
    scan = make_study(0, split="test").scan()

    def run() -> torch.Tensor:
        if way == "anew":
            vlm.forget()
        return vlm.see(scan)

    return run


# --- choices ----------------------------------------------------------------------------------

SCORED = {"a row for each choice, one by one": score_plainly, "one pass": score}


def make_choices(model: str, way: str) -> Callable[[], list[torch.Tensor]]:
    vlm = load(model, part="language", device="cpu")
    words = vlm.processor
    with torch.inference_mode():
        seen = vlm.see(_scans())
    closed = [
        (index, question)
        for index in range(SCANS)
        for question in make_study(index, split="test").questions
        if question.choices
    ]
    visual = seen[[index for index, _ in closed]]
    prompts = words.prompt_tokens([words.closed_question(q.text, q.choices) for _, q in closed])
    targets = [words.target_tokens(words.lettered(q.choices)) for _, q in closed]

    def run() -> list[torch.Tensor]:
        vlm.prefixes.kept.clear()
        with torch.inference_mode():
            return SCORED[way](vlm, visual, prompts, targets)

    return run


# --- one token, by precision ------------------------------------------------------------------

TOKENS = ("fp32", "bf16", "fp32, 8-bit weights", "bf16, 8-bit weights")


def make_token(way: str, rows: int) -> Callable[[], torch.Tensor]:
    """The logits of one more token, of random weights: 12 layers of 768, 32,000 words."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    language_model = Qwen2ForCausalLM(config).eval()
    ids = torch.randint(0, config.vocab_size, (rows, CONTEXT))
    language_model.to(torch.bfloat16 if way.startswith("bf16") else torch.float32)
    if "8-bit" in way:
        quantize_linear_layers(language_model)
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        language_model(ids, **{cache_argument(Qwen2ForCausalLM): cache}, logits_to_keep=1)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            told = language_model(ids[:, :1], **{cache_argument(Qwen2ForCausalLM): cache})
            cache.crop(-1)
            return told.logits[:, -1].float()

    return run
