"""What one study costs an index, step by step: `python benchmarks/search_costs.py`.

The bundled CT, prepared as M3D is (128×256×256), and an encoder of the published size (`small`,
768-d) with drawn weights, in bf16, four volumes at a time. Printed: milliseconds and bytes a study,
and what 10 million studies need at that, on one machine like this one.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch

from med3dvlm.data.phantoms import make_study
from med3dvlm.data.sources import content_hash
from med3dvlm.models import DCFormer, DCFormerConfig
from med3dvlm.scan import PRESETS, prepare, read_scan
from med3dvlm.search import SearchIndex, Study
from med3dvlm.search.index import make_entry
from med3dvlm.search.lance import LancePlace

STUDIES, DIM, WRITTEN = 10_000_000, 768, 2000


def seconds(act: Callable[[], object], *, repeats: int = 3) -> float:
    """The median, the first left out."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        act()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken[1:]))


def main() -> int:
    bundled = files("med3dvlm") / "assets" / "scans" / "ct_abdomen_pelvis.nii.gz"
    costs: dict[str, float] = {}
    with as_file(bundled) as path, tempfile.TemporaryDirectory() as folder:
        scan = read_scan(path)
        volume = torch.from_numpy(prepare(scan, PRESETS["m3d"])).unsqueeze(0)
        size = path.stat().st_size
        costs["hash"] = seconds(lambda: content_hash(path))
        costs["read"] = seconds(lambda: read_scan(path))
        costs["prepare"] = seconds(lambda: prepare(scan, PRESETS["m3d"]))
        encoder = DCFormer(DCFormerConfig(variant="small")).eval().to(torch.bfloat16)
        batch = volume.repeat(4, 1, 1, 1, 1).to(torch.bfloat16)
        with torch.inference_mode():
            costs["encode, 2 cores, bf16"] = seconds(lambda: encoder(batch), repeats=2) / 4
        costs["write"] = written(Path(folder)) / WRITTEN
        bytes_each = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()) / WRITTEN
    print(f"the bundled CT: {scan.array.shape} voxels, {size / 1e6:.1f} MB compressed\n")
    print("| step | ms a study | 10 million, machine-hours |\n| --- | --- | --- |")
    for name, cost in costs.items():
        print(f"| {name} | {1000 * cost:.1f} | {STUDIES * cost / 3600:.0f} |")
    print(f"\nindex: {bytes_each:.0f} bytes a study of {DIM} dimensions with report, ", end="")
    print(f"{STUDIES * bytes_each / 1e9:.0f} GB for 10 million")
    return 0


def written(folder: Path) -> float:
    """Seconds to write so many studies with reports, and to tend the index."""
    generation = {"table": "studies-1", "model": "-", "weights": "-", "preparation": "-"}
    head = {"format": 2, "generations": [generation], "sources": []}
    index = SearchIndex(LancePlace(folder), head, generation)
    random = np.random.default_rng(0)
    rows = random.standard_normal((2, WRITTEN, DIM)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    reports = [make_study(k, split="test").report for k in range(50)]
    start = time.perf_counter()
    for first in range(0, WRITTEN, 200):
        index.put(
            [
                make_entry(
                    Study(f"{k}", f"/archive/{k}", f"{k:064x}", reports[k % 50], {"site": "a"}),
                    rows[0, k],
                    rows[1, k],
                )
                for k in range(first, first + 200)
            ]
        )
    index.tend()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
