"""A PACS over DICOMweb: QIDO-RS to find, WADO-RS to get, STOW-RS to send (DICOM PS3.18).

`dicomweb-client` speaks the protocol. What is added is what a hospital's network asks for:
attempts, limits on what is taken in, and errors that say what to do.
"""

from __future__ import annotations

import errno
import re
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit
from weakref import WeakSet

import pydicom
import requests
from dicomweb_client import DICOMwebClient
from pydicom.datadict import tag_for_keyword
from requests.adapters import HTTPAdapter

from med3dvlm.files import atomic_folder

Result = TypeVar("Result")
Progress = Callable[[int, int], None]

RETRIED = (408, 429, 502, 503, 504)
PAGE = 100  # answers asked for at a time
BATCH_BYTES, BATCH_FILES = 32 * 2**20, 200  # of a request that sends
ANSWER_BYTES = 64 * 2**20  # of a list of studies, or of what was stored
PIECE_BYTES = 2**18  # of what is streamed: how finely progress is told
FULL_DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
ANY_SYNTAX = (("application/dicom", "*"),)
UID = re.compile(r"(?=.{1,64}$)\d+(\.\d+)*")
BOUNDARY = re.compile(r'multipart/.*;\s*boundary="?([^";]+)"?', re.IGNORECASE)
STUDY_FIELDS = (
    "StudyInstanceUID", "PatientName", "PatientID", "PatientBirthDate", "PatientSex",
    "StudyDate", "StudyTime", "StudyDescription", "AccessionNumber", "ModalitiesInStudy",
    "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances",
)  # fmt: skip
SERIES_FIELDS = (
    "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "Modality", "BodyPartExamined",
    "NumberOfSeriesRelatedInstances",
)  # fmt: skip


class PacsError(ValueError):
    """A PACS that cannot be used, or does not do what was asked: why, and what can be done.

    Attributes:
        passing: whether it may well go away by itself: no answer, too busy.
    """

    def __init__(self, message: str, *, passing: bool = False):
        super().__init__(message)
        self.passing = passing


@dataclass(frozen=True, kw_only=True)
class PacsAddress:
    """Where a PACS is and how it is talked to.

    Attributes:
        url: of its DICOMweb service, such as https://pacs.example/dicom-web.
        user, password: for HTTP Basic authentication.
        token: for "Authorization: Bearer", in their place.
        ca: PEM file of the authority that signed the server's certificate, where the system does
            not know it.
        certificate, key: PEM files of a client certificate.
        timeout_s: (to connect, between two packets).
        attempts: how often a request that found nobody, or a busy server, is made.
        wait_s: before the second attempt; twice as long before each further one.
        limit_bytes: most that one study may have.
    """

    url: str
    user: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    timeout_s: tuple[float, float] = (5.0, 60.0)
    attempts: int = 3
    wait_s: float = 1.0
    limit_bytes: int = 8 * 2**30

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise PacsError(
                f"the PACS's address {self.url!r} is no URL: use https://host:port/dicom-web."
            )
        if parts.username or parts.password:
            raise PacsError("give user and password apart from the PACS's URL, not in it.")
        for path in (self.ca, self.certificate, self.key):
            if path is not None and not Path(path).is_file():
                raise PacsError(f"{path}: there is no such certificate file; check the path.")

    def __str__(self) -> str:
        return urlunsplit(urlsplit(self.url)._replace(query="", fragment=""))


@dataclass(frozen=True)
class FoundStudy:
    """A study, or with `series` one of its series, as a PACS describes it.

    Attributes:
        header: what it said, as a data set; keywords that it left out are absent.
    """

    header: pydicom.Dataset

    @property
    def study_uid(self) -> str:
        return str(self.header.get("StudyInstanceUID", ""))

    @property
    def series_uid(self) -> str:
        return str(self.header.get("SeriesInstanceUID", ""))

    @property
    def images(self) -> int | None:
        """How many objects it has, where the PACS says so."""
        for keyword in ("NumberOfSeriesRelatedInstances", "NumberOfStudyRelatedInstances"):
            value = self.header.get(keyword, None)
            if value not in (None, ""):
                return int(value)
        return None

    def as_dict(self) -> dict[str, Any]:
        """Keywords and their values as JSON has them."""
        return {e.keyword: plain(e.value) for e in self.header if e.keyword and e.VR != "SQ"}


