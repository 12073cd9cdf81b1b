"""What can be asked about a volume: a model, or a control that has not looked at it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from med3dvlm.models import Med3DVLM
from med3dvlm.scan import Preparation

SHORT_ANSWER = 128  # tokens


class Answerer(Protocol):
    """Something that answers questions about a volume and drafts its report.

    Attributes:
        label: its name in the results.
        preparation: of the volumes it looks at; None for one that looks at none.
    """

    label: str

    @property
    def preparation(self) -> Preparation | None: ...

    def fingerprint(self) -> str:
        """What tells it from others of the same name."""
        ...

    def see(self, volumes: Tensor) -> Tensor:
        """(n, 1, D, H, W) prepared volumes -> (n, …), all that it keeps of them."""
        ...

    def choose(
        self, seen: Tensor, questions: Sequence[str], choices: Sequence[Sequence[str]]
    ) -> list[int]:
        """The number of the choice that it takes for each question; `seen` is (n, …)."""
        ...

    def says_yes(self, seen: Tensor, questions: Sequence[str]) -> list[bool]:
        """Whether "yes" is likelier than "no" for each question; `seen` is (n, …)."""
        ...

    def write(
        self, seen: Tensor, questions: Sequence[str], choices: Sequence[Sequence[str]] | None = None
    ) -> list[str]:
        """An answer in words to each question, with its choices where given; `seen` is (n, …)."""
        ...

    def report(self, seen: Tensor) -> list[str]:
        """A draft report for each row of `seen`."""
        ...


class LanguageModel:
    """A Med3DVLM; what it keeps of a volume are its visual tokens (n, N, width), on the CPU."""

    def __init__(self, model: Med3DVLM):
        self.model, self.label = model, model.label

    @property
    def preparation(self) -> Preparation:
        return self.model.preparation

    def fingerprint(self) -> str:
        return self.model.fingerprint()

    @torch.inference_mode()
    def see(self, volumes: Tensor) -> Tensor:
        return self.model.get_visual_tokens(self.model._to_device(volumes)).cpu()

    def choose(
        self, seen: Tensor, questions: Sequence[str], choices: Sequence[Sequence[str]]
    ) -> list[int]:
        answers = self.model.choose(self._placed(seen), questions, choices)
        lettered = self.model.processor.lettered
        return [lettered(of).index(str(a)) for a, of in zip(answers, choices, strict=True)]

    def says_yes(self, seen: Tensor, questions: Sequence[str]) -> list[bool]:
        words = [["yes", "no"]] * len(questions)
        return [yes > no for yes, no in self.model.score(self._placed(seen), questions, words)]

    def write(
        self, seen: Tensor, questions: Sequence[str], choices: Sequence[Sequence[str]] | None = None
    ) -> list[str]:
        asked = list(questions)
        if choices is not None:
            form = self.model.processor.closed_question
            asked = [form(text, list(given)) for text, given in zip(asked, choices, strict=True)]
        answers = self.model.ask(self._placed(seen), asked, max_new_tokens=SHORT_ANSWER)
        return [str(answer) for answer in answers]

    def report(self, seen: Tensor) -> list[str]:
        drafts = self.model.report(self._placed(seen))
        return [str(draft) for draft in ([drafts] if len(seen) == 1 else drafts)]

    def _placed(self, seen: Tensor) -> Tensor:
        return seen.to(self.model.device)


class _Blind:
    """What the controls share: they look at nothing and draft no report."""

    label = ""
    preparation: Preparation | None = None

    def fingerprint(self) -> str:
        return "none"

    def see(self, volumes: Tensor) -> Tensor:
        return torch.zeros(len(volumes), 1)

    def report(self, seen: Tensor) -> list[str]:
        raise ValueError(f"control model {self.label!r} answers questions; it drafts no report.")


class AlwaysNo(_Blind):
    """Says "no", and takes the first choice of a closed question."""

    label = "always-no"

    def choose(
        self, seen: Tensor, questions: Sequence[str], choices: Sequence[Sequence[str]]
    ) -> list[int]:
        return [0] * len(questions)

    def says_yes(self, seen: Tensor, questions: Sequence[str]) -> list[bool]:
        return [False] * len(questions)

    def write(
        self, seen: Tensor, questions: Sequence[str], choices: Sequence[Sequence[str]] | None = None
    ) -> list[str]:
        return ["no"] * len(questions)


class QuestionOnly(_Blind):
    """Gives the answer that was right most often for the very words of a question.

    Args:
        questions: dicts of text, answer and kind, of studies that are not evaluated on.

    Raises:
        ValueError: without questions.
    """

    label = "question-only"

    def __init__(self, questions: Iterable[Mapping[str, Any]]):
        self.of_text: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self.of_kind: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for question in questions:
            self.of_text[question["kind"], question["text"]][question["answer"]] += 1
            self.of_kind[question["kind"]][question["answer"]] += 1
        if not self.of_kind:
            raise ValueError(
                "model question-only learns from the questions of the split train, and there are "
                "none: give a store with some in --reports."
            )

    def choose(
        self, seen: Tensor, questions: Sequence[str], choices: Sequence[Sequence[str]]
    ) -> list[int]:
        return [self._likeliest(*pair) for pair in zip(questions, choices, strict=True)]

    def _likeliest(self, question: str, choices: Sequence[str]) -> int:
        known = self.of_text.get(("closed", question), Counter())
        return max(range(len(choices)), key=lambda i: (known[choices[i]], -i))

    def says_yes(self, seen: Tensor, questions: Sequence[str]) -> list[bool]:
        return [self._commonest("yes_no", question) == "yes" for question in questions]

    def write(
        self, seen: Tensor, questions: Sequence[str], choices: Sequence[Sequence[str]] | None = None
    ) -> list[str]:
        if choices is None:
            return [self._commonest("open", text) for text in questions]
        chosen = self.choose(seen, questions, choices)
        return [f"{chr(65 + k)}. {c[k]}" for k, c in zip(chosen, choices, strict=True)]

    def _commonest(self, kind: str, question: str) -> str:
        """The first of the alphabet where two are as common, so that it does not hang on order."""
        known = self.of_text.get((kind, question)) or self.of_kind[kind]
        return min(known, key=lambda answer: (-known[answer], answer), default="no")
