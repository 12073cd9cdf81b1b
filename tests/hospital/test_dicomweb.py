"""The DICOMweb client against a real Orthanc, and against servers that misbehave."""

from __future__ import annotations

from dataclasses import replace

import pydicom
import pytest

from med3dvlm import read_scan
from med3dvlm.hospital import Pacs, PacsError
from med3dvlm.hospital.dicomweb import check_uid
from tests.hospital.conftest import free_port, write_series


def headers(folder):
    files = sorted(folder.rglob("*"))
    return [pydicom.dcmread(file) for file in files if file.is_file()]


@pytest.fixture(scope="module")
def stored(pacs_address, tmp_path_factory):
    """A study in the PACS: its headers as they were sent."""
    folder = write_series(tmp_path_factory.mktemp("stored"), 5)
    with Pacs(pacs_address) as pacs:
        assert pacs.send(sorted(folder.iterdir())) == 20
    return headers(folder)


def test_a_study_is_found_by_what_it_says(pacs_address, stored):
    first = stored[0]
    with Pacs(pacs_address) as pacs:
        (found,) = pacs.find(StudyInstanceUID=first.StudyInstanceUID)
        assert found.header.PatientName == first.PatientName
        assert found.images == 20
        day = first.StudyDate
        assert pacs.find(PatientID=first.PatientID, StudyDate=f"{day}-{day}")
        assert not pacs.find(PatientID="nobody of that name")
        (series,) = pacs.series(first.StudyInstanceUID)
        assert series.series_uid == first.SeriesInstanceUID
        assert series.header.Modality == "CT" and series.images == 20
        header = pacs.first_header(first.StudyInstanceUID, first.SeriesInstanceUID)
        assert header.Manufacturer == first.Manufacturer


def test_what_is_got_is_what_was_sent(pacs_address, stored, tmp_path):
    first, steps = stored[0], []
    with Pacs(pacs_address) as pacs:
        count = pacs.get(
            first.StudyInstanceUID, tmp_path / "got", progress=lambda *done: steps.append(done)
        )
    assert count == 20 and steps == [(1, 1)]
    got = {one.SOPInstanceUID: one for one in headers(tmp_path / "got")}
    for one in stored:
        assert got[one.SOPInstanceUID].PixelData == one.PixelData
        assert got[one.SOPInstanceUID].PatientName == one.PatientName
    assert read_scan(tmp_path / "got").shape == (20, 40, 48)


def test_sending_twice_stores_once(pacs_address, stored):
    with Pacs(pacs_address) as pacs:
        pacs.send(stored[:3])
        (found,) = pacs.find(StudyInstanceUID=stored[0].StudyInstanceUID)
    assert found.images == 20


def test_nothing_is_left_of_a_study_that_is_too_large_or_not_there(pacs_address, stored, tmp_path):
    uid = stored[0].StudyInstanceUID
    with Pacs(replace(pacs_address, limit_bytes=20_000)) as pacs:
        with pytest.raises(PacsError, match="too long"):
            pacs.get(uid, tmp_path / "got")
    with Pacs(pacs_address) as pacs:
        with pytest.raises(PacsError, match="no images"):
            pacs.get("1.2.3.4", tmp_path / "got")
        with pytest.raises(PacsError, match="no UID"):
            pacs.get("../../patients", tmp_path / "got")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"password": "wrong"}, "401"),
        ({"ca": None}, "not trusted"),
        ({"url": "{}/nowhere"}, "HTTP 404"),
    ],
)
def test_a_wrong_setting_is_one_clear_sentence(pacs_address, change, reason):
    changed = {
        name: value.format(pacs_address.url) if name == "url" else value
        for name, value in change.items()
    }
    with Pacs(replace(pacs_address, **changed)) as pacs:
        with pytest.raises(PacsError, match=reason) as caught:
            pacs.find()
    assert "wrong" not in str(caught.value) and not caught.value.passing


def test_nobody_there_is_tried_again_and_then_said(pacs_address):
    address = replace(pacs_address, url=f"https://localhost:{free_port()}/dicom-web")
    with Pacs(address) as pacs, pytest.raises(PacsError, match="nobody answers") as caught:
        pacs.find()
    assert caught.value.passing


def test_a_refused_object_is_named(pacs_address):
    with (
        Pacs(pacs_address) as pacs,
        pytest.raises(PacsError, match="did not store 1 objects, such as 1.2.3"),
    ):
        broken = pydicom.Dataset()
        broken.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
        broken.SOPInstanceUID = "1.2.3"
        broken.ensure_file_meta()
        broken.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
        broken.file_meta.MediaStorageSOPClassUID = broken.SOPClassUID
        broken.file_meta.MediaStorageSOPInstanceUID = broken.SOPInstanceUID
        pacs.send([broken])


@pytest.mark.parametrize("uid", ["", ".", "..", "1..2", "1.2/..", "1.2\n", "9" * 65])
def test_what_is_no_uid_is_never_asked_for(uid):
    with pytest.raises(PacsError):
        check_uid(uid)
