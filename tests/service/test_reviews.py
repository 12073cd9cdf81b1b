"""Reports: nothing final before a named person signs, nothing signed twice, changes kept."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from med3dvlm.cli import app
from med3dvlm.sentences import split_report
from med3dvlm.service.access import Identity
from med3dvlm.service.audit import AuditRow, verify
from med3dvlm.service.tables import Signature
from tests.service.conftest import running


def put(service, study, version, sentences):
    body = {"base_version": version, "sentences": sentences}
    return service.client.put(f"/api/studies/{study['id']}/report", json=body)


@pytest.fixture(scope="module")
def drafted(service, phantom_files):
    study = service.upload(phantom_files[1])
    return study, service.draft(study["id"])


def test_edits_make_versions_and_keep_the_change(service, drafted):
    study, report = drafted
    first, second, *rest = report["sentences"]
    assert {one["status"] for one in report["sentences"]} == {"proposed"}
    assert all(one["original"] == one["text"] for one in report["sentences"])
    edited = put(
        service,
        study,
        1,
        [
            {"id": first["id"], "text": first["text"], "status": "accepted"},
            {"id": second["id"], "text": "Something else.", "status": "accepted"},
            *({"id": one["id"], "text": one["text"], "status": "accepted"} for one in rest[1:]),
            {"text": "Heart size is normal.", "status": "added", "section": "Findings"},
        ],
    ).json()
    assert edited["version"] == 2 and edited["versions"][1]["kind"] == "person"
    by_id = {one["id"]: one for one in edited["sentences"]}
    assert by_id[first["id"]]["status"] == "accepted"
    assert by_id[second["id"]]["status"] == "edited"
    assert by_id[second["id"]]["original"] == second["text"]
    assert by_id[rest[0]["id"]]["status"] == "rejected"  # left out
    assert "Heart size is normal." in edited["text"] and rest[0]["text"] not in edited["text"]
    url = f"/api/studies/{study['id']}/report"
    old = service.client.get(f"{url}/versions/1").json()
    assert [one["text"] for one in old["sentences"]] == [s["text"] for s in report["sentences"]]
    changes = {one["id"]: one for one in service.client.get(f"{url}/changes").json()["changes"]}
    assert changes[second["id"]]["before"] == second["text"]
    assert changes[second["id"]]["after"] == "Something else."
    assert changes[rest[0]["id"]]["after"] is None
    (added,) = [one for one in changes.values() if one["before"] is None]
    assert added["after"] == "Heart size is normal."
    # the report's text reads back into the same sentences
    texts = [one["text"] for one in edited["sentences"] if one["status"] != "rejected"]
    assert sorted(s.text for s in split_report(edited["text"])) == sorted(texts)


def test_an_edit_of_an_old_version_is_refused(service, drafted):
    study, report = drafted
    for base in (0, 1, 77):
        answer = put(service, study, base, [])
        assert answer.status_code == 409 and "moved on" in answer.json()["detail"]
    answer = put(service, study, 2, [{"id": "f" * 32, "text": "x", "status": "accepted"}])
    assert answer.status_code == 422 and "has no sentence" in answer.json()["detail"]


def test_signing(service, fresh_study):
    study = fresh_study
    url = f"/api/studies/{study['id']}/report"
    post = service.client.post
    assert post(f"{url}/sign", json={"version": 1, "name": "Ada"}).status_code == 404
    report = service.accept(study["id"], service.draft(study["id"]))
    assert post(f"{url}/sign", json={"version": 1, "name": "Ada"}).status_code == 409  # the older
    nameless = post(f"{url}/sign", json={"version": 2})
    assert nameless.status_code == 422 and "name" in nameless.json()["detail"]
    assert post(f"{url}/addendum", json={"text": "x", "name": "Ada"}).status_code == 409
    first = post(f"{url}/sign", json={"version": 2, "name": "Ada"})
    assert first.status_code == 200 and first.json()["authenticated"] is False
    assert post(f"{url}/sign", json={"version": 2, "name": "Ada"}).json() == first.json()
    assert post(f"{url}/sign", json={"version": 2, "name": "Bob"}).status_code == 409
    assert post(f"{url}/sign", json={"version": 1, "name": "Ada"}).status_code == 409
    assert put(service, study, 2, []).status_code == 409
    assert post(url, json={}).status_code == 409  # no draft over a signature
    assert post(f"{url}/addendum", json={"text": "A rib, too.", "name": "Ada"}).status_code == 201
    final = service.client.get(url).json()
    assert final["state"] == "final" and final["addenda"][0]["text"] == "A rib, too."
    assert final["versions"][-1]["state"] == "final" and final["text"] == report["text"]
    with service.core.database.reading() as session:
        object = f"study/{study['id']}"
        actions = session.scalars(select(AuditRow.action).where(AuditRow.object == object)).all()
        assert actions.count("report.sign") == 1 and verify(session).sound
    refused = service.client.delete(f"/api/studies/{study['id']}")
    assert refused.status_code in (403, 409)  # the local reviewer may not anyway


def test_of_many_who_sign_at_once_one_does(service, fresh_study):
    study = fresh_study
    service.accept(study["id"], service.draft(study["id"]))
    barrier = threading.Barrier(8)

    def sign(name: str) -> int:
        barrier.wait()
        body = {"version": 2, "name": name}
        url = f"/api/studies/{study['id']}/report/sign"
        return service.client.post(url, json=body).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = sorted(pool.map(sign, [f"Dr. {n}" for n in range(8)]))
    assert statuses == [200, *[409] * 7]
    with service.core.database.reading() as session:
        count = select(func.count()).select_from(Signature)
        assert session.scalar(count.where(Signature.study_id == study["id"])) == 1
        signature = session.get(Signature, study["id"])
    with pytest.raises(IntegrityError):  # the table itself would not take a second
        with service.core.database.session() as session:
            values = {c: getattr(signature, c) for c in ("study_id", "version", "user", "digest")}
            session.add(Signature(**values, name="Mallory", authenticated=True))


def test_drafts_without_a_language_model(service, phantom_files, fresh_study):
    service.signed(fresh_study["id"])
    study = service.upload(phantom_files[1])
    service.idle()
    retrieved = service.draft(study["id"], "retrieve")
    assert retrieved["method"] == "retrieve" and retrieved["sentences"]
    template = service.draft(study["id"], "template")
    assert template["method"] == "template" and "Impression" in template["text"]


def test_corrections_train(service, fresh_study, tmp_path):
    """What was signed goes through `prepare` and `train instruction` as they are."""
    pytest.importorskip("zarr")
    from typer.testing import CliRunner

    study = fresh_study
    report = service.signed(study["id"])
    lines = service.client.get("/api/corrections.jsonl").text.splitlines()
    rows = {row["id"]: row for row in map(json.loads, lines)}
    row = rows[study["id"]]
    assert row["report"] == report["text"] and row["split"] == "train" and row["draft"]
    assert row["draft_model"] == "demo" and row["sentences_accepted"] > 0

    from med3dvlm.service.corrections import write_corrections

    who = Identity("cli:lee", "lee", "administrator", "local")
    count = write_corrections(service.core, tmp_path / "signed", who)
    assert count == len(rows)
    assert (tmp_path / "signed" / "manifest.jsonl").read_text().splitlines() == lines
    with service.core.database.reading() as session:
        acts = select(AuditRow.name).where(AuditRow.action == "corrections.export")
        assert list(session.scalars(acts.order_by(AuditRow.id)))[-2:] == ["local", "cli:lee"]
    store, output = tmp_path / "signed.store", tmp_path / "out"
    run = CliRunner().invoke
    prepared = run(
        app,
        ["prepare", "folder", str(tmp_path / "signed"), "-o", str(store), "--preparation", "demo"],
    )
    assert prepared.exit_code == 0, prepared.output
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"stage: instruction\nstart: demo\noutput: {output}\ntrain: [projector]\n"
        f"data: {{store: {store}, tasks: {{report: 1.0}}}}\n"
        "training: {epochs: 1, batch_size: 1, learning_rate: 1.0e-4, save_steps: 100}\n"
    )
    trained = run(app, ["train", "instruction", str(recipe)])
    assert trained.exit_code == 0, (trained.output, trained.exception)
    assert (output / "model.safetensors").is_file()


def test_confidences_of_a_calibrated_model(tmp_path, phantom_files):
    """Numbers, and what is withheld."""
    import shutil

    from med3dvlm.evidence import Calibration
    from med3dvlm.hub import checkpoint_folder, load_exact, resolve

    folder = tmp_path / "model"
    shutil.copytree(resolve("demo"), folder)
    fitted = Calibration(
        weights=load_exact("demo", part="language").fingerprint(),
        vocabulary="phantoms",
        temperature=2.0,
        answers=(0.5, 0.1),
        sentences=(0.3, 0.2, 0.1, 0.4),
    )
    fitted.save(checkpoint_folder(folder))
    for service in running(tmp_path / "data", model=str(folder), threshold=0.999):
        study = service.upload(phantom_files[0])
        url = f"/api/studies/{study['id']}"
        body = {"text": "Is there pleural effusion?", "choices": ["yes", "no"]}
        answer = service.done(service.client.post(f"{url}/questions", json=body).json()["job"])
        given = answer["result"]
        assert given["calibrated"] and given["withheld"] and given["answer"] == "cannot tell"
        assert sum(given["choices_confidence"].values()) == pytest.approx(1)
        job = service.client.post(f"{url}/questions", json={"text": body["text"]}).json()["job"]
        kinds = [kind for _, kind, _ in service.events(job["id"])]
        assert "token" not in kinds  # it might have to be withheld
        report = service.draft(study["id"])
        rated = [one["confidence"] for one in report["sentences"] if one["confidence"] is not None]
        assert rated and all(0 <= one <= 1 for one in rated)
        assert all(one["withheld"] for one in report["sentences"])
        low = service.client.get(f"{url}/report", params={"threshold": 0.0}).json()
        assert [s["withheld"] for s in low["sentences"]] == [
            s["confidence"] is None for s in report["sentences"]
        ]


def test_a_study_is_thrown_away_whole(tmp_path, phantom_files):
    from med3dvlm.service import studies
    from med3dvlm.service.access import Identity
    from med3dvlm.service.studies import Conflict
    from med3dvlm.service.tables import Job, JobEvent, Question, ReportVersion, Study

    keeper = Identity("keeper", "Keeper", "administrator", "user")
    for service in running(tmp_path):
        study = service.upload(phantom_files[0])["id"]
        url = f"/api/studies/{study}"
        asked = {"text": "Is there cardiomegaly?"}
        service.done(service.client.post(f"{url}/questions", json=asked).json()["job"])
        service.signed(study)
        service.idle()
        with pytest.raises(Conflict, match="signed=true"):
            studies.remove(service.core, study, keeper, signed=False)
        studies.remove(service.core, study, keeper, signed=True)
        assert service.client.get(url).status_code == 404
        assert list(service.core.storage.list_keys()) == []
        assert service.client.get("/api/search?text=heart").json()["hits"] == []
        with service.core.database.reading() as session:
            for table in (Study, Job, JobEvent, Question, ReportVersion, Signature):
                assert session.scalars(select(table)).all() == []
            assert verify(session).sound
            assert "study.delete" in session.scalars(select(AuditRow.action)).all()
        assert service.upload(phantom_files[0])["id"] != study


def test_without_a_calibration_there_are_no_confidences(tmp_path, phantom_files):
    import shutil

    from med3dvlm.hub import resolve

    folder = tmp_path / "model"
    shutil.copytree(resolve("demo"), folder, ignore=shutil.ignore_patterns("calibration.json"))
    for service in running(tmp_path / "data", model=str(folder)):
        study = service.upload(phantom_files[0])
        url = f"/api/studies/{study['id']}"
        body = {"text": "Is there pleural effusion?", "choices": ["yes", "no"]}
        asked = service.done(service.client.post(f"{url}/questions", json=body).json()["job"])
        assert asked["result"]["confidence"] is None and asked["result"]["calibrated"] is False
        assert asked["result"]["choices_confidence"] is None
        report = service.draft(study["id"])
        assert report["calibrated"] is False
        assert {one["confidence"] for one in report["sentences"]} == {None}
