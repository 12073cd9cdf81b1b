"""Files of the studies: in a folder, or on whatever fsspec knows (S3 and what speaks its language).

    studies/<id>/source.zip          as it was received: source.nii.gz, source.dcm, source.zip
    studies/<id>/volume.nii.gz       the scan in canonical order, for the page and the model
    studies/<id>/thumbnail.png
    studies/<id>/evidence/<job>.nii.gz

A file appears whole under its key or not at all, and never changes afterwards.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from med3dvlm.files import atomic_file

CACHE_HOURS = 24  # that a copy of a remote file is kept on a worker's disk


class StorageError(ValueError):
    """A place for files that cannot be used, in one sentence with the remedy."""


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
        """Remove every file whose key begins with the prefix, a folder."""
        ...

    def list_keys(self) -> Iterator[str]:
        """Every key."""
        ...

    def tend(self) -> None:
        """Throw away what need not be kept."""
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
        shutil.rmtree(self.root / prefix, ignore_errors=True)

    def list_keys(self) -> Iterator[str]:
        for path in sorted(self.root.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                yield path.relative_to(self.root).as_posix()

    def tend(self) -> None:
        pass


class RemoteStorage:
    """Object storage; what is read is copied to the disk first, and kept there for a while."""

    def __init__(self, url: str, cache: Path):
        try:
            from fsspec.core import url_to_fs

            files, self.root = url_to_fs(url)
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
        name = "".join(Path(key).suffixes)
        copy = self.cache / f"{hashlib.sha256(key.encode()).hexdigest()}{name}"
        with suppress(FileNotFoundError):
            os.utime(copy)
            return copy
        if not self.files.exists(self._at(key)):
            raise FileNotFoundError(key)
        with atomic_file(copy) as temporary:
            self.files.get_file(self._at(key), str(temporary))
        return copy

    def delete(self, prefix: str) -> None:
        if self.files.exists(self._at(prefix)):
            self.files.rm(self._at(prefix), recursive=True)

    def list_keys(self) -> Iterator[str]:
        for path in sorted(self.files.find(self.root)):
            yield path.removeprefix(self.root).lstrip("/")

    def tend(self) -> None:
        if not self.cache.is_dir():
            return
        for copy in self.cache.iterdir():
            with suppress(FileNotFoundError):  # another process has tended it
                if copy.stat().st_mtime < time.time() - CACHE_HOURS * 3600:
                    copy.unlink()

    def _at(self, key: str) -> str:
        return f"{self.root.rstrip('/')}/{key}"
