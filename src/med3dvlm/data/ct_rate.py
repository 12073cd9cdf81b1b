"""CT-RATE as it is published: NIfTI volumes, and tables of reports, metadata and labels.

Volumes are `<split>_<patient>_<scan>_<reconstruction>.nii.gz` anywhere below the folder, and the
tables are known by their columns, whatever they are called.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from med3dvlm.data.sources import Source, SourceError, absolute, inside, read_table
from med3dvlm.scan import Scan, ScanError, read_scan

LABELS = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)
NAME = re.compile(
    r"(?P<split>train|valid)(_fixed)?_(?P<patient>\d+)_(?P<scan>[a-z])_(?P<series>\d+)$"
)
SUFFIX = ".nii.gz"
SPLITS = {"train": "train", "valid": "validation"}
EMPTY = ("not given.", "not given", "nan")
AIR_HU, TISSUE_HU = (-1100, -800), (-160, 160)
SHARE = 0.01  # of the voxels; a chest CT holds far more air and soft tissue than this


def read_ct_rate(folder: Path | str) -> list[Source]:
    """The volumes below a folder with their reports, labels and metadata, by name.

    Reconstructions of one scan share one report; `case` is the patient.

    Raises:
        SourceError: if there is no volume or no table of reports.
    """
    root = absolute(folder)
    volumes: dict[str, list[Path]] = defaultdict(list)
    for parent, _, names in os.walk(root):
        for name in names:
            if name.endswith(SUFFIX) and NAME.match(name.removesuffix(SUFFIX)):
                volumes[name.removesuffix(SUFFIX)].append(Path(parent) / name)
    reports, metadata, labels = _tables(root)
    if not volumes:
        raise SourceError(f"{root} holds no volume like train_1_a_1.nii.gz: it is not CT-RATE.")
    if not reports:
        raise SourceError(
            f"{root} holds no table with VolumeName and Findings_EN: add the reports."
        )
    missing = sorted(set(reports) - set(volumes), key=_order)
    return [
        *(
            _source(name, volumes[name], root, reports, metadata, labels)
            for name in sorted(volumes, key=_order)
        ),
        *(
            Source(
                name,
                root / f"{name}{SUFFIX}",
                refusal=f"{root / name}{SUFFIX}: the table of reports names it, but it is missing.",
            )
            for name in missing
        ),
    ]


def read_volume(source: Source) -> Scan:
    """The scan in HU with the spacing of the metadata, whether its release is rescaled or not.

    Raises:
        ScanError: if it cannot be read, or neither its values nor its rescaled values are HU.
    """
    scan = read_scan(source.path)
    facts = source.metadata
    slope, intercept = facts.get("RescaleSlope"), facts.get("RescaleIntercept")
    if slope is not None and intercept is not None:
        scan = in_hounsfield(scan, float(slope), float(intercept))
    spacing = _spacing(facts)
    if spacing and not np.allclose(spacing, scan.spacing_mm, rtol=0.01):
        told = " × ".join(f"{mm:g}" for mm in scan.spacing_mm)
        note = f"the header's spacing {told} mm is replaced by the metadata's"
        affine = scan.affine.copy()
        affine[:3, :3] *= np.array(spacing[::-1]) / np.array(scan.spacing_mm[::-1])
        scan = replace(scan, spacing_mm=spacing, affine=affine, warnings=(*scan.warnings, note))
    return scan


def in_hounsfield(scan: Scan, slope: float, intercept: float) -> Scan:
    """The scan with `slope · value + intercept`, unless its values are HU already.

    Air and soft tissue are both in every chest CT, each where HU puts it; a slope applied twice
    or not at all moves one of them away.

    Raises:
        ScanError: if neither reading has both.
    """
    values = scan.array.reshape(-1)
    values = values[:: max(1, values.size // 500_000)]
    as_is, rescaled = _likeness(values), _likeness(values * slope + intercept)
    if max(as_is, rescaled) < SHARE:
        raise ScanError(
            f"{scan.source}: neither its values nor those rescaled by {slope:g} and "
            f"{intercept:g} are Hounsfield units; check the metadata."
        )
    # the reader's doubt about the units is settled
    notes = tuple(note for note in scan.warnings if not note.startswith("not HU"))
    known = replace(scan, units="HU", modality="CT", warnings=notes)
    if as_is >= rescaled:
        return known
    return replace(known, array=scan.array * np.float32(slope) + np.float32(intercept))


def _likeness(values: np.ndarray) -> float:
    """How much of both air and soft tissue there is, the lesser of the two shares."""
    shares = [np.mean((low <= values) & (values <= high)) for low, high in (AIR_HU, TISSUE_HU)]
    return float(min(shares))


Table = dict[str, dict[str, Any]]


def _tables(root: Path) -> tuple[Table, Table, Table]:
    """(reports, metadata, labels), each by volume; told apart by their columns."""
    reports: Table = {}
    metadata: Table = {}
    labels: Table = {}
    for path in sorted(root.rglob("*.csv")):
        rows = read_table(path)
        columns = set(rows[0]) if rows else set()
        if "VolumeName" not in columns:
            continue
        if "Findings_EN" in columns:
            table = reports
        elif set(LABELS) <= columns:
            table = labels
        elif columns & {"RescaleSlope", "ZSpacing"}:
            table = metadata
        else:
            continue
        for row in rows:
            table.setdefault(str(row["VolumeName"]).strip().removesuffix(SUFFIX), row)
    return reports, metadata, labels


def _source(
    name: str, paths: list[Path], root: Path, reports: Table, metadata: Table, labels: Table
) -> Source:
    path, *others = sorted(paths)
    parts = NAME.match(name)
    assert parts is not None  # only such names are collected
    source = Source(
        name,
        path,
        splits=(SPLITS[parts["split"]],),
        case=f"{parts['split']}_{parts['patient']}",
        metadata=_facts(metadata.get(name, {})),
    )
    if not inside(path, root):
        return replace(source, refusal=f"{path}: it links to outside {root}; copy it in.")
    if others:  # both releases, train and train_fixed, use the same names
        return replace(source, refusal=f"{path}: {others[0]} has the same name; keep one of them.")
    if name not in reports:
        return replace(source, refusal=f"{path}: the table of reports does not name it.")
    report = _report(reports[name])
    if not report:
        return replace(source, refusal=f"{path}: its report is empty.")
    told = [_number(labels[name][label]) for label in LABELS] if name in labels else []
    if not set(told) <= {0, 1}:
        return replace(source, refusal=f"{path}: its row of labels holds something but 0 and 1.")
    return replace(source, report=report, labels=tuple(map(int, told)))


def _report(row: dict[str, Any]) -> str:
    """Findings and impression as one text; a section that was "Not given." is left out."""
    parts = []
    for title, column in (("Findings", "Findings_EN"), ("Impression", "Impressions_EN")):
        text = " ".join(str(row.get(column) or "").split())
        if text and text.lower() not in EMPTY:
            parts.append(f"{title}: {text}")
    return " ".join(parts)


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    """The metadata that preparing needs, as numbers where they are."""
    facts: dict[str, Any] = {}
    for key in ("RescaleSlope", "RescaleIntercept", "ZSpacing"):
        number = _number(row.get(key))
        if number is not None:
            facts[key] = number
    plane = [_number(part) for part in str(row.get("XYSpacing") or "").strip("[] ").split(",")]
    if len(plane) == 2 and None not in plane:
        facts["XYSpacing"] = plane
    return facts


def _number(text: Any) -> float | None:
    try:
        number = float(text)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def _spacing(facts: dict[str, Any]) -> tuple[float, float, float] | None:
    """(z, y, x) mm as the metadata has it, if it is whole and possible."""
    if "ZSpacing" not in facts or "XYSpacing" not in facts:
        return None
    spacing = (abs(facts["ZSpacing"]), *(abs(mm) for mm in facts["XYSpacing"]))
    return spacing if min(spacing) > 0 else None  # type: ignore[return-value]


def _order(name: str) -> tuple[str, int, str, int]:
    parts = NAME.match(name)
    if parts is None:
        return name, 0, "", 0
    return parts["split"], int(parts["patient"]), parts["scan"], int(parts["series"])
