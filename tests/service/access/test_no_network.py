"""No call to the outside, whatever the service is asked."""

from __future__ import annotations

import ipaddress
import sys

import pytest

from med3dvlm.service.access.gate import rules_of
from tests.service.access.test_matrix import ask

HERE = {"localhost", "127.0.0.1", "::1", "", None}


class Outside:
    """Watches every socket of this process that is about to reach another machine.

    Python tells its audit hooks of each name looked up and each connection begun (PEP 578), of
    whichever library; a hook cannot be taken off again, hence the switch.
    """

    def __init__(self):
        self.watching, self.seen = False, []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if not self.watching:
            return
        if event in ("socket.getaddrinfo", "socket.gethostbyname"):
            host = arguments[0]
        elif event in ("socket.connect", "socket.sendto"):
            address = arguments[1]
            host = address[0] if isinstance(address, tuple) else None  # Unix sockets are a path
        else:
            return
        host = host.decode() if isinstance(host, bytes) else host
        if host not in HERE and not _is_loopback(host):
            self.seen.append((event, host))
            raise OSError(f"the test forbids a socket to {host}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


OUTSIDE = Outside()


@pytest.fixture
def outside():
    OUTSIDE.seen.clear()
    OUTSIDE.watching = True
    yield OUTSIDE
    OUTSIDE.watching = False


def test_the_watch_sees(outside):
    import socket

    for reach in (
        lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
        lambda: socket.getaddrinfo("huggingface.co", 443),
    ):
        with pytest.raises(OSError, match="forbids"):
            reach()
    assert len(outside.seen) == 2
    socket.getaddrinfo("localhost", 80)


def test_no_endpoint_reaches_out(place, outside):
    """Every one, by those who may and those who may not."""
    for rule in rules_of(place.app):
        for client in (place.signed_in("reviewer"), place.signed_in("administrator")):
            ask(client, f"{rule.method} {rule.path}")
    place.client().get("/")
    assert not outside.seen


def test_the_whole_story_reaches_nothing(service, phantom_files, outside):
    """A study in, a question, a draft, a signature, evidence, a search."""
    study = service.upload(phantom_files[2])["id"]
    asked = {"text": "Is there pleural effusion?"}
    job = service.client.post(f"/api/studies/{study}/questions", json=asked).json()["job"]
    assert service.done(job)["state"] == "done"
    report = service.signed(study)
    assert report["state"] == "final"
    sentence = next(one["id"] for one in report["sentences"] if one["original"])
    url = f"/api/studies/{study}/evidence"
    job = service.client.post(url, json={"sentence": sentence}).json()["job"]
    assert service.done(job)["state"] == "done"
    service.idle()
    assert service.client.get("/api/search?text=effusion").status_code == 200
    for format in ("text", "json", "pdf", "fhir"):
        export = service.client.get(f"/api/studies/{study}/export?format={format}")
        assert export.status_code == 200
    assert not outside.seen