def plain(value: Any) -> Any:
    """A DICOM value as JSON has it."""
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(one) for one in value]
    return str(value)


class Pacs:
    """A connection to a PACS; used by one thread at a time, but for `abort`."""

    def __init__(self, address: PacsAddress):
        self.address = address
        session = requests.Session()
        session.trust_env = False  # patients' data go to the PACS, not through a stray proxy
        session.max_redirects = 0
        session.verify = str(address.ca) if address.ca else True
        if address.certificate:
            pair = (str(address.certificate), str(address.key or address.certificate))
            session.cert = pair
        if address.token:
            session.headers["Authorization"] = f"Bearer {address.token}"
        elif address.user:
            session.auth = (address.user, address.password)
        session.hooks["response"].append(self._limit)
        self._aborted, self._adapter = Event(), _Adapter()
        for scheme in ("http://", "https://"):
            session.mount(scheme, self._adapter)
        self._session, self._left = session, ANSWER_BYTES
        self._client = DICOMwebClient(
            address.url.rstrip("/"),
            session=session,
            timeout=address.timeout_s,
            chunk_size=BATCH_BYTES * 4,  # of what is sent: never in chunks, which cannot be resent
        )
        # its own attempts repeat what cannot succeed, and lose a body that was sent in chunks
        self._client.set_http_retry_params(retry=False)

    def __enter__(self) -> Pacs:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._session.close()

    def abort(self) -> None:
        """End what another thread waits for here, however silent the PACS is; nothing follows."""
        self._aborted.set()
        self._adapter.shut()

    # --- find -----------------------------------------------------------------------------

    def find(self, *, limit: int = 100, **filters: str) -> list[FoundStudy]:
        """Studies that fit, as QIDO-RS matches.

        Args:
            filters: DICOM keyword → value; "*" stands for any letters, dates may be a range such
                as 20250101-20250131.

        Raises:
            PacsError: where the PACS is not there, refuses, or answers nonsense.
            ValueError: for what is no DICOM keyword.
        """
        return list(self._pages(self._client.search_for_studies, STUDY_FIELDS, filters, limit))

    def series(self, study_uid: str, *, limit: int = 1000) -> list[FoundStudy]:
        """The series of a study; each has what the PACS says of it."""
        study_uid = check_uid(study_uid)
        search = partial(self._client.search_for_series, study_uid)
        return list(self._pages(search, SERIES_FIELDS, {}, limit))

    def first_header(self, study_uid: str, series_uid: str) -> pydicom.Dataset:
        """The whole header of one image of a series."""
        study_uid, series_uid = check_uid(study_uid), check_uid(series_uid)
        search = partial(self._client.search_for_instances, study_uid, series_uid, limit=1)
        found = self._try(search)
        if not found:
            raise PacsError(f"{self.address}: it has no image of series {series_uid}.")
        uid = check_uid(str(_dataset(found[0]).SOPInstanceUID))
        get = partial(self._client.retrieve_instance_metadata, study_uid, series_uid, uid)
        return _dataset(self._try(get))

    def _pages(
        self,
        search: Callable[..., Any],
        fields: Sequence[str],
        filters: dict[str, str],
        limit: int,
    ) -> Iterator[FoundStudy]:
        """All answers, page by page; ends where a page brings nothing new."""
        for keyword in filters:
            if tag_for_keyword(keyword) is None:
                raise ValueError(f"{keyword!r} is no DICOM keyword; use names like PatientID.")
        seen: set[tuple[str, str]] = set()
        offset = 0
        while len(seen) < limit:
            query = {"search_filters": filters, "fields": fields, "offset": offset}
            page = self._try(partial(search, limit=min(PAGE, limit), **query))
            fresh = [FoundStudy(_dataset(one)) for one in page]
            fresh = [one for one in fresh if (one.study_uid, one.series_uid) not in seen]
            for one in fresh[: limit - len(seen)]:
                seen.add((one.study_uid, one.series_uid))
                yield one
            # some servers give all at once, whatever page is asked for
            if not fresh or len(page) < PAGE:
                return
            offset += len(page)

    # --- get ------------------------------------------------------------------------------

    def get(
        self,
        study_uid: str,
        folder: Path | str,
        *,
        series_uid: str | None = None,
        progress: Progress | None = None,
        watch: Progress | None = None,
    ) -> int:
        """Write a study, or one of its series, into a folder: a file an object, as stored.

        The folder appears, in place of an older one, when all is there. One object at a time is
        held in memory.

        Args:
            progress: called after each series with (its number, how many there are).
            watch: called after each object with (objects, bytes) of its series so far; from the
                beginning again where the series had to be.

        Returns:
            how many objects there are.

        Raises:
            PacsError: where nothing is there, too much comes, or something else than was asked for.
        """
        study_uid = check_uid(study_uid)
        wanted = [check_uid(series_uid)] if series_uid else None
        if wanted is None:
            wanted = [one.series_uid for one in self.series(study_uid)]
        total = 0
        with atomic_folder(folder, ours=("[0-9][0-9][0-9][0-9]",)) as temporary:
            left = self.address.limit_bytes
            for number, uid in enumerate(wanted, 1):
                place = temporary / f"{number:04d}"
                count, left = self._try(partial(self._write, study_uid, uid, place, left, watch))
                total += count
                if progress:
                    progress(number, len(wanted))
            if not total:
                raise PacsError(f"{self.address}: it has no images of study {study_uid}.")
        return total

    def _write(
        self, study_uid: str, series_uid: str, folder: Path, left: int, watch: Progress | None
    ) -> tuple[int, int]:
        """One series into a folder, whatever an earlier attempt left there."""
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        self._left, count = left, 0
        try:
            for dataset in self._client.iter_series(study_uid, check_uid(series_uid), ANY_SYNTAX):
                if dataset.get("StudyInstanceUID", "") != study_uid:
                    raise PacsError(f"{self.address}: it sent another study than {study_uid}.")
                count += 1
                # its own number is the name: what a server sends names no files here
                dataset.save_as(folder / f"{count:06d}.dcm", enforce_file_format=True)
                if watch:
                    watch(count, left - self._left)
            return count, self._left
        finally:
            self._left = ANSWER_BYTES

    # --- send -----------------------------------------------------------------------------

    def send(
        self,
        objects: Iterable[pydicom.Dataset | Path],
        *,
        progress: Progress | None = None,
    ) -> int:
        """Store objects (data sets, or DICOM files); sending the same again stores it once.

        Returns:
            how many were stored.

        Raises:
            PacsError: where one was refused, with the reason the PACS gave.
        """
        listed, sent = list(objects), 0
        for batch in _batches(listed):
            answer = self._try(partial(self._client.store_instances, batch))
            if refusal := _refusal(answer):
                raise PacsError(f"{self.address}: {refusal}.")
            sent += len(batch)
            if progress:
                progress(sent, len(listed))
        return sent

    # --- requests -------------------------------------------------------------------------

    def _limit(self, response: requests.Response, **_: Any) -> None:
        """Let a response's body be no longer than what is left, and no redirect be followed."""
        if response.is_redirect:
            raise PacsError(
                f"{self.address}: it sends on to {response.headers['location']!r}; give the "
                "address of the DICOMweb service itself."
            )
        pull, end = response.iter_content, _unframed_end(response)

        def counted(chunk_size: int | None = 1, decode_unicode: bool = False) -> Iterator[bytes]:
            tail = b""
            # what is streamed comes in pieces of a bounded size, whatever the client asks for
            for chunk in pull(min(chunk_size or PIECE_BYTES, PIECE_BYTES), decode_unicode):
                self._left -= len(chunk)
                if self._left < 0:
                    raise PacsError(
                        f"{self.address}: its answer is too long; get a single series, or raise "
                        "the limit."
                    )
                if end:
                    tail = (tail + chunk)[-len(end) - 8 :]
                yield chunk
            if end not in tail:
                raise requests.exceptions.ChunkedEncodingError("it ended early")

        response.iter_content = counted  # type: ignore[method-assign]

    def _try(self, request: Callable[[], Result]) -> Result:
        """What a request gives, after as many attempts as are allowed."""
        for attempt in range(1, self.address.attempts + 1):
            self._check_aborted()
            try:
                self._left = ANSWER_BYTES
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of values that a PACS writes loosely
                    return request()
            except PacsError:
                raise
            except Exception as error:  # of requests, urllib3, json and pydicom
                self._check_aborted()
                if isinstance(error, OSError) and error.errno in FULL_DISK:
                    raise  # of this machine
                reason = self._explain(error)
                if not reason.passing or attempt == self.address.attempts:
                    raise reason from error
            self._aborted.wait(self.address.wait_s * 2 ** (attempt - 1))
        raise AssertionError("there is at least one attempt")

    def _check_aborted(self) -> None:
        if self._aborted.is_set():
            raise PacsError(f"{self.address}: the request was called off.", passing=True)

    def _explain(self, error: Exception) -> PacsError:
        where = str(self.address)
        if isinstance(error, requests.exceptions.SSLError):
            return PacsError(
                f"{where}: its certificate is not trusted ({_short(error)}); give the authority's "
                "certificate as PEM file."
            )
        if isinstance(error, requests.exceptions.Timeout) or "timed out" in str(error):
            return PacsError(f"{where}: it does not answer in time; try later.", passing=True)
        if isinstance(error, requests.exceptions.HTTPError):
            return self._explain_status(error.response)
        if isinstance(error, (requests.exceptions.ConnectionError, ConnectionError)):
            return PacsError(
                f"{where}: nobody answers there ({_short(error)}); check the address and that the "
                "PACS is up.",
                passing=True,
            )
        if isinstance(error, requests.exceptions.ChunkedEncodingError):
            return PacsError(f"{where}: the connection broke while it sent.", passing=True)
        return PacsError(
            f"{where}: its answer is not DICOMweb ({_short(error)}); check the address."
        )

    def _explain_status(self, response: requests.Response) -> PacsError:
        where, status = str(self.address), response.status_code
        if status in RETRIED:
            return PacsError(f"{where}: it is too busy (HTTP {status}); try later.", passing=True)
        if refusal := _refusal(_answer(response)):
            return PacsError(f"{where}: {refusal}.")
        said = {
            401: "it wants a user and password, or a token, that it knows",
            403: "the user may not do this there",
            404: "it knows nothing of that name; check the address and the UID",
            409: "it refused to store what was sent",
            413: "what was sent is too large for it",
        }.get(status, "it failed")
        detail = _short(response.text) if status not in (401, 403) else response.reason
        return PacsError(f"{where}: {said} (HTTP {status}: {detail}).")


