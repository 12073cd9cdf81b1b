"""Studies that are deleted: nothing of them is left, served or used, and what fails is said."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from med3dvlm.service import studies, work
from med3dvlm.service.access import Identity
from med3dvlm.service.app import create_app
from med3dvlm.service.core import Service
from med3dvlm.service.migrations import migrate
from med3dvlm.service.search import StudyIndex
from med3dvlm.service.settings import load_settings
from med3dvlm.service.tables import Study
from med3dvlm.service.work import Cancelled, Worker
from tests.service.access.conftest import Place
from tests.service.conftest import Running, running

KEEPER = Identity("keeper", "Keeper", "administrator", "user")
STUDY = "a" * 32


def add_study(core: Service) -> None:
    """A ready study with a volume."""
    volume = core.settings.data / "volume"
    volume.parent.mkdir(parents=True, exist_ok=True)
    volume.write_bytes(b"voxels")
    core.storage.put(volume, studies.key(STUDY, studies.VOLUME))
    row = Study(id=STUDY, content="c", created_by="x", source="upload", file="f", state="ready")
    with core.database.session() as session:
        session.add(row)


def hinder(data: Path) -> Callable[[], None]:
    """Let no file of the study be removed; gives what ends that.

    The folder is moved and a link put in its place, which is not followed: permissions would not
    stop a test that root runs.
    """
    folder, disk = data / "files" / "studies" / STUDY, data / "another disk"
    folder.rename(disk)
    folder.symlink_to(disk)

    def end() -> None:
        folder.unlink()
        disk.rename(folder)

    return end


def eventually(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_study_whose_files_cannot_be_removed_is_still_there_to_be_deleted(tmp_path):
    app = create_app(load_settings(data=tmp_path, environment={}, workers=0))
    core, url = app.state.service, f"/api/studies/{STUDY}"
    keeper = Place(app).with_key("keeper", "administrator")
    add_study(core)
    end = hinder(tmp_path)
    with TestClient(app, base_url="http://localhost", headers=keeper.headers) as client:
        refused = client.delete(url)
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert "could not all be removed" in refused.json()["detail"]
        assert str(tmp_path) not in refused.text
        assert client.get(url).json()["state"] == "ready"
        end()
        assert client.delete(url).status_code == 204
        assert client.get(url).status_code == 404
    assert list(core.storage.list_keys()) == []


def test_a_worker_tries_again_to_remove_what_it_put_for_a_study_that_is_gone(tmp_path):
    core = Service.open(load_settings(data=tmp_path, environment={}))
    migrate(core.database)
    add_study(core)
    worker = Worker(core)
    with core.database.session() as session:
        work.enqueue(session, "evidence", STUDY, "x")
    (job,) = worker._claim()
    studies.remove(core, STUDY, KEEPER, signed=False)
    core.storage.put(tmp_path / "volume", studies.evidence_key(STUDY, job.id))
    end = hinder(tmp_path)
    worker._finish(job, Cancelled())
    assert (tmp_path / "another disk" / "evidence").exists()
    end()
    worker._tend()
    assert list(core.storage.list_keys()) == [] and worker.left == set()
    core.close()


def test_what_another_worker_deleted_goes_from_the_servers_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "TEND_S", 0.1)
    shared = {
        "database": f"sqlite:///{tmp_path}/med3dvlm.db",
        "storage": f"memory://{tmp_path.name}",
        "index": str(tmp_path / "index"),
    }
    cache = tmp_path / "server" / "cache"
    for service in running(tmp_path / "server", workers=0, **shared):
        add_study(service.core)
        volume = f"/api/studies/{STUDY}/volume.nii.gz"
        assert service.client.get(volume).content == b"voxels"
        assert len(list(cache.iterdir())) == 1
        other = load_settings(data=tmp_path / "elsewhere", environment={}, **shared)
        elsewhere = Service.open(other)
        studies.remove(elsewhere, STUDY, KEEPER, signed=False)
        elsewhere.close()
        assert service.client.get(volume).status_code == 404
        eventually(lambda: not list(cache.iterdir()))


def retrieve(service: Running, study: str) -> dict[str, Any]:
    """The job that drafts from the nearest report, when it is over."""
    started = service.client.post(f"/api/studies/{study}/report", json={"method": "retrieve"})
    return service.done(started.json()["job"])


def test_no_draft_is_taken_from_the_report_of_a_study_that_is_gone(tmp_path, phantom_files):
    """They are deleted while another model's index is used, so that this one still has them."""
    for service in running(tmp_path):
        signed = {service.upload(path)["id"] for path in phantom_files[:2]}
        for study in signed:
            service.signed(study)
        asked = service.upload(phantom_files[2])["id"]
        service.idle()
        core = service.core
        elsewhere = replace(core, index=StudyIndex(str(tmp_path / "other.index"), core.models))
        while signed:
            nearest = retrieve(service, asked)["result"]["from_study"]
            signed.remove(nearest)  # each is the nearest once, and never again
            studies.remove(elsewhere, nearest, KEEPER, signed=True)
            assert core.index.vector(studies.key(nearest, studies.VOLUME)) is not None
        ended = retrieve(service, asked)
        assert ended["state"] == "failed" and "no signed report" in ended["error"]
