"""DICOM Structured Reports: Comprehensive SR and, for older archives, Basic Text SR.

The content follows TID 2000 "Basic Diagnostic Imaging Report" (DICOM PS3.16): language, observers,
then a container for each section with a text item for each sentence. Both kinds have the same
tree; Comprehensive SR adds the confidence of a sentence as a number.
"""

from __future__ import annotations

from collections.abc import Iterator

from highdicom import SOPClass
from highdicom.sr import (
    CodedConcept,
    ContainerContentItem,
    ContentItem,
    ContentSequence,
    DeviceObserverIdentifyingAttributes,
    ImageContentItem,
    LanguageOfContentItemAndDescendants,
    NumContentItem,
    ObserverContext,
    PersonObserverIdentifyingAttributes,
    RelationshipTypeValues,
    TextContentItem,
)
from highdicom.sr.utils import collect_evidence
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import BasicTextSRStorage, ComprehensiveSRStorage

from med3dvlm.hospital.objects import (
    MANUFACTURER,
    device_uid,
    equipment,
    local_time,
    new_object,
)
from med3dvlm.hospital.report import (
    Document,
    ExportError,
    Line,
    Report,
    Signature,
    clean,
    one_line,
)
from med3dvlm.hospital.source import SourceImages

TITLE = codes.LN.DiagnosticImagingReport
NOT_STATED = "organization not stated"
# of a section: the heading (CID 7001) and what a sentence under it is (CID 7002)
SECTIONS = {
    "Indication": (codes.cid7001.IndicationsForProcedure, codes.cid7002.Request),
    "Technique": (codes.cid7001.CurrentProcedureDescriptions, codes.cid7002.ProcedureDescription),
    "Comparison": (codes.cid7001.PreviousFindings, codes.cid7002.PreviousFinding),
    "Findings": (codes.cid7001.Findings, codes.cid7002.Finding),
    "Impression": (codes.cid7001.Impressions, codes.cid7002.Impression),
    "Conclusion": (codes.cid7001.Conclusions, codes.cid7002.Conclusion),
    "Addendum": (codes.cid7001.Addendum, codes.cid7002.Summary),
    "": (codes.cid7001.Findings, codes.cid7002.Finding),
}
LANGUAGES = {"en": "English"}


def comprehensive_sr(report: Report, source: SourceImages | None) -> SOPClass:
    """A report as Comprehensive SR, with the images it is about as its evidence.

    Raises:
        ExportError: without images: an SR that refers to none says nothing about any study.
    """
    if source is None:
        raise ExportError(
            "the study did not come as DICOM, so there are no images that a Structured Report "
            "could refer to: export basic-text-sr, pdf, fhir, text or json."
        )
    made = new_object(
        report, source, kind="sr", sop_class=ComprehensiveSRStorage, modality="SR",
        description="Report (structured)",
    )  # fmt: skip
    return _fill(made, report, source, numbers=True)


def basic_text_sr(report: Report, source: SourceImages | None) -> SOPClass:
    """A report as Basic Text SR; without images it names no patient and refers to nothing."""
    made = new_object(
        report, source, kind="basic-text-sr", sop_class=BasicTextSRStorage, modality="SR",
        description="Report (text)",
    )  # fmt: skip
    return _fill(made, report, source, numbers=False)


def _fill(
    made: SOPClass, report: Report, source: SourceImages | None, *, numbers: bool
) -> SOPClass:
    """The modules "SR Document General" and "SR Document Content" (DICOM PS3.3 C.17)."""
    content = _content(report, source, numbers=numbers)
    made.CompletionFlag = "COMPLETE" if report.signature else "PARTIAL"
    made.PreliminaryFlag = "FINAL" if report.verified else "PRELIMINARY"
    made.VerificationFlag = "VERIFIED" if report.verified else "UNVERIFIED"
    if report.verified:
        made.VerifyingObserverSequence = [_verifier(report.signature, source)]
    made.AuthorObserverSequence = _authors(report, source)
    if report.predecessor:
        made.PredecessorDocumentsSequence = [_reference(report.predecessor)]
    made.PerformedProcedureCodeSequence = []
    made.ReferencedPerformedProcedureStepSequence = []
    if source:
        evidence, _ = collect_evidence(source.headers, content, source.first.StudyInstanceUID)
        made.CurrentRequestedProcedureEvidenceSequence = evidence
    made.update(content)
    return made


def _verifier(signature: Signature, source: SourceImages | None) -> Dataset:
    item = Dataset()
    item.VerifyingObserverName = person_name(signature.name)
    item.VerifyingOrganization = _organization(signature, source)
    item.VerificationDateTime = local_time(signature.signed)
    item.VerifyingObserverIdentificationCodeSequence = []
    return item


