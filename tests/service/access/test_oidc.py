"""Signing in at an OpenID provider, against a real one on this machine."""

from __future__ import annotations

import time
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from joserfc.jwk import RSAKey
from sqlalchemy import select

from med3dvlm.service.access import oidc, users
from med3dvlm.service.access.oidc import Provider
from med3dvlm.service.access.tables import OidcLogin, User
from med3dvlm.service.audit import AuditRow
from med3dvlm.service.settings import SettingsError, load_settings
from tests.service.access.conftest import KEEPER, Place, make_app
from tests.service.access.provider import CLIENT, SECRET, OpenIdProvider


@pytest.fixture
def provider():
    provider = OpenIdProvider()
    yield provider
    provider.close()


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """One app for all; each test has a provider, and people, of its own."""
    settings = {
        "oidc_issuer": "http://127.0.0.1:9",
        "oidc_client": CLIENT,
        "oidc_secret": SECRET,
        "oidc_roles": "chiefs=administrator, radiologists=reviewer, students=reader",
        "public_url": "http://localhost",
        "sign_ins_per_min": 10_000,
    }
    return make_app(tmp_path_factory.mktemp("oidc"), **settings)


@pytest.fixture
def place(app, provider, request):
    settings = app.state.settings.model_copy(update={"oidc_issuer": provider.issuer})
    app.state.oidc = Provider(settings)
    provider.person["preferred_username"] = f"u{abs(hash(request.node.name)) % 10**9}"
    provider.person["sub"] = f"sub-{provider.person['preferred_username']}"
    return Place(app)


def to_provider(client) -> str:
    """The URL that the browser is sent to."""
    answer = client.get("/api/oidc/login", follow_redirects=False)
    assert answer.status_code == 303
    return answer.headers["location"]


def at_provider(url: str) -> str:
    """What the provider answers a browser: the path and query to come back with."""
    back = urlsplit(httpx2.get(url, follow_redirects=False).headers["location"])
    assert back.path == "/api/oidc/callback"
    return f"{back.path}?{back.query}"


def come_back(client, path):
    return client.get(path, follow_redirects=False)


def sign_in(client):
    return come_back(client, at_provider(to_provider(client)))


def refused(answer, reason="refused") -> bool:
    return (answer.status_code, answer.headers["location"]) == (303, f"/?sign_in={reason}")


def test_a_sign_in(place, provider):
    client = place.client()
    answer = sign_in(client)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    session = client.get("/api/session").json()
    name = provider.person["preferred_username"]
    assert (session["user"], session["display_name"]) == (name, "Dr. Ann Miller")
    assert session["role"] == "reviewer" and session["oidc"] and session["mode"] == "accounts"
    with place.database.reading() as session:
        actions = session.scalars(select(AuditRow.action).where(AuditRow.name == name)).all()
    assert actions == ["user.add", "session.start"]


def test_it_asks_with_pkce_state_and_nonce(place):
    one, two = (parse_qs(urlsplit(to_provider(place.client())).query) for _ in range(2))
    for query in (one, two):
        assert query["code_challenge_method"] == ["S256"]
        assert len(query["code_challenge"][0]) == 43
    for name in ("state", "nonce", "code_challenge"):
        assert one[name] != two[name] and len(one[name][0]) >= 43


def test_the_same_person_is_the_same_account_again(place, provider):
    assert sign_in(place.client()).headers["location"] == "/"
    before = provider.person["preferred_username"]
    provider.person["preferred_username"] = "married-name"
    client = place.client()
    sign_in(client)
    assert client.get("/api/session").json()["user"] == before


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": "another"},
        {"nonce": None},
        {"aud": "another-client"},
        {"aud": ["another-client", "third"]},
        {"aud": [CLIENT, "third"], "azp": "third"},
        {"aud": None},
        {"iss": "https://evil.example"},
        {"iss": None},
        {"exp": int(time.time()) - 300},
        {"exp": None},
        {"nbf": int(time.time()) + 3600},
        {"iat": int(time.time()) + 3600},
        {"sub": None},
        {"at_hash": "wrong"},
    ],
    # numbers are times of collection, of which each process of the tests has its own
    ids=lambda change: "-".join(
        f"{name} {'at' if isinstance(value, int) else value}"[:24] for name, value in change.items()
    ),
)
def test_tokens_with_wrong_claims(place, provider, change):
    provider.change = change
    client = place.client()
    assert refused(sign_in(client))
    assert client.get("/api/session").json()["user"] is None
    assert "med3dvlm_session" not in client.cookies


def test_tokens_signed_by_another_key(place, provider):
    provider.signer = RSAKey.generate_key(2048, {"kid": "one"}, private=True)
    assert refused(sign_in(place.client()))
    provider.header = {"kid": "unknown"}
    assert refused(sign_in(place.client()))


@pytest.mark.filterwarnings("ignore:JWS algorithm")
def test_tokens_without_a_signature(place, provider):
    provider.header = {"alg": "none"}
    assert refused(sign_in(place.client()))


def test_tokens_signed_with_the_public_key_as_a_secret(place, provider):
    provider.header = {"alg": "HS256"}
    assert refused(sign_in(place.client()))


