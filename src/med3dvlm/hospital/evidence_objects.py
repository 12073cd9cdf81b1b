"""Evidence maps on the images' own geometry: DICOM Segmentation and Parametric Map."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from highdicom import SOPClass
from highdicom.content import AlgorithmIdentificationSequence, VOILUTTransformation
from highdicom.pm import ParametricMap, RealWorldValueMapping
from highdicom.seg import (
    Segmentation,
    SegmentationFractionalTypeValues,
    SegmentationTypeValues,
    SegmentDescription,
)
from pydicom import Dataset
from pydicom.datadict import dictionary_VR
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid
from scipy.ndimage import affine_transform

from med3dvlm import __version__
from med3dvlm.hospital.objects import SERIES, UTF_8, copy_patient_and_study, equipment
from med3dvlm.hospital.report import ExportError, Model, one_line
from med3dvlm.hospital.source import TYPE_2, SourceImages
from med3dvlm.scan import Scan

NO_IMAGES = (
    "the study did not come as DICOM, so there are no images whose geometry the map could have: "
    "take the map as NIfTI."
)
EXPLANATION = "Relative weight in what the model said; no probability"


def segmentation(
    evidence: Scan, source: SourceImages | None, *, model: Model, about: str
) -> SOPClass:
    """A map as a fractional Segmentation, 255 where most; empty slices are left out.

    Args:
        evidence: in percent of the map's most, as :func:`med3dvlm.evidence.as_scan` makes it.
        about: the sentence or answer that it is the evidence for.

    Raises:
        ExportError: without images, for an empty map, or where images lie at the same place.
    """
    source, values = _on_images(evidence, source)
    described = SegmentDescription(
        segment_number=1,
        segment_label=one_line(f"Evidence: {about}", 64),
        segmented_property_category=codes.SCT.SpatialAndRelationalConcept,
        segmented_property_type=codes.DCM.SelectedRegion,
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=one_line(f"med3dvlm evidence of {model.name}", 64),
            family=codes.cid7162.ArtificialIntelligence,
            version=one_line(f"{__version__} weights {model.weights}", 64),
        ),
    )
    described.SegmentDescription = one_line(f"{EXPLANATION}. {model}. Of: {about}", 1024)
    made = _make(
        Segmentation,
        source,
        pixel_array=values,
        segmentation_type=SegmentationTypeValues.FRACTIONAL,
        # the nearest that DICOM has: a map is neither a probability nor an occupancy
        fractional_type=SegmentationFractionalTypeValues.PROBABILITY,
        segment_descriptions=[described],
        content_label="EVIDENCE",
        content_description=one_line(about, 64),
        **_identity("seg", values, source, model, about),
        **equipment(model),
    )
    return made


def parametric_map(
    evidence: Scan, source: SourceImages | None, *, model: Model, about: str
) -> SOPClass:
    """A map as a Parametric Map of 32-bit numbers, 0 to 1; arguments as :func:`segmentation`."""
    source, values = _on_images(evidence, source)
    mapping = RealWorldValueMapping(
        lut_label="EVIDENCE",
        lut_explanation=EXPLANATION,
        unit=codes.UCUM.NoUnits,
        value_range=(0.0, 1.0),
        slope=1.0,
        intercept=0.0,
    )
    made = _make(
        ParametricMap,
        source,
        pixel_array=values,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[VOILUTTransformation(window_center=0.5, window_width=1.0)],
        content_label="EVIDENCE",
        content_description=one_line(about, 64),
        **_identity("parametric-map", values, source, model, about),
        **equipment(model),
    )
    made.Laterality = ""
    return made


def on_images(evidence: Scan, source: SourceImages) -> np.ndarray:
    """(K, rows, columns) float32, 0 to 1: the map on each slice of the images, linearly."""
    first = source.first
    values = np.empty((len(source.planes), int(first.Rows), int(first.Columns)), np.float32)
    to_index = np.linalg.inv(evidence.affine)
    share = np.clip(evidence.array / 100, 0, 1)
    planes = source.planes
    if len(source.headers) == 1:  # a multi-frame file, whose order the map has to have
        planes = sorted(planes, key=lambda plane: plane.frame)
    for k, plane in enumerate(planes):
        across, down = plane.directions
        steps = np.stack([np.zeros(3), down * plane.spacing[0], across * plane.spacing[1]], axis=1)
        matrix = (to_index[:3, :3] @ steps)[::-1]  # (slice, row, column) → voxel (z, y, x)
        start = (to_index @ [*plane.position, 1])[:3][::-1]
        values[k] = affine_transform(
            share, matrix, start, (1, *values.shape[1:]), order=1, mode="nearest"
        )[0]
    return values


def _on_images(evidence: Scan, source: SourceImages | None) -> tuple[SourceImages, np.ndarray]:
    if source is None:
        raise ExportError(NO_IMAGES)
    places = {tuple(np.round(plane.position, 2)) for plane in source.planes}
    if len(places) < len(source.planes):
        raise ExportError(
            "several images lie at the same place (4D, or the same slices twice): take the map as "
            "NIfTI."
        )
    if len(source.headers) > 1 and len(source.planes) > len(source.headers):
        raise ExportError("the series is of several multi-frame files: take the map as NIfTI.")
    values = on_images(evidence, source)
    if not values.any():
        raise ExportError("the map is empty: what was said does not depend on the images.")
    return source, values


def _make(kind: type[SOPClass], source: SourceImages, **content: Any) -> SOPClass:
    """An object of highdicom, which refuses values of patient and study that are out of form.

    It gets images that state none, and then theirs as they stand.
    """
    try:
        made = kind(source_images=[_nobodys(header) for header in source.headers], **content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"the map cannot be put on these images ({' '.join(str(error).split())[:160]}): take "
            "it as NIfTI."
        ) from error
    copy_patient_and_study(made, source.first)
    made.BurnedInAnnotation = "NO"
    return made


def _nobodys(header: Dataset) -> Dataset:
    """The header of an image without what it says of patient and study, in UTF-8."""
    one = Dataset()
    for element in header:  # decodes it, by the header's own character set
        one.add(element)
    for keyword in TYPE_2:
        one.add_new(keyword, dictionary_VR(keyword), "")
    one.add_new("SpecificCharacterSet", "CS", UTF_8)
    one.file_meta = header.file_meta
    return one


def _identity(
    kind: str, values: np.ndarray, source: SourceImages, model: Model, about: str
) -> dict[str, Any]:
    """Series, instance and numbers; the same map of the same images gets the same UIDs."""
    digest = hashlib.sha256(values.tobytes())
    digest.update(repr((source.first.SeriesInstanceUID, model, about, kind)).encode())
    seed = [digest.hexdigest()]
    return {
        "series_instance_uid": generate_uid(entropy_srcs=[*seed, "series"]),
        "series_number": SERIES[kind],
        "sop_instance_uid": generate_uid(entropy_srcs=[*seed, "instance"]),
        "instance_number": 1,
        "series_description": one_line(f"Evidence: {about}", 64),
    }
