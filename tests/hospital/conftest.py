"""A real PACS for the tests: Orthanc of the Debian package, with a password, behind TLS.

The package's own TLS ends in a segmentation fault, so a relay stands before it, as a proxy would.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import requests

from med3dvlm.data.phantoms import LAYOUTS, make_study
from med3dvlm.hospital import Model, PacsAddress

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
USER, PASSWORD = "tester", "only for tests"
MODEL = Model(name="demo", weights="0123456789abcdef", preparation="fedcba9876543210")


@pytest.fixture(scope="session")
def pacs_address(tmp_path_factory) -> Iterator[PacsAddress]:
    """Where one empty Orthanc is up, for the whole session; tests use studies of their own."""
    folder = tmp_path_factory.mktemp("orthanc")
    ca, pair = make_certificate(folder)
    with orthanc(folder) as server, tls_relay(pair, server.port) as outside:
        yield PacsAddress(
            url=f"https://localhost:{outside}/dicom-web",
            user=USER,
            password=PASSWORD,
            ca=ca,
            attempts=2,
            wait_s=0.05,
        )


@dataclass
class Orthanc:
    """A PACS as a process of its own."""

    process: subprocess.Popen
    port: int

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)


@contextmanager
def orthanc(folder: Path, port: int | None = None) -> Iterator[Orthanc]:
    """An Orthanc that keeps what it is sent in a folder, and goes on with what is there."""
    program = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
    if not Path(program).exists() or not PLUGIN.exists():
        pytest.skip("Orthanc is not installed: apt-get install orthanc orthanc-dicomweb")
    port = port or free_port()
    settings = {
        "Name": "test",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "Plugins": [str(PLUGIN)],
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (folder / "orthanc.json").write_text(json.dumps(settings))
    log = (folder / "orthanc.log").open("wb")
    process = subprocess.Popen([program, str(folder / "orthanc.json")], stdout=log, stderr=log)
    server = Orthanc(process, port)
    try:
        wait_for(f"http://127.0.0.1:{port}/system", process, folder / "orthanc.log")
        yield server
    finally:
        server.kill()  # nothing there is kept
        log.close()


class Narrow:
    """A way to a PACS that lets through as many bytes as a test says, and then none."""

    def __init__(self, port: int):
        self.inside = port
        self.changed = threading.Condition()
        self.left = float("inf")
        self.sockets: list[socket.socket] = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self._listen, daemon=True).start()

    def let_through(self, count: float = float("inf")) -> None:
        with self.changed:
            self.left = count
            self.changed.notify_all()

    def cut(self) -> None:
        """End the connections that there are, with all that is on its way."""
        for one in self.sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.cut()
        self.let_through()
        with suppress(OSError):
            self.listening.shutdown(socket.SHUT_RDWR)
        for one in (self.listening, *self.sockets):
            one.close()

    def _listen(self) -> None:
        with suppress(OSError):
            while True:
                come, _ = self.listening.accept()
                try:
                    go = socket.create_connection(("127.0.0.1", self.inside))
                except OSError:  # nobody is there any more
                    come.close()
                    continue
                self.sockets += [come, go]
                for pair, narrow in (((come, go), False), ((go, come), True)):
                    threading.Thread(target=self._pump, args=(*pair, narrow), daemon=True).start()

    def _pump(self, come: socket.socket, go: socket.socket, narrow: bool) -> None:
        with suppress(OSError):
            while data := come.recv(65536):
                while data:
                    count = self._wait(len(data)) if narrow else len(data)
                    go.sendall(data[:count])
                    data = data[count:]
        for one in (come, go):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _wait(self, wanted: int) -> int:
        with self.changed:
            self.changed.wait_for(lambda: self.left > 0)
            count = int(min(wanted, self.left))
            self.left -= count
        return count


def wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if requests.get(url, auth=(USER, PASSWORD), timeout=2).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.05)
    raise AssertionError(f"Orthanc did not start: {log.read_text()[-2000:]}")


@contextmanager
def tls_relay(pair: Path, port: int) -> Iterator[int]:
    """A port of 127.0.0.1 that speaks TLS and hands on to another that does not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair)

    async def pump(come: asyncio.StreamReader, go: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await come.read(65536):
                go.write(data)
                await go.drain()
        go.close()

    async def relay(come: asyncio.StreamReader, go: asyncio.StreamWriter) -> None:
        inner_come, inner_go = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(come, inner_go), pump(inner_come, go))

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(relay, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate that signs itself, for localhost: (PEM of it, PEM of it and its key)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    (folder / "ca.pem").write_bytes(public)
    (folder / "pair.pem").write_bytes(public + private)
    return folder / "ca.pem", folder / "pair.pem"


@pytest.fixture(scope="session")
def series(tmp_path_factory) -> Path:
    """A phantom of a patient with a name of many letters, as a folder of axial slices."""
    return write_series(tmp_path_factory.mktemp("series"), 3)


def write_series(folder: Path, index: int, *, shape: tuple[int, int, int] = (20, 40, 48)) -> Path:
    study = make_study(index, split="test", shape=shape)
    return folder / LAYOUTS["dicom"].write_study(study, folder)
