"""What is written about a study: report, caption, questions; and how text is read back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from med3dvlm.data.phantoms.anatomy import PHASES, PLANES
from med3dvlm.data.phantoms.findings import FINDINGS, ORGANS, Finding

# Findings in the order in which a radiologist goes through them.
NEGATION = re.compile(r"\b(no|not|without|free of|unremarkable|normal)\b", re.IGNORECASE)
LETTERS = "ABCD"

TECHNIQUE = (
    "{Plane} CT of the chest and abdomen, {phase} phase.",
    "CT of chest and abdomen in the {plane} plane, {phase} phase.",
    "{Phase} phase CT of the chest and abdomen, {plane} plane.",
    "{Plane} CT, {phase} phase, chest and abdomen.",
)
NORMAL_IMPRESSION = (
    "Normal CT of the chest and abdomen.",
    "No abnormality.",
    "Normal study.",
    "No acute findings.",
)


@dataclass(frozen=True)
class Placed:
    """A finding of one study with its attributes."""

    name: str
    attributes: dict[str, Any]

    @property
    def finding(self) -> Finding:
        return FINDINGS[self.name]

    @property
    def size_mm(self) -> float | None:
        return self.attributes.get("size")

    def say(self, template: str) -> str:
        """Fill a template; a capitalised key gives a capitalised value."""
        values = {k: str(v) for k, v in self.attributes.items() if k != "u"}
        values |= {k.capitalize(): v.capitalize() for k, v in values.items()}
        return template.format(**values)


@dataclass(frozen=True)
class Question:
    """A question with its answer, as M3D-VQA has them.

    type: 1 plane, 2 phase, 3 organ, 4 abnormality, 5 location. kind: open, closed, yes_no.
    """

    text: str
    answer: str
    kind: str
    type: int
    choices: tuple[str, ...] | None = None
    answer_choice: str | None = None
    finding: str | None = None


def write_report(
    random: np.random.Generator, plane: str, phase: str, placed: tuple[Placed, ...]
) -> str:
    """Technique, findings in radiologists' order with the negatives, impression last."""
    there = {p.name: p for p in placed}
    sentences = []
    for name, finding in FINDINGS.items():
        if name in there:
            sentences.append(there[name].say(_pick(random, finding.present)))
        elif random.random() < 0.45:  # radiologists do not rule out everything
            sentences.append(_pick(random, finding.absent))
    if placed:
        phrases = [p.say(_pick(random, p.finding.impression)) for p in placed]
        impression = " ".join(f"{phrase[0].upper()}{phrase[1:]}." for phrase in phrases)
    else:
        impression = _pick(random, NORMAL_IMPRESSION)
    technique = _technique(random, plane, phase)
    return f"Technique: {technique} Findings: {' '.join(sentences)} Impression: {impression}"


def write_caption(
    random: np.random.Generator, plane: str, phase: str, placed: tuple[Placed, ...]
) -> str:
    """One line: what is there, plane and phase; no negatives."""
    phrases = [p.say(_pick(random, p.finding.impression)) for p in placed] or ["no abnormality"]
    return f"{plane} CT, {phase} phase: {', '.join(phrases)}."


def _technique(random: np.random.Generator, plane: str, phase: str) -> str:
    return _pick(random, TECHNIQUE).format(
        plane=plane, Plane=plane.capitalize(), phase=phase, Phase=phase.capitalize()
    )


def _pick(random: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(random.integers(len(options)))]


# --- questions --------------------------------------------------------------------------------

PLANE_QUESTIONS = (
    "In which plane was this scan acquired?",
    "What is the plane of this image?",
    "Which acquisition plane is shown?",
    "What plane was used for this CT?",
)
PHASE_QUESTIONS = (
    "In which contrast phase was this scan acquired?",
    "What is the phase of this CT?",
    "Which contrast phase is shown?",
    "What contrast phase was used?",
)
AFFECTED_QUESTIONS = (
    "Which organ is abnormal?",
    "Which of these organs is affected?",
    "In which organ is there an abnormality?",
    "Which organ shows an abnormal finding?",
)
ORGANS_QUESTIONS = (
    "Which organs are abnormal?",
    "Name the abnormal organs.",
    "List the organs with abnormal findings.",
    "What organs are affected?",
)
ABNORMALITY_QUESTIONS = (
    "Which abnormality is present?",
    "Which of these findings is seen?",
    "What is the abnormality in this scan?",
    "Which finding does this scan show?",
)
ABNORMALITIES_QUESTIONS = (
    "What abnormalities are present?",
    "Name the abnormal findings.",
    "What are the findings of this scan?",
    "List the abnormalities.",
)
YES_NO_QUESTIONS = (
    "Is there {finding}?",
    "Does this scan show {finding}?",
    "Is {finding} present?",
    "Can {finding} be seen?",
)
WHERE_QUESTIONS = (
    "Where is the {finding}?",
    "What is the location of the {finding}?",
    "In which location is the {finding} seen?",
    "Which site does the {finding} affect?",
)
SIZE_QUESTIONS = (
    "How large is the {finding}?",
    "What is the size of the {finding}?",
    "How big is the {finding}?",
    "What does the {finding} measure?",
)


