"""Checkpoints of a run that a crash, a kill or a full disk can interrupt, but never spoil.

A checkpoint is written as `checkpoints/unfinished/checkpoint-<step>` and only when all of it is
on the disk moved to `checkpoints/checkpoint-<step>`; a run goes on from the last of those.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import get_last_checkpoint

from med3dvlm.files import sync, sync_names

UNFINISHED = "unfinished"


class TrainingError(ValueError):
    """A run that cannot go on, in one sentence with the remedy."""


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from, if any; what a crash left half written is removed."""
    if not folder.is_dir():
        return None
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    last = get_last_checkpoint(str(folder))
    return Path(last) if last else None


def keep_only(folder: Path, steps: set[int]) -> None:
    """Remove the finished checkpoints of all other steps."""
    for path in folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and int(match[1]) not in steps:
            shutil.rmtree(path)


@contextmanager
def guarded(folder: Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises while it writes into `folder` into one sentence.

    Raises:
        TrainingError: after what was half written is removed.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        reason = str(error).split("\n", 1)[0][:160]
        raise TrainingError(
            f"{what} could not be saved in {folder.parent} ({reason}): the last finished "
            "checkpoint is intact; make room and run the same command again."
        ) from error


def publish(source: Path, target: Path) -> None:
    """Move a folder that is written in full to its name, past what a power cut could lose."""
    sync(source)
    if target.exists():  # the same step, saved again after a resume
        shutil.rmtree(target)
    os.replace(source, target)
    sync_names(target.parent)


@contextmanager
def result_folder(output: Path) -> Iterator[Path]:
    """A folder for the trained model's files, which move into `output` when all are written.

    config.json goes last, so that a model without it is known to be unfinished.
    """
    output.mkdir(parents=True, exist_ok=True)
    temporary = output / UNFINISHED
    shutil.rmtree(temporary, ignore_errors=True)
    with guarded(temporary, "the trained model"):
        temporary.mkdir()
        yield temporary
        sync(temporary)
    (output / "config.json").unlink(missing_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():
            shutil.rmtree(output / path.name, ignore_errors=True)
        os.replace(path, output / path.name)
    temporary.rmdir()
