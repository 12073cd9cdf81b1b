"""Accounts and keys."""

import json
from datetime import timedelta
from urllib.parse import quote

import pytest
from sqlalchemy import update

from med3dvlm.service.access import keys, users
from med3dvlm.service.access.tables import ApiKey
from med3dvlm.service.audit import rows_after
from med3dvlm.service.database import Database, utc_now
from med3dvlm.service.migrations import migrate
from tests.service.access.conftest import KEEPER, PASSWORD

JSON = {"Content-Type": "application/json"}


def test_accounts_over_http(place):
    client = place.signed_in("administrator")
    body = {"name": "Ann", "role": "reader", "password": PASSWORD, "display_name": "Dr. Ann"}
    made = client.post("/api/users", json=body)
    assert made.status_code == 201
    assert made.json()["name"] == "ann" and "password" not in made.json()
    assert "already" in client.post("/api/users", json=body).json()["detail"]
    assert client.patch("/api/users/ann", json={"role": "reviewer"}).json()["role"] == "reviewer"
    assert client.patch("/api/users/ann", json={"password": "x"}).status_code == 422
    assert client.patch("/api/users/nobody", json={"role": "reader"}).status_code == 404
    assert client.patch("/api/users/ann", json={"role": "king"}).status_code == 422
    assert client.patch("/api/users/ann", json={"surprise": 1}).status_code == 422
    half = {"role": "king", "password": f"another-{PASSWORD}"}
    assert client.patch("/api/users/ann", json=half).status_code == 422
    with place.database.reading() as session:
        acts = [row.action for row in rows_after(session) if row.object == "user/ann"]
    assert acts == ["user.add", "user.change"]  # all of it or nothing
    assert client.delete("/api/users/ann").json()["disabled"]
    assert {"ann", "administrator"} <= {user["name"] for user in client.get("/api/users").json()}


@pytest.mark.parametrize("name", ["", " ", "a b", "../x", "a\nb", "ünal", "x" * 65, "-a", "local"])
def test_names_that_cannot_be(name):
    with pytest.raises(users.AccountError):
        users.account_name(name)


@pytest.mark.parametrize("name", ["", "\x00", "a\x1b[31mb", "x" * 129, "\u202ertl"])
def test_display_names_that_cannot_be(name):
    with pytest.raises(users.AccountError):
        users.readable_name(name)


def test_the_last_administrator_stays(tmp_path):
    database = Database(f"sqlite:///{tmp_path / 'new.db'}")
    migrate(database)

    def add(name):
        users.add_user(
            database, KEEPER, name, role="administrator", password=PASSWORD, password_length=12
        )

    add("root")
    for change in ({"role": "reader"}, {"disabled": True}):
        with pytest.raises(users.AccountError, match="last administrator"):
            users.change_user(database, KEEPER, "root", **change)
    add("other")
    users.change_user(database, KEEPER, "root", disabled=True)
    with pytest.raises(users.AccountError, match="last administrator"):
        users.change_user(database, KEEPER, "other", role="reader")


def test_a_key_is_shown_once_and_kept_as_a_hash(place):
    client = place.signed_in("administrator")
    made = client.post("/api/keys", json={"name": "router-1", "role": "service", "days": 30}).json()
    assert made["key"].startswith("m3d_") and len(made["key"]) > 40
    listed = client.get("/api/keys").text
    assert made["key"] not in listed and made["hint"] in listed
    with place.database.reading() as session:
        stored = session.get(ApiKey, made["id"])
        assert made["key"] not in str(vars(stored))
    program = place.client(headers={"Authorization": f"Bearer {made['key']}"})
    assert program.get("/api/session").json()["user"] == "key:router-1"
    assert client.delete(f"/api/keys/{made['id']}").json()["revoked"]
    assert program.get("/api/session").status_code == 401


def test_keys_end(place):
    program = place.with_key("router-2", "service")
    assert program.get("/api/session").status_code == 200
    with place.database.session() as session:
        ended = update(ApiKey).where(ApiKey.name == "router-2")
        session.execute(ended.values(expires=utc_now() - timedelta(seconds=1)))
    assert program.get("/api/session").status_code == 401
    for days in (0, -1, 367, float("inf"), float("nan")):
        with pytest.raises(users.AccountError, match="must end"):
            keys.add_key(place.database, KEEPER, "other", role="reader", days=days)


@pytest.mark.parametrize(
    "header", ["Bearer", "Bearer ", "Bearer m3d_wrong", "Basic YTpi", "m3d_x", "Bearer \x7f"]
)
def test_what_is_no_key_is_refused(place, header):
    answer = place.client(headers={"Authorization": header}).get("/api/session")
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_a_key_makes_no_keys_no_users_and_no_signatures(place):
    program = place.with_key("robot", "administrator")
    assert program.post("/api/keys", json={"name": "a", "role": "reader"}).status_code == 403
    assert "takes a person" in program.get("/api/users").json()["detail"]
    assert program.get("/api/audit").status_code == 200


def test_a_key_with_a_cookie_is_the_key(place):
    """No way to have the rights of one with the CSRF exemption of the other."""
    program = place.with_key("both", "reader")
    program.cookies.set("med3dvlm_session", place.signed_in("administrator").cookies[
        "med3dvlm_session"])  # fmt: skip
    assert program.get("/api/users").status_code == 403


ODD = ["\0", "a\0b", "\ud800", "\u202e", "x" * 5000, "'; DROP TABLE users; --", "%00", "💀", " "]


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_odd_text_is_refused_in_a_sentence(place, text):
    """Never a failure: neither NUL nor half a character reaches the database."""
    client = place.signed_in("administrator")
    body = json.dumps({"name": text, "password": text})
    answers = [
        place.client().post("/api/session", content=body, headers=JSON),
        client.post("/api/users", content=json.dumps(
            {"name": text, "display_name": text, "role": text, "password": text}), headers=JSON),
        client.post("/api/keys", content=json.dumps({"name": text, "role": text}), headers=JSON),
        client.patch("/api/users/reader", content=json.dumps({"role": text}), headers=JSON),
        client.patch(f"/api/users/{quote(text, errors='replace')}", json={"role": "reader"}),
        client.delete(f"/api/keys/{quote(text, errors='replace')}"),
    ]  # fmt: skip
    assert {answer.status_code for answer in answers} <= {401, 404, 405, 422}
    assert all(isinstance(answer.json()["detail"], str) for answer in answers)
