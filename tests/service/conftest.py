"""The service as it runs: the bundled model, a worker thread, a real database and real files."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from med3dvlm.data.phantoms import make_study
from med3dvlm.data.phantoms.layouts import dicom, nifti
from med3dvlm.service.app import create_app
from med3dvlm.service.settings import load_settings

WAIT_S = 60
FRESH = count(100)  # phantoms that no fixture has


@dataclass
class Running:
    """A running service, and what tests do with it over and over."""

    client: TestClient

    @property
    def core(self) -> Any:
        return self.client.app.state.service  # type: ignore[attr-defined]

    def upload(self, path: Path) -> dict[str, Any]:
        """Send a file, or the files of a folder; the study when it is ready or refused."""
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        parts = [("files", (f.name, f.read_bytes())) for f in files if f.is_file()]
        answer = self.client.post("/api/studies", files=parts)
        assert answer.status_code in (200, 202), answer.text
        return self.settled(answer.json()["id"])

    def settled(self, study: str) -> dict[str, Any]:
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            found = self.client.get(f"/api/studies/{study}").json()
            if found["state"] != "received":
                return found
            time.sleep(0.05)
        raise TimeoutError(found)

    def done(self, job: dict[str, Any] | str) -> dict[str, Any]:
        """A job when it is over."""
        job_id = job if isinstance(job, str) else job["id"]
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            found = self.client.get(f"/api/jobs/{job_id}").json()
            if found["state"] in ("done", "failed", "cancelled"):
                return found
            time.sleep(0.05)
        raise TimeoutError(found)

    def idle(self) -> None:
        """Wait until nothing is left to do, the index included."""
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until:
            with self.core.database.reading() as session:
                from med3dvlm.service.tables import ACTIVE, Job

                if session.query(Job).filter(Job.state.in_(ACTIVE)).count() == 0:
                    return
            time.sleep(0.05)
        raise TimeoutError

    def draft(self, study: str, method: str = "generate") -> dict[str, Any]:
        """A drafted report."""
        job = self.client.post(f"/api/studies/{study}/report", json={"method": method})
        assert job.status_code == 202, job.text
        ended = self.done(job.json()["job"])
        assert ended["state"] == "done", ended
        return self.client.get(f"/api/studies/{study}/report").json()

    def accept(self, study: str, report: dict[str, Any]) -> dict[str, Any]:
        """The report with every sentence that nobody looked at accepted."""
        sentences = [
            {**one, "status": "accepted"} if one["status"] == "proposed" else one
            for one in report["sentences"]
        ]
        body = {
            "base_version": report["version"],
            "sentences": [
                {k: one[k] for k in ("id", "text", "status", "section")} for one in sentences
            ],
        }
        answer = self.client.put(f"/api/studies/{study}/report", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def signed(self, study: str, name: str = "Dr. Ada") -> dict[str, Any]:
        """A study's report, drafted, accepted and signed, if it was not before."""
        found = self.client.get(f"/api/studies/{study}/report").json()
        if found["state"] == "final":
            return found
        report = self.accept(study, self.draft(study))
        body = {"version": report["version"], "name": name}
        answer = self.client.post(f"/api/studies/{study}/report/sign", json=body)
        assert answer.status_code == 200, answer.text
        return self.client.get(f"/api/studies/{study}/report").json()

    def events(self, job: str, last: str | None = None) -> list[tuple[str, str, Any]]:
        """(id, event, data) of a job's stream, to its end."""
        headers = {"Last-Event-ID": last} if last else {}
        with self.client.stream("GET", f"/api/jobs/{job}/events", headers=headers) as stream:
            assert stream.status_code == 200
            blocks = "".join(stream.iter_text()).strip().split("\n\n")
        return [_event(block) for block in blocks if not block.startswith(":")]


def _event(block: str) -> tuple[str, str, Any]:
    fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
    return fields["id"], fields["event"], json.loads(fields["data"])


def running(tmp_path: Path, **settings: Any) -> Iterator[Running]:
    """A service of its own, for as long as the generator is held."""
    app = create_app(load_settings(data=tmp_path, environment={}, **settings))
    with TestClient(app, base_url="http://localhost") as client:
        yield Running(client)


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[Running]:
    """A service that the tests of a file share: leave its studies be."""
    yield from running(tmp_path_factory.mktemp("service"), user_limit=100)


@pytest.fixture(scope="session")
def phantom_files(tmp_path_factory) -> list[Path]:
    """Four phantoms as NIfTI."""
    folder = tmp_path_factory.mktemp("phantoms")
    return [folder / nifti.write_study(make_study(i, split="test"), folder) for i in range(4)]


@pytest.fixture(scope="session")
def phantom_series(tmp_path_factory) -> Path:
    """A phantom as a folder of DICOM files."""
    folder = tmp_path_factory.mktemp("dicom")
    return folder / dicom.write_study(make_study(7, split="test"), folder)


@pytest.fixture
def fresh_study(service, tmp_path) -> dict[str, Any]:
    """A ready study that no other test has: its report may be signed."""
    number = next(FRESH)
    return service.upload(tmp_path / nifti.write_study(make_study(number, split="test"), tmp_path))


@pytest.fixture(scope="module")
def study(service, phantom_files) -> dict[str, Any]:
    """A ready study of the shared service, to be read and asked about; do not sign it."""
    return service.upload(phantom_files[0])
