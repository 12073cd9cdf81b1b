"""The texts: they say the truth, can be read back exactly, and ask fair questions."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from med3dvlm.data.assertions import read_assertions
from med3dvlm.data.phantoms import (
    CONCEPTS,
    FINDINGS,
    ORGANS,
    PHANTOM_TERMS,
    PHASES,
    PLANES,
    concept_vector,
    describe,
    find_findings,
    language,
    make_study,
)


def truth_of(study) -> dict[str, bool]:
    return {name: study.truth.has(name) for name in FINDINGS}


def test_reports_and_captions_are_read_back_exactly(studies):
    for study in studies:
        assert find_findings(study.report) == truth_of(study), study.report
        assert find_findings(study.caption) == truth_of(study), study.caption


@pytest.mark.parametrize("name", FINDINGS)
def test_every_phrasing_is_recognised_as_its_own_finding_only(name):
    finding = FINDINGS[name]
    placed = finding.sample(np.random.default_rng(0))
    for phrase in (*finding.present, *finding.impression):
        found = find_findings(placed.say(phrase))
        assert [n for n, there in found.items() if there] == [name], phrase
    for phrase in finding.absent:
        read = read_assertions(phrase, PHANTOM_TERMS)
        assert [n for n, status in read.items() if status != "not mentioned"] == [name], phrase
        assert read[name] == "absent", phrase


@pytest.mark.parametrize("name", FINDINGS)
def test_there_are_four_phrasings_of_everything(name):
    finding = FINDINGS[name]
    assert len(set(finding.present)) >= 4
    assert len(set(finding.absent)) >= 4
    assert len(set(finding.impression)) >= 2


def test_there_are_four_wordings_of_every_question():
    wordings = [v for k, v in vars(language).items() if k.endswith("_QUESTIONS")]
    assert len(wordings) >= 10
    assert all(len(set(texts)) >= 4 for texts in wordings)


def test_negation_ends_with_its_clause():
    found = find_findings("No pleural effusion, but there is a lung nodule. The heart is enlarged.")
    assert [n for n, there in found.items() if there] == ["Lung nodule", "Cardiomegaly"]
    assert not any(find_findings("Spleen unremarkable; without ascites.").values())


def test_reports_have_their_parts_and_length(studies):
    for study in studies:
        parts = re.match(r"Technique: (.+) Findings: (.+) Impression: (.+)$", study.report)
        assert parts
        assert study.truth.plane in parts[1].lower()
        assert study.truth.phase in parts[1].lower()
        assert 60 <= len(study.report.split()) <= 115
        assert len(study.caption.split()) <= 48
        assert study.truth.plane in study.caption


def test_reports_state_every_attribute(studies):
    for study in studies:
        for p in study.truth.findings:
            for value in p.attributes.values():
                assert str(value) in study.report.lower()
                assert str(value) in study.caption.lower()


def test_every_study_is_asked_about_every_type(studies):
    for study in studies:
        asked = {(q.type, q.kind) for q in study.questions}
        assert asked >= {(kind, form) for kind in range(1, 6) for form in ("open", "closed")}
        assert len(study.report) > 0


def true_of(study, question) -> set[str]:
    """The answers that the truth allows to a closed question."""
    truth = study.truth
    if question.type == 1:
        return {truth.plane}
    if question.type == 2:
        return {truth.phase}
    if question.finding is None:
        if not truth.findings:
            return {"none"}
        if question.type == 3:
            return {FINDINGS[p.name].organ for p in truth.findings}
        return {p.name.lower() for p in truth.findings}
    (placed,) = (p for p in truth.findings if p.name == question.finding)
    if question.type == 4:
        return {f"{placed.attributes['size']} mm"}
    key = FINDINGS[placed.name].location
    if key is None:
        return {FINDINGS[placed.name].organ}
    lobe = " lobe" if placed.name == "Liver lesion" else ""
    return {f"{placed.attributes[key]}{lobe}"}


def test_closed_questions_have_one_true_choice(studies):
    for study in studies:
        for question in study.questions:
            if question.kind != "closed":
                continue
            assert question.choices is not None
            assert len(set(question.choices)) == 4
            allowed = true_of(study, question)
            assert [c for c in question.choices if c in allowed] == [question.answer]
            assert question.choices["ABCD".index(question.answer_choice)] == question.answer


def test_yes_no_questions_are_true_and_balanced(studies):
    answers, by_finding = Counter(), {name: Counter() for name in FINDINGS}
    for study in studies:
        for question in study.questions:
            if question.kind == "yes_no":
                assert question.answer == ("yes" if study.truth.has(question.finding) else "no")
                answers[question.answer] += 1
                by_finding[question.finding][question.answer] += 1
    assert abs(answers["yes"] / answers.total() - 0.5) < 0.02
    for name, counted in by_finding.items():
        assert 0.33 < counted["yes"] / counted.total() < 0.67, (name, counted)


def test_the_right_choice_stands_everywhere_as_often(studies):
    letters = Counter(q.answer_choice for s in studies for q in s.questions if q.kind == "closed")
    assert set(letters) == set("ABCD")
    assert max(letters.values()) < 1.15 * min(letters.values())


def test_the_choice_none_does_not_give_itself_away(studies):
    offered = [
        q.answer == "none"
        for s in studies
        for q in s.questions
        if q.type == 3 and q.kind == "closed" and "none" in q.choices
    ]
    assert 0.25 < np.mean(offered) < 0.75


def test_sizes_are_asked_for_in_mm(studies):
    sizes = [
        q.answer
        for s in studies
        for q in s.questions
        if q.text.startswith(("How large", "How big")) and q.kind == "open"
    ]
    assert sizes
    assert all(re.fullmatch(r"\d+ mm", size) for size in sizes)


def test_concepts_follow_the_truth(studies):
    assert len(set(CONCEPTS)) == len(CONCEPTS)
    assert {f"plane={p}" for p in PLANES} | {f"phase={p}" for p in PHASES} <= set(CONCEPTS)
    for study in studies[:50]:
        vector = concept_vector(study)
        assert vector.shape == (len(CONCEPTS),)
        assert vector.dtype == np.float32
        true = {name for name, there in zip(CONCEPTS, vector, strict=True) if there}
        assert true == {name for name, there in study.concepts.items() if there}
        assert {n for n in FINDINGS if n in true} == {p.name for p in study.truth.findings}
        for p in study.truth.findings:
            for key in FINDINGS[p.name].attributes:
                assert f"{p.name}/{key}={p.attributes[key]}" in true


def test_findings_are_common_mixed_and_in_order(studies):
    counts = describe(400, split="test")
    assert all(0.10 < share < 0.28 for share in counts["prevalence"].values())
    assert counts["distinct_combinations"] > 250
    assert counts["findings_per_study"].keys() == set(range(7))
    assert counts["vocabulary"] < 700
    order = list(FINDINGS)
    for study in studies:
        names = [p.name for p in study.truth.findings]
        assert names == sorted(names, key=order.index)


def test_chosen_findings_are_all_there():
    study = make_study(0, findings=["Ascites", "Lung nodule"])
    assert [p.name for p in study.truth.findings] == ["Lung nodule", "Ascites"]
    assert set(ORGANS) >= {"lung", "peritoneum"}
