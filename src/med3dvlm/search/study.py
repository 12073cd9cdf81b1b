"""Studies as an index holds them, and what a search finds."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor


class SearchIndexError(ValueError):
    """An index that cannot be used, or asked so, in one sentence with the remedy."""


class Embedder(Protocol):
    """What an index needs of a model; :class:`VolumeTextDualEncoder` has it."""

    label: str
    preparation: Any
    reads_text: bool

    def fingerprint(self) -> str: ...

    def embed_volumes(self, volumes: Tensor) -> np.ndarray: ...

    def embed_texts(self, texts: list[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Study:
    """One indexed study.

    Attributes:
        id: for people.
        path: what `read_scan` takes, or STORE#ID for a study of a prepared store; unique.
        sha256: of the content that was embedded.
        metadata: plain values.
    """

    id: str
    path: str
    sha256: str
    report: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A study with its embeddings: a row of the database.

    Attributes:
        vector: (dim,) float32, length 1, of the scan.
        report_vector: the same of the report, None without one.
        asserted: what the report says is there, for the search by words.
        findings: those of `query.TERMS` that it asserts.
    """

    study: Study
    vector: np.ndarray
    report_vector: np.ndarray | None = None
    asserted: str = ""
    findings: Sequence[str] = ()

    def check(self) -> int:
        """A CRC-32 of all that was given, by which `verify` knows what has changed since."""
        study = self.study
        texts = [study.id, study.path, study.sha256, study.report, to_json(study.metadata)]
        texts += [self.asserted, *self.findings]
        value = zlib.crc32("\0".join(texts).encode("utf-8", "surrogatepass"))
        for vector in (self.vector, self.report_vector):
            if vector is not None:
                value = zlib.crc32(np.ascontiguousarray(vector, "<f4").tobytes(), value)
        return value


@dataclass(frozen=True)
class Hit:
    """One result.

    Attributes:
        score: what the hits are ordered by; without words, the similarity.
        similarity: cosine between the query's embedding and the scan's.
        id, path, report, metadata: see :class:`Study`.
    """

    rank: int
    score: float
    similarity: float
    id: str
    path: str
    report: str
    metadata: Mapping[str, Any]


def to_json(metadata: Mapping[str, Any]) -> str:
    return json.dumps(metadata, ensure_ascii=False, sort_keys=True)


def as_text(value: Any) -> str:
    """A value of the metadata as conditions see it: "true", "3", "arterial", "[64, 128]"."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
