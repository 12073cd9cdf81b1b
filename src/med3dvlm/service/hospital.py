"""Between the service and `med3dvlm.hospital`: what leaves is signed, and what comes is received.

`med3dvlm.hospital` is imported where it is used: it takes a second, and workers do not need it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from med3dvlm.notice import notice_of
from med3dvlm.scan import ScanError, read_scan
from med3dvlm.service import reviews, studies, work
from med3dvlm.service.core import Service
from med3dvlm.service.database import serialise
from med3dvlm.service.reviews import SignedReport
from med3dvlm.service.settings import Settings
from med3dvlm.service.studies import Conflict, NotThere, evidence_key
from med3dvlm.service.tables import Job, Question, ReportDocument, Study

if TYPE_CHECKING:
    from highdicom import SOPClass

    from med3dvlm.hospital import Document, FoundStudy, Model, Pacs, Report, SourceImages
    from med3dvlm.hospital.export import Exported

SR_FORMATS = ("sr", "basic-text-sr")
NOT_IMAGES = ("SR", "SEG", "PR", "KO", "DOC", "OT", "RTSTRUCT", "RTPLAN", "RTDOSE", "REG")
WAITING_ATTEMPTS = 2  # where somebody waits for the answer


class PacsFailure(ValueError):
    """A PACS that did not do what it was asked: one sentence.

    Attributes:
        passing: whether it may be tried again.
    """

    def __init__(self, error: Any):
        super().__init__(str(error))
        self.passing: bool = getattr(error, "passing", True)


# --- reports ----------------------------------------------------------------------------------


def signed_report(session: Session, study_id: str) -> SignedReport:
    """What a person signed; nothing else leaves.

    Raises:
        Conflict: for a report that nobody signed.
    """
    studies.get_ready(session, study_id)
    signed = reviews.signed_report(session, study_id)
    if signed is None:
        raise Conflict("The report is not signed: only signed reports are exported.")
    return signed


def as_report(session: Session, signed: SignedReport, settings: Settings, to: str = "") -> Report:
    """A signed report with its addenda, as `med3dvlm.hospital` has it; `to` is its format."""
    from med3dvlm.hospital import Line, Report, Signature

    peaks = _peaks(session, signed.study.id)
    lines = []
    for one in signed.sentences:
        own = one["status"] == "accepted"  # only of its own words is the model sure
        lines.append(
            Line(
                text=one["text"],
                section=one["section"],
                confidence=one["confidence"] if own else None,
                peak_mm=peaks.get(one["id"]) if own else None,
            )
        )
    signatures = [signed.signature, *signed.addenda]
    for added in signed.addenda:
        how = "" if added.authenticated else ", not authenticated"
        said = f"{added.text.strip()} ({added.name}{how}, {added.created:%Y-%m-%d %H:%M} UTC)"
        lines.append(Line(text=said, section="Addendum"))
    return Report(
        lines=tuple(lines),
        created=max(getattr(one, "signed", None) or one.created for one in signatures),
        notice=notice_of(str(signed.facts.get("model") or settings.model)),
        model=_model(signed.facts),
        signature=Signature(
            name=signed.signature.name,
            signed=signed.signature.signed,
            # an addendum by somebody unknown takes the authority from the whole
            authenticated=all(one.authenticated for one in signatures),
            organization=settings.organization,
        ),
        language=settings.language,
        predecessor=_predecessor(session, signed, to) if to in SR_FORMATS else None,
    )


def _predecessor(session: Session, signed: SignedReport, to: str) -> Document | None:
    """The last Structured Report with fewer addenda that left, best of the same kind."""
    from med3dvlm.hospital import Document

    earlier = select(ReportDocument).where(
        ReportDocument.study_id == signed.study.id, ReportDocument.addenda < len(signed.addenda)
    )
    last_first = (ReportDocument.addenda.desc(), ReportDocument.number.desc())
    found = session.scalar(earlier.order_by(ReportDocument.format != to, *last_first).limit(1))
    if found is None:
        return None
    return Document(
        study_uid=found.study_uid,
        series_uid=found.series_uid,
        sop_class_uid=found.sop_class_uid,
        sop_instance_uid=found.sop_instance_uid,
    )


def note_left(service: Service, signed: SignedReport, to: str, made: SOPClass) -> None:
    """Remember a Structured Report that leaves; the same again is remembered once."""
    if to not in SR_FORMATS:
        return
    uid = str(made.SOPInstanceUID)
    with service.database.session() as session:
        serialise(session, "report documents")
        there = select(ReportDocument.number).where(
            ReportDocument.study_id == signed.study.id, ReportDocument.sop_instance_uid == uid
        )
        if session.scalar(there) is None:
            session.add(
                ReportDocument(
                    study_id=signed.study.id,
                    format=to,
                    addenda=len(signed.addenda),
                    study_uid=str(made.StudyInstanceUID),
                    series_uid=str(made.SeriesInstanceUID),
                    sop_class_uid=str(made.SOPClassUID),
                    sop_instance_uid=uid,
                )
            )


def _model(facts: dict[str, Any]) -> Model | None:
    from med3dvlm.hospital import Model

    if not facts.get("model"):
        return None
    return Model(
        name=str(facts["model"]),
        weights=str(facts.get("weights", "")),
        preparation=str(facts.get("preparation") or ""),
    )


def _peaks(session: Session, study_id: str) -> dict[str, tuple[float, float, float]]:
    """Of each sentence whose evidence was made: where the map peaks, LPS mm."""
    query = select(Job).where(Job.study_id == study_id, Job.kind == "evidence", Job.state == "done")
    found = {}
    for job in session.scalars(query.order_by(Job.number)):
        result = job.result or {}
        if job.request.get("sentence") and result.get("peak_mm") and not result.get("empty"):
            found[job.request["sentence"]] = tuple(result["peak_mm"])
    return found


@contextmanager
def source_of(service: Service, study: Study) -> Iterator[SourceImages | None]:
    """The headers of a study's images; None where it did not come as DICOM."""
    from med3dvlm.hospital import read_source

    with studies.source_files(service, study) as folder:
        try:
            source = read_source(folder, series=study.series_uid or None)
        except ScanError as error:  # nobody needs to know where the file lies
            raise Conflict(str(error).replace(f"{folder}/", "")) from error
        yield source


