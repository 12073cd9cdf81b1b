"""NIfTI: `<study>/ct.nii.gz` with the study's texts beside it."""

from __future__ import annotations

from pathlib import Path

from med3dvlm.data.phantoms.layouts.common import write_texts
from med3dvlm.data.phantoms.study import PhantomStudy
from med3dvlm.files import atomic_folder
from med3dvlm.scan.write import save_nifti

IMAGE = "ct.nii.gz"


def write_study(study: PhantomStudy, folder: Path) -> str:
    """int16 HU, axes to the left, back and head; report, truth and questions."""
    with atomic_folder(folder / study.study_id) as temporary:
        save_nifti(study.scan(), temporary / IMAGE)
        write_texts(study, temporary, IMAGE)
    return f"{study.study_id}/{IMAGE}"
