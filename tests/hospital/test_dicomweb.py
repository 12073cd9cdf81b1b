"""The DICOMweb client against a real Orthanc, and against servers that misbehave."""

from __future__ import annotations

import gzip
import json
import time
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pydicom
import pytest

from med3dvlm import read_scan
from med3dvlm.hospital import Pacs, PacsAddress, PacsError
from med3dvlm.hospital.dicomweb import ANSWER_BYTES, check_uid
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


# --- servers that misbehave -----------------------------------------------------------------------


class Odd(BaseHTTPRequestHandler):
    """Answers as `behave` of its server says."""

    def do_GET(self):
        self.server.asked += 1
        self.server.behave(self)

    do_POST = do_GET

    def say(self, status, body=b"", kind="application/dicom+json", **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def odd():
    """A function: a PACS that behaves so, and its server."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        server.handle_error = lambda *_: None  # of clients that hang up
        server.asked = 0
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        address = PacsAddress(
            url=f"http://127.0.0.1:{server.server_port}/dicom-web",
            attempts=3,
            wait_s=0.01,
            timeout_s=(1, 0.3),
        )

        def start(behave):
            server.behave = behave
            return Pacs(address), server

        yield start
        server.shutdown()


def endless(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/dicom+json")
    handler.end_headers()
    with suppress(OSError):
        while True:
            handler.wfile.write(b"[" * 2**16)


@pytest.mark.parametrize(
    ("behave", "reason", "asked"),
    [
        (lambda h: h.say(503), "too busy", 3),
        (lambda h: h.say(429), "too busy", 3),
        (lambda h: h.say(500, b"<h1>failed</h1>"), "HTTP 500: <h1>failed", 1),
        (lambda h: h.say(403), "may not", 1),
        (lambda h: h.say(302, location="http://elsewhere.example/"), "elsewhere.example", 1),
        (lambda h: h.say(200, b"<html>", "text/html"), "not DICOMweb", 1),
        (lambda h: h.say(200, b'[{"00100010": 7}, 3, "x"]'), "not DICOMweb", 1),
        (lambda h: time.sleep(0.8), "does not answer|nobody answers", 3),
        (endless, "too long", 1),
    ],
    ids=["503", "429", "500", "403", "redirect", "html", "odd JSON", "silent", "endless"],
)
def test_a_server_that_misbehaves_is_one_sentence(odd, behave, reason, asked):
    pacs, server = odd(behave)
    with pacs, pytest.raises(PacsError, match=reason) as caught:
        pacs.find()
    assert server.asked == asked
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_an_answer_that_unfolds_without_end_is_refused(odd):
    data = gzip.compress(b"[" * (ANSWER_BYTES + 2**21), 1)
    pacs, server = odd(lambda h: h.say(200, data, **{"Content-Encoding": "gzip"}))
    with pacs, pytest.raises(PacsError, match="too long"):
        pacs.find()
    assert server.asked == 1


def test_a_server_that_knows_no_pages_is_asked_twice_at_most(odd):
    study = {"0020000D": {"vr": "UI", "Value": ["1.2.3"]}}
    listed = [{**study, "0020000D": {"vr": "UI", "Value": [f"1.2.{i}"]}} for i in range(250)]
    body = json.dumps(listed).encode()
    pacs, server = odd(lambda handler: handler.say(200, body))
    with pacs:
        assert len(pacs.find(limit=1000)) == 250
    assert server.asked == 2


def test_a_busy_server_that_recovers_is_no_failure(odd):
    def behave(handler):
        handler.say(503) if handler.server.asked < 3 else handler.say(200, b"[]")

    pacs, server = odd(behave)
    with pacs:
        assert pacs.find() == []
    assert server.asked == 3


def test_another_study_than_asked_for_is_refused(odd, series, tmp_path):
    data = next(series.iterdir()).read_bytes()
    body = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + data + b"\r\n--b--"
    kind = 'multipart/related; type="application/dicom"; boundary=b'
    pacs, _ = odd(lambda handler: handler.say(200, body, kind))
    with pacs, pytest.raises(PacsError, match="another study"):
        pacs.get("1.2.3", tmp_path / "got", series_uid="1.2.3.4")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("framed", [True, False])
def test_an_answer_that_ends_with_its_connection_is_no_whole_series(odd, series, tmp_path, framed):
    """A server that dies while it sends, where HTTP does not say how long the answer is."""
    data = next(series.iterdir()).read_bytes()
    part = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + data + b"\r\n"

    def behave(handler):
        handler.send_response(200)
        handler.send_header(
            "Content-Type", 'multipart/related; type="application/dicom"; boundary=b'
        )
        if framed:
            handler.send_header("Content-Length", str(2 * len(part) + 5))
        handler.end_headers()
        handler.wfile.write(part + part[: len(part) // 2])
        handler.close_connection = True

    study = pydicom.dcmread(next(series.iterdir())).StudyInstanceUID
    pacs, server = odd(behave)
    with pacs, pytest.raises(PacsError, match="broke while it sent|nobody answers") as caught:
        pacs.get(study, tmp_path / "got", series_uid="1.2.3.4")
    assert caught.value.passing and server.asked == 3
    assert not list(tmp_path.iterdir())


def test_a_password_is_in_no_message_and_no_repr(pacs_address):
    assert pacs_address.password not in repr(pacs_address) + str(pacs_address)
    with pytest.raises(PacsError, match="apart"):
        PacsAddress(url="https://me:secret@pacs/dicom-web")
