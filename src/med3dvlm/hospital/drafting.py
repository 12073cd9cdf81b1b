"""What is done with a study that a watcher took: a draft into a folder, or into the service."""

from __future__ import annotations

import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import requests

from med3dvlm.files import atomic_folder, write_json
from med3dvlm.hospital.report import Line, Model, Report, Signature
from med3dvlm.hospital.watch import Taken, TryLater
from med3dvlm.notice import notice_of, provenance
from med3dvlm.scan import Scan, read_scan

if TYPE_CHECKING:
    from med3dvlm.models import Med3DVLM

REPORT = "report.json"
BUSY = (408, 429, 502, 503, 504, 507)


class ServiceError(ValueError):
    """A service that does not take a study, in its own words."""


def draft_report(model: Med3DVLM, scan: Scan) -> Report:
    """A report drafted by a language model, with confidences where it is calibrated."""
    seen = model.see(scan)
    text = str(model.report(seen))
    facts = {
        "created": datetime.now(UTC),
        "notice": notice_of(model.label),
        "model": Model.of(provenance(model)),
    }
    if model.calibration is None:
        return Report.from_text(text, **facts)
    from med3dvlm.evidence import rate_report

    rated = rate_report(model, seen, text)
    lines = [
        Line(text=one.sentence.text, section=one.sentence.section, confidence=one.confidence)
        for one in rated
    ]
    return Report(lines=tuple(lines), **facts)


def report_as_dict(report: Report, **facts: Any) -> dict[str, Any]:
    """A report as JSON has it; `facts` stand first."""
    return {
        **facts,
        "report": report.text(),
        "created": report.created.astimezone(UTC).isoformat(timespec="seconds"),
        "language": report.language,
        "sentences": [asdict(line) for line in report.lines],
        "model": asdict(report.model) if report.model else None,
        "signature": (
            {**asdict(report.signature), "signed": report.signature.signed.isoformat()}
            if report.signature
            else None
        ),
        "notice": report.notice,
    }


def report_of_dict(given: Mapping[str, Any], *, signature: Signature | None = None) -> Report:
    """A report from what :func:`report_as_dict`, or `med3dvlm report --json`, wrote.

    Its own signature is left out: a file proves nobody's.

    Raises:
        ValueError: for what is none.
    """
    try:
        model = given.get("model")
        if isinstance(model, Mapping):
            model = Model(**model)
        elif model:
            model = Model.of(given)
        facts: dict[str, Any] = {
            "created": _time(given.get("created")),
            "notice": str(given.get("notice", "")),
            "model": model or None,
            "language": str(given.get("language", "en")),
            "signature": signature,
        }
        if signature:
            facts["created"] = signature.signed
        sentences = given.get("sentences") or []
        if not sentences:
            return Report.from_text(str(given["report"]), **facts)
        lines = [
            Line(
                text=str(one["text"]),
                section=str(one.get("section", "")),
                confidence=one.get("confidence"),
                peak_mm=tuple(one["peak_mm"]) if one.get("peak_mm") else None,
            )
            for one in sentences
            if not one.get("withheld")
        ]
        return Report(lines=tuple(lines), **facts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"it is no report ({error!r}): give what 'med3dvlm report --json' prints."
        ) from error


def _time(value: Any) -> datetime:
    if not value:
        return datetime.now(UTC)
    when = datetime.fromisoformat(str(value))
    return when if when.tzinfo else when.replace(tzinfo=UTC)


class IntoFolder:
    """Drafts by a model of this process: `<folder>/<StudyInstanceUID>/report.txt` and `.json`."""

    def __init__(self, model: Med3DVLM, folder: Path | str):
        self.model, self.folder = model, Path(folder)

    def __call__(self, taken: Taken) -> str:
        place = self.folder / taken.study_uid
        if (place / REPORT).is_file():  # made before a crash
            return str(place)
        scan = read_scan(taken.folder)
        report = draft_report(self.model, scan)
        about = {
            "study_uid": taken.study_uid,
            "series_uid": taken.series_uid,
            "rule": taken.rule,
            "warnings": list(scan.warnings),
        }
        with atomic_folder(place) as temporary:
            (temporary / "report.txt").write_text(report.text(), "utf-8")
            write_json(temporary / REPORT, report_as_dict(report, **about))
        return str(place)


