"""DICOM: `<study>/ct/IM0001` and on, a CT series of an invented patient, texts beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydicom.uid import generate_uid

from med3dvlm.data.phantoms.identity import make_identity
from med3dvlm.data.phantoms.layouts.common import write_texts
from med3dvlm.data.phantoms.study import PHANTOM_VERSION, PhantomStudy
from med3dvlm.files import atomic_folder
from med3dvlm.scan.write import save_dicom_series

SERIES = "ct"
CONTRAST_AGENT = "Iohexol 350 mg I/ml"
PROTOCOLS = {
    "non-contrast": "Thorax Abdomen Native",
    "arterial": "Thorax Abdomen CTA",
    "portal venous": "Thorax Abdomen Routine",
    "delayed": "Urography",
}


def write_study(study: PhantomStudy, folder: Path) -> str:
    """Slices stacked in the plane of acquisition; report, truth and questions."""
    with atomic_folder(folder / study.study_id) as temporary:
        save_dicom_series(
            study.scan(),
            temporary / SERIES,
            study_uid=_uid(study, "study"),
            series_uid=_uid(study, "series"),
            series_number=2,  # scanners give 1 to the localizer
            plane=study.truth.plane,
            attributes=_attributes(study),
            file_name="IM{:04d}",
        )
        write_texts(study, temporary, SERIES)
    return f"{study.study_id}/{SERIES}"


def _attributes(study: PhantomStudy) -> dict[str, Any]:
    """What the headers say besides geometry and voxels."""
    who, phase = make_identity(study), study.truth.phase
    contrast = {} if phase == "non-contrast" else {"ContrastBolusAgent": CONTRAST_AGENT}
    return {
        "SpecificCharacterSet": "ISO_IR 192",
        "FrameOfReferenceUID": _uid(study, "frame of reference"),
        "PatientName": who.name,
        "PatientID": who.patient_id,
        "PatientBirthDate": f"{who.birth:%Y%m%d}",
        "PatientSex": who.sex,
        "PatientAge": who.age,
        "StudyDate": f"{who.when:%Y%m%d}",
        "StudyTime": f"{who.when:%H%M%S}",
        "AccessionNumber": who.accession,
        "InstitutionName": who.institution,
        "ReferringPhysicianName": who.referring,
        "StudyDescription": "CT chest and abdomen",
        "SeriesDescription": f"{phase} {study.truth.plane}",
        "ProtocolName": PROTOCOLS[phase],
        "BodyPartExamined": "CHESTABDOMEN",
        "Manufacturer": who.scanner.manufacturer,
        "ManufacturerModelName": who.scanner.model,
        "KVP": who.kvp,
        "SliceThickness": f"{study.acquisition.slice_mm:.1f}",
        "ConvolutionKernel": who.kernel,
        "ImageComments": "generated phantom, no patient",
        **contrast,
    }


def _uid(study: PhantomStudy, part: str) -> str:
    """A hash of what the study is, under the root of pydicom."""
    return generate_uid(entropy_srcs=[f"phantom {PHANTOM_VERSION} {study.study_id} {part}"])
