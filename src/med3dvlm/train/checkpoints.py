"""Checkpoints of a run that a crash, a kill or a full disk can interrupt, but never spoil.

A checkpoint is written as `checkpoints/unfinished/checkpoint-<step>` and only when all of it is
on the disk moved to `checkpoints/checkpoint-<step>`; a run goes on from the last of those. One
that is saved a second time is `replaced-checkpoint-<step>` until the new one has its place.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from med3dvlm.files import sync, sync_names

UNFINISHED = "unfinished"
REPLACED = "replaced-"


class TrainingError(ValueError):
    """A run that cannot go on, in one sentence with the remedy."""


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint to go on from, if any; what a crash left in the midst of a save is removed.

    Of one that was being replaced the old one is put back.
    """
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    for old in folder.glob(f"{REPLACED}*"):
        target = old.with_name(old.name.removeprefix(REPLACED))
        if target.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, target)
    saved = finished(folder)
    return saved[max(saved)] if saved else None


def finished(folder: Path) -> dict[int, Path]:
    """The finished checkpoints, by their steps."""
    matches = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("*")]
    return {int(match[1]): path for match, path in matches if match and path.is_dir()}


def decayed_in(checkpoint: Path) -> int | None:
    """How many tensors its optimizer decays; None where each rank has a part of the optimizer."""
    path = checkpoint / "optimizer.pt"
    if not path.is_file():
        return None
    groups = torch.load(path, map_location="cpu", mmap=True, weights_only=True)["param_groups"]
    return len(groups[0]["params"])


def keep_only(folder: Path, steps: set[int]) -> None:
    """Remove the finished checkpoints of all other steps."""
    for step, path in finished(folder).items():
        if step not in steps:
            shutil.rmtree(path)


@contextmanager
def readable(checkpoint: Path, remedy: str | None = None) -> Iterator[None]:
    """Turn whatever a library raises while it reads a checkpoint into one sentence.

    Args:
        remedy: what to do then; to remove the checkpoint where not given.

    Raises:
        TrainingError: naming the checkpoint.
    """
    try:
        yield
    except (TrainingError, MemoryError, torch.OutOfMemoryError):
        raise  # none of these tells of a checkpoint that is damaged
    except Exception as error:  # readers of five formats raise many kinds
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise TrainingError(
            f"{checkpoint} is damaged, or of another model ({reason}): "
            f"{remedy or _without(checkpoint)}."
        ) from error


def _without(checkpoint: Path) -> str:
    others = [step for step, path in finished(checkpoint.parent).items() if path != checkpoint]
    return f"remove it to {f'go on from checkpoint-{max(others)}' if others else 'begin again'}"


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
    old = target.with_name(REPLACED + target.name)
    if target.exists():  # the same step, saved again after a resume
        os.replace(target, old)
    os.replace(source, target)
    sync_names(target.parent)
    shutil.rmtree(old, ignore_errors=True)


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
