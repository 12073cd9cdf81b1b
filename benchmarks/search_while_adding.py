"""Search while another process adds: `python benchmarks/search_while_adding.py [SECONDS]`.

One process writes made-up studies (512-d), 20 a save, and tends the index every 50 saves; this one
searches without a pause. Every seventh study, and one drawn from all, is looked for by its own
embedding and by its word as soon as the writer says that it is saved (the word's embedding means
nothing here, so that the nearest scan and the nearest report may stand before the one that has the
word). Printed: searches, failures, studies not found, latencies.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from med3dvlm.scan import Preparation
from med3dvlm.search import SearchIndex, Study
from med3dvlm.search.index import make_entry

DIM, SAVE, TEND = 512, 20, 50


class Words:
    """Stands for a model: a text's embedding is drawn by its hash; scans are drawn directly."""

    label, reads_text, preparation = "made", True, Preparation()

    def fingerprint(self) -> str:
        return "made"

    def embed_volumes(self, volumes) -> np.ndarray:
        raise NotImplementedError

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        return np.stack([drawn(2**32 + sum(map(ord, text))) for text in texts])  # no study's


def drawn(seed: int) -> np.ndarray:
    row = np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)
    return row / np.linalg.norm(row)


def word(number: int) -> str:
    """A word that no other study has."""
    return "x" + "".join(chr(ord("a") + int(digit)) for digit in f"{number:07d}")


def entry(number: int):
    report = f"Findings: {word(number)}."
    study = Study(f"{number}", f"/a/{number}", f"{number}", report, {"site": f"{number % 7}"})
    return make_entry(study, drawn(number), drawn(-number % 2**31))


def write(folder: str, seconds: float) -> None:
    model, end, number = Words(), time.monotonic() + seconds, 1
    index = SearchIndex.create(folder, model)
    while time.monotonic() < end:
        index.put([entry(k) for k in range(number, number + SAVE)])
        number += SAVE
        if number // SAVE % TEND == 0:
            index.tend()
        print(number - 1, flush=True)


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 120.0
    with tempfile.TemporaryDirectory() as root:
        folder = str(Path(root) / "index")
        command = [sys.executable, __file__, "write", folder, str(seconds)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        last = int(writer.stdout.readline())
        index = SearchIndex.open(folder, model=Words())
        random, taken, failed, checked = np.random.default_rng(0), [], 0, 0
        lost = {"embedding": 0, "word": 0}
        for line in writer.stdout:
            saved, before = int(line), last
            last = saved
            for number in (*range(before + 1, saved + 1, 7), int(random.integers(1, saved + 1))):
                start = time.perf_counter()
                try:
                    near = index.search(vector=drawn(number), top=1)[0].id
                    named = [hit.id for hit in index.search(word(number), top=3)]
                except Exception as error:
                    failed += 1
                    print(f"failed: {error}")
                    continue
                taken.append((time.perf_counter() - start) / 2)
                checked += 1
                lost["embedding"] += near != str(number)
                lost["word"] += str(number) not in named
        writer.wait()
        p50, p99 = np.percentile(np.array(taken) * 1000, [50, 99])
        print(f"{seconds:.0f} s: {last} studies added, {2 * checked} searches, {failed} failed,")
        by = " and ".join(f"{count} by their {way}" for way, count in lost.items())
        print(f"not found at once: {by}; a search takes {p50:.0f} ms (p50), {p99:.0f} ms (p99)")
        problems, held = index.verify(), len(index)
        print(f"verify: {held} studies, {len(problems)} problems")
    return int(bool(failed or any(lost.values()) or problems or held != last))


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write(sys.argv[2], float(sys.argv[3]))
        sys.exit(0)
    sys.exit(main())
