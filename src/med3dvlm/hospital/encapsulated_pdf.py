"""A report as PDF, for people, and that PDF in a DICOM object, for archives."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from fpdf import FPDF
from highdicom import SOPClass
from highdicom.sr import CodedConcept
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import EncapsulatedPDFStorage

from med3dvlm.hospital.objects import new_object
from med3dvlm.hospital.report import UNSIGNED, ExportError, Report, clean, one_line
from med3dvlm.hospital.source import SourceImages

FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
TITLE = "Radiology report"
GREY, RED = (95, 95, 95), (170, 20, 20)
FACTS = (
    ("Patient", "PatientName"), ("Patient ID", "PatientID"), ("Born", "PatientBirthDate"),
    ("Sex", "PatientSex"), ("Study", "StudyDescription"), ("Date", "StudyDate"),
    ("Accession number", "AccessionNumber"), ("Referring physician", "ReferringPhysicianName"),
    ("Series", "SeriesDescription"), ("Study UID", "StudyInstanceUID"),
)  # fmt: skip


def report_pdf(
    report: Report, source: SourceImages | None, *, fonts: Sequence[str | Path] = ()
) -> bytes:
    """A report as PDF; the patient is named as the images name them, or not at all.

    Args:
        fonts: TrueType or OpenType files for what DejaVu Sans has no glyphs for, such as Chinese.

    Raises:
        ExportError: for characters that no font can show, since a box in their place would hide
            what was written.
    """
    facts = _facts(source)
    said = "".join([*(value for _, value in facts), report.text()])
    who = [value for label, value in facts if label in ("Patient", "Patient ID")]
    pdf = _Pages(unsigned=report.signature is None, foot=" · ".join(who))
    pdf.set_creation_date(report.created)
    pdf.set_title(TITLE)
    pdf.set_lang(report.language)
    pdf.use_fonts(fonts, said)
    pdf.set_auto_page_break(True, margin=18)
    pdf.add_page()
    pdf.heading(TITLE, size=16)
    if facts:
        pdf.table_of(facts)
    else:
        pdf.paragraph("The study did not come as DICOM: patient and study are not stated.", RED)
    for section, lines in report.sections():
        if section:
            pdf.heading(section)
        pdf.paragraph(clean(" ".join(line.text for line in lines)))
    pdf.heading("About this report")
    pdf.paragraph(clean(report.statement()), GREY)
    return bytes(pdf.output())


def encapsulated_pdf(
    report: Report, source: SourceImages | None, *, fonts: Sequence[str | Path] = ()
) -> SOPClass:
    """A report as Encapsulated PDF (DICOM PS3.3 A.45.1).

    Raises:
        ExportError: as :func:`report_pdf`.
    """
    document = report_pdf(report, source, fonts=fonts)
    made = new_object(
        report, source, kind="encapsulated-pdf", sop_class=EncapsulatedPDFStorage, modality="DOC",
        description="Report (PDF)",
    )  # fmt: skip
    made.ConversionType = "WSD"
    made.BurnedInAnnotation = "YES"  # it names the patient
    made.DocumentTitle = TITLE
    made.ConceptNameCodeSequence = [CodedConcept.from_code(codes.LN.DiagnosticImagingReport)]
    made.AcquisitionDateTime = ""
    made.VerificationFlag = "VERIFIED" if report.verified else "UNVERIFIED"
    made.MIMETypeOfEncapsulatedDocument = "application/pdf"
    made.EncapsulatedDocumentLength = len(document)
    made.EncapsulatedDocument = document + b"\0" * (len(document) % 2)
    if source:
        made.SourceInstanceSequence = [_reference(header) for header in source.headers]
    return made


def _reference(header: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID = header.SOPClassUID
    item.ReferencedSOPInstanceUID = header.SOPInstanceUID
    return item


def _facts(source: SourceImages | None) -> list[tuple[str, str]]:
    if source is None:
        return []
    found = []
    for label, keyword in FACTS:
        value = source.first.get(keyword, "")
        text = str(value or "").replace("^", " ").split("=")[0] if value else ""
        if keyword.endswith("Date") and len(text) == 8:
            text = f"{text[:4]}-{text[4:6]}-{text[6:]}"
        text = " ".join(clean(text).split())
        if text:
            found.append((label, text))
    return found


class _Pages(FPDF):
    """A4 pages; each says at its foot whose it is, and at its head if nobody signed."""

    def __init__(self, *, unsigned: bool, foot: str):
        super().__init__(format="A4")
        self.unsigned, self.foot = unsigned, foot

    def use_fonts(self, fonts: Sequence[str | Path], text: str) -> None:
        """Load the fonts that a text needs."""
        self.add_font("text", "", FONTS / "DejaVuSans.ttf")
        self.add_font("text", "B", FONTS / "DejaVuSans-Bold.ttf")
        for number, font in enumerate(fonts):
            try:
                self.add_font(f"other{number}", "", font)
            except Exception as error:  # fontTools raises many kinds
                raise ExportError(
                    f"font {font}: it cannot be used ({error}); give a TrueType file."
                ) from error
        self.set_fallback_fonts([f"other{number}" for number in range(len(fonts))], False)
        known = {code for font in self.fonts.values() for code in font.cmap}
        strange = sorted({char for char in text if not char.isspace() and ord(char) not in known})
        if strange:
            shown = ", ".join(f"{char!r} (U+{ord(char):04X})" for char in strange[:5])
            raise ExportError(
                f"no font has glyphs for {len(strange)} characters of the report, such as {shown}: "
                "give a font that has them, such as Noto Sans CJK, or export sr or text."
            )
        if any(unicodedata.bidirectional(char) in ("R", "AL") for char in text):
            self.set_text_shaping(True)  # from right to left, with joined letters

    def header(self) -> None:
        if self.unsigned:
            self.set_font("text", "B", 9)
            self.set_text_color(*RED)
            self.cell(0, 6, UNSIGNED, align="C", new_x="LMARGIN", new_y="NEXT")

    def footer(self) -> None:
        self.set_y(-14)
        self.set_font("text", "", 8)
        self.set_text_color(*GREY)
        self.cell(150, 6, one_line(self.foot, 90))
        self.cell(0, 6, f"{self.page_no()} / {{nb}}", align="R")

    def heading(self, text: str, *, size: int = 12) -> None:
        self.ln(3)
        self.set_font("text", "B", size)
        self.set_text_color(0)
        self.multi_cell(0, size / 2, text, new_x="LMARGIN", new_y="NEXT")

    def paragraph(self, text: str, colour: tuple[int, int, int] = (0, 0, 0)) -> None:
        self.set_font("text", "", 10.5)
        self.set_text_color(*colour)
        self.multi_cell(0, 5.5, text, align="L", new_x="LMARGIN", new_y="NEXT")

    def table_of(self, facts: list[tuple[str, str]]) -> None:
        self.set_draw_color(200)
        self.ln(2)
        for label, value in facts:
            self.set_font("text", "", 9)
            self.set_text_color(*GREY)
            self.cell(42, 5.5, label)
            self.set_text_color(0)
            self.multi_cell(0, 5.5, value, align="L", new_x="LMARGIN", new_y="NEXT")
        self.line(self.l_margin, self.get_y() + 2, self.w - self.r_margin, self.get_y() + 2)
        self.ln(3)