def write_questions(
    random: np.random.Generator, plane: str, phase: str, placed: tuple[Placed, ...]
) -> list[Question]:
    """Questions of all five types, with answers that follow from the truth."""
    questions = [
        _closed(random, PLANE_QUESTIONS, plane, [*PLANES, "oblique"], 1),
        Question(_pick(random, PLANE_QUESTIONS), plane, "open", 1),
        _closed(random, PHASE_QUESTIONS, phase, list(PHASES), 2),
        Question(_pick(random, PHASE_QUESTIONS), phase, "open", 2),
    ]
    affected = list(dict.fromkeys(p.finding.organ for p in placed))
    healthy = [organ for organ in ORGANS if organ not in affected]
    right = _choose(random, affected) if affected else "none"
    wrong = [str(o) for o in random.choice(healthy, 3, replace=False)]
    if affected and random.random() < 0.3:
        wrong[0] = "none"
    questions.append(_closed(random, AFFECTED_QUESTIONS, right, [right, *wrong], 3))
    listed = _listing(affected) if affected else "none"
    questions.append(Question(_pick(random, ORGANS_QUESTIONS), listed, "open", 3))
    questions += _abnormality_questions(random, placed)
    questions += _location_questions(random, placed)
    return questions


def _abnormality_questions(
    random: np.random.Generator, placed: tuple[Placed, ...]
) -> list[Question]:
    present = [p.name for p in placed]
    absent = [name for name in FINDINGS if name not in present]
    right = _choose(random, present).lower() if present else "no abnormality"
    wrong = [str(name).lower() for name in random.choice(absent, 3, replace=False)]
    if present and random.random() < 0.3:
        wrong[0] = "no abnormality"
    listed = _listing([name.lower() for name in present]) if present else "none"
    questions = [
        _closed(random, ABNORMALITY_QUESTIONS, right, [right, *wrong], 4),
        Question(_pick(random, ABNORMALITIES_QUESTIONS), listed, "open", 4),
    ]
    # As many "no" as "yes": one of each for every finding that is there.
    for name in present or [None]:
        asked = [("no", _choose(random, absent))]
        if name is not None:
            asked.append(("yes", name))
        for answer, about in asked:
            text = _pick(random, YES_NO_QUESTIONS).format(finding=about.lower())
            questions.append(Question(text, answer, "yes_no", 4, finding=about))
            if name is None:
                break
    return questions


def _location_questions(random: np.random.Generator, placed: tuple[Placed, ...]) -> list[Question]:
    questions = []
    for p in placed:
        noun = p.name.lower()
        key = next((k for k in ("side", "lobe") if k in p.attributes), None)
        if key is not None:
            values = list(p.finding.attributes[key])
            spare = ["central", "anterior", "bilateral", "midline"]
            options = values + [word for word in spare if word not in values]
            right = p.attributes[key]
            others = [value for value in options if value != right]
            plausible = [value for value in others if value in values]
            if len(plausible) > 3:
                wrong = [str(v) for v in random.choice(plausible, 3, replace=False)]
            else:
                wrong = others[:3]
            texts = tuple(text.format(finding=noun) for text in WHERE_QUESTIONS)
            questions.append(_closed(random, texts, right, [right, *wrong], 5, p.name))
            questions.append(Question(_pick(random, texts), right, "open", 5, finding=p.name))
        if p.size_mm is not None:
            texts = tuple(text.format(finding=noun) for text in SIZE_QUESTIONS)
            size = f"{p.attributes['size']} mm"
            questions.append(Question(_pick(random, texts), size, "open", 5, finding=p.name))
    return questions


def _closed(
    random: np.random.Generator,
    texts: tuple[str, ...],
    right: str,
    options: list[str],
    kind: int,
    finding: str | None = None,
) -> Question:
    order = random.permutation(4)
    choices = tuple(options[i] for i in order)
    letter = LETTERS[choices.index(right)]
    return Question(_pick(random, texts), right, "closed", kind, choices, letter, finding)


def _choose(random: np.random.Generator, options: list[str]) -> str:
    return options[int(random.integers(len(options)))]


def _listing(words: list[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


# --- reading text back ------------------------------------------------------------------------


def find_findings(text: str) -> dict[str, bool]:
    """Which findings a report asserts: found by term, sentence by sentence, minus the negated."""
    found = dict.fromkeys(FINDINGS, False)
    for sentence in re.split(r"(?<=[.!?])\s+|Findings:|Impression:", text):
        if not sentence or NEGATION.search(sentence):
            continue
        for name, finding in FINDINGS.items():
            if finding.recognised(sentence):
                found[name] = True
    return found
