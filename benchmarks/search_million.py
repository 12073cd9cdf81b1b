"""One million studies in an index: `python benchmarks/search_million.py FOLDER [STEP]...`.

512-d embeddings as models make them, not uniform noise: a common direction, a region, a protocol
and 0 to 20 of 60 findings (frequent ones first) with random weights, 96 directions of falling
variance that are the patient, and a little of everything else; length 1. Metadata: site, date,
modality, age. The report of two thirds of them names the findings, present and absent. Queries:
1,000 further embeddings of the same kind, whose exact neighbours numpy finds.

Steps, each leaving its figures in FOLDER/figures.json, so that they can be run one by one:

    data     the embeddings and the exact answers
    write    the index, through the code that `index build` uses, 10,000 studies a save
    tend     what the database needs to search fast: words, look-ups, the approximate index
    search   recall at 10, and latencies of 1 and of 16 clients
    exact    the same without the approximate index
    faiss    IVF with 8-bit codes, as a library alone, without metadata or updates
    table    print all

Needs 12 GB of disk and `pip install faiss-cpu` for its step.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from med3dvlm.search import SearchIndex, Study
from med3dvlm.search.index import FORMAT
from med3dvlm.search.lance import LancePlace
from med3dvlm.search.study import Entry

COUNT, DIM, QUERIES, TOP = 1_000_000, 512, 1000, 10
BLOCK = 10_000
REGIONS, PROTOCOLS, FINDINGS, PATIENT = 24, 40, 60, 96
NAMES = [f"{side} {what}" for side in ("left", "right", "diffuse") for what in (
    "effusion", "nodule", "mass", "cyst", "fracture", "stone", "stenosis", "edema", "abscess",
    "hernia", "collapse", "embolism", "bleeding", "dilatation", "plaque", "scar", "fibrosis",
    "thickening", "perforation", "infarct",
)]  # fmt: skip


def make(count: int, seed: int) -> np.ndarray:
    """(count, DIM) embeddings."""
    fixed = np.random.default_rng(1234)

    def directions(number: int) -> np.ndarray:
        rows = fixed.standard_normal((number, DIM)).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def rare_last(number: int) -> np.ndarray:
        weights = 1 / np.arange(1, number + 1)
        return weights / weights.sum()

    common, region, protocol = directions(1)[0], directions(REGIONS), directions(PROTOCOLS)
    finding, patient = directions(FINDINGS), directions(PATIENT)
    spread = np.arange(1, PATIENT + 1, dtype=np.float32) ** -0.7
    random = np.random.default_rng(seed)
    there = findings(count, random)
    weight = there * random.uniform(0.3, 0.7, (count, FINDINGS))
    x = 0.8 * common + 0.7 * region[random.choice(REGIONS, count, p=rare_last(REGIONS))]
    x += 0.4 * protocol[random.choice(PROTOCOLS, count, p=rare_last(PROTOCOLS))]
    x += weight.astype(np.float32) @ finding
    own = random.standard_normal((count, PATIENT), np.float32) * (spread / np.linalg.norm(spread))
    x += 0.8 * own @ patient
    x += random.standard_normal((count, DIM), np.float32) * np.float32(0.25 / DIM**0.5)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def findings(count: int, random: np.random.Generator) -> np.ndarray:
    """(count, FINDINGS) bool, the first that is drawn."""
    return random.random((count, FINDINGS)) < 0.25 * np.arange(1, FINDINGS + 1) ** -0.8


def entries(block: int, rows: np.ndarray) -> Iterator[Entry]:
    there = findings(BLOCK, np.random.default_rng(100 + block))
    random = np.random.default_rng(block)
    for i, row in enumerate(rows):
        number = block * BLOCK + i
        asserted = "\n".join(NAMES[k] for k in np.flatnonzero(there[i])) if number % 3 else ""
        denied = " ".join(f"No {NAMES[k]}." for k in random.integers(0, FINDINGS, 4))
        metadata = {
            "site": f"site {number % 37}",
            "date": f"{2015 + number % 11}-{1 + number % 12:02d}-{1 + number % 28:02d}",
            "modality": "CT" if number % 4 else "MR",
            "age": int(random.integers(0, 100)),
        }
        report = f"{denied} {asserted}" if asserted else ""
        study = Study(f"{number}", f"/archive/{number:07d}", f"{number:064x}", report, metadata)
        yield Entry(study, row, None, asserted)


def step_data(folder: Path) -> dict[str, Any]:
    out = np.lib.format.open_memmap(folder / "vectors.npy", "w+", "float32", (COUNT, DIM))
    for block in range(COUNT // BLOCK):
        out[block * BLOCK : (block + 1) * BLOCK] = make(BLOCK, 100 + block)
    queries = make(QUERIES, 7)
    best = np.full((QUERIES, TOP), -1), np.full((QUERIES, TOP), -2.0, np.float32)
    for first in range(0, COUNT, 50_000):
        scores = np.hstack([best[1], queries @ out[first : first + 50_000].T])
        numbers = np.hstack([best[0], np.tile(np.arange(first, first + 50_000), (QUERIES, 1))])
        top = np.argpartition(-scores, TOP, axis=1)[:, :TOP]
        best = np.take_along_axis(numbers, top, 1), np.take_along_axis(scores, top, 1)
    np.savez(folder / "truth.npz", queries=queries, nearest=best[0])
    return {"cosine to the nearest, mean": float(best[1].max(axis=1).mean())}


def step_write(folder: Path) -> dict[str, Any]:
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    generation = {"table": "studies-1", "model": "made", "weights": "0", "preparation": "0"}
    head = {"format": FORMAT, "generations": [generation], "sources": []}
    place = LancePlace(folder / "index")
    index = SearchIndex(place, head, generation)
    if place.read_head() is not None:
        index = SearchIndex.open(folder / "index")
    first, start, made = len(index) // BLOCK, time.perf_counter(), 0.0
    for block in range(first, COUNT // BLOCK):
        before = time.perf_counter()
        rows = list(entries(block, vectors[block * BLOCK : (block + 1) * BLOCK]))
        made += time.perf_counter() - before
        index.put(rows)
    seconds = time.perf_counter() - start - made
    return {"write, s": seconds, "studies a second": (COUNT - first * BLOCK) / max(seconds, 1e-9)}


def step_tend(folder: Path) -> dict[str, Any]:
    index, start = SearchIndex.open(folder / "index"), time.perf_counter()
    index.tend()
    return {"tend, s": time.perf_counter() - start, "disk, GB": size(folder / "index") / 1e9}


def step_search(folder: Path) -> dict[str, Any]:
    index = SearchIndex.open(folder / "index")
    queries, nearest = truth(folder)
    table = index.table
    assert table is not None

    def paths(k: int, limit: int = TOP) -> set[int]:
        return {int(path[9:]) for path, _ in table.nearest(queries[k], limit=limit)}

    found = [len(paths(k) & set(nearest[k].tolist())) for k in range(0, QUERIES, 5)]
    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    dates = np.arange(COUNT) % 11 >= 9  # 2024 and later
    where = index.conditions(["date>=2024-01-01"])
    filtered = []
    for k in range(0, QUERIES, 100):
        exact = np.argsort(-(vectors @ queries[k])[dates])[:TOP]
        expected = set(np.flatnonzero(dates)[exact].tolist())
        got = {int(path[9:]) for path, _ in table.nearest(queries[k], limit=TOP, where=where)}
        filtered.append(len(expected & got) / TOP)
    words = ["left effusion", "right nodule", "diffuse fibrosis", "left cyst stone"]
    figures: dict[str, Any] = {
        "recall@10": float(np.mean(found)) / TOP,
        "recall@10, filtered by date": float(np.mean(filtered)),
    }
    asked: dict[str, Callable[[int], object]] = {
        "nearest": lambda k: table.nearest(queries[k], limit=TOP),
        "search by scan": lambda k: index.search(vector=queries[k]),
        "search by scan, filtered": lambda k: index.search(
            vector=queries[k], where=["date>=2024-01-01"]
        ),
        "words": lambda k: table.matching(words[k % 4], limit=200),
    }
    for name, act in asked.items():
        figures[f"{name}, 1 client"] = latency(act, clients=1, each=100)
        figures[f"{name}, 16 clients"] = latency(act, clients=16, each=12)
    return {**figures, "memory, GB": memory()}


def step_exact(folder: Path) -> dict[str, Any]:
    index = SearchIndex.open(folder / "index")
    queries, nearest = truth(folder)
    table: Any = index.table

    def ask(k: int) -> set[int]:
        search = table.table.search(queries[k], vector_column_name="vector", query_type="vector")
        search = search.distance_type("dot").bypass_vector_index().limit(TOP)
        return {int(path[9:]) for path in search.select(["path"]).to_arrow()["path"].to_pylist()}

    found = [len(ask(k) & set(nearest[k].tolist())) for k in range(4)]
    return {
        "exact, recall@10": float(np.mean(found)) / TOP,
        "exact, 1 client": latency(ask, clients=1, each=8),
        "exact, 16 clients": latency(ask, clients=16, each=1),
        "exact, memory, GB": memory(),
    }


def step_faiss(folder: Path) -> dict[str, Any]:
    import faiss

    vectors = np.load(folder / "vectors.npy", mmap_mode="r")
    queries, nearest = truth(folder)
    start = time.perf_counter()
    index = faiss.index_factory(DIM, "IVF1000,SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(np.ascontiguousarray(vectors[:: COUNT // 100_000]))
    for first in range(0, COUNT, 50_000):
        index.add(np.ascontiguousarray(vectors[first : first + 50_000]))
    built = time.perf_counter() - start
    index.nprobe = 50
    faiss.write_index(index, str(folder / "faiss.index"))

    def ask(k: int) -> set[int]:
        return set(index.search(queries[k : k + 1], TOP)[1][0].tolist())

    found = [len(ask(k) & set(nearest[k].tolist())) for k in range(0, QUERIES, 4)]
    return {
        "faiss, build, s": built,
        "faiss, recall@10": float(np.mean(found)) / TOP,
        "faiss, 1 client": latency(ask, clients=1, each=100),
        "faiss, 16 clients": latency(ask, clients=16, each=12),
        "faiss, disk, GB": (folder / "faiss.index").stat().st_size / 1e9,
        "faiss, memory, GB": memory(),
    }


def latency(act: Callable[[int], object], *, clients: int, each: int) -> str:
    """p50 and p99 in ms, and queries a second, of so many threads that ask one after another."""
    taken: list[float] = []
    act(0)

    def client(first: int) -> None:
        for k in range(each):
            start = time.perf_counter()
            act((first * each + k) % QUERIES)
            taken.append(time.perf_counter() - start)

    threads = [threading.Thread(target=client, args=(k,)) for k in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = len(taken) / (time.perf_counter() - start)
    p50, p99 = np.percentile(np.array(taken) * 1000, [50, 99])
    return f"{p50:.0f} / {p99:.0f} ms, {rate:.0f}/s"


def truth(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    held = np.load(folder / "truth.npz")
    return held["queries"], held["nearest"]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def memory() -> float:
    """The most that this process held at a time, page cache not counted."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


STEPS = {
    "data": step_data,
    "write": step_write,
    "tend": step_tend,
    "search": step_search,
    "exact": step_exact,
    "faiss": step_faiss,
}


def main() -> int:
    folder, wanted = Path(sys.argv[1]), sys.argv[2:] or [*STEPS, "table"]
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "figures.json"
    for name in wanted:
        figures = json.loads(kept.read_text()) if kept.is_file() else {}
        if name == "table":
            print("| what | figure |\n| --- | --- |")
            for key, value in figures.items():
                print(f"| {key} | {value if isinstance(value, str) else f'{value:.4g}'} |")
            continue
        figures |= STEPS[name](folder)
        kept.write_text(json.dumps(figures, indent=2) + "\n")
        print(name, "done", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
