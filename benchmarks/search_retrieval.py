"""Does an index find what evaluation finds? `python benchmarks/search_retrieval.py STORE`.

Both get the same studies of a prepared store and the bundled model. `evaluate retrieval` compares
all reports with all scans; the index is asked for every report, in words (`--plain`) and fused.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from med3dvlm import load
from med3dvlm.data.store import Store
from med3dvlm.evaluate.tables import Row, Table
from med3dvlm.evaluate.tasks import cases_of_store, evaluate_retrieval
from med3dvlm.search import SearchIndex, build_index

RANKS = (1, 5, 10)


def main() -> int:
    store, model = Store(sys.argv[1]), load("demo", part="search")
    split = store.table["splits"][0].as_py()[0]
    cases = cases_of_store(store, split, leaks=True)
    run = evaluate_retrieval(model, cases, controls=0)
    rows: list[Row] = [{"way": "evaluate retrieval, text to scan"}]
    for k in RANKS:
        hits = [sample["scores"][f"R@{k} text to scan"] for sample in run.samples]
        rows[0][f"R@{k}"] = sum(hits) / len(hits)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        build_index(store.location, model, Path(folder) / "i")
        built = time.perf_counter() - start
        index = SearchIndex.open(Path(folder) / "i", model=model)
        for way, plain in (("index, plain", True), ("index, fused", False)):
            ranks = []
            for name, report in zip(cases.ids, cases.reports, strict=True):
                hits = index.search(report, top=max(RANKS), plain=plain)
                found = [hit.rank for hit in hits if hit.id == name]
                ranks.append(found[0] if found else max(RANKS) + 1)
            row: Row = {"way": way}
            for k in RANKS:
                row[f"R@{k}"] = sum(rank <= k for rank in ranks) / len(ranks)
            rows.append(row)
    print(Table(f"{len(cases)} phantoms, no patients", rows).to_markdown())
    print(f"\nbuilt from the store in {built:.0f} s, {len(cases) / built:.1f} studies a second")
    same = all(abs(float(rows[0][f"R@{k}"]) - float(rows[1][f"R@{k}"])) < 1e-9 for k in RANKS)
    print("equal" if same else "NOT equal")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