class IntoService:
    """Sends studies to a service of this package, whose queue then drafts their reports.

    Args:
        url: such as https://localhost:8000.
        key: an API key that may upload and draft; not needed where the service is open.
        ca: PEM file of the authority behind its certificate.
        patience_s: how long a study may take to be prepared.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str = "",
        ca: Path | None = None,
        method: str = "generate",
        patience_s: float = 600,
    ):
        self.url, self.method, self.patience_s = url.rstrip("/"), method, patience_s
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.verify = str(ca) if ca else True
        if key:
            self.session.headers["Authorization"] = f"Bearer {key}"

    def __call__(self, taken: Taken) -> str:
        study = self._upload(taken)
        study = self._prepared(study["id"])
        if study.get("report_state", "none") == "none":  # else it was drafted before a crash
            self._ask("POST", f"/api/studies/{study['id']}/report", json={"method": self.method})
        return f"{self.url}/api/studies/{study['id']}"

    def _upload(self, taken: Taken) -> dict[str, Any]:
        with tempfile.TemporaryFile() as packed:
            with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
                for file in sorted(taken.folder.rglob("*.dcm")):
                    archive.write(file, file.relative_to(taken.folder).as_posix())
            body = _OneFile(packed, f"{taken.study_uid}.zip")
            return self._ask(
                "POST", "/api/studies", data=body, headers={"Content-Type": body.content_type}
            )

    def _prepared(self, study_id: str) -> dict[str, Any]:
        deadline = time.monotonic() + self.patience_s
        while time.monotonic() < deadline:
            study = self._ask("GET", f"/api/studies/{study_id}")
            if study["state"] == "ready":
                return study
            if study["state"] == "refused":
                raise ServiceError(f"{self.url}: it refused the study: {study['reason']}")
            time.sleep(min(1.0, self.patience_s / 50))
        raise TryLater(f"{self.url}: the study is not prepared yet.")

    def _ask(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        try:
            answer = self.session.request(method, self.url + path, timeout=(5, 120), **options)
        except requests.exceptions.SSLError as error:
            raise ServiceError(f"{self.url}: its certificate is not trusted.") from error
        except requests.RequestException as error:
            raise TryLater(f"{self.url}: the service does not answer.") from error
        if answer.status_code in BUSY:
            raise TryLater(f"{self.url}: it is too busy (HTTP {answer.status_code}).")
        try:
            said = answer.json()
        except ValueError:
            said = {}
        if not answer.ok:
            reason = said.get("detail") or answer.reason
            raise ServiceError(f"{self.url}: {reason} (HTTP {answer.status_code})")
        return said


class _OneFile:
    """The body of a form with one file, read piece by piece."""

    boundary = "med3dvlm-one-file"
    content_type = f"multipart/form-data; boundary={boundary}"

    def __init__(self, file: IO[bytes], name: str):
        self.file = file
        self.head = (
            f'--{self.boundary}\r\nContent-Disposition: form-data; name="files"; '
            f'filename="{name}"\r\nContent-Type: application/zip\r\n\r\n'
        ).encode()
        self.tail = f"\r\n--{self.boundary}--\r\n".encode()
        self.size = file.seek(0, 2)

    def __len__(self) -> int:
        return len(self.head) + self.size + len(self.tail)

    def __iter__(self) -> Iterator[bytes]:
        self.file.seek(0)
        yield self.head
        while piece := self.file.read(2**20):
            yield piece
        yield self.tail
