"""The interface: OpenAPI, OpenAI's chat, health, metrics, deployment files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings

from med3dvlm import read_scan
from med3dvlm.service.migrations import _config
from med3dvlm.service.settings import Settings, SettingsError, load_settings

DEPLOY = Path(__file__).parents[2] / "deploy"


# --- OpenAI's chat, by what its reference says ---------------------------------------------------


def test_chat_answers_as_the_reference_says(service, study, phantom_files):
    question = "Is there pleural effusion?"
    body = {"model": "demo", "messages": [{"role": "user", "content": question}]}
    answer = service.client.post(
        "/v1/chat/completions", json={**body, "metadata": {"study": study["id"]}}
    )
    assert answer.status_code == 200, answer.text
    chat = answer.json()
    assert chat["object"] == "chat.completion" and chat["id"].startswith("chatcmpl-")
    assert isinstance(chat["created"], int) and chat["model"] == "demo"
    (choice,) = chat["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] == "stop"
    assert choice["message"]["role"] == "assistant"
    expected = service.core.models.language.ask(read_scan(phantom_files[0]), question)
    assert choice["message"]["content"] == expected
    usage = chat["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    about = chat["med3dvlm"]
    assert 0 < about["confidence"] < 1 and "phantoms" in about["notice"]


def test_chat_streams_as_the_reference_says(service, study):
    parts = [
        {"type": "text", "text": "What abnormalities are present?"},
        {"type": "study", "study": study["id"]},
    ]
    body = {
        "model": "demo",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "messages": [
            {"role": "system", "content": "You are a radiologist."},
            {"role": "user", "content": parts},
        ],
    }
    with service.client.stream("POST", "/v1/chat/completions", json=body) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert {one["object"] for one in chunks} == {"chat.completion.chunk"}
    assert len({one["id"] for one in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    text = "".join(one["choices"][0]["delta"].get("content", "") for one in chunks[:-1])
    (last,) = [
        one
        for one in service.client.get(f"/api/studies/{study['id']}/questions").json()["questions"]
        if one["text"] == parts[0]["text"]
    ]
    assert text == last["answer"] and text


def test_chat_refuses_in_the_references_form(service, study):
    ask = {"model": "demo", "messages": [{"role": "user", "content": "Is it?"}]}
    for body, status in (
        (ask, 400),
        ({**ask, "model": "gpt-4", "study": study["id"]}, 404),
        ({**ask, "metadata": {"study": "../../etc"}}, 400),
        ({**ask, "messages": [{"role": "system", "content": "x"}], "study": study["id"]}, 400),
    ):
        answer = service.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == status, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    models = service.client.get("/v1/models").json()
    assert models["object"] == "list" and models["data"][0]["id"] == "demo"


# --- any request ------------------------------------------------------------------------------


def test_no_request_makes_the_server_fail(service, study):
    """Requests made up from the OpenAPI description, right and wrong ones."""
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_dict(service.client.app.openapi())
    failed: list[str] = []

    def send(case) -> None:
        if "study_id" in (case.path_parameters or {}) and case.method == "GET":
            case.path_parameters["study_id"] = study["id"]  # else it is always another 404
        request = case.as_transport_kwargs(base_url="http://localhost")
        if isinstance(request.get("data"), bytes | str):
            request["content"] = request.pop("data")
        answer = service.client.request(**{k: v for k, v in request.items() if v is not None})
        if answer.status_code >= 500 and answer.status_code not in (503, 507):
            failed.append(f"{case.method} {request['url']}: {answer.status_code} {answer.text}")

    seen = 0
    for operation in schema.exclude(path_regex="/events$|/chat/|/pacs").get_all_operations():
        few(given(operation.ok().as_strategy())(send))()
        seen += 1
    assert seen > 30 and not failed, failed


few = settings(
    max_examples=5,
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_malformed_texts_and_numbers_are_refused_with_a_sentence(service, study):
    url = f"/api/studies/{study['id']}"
    long = "x" * 3000
    for body in ({"text": "a\0b"}, {"text": "  "}, {"text": long}, {"text": "\ud800"}, [], None):
        answer = service.client.post(
            f"{url}/questions",
            content=json.dumps(body),
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code == 422 and isinstance(answer.json()["detail"], str), body
    for path in (
        "/api/studies?cursor=99999999999999999999",
        "/api/studies?text=%00",
        "/api/studies?state=unknown",
        f"{url}/report/versions/0",
        "/api/studies/not-an-id",
        "/api/search",
        "/api/search?text=x&where=nonsense",
    ):
        answer = service.client.get(path)
        assert answer.status_code == 422 and isinstance(answer.json()["detail"], str), path
    for path in ("/api/studies/" + "0" * 32, "/api/jobs/" + "0" * 32, f"{url}/report/versions/77"):
        assert service.client.get(path).status_code == 404
    nothing = service.client.post(f"{url}/evidence", json={})
    assert nothing.status_code == 422 and "one of" in nothing.json()["detail"]


# --- running it -------------------------------------------------------------------------------


def test_health_and_metrics(service, study):
    assert service.client.get("/health/live").json() == {"status": "alive"}
    ready = service.client.get("/health/ready").json()
    assert ready == {"status": "ready", "workers": 1}
    text = service.client.get("/metrics").text
    assert 'med3dvlm_studies{state="ready"}' in text and "med3dvlm_workers 1.0" in text
    assert 'route="/api/studies/{study_id}"' in text and study["id"] not in text
    assert "med3dvlm_jobs_queued" in text and "med3dvlm_job_seconds_bucket" in text


def test_the_worklist_has_pages(service, study, phantom_files):
    for path in phantom_files[1:]:
        service.upload(path)
    seen, cursor = [], None
    while True:
        params = {"limit": 2, **({"cursor": cursor} if cursor else {})}
        page = service.client.get("/api/studies", params=params).json()
        seen += [one["id"] for one in page["studies"]]
        cursor = page["next"]
        if cursor is None:
            break
    whole = [one["id"] for one in service.client.get("/api/studies").json()["studies"]]
    assert seen == whole and len(set(seen)) == len(seen) >= 4


def test_what_is_no_scan_is_refused_with_its_reason(service, tmp_path):
    import nibabel as nib
    import numpy as np

    flat = tmp_path / "flat.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((8, 8), np.int16), np.eye(4)), flat)  # type: ignore
    study = service.upload(flat)
    assert study["state"] == "refused" and study["reason"]
    assert str(service.core.settings.data) not in study["reason"]
    url = f"/api/studies/{study['id']}"
    asked = service.client.post(f"{url}/questions", json={"text": "Is it?"})
    assert asked.status_code == 409 and study["reason"] in asked.json()["detail"]
    assert service.client.get(f"{url}/volume.nii.gz").status_code == 409
    assert service.upload(flat)["id"] == study["id"]  # the same, tried again


def test_the_schema_is_what_the_migrations_make(tmp_path):
    from alembic import command

    from med3dvlm.service.database import Database, DatabaseError
    from med3dvlm.service.migrations import current_revision, migrate

    database = Database(f"sqlite:///{tmp_path / 'x.db'}")
    with pytest.raises(DatabaseError, match="migrate"):
        current_revision(database)
    assert migrate(database) == "" and current_revision(database)
    config = _config()
    with database.engine.connect() as connection:
        config.attributes["connection"] = connection
        command.check(config)  # raises where tables and steps differ
    database.close()


def test_settings_come_from_file_environment_and_arguments(tmp_path):
    file = tmp_path / "service.yaml"
    file.write_text("port: 9000\nbatch: 3\nmodel: folder\n")
    found = load_settings(file, environment={"MED3DVLM_BATCH": "5"}, model="demo")
    assert (found.port, found.batch, found.model) == (9000, 5, "demo")
    for content in ("prot: 1\n", "port: many\n", "- a\n", "a: [\n"):
        file.write_text(content)
        with pytest.raises(SettingsError):
            load_settings(file, environment={})


def test_the_deployment_files_name_what_there_is():
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "med3dvlm.yaml").read_text()))
    named = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    assert len(named) == len(documents)
    names = {f"MED3DVLM_{name.upper()}" for name in Settings.model_fields}
    given = set(named["ConfigMap", "med3dvlm"]["data"])
    for service in ("server", "worker"):
        given |= {n for n in compose["services"][service]["environment"] if n.startswith("MED3")}
    assert given <= names
    pods = [d["spec"]["template"]["spec"] for d in documents if d["kind"] == "Deployment"]
    jobs = [d["spec"]["jobTemplate"]["spec"]["template"]["spec"] for d in documents
            if d["kind"] == "CronJob"]  # fmt: skip
    claims = {name for kind, name in named if kind == "PersistentVolumeClaim"}
    commands = [pod["containers"][0]["args"] for pod in [*pods, *jobs]]
    commands += [compose["services"][name]["command"] for name in ("server", "worker")]
    for pod in [*pods, *jobs]:
        (container,) = pod["containers"]
        volumes = {one["name"]: one for one in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        for one in volumes.values():
            assert "emptyDir" in one or one["persistentVolumeClaim"]["claimName"] in claims
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert pod["securityContext"]["runAsNonRoot"] and not pod["enableServiceLinks"]
    for command in commands:
        assert command[0] in ("serve", "work", "service")
    for kind in ("Deployment", "StatefulSet"):
        for (one, name), document in named.items():
            if one == kind:
                labels = document["spec"]["template"]["metadata"]["labels"]
                assert document["spec"]["selector"]["matchLabels"] == labels == {"app": name}
                assert ("Service", name) in named or name == "worker"
