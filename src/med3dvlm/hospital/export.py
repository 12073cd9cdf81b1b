"""Every form in which a report leaves, by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from highdicom import SOPClass

from med3dvlm.hospital.encapsulated_pdf import encapsulated_pdf, report_pdf
from med3dvlm.hospital.fhir import fhir_bundle
from med3dvlm.hospital.objects import dicom_bytes
from med3dvlm.hospital.report import Report
from med3dvlm.hospital.source import SourceImages
from med3dvlm.hospital.structured_report import basic_text_sr, comprehensive_sr

DICOM_FORMATS = ("sr", "basic-text-sr", "encapsulated-pdf")
FORMATS = (*DICOM_FORMATS, "pdf", "fhir", "text")


@dataclass(frozen=True)
class Exported:
    """A file, with its media type and the ending of its name."""

    data: bytes
    media_type: str
    suffix: str


def report_object(
    report: Report, source: SourceImages | None, to: str, *, fonts: Sequence[str | Path] = ()
) -> SOPClass:
    """A report as one of `DICOM_FORMATS`."""
    if to == "encapsulated-pdf":
        return encapsulated_pdf(report, source, fonts=fonts)
    make: dict[str, Callable[[Report, SourceImages | None], SOPClass]] = {
        "sr": comprehensive_sr,
        "basic-text-sr": basic_text_sr,
    }
    return make[to](report, source)


def export_report(
    report: Report,
    source: SourceImages | None,
    to: str,
    *,
    fhir_version: str = "r5",
    fonts: Sequence[str | Path] = (),
) -> Exported:
    """A report as a file of one of `FORMATS`.

    Raises:
        ExportError: where it cannot be made of this report or these images.
        ValueError: for another format or FHIR version.
    """
    if to in DICOM_FORMATS:
        data = dicom_bytes(report_object(report, source, to, fonts=fonts))
        return Exported(data, "application/dicom", ".dcm")
    if to == "pdf":
        return Exported(report_pdf(report, source, fonts=fonts), "application/pdf", ".pdf")
    if to == "fhir":
        bundle = fhir_bundle(report, source, version=fhir_version)
        text = json.dumps(bundle, ensure_ascii=False, indent=1)
        return Exported(text.encode(), "application/fhir+json", ".fhir.json")
    if to == "text":
        return Exported(report.text().encode(), "text/plain; charset=utf-8", ".txt")
    raise ValueError(f"format {to!r} is unknown: use {', '.join(FORMATS)}.")
