"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import EISDIR
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends well, else removed."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(EISDIR, "it is a folder; name a file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{secrets.token_hex(4)}{path.name}"
    temporary.open("xb").close()  # not mkstemp, which makes it private whatever the umask
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str, *, ours: Sequence[str] = ("*",)) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well.

    An older folder of that name is replaced, and is back where it was if the move fails.

    Args:
        ours: patterns of names; a folder that holds anything else is not replaced.

    Raises:
        ValueError: for such a folder, or a file, before the block is begun.
    """
    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path} is a file: give a folder.")
    for other in sorted(path.iterdir()) if path.is_dir() else ():
        if not any(fnmatch(other.name, pattern) for pattern in ours):
            raise ValueError(f"{path} holds other things ({other.name}): give a folder of its own.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.replace(path, old / path.name)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(old / path.name, path)
                raise
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file is on the disk, or a folder with all that is in it."""
    if path.is_dir():
        for child in path.iterdir():
            sync(child)
        sync_names(path)
    else:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def sync_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, those of files moved there included."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path | str, value: Any) -> None:
    """Write JSON atomically, readable by people."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_yaml(path: Path | str, schema: type[T], overrides: Sequence[str] = ()) -> T:
    """A YAML file as the dataclass `schema`, whose keys alone are known.

    Args:
        overrides: such as `training.batch_size=8`, which win.

    Raises:
        OSError: where there is no such file.
        ValueError, OmegaConfBaseException, YAMLError: where it cannot be read as that.
    """
    from omegaconf import DictConfig, OmegaConf  # here: it takes a moment to load

    with Path(path).open("rb") as file:
        loaded = OmegaConf.load(file)
    if not isinstance(loaded, DictConfig):
        raise ValueError("it must hold 'name: value' lines")
    merged = OmegaConf.merge(
        OmegaConf.structured(schema), loaded, OmegaConf.from_dotlist(list(overrides))
    )
    return OmegaConf.to_object(merged)  # type: ignore[return-value]
