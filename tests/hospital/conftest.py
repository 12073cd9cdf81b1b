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
    program = shutil.which("Orthanc") or "/usr/sbin/Orthanc"
    if not Path(program).exists() or not PLUGIN.exists():
        pytest.skip("Orthanc is not installed: apt-get install orthanc orthanc-dicomweb")
    folder = tmp_path_factory.mktemp("orthanc")
    ca, pair = make_certificate(folder)
    port = free_port()
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
    try:
        wait_for(f"http://127.0.0.1:{port}/system", process, folder / "orthanc.log")
        with tls_relay(pair, port) as outside:
            yield PacsAddress(
                url=f"https://localhost:{outside}/dicom-web",
                user=USER,
                password=PASSWORD,
                ca=ca,
                attempts=2,
                wait_s=0.05,
            )
    finally:
        process.kill()  # nothing there is kept
        process.wait(20)
        log.close()


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


def write_series(folder: Path, index: int) -> Path:
    study = make_study(index, split="test", shape=(20, 40, 48))
    return folder / LAYOUTS["dicom"].write_study(study, folder)
