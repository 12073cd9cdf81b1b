"""`med3dvlm users`, `keys` and `audit`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from med3dvlm.cli import app
from med3dvlm.service.database import Database
from tests.service.access.conftest import PASSWORD


@pytest.fixture
def run(tmp_path):
    def run(*arguments, input=None, status=0):
        result = CliRunner().invoke(app, [*arguments, "--data", str(tmp_path)], input=input)
        if status == 0 and result.exception is not None:
            raise result.exception
        assert result.exit_code == status, result.output
        return result

    return run


def test_accounts(run):
    made = run("users", "add", "Ann", "--role", "reviewer", input=f"{PASSWORD}\n")
    assert made.stdout == "ann: reviewer\n"
    run("users", "role", "ann", "reader")
    run("users", "password", "ann", input=f"other-{PASSWORD}\n")
    run("users", "disable", "ann")
    (ann,) = json.loads(run("users", "list", "--json").stdout)
    assert (ann["name"], ann["role"]) == ("ann", "reader") and ann["disabled"]
    assert "password" not in ann
    run("users", "disable", "ann", "--undo")
    assert "ann" in run("users", "list").stdout


def test_a_password_is_no_argument(run):
    result = run("users", "add", "ann", PASSWORD, "--role", "reader", status=2)
    assert "password" in run("users", "add", "--help").output
    assert result.exit_code == 2


def test_keys(run):
    token = run("keys", "add", "router", "--role", "service", "--days", "30").stdout.strip()
    assert token.startswith("m3d_")
    listed = run("keys", "list", "--json").stdout
    assert token not in listed and json.loads(listed)[0]["hint"] == token[:8]
    run("keys", "revoke", "router")
    assert json.loads(run("keys", "list", "--json").stdout)[0]["revoked"]


def test_the_log(run, tmp_path):
    run("users", "add", "ann", "--role", "reader", input=f"{PASSWORD}\n")
    run("users", "role", "ann", "reviewer")
    noted = run("audit", "verify").stdout.split("note this: ")[1].strip()
    lines = run("audit", "export").stdout.splitlines()
    assert [json.loads(line)["action"] for line in lines] == [
        "user.add", "user.change", "audit.export"]  # fmt: skip
    assert json.loads(lines[0])["name"].startswith("cli:")
    run("audit", "export", "-o", str(tmp_path / "log.jsonl"), "--after", "2")
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    assert "4 rows" in run("audit", "verify", "--expected", noted).stdout
    database = Database(f"sqlite:///{tmp_path / 'med3dvlm.db'}")
    with database.session() as session:
        session.execute(text("DROP TRIGGER audit_no_delete"))
        session.execute(text("DELETE FROM audit WHERE id = 2"))
    verdict = json.loads(run("audit", "verify", "--json", status=1).stdout)
    assert (verdict["sound"], verdict["broken"]) == (False, 2)
    run("audit", "verify", "--expected", "nonsense", status=2)


def test_faults_are_one_sentence(tmp_path):
    command = [sys.executable, "-m", "med3dvlm.cli", "users", "add", "ann", "--role", "king"]
    command += ["--data", str(tmp_path)]
    result = subprocess.run(command, input=f"{PASSWORD}\n", capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: role 'king' is unknown") and len(
        result.stderr.splitlines()) == 1  # fmt: skip
