"""Outside validators, and what a report says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pydicom
import pytest


def dicom_errors(path: Path) -> list[str]:
    """What dciodvfy (dicom3tools) calls errors in a DICOM file."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed: apt-get install dicom3tools")
    done = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, timeout=60)
    lines = (done.stdout + done.stderr).decode("utf-8", "replace").splitlines()
    assert lines, "dciodvfy said nothing, not even what it read"
    return [line for line in lines if line.startswith(("Error", "EError"))]


def texts(dataset: pydicom.Dataset) -> list[str]:
    """All text values of a content tree, in their order."""
    found = [str(dataset.TextValue)] if dataset.get("ValueType") == "TEXT" else []
    return found + [t for item in dataset.get("ContentSequence", ()) for t in texts(item)]
