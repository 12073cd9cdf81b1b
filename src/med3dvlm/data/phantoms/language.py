"""What is written about a study: report, caption, questions; and how text is read back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from med3dvlm.data.assertions import Term, read_assertions
from med3dvlm.data.phantoms.anatomy import PHASES, PLANES
from med3dvlm.data.phantoms.finding import SIZE_STEP_MM, PlacedFinding
from med3dvlm.data.phantoms.findings import FINDINGS, ORGANS

LETTERS = "ABCD"
NOTHING = "none"

TECHNIQUE = (
    "{Plane} CT of the chest and abdomen, {phase} phase.",
    "CT of the chest and abdomen in the {plane} plane, {phase} phase.",
    "{Phase} phase CT of the chest and abdomen, {plane} plane.",
    "{Plane} CT in the {phase} phase of the chest and abdomen.",
)
BONES = (
    "The bones are normal.",
    "No bone destruction.",
    "The bones are unremarkable.",
    "No fracture is seen.",
)
NORMAL_IMPRESSION = (
    "Normal CT of the chest and abdomen.",
    "No abnormality.",
    "Normal study.",
    "No abnormal finding.",
)


@dataclass(frozen=True)
class Question:
    """A question with its answer, as M3D-VQA has them.

    Attributes:
        kind: "open", "closed" (four choices) or "yes_no".
        type: 1 plane, 2 phase, 3 organ, 4 abnormality, 5 location.
        finding: the finding it asks about, where it asks about one.
    """

    text: str
    answer: str
    kind: str
    type: int
    choices: tuple[str, ...] | None = None
    answer_choice: str | None = None
    finding: str | None = None


def write_report(
    random: np.random.Generator, plane: str, phase: str, placed: Sequence[PlacedFinding]
) -> str:
    """Technique, findings in radiologists' order with negatives, impression last."""
    there = {p.name: p for p in placed}
    said = {name: p.say(_pick(random, FINDINGS[name].present)) for name, p in there.items()}
    phrases = [p.say(_pick(random, FINDINGS[p.name].impression)) for p in placed]
    impression = _as_sentences(phrases) if placed else _pick(random, NORMAL_IMPRESSION)
    technique = _technique(random, plane, phase)
    bones = _pick(random, BONES)
    # Radiologists rule out more where less is found: negatives fill up to a usual length.
    target = int(random.integers(62, 82))
    length = len(" ".join([technique, impression, bones, *said.values()]).split()) + 3
    for k in random.permutation(len(FINDINGS)):
        name = list(FINDINGS)[k]
        if name in there:
            continue
        if length >= target:
            break
        said[name] = _pick(random, FINDINGS[name].absent)
        length += len(said[name].split())
    sentences = [said[name] for name in FINDINGS if name in said]
    findings = " ".join([*sentences, bones])
    return f"Technique: {technique} Findings: {findings} Impression: {impression}"


def write_caption(
    random: np.random.Generator, plane: str, phase: str, placed: Sequence[PlacedFinding]
) -> str:
    """One line: plane, phase and what is there; no negatives."""
    phrases = [p.say(_pick(random, FINDINGS[p.name].impression)) for p in placed]
    return f"{plane} CT, {phase} phase: {', '.join(phrases or ['no abnormality'])}."


def _technique(random: np.random.Generator, plane: str, phase: str) -> str:
    return _pick(random, TECHNIQUE).format(
        plane=plane, Plane=plane.capitalize(), phase=phase, Phase=phase.capitalize()
    )


def _as_sentences(phrases: Sequence[str]) -> str:
    return " ".join(f"{phrase[0].upper()}{phrase[1:]}." for phrase in phrases)


def _pick(random: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(random.integers(len(options)))]


# --- questions --------------------------------------------------------------------------------

PLANE_QUESTIONS = (
    "In which plane was this scan acquired?",
    "What is the plane of this scan?",
    "Which acquisition plane is shown?",
    "What plane was used for this CT?",
)
PHASE_QUESTIONS = (
    "In which contrast phase was this scan acquired?",
    "What is the phase of this CT?",
    "Which contrast phase is shown?",
    "What contrast phase was used?",
)
ORGAN_QUESTIONS = (
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
    "{Is} there {finding}?",
    "Does this scan show {finding}?",
    "Can you see {finding}?",
    "Does the CT show {finding}?",
)
WHERE_QUESTIONS = (
    "Where {is} the {finding}?",
    "What is the location of the {finding}?",
    "In which location {is} the {finding}?",
    "Where can the {finding} be seen?",
)
SIDE_QUESTIONS = (
    "On which side is the {finding}?",
    "Which side does the {finding} affect?",
    *WHERE_QUESTIONS,
)
NOWHERE_QUESTIONS = (
    "Where is the abnormality?",
    "What is the location of the abnormality?",
    "In which location is the abnormality?",
    "Where can the abnormality be seen?",
)
SIZE_QUESTIONS = (
    "How large is the {finding}?",
    "What is the size of the {finding}?",
    "How big is the {finding}?",
    "What does the {finding} measure?",
)
DEGREE_QUESTIONS = (
    "What is the degree of the {finding}?",
    "What is the extent of the {finding}?",
    "How marked is the {finding}?",
    "How extensive is the {finding}?",
)


