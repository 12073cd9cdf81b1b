"""Studies: taken in once whatever they are called, described, read back, thrown away."""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from sqlalchemy import delete, func, or_, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from med3dvlm.notice import notice_of
from med3dvlm.scan import Scan, read_scan
from med3dvlm.scan.dicom_series import choose_series, headers_of, is_dicom, items_of
from med3dvlm.service import work
from med3dvlm.service.access import Identity
from med3dvlm.service.audit import record
from med3dvlm.service.core import Service
from med3dvlm.service.database import new_id
from med3dvlm.service.settings import Settings
from med3dvlm.service.tables import Addendum, Signature, Study

VOLUME, THUMBNAIL = "volume.nii.gz", "thumbnail.png"
HEADERS = {  # of a study: its DICOM keyword
    "patient_name": "PatientName",
    "patient_id": "PatientID",
    "accession_number": "AccessionNumber",
    "study_uid": "StudyInstanceUID",
    "series_uid": "SeriesInstanceUID",
    "modality": "Modality",
}


class NotThere(LookupError):
    """What was asked for does not exist: one sentence."""


class Unusable(ValueError):
    """What was sent cannot be used: one sentence."""


class Conflict(ValueError):
    """What was asked for does not go with what is there: one sentence."""


def key(study_id: str, name: str = "") -> str:
    """Where a file of a study is in the storage."""
    return f"studies/{study_id}/{name}"


def evidence_key(study_id: str, job_id: str) -> str:
    """Where the map of an evidence job is."""
    return key(study_id, f"evidence/{job_id}.nii.gz")


# --- taking in --------------------------------------------------------------------------------


def receive(
    service: Service,
    path: Path,
    identity: Identity,
    *,
    source: str = "upload",
    name: str = "",
    notes: Sequence[str] = (),
    series: str | None = None,
) -> tuple[Study, bool]:
    """Take in a file or a folder of DICOM files; says whether the study is new.

    The files are copied; a job prepares them. What was there before, under whatever names, is the
    same study; one whose preparation failed is tried again.

    Args:
        source: "upload", "pacs" or what else brought it.
        name: what the sender calls it.
        notes: what was left out on the way, in sentences.
        series: SeriesInstanceUID or SeriesNumber, where there are several.

    Raises:
        QueueFull, UserLimit: where there is too much to do.
    """
    came = Came.at(path, series)
    with service.database.session() as session:
        if came.known(session) is not None:
            return enter(session, came, None, identity, limits=service.settings), False
        work.check_room(session, service.settings, identity.name)
    study = keep(service, came, identity, source=source, name=name, notes=notes)
    try:
        with service.database.session() as session:
            entered = enter(session, came, study, identity, limits=service.settings)
    except IntegrityError:  # somebody else has just sent the same
        service.storage.delete(key(study.id))
        with service.database.session() as session:
            return session.scalars(select(Study).where(Study.content == came.content)).one(), False
    except BaseException:
        service.storage.delete(key(study.id))
        raise
    if entered is not study:
        service.storage.delete(key(study.id))
    return entered, entered is study


@dataclass(frozen=True)
class Came:
    """Files that came: one, or a folder of DICOM files.

    Attributes:
        series: SeriesInstanceUID or SeriesNumber, where there are several.
        content: a hash, the same for the same files, whatever their names and order.
    """

    path: Path
    series: str | None
    files: tuple[Path, ...]
    content: str

    @classmethod
    def at(cls, path: Path, series: str | None) -> Came:
        """Reads all of it: not to be done while others wait for the database."""
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        digests = []
        for file in files:
            with file.open("rb") as stream:
                digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
        content = hashlib.sha256(repr((sorted(digests), series)).encode()).hexdigest()
        return cls(path, series, tuple(files), content)

    def known(self, session: Session) -> Study | None:
        return session.scalar(select(Study).where(Study.content == self.content))


def keep(
    service: Service,
    came: Came,
    identity: Identity,
    *,
    source: str,
    name: str = "",
    notes: Sequence[str] = (),
) -> Study:
    """Copy what came into the storage; the study that `enter` makes of it."""
    study_id = new_id()
    file = f"source{_suffix(came.files)}"
    _store(service, came.path, came.files, key(study_id, file))
    return Study(
        id=study_id,
        content=came.content,
        created_by=identity.name,
        source=source,
        file=file,
        description=_clean(name or came.path.name),
        warnings=list(notes),
    )


