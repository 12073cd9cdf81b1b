"""Reports and evidence as DICOM, PDF and FHIR: valid by outside validators, and nothing is lost."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module

import highdicom
import numpy as np
import pydicom
import pypdf
import pytest

from med3dvlm import read_scan
from med3dvlm.evidence import as_scan
from med3dvlm.hospital import (
    Document,
    ExportError,
    Line,
    Report,
    Signature,
    dicom_bytes,
    parametric_map,
    read_source,
    segmentation,
)
from med3dvlm.hospital.evidence_objects import on_images
from med3dvlm.hospital.export import DICOM_FORMATS, FORMATS, export_report, report_object
from med3dvlm.hospital.report import clean, one_line
from med3dvlm.scan import ScanError, save_nifti
from tests.hospital.conftest import MODEL, write_series
from tests.hospital.validate import dicom_errors, texts

NOW = datetime(2026, 3, 4, 15, 6, 7, tzinfo=UTC)
NASTY = (
    "<script>alert('1')</script> \\ ^=&amp; \x00\x1b[31m\ttab\r\nnew line, "
    "Größe 3 мм, 结节 🫁, ω \ud800 \u202e end."
)
LINES = (
    Line(text="CT of the chest.", section="Technique"),
    Line(text=NASTY, section="Findings", confidence=0.834, peak_mm=(1.0, 2.0, 3.0)),
    Line(text="No effusion.", section="Findings"),
    Line(text="Nodule in the left lung.", section="Impression", confidence=0.5),
)
SIGNED = Signature(name="Dr. Zoë Ångström", signed=NOW, authenticated=True)
TYPED = replace(SIGNED, authenticated=False, name="山田太郎")
SR_FORMATS = ("sr", "basic-text-sr")
SIGNATURES = {"draft": None, "verified": SIGNED, "typed": TYPED}


def report(signature=SIGNED, lines=LINES, **facts):
    return Report(
        lines=lines, created=NOW, notice="Research.", model=MODEL, signature=signature, **facts
    )


@pytest.fixture(scope="module")
def source(series):
    return read_source(series)


@pytest.mark.parametrize("signature", SIGNATURES)
@pytest.mark.parametrize("to", DICOM_FORMATS)
@pytest.mark.parametrize("with_images", [True, False], ids=["images", "no images"])
def test_dciodvfy_finds_no_errors(tmp_path, source, to, signature, with_images):
    lines = LINES if to != "encapsulated-pdf" else (LINES[0], LINES[2], LINES[3])
    made = report(None if signature == "draft" else SIGNATURES[signature], lines)
    if signature == "typed" and to == "encapsulated-pdf":
        made = replace(made, signature=replace(TYPED, name="Ярослав Велес"))
    about = source if with_images else None
    if to == "sr" and not with_images:
        with pytest.raises(ExportError, match="basic-text-sr"):
            export_report(made, about, to)
        return
    file = tmp_path / "made.dcm"
    file.write_bytes(export_report(made, about, to).data)
    assert dicom_errors(file) == []
    read = pydicom.dcmread(file)
    assert read.SpecificCharacterSet == "ISO_IR 192"
    verified = signature == "verified"
    assert read.VerificationFlag == ("VERIFIED" if verified else "UNVERIFIED")
    assert ("VerifyingObserverSequence" in read) is (verified and to != "encapsulated-pdf")
    if with_images:
        for keyword in ("PatientName", "PatientID", "PatientBirthDate", "StudyInstanceUID",
                        "AccessionNumber", "StudyDescription", "StudyDate"):  # fmt: skip
            assert read[keyword].value == source.first[keyword].value
    else:
        assert not read.PatientName and not read.PatientID  # nobody is invented


def test_an_sr_says_all_that_the_report_says(source):
    read = pydicom.dcmread(io.BytesIO(export_report(report(), source, "sr").data))
    sr = highdicom.sr.ComprehensiveSR.from_dataset(read)
    said = texts(read)
    for line in LINES:
        assert clean(line.text) in said
    assert "\ufffd" in said[1] or any("结节 🫁" in one and "<script>" in one for one in said)
    about = [one for one in said if MODEL.weights in one]
    assert any("Zoë Ångström" in one and "Research." in one for one in about)
    (root,) = sr.content
    assert root.ContentTemplateSequence[0].TemplateIdentifier == "2000"
    kinds = [item.ConceptNameCodeSequence[0].CodeMeaning for item in read.ContentSequence]
    assert kinds[0] == "Language of Content Item and Descendants"
    assert kinds.count("Observer Type") == 2  # the model and the signer
    assert [k for k in kinds if k in ("Findings", "Impressions")] == ["Findings", "Impressions"]
    assert {uid for *_, uid, _ in sr.get_evidence()} == {
        header.SOPInstanceUID for header in source.headers
    }
    observer = read.VerifyingObserverSequence[0]
    assert observer.VerifyingObserverName == "Dr. Zoë Ångström^"
    assert observer.VerifyingOrganization == source.first.InstitutionName
    assert read.CompletionFlag == "COMPLETE" and read.PreliminaryFlag == "FINAL"


def test_a_finding_has_its_confidence_and_the_image_of_its_evidence(source):
    made = report_object(report(), source, "sr")
    findings = next(
        item
        for item in made.ContentSequence
        if item.ConceptNameCodeSequence[0].CodeMeaning == "Findings"
    )
    number, image = findings.ContentSequence[0].ContentSequence
    assert float(number.MeasuredValueSequence[0].NumericValue) == 83.4
    uid = image.ReferencedSOPSequence[0].ReferencedSOPInstanceUID
    at = {h.SOPInstanceUID: float(h.ImagePositionPatient[2]) for h in source.headers}
    assert abs(at[uid] - 3.0) == min(abs(z - 3.0) for z in at.values())


def test_the_same_report_has_the_same_uid_and_another_one_another(source):
    def uid(made, to="sr"):
        return report_object(made, source, to).SOPInstanceUID

    assert uid(report()) == uid(report())
    changed = [
        report(None),
        report(TYPED),
        report(lines=LINES[:2]),
        report(language="de"),
    ]
    assert len({uid(report()), uid(report(), "basic-text-sr"), *map(uid, changed)}) == 6
    data = [export_report(report(), source, "sr").data for _ in range(2)]
    assert data[0] == data[1]


@pytest.mark.parametrize("to", SR_FORMATS)
@pytest.mark.parametrize("with_images", [True, False], ids=["images", "no images"])
def test_a_document_names_the_one_before(tmp_path, source, to, with_images):
    if to == "sr" and not with_images:
        return
    about = source if with_images else None
    before = report_object(report(), about, to)
    document = Document(
        study_uid=before.StudyInstanceUID,
        series_uid=before.SeriesInstanceUID,
        sop_class_uid=before.SOPClassUID,
        sop_instance_uid=before.SOPInstanceUID,
    )
    lines = (*LINES, Line(text="Later.", section="Addendum"))
    without = report_object(report(lines=lines), about, to)
    assert "PredecessorDocumentsSequence" not in without
    file = tmp_path / "made.dcm"
    file.write_bytes(export_report(report(lines=lines, predecessor=document), about, to).data)
    assert dicom_errors(file) == []
    after = pydicom.dcmread(file)
    (item,) = after.PredecessorDocumentsSequence
    (series,) = item.ReferencedSeriesSequence
    (instance,) = series.ReferencedSOPSequence
    assert item.StudyInstanceUID == before.StudyInstanceUID
    assert series.SeriesInstanceUID == before.SeriesInstanceUID
    assert instance.ReferencedSOPClassUID == before.SOPClassUID
    assert instance.ReferencedSOPInstanceUID == before.SOPInstanceUID
    uids = {one.SOPInstanceUID for one in (before, without, after)}
    assert len(uids) == 3  # it is another document with a predecessor than without


def test_an_addendum_and_a_very_long_text_are_kept(tmp_path, source):
    long = ("Very long. " * 20_000).strip()
    lines = (*LINES, Line(text=long, section="Findings"), Line(text="Later.", section="Addendum"))
    file = tmp_path / "long.dcm"
    file.write_bytes(export_report(report(lines=lines), source, "sr").data)
    assert dicom_errors(file) == []
    assert long in texts(pydicom.dcmread(file))
    bundle = json.loads(export_report(report(lines=lines), source, "fhir").data)
    assert bundle["entry"][0]["resource"]["status"] == "appended"


@pytest.mark.parametrize(
    ("charset", "name"),
    [
        ("ISO_IR 100", "Müller^Jörg"),
        ("ISO_IR 144", "Велесов^Дмитрий"),
        ("\\ISO 2022 IR 87", "Yamada=山田"),
    ],
)
def test_names_keep_their_letters_from_any_character_set(tmp_path, series, charset, name):
    for file in sorted(series.iterdir()):
        one = pydicom.dcmread(file)
        one.SpecificCharacterSet, one.PatientName = charset.split("\\"), name
        one.save_as(tmp_path / file.name)
    made = report_object(report(), read_source(tmp_path), "sr")
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, made)
    stream.seek(0)
    assert str(pydicom.dcmread(stream).PatientName) == name


def test_headers_that_are_out_of_form_are_kept_and_hinder_nothing(tmp_path, series):
    odd = {
        "PatientName": "a=b=c=d",
        "PatientID": "x" * 100,
        "PatientSex": "XX",
        "PatientBirthDate": "19",
        "StudyDate": "99999999",
        "StudyTime": "25",
        "SpecificCharacterSet": "nonsense",
    }
    with pydicom.config.disable_value_validation():
        for file in series.iterdir():
            one = pydicom.dcmread(file)
            for keyword, value in odd.items():
                setattr(one, keyword, value)
            del one.AccessionNumber
            one.save_as(tmp_path / file.name)
    images, scan = read_source(tmp_path), read_scan(tmp_path)
    for to in FORMATS:
        assert export_report(report(lines=LINES[2:]), images, to).data
    evidence = as_scan(scan, np.ones(scan.shape, np.float32))
    for make in (segmentation, parametric_map):
        made = pydicom.dcmread(
            io.BytesIO(dicom_bytes(make(evidence, images, model=MODEL, about="x")))
        )
        assert made.PatientID == "x" * 100 and made.PatientSex == "XX"
        assert made.StudyDate == "99999999" and made.AccessionNumber == ""


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SOPClassUID", "SOPInstanceUID"])
def test_images_that_cannot_be_referred_to_are_refused(tmp_path, series, keyword):
    for file in series.iterdir():
        one = pydicom.dcmread(file)
        del one[keyword]
        one.save_as(tmp_path / file.name)
    with pytest.raises(ScanError, match=f"no {keyword}"):
        read_source(tmp_path)


# --- PDF ------------------------------------------------------------------------------------------


def pages(data):
    return [page.extract_text() for page in pypdf.PdfReader(io.BytesIO(data)).pages]


def test_a_pdf_names_the_patient_the_signer_and_the_model(source):
    text = "\n".join(pages(export_report(report(lines=LINES[2:]), source, "pdf").data))
    name = str(source.first.PatientName).split("^")
    for said in ("No effusion.", "Impression", "Zoë Ångström", MODEL.weights, *name):
        assert said in text
    assert "Unsigned draft" not in text


def test_every_page_of_a_draft_says_that_it_is_one(source):
    lines = (Line(text="Word. " * 3000, section="Findings"),)
    found = pages(export_report(report(None, lines), source, "pdf").data)
    assert len(found) > 3 and all("Unsigned draft" in page for page in found)
    assert all(source.first.PatientID in page for page in found)


def test_letters_that_no_font_has_are_refused_and_not_hidden(source):
    with pytest.raises(ExportError, match="U\\+7ED3"):
        export_report(report(lines=(Line(text="结节"),)), source, "pdf")


def test_right_to_left_letters_are_set(source):
    (page,) = pages(export_report(report(lines=(Line(text="שלום עולם"),)), source, "pdf").data)
    assert "שלום" in page


def test_an_encapsulated_pdf_holds_the_pdf(source):
    made = report(lines=LINES[2:])
    held = report_object(made, source, "encapsulated-pdf")
    data = held.EncapsulatedDocument[: held.EncapsulatedDocumentLength]
    assert data == export_report(made, source, "pdf").data
    assert len(held.SourceInstanceSequence) == len(source.headers)


# --- FHIR -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["r5", "r4"])
@pytest.mark.parametrize("signature", SIGNATURES)
def test_fhir_resources_validates_the_bundle(source, version, signature):
    made = report(SIGNATURES[signature])
    data = export_report(made, source, "fhir", fhir_version=version).data
    package = "fhir.resources" if version == "r5" else "fhir.resources.R4B"
    import_module(f"{package}.bundle").Bundle.model_validate_json(data)
    bundle = json.loads(data)
    resources = [entry["resource"] for entry in bundle["entry"]]
    links = {entry["fullUrl"] for entry in bundle["entry"]}
    kinds = [one["resourceType"] for one in resources]
    assert kinds[0] == "DiagnosticReport" and kinds.count("Observation") == len(LINES)
    main, patient = resources[0], resources[kinds.index("Patient")]
    assert main["status"] == ("final" if signature == "verified" else "preliminary")
    assert {one["reference"] for one in main["result"]} <= links
    assert patient["identifier"][0]["value"] == source.first.PatientID
    assert main["conclusion"] == LINES[3].text
    plain = base64.b64decode(main["presentedForm"][0]["data"]).decode()
    assert plain == made.text()
    assert "<script>" not in main["text"]["div"] and "&lt;script&gt;" in main["text"]["div"]


def test_without_images_a_bundle_has_no_patient():
    bundle = json.loads(export_report(report(), None, "fhir").data)
    kinds = {entry["resource"]["resourceType"] for entry in bundle["entry"]}
    assert not kinds & {"Patient", "ImagingStudy"}
    assert "subject" not in bundle["entry"][0]["resource"]


# --- evidence -------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [3, 4, 6], ids=["axial", "coronal", "sagittal"])
def test_evidence_lies_where_it_lies_in_the_scan(tmp_path, index):
    folder = write_series(tmp_path / "series", index)
    scan, images = read_scan(folder), read_source(folder)
    values = np.zeros(scan.shape, np.float32)
    values[5:9, 10:20, 8:30] = np.array([0.2, 0.5, 0.8, 1])[:, None, None]
    evidence = as_scan(scan, values)
    for make in (segmentation, parametric_map):
        file = tmp_path / f"{make.__name__}.dcm"
        made = make(evidence, images, model=MODEL, about=f"Nodule, 结节. {NASTY}")
        pydicom.dcmwrite(file, made, enforce_file_format=True)
        assert dicom_errors(file) == []
        assert made.PatientID == images.first.PatientID != ""
        assert made.FrameOfReferenceUID == images.first.FrameOfReferenceUID
    read = highdicom.seg.segread(tmp_path / "segmentation.dcm")
    assert read.SegmentationType == "FRACTIONAL"
    volume = read.get_volume(rescale_fractional=True)
    back = np.zeros_like(values)
    for k, j, i in np.argwhere(volume.array[..., 0] > 0):
        x, y, z = np.rint(np.linalg.inv(scan.affine) @ volume.affine @ [k, j, i, 1])[:3].astype(int)
        back[z, y, x] = volume.array[k, j, i, 0]
    np.testing.assert_allclose(back, values, atol=0.0025)
    mapped = highdicom.pm.ParametricMap.from_dataset(
        pydicom.dcmread(tmp_path / "parametric_map.dcm")
    )
    assert float(np.abs(mapped.get_volume().array).max()) == pytest.approx(1)


def test_a_map_with_other_voxels_is_interpolated(tmp_path, series, source):
    """A map saved as NIfTI and read again, on every other voxel of the scan."""
    scan = read_scan(series)
    ramp = np.broadcast_to(np.linspace(0, 1, scan.shape[2], dtype=np.float32), scan.shape)
    coarse = replace(
        scan,
        array=np.rint(100 * ramp)[::2, ::2, ::2].copy(),
        affine=scan.affine @ np.diag([2, 2, 2, 1]),
        spacing_mm=tuple(2 * mm for mm in scan.spacing_mm),
    )
    save_nifti(coarse, tmp_path / "map.nii.gz")
    values = on_images(read_scan(tmp_path / "map.nii.gz"), source)
    np.testing.assert_allclose(values[:, :, :-1], ramp[:, :, :-1], atol=0.012)


def test_evidence_that_cannot_be_placed_is_refused(series, source):
    scan = read_scan(series)
    flat = as_scan(scan, np.zeros(scan.shape, np.float32))
    with pytest.raises(ExportError, match="NIfTI"):
        segmentation(flat, None, model=MODEL, about="x")
    with pytest.raises(ExportError, match="empty"):
        segmentation(flat, source, model=MODEL, about="x")


# --- small things ---------------------------------------------------------------------------------


def test_an_empty_report_is_refused():
    with pytest.raises(ExportError, match="empty"):
        Report(lines=(Line(text=" \n"),), created=NOW, notice="")


@pytest.mark.parametrize("text", ["é" * 40, "a\\b\nc", "x" * 300, "\x00\ud800"])
def test_a_line_fits_and_divides_nothing(text):
    made = one_line(text, 64)
    assert len(made.encode()) <= 64 and "\\" not in made and "\n" not in made


def test_what_is_no_dicom_has_no_source(tmp_path, series):
    save_nifti(read_scan(series), tmp_path / "scan.nii.gz")
    assert read_source(tmp_path / "scan.nii.gz") is None
    assert read_source(tmp_path) is None