def _unframed_end(response: requests.Response) -> bytes:
    """What an answer of many parts must end with; nothing where HTTP tells how long it is.

    An answer that is as long as its connection lasts looks whole when the server dies.
    """
    headers = response.headers
    if "content-length" in headers or "chunked" in headers.get("transfer-encoding", "").lower():
        return b""
    boundary = BOUNDARY.search(headers.get("content-type", ""))
    return b"--" + boundary[1].encode() + b"--" if boundary else b""


class _Adapter(HTTPAdapter):
    """Knows its open sockets, so that another thread can end what is waited for."""

    def __init__(self) -> None:
        self.sockets: WeakSet[socket.socket] = WeakSet()
        super().__init__()

    def get_connection_with_tls_context(self, *arguments: Any, **options: Any) -> Any:
        pool = super().get_connection_with_tls_context(*arguments, **options)
        if "ConnectionCls" not in vars(pool):
            pool.ConnectionCls = _noting(pool.ConnectionCls, self.sockets)
        return pool

    def shut(self) -> None:
        for one in tuple(self.sockets):
            with suppress(OSError):  # it is closed already
                # not that of an SSL socket, which takes the encryption off a stream that is read
                socket.socket.shutdown(one, socket.SHUT_RDWR)


def _noting(kind: Any, sockets: WeakSet[socket.socket]) -> Any:
    """A kind of connection that adds its socket to a set."""

    class Noting(kind):
        def connect(self) -> None:
            super().connect()
            sockets.add(self.sock)

    return Noting


