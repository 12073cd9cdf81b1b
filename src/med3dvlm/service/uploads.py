"""Uploads: what comes from outside is taken for hostile until it has been looked at.

    files: one NIfTI file, or the DICOM files of a study, or a zip of either

The body is written to files part by part as it comes (never held in memory), under names made
here. What a file is, its first bytes say, not its name. Nothing is unpacked whose claims were not
checked; from a zip come only the DICOM and NIfTI files, the rest stays in it.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import shutil
import stat
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from anyio import to_thread
from fastapi import HTTPException, Request
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect

from med3dvlm.scan.blocks import SMALL_BYTES
from med3dvlm.scan.dicom_series import MAX_ZIP_BYTES, ZIP_RATIO, starts_as_dicom
from med3dvlm.scan.nifti import looks_like_nifti
from med3dvlm.service.settings import Settings

FIELD = "files"
SILENT_S = 60
"""A sender who is silent for so long is gone."""
FORGOTTEN_S = 24 * 3600
"""What a killed server left behind is removed after this."""
DISK_RESERVE = 256 * 2**20
"""Bytes of the disk that an upload never takes."""
START_BYTES = 1024
MEMBER_BYTES = 64 * 2**20
"""A zip member above this must not shrink more than `ZIP_RATIO` times, as in `med3dvlm.scan`."""

FOREIGN = (
    b"MZ", b"\x7fELF", b"#!", b"%PDF", b"PK", b"GIF8", b"\x89PNG", b"\xff\xd8\xff", b"Rar!",
    b"7z\xbc\xaf", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\xca\xfe\xba\xbe", b"\xcf\xfa\xed\xfe",
    b"\xce\xfa\xed\xfe", b"ustar",
)  # fmt: skip
"""What other formats begin with; a TIFF header in a DICOM preamble is allowed (PS3.10, 7.1)."""
MARKUP = re.compile(rb"%pdf-|<\s*(!doctype|html|script|svg|\?xml|\?php|iframe|body|img)", re.I)

OPENAPI: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {
                        FIELD: {"type": "array", "items": {"type": "string", "format": "binary"}}
                    },
                }
            }
        },
    }
}
"""`openapi_extra` of an endpoint that depends on `received`."""


class UploadRefused(HTTPException):
    """An upload that is not taken, with the reason and what to do; 422 if nothing else is said."""

    def __init__(self, detail: str, status: int = 422):
        super().__init__(status, detail)


@dataclass(frozen=True)
class Part:
    """A file as it came: the sender's name for it, and where it was written."""

    name: str
    path: Path


@dataclass(frozen=True)
class Upload:
    """Files that were looked at.

    Attributes:
        folder: holds nothing but them, under names made here.
        scan: what `read_scan` takes: the one NIfTI file, or the folder of DICOM files.
        name: of the first file, as the sender called it, without folders.
        notes: what was left out, in sentences.
    """

    folder: Path
    scan: Path
    name: str
    notes: tuple[str, ...] = ()


# --- over HTTP ------------------------------------------------------------------------------


async def received(request: Request) -> AsyncIterator[Upload]:
    """A dependency: the multipart body of `request`, checked; its files go with the request.

    Raises:
        UploadRefused: with the status and sentence for the sender.
    """
    settings: Settings = request.app.state.settings
    folder = await to_thread.run_sync(_new_folder, settings, _claimed_bytes(request))
    try:
        parts = await _receive(request, folder / "parts", settings.upload_files)
        checked = folder / "checked"
        yield await to_thread.run_sync(accept, parts, checked, settings.upload_files)
    finally:
        await to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))


def _claimed_bytes(request: Request) -> int:
    try:
        return int(request.headers.get("content-length", "0"))
    except ValueError:
        return 0


def _new_folder(settings: Settings, claimed: int) -> Path:
    incoming = settings.data / "incoming"
    incoming.mkdir(parents=True, exist_ok=True)
    for old in incoming.iterdir():
        with suppress(FileNotFoundError):  # another upload has just ended
            if old.stat().st_mtime < time.time() - FORGOTTEN_S:
                shutil.rmtree(old, ignore_errors=True)
    _check_disk(incoming, claimed)
    folder = Path(tempfile.mkdtemp(dir=incoming))
    (folder / "parts").mkdir()
    return folder