def _reference(document: Document) -> Dataset:
    """The macro "Hierarchical SOP Instance Reference" (DICOM PS3.3 C.17.2.1)."""
    item, series, instance = Dataset(), Dataset(), Dataset()
    instance.ReferencedSOPClassUID = document.sop_class_uid
    instance.ReferencedSOPInstanceUID = document.sop_instance_uid
    series.SeriesInstanceUID = document.series_uid
    series.ReferencedSOPSequence = [instance]
    item.StudyInstanceUID = document.study_uid
    item.ReferencedSeriesSequence = [series]
    return item


def _authors(report: Report, source: SourceImages | None) -> list[Dataset]:
    authors = []
    if report.model:
        device, made = Dataset(), equipment(report.model)
        device.ObserverType = "DEV"
        device.StationName = None
        device.DeviceUID = device_uid(report.model)
        device.Manufacturer = made["manufacturer"]
        device.ManufacturerModelName = made["manufacturer_model_name"]
        device.InstitutionName = None
        device.InstitutionCodeSequence = []
        authors.append(device)
    if report.signature:
        person = Dataset()
        person.ObserverType = "PSN"
        person.PersonName = person_name(report.signature.name)
        person.PersonIdentificationCodeSequence = []
        person.InstitutionName = _organization(report.signature, source)
        person.InstitutionCodeSequence = []
        authors.append(person)
    return authors


def _organization(signature: Signature, source: SourceImages | None) -> str:
    stated = signature.organization or (source and source.first.get("InstitutionName", "")) or ""
    return one_line(str(stated), 64) or NOT_STATED


def person_name(name: str) -> str:
    """A name for display as a DICOM person name.

    Only the person knows which word of it is the family name, so all of it is put there; a name
    that already has DICOM's carets is kept.
    """
    words = one_line(name.replace("=", "-"), 63)
    return words if "^" in words else f"{words}^"


# --- content ----------------------------------------------------------------------------------


def _content(report: Report, source: SourceImages | None, *, numbers: bool) -> Dataset:
    root = ContainerContentItem(name=TITLE, template_id="2000")
    root.ContentSequence = ContentSequence()
    language = CodedConcept(
        report.language, "RFC5646", LANGUAGES.get(report.language, report.language)
    )
    root.ContentSequence.extend(LanguageOfContentItemAndDescendants(language))
    for context in _observers(report, source):
        root.ContentSequence.extend(context)
    for section, lines in report.sections():
        heading, element = SECTIONS[section if section in SECTIONS else ""]
        items = [_sentence(line, element, source, numbers=numbers) for line in lines]
        root.ContentSequence.append(_container(heading, items))
    statement = _text(codes.cid7002.ProcedureDescription, report.statement())
    root.ContentSequence.append(_container(codes.cid7001.CurrentProcedureDescriptions, [statement]))
    return root


def _container(heading: CodedConcept, items: list[ContentItem]) -> ContainerContentItem:
    container = ContainerContentItem(
        name=heading, relationship_type=RelationshipTypeValues.CONTAINS
    )
    container.ContentSequence = ContentSequence(items)
    return container


def _text(name: CodedConcept, text: str) -> TextContentItem:
    return TextContentItem(name, clean(text), relationship_type=RelationshipTypeValues.CONTAINS)


def _sentence(
    line: Line, element: CodedConcept, source: SourceImages | None, *, numbers: bool
) -> TextContentItem:
    item, below = _text(element, line.text), ContentSequence()
    if numbers and line.confidence is not None:
        below.append(
            NumContentItem(
                name=codes.DCM.CertaintyOfFinding,
                value=round(100 * line.confidence, 1),
                unit=codes.UCUM.Percent,
                relationship_type=RelationshipTypeValues.HAS_PROPERTIES,
            )
        )
    if source and line.peak_mm is not None:
        image, frame = source.nearest(line.peak_mm)
        below.append(
            ImageContentItem(
                name=codes.cid7003.IllustrationOfROI,
                referenced_sop_class_uid=image.SOPClassUID,
                referenced_sop_instance_uid=image.SOPInstanceUID,
                referenced_frame_numbers=frame,
                relationship_type=RelationshipTypeValues.INFERRED_FROM,
            )
        )
    if below:
        item.ContentSequence = below
    return item


def _observers(report: Report, source: SourceImages | None) -> Iterator[ObserverContext]:
    """TID 1002: the model as a device, named by the hash of its weights, and the signer."""
    if report.model:
        device = DeviceObserverIdentifyingAttributes(
            uid=device_uid(report.model),
            name=clean(report.model.name),
            manufacturer_name=MANUFACTURER,
            model_name=clean(str(report.model)),
            serial_number=report.model.weights,
        )
        yield ObserverContext(codes.DCM.Device, device)
    if report.signature:
        person = PersonObserverIdentifyingAttributes(
            name=person_name(report.signature.name),
            organization_name=_organization(report.signature, source),
        )
        yield ObserverContext(codes.DCM.Person, person)
