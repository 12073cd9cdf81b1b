"""What an answer rests on, and how sure it is: maps, their faithfulness, calibrated confidence."""

from med3dvlm.evidence.confidence import (
    CANNOT_TELL,
    Calibration,
    NoCalibrationError,
    Rated,
    answer_confidence,
    calibration_of,
    choice_shares,
    rate_report,
    with_withheld,
)
from med3dvlm.evidence.maps import (
    METHODS,
    as_scan,
    evidence_map,
    explain,
    place_mm,
    save_report_maps,
)
from med3dvlm.evidence.targets import (
    Target,
    answer_target,
    query_target,
    report_targets,
    text_target,
)

__all__ = [
    "CANNOT_TELL",
    "METHODS",
    "Calibration",
    "NoCalibrationError",
    "Rated",
    "Target",
    "answer_confidence",
    "answer_target",
    "as_scan",
    "calibration_of",
    "choice_shares",
    "evidence_map",
    "explain",
    "place_mm",
    "query_target",
    "rate_report",
    "report_targets",
    "save_report_maps",
    "text_target",
    "with_withheld",
]
