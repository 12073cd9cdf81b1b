"""The layouts that can be prepared: how each is listed, read, and prepared by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from med3dvlm.data import ct_rate, m3d
from med3dvlm.data.phantoms import (
    CONCEPTS,
    FINDINGS,
    PHANTOM_VERSION,
    PhantomStudy,
    concept_vector,
    make_study,
)
from med3dvlm.data.sources import Source, find_scans
from med3dvlm.scan import PRESETS, Preparation, Scan, read_scan


@dataclass(frozen=True)
class Layout:
    """One way in which studies lie on a disk.

    Attributes:
        name: as the command line has it.
        find: the sources of an archive.
        read: a source's scan, and the source again with what only the scan told.
        preparation: the one published with this layout, if there is one.
        labels: what the labels of a source mean.
        masks: where the scan shows what some labels say, by label: bool (D, H, W) as the scan.
        placed: the labels that `masks` can give.
    """

    name: str
    find: Callable[[Path], list[Source]]
    read: Callable[[Source], tuple[Scan, Source]]
    preparation: Preparation | None = None
    labels: Sequence[str] = ()
    masks: Callable[[Source], dict[str, np.ndarray]] | None = None
    placed: Sequence[str] = ()


def phantom_sources(count: int, *, split: str, seed: int) -> list[Source]:
    """The first `count` phantoms of a split, which are made when they are read."""
    return [
        Source(
            f"{split}-{seed}-{index}",
            Path(f"phantoms-{PHANTOM_VERSION}/{split}/{seed}/{index}"),
            splits=(split,),
            metadata={"index": index, "seed": seed},
        )
        for index in range(count)
    ]


def _read_plain(source: Source) -> tuple[Scan, Source]:
    return read_scan(source.path), source


def _read_ct_rate(source: Source) -> tuple[Scan, Source]:
    return ct_rate.read_volume(source), source


def _phantom(source: Source) -> PhantomStudy:
    facts = source.metadata
    return make_study(facts["index"], seed=facts["seed"], split=source.splits[0])


def _read_phantom(source: Source) -> tuple[Scan, Source]:
    study = _phantom(source)
    told = replace(
        source,
        id=study.study_id,
        case=study.study_id,
        report=study.report,
        caption=study.caption,
        questions=tuple(asdict(question) for question in study.questions),
        labels=tuple(int(value) for value in concept_vector(study)),
    )
    return study.scan(), told


def _phantom_masks(source: Source) -> dict[str, np.ndarray]:
    return _phantom(source).masks()


def _no_archive(root: Path) -> list[Source]:
    raise ValueError(f"{root}: phantoms are made, not found; use phantom_sources.")


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("m3d-cap", m3d.read_m3d_cap, _read_plain, PRESETS["m3d"]),
        Layout("m3d-vqa", m3d.read_m3d_vqa, _read_plain, PRESETS["m3d"]),
        Layout("ct-rate", ct_rate.read_ct_rate, _read_ct_rate, PRESETS["ct-rate"], ct_rate.LABELS),
        Layout("folder", find_scans, _read_plain),
        Layout(
            "phantoms",
            _no_archive,
            _read_phantom,
            PRESETS["demo"],
            CONCEPTS,
            _phantom_masks,
            tuple(FINDINGS),
        ),
    )
}