def enter(
    session: Session,
    came: Came,
    study: Study | None,
    identity: Identity,
    *,
    limits: Settings | None = None,
    **noted: Any,
) -> Study:
    """Put a study into the database, and the job that prepares it into the queue.

    What was there before is the same study; one whose preparation failed is tried again.

    Args:
        study: that was kept; None where the same was known.
        limits: of jobs waiting; None where there was room for it already.
        noted: in the audit log.
    """

    def prepare(found: Study) -> None:
        if limits is not None:
            work.check_room(session, limits, identity.name)
        work.enqueue(session, "prepare", found.id, identity.name, series=came.series)

    known = came.known(session)
    if known is not None:
        if known.state != "ready" and work.active(session, known.id, "prepare") is None:
            known.state, known.reason = "received", ""
            prepare(known)
        return known
    if study is None:
        raise Conflict("The study was thrown away meanwhile; send it again.")
    session.add(study)
    session.flush()
    prepare(study)
    record(session, identity, "study.receive", f"study/{study.id}", source=study.source, **noted)
    return study


def _suffix(files: Sequence[Path]) -> str:
    if len(files) != 1:
        return ".zip"
    if is_dicom(files[0]):
        return ".dcm"
    return next((s for s in (".nii.gz", ".nii") if files[0].name.lower().endswith(s)), ".nii")


def _store(service: Service, path: Path, files: Sequence[Path], to: str) -> None:
    if len(files) == 1:
        service.storage.put(files[0], to)
        return
    folder = service.settings.data / "incoming"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        packed = Path(temporary, "source.zip")
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
            for file in files:
                archive.write(file, file.relative_to(path).as_posix())
        service.storage.put(packed, to)


# --- what a study's files say -------------------------------------------------------------------


def read_source(service: Service, study: Study, series: str | None) -> tuple[Scan, dict[str, Any]]:
    """The scan as it was received, and what its headers say: columns of `Study`.

    Raises:
        ScanError: one sentence that does not tell where the file lies.
    """
    path = service.storage.fetch(key(study.id, study.file))
    try:
        scan = read_scan(path, series=series)
    except ValueError as error:
        raise type(error)(str(error).replace(str(path), study.description or "the upload")) from (
            error
        )
    return scan, _headers(path, scan, series)


def _headers(path: Path, scan: Scan, series: str | None) -> dict[str, Any]:
    dataset = _header_of(path, series)
    if dataset is None:
        return {"modality": scan.modality or ""}
    found: dict[str, Any] = {
        column: _clean(str(dataset.get(keyword, "") or "")) for column, keyword in HEADERS.items()
    }
    found = {k: v[:64] if k.endswith("uid") else v for k, v in found.items()}
    found["modality"] = (scan.modality or found["modality"])[:16]
    date = str(dataset.get("StudyDate", "") or "")
    if len(date) == 8 and date.isascii() and date.isdigit():
        found["study_date"] = f"{date[:4]}-{date[4:6]}-{date[6:]}"
    parts = [str(dataset.get(k, "") or "") for k in ("StudyDescription", "SeriesDescription")]
    about = _clean(" · ".join(part for part in parts if part))
    return {**found, "description": about} if about else found


def _header_of(path: Path, series: str | None) -> pydicom.Dataset | None:
    """All that a slice of the series that was read says; None for what is not DICOM."""
    if not zipfile.is_zipfile(path) and not is_dicom(path):
        return None
    with ExitStack() as stack:
        headers = list(headers_of(str(path), items_of(path, stack), []))
        chosen = choose_series(str(path), headers, series, [])[0]
        return pydicom.dcmread(BytesIO(chosen.item.read()), stop_before_pixels=True, force=True)


def load_scan(service: Service, study: Study) -> Scan:
    """The prepared volume as the scan that it was written from."""
    scan = read_scan(service.storage.fetch(key(study.id, VOLUME)))
    return replace(
        scan,
        modality=study.modality or None,
        units=study.units,
        orientation=study.orientation,
        source=f"study {study.id}",
        warnings=tuple(study.warnings),
    )


