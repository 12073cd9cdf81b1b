"""The hospital's side: DICOMweb, DICOM objects, FHIR. Knows nothing of the service.

with Pacs(PacsAddress(url="https://pacs/dicom-web")) as pacs:
    pacs.get(study_uid, "study/")
source = read_source("study/")
pacs.send([comprehensive_sr(report, source)])
"""

import logging
import warnings

from med3dvlm.hospital.dicomweb import FoundStudy, Pacs, PacsAddress, PacsError
from med3dvlm.hospital.encapsulated_pdf import encapsulated_pdf, report_pdf
from med3dvlm.hospital.evidence_objects import parametric_map, segmentation
from med3dvlm.hospital.fhir import fhir_bundle
from med3dvlm.hospital.objects import dicom_bytes, save_object
from med3dvlm.hospital.report import Document, ExportError, Line, Model, Report, Signature
from med3dvlm.hospital.source import SourceImages, read_source
from med3dvlm.hospital.structured_report import basic_text_sr, comprehensive_sr

__all__ = [
    "Document",
    "ExportError",
    "FoundStudy",
    "Line",
    "Model",
    "Pacs",
    "PacsAddress",
    "PacsError",
    "Report",
    "Signature",
    "SourceImages",
    "basic_text_sr",
    "comprehensive_sr",
    "dicom_bytes",
    "encapsulated_pdf",
    "fhir_bundle",
    "parametric_map",
    "read_source",
    "report_pdf",
    "save_object",
    "segmentation",
]

# they quote what they complain of, which may be a patient's name; it has no place in a log
warnings.filterwarnings("ignore", message="The string .* is unlikely to represent")
for _library in ("pydicom", "highdicom", "dicomweb_client", "retrying"):
    warnings.filterwarnings("ignore", module=_library)
    logging.getLogger(_library).setLevel(logging.ERROR)
