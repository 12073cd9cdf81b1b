"""Left and right: what a text or a label says of a scan that is mirrored.

A mirrored scan has its heart on the right, and yet "left" must mean the patient's left in it, or
a model learns that the words mean nothing. So whoever mirrors a scan changes its words as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

_PAIRS = (
    ("left", "right"),
    ("leftward", "rightward"),
    ("leftwards", "rightwards"),
    ("lul", "rul"),  # upper, middle and lower lobes, and what radiologists write for them
    ("lml", "rml"),
    ("lll", "rll"),
    ("lt", "rt"),
)
_OTHER = {word: other for pair in _PAIRS for word, other in (pair, pair[::-1])}
_WORDS = re.compile(rf"\b(?:{'|'.join(_OTHER)})\b", re.IGNORECASE)


def swap_sides(text: str) -> str:
    """The text with left and right exchanged; twice gives the text again.

    Words in lower case, with a capital, or in capitals are exchanged in the same form; those in
    mixed forms ("lEft") are left alone. A word that is no side ("left unchanged") is exchanged
    too: this is for training texts, not for reports that someone reads.
    """
    return _WORDS.sub(_exchange, text)


def _exchange(match: re.Match[str]) -> str:
    word = match[0]
    other = _OTHER[word.lower()]
    for form in (str.lower, str.capitalize, str.upper):
        if word == form(word):
            return form(other)
    return word


def mirrored_labels(labels: Sequence[str]) -> np.ndarray:
    """For each label the number of the one it becomes; -1 where there is no such label."""
    number = {label: k for k, label in enumerate(labels)}
    return np.array([number.get(swap_sides(label), -1) for label in labels], dtype=np.int64)