def write_questions(
    random: np.random.Generator, plane: str, phase: str, placed: Sequence[PlacedFinding]
) -> list[Question]:
    """Questions of all five types, open and closed, with answers that follow from the truth."""
    affected = list(dict.fromkeys(FINDINGS[p.name].organ for p in placed))
    healthy = [organ for organ in ORGANS if organ not in affected]
    present = [p.name.lower() for p in placed]
    absent = [name.lower() for name in FINDINGS if name.lower() not in present]
    return [
        _closed(random, PLANE_QUESTIONS, plane, [p for p in PLANES if p != plane], 1, "oblique"),
        Question(_pick(random, PLANE_QUESTIONS), plane, "open", 1),
        _closed(random, PHASE_QUESTIONS, phase, [p for p in PHASES if p != phase], 2),
        Question(_pick(random, PHASE_QUESTIONS), phase, "open", 2),
        *_one_and_all(random, ORGAN_QUESTIONS, ORGANS_QUESTIONS, affected, healthy, 3),
        *_one_and_all(random, ABNORMALITY_QUESTIONS, ABNORMALITIES_QUESTIONS, present, absent, 4),
        *_yes_no_questions(random, [p.name for p in placed]),
        *(q for p in placed for q in _attribute_questions(random, p)),
        *([] if placed else _nowhere(random)),
    ]


def _one_and_all(
    random: np.random.Generator,
    one: Sequence[str],
    every: Sequence[str],
    true: list[str],
    false: list[str],
    kind: int,
) -> list[Question]:
    """A closed question for one of what is there, an open one for all of it."""
    right = _pick(random, true) if true else NOTHING
    # "none" is a choice as often where it is wrong, so that it does not give itself away
    spare = NOTHING if true and random.random() < 0.1 else None
    closed = _closed(random, one, right, false, kind, spare)
    return [closed, Question(_pick(random, every), _listing(true), "open", kind)]


def _yes_no_questions(random: np.random.Generator, present: list[str]) -> list[Question]:
    """As many "no" as "yes", in the same wordings: one of each for every finding present."""
    absent = [name for name in FINDINGS if name not in present]
    others = [absent[k] for k in random.permutation(len(absent))[: len(present)]]
    asked = [(name, "yes") for name in present] + [(name, "no") for name in others]
    questions = []
    for k in random.permutation(len(asked)):
        name, answer = asked[k]
        questions.append(ask_whether(random, name, answer))
    return questions


def ask_whether(random: np.random.Generator, name: str, answer: str) -> Question:
    """Is there this finding? yes or no."""
    finding = FINDINGS[name]
    text = _pick(random, YES_NO_QUESTIONS)
    text = text.format(finding=finding.asked, Is="Are" if finding.plural else "Is")
    return Question(text, answer, "yes_no", 4, finding=name)


def ask_where(
    random: np.random.Generator, placed: PlacedFinding, elsewhere: PlacedFinding
) -> tuple[Question, Question]:
    """One closed question with the same choices about a finding and the same one moved."""
    finding = FINDINGS[placed.name]
    texts = _about(SIDE_QUESTIONS if finding.location == "side" else WHERE_QUESTIONS, placed)
    (here, others), (there, _) = _location(placed), _location(elsewhere)
    rest = [value for value in others if value != there]
    rest += ["midline"] if len(others) < 3 else []
    asked = _closed(random, texts, here, rest, 5, there, placed.name)
    letter = LETTERS[(asked.choices or ()).index(there)]
    return asked, replace(asked, answer=there, answer_choice=letter)


