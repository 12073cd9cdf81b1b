"""A reader's day beside a PACS: a study is found there, brought in, read, signed, and sent back."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pydicom
import pytest
from playwright.sync_api import Page, expect
from pydicom.uid import generate_uid

from med3dvlm.hospital import Pacs, PacsAddress
from tests.hospital.conftest import PASSWORD, USER, Narrow, orthanc, write_series
from tests.hospital.validate import dicom_errors, texts
from tests.service.browser.conftest import WAIT_MS, Site, serving, sign_in, watched
from tests.service.browser.test_page import _no_serious_fault

SOME_BYTES = 600_000  # of the 3 MB that a series has


@dataclass
class Hospital:
    """A service beside a PACS, and the way between them."""

    site: Site
    way: Narrow
    address: PacsAddress

    def send(self, folder: Path, index: int, **changes: str) -> list[pydicom.Dataset]:
        """Put a phantom's series into the PACS."""
        place = write_series(folder, index, shape=(32, 160, 160))
        slices = [pydicom.dcmread(file) for file in sorted(place.iterdir())]
        for one in slices:
            for keyword, value in changes.items():
                setattr(one, keyword, value)
        with Pacs(self.address) as pacs:
            pacs.send(slices)
        return slices

    def reports(self, study_uid: str, folder: Path, count: int) -> list[Path]:
        """The Structured Reports of a study in the PACS, once there are so many, as files."""
        until = time.monotonic() + WAIT_MS / 1000
        with Pacs(self.address) as pacs:
            while True:
                found = [s for s in pacs.series(study_uid) if s.header.Modality == "SR"]
                if len(found) == count:
                    break
                assert time.monotonic() < until, found
                time.sleep(0.2)
            for one in found:
                pacs.get(study_uid, folder / one.series_uid, series_uid=one.series_uid)
        return sorted(folder.rglob("*.dcm"))


@pytest.fixture(scope="module")
def hospital(tmp_path_factory) -> Iterator[Hospital]:
    with orthanc(tmp_path_factory.mktemp("pacs")) as server:
        way = Narrow(server.port)
        settings = {
            "pacs_url": f"http://127.0.0.1:{way.port}/dicom-web",
            "pacs_user": USER,
            "pacs_password": PASSWORD,
            "organization": "Phantom General",
        }
        url = f"http://127.0.0.1:{server.port}/dicom-web"
        address = PacsAddress(url=url, user=USER, password=PASSWORD)
        with serving(tmp_path_factory.mktemp("hospital"), **settings) as site:
            yield Hospital(site, way, address)
        way.close()


@pytest.fixture
def page(browser, hospital):
    with watched(browser, hospital.site) as page:
        sign_in(page, hospital.site)
        yield page


def find(page: Page, patient_id: str):
    """The PACS's dialog, and the study that was found in it."""
    page.get_by_role("button", name="From the PACS").click()
    dialog = page.get_by_role("dialog", name="From the PACS")
    dialog.get_by_label("Patient ID").fill(patient_id)
    page.keyboard.press("Enter")
    expect(dialog.get_by_text("1 study")).to_be_visible()
    return dialog, dialog.get_by_role("listitem").first


def test_from_the_pacs_and_back(page: Page, hospital: Hospital, tmp_path):
    slices = hospital.send(tmp_path, 41)
    first = slices[0]
    hospital.way.let_through(SOME_BYTES)
    dialog, found = find(page, first.PatientID)
    expect(found).to_contain_text(f"{len(slices)} images")
    _no_serious_fault(page)
    found.get_by_role("button", name="Open").click()
    expect(dialog).to_contain_text(re.compile(rf"[1-9]\d* of {len(slices)} images"))
    hospital.way.let_through()
    expect(dialog).to_be_hidden()
    expect(page).to_have_url(re.compile(r"#/study/[0-9a-f]{32}$"))
    page.locator(".view .slice:not(:empty)").first.wait_for()
    _read_and_sign(page, hospital.site)

    _send(page)
    (sent,) = hospital.reports(first.StudyInstanceUID, tmp_path / "first", 1)
    assert dicom_errors(sent) == []
    report = pydicom.dcmread(sent)
    assert report.PatientID == first.PatientID and report.VerificationFlag == "VERIFIED"
    assert report.VerifyingObserverSequence[0].VerifyingObserverName == f"{hospital.site.shown}^"
    assert any("This was added by hand." in text for text in texts(report))
    assert "PredecessorDocumentsSequence" not in report

    page.get_by_role("button", name="Addendum").click()
    page.get_by_role("dialog").get_by_role("textbox").first.fill("Seen again: no change.")
    page.get_by_role("button", name="Add and sign").click()
    expect(page.get_by_text("Seen again: no change.")).to_be_visible()
    _send(page)
    both = [pydicom.dcmread(one) for one in hospital.reports(
        first.StudyInstanceUID, tmp_path / "second", 2
    )]  # fmt: skip
    assert all(dicom_errors(Path(one.filename)) == [] for one in both)
    (later,) = [one for one in both if one.SOPInstanceUID != report.SOPInstanceUID]
    assert any("Seen again: no change." in text for text in texts(later))
    (named,) = later.PredecessorDocumentsSequence[0].ReferencedSeriesSequence
    assert named.SeriesInstanceUID == report.SeriesInstanceUID
    assert named.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == report.SOPInstanceUID


