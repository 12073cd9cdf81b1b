"""The images that a report is about, as their headers describe them."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pydicom

from med3dvlm.scan.dicom import Slice, slices_of
from med3dvlm.scan.dicom_pixels import read_dataset
from med3dvlm.scan.dicom_series import (
    Item,
    choose_series,
    files_under,
    headers_of,
    is_dicom,
    items_of,
    series_of_file,
)
from med3dvlm.scan.scan import ScanError

# of type 2: they have to be there, and may be empty
TYPE_2 = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate",
    "StudyTime", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip
REFERENCES = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")


@dataclass(frozen=True)
class SourceImages:
    """One image series without its pixels, from its first slice to its last.

    Attributes:
        headers: a data set a file, in the order of the slices.
        planes: every slice in space, one after the other along their normal.
    """

    headers: tuple[pydicom.Dataset, ...]
    planes: tuple[Slice, ...]

    @property
    def first(self) -> pydicom.Dataset:
        return self.headers[0]

    @cached_property
    def _along(self) -> np.ndarray:
        """(n,) mm along the normal of the slices."""
        return np.array([plane.position @ self._normal for plane in self.planes])

    @cached_property
    def _normal(self) -> np.ndarray:
        return np.cross(*self.planes[0].directions)

    def nearest(self, place_mm: Sequence[float]) -> tuple[pydicom.Dataset, int | None]:
        """The image whose slice is nearest to (x, y, z) LPS mm.

        Returns:
            its header and, of a multi-frame file, the number of the frame, from 1.
        """
        best = int(np.abs(self._along - np.asarray(place_mm) @ self._normal).argmin())
        plane = self.planes[best]
        uid = plane.header.dataset.SOPInstanceUID
        header = next(one for one in self.headers if one.SOPInstanceUID == uid)
        return header, plane.frame + 1 if int(header.get("NumberOfFrames", 1) or 1) > 1 else None


def read_source(path: str | Path, *, series: str | int | None = None) -> SourceImages | None:
    """The images that :func:`med3dvlm.read_scan` reads there; None where it is no DICOM.

    Raises:
        ScanError: as `read_scan` does, where the headers are damaged or several series are there;
            and where an image has no UID to refer to it by.
    """
    path = Path(path)
    if not _holds_dicom(path):
        return None
    notes: list[str] = []
    with ExitStack() as stack:  # a zip stays open until its headers are read
        items = items_of(path, stack)
        if path.is_dir() or not is_dicom(path):
            chosen = choose_series(
                str(path), list(headers_of(str(path), items, notes)), series, notes
            )
        else:
            chosen = series_of_file(path, items, notes)
            chosen = choose_series(str(path), chosen, series, notes)
        planes = [plane for header in chosen for plane in slices_of(header)]
        normal = np.cross(*planes[0].directions)
        planes.sort(key=lambda plane: (float(plane.position @ normal), plane.order))
        order = dict.fromkeys(id(plane.header) for plane in planes)
        by_id = {id(header): header for header in chosen}
        headers = [_whole_header(by_id[key].item) for key in order]
    return SourceImages(tuple(headers), tuple(planes))


def _holds_dicom(path: Path) -> bool:
    if path.is_dir():
        return next(iter(files_under(path)), None) is not None
    return path.is_file() and (is_dicom(path) or zipfile.is_zipfile(path))


def _whole_header(item: Item) -> pydicom.Dataset:
    header = read_dataset(item.name, item.read(), stop_before_pixels=True)
    for keyword in REFERENCES:
        if not str(header.get(keyword, "") or ""):
            raise ScanError(
                f"{item.name}: it has no {keyword}, so no report can refer to it; export the "
                "images again."
            )
    for keyword in TYPE_2:
        if keyword not in header:
            setattr(header, keyword, "")
    return header
