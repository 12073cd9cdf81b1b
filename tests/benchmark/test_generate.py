"""The forms that `benchmark generate` times write the same words; others are refused."""

from __future__ import annotations

import pytest
import torch

from med3dvlm.benchmark import generate


@pytest.fixture
def small(monkeypatch):
    for name, value in {"SCANS": 2, "QUESTIONS": 3, "REPORT_TOKENS": 6, "ANSWER_TOKENS": 4}.items():
        monkeypatch.setattr(generate, name, value)


@pytest.mark.parametrize("what", ["reports", "questions", "choices"])
def test_every_form_gives_the_same(small, what):
    make, ways, agree = {
        "reports": (generate.make_reports, generate.REPORTS, generate.same_words),
        "questions": (generate.make_questions, generate.ASKED, generate.same_words),
        "choices": (generate.make_choices, generate.SCORED, generate.same_choices),
    }[what]
    plain, *others = [make("demo", way)() for way in ways]
    for other in others:
        row = agree(plain, other)
    assert row.get("tokens", row.get("questions")) > 0
    if what == "choices":
        assert row["error"] < 1e-3
        with pytest.raises(ValueError, match="chose differently"):
            agree(plain, [-other for other in plain])
    else:
        with pytest.raises(ValueError, match="different tokens"):
            agree(plain, plain[:-1])


def test_a_token_by_eight_bits_is_close():
    whole, small = (generate.make_token(way, 1)() for way in ("fp32", "fp32, 8-bit weights"))
    assert float(torch.cosine_similarity(whole, small)) > 0.99
