"""med3dvlm connects 3D medical scans with language: search, draft reports, answers.

    scan = med3dvlm.read_scan("series/")
    model = med3dvlm.load("demo")
    print(model.report(scan))

Names are imported when first used, so that reading a scan does not wait for the models.
Research use only; not a medical device.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

__version__ = version("med3dvlm")

_HOME = {
    "Scan": "med3dvlm.scan",
    "ScanError": "med3dvlm.scan",
    "read_scan": "med3dvlm.scan",
    "Preparation": "med3dvlm.scan",
    "prepare": "med3dvlm.scan",
    "load": "med3dvlm.hub",
    "CheckpointError": "med3dvlm.hub",
    "Med3DVLM": "med3dvlm.models",
    "VolumeTextDualEncoder": "med3dvlm.models",
}
_MODULES = ("models", "scan", "losses", "data", "train", "evaluate", "search", "picture")

__all__ = [
    "CheckpointError",
    "Med3DVLM",
    "Preparation",
    "Scan",
    "ScanError",
    "VolumeTextDualEncoder",
    "__version__",
    "data",
    "evaluate",
    "load",
    "losses",
    "models",
    "picture",
    "prepare",
    "read_scan",
    "scan",
    "search",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(f"med3dvlm.{name}")
    raise AttributeError(f"module 'med3dvlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from med3dvlm import data, evaluate, losses, models, picture, scan, search, train
    from med3dvlm.hub import CheckpointError, load
    from med3dvlm.models import Med3DVLM, VolumeTextDualEncoder
    from med3dvlm.scan import Preparation, Scan, ScanError, prepare, read_scan
