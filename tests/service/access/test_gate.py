"""What is decided before an endpoint is asked."""

import json
import re
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from typing import Annotated

import httpx2
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fastapi import APIRouter, Depends, FastAPI
from fastapi.staticfiles import StaticFiles
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from med3dvlm.cli import app as cli
from med3dvlm.service.access import Identity, require
from med3dvlm.service.access.gate import UndeclaredError, check_bind, is_in_clear, rules_of
from med3dvlm.service.access.limits import Buckets, network_of
from med3dvlm.service.settings import load_settings
from tests.service.access.conftest import PASSWORD, Place, make_app

# --- without accounts -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_place(tmp_path_factory):
    """Without any account; it stays so."""
    place = Place(make_app(tmp_path_factory.mktemp("open")))
    yield place
    place.database.close()


def test_without_accounts_everybody_here_is_local_and_it_says_so(open_place):
    place = open_place
    session = place.client().get("/api/session").json()
    assert (session["user"], session["role"], session["mode"]) == ("local", "reviewer", "open")
    assert "No accounts" in session["notice"] and session["csrf"] == ""
    body = {"name": "a", "password": "b"}
    assert place.client().post("/api/session", json=body).status_code == 409
    assert place.client().get("/api/users").status_code == 403


def test_without_accounts_other_machines_are_refused(open_place):
    place = open_place
    assert place.client(client=("10.0.0.7", 1)).get("/api/session").status_code == 403
    assert place.client(client=("::1", 1)).get("/api/session").status_code == 200
    # a proxy on this machine would let in everybody
    for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP"):
        answer = place.client(headers={name: "10.0.0.7"}).get("/api/session")
        assert answer.status_code == 403 and "users add" in answer.json()["detail"]


def test_without_accounts_only_this_machines_names_are_answered_to(open_place):
    """A page of evil.example, whose name is made to point here, reads nothing (DNS rebinding)."""
    place = open_place
    for url in ("http://evil.example", "http://10.0.0.7:8000", "http://localhost.evil.example"):
        assert place.client(base_url=url).get("/api/session").status_code == 400
        assert place.client(base_url=url).get("/").status_code == 400
    for url in ("http://localhost:8000", "http://127.0.0.1:8000", "http://[::1]:8000"):
        assert place.client(base_url=url).get("/api/session").status_code == 200


def test_the_first_account_shuts_the_server_at_once(new_place):
    place = new_place()
    client = place.client()
    assert client.get("/api/studies").status_code == 200
    place.add_user("root", "administrator")
    assert client.get("/api/studies").status_code == 401
    assert client.get("/api/session").json()["mode"] == "accounts"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "workstation.hospital.example"])
def test_without_accounts_it_is_not_bound_to_other_addresses(open_place, place, host):
    settings = load_settings(host=host, environment={})
    with pytest.raises(ValueError, match="users add") as caught:
        check_bind(settings, open_place.database)
    assert "\n" not in str(caught.value)
    check_bind(settings, place.database)  # which has accounts


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.53"])
def test_without_accounts_it_is_bound_to_this_machine(open_place, host):
    check_bind(load_settings(host=host, environment={}), open_place.database)


# --- names, sites, proxies ------------------------------------------------------------------


def test_configured_names_only(new_place):
    place = new_place(allowed_hosts="reader.hospital.example")
    place.add_user("ann", "reader")
    assert place.client(base_url="http://reader.hospital.example").get("/").status_code == 200
    assert place.client(base_url="http://other.example").get("/").status_code == 400
    # probes come by address
    assert place.client(base_url="http://10.1.2.3").get("/health/live").status_code == 200


@pytest.mark.parametrize("mode", ["open", "accounts"])
def test_pages_of_other_sites_change_nothing(open_place, place, mode):
    client = place.signed_in("reader") if mode == "accounts" else open_place.client()
    url = f"/api/studies/{'0' * 32}/questions"
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:9999"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        answer = client.post(url, json={"text": "Is there an effusion?"}, headers=headers)
        assert (answer.status_code, headers) == (403, headers)
    for headers in ({"Origin": "http://localhost"}, {"Sec-Fetch-Site": "same-origin"}, {}):
        answer = client.post(url, json={"text": "Is there an effusion?"}, headers=headers)
        assert answer.status_code == 404


def test_a_change_by_cookie_needs_the_pages_token(place):
    client = place.signed_in("reader")
    url, body = f"/api/studies/{'0' * 32}/questions", {"text": "Is there an effusion?"}
    right = client.headers.pop("X-CSRF-Token")
    for wrong in ({}, {"X-CSRF-Token": ""}, {"X-CSRF-Token": "0" * 64}, {"X-CSRF-Token": "ü"}):
        headers = {name: value.encode() for name, value in wrong.items()}
        assert client.post(url, json=body, headers=headers).status_code == 403
    assert client.post(url, json=body, headers={"X-CSRF-Token": right}).status_code == 404
    # another session's is not this one's
    other = place.signed_in("reader").headers["X-CSRF-Token"]
    assert client.post(url, json=body, headers={"X-CSRF-Token": other}).status_code == 403


