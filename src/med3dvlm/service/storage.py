"""Files of the studies: in a folder, or on whatever fsspec knows (S3 and what speaks its language).

    studies/<id>/source.zip          as it was received: source.nii.gz, source.dcm, source.zip
    studies/<id>/volume.nii.gz       the scan in canonical order, for the page and the model
    studies/<id>/thumbnail.png
    studies/<id>/evidence/<job>.nii.gz

A file appears whole under its key or not at all, and never changes afterwards.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote

from med3dvlm.files import atomic_file

CACHE_HOURS = 24  # that a copy of a remote file is kept on a worker's disk


class StorageError(ValueError):
    """A place for files that cannot be used, in one sentence with the remedy."""


Known = Callable[[set[str]], set[str]]
"""Of the ids of studies, those that are in the database."""


class Storage(Protocol):
    """Where the files are."""

    def put(self, source: Path, key: str) -> None:
        """Copy a file there."""
        ...

    def fetch(self, key: str) -> Path:
        """A file on this machine's disk with the content; not to be changed.

        Raises:
            FileNotFoundError: if there is none.
        """
        ...

    def delete(self, prefix: str) -> None:
        """Remove every file whose key begins with the prefix, a folder; there may be none.

        Raises:
            StorageError: where some are left; what is gone by then does not hinder a second try.
        """
        ...

    def list_keys(self) -> Iterator[str]:
        """Every key."""
        ...

    def tend(self, known: Known) -> None:
        """Throw away this machine's copies that are old, or of studies that are not known."""
        ...


def open_storage(url: str, cache: Path) -> Storage:
    """The storage of a folder or an fsspec URL; `cache` holds copies of remote files."""
    return RemoteStorage(url, cache) if "://" in url else FolderStorage(Path(url))


class FolderStorage:
    """A folder on a disk that all processes see."""

    def __init__(self, root: Path):
        self.root = root

    def put(self, source: Path, key: str) -> None:
        with atomic_file(self.root / key) as temporary:
            shutil.copyfile(source, temporary)

    def fetch(self, key: str) -> Path:
        path = self.root / key
        if not path.is_file():
            raise FileNotFoundError(key)
        return path

    def delete(self, prefix: str) -> None:
        folder = self.root / prefix
        try:
            while folder.exists():
                with suppress(FileNotFoundError):  # another process removes the same
                    shutil.rmtree(folder)
        except OSError as error:
            raise _left(prefix, error.strerror or str(error)) from error

    def list_keys(self) -> Iterator[str]:
        for path in sorted(self.root.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                yield path.relative_to(self.root).as_posix()

    def tend(self, known: Known) -> None:
        pass


class RemoteStorage:
    """Object storage; what is read is copied to the disk first, and kept there for a while.

    A copy is used only while its file is there: others delete, too.
    """

    def __init__(self, url: str, cache: Path):
        try:
            from fsspec.core import url_to_fs

            # a listing that was kept would hide what others have put or deleted since
            files, self.root = url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise StorageError(
                f"storage {url!r} cannot be used ({error}): for s3:// install 'med3dvlm[s3]'."
            ) from error
        self.files: Any = files
        self.cache = cache

    def put(self, source: Path, key: str) -> None:
        self.files.makedirs(self._at(key).rpartition("/")[0], exist_ok=True)
        self.files.put_file(str(source), self._at(key))

    def fetch(self, key: str) -> Path:
        copy = self.cache / quote(key, safe="")
        try:
            self.files.info(self._at(key))
        except FileNotFoundError as error:
            copy.unlink(missing_ok=True)
            raise FileNotFoundError(key) from error
        with suppress(FileNotFoundError):
            os.utime(copy)
            return copy
        with atomic_file(copy) as temporary:
            self.files.get_file(self._at(key), str(temporary))
        return copy

    def delete(self, prefix: str) -> None:
        try:
            with suppress(FileNotFoundError):
                self.files.rm(self._at(prefix), recursive=True)
            left = self.files.find(self._at(prefix))  # s3fs is silent about what S3 refused
        except Exception as error:  # what the clients raise has no common kind
            raise _left(prefix, type(error).__name__) from error
        if left:
            raise _left(prefix, "refused")
        for copy, key in self._copies():
            if key.startswith(prefix):
                copy.unlink(missing_ok=True)

    def list_keys(self) -> Iterator[str]:
        for path in sorted(self.files.find(self.root)):
            yield path.removeprefix(self.root).lstrip("/")

    def tend(self, known: Known) -> None:
        copies = {copy: _study_of(key) for copy, key in self._copies()}
        there = known(set(copies.values())) if copies else set()
        old = time.time() - CACHE_HOURS * 3600
        for copy, study in copies.items():
            with suppress(FileNotFoundError):  # another process has tended it
                if study not in there or copy.stat().st_mtime < old:
                    copy.unlink()

    def _copies(self) -> list[tuple[Path, str]]:
        """Copies with their keys; before the key of an unfinished one stand a dot and digits."""
        if not self.cache.is_dir():
            return []
        return [(copy, unquote(copy.name)) for copy in self.cache.iterdir()]

    def _at(self, key: str) -> str:
        return f"{self.root.rstrip('/')}/{key}"


def _study_of(key: str) -> str:
    return key.partition("studies/")[2].partition("/")[0]


def _left(prefix: str, reason: str) -> StorageError:
    return StorageError(
        f"The files under {prefix} could not all be removed ({reason}): let the server's keeper "
        "see to the storage, then try again."
    )
