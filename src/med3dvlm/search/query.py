"""What is asked of an index: the words, read for what they deny, and conditions on columns."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from med3dvlm.data.assertions import Term, part_text, read_assertions
from med3dvlm.data.phantoms import PHANTOM_TERMS
from med3dvlm.evaluate.findings import CT_RATE_TERMS
from med3dvlm.search.study import SearchIndexError

TERMS: dict[str, Term] = {**PHANTOM_TERMS, **CT_RATE_TERMS}
"""The findings that reports and queries are read for."""

OPERATORS = ("!=", ">=", "<=", "=", ">", "<", "~")
CONDITION = re.compile(rf"\s*(?P<column>[^=!<>~]+?)\s*(?P<op>{'|'.join(OPERATORS)})(?P<value>.*)")
OWN_COLUMNS = ("id", "path", "report")
FINDING = "finding"

# In a query a comma begins something new, unless it is one of a list: "without A, B or C".
LIST_AHEAD = r"(?!(?:(?!\bwith\b|\bwithout\b|\bno\b)[^.;])*?\b(?:or|nor)\b)"
NEW_PART = re.compile(rf",{LIST_AHEAD}|\b(?:and |but )?with\b", re.IGNORECASE)


@dataclass(frozen=True)
class Condition:
    """What a column must hold.

    Attributes:
        op: one of `OPERATORS`; "~" is: contains, whatever the case.
        number: the value as a number where the comparison is one of numbers, else None.
    """

    column: str
    op: str
    value: str
    number: float | None = None


def read_conditions(
    texts: Iterable[str], known: Sequence[str], findings: Mapping[str, Term] = TERMS
) -> list[Condition]:
    """`column=value`, `!=`, `<`, `<=`, `>`, `>=` and `column~part`, read and checked.

    `finding=NAME` asks for what the report asserts. Order is that of numbers where the value is
    one, and of text elsewhere, which is right for dates as in 2026-03-01.

    Args:
        known: the columns that there are.

    Raises:
        SearchIndexError: for another form, or an unknown column or finding, with the known ones.
    """
    conditions = []
    for text in texts:
        match = CONDITION.fullmatch(text)
        if not match:
            raise SearchIndexError(
                f"the condition {text!r} is not of the form column=value; !=, <, <=, >, >= and ~ "
                "(contains) are possible too."
            )
        column, op, value = match["column"], match["op"], match["value"].strip()
        if column == FINDING:
            value = _finding(value, op, findings)
        elif column not in (*OWN_COLUMNS, *known):
            columns = ", ".join(sorted({*known, *OWN_COLUMNS, FINDING}))
            raise SearchIndexError(f"no study has a column {column!r}: known are {columns}.")
        number = _number(value) if op in (">=", "<=", ">", "<") else None
        conditions.append(Condition(column, op, value, number))
    return conditions


def _finding(name: str, op: str, findings: Mapping[str, Term]) -> str:
    found = next((f for f in findings if f.lower() == name.lower()), None)
    if found is None or op not in ("=", "!="):
        raise SearchIndexError(
            f"the condition finding{op}{name} cannot be met: use = or != with one of "
            f"{', '.join(sorted(findings))}."
        )
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Words:
    """A query's text, read.

    Attributes:
        text: as it was asked.
        wanted: what shall be there, without what is denied; "" where all is denied.
        unwanted: the phrases that are denied.
        excluded: of these, the findings (keys of `TERMS`) that a report must not assert.
    """

    text: str
    wanted: str
    unwanted: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()


def read_words(text: str) -> Words:
    """Part what a query wants from what it denies, by the rules that reports are read with.

    "pleural effusion without consolidation or nodule, portal venous" wants "pleural effusion,
    portal venous" and excludes Consolidation and Lung nodule. A denied phrase that says more than
    a finding's name ("no left effusion") excludes nothing, but still turns the embedding.

    Raises:
        SearchIndexError: for an empty text.
    """
    if not text.strip():
        raise SearchIndexError("the text is empty: write what to look for.")
    wanted: list[str] = []
    unwanted: list[str] = []
    for part in NEW_PART.split(text):
        asserted, denied = part_text(part)
        wanted += asserted.split("\n") if asserted else []
        unwanted += denied
    if not unwanted:
        return Words(text, text)
    excluded = [name for phrase in unwanted for name in _named(phrase)]
    kept = ", ".join(wanted)
    return Words(text, kept, tuple(unwanted), tuple(dict.fromkeys(excluded)))


def _named(phrase: str) -> list[str]:
    """The findings that a phrase names and says no more of."""
    whole = [
        name
        for name, term in TERMS.items()
        if re.fullmatch(term.mention, phrase, re.IGNORECASE) or name.lower() == phrase.lower()
    ]
    if whole:
        return whole
    words = [_singular(word) for word in phrase.lower().split()]
    names = {name: [_singular(word) for word in name.lower().split()] for name in TERMS}
    return [n for n, parts in names.items() if words[-1] == parts[-1] and set(words) <= set(parts)]


def _singular(word: str) -> str:
    return word.removesuffix("s")


def asserted_findings(report: str) -> list[str]:
    """The findings that a report says are there, in the order of `TERMS`."""
    said = read_assertions(report, TERMS)
    return [name for name, status in said.items() if status == "present"]
