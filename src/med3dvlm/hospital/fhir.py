"""A report as a FHIR bundle: DiagnosticReport, an Observation a sentence, and who and what made it.

R5, or R4 (as R4B, which is the same for these resources). Validated by `fhir.resources` when made.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from datetime import UTC, date, datetime
from importlib import import_module
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import pydicom

from med3dvlm import __version__
from med3dvlm.hospital.objects import MANUFACTURER, device_uid, seed_of
from med3dvlm.hospital.report import Line, Report, clean
from med3dvlm.hospital.source import SourceImages

VERSIONS = {"r5": "fhir.resources", "r4": "fhir.resources.R4B"}
LOINC, UCUM = "http://loinc.org", "http://unitsofmeasure.org"
DICOM_CODES = "http://dicom.nema.org/resources/ontology/DCM"
GENDERS = {"M": "male", "F": "female", "O": "other"}
Resource = dict[str, Any]


def fhir_bundle(
    report: Report, source: SourceImages | None, *, version: str = "r5", pdf: bytes | None = None
) -> Resource:
    """A bundle of type "collection"; without images it has no Patient and no ImagingStudy.

    Args:
        version: "r5" or "r4".
        pdf: the report as PDF, to be attached.

    Raises:
        ValueError: for another version.
    """
    if version not in VERSIONS:
        raise ValueError(f"FHIR version {version!r} is unknown: use {' or '.join(VERSIONS)}.")
    bundle = _Bundle(report, source, version)
    bundle.fill(pdf)
    model = import_module(f"{VERSIONS[version]}.bundle").Bundle
    return model.model_validate(bundle.as_dict()).model_dump(mode="json", exclude_none=True)


class _Bundle:
    def __init__(self, report: Report, source: SourceImages | None, version: str):
        self.report, self.source, self.r5 = report, source, version == "r5"
        self.seed = seed_of(report, source)
        self.entries: list[Resource] = []

    def as_dict(self) -> Resource:
        return {
            "resourceType": "Bundle",
            "type": "collection",
            "identifier": {"system": "urn:ietf:rfc:3986", "value": self._url("bundle")},
            "timestamp": _instant(self.report.created),
            "entry": self.entries,
        }

    def fill(self, pdf: bytes | None) -> None:
        report = self.report
        subject = self._patient()
        study = self._study(subject)
        device = self._device()
        person = self._practitioner()
        shared: Resource = {"subject": subject} if subject else {}
        if started := self._started():
            shared["effectiveDateTime"] = started
        results = []
        for number, line in enumerate(line for line in report.lines if line.text.strip()):
            observed = self._observation(line, shared, device, person)
            results.append(self._add(f"observation {number}", observed))
        radiology = _concept("http://terminology.hl7.org/CodeSystem/v2-0074", "RAD", "Radiology")
        found: Resource = {
            "resourceType": "DiagnosticReport",
            "language": report.language,
            "text": _narrative(report),
            "identifier": [{"system": "urn:ietf:rfc:3986", "value": self._url("report")}],
            "status": self._status(),
            "category": [radiology],
            "code": _concept(LOINC, "18748-4", "Diagnostic imaging study"),
            **shared,
            "issued": _instant(report.created),
            "result": results,
            "presentedForm": _attachments(report, pdf),
        }
        impression = clean(report.section("Impression", "Conclusion")).strip()
        if impression:
            found["conclusion"] = impression
        if person:
            found["resultsInterpreter"] = [person]
        if study:
            found["study" if self.r5 else "imagingStudy"] = [study]
        self._add("report", found, first=True)

    def _status(self) -> str:
        if not self.report.verified:
            return "preliminary"
        return "appended" if self.report.amended else "final"

    def _observation(
        self, line: Line, shared: Resource, device: Resource | None, person: Resource | None
    ) -> Resource:
        observed: Resource = {
            "resourceType": "Observation",
            "status": "final" if self.report.verified else "preliminary",
            "category": [
                _concept(
                    "http://terminology.hl7.org/CodeSystem/observation-category",
                    "imaging", "Imaging",
                )
            ],
            "code": _code_of(line.section),
            **shared,
            "issued": _instant(self.report.created),
            "valueString": clean(line.text).strip(),
        }  # fmt: skip
        if device:
            observed["device"] = device
        if person:
            observed["performer"] = [person]
        if line.confidence is not None:
            percent = {"value": round(100 * line.confidence, 1), "unit": "%"}
            observed["component"] = [
                {
                    "code": _concept(DICOM_CODES, "111012", "Certainty of Finding"),
                    "valueQuantity": {**percent, "system": UCUM, "code": "%"},
                }
            ]
        return observed

    def _patient(self) -> Resource | None:
        if self.source is None:
            return None
        header = self.source.first
        patient: Resource = {"resourceType": "Patient"}
        if number := _text(header, "PatientID"):
            patient["identifier"] = [{"value": number}]
            if issuer := _text(header, "IssuerOfPatientID"):
                patient["identifier"][0]["assigner"] = {"display": issuer}
        if names := _names(header.get("PatientName", None)):
            patient["name"] = names
        if gender := GENDERS.get(_text(header, "PatientSex")):
            patient["gender"] = gender
        if born := _date(_text(header, "PatientBirthDate")):
            patient["birthDate"] = born
        if len(patient) == 1:
            return {"display": "not stated in the images"}
        return self._add("patient", patient)

    def _study(self, subject: Resource | None) -> Resource | None:
        if self.source is None or subject is None:
            return None
        header, count = self.source.first, len(self.source.headers)
        modality: Any = {"system": DICOM_CODES, "code": _text(header, "Modality") or "OT"}
        if self.r5:
            modality = {"coding": [modality]}
        identifier = [{"system": "urn:dicom:uid", "value": f"urn:oid:{header.StudyInstanceUID}"}]
        if accession := _text(header, "AccessionNumber"):
            kind = _concept("http://terminology.hl7.org/CodeSystem/v2-0203", "ACSN", "Accession ID")
            identifier.append({"type": kind, "value": accession})
        study: Resource = {
            "resourceType": "ImagingStudy",
            "identifier": identifier,
            "status": "available",
            "subject": subject,
            "series": [
                {
                    "uid": str(header.SeriesInstanceUID),
                    "modality": modality,
                    "numberOfInstances": count,
                }
            ],
        }
        if description := _text(header, "StudyDescription"):
            study["description"] = description
        if started := self._started():
            study["started"] = started
        return self._add("study", study)

    def _device(self) -> Resource | None:
        model = self.report.model
        if model is None:
            return None
        oid = f"urn:oid:{device_uid(model)}"
        name: Resource = {"value" if self.r5 else "name": model.name, "type": "user-friendly-name"}
        device = {
            "resourceType": "Device",
            "identifier": [{"system": "urn:ietf:rfc:3986", "value": oid}],
            "manufacturer": MANUFACTURER,
            "serialNumber": model.weights,
            "name" if self.r5 else "deviceName": [name],
            "version": [
                {"type": {"text": "software"}, "value": __version__},
                {"type": {"text": "weights"}, "value": model.weights},
                {"type": {"text": "preparation"}, "value": model.preparation},
            ],
            "note": [{"text": clean(self.report.notice)}],
        }
        if not self.report.notice.strip():
            del device["note"]
        return self._add("device", device)

    def _practitioner(self) -> Resource | None:
        signature = self.report.signature
        if signature is None:
            return None
        name = {"text": " ".join(clean(signature.name.replace("^", " ")).split())}
        person = self._add("practitioner", {"resourceType": "Practitioner", "name": [name]})
        return {**person, "display": name["text"]}

    def _started(self) -> str | None:
        return _date(_text(self.source.first, "StudyDate")) if self.source else None

    def _url(self, part: str) -> str:
        return f"urn:uuid:{uuid5(NAMESPACE_OID, f'{self.seed} {part}')}"

    def _add(self, part: str, resource: Resource, *, first: bool = False) -> Resource:
        """Put a resource into the bundle; gives a reference to it."""
        entry = {"fullUrl": self._url(part), "resource": resource}
        self.entries.insert(0 if first else len(self.entries), entry)
        return {"reference": entry["fullUrl"]}


def _concept(system: str, code: str, display: str) -> Resource:
    return {"coding": [{"system": system, "code": code, "display": display}], "text": display}


def _code_of(section: str) -> Resource:
    """What a sentence under a heading is, in LOINC."""
    codes = {
        "Indication": ("18785-6", "Radiology Reason for study (narrative)"),
        "Technique": ("55111-9", "Current imaging procedure descriptions Document"),
        "Comparison": ("18834-2", "Radiology Comparison study (narrative)"),
        "Impression": ("19005-8", "Radiology Imaging study [Impression] (narrative)"),
        "Conclusion": ("55110-1", "Conclusions [Interpretation] Document"),
        "Addendum": ("55107-7", "Addendum Document"),
    }
    code, display = codes.get(section, ("59776-5", "Procedure findings Narrative"))
    return _concept(LOINC, code, display)


def _attachments(report: Report, pdf: bytes | None) -> Sequence[Resource]:
    forms = [("text/plain; charset=utf-8", report.text().encode())]
    if pdf is not None:
        forms.append(("application/pdf", pdf))
    return [
        {
            "contentType": kind,
            "language": report.language,
            "data": base64.b64encode(data).decode(),
            "title": "Radiology report",
            "creation": _instant(report.created),
        }
        for kind, data in forms
    ]


def _narrative(report: Report) -> Resource:
    paragraphs = "".join(
        f"<p>{html.escape(part)}</p>" for part in report.text().strip().split("\n\n")
    )
    div = f'<div xmlns="http://www.w3.org/1999/xhtml">{paragraphs}</div>'
    return {"status": "generated", "div": div}


def _names(name: Any) -> list[Resource]:
    """Of each writing that a DICOM person name has: letters, ideographs, phonetic."""
    found = []
    for group in str(name or "").split("="):
        family, given, middle, prefix, suffix = [
            clean(part).strip() for part in (group.split("^") + [""] * 5)[:5]
        ]
        one = {
            "text": " ".join(part for part in (prefix, given, middle, family, suffix) if part),
            "family": family,
            "given": [part for part in (given, middle) if part],
            "prefix": [prefix] if prefix else [],
            "suffix": [suffix] if suffix else [],
        }
        one = {key: value for key, value in one.items() if value}
        if one:
            found.append(one)
    return found


def _text(header: pydicom.Dataset, keyword: str) -> str:
    return clean(str(header.get(keyword, "") or "")).strip()


def _date(value: str) -> str | None:
    """A DICOM date as FHIR has it; None where it is none."""
    if not re.fullmatch(r"\d{8}", value):
        return None
    try:
        return date(int(value[:4]), int(value[4:6]), int(value[6:])).isoformat()
    except ValueError:
        return None


def _instant(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="seconds")