def export_report(service: Service, study_id: str, to: str, fhir_version: str) -> Exported:
    """A signed report as a file.

    Raises:
        Conflict: where it is not signed, or cannot be made of these images.
    """
    from med3dvlm.hospital import dicom_bytes, export

    fonts = service.settings.pdf_fonts
    with service.database.reading() as session:
        signed = signed_report(session, study_id)
        report = as_report(session, signed, service.settings, to)
    with source_of(service, signed.study) as source, _refusals():
        if to not in SR_FORMATS:
            return export.export_report(report, source, to, fhir_version=fhir_version, fonts=fonts)
        made = export.report_object(report, source, to)
        data = dicom_bytes(made)
    note_left(service, signed, to, made)
    return export.Exported(data, "application/dicom", ".dcm")


def report_json(service: Service, study_id: str) -> dict[str, Any]:
    """A signed report as JSON."""
    from med3dvlm.hospital.drafting import report_as_dict

    with service.database.reading() as session:
        signed = signed_report(session, study_id)
        report = as_report(session, signed, service.settings)
    study = studies.describe(service, signed.study)
    return report_as_dict(report, study={k: study[k] for k in ("id", "study_uid", "series_uid")})


def report_object(service: Service, study_id: str, to: str) -> tuple[SOPClass, SignedReport]:
    """A signed report as a DICOM object for the PACS that its images came from.

    Once it is there, `note_left` is to be told.

    Raises:
        Conflict: also where the study has no patient and study that a PACS knows.
    """
    from med3dvlm.hospital import export

    with service.database.reading() as session:
        signed = signed_report(session, study_id)
        report = as_report(session, signed, service.settings, to)
    with source_of(service, signed.study) as source, _refusals():
        if source is None:
            raise Conflict(
                "The study did not come as DICOM: no PACS knows it, so nothing can be filed there."
            )
        made = export.report_object(report, source, to, fonts=service.settings.pdf_fonts)
    return made, signed


# --- evidence -----------------------------------------------------------------------------------


