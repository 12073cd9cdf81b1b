"""Several people at once: who signs, who may touch whose work, and what the log says of it."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import func, select

from med3dvlm.service import reviews
from med3dvlm.service.access import Identity
from med3dvlm.service.audit import AuditRow, rows_after
from med3dvlm.service.database import new_id
from med3dvlm.service.tables import Signature, Study

ANN = Identity("reviewer", "Reviewer", "reviewer", "user")
FACTS = {"model": "demo", "method": "generate", "weights": "", "preparation": "", "text": "Clear."}


@pytest.fixture(scope="module")
def place(place):
    place.add_user("second", "reviewer")
    return place


@pytest.fixture
def study(place) -> str:
    """A study with a report whose one sentence was accepted: version 2 may be signed."""
    study = new_id()
    with place.database.session() as session:
        session.add(Study(id=study, content=study * 2, created_by="reviewer", source="upload",
                          file="a.nii", state="ready"))  # fmt: skip
        session.flush()
        sentence = {"text": "Lungs are clear.", "section": "FINDINGS", "confidence": None}
        reviews.add_draft(session, study, [sentence], FACTS)
        drafted = reviews.latest(session, study).sentences
        accepted = [{**one, "status": "accepted"} for one in drafted]
        reviews.edit(session, study, ANN, 1, accepted)
    return study


def at_once(*acts):
    """The status of each, all begun together."""
    gate, answers = threading.Barrier(len(acts)), {}

    def run(number, act):
        gate.wait()
        answers[number] = act().status_code

    threads = [threading.Thread(target=run, args=each) for each in enumerate(acts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[number] for number in range(len(acts))]


def count(place, study, action):
    statement = select(func.count()).where(
        AuditRow.object == f"study/{study}", AuditRow.action == action
    )
    with place.database.reading() as session:
        return session.scalar(statement)


def sign(place, name, study, version=2):
    client = place.signed_in(name)
    return lambda: client.post(f"/api/studies/{study}/report/sign", json={"version": version})


def edit(place, name, study, text):
    client = place.signed_in(name)
    body = {"base_version": 2, "sentences": [{"text": text, "status": "added"}]}
    return lambda: client.put(f"/api/studies/{study}/report", json=body)


def test_of_two_who_sign_at_once_one_signs(place, study):
    codes = at_once(sign(place, "reviewer", study), sign(place, "second", study))
    assert sorted(codes) == [200, 409]
    assert count(place, study, "report.sign") == 1
    with place.database.reading() as session:
        signature = session.get(Signature, study)
        row = session.scalar(select(AuditRow).where(
            AuditRow.object == f"study/{study}", AuditRow.action == "report.sign"))  # fmt: skip
    assert row.name == signature.user == ["reviewer", "second"][codes.index(200)]
    assert signature.authenticated and signature.digest in row.details


def test_one_who_signs_twice_at_once_signs_once(place, study):
    assert at_once(*[sign(place, "reviewer", study)] * 4) == [200] * 4
    assert count(place, study, "report.sign") == 1


def test_of_two_who_edit_at_once_one_edits(place, study):
    codes = at_once(*(edit(place, name, study, name) for name in ("reviewer", "second")))
    assert sorted(codes) == [200, 409]
    assert count(place, study, "report.edit") == 2  # with the fixture's


def test_what_is_signed_is_not_edited_meanwhile(place, study):
    codes = at_once(sign(place, "reviewer", study), edit(place, "second", study, "Edema."))
    assert sorted(codes) == [200, 409]
    with place.database.reading() as session:
        signed, last = session.get(Signature, study), reviews.latest(session, study)
    assert (signed.version if signed else 3) == last.version


def test_the_signers_name_is_the_accounts(place, study):
    """Not the one that the request gives."""
    body = {"version": 2, "name": "Dr. Somebody Else"}
    answer = place.signed_in("reviewer").post(f"/api/studies/{study}/report/sign", json=body)
    assert answer.json()["name"] == "reviewer" and answer.json()["authenticated"]


def test_a_job_is_called_off_by_who_asked(place, study):
    asked = {"text": "Is there pleural effusion?"}
    url = f"/api/studies/{study}/questions"
    job = place.signed_in("reader").post(url, json=asked).json()["job"]["id"]
    assert place.signed_in("reviewer").delete(f"/api/jobs/{job}").status_code == 403
    assert place.signed_in("reader").delete(f"/api/jobs/{job}").status_code == 200
    with place.database.reading() as session:
        acts = [row for row in rows_after(session) if row.object == f"job/{job}"]
    assert [(row.action, row.name) for row in acts] == [("job.cancel", "reader")]


def test_evidence_of_another_study_is_not_given(place, study):
    client = place.signed_in("reviewer")
    url = f"/api/studies/{study}/evidence/{'0' * 32}/export?format=seg"
    assert client.get(url).status_code == 404


def test_the_administrator_who_deletes_is_noted(place, study):
    client = place.signed_in("administrator")
    assert client.delete(f"/api/studies/{study}").status_code == 204
    assert count(place, study, "study.delete") == 1


def test_every_act_of_the_story_is_in_the_log(service, phantom_files):
    """From the upload to the export, in order, with who did it."""
    client = service.client
    study = service.upload(phantom_files[1])["id"]
    url = f"/api/studies/{study}"
    client.get(f"{url}/volume.nii.gz")
    job = client.post(f"{url}/questions", json={"text": "Is there cardiomegaly?"}).json()["job"]
    service.done(job)
    service.signed(study)
    client.post(f"{url}/report/addendum", json={"text": "Seen with the team.", "name": "Dr. Ada"})
    job = client.post(f"{url}/evidence", json={"text": "pleural effusion"}).json()["job"]
    service.done(job)
    assert client.get(f"{url}/export?format=text").status_code == 200
    with service.core.database.reading() as session:
        acts = [row for row in rows_after(session) if row.object == f"study/{study}"]
    assert [row.action for row in acts] == [
        "study.receive",
        "study.view",
        "study.ask",
        "report.draft",
        "report.edit",
        "report.sign",
        "report.addendum",
        "evidence.make",
        "report.export",
    ]
    assert {(row.name, row.kind) for row in acts} == {("local", "local")}
    assert not any("Ada" in row.details or "team" in row.details for row in acts)
