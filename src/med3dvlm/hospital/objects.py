"""What all DICOM objects made here share: patient, study, equipment, UIDs that can be repeated."""

from __future__ import annotations

import hashlib
import io
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pydicom
from highdicom import SOPClass
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from med3dvlm import __version__
from med3dvlm.files import atomic_file
from med3dvlm.hospital.report import ExportError, Model, Report, one_line
from med3dvlm.hospital.source import TYPE_2, SourceImages

MANUFACTURER = "med3dvlm"
UTF_8 = "ISO_IR 192"
SERIES = {"sr": 9701, "basic-text-sr": 9702, "encapsulated-pdf": 9703, "seg": 9711,
          "parametric-map": 9712}  # fmt: skip


def new_object(
    report: Report,
    source: SourceImages | None,
    *,
    kind: str,
    sop_class: str,
    modality: str,
    description: str,
) -> SOPClass:
    """An object with the patient and study of the images, without its own content.

    The same report of the same images gets the same UIDs, so that sending it twice stores it once.
    Without images it belongs to a study of its own, and its patient is not stated.
    """
    seed = seed_of(report, source)
    when = report.created.astimezone()  # dates and times are local, as those of the images are
    study = source.first.StudyInstanceUID if source else generate_uid(entropy_srcs=[seed, "study"])
    made = SOPClass(
        study_instance_uid=study,
        series_instance_uid=generate_uid(entropy_srcs=[seed, kind, "series"]),
        series_number=SERIES[kind],
        sop_instance_uid=generate_uid(entropy_srcs=[seed, kind, "instance"]),
        sop_class_uid=sop_class,
        instance_number=1,
        modality=modality,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        specific_character_set=UTF_8,
        content_date=when.date(),
        content_time=when.time().replace(microsecond=0),
        series_description=one_line(description, 64),
        **equipment(report.model),
    )
    made.InstanceCreationDate, made.InstanceCreationTime = made.ContentDate, made.ContentTime
    if source:
        copy_patient_and_study(made, source.first)
    else:
        for keyword in TYPE_2:
            setattr(made, keyword, "")
    return made


def equipment(model: Model | None) -> dict[str, Any]:
    """The program that makes an object, as arguments of highdicom have it."""
    facts = {"manufacturer": MANUFACTURER, "software_versions": f"{MANUFACTURER} {__version__}"}
    name = one_line(model.name, 64) if model else MANUFACTURER
    serial = model.weights if model else __version__
    return {**facts, "manufacturer_model_name": name, "device_serial_number": serial}


def copy_patient_and_study(made: SOPClass, header: pydicom.Dataset) -> None:
    """Give an object the patient and study of an image, as the image has them."""
    for keyword in TYPE_2:  # also of images whose class highdicom does not know
        made[keyword] = header[keyword]
    with suppress(KeyError):
        made.copy_patient_and_study_information(header)
    made.SpecificCharacterSet = UTF_8


def device_uid(model: Model) -> str:
    """The UID of a model as an observer: the same wherever its weights are."""
    return generate_uid(entropy_srcs=["med3dvlm device", model.weights, model.preparation])


def local_time(when: datetime) -> str:
    """As DICOM has it, in the zone of this machine."""
    return f"{when.astimezone():%Y%m%d%H%M%S}"


def dicom_bytes(made: pydicom.Dataset) -> bytes:
    """A data set as a DICOM file.

    Raises:
        ExportError: where a value that was copied from the images cannot be written.
    """
    stream = io.BytesIO()
    try:
        pydicom.dcmwrite(stream, made, enforce_file_format=True)
    except Exception as error:  # values of damaged headers fail in many ways
        raise ExportError(
            f"the object cannot be written ({' '.join(str(error).split())[:160]}): a header of "
            "the images is damaged; export the report as text or PDF."
        ) from error
    return stream.getvalue()


def save_object(made: pydicom.Dataset, path: str | Path) -> None:
    """Write a DICOM file atomically."""
    data = dicom_bytes(made)
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def seed_of(report: Report, source: SourceImages | None) -> str:
    """A hash of all that is said, by whom, and about which images."""
    images = [header.SOPInstanceUID for header in source.headers] if source else []
    said = (report, images, report.predecessor) if report.predecessor else (report, images)
    return hashlib.sha256(repr(said).encode("utf-8", "replace")).hexdigest()
