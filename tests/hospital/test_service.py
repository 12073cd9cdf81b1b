"""The whole way with a real PACS: in by STOW, found, fetched, read, reported, signed, sent back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date

import highdicom
import pydicom
import pytest
import uvicorn
from fastapi import FastAPI
from sqlalchemy import select
from starlette.testclient import httpx

from med3dvlm.hospital import Pacs
from med3dvlm.hospital.drafting import IntoService
from med3dvlm.hospital.watch import Rule, Rules, Watcher
from med3dvlm.scan import read_scan, save_nifti
from med3dvlm.service.access import Identity, keys, users
from med3dvlm.service.app import create_app
from med3dvlm.service.audit import AuditRow
from med3dvlm.service.settings import load_settings
from tests.hospital.conftest import free_port, write_series
from tests.hospital.validate import dicom_errors, texts
from tests.service.conftest import Running

KEEPER = Identity("keeper", "Keeper", "administrator", "local")
PASSWORD = "umbrella-gravel-41-tango"
SURGEON = "Dr. Zoë Ångström-山"


class Served(Running):
    """A service on a port of its own, as a browser and a program reach it."""

    url: str
    key: str
    app: FastAPI


@pytest.fixture(scope="module")
def served(pacs_address, tmp_path_factory) -> Iterator[Served]:
    """Beside the PACS, with a reviewer who is signed in and a key for a watcher."""
    port = free_port()
    settings = load_settings(
        data=tmp_path_factory.mktemp("service"),
        environment={},
        pacs_url=pacs_address.url,
        pacs_user=pacs_address.user,
        pacs_password=pacs_address.password,
        pacs_ca=str(pacs_address.ca),
        organization="Phantom General",
        user_limit=100,
    )
    app = create_app(settings)
    database = app.state.database
    users.add_user(
        database, KEEPER, "zoe", role="reviewer", password=PASSWORD, password_length=12,
        display_name=SURGEON,
    )  # fmt: skip
    _, key = keys.add_key(database, KEEPER, "watcher", role="service", days=1)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=60) as client:
        session = client.post("/api/session", json={"name": "zoe", "password": PASSWORD}).json()
        client.headers["X-CSRF-Token"] = session["csrf"]
        running = Served(client)  # type: ignore[arg-type]
        running.url, running.key, running.app = url, key, app
        yield running
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def reported(served, pacs_address, tmp_path_factory):
    """A study that came from the PACS and whose report is signed; and its headers there."""
    folder = write_series(tmp_path_factory.mktemp("story"), 26)
    slices = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
    with Pacs(pacs_address) as pacs:
        pacs.send(slices)  # in by STOW
    first = slices[0]
    answer = served.client.get("/api/pacs/studies", params={"patient_id": first.PatientID})
    (found,) = answer.json()["studies"]
    assert found["study_uid"] == first.StudyInstanceUID
    assert found["patient_name"] == str(first.PatientName) and "CT" in found["modalities"]
    listed = served.client.get(f"/api/pacs/studies/{found['study_uid']}/series").json()["series"]
    assert [one["series_uid"] for one in listed] == [first.SeriesInstanceUID]
    fetched = served.client.post("/api/pacs/import", json={"study_uid": found["study_uid"]})
    assert fetched.status_code == 202, fetched.text
    job = served.done(fetched.json()["job"])
    assert job["state"] == "done" and job["result"]["new"], job
    assert job["study"] == job["result"]["study"]
    study = served.settled(job["study"])
    assert study["state"] == "ready" and study["source"] == "pacs"
    assert study["accession_number"] == first.AccessionNumber
    draft = served.draft(study["id"])
    refused = served.client.get(f"/api/studies/{study['id']}/export", params={"format": "sr"})
    assert refused.status_code == 409 and "not signed" in refused.json()["detail"]
    sentence = next(s for s in draft["sentences"] if s["section"] == "Findings")
    job = served.client.post(
        f"/api/studies/{study['id']}/evidence", json={"sentence": sentence["id"]}
    ).json()["job"]
    assert served.done(job)["state"] == "done"
    accepted = served.accept(study["id"], draft)
    signed = served.client.post(
        f"/api/studies/{study['id']}/report/sign", json={"version": accepted["version"]}
    )
    assert signed.status_code == 200, signed.text
    return study, slices, job["id"]


def test_the_signed_report_comes_back_from_the_pacs_as_it_was_signed(
    served, pacs_address, reported, tmp_path
):
    study, slices, job = reported
    path = f"/api/studies/{study['id']}/send"
    sent = served.client.post(path, json={"format": "sr", "evidence": [job]})
    assert sent.status_code == 200, sent.text
    again = served.client.post(path, json={"format": "sr"}).json()
    uid = sent.json()["sop_instance_uids"][0]
    assert again["sop_instance_uids"] == [uid]  # stored once
    with Pacs(pacs_address) as pacs:
        series = {s.header.Modality: s for s in pacs.series(slices[0].StudyInstanceUID)}
        assert set(series) == {"CT", "SR", "SEG"} and series["SR"].images == 1
        for kind in ("SR", "SEG"):
            pacs.get(
                slices[0].StudyInstanceUID, tmp_path / kind, series_uid=series[kind].series_uid
            )
    (file,) = (tmp_path / "SR").rglob("*.dcm")
    assert dicom_errors(file) == []
    back = highdicom.sr.srread(file)
    assert uid == back.SOPInstanceUID
    assert back.PatientName == slices[0].PatientName
    assert back.VerificationFlag == "VERIFIED"
    (verifier,) = back.VerifyingObserverSequence
    assert verifier.VerifyingObserverName == f"{SURGEON}^"
    assert verifier.VerifyingOrganization == "Phantom General"
    said = " ".join(texts(pydicom.dcmread(file)))
    signed = served.client.get(f"/api/studies/{study['id']}/report").json()
    for sentence in signed["sentences"]:
        assert sentence["text"] in said
    assert signed["weights"] in said and "phantoms" in said
    assert {uid for *_, uid, _ in back.get_evidence()} == {one.SOPInstanceUID for one in slices}
    assert "Illustration of ROI" in str(back)  # the image where the evidence of a sentence peaks
    (segment,) = (tmp_path / "SEG").rglob("*.dcm")
    assert dicom_errors(segment) == []
    assert highdicom.seg.segread(segment).get_volume(rescale_fractional=True).array.max() == 1


@pytest.mark.parametrize(
    ("format", "kind", "start"),
    [
        ("sr", "application/dicom", b"\0" * 128 + b"DICM"),
        ("basic-text-sr", "application/dicom", b"\0" * 128 + b"DICM"),
        ("encapsulated-pdf", "application/dicom", b"\0" * 128 + b"DICM"),
        ("pdf", "application/pdf", b"%PDF"),
        ("fhir", "application/fhir+json", b"{"),
        ("text", "text/plain; charset=utf-8", b""),
        ("json", "application/json", b"{"),
    ],
)
def test_every_form_can_be_downloaded(served, reported, tmp_path, format, kind, start):
    study = reported[0]["id"]
    if "pdf" in format:  # the signer's name has a letter that DejaVu Sans lacks
        answer = served.client.get(f"/api/studies/{study}/export", params={"format": format})
        assert answer.status_code == 409 and "U+5C71" in answer.json()["detail"]
        return
    answer = served.client.get(f"/api/studies/{study}/export", params={"format": format})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == kind
    assert "attachment" in answer.headers["content-disposition"]
    assert answer.content.startswith(start)
    if kind == "application/dicom":
        (tmp_path / "a.dcm").write_bytes(answer.content)
        assert dicom_errors(tmp_path / "a.dcm") == []
    elif format == "json":
        assert json.loads(answer.content)["signature"]["name"] == SURGEON


@pytest.mark.parametrize("format", ["seg", "parametric-map"])
def test_evidence_can_be_downloaded(served, reported, tmp_path, format):
    study, _, job = reported
    path = f"/api/studies/{study['id']}/evidence/{job}/export"
    answer = served.client.get(path, params={"format": format})
    assert answer.status_code == 200, answer.text
    (tmp_path / "a.dcm").write_bytes(answer.content)
    assert dicom_errors(tmp_path / "a.dcm") == []
    assert served.client.get(path.replace(job, "0" * 32), params={"format": format}).is_error


def test_the_audit_log_says_what_left_and_no_name(served, reported):
    served.client.get(f"/api/studies/{reported[0]['id']}/export", params={"format": "sr"})
    with served.app.state.database.reading() as session:
        rows = session.scalars(select(AuditRow)).all()
    wanted = {"report.export", "pacs.query", "pacs.import"}
    assert wanted <= {row.action for row in rows}
    name = str(reported[1][0].PatientName).split("^")[0]
    assert not any(name in row.details + row.object for row in rows)


def test_a_report_with_an_addendum_names_the_document_before(served, pacs_address, tmp_path):
    """Of those that left: what nobody has is not referred to."""
    study = served.upload(write_series(tmp_path / "images", 33))["id"]
    served.signed(study)
    path = f"/api/studies/{study}"

    def exported(format: str) -> pydicom.Dataset:
        answer = served.client.get(f"{path}/export", params={"format": format})
        assert answer.status_code == 200, answer.text
        (tmp_path / "a.dcm").write_bytes(answer.content)
        assert dicom_errors(tmp_path / "a.dcm") == []
        return pydicom.dcmread(tmp_path / "a.dcm")

    def named(made: pydicom.Dataset) -> str:
        (item,) = made.PredecessorDocumentsSequence
        assert item.StudyInstanceUID == made.StudyInstanceUID
        return item.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID

    def add(text: str) -> None:
        assert served.client.post(f"{path}/report/addendum", json={"text": text}).is_success

    first = exported("sr")
    assert "PredecessorDocumentsSequence" not in first
    add("Seen again.")
    sent = served.client.post(f"{path}/send", json={"format": "sr"}).json()
    second = exported("sr")
    assert [second.SOPInstanceUID] == sent["sop_instance_uids"]
    assert named(second) == first.SOPInstanceUID
    assert named(exported("basic-text-sr")) == first.SOPInstanceUID  # of the other kind, if need be
    add("And again.")
    add("And once more.")
    third = exported("sr")
    assert named(third) == second.SOPInstanceUID
    assert exported("sr").SOPInstanceUID == third.SOPInstanceUID != second.SOPInstanceUID


def test_a_study_that_came_as_nifti_is_refused_clearly(served, reported, tmp_path, series):
    save_nifti(read_scan(series), tmp_path / "scan.nii.gz")
    study = served.upload(tmp_path / "scan.nii.gz")["id"]
    served.signed(study)
    path = f"/api/studies/{study}"
    refused = served.client.get(f"{path}/export", params={"format": "sr"})
    assert refused.status_code == 409 and "basic-text-sr" in refused.json()["detail"]
    assert served.client.post(f"{path}/send", json={}).status_code == 409
    text = served.client.get(f"{path}/export", params={"format": "basic-text-sr"})
    assert text.status_code == 200
    (tmp_path / "a.dcm").write_bytes(text.content)
    assert dicom_errors(tmp_path / "a.dcm") == []
    assert not pydicom.dcmread(tmp_path / "a.dcm").PatientName


def test_a_watcher_feeds_the_service_once(served, pacs_address, tmp_path):
    folder = write_series(tmp_path / "images", 29)
    slices = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
    for one in slices:
        one.StudyDate, one.StationName = f"{date.today():%Y%m%d}", "FEED"
    rules = Rules([Rule("feed", {"StationName": "FEED"})], stable_s=0.0)
    draft = IntoService(served.url, key=served.key)
    with Pacs(pacs_address) as pacs:
        pacs.send(slices)
        said: list[str] = []
        watcher = Watcher(pacs, rules, tmp_path / "watch.db", draft, say=said.append)
        assert watcher.look() == [slices[0].StudyInstanceUID], said
        entry = watcher.memory.entry(slices[0].StudyInstanceUID)
        # as after a crash just before it was remembered
        watcher.memory.note(entry.uid, state="taken")
        assert watcher.look() == [entry.uid]
        assert watcher.memory.entry(entry.uid).result == entry.result
        watcher.close()
    found = served.client.get("/api/studies", params={"text": slices[0].PatientID}).json()
    (study,) = found["studies"]
    assert study["created_by"].endswith("watcher") and study["study_uid"] == entry.uid
    deadline = time.monotonic() + 60
    while served.client.get(f"/api/studies/{study['id']}").json()["report_state"] != "draft":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(served.client.get(f"/api/studies/{study['id']}/report").json()["versions"]) == 1


def test_a_pacs_that_fails_is_a_bad_gateway(pacs_address, tmp_path):
    from fastapi.testclient import TestClient

    away = replace(pacs_address, url="http://localhost:1/dicom-web")
    for url, status, said in ((away.url, 502, "nobody answers"), ("", 409, "MED3DVLM_PACS_URL")):
        settings = load_settings(data=tmp_path, environment={}, pacs_url=url, workers=0)
        with TestClient(create_app(settings), base_url="http://localhost") as client:
            answer = client.get("/api/pacs/studies")
            assert answer.status_code == status and said in answer.json()["detail"]
