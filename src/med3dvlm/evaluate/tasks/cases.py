"""The studies that a run is about: of a store, or generated; their volumes are read when asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from med3dvlm.data.assertions import Term
from med3dvlm.data.phantoms import (
    FINDINGS,
    PHANTOM_VERSION,
    is_true,
    make_study,
)
from med3dvlm.evaluate.findings import VOCABULARIES, extract_findings
from med3dvlm.scan import Preparation, prepare

if TYPE_CHECKING:
    from med3dvlm.data.store import Store

CAVEAT = "generated phantoms, the same generator as in training; no patients"
NO_GROUPS = ("report", "caption", "row", "source_sha256", "volume_sha256")  # one value a study


@dataclass(frozen=True)
class Cases:
    """Studies with their texts.

    Attributes:
        studies: a dict for each, with at least id, case, report, questions (dicts as in the
            store's manifest) and metadata.
        preparation: how the volumes were prepared.
        volume: (D, H, W) float32 of the study of some number, prepared.
        labels: what `truth` says of each study, "" or nothing where it has no labels.
        truth: (studies, labels) bool, or None.
        facts: where they come from, for the head of the results.
        judge: whether what a sentence says of the study of some number is so, None where it
            cannot be checked; by the labels where not given.
    """

    studies: Sequence[dict[str, Any]]
    preparation: Preparation
    volume: Callable[[int], np.ndarray]
    labels: Sequence[str] = ()
    truth: np.ndarray | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    judge: Callable[[int, str], bool | None] | None = None

    def __len__(self) -> int:
        return len(self.studies)

    @property
    def ids(self) -> list[str]:
        return [study["id"] for study in self.studies]

    @property
    def reports(self) -> list[str]:
        return [study["report"] or "" for study in self.studies]

    def patient(self, index: int) -> str:
        """Whose study it is: the case where the layout tells, else the study itself."""
        return self.studies[index].get("case") or self.studies[index]["id"]

    def groups(self) -> list[str]:
        """For each study its report, or its id where it has none: siblings share one."""
        return [study["report"] or f"\0{study['id']}" for study in self.studies]

    @cached_property
    def terms(self) -> Mapping[str, Term] | None:
        """How the labelled findings are named in reports; None where no vocabulary fits."""
        return next((t for t in VOCABULARIES.values() if set(t) <= set(self.labels)), None)

    def finding_matrix(self) -> np.ndarray:
        """(studies, findings) bool in the order of `terms`.

        Raises:
            ValueError: where the labels are of no known vocabulary.
        """
        if self.terms is None or self.truth is None:
            raise ValueError(
                "the studies have no labels of a known vocabulary (CT-RATE's 18 findings or the "
                "phantoms'), so findings cannot be scored."
            )
        places = {name: place for place, name in enumerate(self.labels)}
        return self.truth[:, [places[name] for name in self.terms]]

    def said(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, findings) bool: what each asserts, in the order of `terms`."""
        terms = self.terms or {}
        found = [extract_findings(text, terms) for text in texts]
        return np.array([[f[name] == "present" for name in terms] for f in found], dtype=bool)

    def is_true(self, index: int, sentence: str) -> bool | None:
        """Whether what a sentence says of a study's findings is so; None if it speaks of none."""
        if self.judge is not None:
            return self.judge(index, sentence)
        terms = self.terms or {}
        labels = dict(zip(terms, self.finding_matrix()[index], strict=True))
        statuses = extract_findings(sentence, terms).items()
        checks = [(s != "absent") == labels[name] for name, s in statuses if s != "not mentioned"]
        return all(checks) if checks else None

    def only(self, chosen: Sequence[int]) -> Cases:
        """Some of the studies."""
        kept = list(chosen)
        return Cases(
            [self.studies[i] for i in kept],
            self.preparation,
            lambda index: self.volume(kept[index]),
            self.labels,
            None if self.truth is None else self.truth[kept],
            {**self.facts, "studies": len(kept)},
            None if (judge := self.judge) is None else lambda i, text: judge(kept[i], text),
        )

    def with_reports(self) -> Cases:
        """Those that have one.

        Raises:
            ValueError: if none has.
        """
        chosen = [i for i, report in enumerate(self.reports) if report.strip()]
        if not chosen:
            raise ValueError("no study has a report, so there is nothing to compare with.")
        return self if len(chosen) == len(self) else self.only(chosen)

    def columns(self) -> list[str]:
        """What results can be split by: plain columns of the manifest, keys of the metadata."""
        plain = {
            key
            for study in self.studies
            for key, value in study.items()
            if isinstance(value, str | int | float | bool) and key not in NO_GROUPS
        }
        return sorted(plain | {key for study in self.studies for key in study["metadata"]})

    def column(self, name: str) -> list[str]:
        """Each study's value as text, "–" where it has none; the metadata's goes first.

        Raises:
            ValueError: for a column that no study has, naming the known ones.
        """
        if name not in self.columns():
            raise ValueError(
                f"column {name!r} is unknown; these studies have {', '.join(self.columns())}."
            )
        found = [study["metadata"].get(name, study.get(name)) for study in self.studies]
        return ["–" if value in (None, "") else str(value) for value in found]


def cases_of_store(
    store: Store, split: str, *, limit: int | None = None, leaks: bool = False
) -> Cases:
    """The studies of one split of a store, those that leak into training left out.

    Raises:
        ValueError: if there are none, naming the splits that there are.
    """
    chosen = store.in_split(split, leaks=leaks)
    held_back = len(store.in_split(split, leaks=True)) - len(chosen)
    chosen = [int(index) for index in chosen[:limit]]
    if not chosen:
        known = sorted({name for splits in store.table["splits"].to_pylist() for name in splits})
        raise ValueError(
            f"{store.location} has no study in split {split!r}"
            + (f" but the {held_back} held back (see --leaks)" if held_back else "")
            + f"; its splits are {', '.join(known) or 'none'}."
        )
    rows = store.table["labels"].to_pylist()
    labelled = bool(store.labels) and all(len(rows[i]) == len(store.labels) for i in chosen)
    return Cases(
        [store.study(index) for index in chosen],
        store.preparation,
        lambda index: store.volume(chosen[index]),
        store.labels if labelled else (),
        np.array([rows[i] for i in chosen], dtype=bool) if labelled else None,
        {
            "store": store.location,
            "split": split,
            "studies": len(chosen),
            "held back": "included" if leaks else held_back,
        },
    )


def cases_of_phantoms(
    count: int, preparation: Preparation, *, seed: int = 0, split: str = "test"
) -> Cases:
    """The first `count` phantoms of a split; voxels are made and prepared when they are read."""
    studies = [make_study(index, seed=seed, split=split) for index in range(count)]

    def volume(index: int) -> np.ndarray:
        array = prepare(studies[index].scan(), preparation)[0]
        studies[index].__dict__.pop("array", None)  # 4 MB each
        return array

    return Cases(
        [
            {
                "id": study.study_id,
                "case": study.study_id,
                "report": study.report,
                "questions": [asdict(question) for question in study.questions],
                "metadata": {"plane": study.truth.plane, "phase": study.truth.phase},
            }
            for study in studies
        ],
        preparation,
        volume,
        list(FINDINGS),
        np.array([[study.truth.has(name) for name in FINDINGS] for study in studies], dtype=bool),
        {"studies": count, "phantom version": PHANTOM_VERSION, "data": CAVEAT},
        lambda index, sentence: is_true(sentence, studies[index].truth.findings),
    )
