"""A folder of 8-bit pictures, one per slice, as M3D-Cap stores its scans."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from med3dvlm.scan.assemble import assemble
from med3dvlm.scan.blocks import check_claim
from med3dvlm.scan.scan import Scan, ScanError

PICTURES = {".png", ".jpg", ".jpeg"}
MAX_PIXELS = 4096 * 4096
"""No slice of a scan is larger; a small picture may claim to be."""


def read_slices(folder: Path, files: list[Path]) -> Scan:
    """Stack pictures in the order of the numbers in their names, (D, H, W), grey.

    Pictures of another size than most, or that cannot be opened, are left out with a warning.
    The first picture is taken as the lowest slice, and orientation is unknown.

    Raises:
        ScanError: where fewer than two pictures of one size are there.
    """
    files = sorted(files, key=_number)
    sizes = {file: _size(file) for file in files}
    broken = [file.name for file, size in sizes.items() if size is None]
    if len(broken) == len(files):
        raise ScanError(f"{folder}: none of its {len(files)} pictures can be opened.")
    common, _ = Counter(size for size in sizes.values() if size).most_common(1)[0]
    kept = [file for file in files if sizes[file] == common]
    other = [file.name for file, size in sizes.items() if size and size != common]
    if len(kept) < 2:
        raise ScanError(
            f"{folder}: a single 2D image is not a volume; give a folder of slices of one size."
        )
    width, height = common
    check_claim(str(folder), (len(kept), height, width), 0, 0, compressed=False)
    volume = np.empty((len(kept), height, width), np.uint8)
    good = 0
    for file in kept:
        plane = _grey(file)
        if plane is None:
            broken.append(file.name)
        else:
            volume[good], good = plane, good + 1
    notes = ["orientation and voxel spacing unknown: pictures have none, 1 mm is assumed"]
    notes += [f"left out, of another size than {width}×{height}: {_list(other)}"] * bool(other)
    notes += [f"left out, cannot be opened: {_list(broken)}"] * bool(broken)
    return assemble(
        volume[:good].transpose(2, 1, 0),
        np.eye(4),
        source=str(folder),
        notes=notes,
        orientation="unknown",
    )


def _number(file: Path) -> tuple[int, str]:
    """The last number in the name: 2.png before 10.png."""
    digits = re.findall(r"\d+", file.stem)
    return int(digits[-1]) if digits else -1, file.name


def _open(file: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        picture = Image.open(file, formats=("PNG", "JPEG"))
    if picture.width * picture.height > MAX_PIXELS:
        raise ScanError(f"{file}: {picture.width}×{picture.height} pixels are too many.")
    return picture


def _size(file: Path) -> tuple[int, int] | None:
    try:
        with _open(file) as picture:
            return picture.size
    except Exception:  # a corrupt picture raises anything; it is reported by its name
        return None


def _grey(file: Path) -> np.ndarray | None:
    """(H, W) uint8, or None for a picture that does not decode."""
    try:
        with _open(file) as picture:
            if picture.mode.startswith(("I", "F")):  # 16 bits: convert("L") would clip, not scale
                return (np.asarray(picture).astype(np.float64) / 257).round().astype(np.uint8)
            return np.asarray(picture.convert("L"))
    except Exception:  # see _size
        return None


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
