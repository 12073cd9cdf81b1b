"""Signing in and out, and what ends a session."""

import time
from datetime import timedelta

import pytest
from argon2 import PasswordHasher
from sqlalchemy import select, update

from med3dvlm.service.access import passwords, sessions, users
from med3dvlm.service.access.tables import Attempts, SignedIn, User, hashed
from med3dvlm.service.audit import AuditRow
from med3dvlm.service.database import utc_now
from tests.service.access.conftest import KEEPER, PASSWORD


def sign_in(client, name, password=PASSWORD):
    return client.post("/api/session", json={"name": name, "password": password})


def test_a_session_is_begun_used_and_ended(place):
    client = place.client()
    answer = sign_in(client, " Reader ")
    assert answer.status_code == 200
    assert answer.json()["user"] == "reader"
    assert answer.json()["mode"] == "accounts"
    assert "studies:read" in answer.json()["permissions"]
    assert client.get("/api/session").json() == answer.json()
    csrf = {"X-CSRF-Token": answer.json()["csrf"]}
    cookie = client.cookies["med3dvlm_session"]
    assert client.delete("/api/session", headers=csrf).status_code == 204
    again = place.client(cookies={"med3dvlm_session": cookie})
    assert again.get("/api/session").json()["user"] is None


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(place):
    plain = sign_in(place.client(), "reader").headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(plain.split("; "))
    tls = sign_in(place.client(base_url="https://localhost"), "reader").headers["set-cookie"]
    assert tls.startswith("__Host-med3dvlm_session=") and "Secure" in tls


def test_the_database_holds_no_token_and_no_password(place):
    client = place.client()
    sign_in(client, "reader")
    token = client.cookies["med3dvlm_session"]
    with place.database.reading() as session:
        assert session.get(SignedIn, token) is None
        assert session.get(SignedIn, hashed(token)) is not None
        assert session.get(User, "reader").password.startswith("$argon2id$")


def test_the_session_is_another_after_each_sign_in(place):
    client = place.client()
    sign_in(client, "reader")
    before = client.cookies["med3dvlm_session"]
    sign_in(client, "reviewer")
    assert client.cookies["med3dvlm_session"] != before
    stale = place.client(cookies={"med3dvlm_session": before})
    assert stale.get("/api/session").json()["user"] is None


@pytest.mark.parametrize("name", ["reader", "nobody-here", "x" * 128, "ädmin", "'; drop table"])
def test_wrong_names_and_passwords_get_one_answer(place, name):
    answer = sign_in(place.client(), name, "wrong")
    assert answer.status_code == 401
    assert answer.json() == {"detail": "The name or the password is wrong."}


def test_unknown_names_take_as_long_as_known_ones():
    stored = passwords.hash_password(PASSWORD)
    passwords.matches(None, "")  # makes the hash that nobody has

    def seconds(hash):
        begun = time.perf_counter()
        assert not passwords.matches(hash, "wrong")
        return time.perf_counter() - begun

    known, unknown = (min(seconds(hash) for _ in range(20)) for hash in (stored, None))
    assert 0.5 < known / unknown < 2


def test_failures_make_one_wait_longer_and_longer(place, ann):
    client = place.client()
    for _ in range(sessions.FREE_FROM_ADDRESS):
        assert sign_in(client, ann, "wrong").status_code == 401
    shut = sign_in(client, ann)  # even the right one
    assert shut.status_code == 429
    assert 1 <= int(shut.headers["Retry-After"]) <= 16
    # a colleague at another place is not shut out by it
    elsewhere = place.client(client=("127.0.0.2", 1))
    assert sign_in(elsewhere, ann).status_code == 200
    _let_time_pass(place)
    assert sign_in(client, ann, "wrong").status_code == 401
    assert int(sign_in(client, ann).headers["Retry-After"]) > 16
    _let_time_pass(place)
    assert sign_in(client, ann).status_code == 200
    # forgotten by success
    assert sign_in(client, ann, "wrong").status_code == 401


def test_unknown_names_wait_too(place):
    client = place.client()
    codes = [sign_in(client, "bob", "wrong").status_code for _ in range(7)]
    assert codes == [401] * 5 + [429] * 2


def test_guesses_from_many_addresses_are_counted_together(place, ann, monkeypatch):
    monkeypatch.setattr(sessions, "FREE", 3)
    for n in range(3):
        sign_in(place.client(client=(f"127.0.1.{n}", 1)), ann, "wrong")
    assert sign_in(place.client(client=("127.0.2.1", 1)), ann).status_code == 429


