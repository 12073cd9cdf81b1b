"""The layouts in which phantom studies can be written: one module each, named in `LAYOUTS`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from med3dvlm.data.phantoms.layouts import ct_rate, dicom, m3d, nifti
from med3dvlm.data.phantoms.study import PhantomStudy


@dataclass(frozen=True)
class Layout:
    """How studies are written.

    Attributes:
        write_study: writes one study under a folder; returns the path of its image in the folder.
        write_tables: writes what a folder has of all studies of a split, if there is any.
    """

    write_study: Callable[[PhantomStudy, Path], str]
    write_tables: Callable[[Path, str, Sequence[PhantomStudy]], None] | None = None


LAYOUTS: dict[str, Layout] = {
    "nifti": Layout(nifti.write_study),
    "dicom": Layout(dicom.write_study),
    "m3d": Layout(m3d.write_study, m3d.write_tables),
    "ct-rate": Layout(ct_rate.write_study, ct_rate.write_tables),
}