def _attribute_questions(random: np.random.Generator, placed: PlacedFinding) -> list[Question]:
    """Where a finding is; how large, how marked."""
    finding = FINDINGS[placed.name]
    right, wrong = _location(placed)
    texts = _about(SIDE_QUESTIONS if finding.location == "side" else WHERE_QUESTIONS, placed)
    spare = "midline" if len(wrong) < 3 else None
    questions = [
        _closed(random, texts, right, wrong, 5, spare, placed.name),
        Question(_pick(random, texts), right, "open", 5, finding=placed.name),
    ]
    if placed.size_mm is not None:
        size = int(placed.attributes["size"])
        texts, right = _about(SIZE_QUESTIONS, placed), f"{size} mm"
        wrong = [f"{other} mm" for other in _other_sizes(random, size)]
        questions.append(_closed(random, texts, right, wrong, 4, None, placed.name))
        questions.append(Question(_pick(random, texts), right, "open", 4, finding=placed.name))
    if "degree" in placed.attributes:
        texts = _about(DEGREE_QUESTIONS, placed)
        answer = placed.attributes["degree"]
        questions.append(Question(_pick(random, texts), answer, "open", 4, finding=placed.name))
    return questions


def _location(placed: PlacedFinding) -> tuple[str, list[str]]:
    """Where a finding is, and where such a finding might have been."""
    finding = FINDINGS[placed.name]
    key = finding.location
    if key is None:  # much of what lies elsewhere in the chest lies in the mediastinum, too
        return finding.organ, [o for o in ORGANS if o not in (finding.organ, "mediastinum")]
    suffix = " lobe" if key == "lobe" and finding.organ == "liver" else ""
    values = [f"{value}{suffix}" for value in finding.attributes[key]]
    if len(values) < 4:
        values += [f"caudate{suffix}"] if suffix else []
        values += [value for value in ("bilateral",) if value not in values]
    right = f"{placed.attributes[key]}{suffix}"
    return right, [value for value in values if value != right]


def _other_sizes(random: np.random.Generator, size: int) -> list[int]:
    """Three sizes that no one would mistake for it, smaller or larger."""
    step = max(SIZE_STEP_MM * 3, round(size / 3 / SIZE_STEP_MM) * SIZE_STEP_MM)
    rank = int(random.integers(4))  # where the true size stands among the four
    others = [size + step * (k - rank) for k in range(4) if k != rank]
    if others[0] <= 4:  # too small to be a finding: all larger instead
        others = [size + step * k for k in range(1, 4)]
    return others


def _nowhere(random: np.random.Generator) -> list[Question]:
    places = list(ORGANS)
    closed = _closed(random, NOWHERE_QUESTIONS, NOTHING, places, 5)
    return [closed, Question(_pick(random, NOWHERE_QUESTIONS), NOTHING, "open", 5)]


def _about(texts: Sequence[str], placed: PlacedFinding) -> tuple[str, ...]:
    finding = FINDINGS[placed.name]
    verb = "are" if finding.plural else "is"
    return tuple(text.format(finding=finding.noun, **{"is": verb}) for text in texts)


def _closed(
    random: np.random.Generator,
    texts: Sequence[str],
    right: str,
    wrong: Sequence[str],
    kind: int,
    spare: str | None = None,
    finding: str | None = None,
) -> Question:
    """Four choices in random order: the right one, `spare` where given, and some of `wrong`."""
    drawn = [wrong[k] for k in random.permutation(len(wrong))]
    options = [right, *([spare] if spare else []), *drawn][:4]
    choices = tuple(options[k] for k in random.permutation(4))
    letter = LETTERS[choices.index(right)]
    return Question(_pick(random, texts), right, "closed", kind, choices, letter, finding)


def _listing(words: Sequence[str]) -> str:
    """a; a and b; a, b and c; none."""
    if not words:
        return NOTHING
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


# --- reading text back ------------------------------------------------------------------------

# Some terms name the organ, not the finding: "not enlarged" then speaks of the finding.
PHANTOM_TERMS = {
    name: Term(finding.terms, normal=rf"(?:{finding.terms}) is not enlarged")
    for name, finding in FINDINGS.items()
}


def find_findings(text: str) -> dict[str, bool]:
    """Which findings a text asserts."""
    statuses = read_assertions(text, PHANTOM_TERMS)
    return {name: status == "present" for name, status in statuses.items()}


def is_true(sentence: str, placed: Sequence[PlacedFinding]) -> bool | None:
    """Whether what a sentence says of findings is so; None where it speaks of none.

    Checked are what is there and what is not, and the side or lobe of what is there. Sizes and
    degrees are not.
    """
    there, checks = {p.name: p for p in placed}, []
    for name, status in read_assertions(sentence, PHANTOM_TERMS).items():
        if status == "not mentioned":
            continue
        checks.append((status == "absent") != (name in there))
        key = FINDINGS[name].location
        if name in there and status != "absent" and key is not None:
            values = FINDINGS[name].attributes[key]
            named = [v for v in values if re.search(rf"\b{v}\b", sentence, re.IGNORECASE)]
            checks.append(not named or there[name].attributes[key] in named)
    return all(checks) if checks else None