def evidence_object(service: Service, study_id: str, job_id: str, to: str) -> SOPClass:
    """The map of an evidence job as a DICOM object on the images' geometry."""
    from med3dvlm.hospital import Model, parametric_map, segmentation

    with service.database.reading() as session:
        study = studies.get_ready(session, study_id)
        job = work.find(session, job_id)
        if job is None or job.kind != "evidence" or job.study_id != study_id or not job.result:
            raise NotThere(f"Study {study_id} has no map of job {job_id}.")
        about, result = _about(session, job), job.result
    try:
        path = service.storage.fetch(evidence_key(study_id, job_id))
    except FileNotFoundError as error:
        raise NotThere(f"The map of job {job_id} is gone.") from error
    model = _model(result) or Model(name=service.settings.model, weights="", preparation="")
    make = {"seg": segmentation, "parametric-map": parametric_map}[to]
    with source_of(service, study) as source, _refusals():
        return make(read_scan(path), source, model=model, about=about)


def _about(session: Session, job: Job) -> str:
    """What a map is the evidence for, in words."""
    asked = job.request
    if asked.get("text"):
        return str(asked["text"])
    if asked.get("question"):
        question = session.scalar(select(Question).where(Question.id == asked["question"]))
        return question.text if question else "a question"
    try:
        return str(reviews.find_sentence(session, job.study_id, asked["sentence"])[0]["text"])
    except NotThere:
        return "a sentence of an earlier version"


# --- PACS -----------------------------------------------------------------------------------------


def check_configured(settings: Settings) -> None:
    """Raise `Conflict` where there is no PACS."""
    if not settings.pacs_url:
        raise Conflict("No PACS is configured: set MED3DVLM_PACS_URL.")


@contextmanager
def connect(settings: Settings, *, attempts: int = WAITING_ATTEMPTS) -> Iterator[Pacs]:
    """A connection to the configured PACS.

    Raises:
        Conflict: where none is configured.
        PacsFailure: where it does not do what it is asked.
    """
    check_configured(settings)
    from med3dvlm.hospital import Pacs, PacsAddress, PacsError

    try:
        address = PacsAddress(
            url=settings.pacs_url,
            user=settings.pacs_user,
            password=settings.pacs_password.get_secret_value(),
            token=settings.pacs_token.get_secret_value(),
            ca=settings.pacs_ca,
            certificate=settings.pacs_certificate,
            key=settings.pacs_key,
            timeout_s=(5.0, settings.pacs_timeout_s),
            attempts=attempts,
            limit_bytes=settings.pacs_limit_mb * 2**20,
        )
        with Pacs(address) as pacs:
            yield pacs
    except PacsError as error:
        raise PacsFailure(error) from error


def describe_found(found: FoundStudy) -> dict[str, Any]:
    """A study of the PACS as the API gives it."""
    from med3dvlm.hospital.dicomweb import plain
    from med3dvlm.hospital.report import one_line

    header = found.header

    def text(keyword: str) -> str:
        return one_line(str(header.get(keyword, "") or ""), 400)

    modalities = plain(header.get("ModalitiesInStudy", None)) or []
    return {
        "study_uid": found.study_uid,
        "patient_name": text("PatientName"),
        "patient_id": text("PatientID"),
        "accession_number": text("AccessionNumber"),
        "study_date": text("StudyDate"),
        "modalities": [modalities] if isinstance(modalities, str) else list(modalities),
        "description": text("StudyDescription"),
        "series": _count(header.get("NumberOfStudyRelatedSeries", None)),
        "images": found.images,
    }


def is_image_series(found: FoundStudy) -> bool:
    """Whether a series of the PACS holds images, as far as its modality says."""
    return str(found.header.get("Modality", "") or "") not in NOT_IMAGES


def describe_series(found: FoundStudy) -> dict[str, Any]:
    """A series of the PACS as the API gives it."""
    from med3dvlm.hospital.report import one_line

    header = found.header
    return {
        "series_uid": found.series_uid,
        "has_images": is_image_series(found),
        "number": _count(header.get("SeriesNumber", None)),
        "modality": one_line(str(header.get("Modality", "") or ""), 16),
        "description": one_line(str(header.get("SeriesDescription", "") or ""), 400),
        "images": found.images,
    }


def _count(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


@contextmanager
def _refusals() -> Iterator[None]:
    """What cannot be made of a study is a conflict, not a bad request."""
    from med3dvlm.hospital import ExportError

    try:
        yield
    except ExportError as error:
        text = str(error)
        raise Conflict(text[:1].upper() + text[1:]) from error