# failure reasons of storage (DICOM PS3.18 I.2, PS3.4 B.2.3)
FAILURES = {
    0xA000: "it is out of space, or the object does not fit its class",
    0xC000: "it cannot understand the object",
    0x0110: "it failed in processing",
    0x0112: "it knows no such object",
    0x0117: "the object's UID is not valid",
    0x0122: "it does not take objects of this class",
    0x0124: "the user may not do this there",
}


def check_uid(uid: str) -> str:
    """A UID as it is; anything else would lead to another resource of the server.

    Raises:
        PacsError: for what is no UID.
    """
    if not UID.fullmatch(uid):
        raise PacsError(f"{uid[:80]!r} is no UID: digits and dots, at most 64.")
    return uid


def _dataset(answer: dict[str, Any]) -> pydicom.Dataset:
    """A data set of DICOM JSON, without elements that it cannot hold."""
    if not isinstance(answer, dict):
        raise PacsError("the PACS's answer is not DICOMweb: no DICOM JSON; check its address.")
    dataset = pydicom.Dataset()
    for tag, element in answer.items():
        # pixels, that nobody asked for, or no DICOM JSON at all
        if not isinstance(element, dict) or "BulkDataURI" in element:
            continue
        try:
            dataset.update(pydicom.Dataset.from_json({tag: element}))
        except Exception:  # one value out of form must not hide the others
            continue
    for keyword in ("NumberOfStudyRelatedInstances", "NumberOfSeriesRelatedInstances"):
        if keyword in dataset and not str(dataset[keyword].value).isdigit():
            del dataset[keyword]
    return dataset