@contextmanager
def source_files(service: Service, study: Study) -> Iterator[Path]:
    """A folder with the files of a study as they were received, for as long as the block runs."""
    path = service.storage.fetch(key(study.id, study.file))
    with tempfile.TemporaryDirectory() as folder:
        if study.file.endswith(".zip"):
            with zipfile.ZipFile(path) as archive:  # made by `receive`, under names made there
                archive.extractall(folder)
        else:
            Path(folder, study.file).symlink_to(path.absolute())
        yield Path(folder)


def _clean(text: str) -> str:
    """As a database takes it: no control characters, 200 characters at most."""
    printable = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(printable.encode("utf-8", "replace").decode().split())[:200]


# --- finding and showing ------------------------------------------------------------------------


def get(session: Session, study_id: str) -> Study:
    study = session.scalar(select(Study).where(Study.id == study_id))
    if study is None:
        raise NotThere(f"There is no study {study_id}.")
    return study


def get_ready(session: Session, study_id: str) -> Study:
    """A study that can be worked with."""
    study = get(session, study_id)
    if study.state == "received":
        raise Conflict("The study is still being prepared; try again in a moment.")
    if study.state == "refused":
        raise Conflict(f"The study could not be read: {study.reason}")
    return study


def worklist(
    session: Session,
    *,
    text: str = "",
    state: str | None = None,
    report: str | None = None,
    before: int | None = None,
    limit: int = 50,
) -> list[Study]:
    """Studies, newest first.

    Args:
        text: part of the patient's name or id, the accession number or the description.
        state: of the study; report: of its report.
        before: only studies with a smaller number.
    """
    query = select(Study).order_by(Study.number.desc()).limit(limit)
    if text:
        columns = (Study.patient_name, Study.patient_id, Study.accession_number, Study.description)
        for word in text.split():
            query = query.where(or_(*(c.icontains(word, autoescape=True) for c in columns)))
    if state is not None:
        query = query.where(Study.state == state)
    if report is not None:
        query = query.where(Study.report_state == report)
    if before is not None:
        query = query.where(Study.number < before)
    return list(session.scalars(query))


def describe(service: Service, study: Study) -> dict[str, Any]:
    """A study as the API gives it."""
    return {
        "id": study.id,
        "created": study.created,
        "created_by": study.created_by,
        "source": study.source,
        "state": study.state,
        "reason": study.reason,
        "patient_name": study.patient_name,
        "patient_id": study.patient_id,
        "accession_number": study.accession_number,
        "study_uid": study.study_uid,
        "series_uid": study.series_uid,
        "study_date": study.study_date,
        "modality": study.modality,
        "description": study.description,
        "shape": study.shape,
        "spacing_mm": study.spacing_mm,
        "units": study.units,
        "orientation": study.orientation,
        "warnings": study.warnings,
        "report_state": study.report_state,
        "has_model_notice": notice_of(service.settings.model),
    }


def count(session: Session) -> dict[str, int]:
    """How many studies there are, by state."""
    rows = session.execute(select(Study.state, func.count()).group_by(Study.state))
    return {row[0]: row[1] for row in rows}


def remove(service: Service, study_id: str, identity: Identity, *, signed: bool) -> None:
    """Throw a study away with all that was made of it.

    Args:
        signed: also where its report is signed.

    Raises:
        NotThere: if there is none; Conflict: for a signed one.
        StorageError: where files are left; the study is then left, too, to be thrown away again.
    """
    _ = service.models.dual  # loaded before others wait for the transaction
    with service.database.session() as session:
        study = get(session, study_id)
        has_signature = session.get(Signature, study_id) is not None
        if has_signature and not signed:
            raise Conflict(
                "The study has a signed report: say signed=true to throw that away, too."
            )
        for table in (Addendum, Signature):
            session.execute(delete(table).where(table.study_id == study_id))
        session.delete(study)
        session.flush()  # no job of the study can be ended from here on
        clear(service, study_id)
        record(session, identity, "study.delete", f"study/{study_id}", signed=has_signature)


def clear(service: Service, study_id: str) -> None:
    """Remove the files of a study that the database has no more, and its entry in the index.

    Raises:
        StorageError: where files are left.
    """
    service.storage.delete(key(study_id))
    if service.models.dual is not None:
        service.index.remove(key(study_id, VOLUME))


def tend(service: Service) -> None:
    """Throw away this machine's copies of files that are old, or whose studies are gone."""

    def known(ids: set[str]) -> set[str]:
        with service.database.reading() as session:
            return set(session.scalars(select(Study.id).where(Study.id.in_(ids))))

    service.storage.tend(known)
