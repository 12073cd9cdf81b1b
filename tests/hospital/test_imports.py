"""Studies from a PACS through the queue; the PACS is slow, silent, dies, workers are killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
import pytest
from sqlalchemy import select

from med3dvlm.hospital import Pacs, PacsAddress
from med3dvlm.service.audit import AuditRow
from med3dvlm.service.database import Database
from med3dvlm.service.settings import load_settings
from med3dvlm.service.tables import Study
from tests.hospital.conftest import PASSWORD, USER, Narrow, Orthanc, orthanc, write_series
from tests.service.conftest import Running, running
from tests.service.processes import Process, wait
from tests.service.test_faults import workers

SHAPE = (32, 160, 160)  # of 160 slices, 3 MB: several pieces of what is streamed
SOME_BYTES = 600_000  # of it


@dataclass
class Beside:
    """A PACS with one study, and the narrow way to it."""

    folder: Path
    server: Orthanc
    way: Narrow
    slices: list[pydicom.Dataset]

    @property
    def uid(self) -> str:
        return self.slices[0].StudyInstanceUID

    def settings(self, **more: Any) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.way.port}/dicom-web"
        return {"pacs_url": url, "pacs_user": USER, "pacs_password": PASSWORD, **more}

    def address(self) -> PacsAddress:
        url = f"http://127.0.0.1:{self.server.port}/dicom-web"
        return PacsAddress(url=url, user=USER, password=PASSWORD)


@pytest.fixture(scope="module")
def phantom(tmp_path_factory) -> list[pydicom.Dataset]:
    folder = write_series(tmp_path_factory.mktemp("images"), 31, shape=SHAPE)
    return [pydicom.dcmread(file) for file in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def kept(tmp_path_factory, phantom) -> Iterator[Beside]:
    with beside(tmp_path_factory.mktemp("pacs"), phantom) as found:
        yield found


@pytest.fixture
def pacs(kept) -> Iterator[Beside]:
    """The same PACS for every test, and a way to it of its own."""
    kept.way = Narrow(kept.server.port)
    yield kept
    kept.way.close()


@contextmanager
def beside(folder: Path, slices: list[pydicom.Dataset]) -> Iterator[Beside]:
    with orthanc(folder) as server:
        found = Beside(folder, server, Narrow(server.port), slices)
        with Pacs(found.address()) as connection:
            connection.send(slices)
        yield found
        found.way.close()


def ask(client: Any, pacs: Beside, **more: Any) -> dict[str, Any]:
    answer = client.post("/api/pacs/import", json={"study_uid": pacs.uid, **more})
    assert answer.status_code == 202, answer.text
    return answer.json()["job"]


def receiving(client: Any, job: dict[str, Any]) -> dict[str, Any]:
    """The job once some of its images are here."""
    until = time.monotonic() + 180
    while time.monotonic() < until:
        found = client.get(f"/api/jobs/{job['id']}").json()
        if (found["progress"] or {}).get("received"):
            return found
        assert found["state"] in ("queued", "running"), found
        time.sleep(0.05)
    raise TimeoutError(found)


def actions(service: Running) -> list[tuple[str, str]]:
    with service.core.database.reading() as session:
        return [(row.action, row.object) for row in session.scalars(select(AuditRow))]


def test_a_slow_pacs_holds_neither_requests_nor_the_model(pacs, tmp_path, series):
    pacs.way.let_through(SOME_BYTES)
    for service in running(tmp_path, **pacs.settings()):
        job = ask(service.client, pacs)  # answered, though the PACS is silent until below
        assert job["kind"] == "fetch" and job["study"] is None
        assert ask(service.client, pacs)["id"] == job["id"]  # is being fetched already
        found = receiving(service.client, job)
        progress = found["progress"]
        assert 0 < progress["received"] < progress["of"] == len(pacs.slices)
        assert progress["patient_id"] == pacs.slices[0].PatientID and progress["bytes"] > 0
        listed = service.client.get("/api/pacs/imports").json()["jobs"]
        assert [one["id"] for one in listed] == [job["id"]]
        other = service.upload(series)  # which the worker prepares meanwhile
        assert service.draft(other["id"])["sentences"]
        pacs.way.let_through()
        ended = service.done(job)
        assert ended["state"] == "done" and ended["result"]["new"] is True
        study = service.settled(ended["study"])
        assert study["state"] == "ready" and study["source"] == "pacs"
        assert study["study_uid"] == pacs.uid and study["shape"] == list(SHAPE)
        kinds = [kind for _, kind, _ in service.events(job["id"])]
        assert kinds[-1] == "done" and "progress" in kinds
        assert service.client.get("/api/pacs/imports").json()["jobs"] == []
        noted = actions(service)
        assert ("pacs.import", f"job/{job['id']}") in noted
        assert ("study.receive", f"study/{study['id']}") in noted
        again = service.done(ask(service.client, pacs))
        assert again["result"] == {"study": study["id"], "new": False}
        assert len(service.client.get("/api/studies").json()["studies"]) == 2
        assert not list((tmp_path / "incoming").iterdir())


def test_a_silent_pacs_can_be_called_off(pacs, tmp_path):
    """It may be silent for a minute: cancelling does not wait for that."""
    pacs.way.let_through(SOME_BYTES)
    for service in running(tmp_path, **pacs.settings(pacs_timeout_s=60)):
        job = ask(service.client, pacs)
        receiving(service.client, job)
        assert service.client.delete(f"/api/jobs/{job['id']}").status_code == 200
        began = time.monotonic()
        assert service.done(job)["state"] == "cancelled"
        assert time.monotonic() - began < 10
        assert service.client.get("/api/studies").json()["studies"] == []
        assert ("job.cancel", f"job/{job['id']}") in actions(service)
        pacs.way.let_through()
        assert service.done(ask(service.client, pacs))["state"] == "done"


def test_a_silent_pacs_ends_the_job_with_a_sentence(pacs, tmp_path):
    pacs.way.let_through(SOME_BYTES)
    for service in running(tmp_path, **pacs.settings(pacs_timeout_s=0.4)):
        ended = service.done(ask(service.client, pacs))
        assert ended["state"] == "failed" and "does not answer in time" in ended["error"]
        assert service.client.get("/api/studies").json()["studies"] == []
        (listed,) = service.client.get("/api/pacs/imports").json()["jobs"]
        assert listed["id"] == ended["id"] and listed["progress"]["description"]
        assert not list((tmp_path / "incoming").iterdir())


def test_a_server_that_stops_does_not_wait_for_a_silent_pacs(pacs, tmp_path):
    pacs.way.let_through(SOME_BYTES)
    for service in running(tmp_path, **pacs.settings(pacs_timeout_s=60)):
        job = ask(service.client, pacs)
        receiving(service.client, job)
        began = time.monotonic()
    assert time.monotonic() - began < 15
    pacs.way.let_through()
    for service in running(tmp_path, **pacs.settings()):  # where it is taken up
        ended = service.done(job)
        assert ended["state"] == "done" and ended["attempts"] == 1


def test_a_pacs_that_dies_midway(tmp_path, phantom):
    """Killed in the middle of a study: nothing is half there, and it is fetched once it is back."""
    with beside(tmp_path, phantom) as pacs:
        pacs.way.let_through(SOME_BYTES)
        for service in running(tmp_path / "service", **pacs.settings()):
            job = ask(service.client, pacs)
            receiving(service.client, job)
            pacs.server.kill()
            pacs.way.cut()
            pacs.way.let_through()
            ended = service.done(job)
            assert ended["state"] == "failed", ended
            assert "nobody answers" in ended["error"] or "broke" in ended["error"]
            assert service.client.get("/api/studies").json()["studies"] == []
            with orthanc(tmp_path, pacs.server.port):
                ended = service.done(ask(service.client, pacs))
                assert ended["state"] == "done", ended
                assert service.settled(ended["study"])["state"] == "ready"


def test_fewer_images_than_the_pacs_lists_are_not_taken_in(pacs, tmp_path, monkeypatch):
    write = Pacs._write

    def cut_short(self, *arguments: Any) -> tuple[int, int]:
        count, left = write(self, *arguments)
        return count - 1, left

    monkeypatch.setattr(Pacs, "_write", cut_short)
    for service in running(tmp_path, **pacs.settings()):
        ended = service.done(ask(service.client, pacs))
        assert ended["state"] == "failed" and "sent 159 of the 160 images" in ended["error"]
        assert service.client.get("/api/studies").json()["studies"] == []
        assert not list((tmp_path / "files").rglob("*.zip"))


def test_what_the_pacs_does_not_have(pacs, tmp_path):
    for service in running(tmp_path, **pacs.settings()):
        for asked, said in (
            ({"study_uid": "1.2.3"}, "no images of that study"),
            ({"study_uid": pacs.uid, "series_uid": "1.2.3"}, "no such series"),
        ):
            job = service.client.post("/api/pacs/import", json=asked).json()["job"]
            ended = service.done(job)
            assert ended["state"] == "failed" and said in ended["error"]


def test_a_worker_killed_while_it_fetches(pacs, tmp_path):
    """kill -9 in the middle: the next worker begins anew, and there is one study."""
    pacs.way.let_through(SOME_BYTES)
    with Process(
        "serve", tmp_path, arguments=["--workers", "1"], lease_s=2, **pacs.settings()
    ) as server:
        server.ready()
        with server.client as client:
            job = ask(client, pacs)
            receiving(client, job)
            (first,) = workers(server)
            os.kill(first, signal.SIGKILL)
            left = tmp_path / "incoming" / f"fetch-{job['id']}-1"
            assert left.is_dir()
            pacs.way.let_through()
            ended = wait(client, f"/api/jobs/{job['id']}", "state", ["done", "failed"])
            assert ended["state"] == "done" and ended["attempts"] == 2
            assert not left.exists()
            found = wait(client, f"/api/studies/{ended['study']}", "state", ["ready", "refused"])
            assert found["state"] == "ready"
    database = Database(load_settings(data=tmp_path, environment={}).database_url)
    with database.reading() as session:
        assert len(session.scalars(select(Study)).all()) == 1
        noted = [row.action for row in session.scalars(select(AuditRow))]
        assert noted.count("study.receive") == noted.count("pacs.import") == 1
    database.close()


def test_a_fetch_whose_worker_always_dies_is_marked(pacs, tmp_path):
    pacs.way.let_through(SOME_BYTES)
    with Process(
        "serve", tmp_path, arguments=["--workers", "1"], lease_s=5, attempts=1, **pacs.settings()
    ) as server:
        server.ready()
        with server.client as client:
            job = ask(client, pacs)
            receiving(client, job)
            os.kill(workers(server)[0], signal.SIGKILL)
            ended = wait(client, f"/api/jobs/{job['id']}", "state", ["done", "failed"])
            assert ended["state"] == "failed" and "its worker died" in ended["error"]
            assert client.get("/api/studies").json()["studies"] == []
