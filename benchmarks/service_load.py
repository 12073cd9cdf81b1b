"""Many readers at once: what they wait, what is refused, whether memory grows.

    PYTHONPATH=. python benchmarks/service_load.py --readers 50 --seconds 180

Readers list, load volumes, ask and follow the answer as it is written, search and draft. Of ten
one reads its stream slowly, one hangs up in the middle. No answer but 2xx, 304, 409, 429 and 503
counts as right. Readers are threads of one process beside the server's, on the same cores.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import httpx
import numpy as np
import psutil

from med3dvlm.data.phantoms import make_study
from med3dvlm.data.phantoms.layouts import nifti
from tests.service.processes import Process, upload

QUESTIONS = (
    "Is there pleural effusion?",
    "Is there cardiomegaly?",
    "Is there lung nodule?",
    "Which contrast phase is this?",
    "What is the most important abnormality?",
)
ORDERLY = {200, 202, 304, 409, 429, 503}


class Readers:
    """Threads that use a service, and what they saw."""

    def __init__(self, url: str, studies: list[str], seconds: float):
        self.url, self.studies = url, studies
        self.until = time.monotonic() + seconds
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.statuses: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.lock = threading.Lock()

    def read(self, number: int) -> None:
        chance = random.Random(number)
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while time.monotonic() < self.until:
                act = chance.choices((self.list, self.volume, self.ask, self.search), (3, 2, 4, 2))[
                    0
                ]
                try:
                    act(client, chance, number)
                except httpx.TransportError as error:
                    with self.lock:
                        self.faults[type(error).__name__] += 1
                time.sleep(chance.uniform(0.05, 0.5))

    def list(self, client: httpx.Client, chance: random.Random, number: int) -> None:
        self._timed("list", lambda: client.get("/api/studies"))

    def volume(self, client: httpx.Client, chance: random.Random, number: int) -> None:
        study = chance.choice(self.studies)
        self._timed("volume", lambda: client.get(f"/api/studies/{study}/volume.nii.gz"))

    def search(self, client: httpx.Client, chance: random.Random, number: int) -> None:
        text = {"text": chance.choice(("left pleural effusion", "no nodule", "enlarged heart"))}
        self._timed("search", lambda: client.get("/api/search", params=text))

    def ask(self, client: httpx.Client, chance: random.Random, number: int) -> None:
        study = chance.choice(self.studies)
        # now and then something new, which cannot be remembered
        text = chance.choice(QUESTIONS) + (
            f" ({chance.random():.6f})" if chance.random() < 0.5 else ""
        )
        began = time.monotonic()
        url = f"/api/studies/{study}/questions"
        answer = self._timed("submit", lambda: client.post(url, json={"text": text}))
        if answer.status_code != 202:
            time.sleep(float(answer.headers.get("retry-after", 1)))
            return
        job = answer.json()["job"]["id"]
        with client.stream("GET", f"/api/jobs/{job}/events") as stream:
            self._count("events", stream.status_code)
            first = None
            for line in stream.iter_lines():
                if line.startswith("event: token") and first is None:
                    first = time.monotonic() - began
                if number % 10 == 0:  # stalls
                    time.sleep(0.5)
                if number % 10 == 1 and first is not None:  # hangs up
                    return
        if stream.status_code == 200:
            with self.lock:
                self.seconds["answer"].append(time.monotonic() - began)
                if first is not None:
                    self.seconds["first words"].append(first)

    def _timed(self, what: str, send) -> httpx.Response:
        began = time.monotonic()
        answer = send()
        if answer.status_code in (200, 202):
            with self.lock:
                self.seconds[what].append(time.monotonic() - began)
        self._count(what, answer.status_code)
        return answer

    def _count(self, what: str, status: int) -> None:
        with self.lock:
            self.statuses[f"{what} {status}"] += 1
            if status not in ORDERLY:
                self.faults[f"{what} {status}"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--readers", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--studies", type=int, default=8)
    parser.add_argument("--workers", type=int, help="worker processes; a thread if not given")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(given, Path(folder))
    text = json.dumps(result, indent=2)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")
    raise SystemExit(1 if result["faults"] else 0)


def run(given: argparse.Namespace, folder: Path) -> dict:
    files = [
        folder / nifti.write_study(make_study(i, split="test"), folder)
        for i in range(given.studies)
    ]
    arguments = [] if given.workers is None else ["--workers", str(given.workers)]
    # one nameless user makes all requests, which the limits for one user would hold up
    limits = {"requests_per_min": 10**6, "guest_requests_per_min": 10**6, "user_limit": 100}
    with Process("serve", folder / "data", arguments=arguments, **limits) as server:
        server.ready()
        with server.client as client:
            studies = [upload(client, file) for file in files]
        readers = Readers(f"http://127.0.0.1:{server.port}", studies, given.seconds)
        threads = [
            threading.Thread(target=readers.read, args=(number,)) for number in range(given.readers)
        ]
        for thread in threads:
            thread.start()
        memory = watch(server, readers)
        for thread in threads:
            thread.join()
        with server.client as client:
            left = client.get("/metrics").text
    return {
        "readers": given.readers,
        "seconds": given.seconds,
        "workers": "thread" if given.workers is None else given.workers,
        "requests": sum(readers.statuses.values()),
        "seconds_p50_p99": {
            name: [round(float(np.percentile(all_, q)), 4) for q in (50, 99)]
            for name, all_ in sorted(readers.seconds.items())
        },
        "statuses": dict(sorted(readers.statuses.items())),
        "faults": dict(readers.faults),
        "memory_mb": memory,
        "streams_left": next(
            line.split()[1]
            for line in left.splitlines()
            if line.startswith("med3dvlm_event_streams ")
        ),
    }


def watch(server: Process, readers: Readers) -> list[int]:
    """Resident memory of the server and its workers, MB, at twenty moments."""
    main = psutil.Process(server.process.pid)
    step = max(0.5, (readers.until - time.monotonic()) / 20)
    found = []
    while time.monotonic() < readers.until:
        family = [main, *main.children(recursive=True)]
        found.append(round(sum(one.memory_info().rss for one in family) / 2**20))
        time.sleep(step)
    return found


if __name__ == "__main__":
    main()