def test_new_keys_of_the_provider_are_fetched(place, provider, monkeypatch):
    assert sign_in(place.client()).headers["location"] == "/"
    provider.key = RSAKey.generate_key(2048, {"kid": "two"}, private=True)
    provider.header = {"kid": "two"}
    monkeypatch.setattr(oidc, "KEYS_EVERY_S", 0)
    assert sign_in(place.client()).headers["location"] == "/"


def test_a_code_is_used_once(place):
    client = place.client()
    path = at_provider(to_provider(client))
    cookie = client.cookies["med3dvlm_oidc"]
    assert come_back(client, path).headers["location"] == "/"
    client.cookies.set("med3dvlm_oidc", cookie)
    assert refused(come_back(client, path), "expired")


def test_the_answer_must_come_to_the_browser_that_began(place):
    """Else an attacker could sign a victim in as the attacker."""
    path = at_provider(to_provider(place.client()))
    victim = place.client()
    assert refused(come_back(victim, path))
    to_provider(victim)  # it has begun one itself, and has a cookie
    path = at_provider(to_provider(place.client()))
    assert refused(come_back(victim, path))


def test_a_code_of_another_sign_in_fails_by_pkce(place):
    client = place.client()
    mine = parse_qs(urlsplit(at_provider(to_provider(client))).query)
    stolen = parse_qs(urlsplit(at_provider(to_provider(place.client()))).query)
    path = f"/api/oidc/callback?state={mine['state'][0]}&code={stolen['code'][0]}"
    assert refused(come_back(client, path))


def test_old_sign_ins_are_over(place):
    client = place.client()
    path = at_provider(to_provider(client))
    with place.database.session() as session:
        for login in session.scalars(select(OidcLogin)):
            login.created -= oidc.AT_PROVIDER
    assert refused(come_back(client, path), "expired")


@pytest.mark.parametrize(
    "query", ["", "state=x", "state=x&code=y", "code=y", "error=access_denied"]
)
def test_answers_to_nothing(place, query):
    assert refused(come_back(place.client(), f"/api/oidc/callback?{query}"), "expired")


def test_a_refusal_of_the_provider(place):
    client = place.client()
    state = parse_qs(urlsplit(to_provider(client)).query)["state"][0]
    path = f"/api/oidc/callback?state={state}&error=access_denied"
    assert refused(come_back(client, path))


def test_claims_become_roles_in_the_order_of_the_settings(place, provider):
    provider.person["groups"] = ["students", "chiefs"]
    client = place.client()
    sign_in(client)
    assert client.get("/api/session").json()["role"] == "administrator"
    other = place.client()
    provider.person["groups"] = "students"
    sign_in(other)  # demoted at the provider: so it is here, everywhere
    assert other.get("/api/session").json()["role"] == "reader"
    assert client.get("/api/session").json()["user"] is None
    for groups in (["kitchen"], [], None, {"chiefs": 1}, [["chiefs"]]):
        provider.person["groups"] = groups
        assert refused(sign_in(place.client()), "no-role")


def test_a_name_does_not_take_over_an_account(place, provider):
    name = provider.person["preferred_username"]
    place.add_user(name, "administrator")
    assert refused(sign_in(place.client()))
    provider.person["preferred_username"] = "../../x"
    assert refused(sign_in(place.client()))


def test_disabled_here_is_out(place, provider):
    sign_in(place.client())
    name = provider.person["preferred_username"]
    users.change_user(place.database, KEEPER, name, disabled=True)
    assert refused(sign_in(place.client()))
    with place.database.reading() as session:
        assert session.get(User, name).password is None  # nor by a password


def test_a_provider_that_does_not_answer(place, provider):
    path = at_provider(to_provider(client := place.client()))
    provider.close()
    assert refused(come_back(client, path), "unavailable")
    place.app.state.oidc = Provider(place.app.state.oidc.settings)
    assert refused(place.client().get("/api/oidc/login", follow_redirects=False), "unavailable")


def test_a_provider_that_says_it_is_another(place, provider):
    provider.issuer_said = "https://evil.example"
    answer = place.client().get("/api/oidc/login", follow_redirects=False)
    assert refused(answer, "unavailable")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"oidc_client": ""}, "oidc_client"),
        ({"oidc_roles": {}}, "oidc_roles"),
        ({"public_url": ""}, "public_url"),
        ({"public_url": "http://reader.hospital.example"}, "https"),
        ({"oidc_issuer": "http://id.hospital.example"}, "https"),
        ({"oidc_roles": {"a": "king"}}, "king"),
    ],
)
def test_settings_that_do_not_belong_together(change, reason):
    given = {"oidc_issuer": "https://id.example", "oidc_client": "c", "oidc_roles": {"a": "reader"}}
    given["public_url"] = "https://reader.example"
    with pytest.raises((SettingsError, ValueError), match=reason):
        Provider(load_settings(environment={}, **(given | change)))


def test_without_a_provider_there_is_no_sign_in_by_it(tmp_path):
    place = Place(make_app(tmp_path))
    assert place.client().get("/api/oidc/login").status_code == 404
    assert place.client().get("/api/session").json()["oidc"] is False


def test_the_secret_is_not_printed(place):
    assert SECRET not in repr(place.settings) and SECRET not in str(place.settings)
