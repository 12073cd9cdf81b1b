"""Exports of a server without accounts: what is signed there is final, but verified by nobody."""

from __future__ import annotations

import io

import pydicom
import pytest


@pytest.fixture(scope="module")
def signed(service, phantom_series):
    """A study that came as DICOM files, its report signed by a typed name, with an addendum."""
    study = service.upload(phantom_series)
    service.signed(study["id"], "Dr. Ada")
    body = {"text": "Seen again. <b>No</b> change.", "name": "Dr. Ben"}
    added = service.client.post(f"/api/studies/{study['id']}/report/addendum", json=body)
    assert added.status_code == 201, added.text
    return study


def export(service, study, **query):
    answer = service.client.get(f"/api/studies/{study['id']}/export", params=query)
    assert answer.status_code == 200, answer.text
    return answer


def test_a_typed_name_verifies_nothing(service, signed):
    made = pydicom.dcmread(io.BytesIO(export(service, signed, format="sr").content))
    assert made.CompletionFlag == "COMPLETE"
    assert made.VerificationFlag == "UNVERIFIED" and made.PreliminaryFlag == "PRELIMINARY"
    assert "VerifyingObserverSequence" not in made
    assert made.StudyInstanceUID == signed["study_uid"] and made.PatientID == signed["patient_id"]
    names = [str(one.get("PersonName", "")) for one in made.AuthorObserverSequence]
    assert "Dr. Ada^" in names


@pytest.mark.parametrize("version", ["r4", "r5"])
def test_an_addendum_is_in_every_form(service, signed, version):
    text = export(service, signed, format="text").text
    assert "Addendum: Seen again. <b>No</b> change. (Dr. Ben, not authenticated, " in text
    bundle = export(service, signed, format="fhir", version=version).json()
    report = bundle["entry"][0]["resource"]
    assert report["status"] == "preliminary"
    assert "&lt;b&gt;No&lt;/b&gt;" in report["text"]["div"]
    given = export(service, signed, format="json").json()
    assert given["signature"]["authenticated"] is False
    assert given["sentences"][-1]["section"] == "Addendum"


def test_a_draft_and_an_unknown_format_are_refused(service, study):
    path = f"/api/studies/{study['id']}/export"
    draft = service.client.get(path, params={"format": "pdf"})
    assert draft.status_code == 409 and "not signed" in draft.json()["detail"]
    assert service.client.get(path, params={"format": "docx"}).status_code == 422
    assert service.client.get(path).status_code == 422


def test_without_a_pacs_the_server_says_how_to_name_one(service, signed):
    facts = service.client.get("/api/pacs").json()
    assert facts == {"configured": False, "url": ""}
    for answer in (
        service.client.get("/api/pacs/studies"),
        service.client.get("/api/pacs/studies/1.2.3/series"),
        service.client.post("/api/pacs/import", json={"study_uid": "1.2.3"}),
        service.client.post(f"/api/studies/{signed['id']}/send", json={}),
    ):
        assert answer.status_code == 409 and "MED3DVLM_PACS_URL" in answer.json()["detail"]
    bad = service.client.post("/api/pacs/import", json={"study_uid": "../x"})
    assert bad.status_code == 422
