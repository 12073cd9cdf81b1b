"""Kill an index build at ten moments: `python benchmarks/kill_index.py STORE [--save-every 10]`.

What `index build` does runs with the bundled model on a prepared store, saves now and then, is
killed (-9) when some more are saved, and is started again. After each kill the index must be
whole; at the end it must hold every study of the store once. Children come from a server that has
imported everything and computed nothing: a process with threads of its own must not be forked.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from med3dvlm import load
from med3dvlm.data.store import Store
from med3dvlm.search import How, SearchIndex, build_index

KILLS = 10
FORK = multiprocessing.get_context("forkserver")


def build_it(store: str, folder: Path, save_every: int) -> None:
    build_index(store, load("demo", part="search"), folder, how=How(save_every=save_every))


def look(folder: Path, answer: Any) -> None:
    index = SearchIndex.open(folder)
    answer.put((len(index), index.verify()))


def saves(folder: Path) -> int:
    return len(list(folder.glob("studies-1.lance/_versions/*.manifest")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("store")
    parser.add_argument("--save-every", type=int, default=10, help="studies")
    options = parser.parse_args()
    store, random_ = Store(options.store), random.Random(0)
    FORK.set_forkserver_preload(["med3dvlm.search", "med3dvlm.models", "med3dvlm.data.store"])
    answer = FORK.SimpleQueue()
    with tempfile.TemporaryDirectory() as root:
        folder, bad = Path(root) / "index", 0
        share = len(store) / options.save_every / (KILLS + 1)  # saves between two kills
        for kill in range(KILLS):
            before = saves(folder)
            child = FORK.Process(target=build_it, args=(store.location, folder, options.save_every))
            child.start()
            wanted = before + max(1, round(share)) + (3 if kill == 0 else 0)
            while saves(folder) < wanted and child.is_alive():
                time.sleep(0.002)
            time.sleep(random_.random() * 0.2)
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()
            looking = FORK.Process(target=look, args=(folder, answer))
            looking.start()
            count, problems = answer.get()
            looking.join()
            bad += len(problems)
            print(f"kill {kill + 1}: {count} studies, {len(problems)} problems", flush=True)
        last = FORK.Process(target=build_it, args=(store.location, folder, options.save_every))
        last.start()
        last.join()
        index = SearchIndex.open(folder)
        found = [study.path for study in index.select()]
        problems = index.verify()
        print(f"end: {len(found)} of {len(store)} studies, {len(problems)} problems")
        expected = sorted(f"{store.location}#{name}" for name in store.ids)
        return int(bool(bad or problems) or found != expected)


if __name__ == "__main__":
    sys.exit(main())