def _check_disk(folder: Path, wanted: int) -> None:
    if shutil.disk_usage(folder).free < wanted + DISK_RESERVE:
        raise UploadRefused("The server's disk is too full for this upload; tell its keeper.", 507)


async def _receive(request: Request, folder: Path, most: int) -> list[Part]:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise UploadRefused(f"Send the files as multipart/form-data, field {FIELD!r}.", 415)
    form = _Form(folder, most)
    try:
        parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
        stream = request.stream()
        while True:
            async with asyncio.timeout(SILENT_S):
                chunk = await anext(stream, None)
            if chunk is None:
                break
            await to_thread.run_sync(parser.write, chunk)
        parser.finalize()
    except FormParserError as error:
        raise UploadRefused("The multipart body is malformed; send it again.", 400) from error
    except ClientDisconnect as error:
        raise UploadRefused("The upload broke off.", 400) from error
    except TimeoutError as error:
        raise UploadRefused("The upload stopped coming; send it again.", 408) from error
    finally:
        form.close()
    if not form.ended:
        raise UploadRefused("The multipart body breaks off; send it again.", 400)
    return form.parts


@dataclass
class _Form:
    """Takes a multipart body apart into files."""

    folder: Path
    most: int
    parts: list[Part] = field(default_factory=list)
    ended: bool = False
    _headers: dict[bytes, bytes] = field(default_factory=dict)
    _header: bytes = b""
    _value: bytes = b""
    _file: BinaryIO | None = None

    def callbacks(self) -> dict[str, Any]:
        names = ("part_begin", "part_data", "part_end", "header_field", "header_value",
                 "header_end", "headers_finished", "end")  # fmt: skip
        return {f"on_{name}": getattr(self, name) for name in names}

    def part_begin(self) -> None:
        self._headers = {}

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        field, name = options.get(b"name"), options.get(b"filename")
        if field != FIELD.encode() or name is None:
            raise UploadRefused(f"Every part must be a file of the field {FIELD!r}.")
        if len(self.parts) == self.most:
            raise UploadRefused(f"More than {self.most} files; upload one study at a time.", 413)
        path = self.folder / f"{len(self.parts) + 1:06d}"
        self.parts.append(Part(safe_name(name.decode("utf-8", "replace")), path))
        self._file = path.open("xb")

    def part_data(self, data: bytes, start: int, end: int) -> None:
        assert self._file is not None
        self._file.write(memoryview(data)[start:end])

    def part_end(self) -> None:
        self.close()

    def end(self) -> None:
        self.ended = True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


# --- files ----------------------------------------------------------------------------------


def safe_name(name: str) -> str:
    """A sender's file name without its folders, for people to read; never used as a path.

    Raises:
        UploadRefused: for a name that leads out of its folder, or holds control characters.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if not name or len(name) > 1000 or not name.isprintable() or not path.name:
        raise UploadRefused("A file's name is empty, too long or has unprintable characters.")
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name):
        raise UploadRefused(f"The file name {name[:80]!r} leads out of its folder; rename it.")
    return path.name


def accept(parts: Sequence[Part], folder: Path, most: int) -> Upload:
    """Look at files and put those of the scan into `folder`, which is made.

    Args:
        most: files, in zips too.

    Raises:
        UploadRefused: for whatever is not one study.
    """
    if not parts:
        raise UploadRefused(f"No file came; send one or more in the field {FIELD!r}.")
    folder.mkdir()
    taken, left_out = _Taken(folder, most), 0
    for part in parts:
        kind = _kind(part.name, part.path)
        if kind == "zip":
            left_out += _unpack(part.name, part.path, taken)
        elif kind is not None:
            part.path.rename(taken.next(kind))
        else:
            left_out += 1
    notes = (f"left out {left_out} files that are neither DICOM nor NIfTI",) if left_out else ()
    return Upload(folder, taken.scan(), parts[0].name, notes)


@dataclass
class _Taken:
    """The files of one study, numbered."""

    folder: Path
    most: int
    dicom: int = 0
    nifti: list[Path] = field(default_factory=list)

    def next(self, kind: str) -> Path:
        number = self.dicom + len(self.nifti) + 1
        if number > self.most:
            raise UploadRefused(f"More than {self.most} files; upload one study at a time.", 413)
        path = self.folder / f"{number:06d}{kind}"
        if kind == ".dcm":
            self.dicom += 1
        else:
            self.nifti.append(path)
        return path

    def scan(self) -> Path:
        if self.dicom and not self.nifti:
            return self.folder
        if len(self.nifti) == 1 and not self.dicom:
            return self.nifti[0]
        if not self.dicom and not self.nifti:
            raise UploadRefused(
                "It holds no scan; upload DICOM files, a NIfTI file, or a zip of them (archives "
                "in it are not opened)."
            )
        raise UploadRefused(
            f"It holds {len(self.nifti)} NIfTI and {self.dicom} DICOM files; upload one study at "
            "a time: one NIfTI file, or the DICOM files of a study."
        )


def _kind(name: str, path: Path) -> str | None:
    """ ".dcm", ".nii", ".nii.gz", "zip" or None; refuses what is two things at once."""
    with path.open("rb") as file:
        start = file.read(START_BYTES)
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    kind = _image_kind(name, start)
    if kind is not None:
        _check_end(name, path)
    return kind


def _image_kind(name: str, start: bytes) -> str | None:
    if starts_as_dicom(start):
        preamble = start[:128] if start[128:132] == b"DICM" else b""
        if preamble.startswith(FOREIGN) or MARKUP.search(preamble):
            raise UploadRefused(
                f"{name}: its DICOM preamble is the beginning of another format; export it again."
            )
        return ".dcm"
    if start.startswith(b"\x1f\x8b"):  # what is inside, the reader looks at, within its limits
        return ".nii.gz" if name.lower().endswith(".nii.gz") else None
    return ".nii" if looks_like_nifti(start) else None


def _check_end(name: str, path: Path) -> None:
    """Refuse an image that is a readable archive, too: zips are found from their end."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            found = bool(archive.infolist())
    except Exception:  # compressed pixels that happen to hold the four bytes of a zip's end
        found = False
    if found:
        raise UploadRefused(f"{name}: it is an image and an archive at once; export it again.")