def test_proxies_are_believed_only_if_named(new_place, place):
    def address_of_last(place):
        client = place.signed_in("administrator", client=("10.9.9.9", 1))
        headers = {"X-Forwarded-For": "192.0.2.5", "X-Forwarded-Proto": "https"}
        client.cookies.set("__Host-med3dvlm_session", client.cookies["med3dvlm_session"])
        client.post("/api/audit/verify", headers=headers)
        rows = client.get("/api/audit", params={"limit": 1000}).json()["rows"]
        return next(row["address"] for row in reversed(rows) if row["action"] == "audit.verify")

    believed = new_place(trusted_proxies="10.9.9.9")
    believed.add_user("administrator", "administrator")
    assert address_of_last(believed) == "192.0.2.5"
    assert address_of_last(place) == "10.9.9.9"


# --- headers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "/nothing.js", "/api/session", "/api/users", "/api/nothing", "/health/live"]
)
def test_every_answer_has_the_headers(place, path):
    headers = place.client().get(path).headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "no-referrer"
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert not re.search(r"unsafe|https?:|\*", policy)
    assert "Strict-Transport-Security" not in headers
    assert "Access-Control-Allow-Origin" not in headers
    if path.startswith("/api"):
        assert headers["Cache-Control"] == "no-store"
        assert "sandbox" in policy


def test_under_tls_browsers_are_told_to_stay_there(place):
    answer = place.client(base_url="https://localhost").get("/api/session")
    assert answer.headers["Strict-Transport-Security"].startswith("max-age=31536000")


def test_a_failure_is_one_sentence_without_the_reason(new_place):
    place = new_place()
    client = place.client(raise_server_exceptions=False)
    place.app.state.service = None  # so that an endpoint fails
    answer = client.get("/api/studies")
    assert answer.status_code == 500
    assert answer.json() == {"detail": "The server failed; its log says why."}
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_refusals_are_logged_without_secrets(place, caplog):
    with caplog.at_level("WARNING", "med3dvlm.service.access"):
        place.signed_in("reader").delete(f"/api/studies/{'0' * 32}?patient=Doe")
        place.client(headers={"Authorization": "Bearer m3d_secret"}).get("/api/studies")
        place.client().get("/api/%0aforged")
    first, second, third = (json.loads(entry.getMessage()) for entry in caplog.records)
    assert (first["refused"], first["who"], first["method"]) == (403, "reader", "DELETE")
    assert (second["refused"], second["who"], second["path"]) == (401, None, "/api/studies")
    assert (third["refused"], third["path"]) == (404, "/api/\nforged")
    assert "Doe" not in caplog.text and "secret" not in caplog.text


# --- endpoints that say nothing -------------------------------------------------------------


def test_an_endpoint_that_declares_nothing_makes_no_app():
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    router = APIRouter(prefix="/api")
    router.get("/secret")(lambda: "patients")
    app.include_router(router)
    with pytest.raises(UndeclaredError, match="GET /api/secret does not say"):
        rules_of(app)


def test_only_the_page_is_mounted(tmp_path):
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.mount("/files", StaticFiles(directory=tmp_path))
    with pytest.raises(UndeclaredError, match="mounted"):
        rules_of(app)


def test_a_permission_that_nobody_has_is_a_mistake():
    with pytest.raises(ValueError, match="no role's"):
        require("studies:raed")


def test_without_the_gate_an_endpoint_is_shut():
    app = FastAPI()

    @app.get("/api/y")
    def secret(identity: Annotated[Identity, Depends(require("studies:read"))]) -> str:
        return "patients"

    assert TestClient(app).get("/api/y").status_code == 401


# --- how much -------------------------------------------------------------------------------


def test_buckets_fill_again():
    buckets = Buckets(600)  # ten a second, 150 at once
    assert all(buckets.wait("a") == 0 for _ in range(150))
    assert 0 < buckets.wait("a") <= 0.1
    assert buckets.wait("b") == 0


def test_an_ipv6_network_is_one_sender():
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff") != network_of("2001:db8:1::1")


def test_one_who_asks_too_often_waits(new_place):
    place = new_place(requests_per_min=20)
    place.add_user("ann", "reader")
    place.add_user("bob", "reader")
    client = place.signed_in("ann")
    answers = [client.get("/api/session") for _ in range(7)]
    assert [a.status_code for a in answers[:5]] == [200] * 5
    assert answers[-1].status_code == 429 and int(answers[-1].headers["Retry-After"]) >= 1
    assert place.signed_in("bob").get("/api/session").status_code == 200


def test_guests_of_one_address_wait(new_place):
    place = new_place(guest_requests_per_min=20)
    place.add_user("ann", "reader")
    codes = [place.client().get("/api/studies").status_code for _ in range(7)]
    assert codes[:5] == [401] * 5 and codes[-1] == 429
    assert place.client(client=("127.0.0.9", 1)).get("/api/studies").status_code == 401