def _read_and_sign(page: Page, site: Site) -> None:
    page.keyboard.press("r")
    page.get_by_role("button", name="Draft a report").click()
    sentences = page.locator(".sentence")
    expect(sentences.first).to_be_visible()
    page.keyboard.press("r")
    page.keyboard.press("i")
    page.keyboard.type(" This was added by hand.")
    page.keyboard.press("Enter")
    expect(sentences.first).to_have_attribute("data-status", "edited")
    page.keyboard.press("Y")
    expect(page.locator(".saved")).to_have_text("Saved")
    page.keyboard.press("S")
    dialog = page.get_by_role("dialog", name="Sign this report")
    expect(dialog).to_contain_text("This was added by hand.")
    dialog.get_by_text("I have looked at the images").click()
    dialog.get_by_role("button", name="Sign").click()
    expect(page.locator(".signature")).to_contain_text(f"Signed by {site.shown}")


def _send(page: Page) -> None:
    page.get_by_role("button", name="Send to PACS").click()
    page.get_by_role("button", name="DICOM Structured Report").last.click()
    sent = page.get_by_text("The report was sent to the PACS.")
    expect(sent).to_be_visible()
    expect(sent).to_be_hidden()  # after a while


def test_a_study_of_several_series_is_asked_about(page: Page, hospital: Hospital, tmp_path):
    slices = hospital.send(tmp_path / "one", 42, SeriesDescription="Soft kernel")
    again = {"SeriesDescription": "Sharp kernel", "SeriesInstanceUID": generate_uid()}
    with Pacs(hospital.address) as pacs:
        for one in slices:
            one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            for keyword, value in again.items():
                setattr(one, keyword, value)
        pacs.send(slices)
    _, found = find(page, slices[0].PatientID)
    found.get_by_role("button", name="Add").first.click()
    series = page.get_by_role("list", name="Series with images")
    expect(series.get_by_role("listitem")).to_have_count(2)
    sharp = series.get_by_role("listitem").filter(has_text="Sharp kernel")
    sharp.get_by_role("button", name="Add").click()
    expect(sharp).to_contain_text("Added")
    page.keyboard.press("Escape")
    row = page.locator("tr", has_text=slices[0].PatientID)
    expect(row).to_contain_text("Sharp kernel")


def test_what_is_under_way_is_seen_on_the_worklist(page: Page, hospital: Hospital, tmp_path):
    slices = hospital.send(tmp_path, 43)
    hospital.way.let_through(SOME_BYTES)
    dialog, found = find(page, slices[0].PatientID)
    found.get_by_role("button", name="Add").click()
    expect(dialog.get_by_role("progressbar")).to_be_visible()
    page.keyboard.press("Escape")
    coming = page.get_by_role("list", name="From the PACS")
    expect(coming).to_contain_text(re.compile(r"[1-9]\d* of \d+ images"))
    page.reload()  # it is the server that knows
    expect(coming.get_by_role("listitem")).to_have_count(1)
    expect(coming).to_contain_text(re.compile(r"[1-9]\d* of \d+ images"))
    _no_serious_fault(page)
    coming.get_by_role("button", name="Stop fetching").click()
    expect(coming.get_by_role("listitem")).to_have_count(0)

    hospital.way.let_through(SOME_BYTES)
    dialog, found = find(page, slices[0].PatientID)
    found.get_by_role("button", name="Add").click()
    page.keyboard.press("Escape")
    expect(coming.get_by_role("listitem")).to_have_count(1)
    hospital.way.let_through()
    page.get_by_role("button", name="Open", exact=True).click()  # of the message that it is here
    page.locator(".view .slice:not(:empty)").first.wait_for()