class _Bounded(FileIO):
    """A file of which little is read at a time: a zip's table of contents can claim any size."""

    LIMIT = 16 * 2**20

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = max(0, os.fstat(self.fileno()).st_size - self.tell())
        if size > self.LIMIT:
            raise UploadRefused("A zip's table of contents is too large; pack fewer files.", 413)
        return super().read(size) or b""


def _unpack(name: str, path: Path, taken: _Taken) -> int:
    """Take the images out of a zip; how many members were none."""
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _check_archive(name, members, path.stat().st_size, taken.most)
            _check_disk(taken.folder, sum(info.file_size for info in members))
            files = [info for info in members if not info.is_dir()]
            return sum(not _take(name, archive, info, taken) for info in files)
    except Exception as error:  # corrupt archives raise many kinds, also EINVAL for wild offsets
        ours = isinstance(error, OSError) and error.errno != errno.EINVAL
        if ours or isinstance(error, HTTPException):
            raise
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UploadRefused(f"{name}: the zip cannot be read ({reason}); pack it again.") from error


def _check_archive(name: str, members: list[zipfile.ZipInfo], stored: int, most: int) -> None:
    if len(members) > most:
        raise UploadRefused(f"{name}: more than {most} members; upload one study at a time.", 413)
    total = sum(info.file_size for info in members)
    bomb = total > SMALL_BYTES and total > ZIP_RATIO * stored
    for info in members:
        safe_name(info.orig_filename.rstrip("/"))
        mode = info.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise UploadRefused(f"{name}: it holds a link or device; pack the files themselves.")
        if info.flag_bits & 1:
            raise UploadRefused(f"{name}: it is encrypted; unpack it and upload the files.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UploadRefused(f"{name}: its compression is unusual; pack it as a plain zip.")
        if info.file_size > MEMBER_BYTES:
            bomb = bomb or info.file_size > ZIP_RATIO * info.compress_size
    if total > MAX_ZIP_BYTES or bomb:
        raise UploadRefused(
            f"{name}: its members claim {total} bytes out of {stored}: a decompression bomb, not "
            "a scan; if it is real, unpack it and upload the files.",
            413,
        )


def _take(name: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo, taken: _Taken) -> bool:
    with archive.open(info) as member:
        start = member.read(START_BYTES)
        kind = _image_kind(info.filename, start)
        if kind is None:
            return False
        path = taken.next(kind)
        with path.open("xb") as file:
            file.write(start)
            # a member gives no more bytes than it claims, and the claims were checked
            shutil.copyfileobj(member, file, 2**20)
    _check_end(f"{name}:{info.filename}", path)
    return True
