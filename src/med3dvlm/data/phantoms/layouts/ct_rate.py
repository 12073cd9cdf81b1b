"""CT-RATE: NIfTI volumes whose rescale to HU stands in a table, with reports and labels.

Volumes are `dataset/<split>/<split>_<patient>/<split>_<patient>_<scan>/` and in it
`<split>_<patient>_<scan>_<reconstruction>.nii.gz`; tables are named as published
(huggingface.co/datasets/ibrahimhamamci/CT-RATE), where those of `valid` begin with `validation`,
but for the labels.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from med3dvlm.data.ct_rate import LABELS
from med3dvlm.data.phantoms.identity import make_identity
from med3dvlm.data.phantoms.layouts.common import write_table
from med3dvlm.data.phantoms.study import PhantomError, PhantomStudy
from med3dvlm.files import atomic_folder
from med3dvlm.scan.write import save_nifti

SPLITS = {"train": "train", "validation": "valid", "test": "valid"}
MOST_PATIENTS = 1_000_000  # of one phantom split and seed; the next have higher numbers
TWICE = 6  # every so many patients have a second reconstruction
INTERCEPT = -1024  # stored values are not negative
SHARP_NOISE_HU = 6.0  # that the second reconstruction adds
REPORT = re.compile(r"Technique: (.+) Findings: (.+) Impression: (.+)", re.DOTALL)
NOT_GIVEN = "Not given."


def write_study(study: PhantomStudy, folder: Path) -> str:
    """int16 values of HU + 1024, in one or two reconstructions; the header has no rescale.

    Raises:
        PhantomError: for a twin, or an index of a million and more, which have no name here.
    """
    names = _names(study)
    with atomic_folder(folder / _folder(study)) as temporary:
        for number, name in enumerate(names):
            array = _sharper(study) if number else study.array
            save_nifti(replace(study.scan(), array=array - INTERCEPT), temporary / name)
    return f"{_folder(study)}/{names[0]}"


def write_tables(folder: Path, split: str, studies: Sequence[PhantomStudy]) -> None:
    """Reports, metadata and labels, one row for each volume.

    Rows of other volumes stay: phantoms of the splits validation and test are both in `valid`.
    """
    valid = SPLITS[split] == "valid"
    tables: tuple[tuple[str, Callable[[PhantomStudy, int], dict[str, Any]]], ...] = (
        (f"radiology_text_reports/{'validation' if valid else 'train'}_reports.csv", _report),
        (f"metadata/{'validation' if valid else 'train'}_metadata.csv", _metadata),
        (f"multi_abnormality_labels/{SPLITS[split]}_predicted_labels.csv", _labels),
    )
    for name, make_row in tables:
        path = folder / "dataset" / name
        rows = {
            volume: {"VolumeName": volume, **make_row(study, number)}
            for study in studies
            for number, volume in enumerate(_names(study))
        }
        rows = {**_read_rows(path), **rows}
        write_table(path, list(next(iter(rows.values()), {})), rows.values())


# --- names ------------------------------------------------------------------------------------


def _scan(study: PhantomStudy) -> str:
    """<split>_<patient>_<scan>; seeds, and the two splits in `valid`, share no patient."""
    if study.changed or study.index >= MOST_PATIENTS:
        raise PhantomError(
            f"study {study.study_id} has no name in CT-RATE: write no twins there, "
            f"and indices below {MOST_PATIENTS}."
        )
    block = 2 * study.seed + (study.split == "test")
    return f"{SPLITS[study.split]}_{MOST_PATIENTS * block + study.index + 1}_a"


def _folder(study: PhantomStudy) -> str:
    scan = _scan(study)
    return f"dataset/{SPLITS[study.split]}/{scan.removesuffix('_a')}/{scan}"


def _names(study: PhantomStudy) -> list[str]:
    """The files of the reconstructions."""
    count = 2 if (study.index + 1) % TWICE == 0 else 1
    return [f"{_scan(study)}_{number}.nii.gz" for number in range(1, count + 1)]


# --- voxels -----------------------------------------------------------------------------------


def _sharper(study: PhantomStudy) -> np.ndarray:
    """The same scan from a sharper kernel, whole HU (D, H, W): as it was, and noisier."""
    noise = study.stream("sharper").standard_normal(study.shape, np.float32)
    return np.clip(np.rint(study.array + SHARP_NOISE_HU * noise), INTERCEPT, 3071)


# --- rows -------------------------------------------------------------------------------------


def _report(study: PhantomStudy, number: int) -> dict[str, Any]:
    parts = REPORT.fullmatch(study.report)
    assert parts  # every report is written so
    return {
        "ClinicalInformation_EN": NOT_GIVEN,
        "Technique_EN": parts[1],
        "Findings_EN": parts[2],
        "Impressions_EN": parts[3],
    }


def _metadata(study: PhantomStudy, number: int) -> dict[str, Any]:
    """Some of the published columns, in their order."""
    who, (z, y, x) = make_identity(study), study.spacing_mm
    kernel = who.scanner.sharp if number else who.scanner.soft
    depth, height, width = study.shape
    return {
        "Manufacturer": who.scanner.manufacturer,
        "SeriesDescription": f"{study.truth.phase} {kernel}",
        "ManufacturerModelName": who.scanner.model,
        "PatientSex": who.sex,
        "PatientAge": who.age,
        "ConvolutionKernel": kernel,
        "PatientPosition": "HFS",
        "Rows": height,
        "Columns": width,
        "XYSpacing": f"[{y:.6g}, {x:.6g}]",
        "RescaleIntercept": INTERCEPT,
        "RescaleSlope": 1,
        "RescaleType": "HU",
        "NumberofSlices": depth,
        "ZSpacing": f"{z:.6g}",
        "StudyDate": f"{who.when:%Y%m%d}",
    }


def _labels(study: PhantomStudy, number: int) -> dict[str, Any]:
    return {name: int(study.truth.has(name)) for name in LABELS}


def _read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """A table that is there already, by volume."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row["VolumeName"]: row for row in csv.DictReader(file)}
