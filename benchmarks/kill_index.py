"""Kill an index build at ten moments: `python benchmarks/kill_index.py STORE`.

The real command builds an index of a prepared store with the bundled model; it is killed (-9) when
a tenth more of the studies is saved, and started again. At the end the index must hold every study
of the store once, and be whole.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from med3dvlm.data.store import Store
from med3dvlm.search import SearchIndex, SearchIndexError

KILLS = 10


def count(folder: Path) -> int:
    try:
        return len(SearchIndex.open(folder))
    except SearchIndexError:
        return 0


def main() -> int:
    store = Store(sys.argv[1])
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "index"
        command = [sys.executable, "-m", "med3dvlm.cli", "index", "build", store.location]
        command += ["-o", str(folder)]
        for kill in range(KILLS):
            child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            wanted = len(store) * (kill + 1) // (KILLS + 1)
            while count(folder) < wanted and child.poll() is None:
                time.sleep(0.2)
            child.send_signal(signal.SIGKILL)
            child.wait()
            problems = SearchIndex.open(folder).verify()
            print(f"kill {kill + 1}: {count(folder)} studies, {len(problems)} problems", flush=True)
            if problems:
                return 1
        subprocess.run(command, check=True)
        index = SearchIndex.open(folder)
        found = [study.path for study in index.select()]
        expected = sorted(f"{store.location}#{name}" for name in store.ids)
        print(f"end: {len(found)} of {len(store)} studies, {len(index.verify())} problems")
        return int(found != expected or bool(index.verify()))


if __name__ == "__main__":
    sys.exit(main())
