"""A report as it leaves: what it says, who drafted it, who signed it; independent of any format."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from med3dvlm.sentences import SECTIONS, split_report

ORDER = ("", *SECTIONS, "Addendum")
UNSIGNED = "Unsigned draft: no person has checked it."


class ExportError(ValueError):
    """What cannot be written in the form that was asked for: why, and what can be done."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What drafted a report.

    Attributes:
        name: as it was loaded.
        weights, preparation: their fingerprints.
    """

    name: str
    weights: str
    preparation: str

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Model:
        """From what :func:`med3dvlm.notice.provenance` tells of a model."""
        return cls(name=facts["model"], weights=facts["weights"], preparation=facts["preparation"])

    def __str__(self) -> str:
        preparation = f", preparation {self.preparation}" if self.preparation else ""
        return f"model {self.name}, weights {self.weights}{preparation}"


@dataclass(frozen=True, kw_only=True)
class Signature:
    """Who answers for a report.

    Attributes:
        authenticated: whether the service knew the person by an account; a name that was only
            typed verifies nothing.
        signed: with its zone.
        organization: where the person works; that of the images where not given.
    """

    name: str
    signed: datetime
    authenticated: bool
    organization: str = ""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("a signature needs the name of a person.")
        if self.signed.tzinfo is None:
            raise ValueError("the time of a signature needs its zone.")

    def __str__(self) -> str:
        how = "" if self.authenticated else " (name as typed, not authenticated)"
        return f"{self.name}, {self.signed.astimezone(UTC):%Y-%m-%d %H:%M} UTC{how}"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A sentence of a report.

    Attributes:
        section: "Findings", "Impression", … as :data:`med3dvlm.sentences.SECTIONS` has them,
            "Addendum", or "".
        confidence: the calibrated one of the model, 0 to 1; only of its own words.
        peak_mm: (x, y, z) LPS, where the evidence for it is strongest.
    """

    text: str
    section: str = ""
    confidence: float | None = None
    peak_mm: tuple[float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Document:
    """An object of a report that has left: how another refers to it."""

    study_uid: str
    series_uid: str
    sop_class_uid: str
    sop_instance_uid: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report, drafted or signed.

    Attributes:
        created: with its zone; when it was signed, or else drafted.
        notice: what a reader of it has to know about the model.
        model: None where a person wrote all of it.
        language: RFC 5646 tag of the sentences.
        predecessor: the earlier Structured Report whose content this one has, with more.
    """

    lines: tuple[Line, ...]
    created: datetime
    notice: str
    model: Model | None = None
    signature: Signature | None = None
    language: str = "en"
    # not in its repr, so that a report without one keeps the UIDs that it always had
    predecessor: Document | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not any(line.text.strip() for line in self.lines):
            raise ExportError("the report is empty: there is nothing to export.")
        if self.created.tzinfo is None:
            raise ValueError("the time of a report needs its zone.")

    @classmethod
    def from_text(cls, text: str, **facts: object) -> Report:
        """A report from its text, cut into sections and sentences; `facts` are the other fields."""
        lines = tuple(Line(text=s.text, section=s.section) for s in split_report(text))
        return cls(lines=lines, **facts)

    @property
    def verified(self) -> bool:
        """Whether a person who was authenticated answers for it."""
        return self.signature is not None and self.signature.authenticated

    @property
    def amended(self) -> bool:
        return any(line.section == "Addendum" for line in self.lines)

    def sections(self) -> Iterator[tuple[str, Sequence[Line]]]:
        """The sentences under each heading, in the order of :data:`ORDER`; none that is blank."""
        said = [line for line in self.lines if line.text.strip()]
        said.sort(key=lambda line: ORDER.index(line.section) if line.section in ORDER else 0)
        for section, lines in groupby(said, key=lambda line: line.section):
            yield section, list(lines)

    def section(self, *names: str) -> str:
        """The text of all sentences under these headings."""
        return " ".join(line.text for line in self.lines if line.section in names)

    def statement(self) -> str:
        """How the report came about: the model, the signature, what a reader has to know."""
        made = f"Drafted by {self.model}." if self.model else "Written by a person."
        signed = f"Signed: {self.signature}." if self.signature else UNSIGNED
        return f"{made} {signed} {self.notice}".strip()

    def text(self) -> str:
        """Plain text: a paragraph a section, the statement last."""
        parts = []
        for section, lines in self.sections():
            words = " ".join(line.text for line in lines)
            parts.append(f"{section}: {words}" if section else words)
        return clean("\n\n".join([*parts, self.statement()])) + "\n"


_FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(text: str) -> str:
    """Text without what DICOM, XML and PDF cannot hold: control characters, halves of surrogates.

    Line breaks stay, as "\\n"; tabs become blanks, anything else U+FFFD.
    """
    text = re.sub(r"\r\n?|\f|\x85|\u2028|\u2029", "\n", text).replace("\t", " ")
    return _FORBIDDEN.sub("\ufffd", text)


def one_line(text: str, length: int) -> str:
    """Clean text on one line, at most so many bytes of UTF-8, for names and descriptions.

    DICOM counts characters, but some archives count bytes. A backslash divides values there, so it
    becomes a slash.
    """
    words = " ".join(clean(text).replace("\\", "/").split())
    if len(words.encode()) <= length:
        return words
    return words.encode()[: length - 3].decode(errors="ignore") + "..."
