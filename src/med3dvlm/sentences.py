"""Reports cut into their sections and sentences, every sentence with its place in the text."""

from __future__ import annotations

import re
from dataclasses import dataclass

SECTIONS = ("Indication", "Technique", "Comparison", "Findings", "Impression", "Conclusion")
_NAMES = "|".join([*SECTIONS, *(name.upper() for name in SECTIONS)])
# at the start, after a line break or after a sentence: "no acute findings: ..." is no heading
HEADING = re.compile(rf"(?:^|\n|(?<=[.!?;]\s))\s*({_NAMES}):\s*")
END = re.compile(r"(?<=[.!?;])\s+|\n+")


@dataclass(frozen=True)
class Sentence:
    """One sentence of a report: `text[start:end]`, and the heading it stands under ("" if none)."""

    text: str
    start: int
    end: int
    section: str = ""


def split_report(text: str) -> list[Sentence]:
    """The sentences of a text in their order, without headings and the blanks between them."""
    sentences, section, begin = [], "", 0
    for heading in [*HEADING.finditer(text), None]:
        stop = heading.start() if heading else len(text)
        sentences += _sentences(text, begin, stop, section)
        if heading:
            section, begin = heading[1].capitalize(), heading.end()
    return sentences


def _sentences(text: str, begin: int, stop: int, section: str) -> list[Sentence]:
    found, start = [], begin
    for end in [*END.finditer(text, begin, stop), None]:
        part = text[start : end.start() if end else stop]
        left = start + len(part) - len(part.lstrip())
        words = part.strip()
        if words:
            found.append(Sentence(words, left, left + len(words), section))
        start = end.end() if end else stop
    return found