def _answer(response: requests.Response) -> pydicom.Dataset:
    """The data set that came with a failure; an empty one where none did."""
    try:
        said = response.json()
    except (ValueError, PacsError):  # not JSON, or too long
        return pydicom.Dataset()
    return _dataset(said) if isinstance(said, dict) else pydicom.Dataset()


def _refusal(answer: pydicom.Dataset) -> str:
    """What was not stored, and why; empty where all was."""
    failed = answer.get("FailedSOPSequence", None) or ()
    if not failed:
        return ""
    uid = failed[0].get("ReferencedSOPInstanceUID", "?")
    code = int(failed[0].get("FailureReason", 0) or 0)
    reason = FAILURES.get(code) or FAILURES.get(code & 0xF000, "it gives no reason")
    return f"it did not store {len(failed)} objects, such as {uid}: {reason} (0x{code:04X})"


def _batches(objects: Sequence[pydicom.Dataset | Path]) -> Iterator[list[pydicom.Dataset]]:
    batch: list[pydicom.Dataset] = []
    size = 0
    for one in objects:
        dataset = one if isinstance(one, pydicom.Dataset) else _read(one)
        stored = _size(one)
        if batch and (size + stored > BATCH_BYTES or len(batch) == BATCH_FILES):
            yield batch
            batch, size = [], 0
        batch.append(dataset)
        size += stored
    if batch:
        yield batch


def _read(path: Path) -> pydicom.Dataset:
    try:
        return pydicom.dcmread(path)
    except Exception as error:  # corrupt files make pydicom raise nearly anything
        raise PacsError(f"{path}: it is no DICOM file ({_short(error)}).") from error


def _size(one: pydicom.Dataset | Path) -> int:
    if isinstance(one, Path):
        return one.stat().st_size
    return sum(len(one.get(k, None) or b"") for k in ("PixelData", "EncapsulatedDocument"))


def _short(error: object) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