def test_a_body_is_limited(place):
    client = place.signed_in("reader")
    url = f"/api/studies/{'0' * 32}/questions"
    assert client.post(url, content=b"x" * (2**20 + 1)).status_code == 413

    def pieces():  # chunked: no length is claimed
        for _ in range(40):
            yield b" " * 2**16

    answer = client.post(url, content=pieces(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["detail"] == "The request is larger than 1 MB; send less at a time."


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The service behind a real socket; gives its port and a key that may upload."""
    place = Place(make_app(tmp_path_factory.mktemp("socket"), upload_mb=1))
    key = place.with_key("uploader", "service").headers["Authorization"]
    config = uvicorn.Config(place.app, port=0, log_level="error", proxy_headers=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        pass
    yield server.servers[0].sockets[0].getsockname()[1], key
    server.should_exit = True
    thread.join(10)


def talk(port, head, body=b""):
    """Send raw bytes; what came back, and how many of them the server took."""
    sent = 0
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head.encode().replace(b"\n", b"\r\n") + b"\r\n\r\n")
        answer = b""
        try:
            for piece in body:
                connection.sendall(piece)
                sent += len(piece)
        except OSError:  # it hung up on us
            pass
        try:
            while part := connection.recv(2**16):
                answer += part
        except OSError:
            pass
    return answer.decode(), sent


UPLOAD = """POST /api/studies HTTP/1.1
Host: localhost
Authorization: {key}
Content-Type: multipart/form-data; boundary=b"""


def test_ten_gigabytes_are_refused_at_once(server):
    """Nothing of the body was sent, and the answer is there."""
    port, key = server
    answer, _ = talk(port, UPLOAD.format(key=key) + f"\nContent-Length: {10 * 2**30}")
    assert answer.startswith("HTTP/1.1 413") and "connection: close" in answer.lower()


def test_nobody_unknown_uploads(server):
    port, _ = server
    answer, _ = talk(port, UPLOAD.format(key="Bearer m3d_no") + f"\nContent-Length: {2**20}")
    assert answer.startswith("HTTP/1.1 401")


def test_an_endless_body_is_cut_off(server):
    port, key = server

    head = UPLOAD.format(key=key) + "\nTransfer-Encoding: chunked"
    answer, sent = talk(port, head, _valid_then_endless())
    assert answer.startswith("HTTP/1.1 413") or answer == ""  # or reset, with our bytes under way
    assert sent < 64 * 2**20


def _valid_then_endless():
    start = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.nii"\r\n\r\n'
    yield b"%x\r\n" % len(start) + start + b"\r\n"
    while True:
        yield b"10000\r\n" + b"x" * 0x10000 + b"\r\n"


# --- serving --------------------------------------------------------------------------------


def test_serve_refuses_other_machines_in_one_sentence(tmp_path):
    command = ["serve", "--host", "0.0.0.0", "--data", str(tmp_path)]
    result = CliRunner().invoke(cli, command)
    assert isinstance(result.exception, ValueError)
    assert str(result.exception) == (
        "without accounts the server answers to its own machine only, not on host 0.0.0.0: first "
        "run med3dvlm users add NAME --role administrator."
    )


def test_tls_by_itself(tmp_path):
    """A certificate and a key are enough; cookies are then for TLS only."""
    place = Place(make_app(tmp_path))
    place.add_user("ann", "reader")
    certificate = make_certificate(tmp_path)
    files = {"ssl_certfile": str(certificate), "ssl_keyfile": str(certificate)}
    server = uvicorn.Server(uvicorn.Config(place.app, port=0, log_level="error", **files))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        pass
    port = server.servers[0].sockets[0].getsockname()[1]
    trust = ssl.create_default_context(cafile=str(certificate))
    with httpx2.Client(base_url=f"https://localhost:{port}", verify=trust) as client:
        answer = client.post("/api/session", json={"name": "ann", "password": PASSWORD})
        assert answer.status_code == 200
        assert "Secure" in answer.headers["Set-Cookie"]
        assert "Strict-Transport-Security" in answer.headers
        assert client.get("/api/session").json()["user"] == "ann"
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(certificate)
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(OSError), socket.create_connection(("localhost", port)) as plain:
        old.wrap_socket(plain, server_hostname="localhost")
    server.should_exit = True
    thread.join(10)


def make_certificate(folder):
    """Self-signed, for localhost; certificate and key in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path = folder / "localhost.pem"
    path.write_bytes(made.public_bytes(pem) + key.private_bytes(pem, pkcs8, plain))
    return path


@pytest.mark.parametrize(
    ("settings", "clear"),
    [
        ({"host": "10.0.0.7"}, True),
        ({"host": "10.0.0.7", "trusted_proxies": "10.0.0.1"}, False),
        ({"host": "10.0.0.7", "tls_certificate": "a.pem"}, False),
        ({"host": "127.0.0.1"}, False),
    ],
)
def test_it_says_where_passwords_would_go_in_clear(settings, clear, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pem").touch()
    assert is_in_clear(load_settings(environment={}, **settings)) is clear