def _let_time_pass(place):
    with place.database.session() as session:
        session.execute(update(Attempts).values(wait_until=utc_now() - timedelta(seconds=1)))


def test_sign_ins_of_one_address_are_limited(new_place):
    place = new_place(sign_ins_per_min=1)  # and five at once
    place.add_user("ann", "reader")
    client = place.client()
    codes = [sign_in(client, f"user{n}", "wrong").status_code for n in range(7)]
    assert codes[:5] == [401] * 5 and 429 in codes[5:]


def test_what_was_typed_as_a_name_is_not_logged(place):
    sign_in(place.client(), "my-secret-password", "x")
    with place.database.reading() as session:
        last = session.scalars(select(AuditRow).order_by(AuditRow.id.desc())).first()
    assert (last.action, last.object) == ("session.refuse", "user/unknown")
    assert "my-secret" not in str(last.public())


@pytest.mark.parametrize(
    "change",
    [
        lambda d, ann: users.change_user(d, KEEPER, ann, role="reviewer"),
        lambda d, ann: users.change_user(d, KEEPER, ann, disabled=True),
        lambda d, ann: users.set_password(d, KEEPER, ann, "other-" + PASSWORD, password_length=12),
    ],
    ids=["role", "disabled", "password"],
)
def test_a_changed_account_must_sign_in_again(place, ann, change):
    client = place.signed_in(ann)
    assert client.get("/api/session").json()["user"] == ann
    change(place.database, ann)
    assert client.get("/api/session").json()["user"] is None


def test_a_disabled_account_is_answered_like_a_wrong_password(place, ann):
    users.change_user(place.database, KEEPER, ann, disabled=True)
    assert sign_in(place.client(), ann).json()["detail"] == sessions.REFUSED


@pytest.mark.parametrize(
    ("column", "age"), [("seen", timedelta(minutes=31)), ("created", timedelta(hours=13))]
)
def test_sessions_end_by_themselves(place, ann, column, age):
    client = place.signed_in(ann)
    with place.database.session() as session:
        session.execute(
            update(SignedIn).where(SignedIn.user == ann).values({column: utc_now() - age})
        )
    assert client.get("/api/session").json()["user"] is None


def test_signing_out_everywhere(place, ann):
    here, there = place.signed_in(ann), place.signed_in(ann)
    assert here.delete("/api/session?everywhere=true").status_code == 204
    assert there.get("/api/session").json()["user"] is None


def test_one_changes_ones_own_password(place, ann):
    client, elsewhere = place.client(), place.signed_in(ann)
    client.headers["X-CSRF-Token"] = sign_in(client, ann).json()["csrf"]
    stolen = dict(client.cookies)

    def change(**body):
        return client.put("/api/session/password", json=body)

    assert client.get("/api/session").json()["own_password"] is True
    wrong = change(old="wrong", new="castle-violin-88-mango")
    assert wrong.status_code == 422 and "current password is wrong" in wrong.json()["detail"]
    assert change(old=PASSWORD, new="short").status_code == 422
    assert elsewhere.get("/api/session").json()["user"] == ann
    csrf = client.headers.pop("X-CSRF-Token")
    assert change(old=PASSWORD, new="castle-violin-88-mango").status_code == 403
    client.headers["X-CSRF-Token"] = csrf
    changed = change(old=PASSWORD, new="castle-violin-88-mango")
    assert changed.status_code == 200, changed.text
    # one goes on where one is, with another token; all other sessions have ended
    assert dict(client.cookies) != stolen and changed.json()["csrf"] != csrf
    assert client.get("/api/session").json()["user"] == ann
    assert elsewhere.get("/api/session").json()["user"] is None
    before = place.client()
    before.cookies.update(stolen)
    assert before.get("/api/session").json()["user"] is None
    assert sign_in(place.client(), ann).status_code == 401
    assert sign_in(place.client(), ann, "castle-violin-88-mango").status_code == 200
    with place.database.reading() as session:
        about = select(AuditRow.action).where(AuditRow.object == f"user/{ann}")
        noted = list(session.scalars(about))
    assert noted.count("user.password") == noted.count("user.password.refuse") == 1


def test_a_weaker_hash_is_renewed_at_sign_in(place, ann):
    weak = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(PASSWORD)
    with place.database.session() as session:
        session.get(User, ann).password = weak
    assert sign_in(place.client(), ann).status_code == 200
    with place.database.reading() as session:
        assert "m=64" in session.get(User, ann).password


def test_the_hash_is_strong():
    """RFC 9106, the second recommended setting, which is argon2-cffi's own."""
    hasher = PasswordHasher()
    assert (hasher.memory_cost, hasher.time_cost) >= (65536, 3)
