"""Phantom studies as files, in one of the layouts of `LAYOUTS`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from med3dvlm.data.phantoms.layouts import LAYOUTS, Layout
from med3dvlm.data.phantoms.layouts.common import truth_of
from med3dvlm.data.phantoms.study import PhantomError, PhantomStudy, make_study
from med3dvlm.files import atomic_file


def write_studies(
    count: int,
    folder: Path | str,
    *,
    layout: str = "nifti",
    seed: int = 0,
    split: str = "test",
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the first `count` studies of a split with tables of all of them.

    Returns:
        The number of distinct combinations of findings among them.

    Raises:
        PhantomError: for an unknown layout or split.
    """
    folder, write_tables = Path(folder), _layout(layout).write_tables
    studies = [make_study(index, seed=seed, split=split) for index in range(count)]
    rows = []
    for study in studies:
        # a copy, whose voxels are let go when it is written
        rows.append(write_study(replace(study), folder, layout=layout))
        if progress:
            progress(len(rows), count)
    if write_tables:
        write_tables(folder, split, studies)
    with atomic_file(folder / "manifest.jsonl") as temporary:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text("".join(lines), "utf-8")
    return len({tuple(p.name for p in study.truth.findings) for study in studies})


def write_study(study: PhantomStudy, folder: Path | str, *, layout: str = "nifti") -> dict:
    """Write one study under a folder, replacing it where it is there.

    Returns:
        Its row of the manifest: id, image (path in the folder), report and truth.

    Raises:
        PhantomError: for an unknown layout, or a study that has no name in it.
    """
    image = _layout(layout).write_study(study, Path(folder))
    return {"id": study.study_id, "image": image, "report": study.report, **truth_of(study)}


def _layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise PhantomError(f"layout {name!r} is unknown: use one of {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]
