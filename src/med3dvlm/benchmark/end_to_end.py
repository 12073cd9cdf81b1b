"""From a NIfTI file to an embedding: read, prepare, encode; against the plain way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path

import nibabel
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from med3dvlm.benchmark.encoder import example_encoder
from med3dvlm.benchmark.measure import Form, closeness, compare, machine, timed
from med3dvlm.benchmark.plain import PlainDCFormer
from med3dvlm.evaluate.tables import Results, Row
from med3dvlm.scan import PRESETS, prepare, read_scan

Size = tuple[int, int, int]

SPACING_MM = 0.8  # in-plane, of the larger scan


def benchmark_end_to_end(
    folder: Path,
    *,
    scan: Path | None = None,
    variant: str = "small",
    published: bool = False,
    size: Sequence[int] = PRESETS["m3d"].size,
    runs: int = 5,
    memory: bool = True,
) -> Results:
    """Embedding of a file by the published preparation (M3D) and an encoder, on the CPU.

    Args:
        folder: where files for the measurement go.
        scan: a NIfTI file; the bundled CT resampled to the 0.8 mm of clinical series where not
            given.
    """
    path = scan or larger_scan(folder)
    shared = {"path": path, "variant": variant, "published": published, "size": tuple(size)}
    forms = [
        Form("plain", make_plain, shared),
        Form("med3dvlm, fp32", make_own, {"precision": "fp32", **shared}),
        Form("med3dvlm, bf16", make_own, {"precision": "bf16", **shared}, "bf16"),
    ]
    shape = "×".join(map(str, read_scan(path).shape))
    stored = f"{path.stat().st_size / 1e6:.1f} MB"
    results = Results({**machine(), "scan": f"{shape} voxels, {stored}", "variant": variant})
    results.add("File to embedding", compare(forms, runs=runs, memory=memory), shares=False)
    results.add("Where the time goes", _parts(**shared, runs=runs), shares=False)
    return results


def larger_scan(folder: Path) -> Path:
    """The bundled CT on a finer grid, with a little noise, as int16 and gzipped."""
    bundled = files("med3dvlm") / "assets" / "scans" / "ct_abdomen_pelvis.nii.gz"
    with as_file(bundled) as path:
        image = nibabel.load(path)
    voxels = torch.from_numpy(np.asarray(image.dataobj, np.float32))[None, None]
    factors = [max(1.0, mm / SPACING_MM) for mm in image.header.get_zooms()[:2]]
    fine = F.interpolate(voxels, scale_factor=(*factors, 1.0), mode="trilinear")[0, 0].numpy()
    fine += np.random.default_rng(0).normal(0, 8, fine.shape)
    affine = image.affine @ np.diag([*(1 / factor for factor in factors), 1.0, 1.0])
    target = folder / "scan.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.round(fine).astype(np.int16), affine), target)
    return target


def make_plain(path: Path, variant: str, published: bool, size: Size) -> Callable[[], Tensor]:
    """nibabel, whole-volume arithmetic, `interpolate`, the paper's encoder."""
    model = example_encoder(variant, published=published).eval()
    encoder = PlainDCFormer.like(model)

    @torch.inference_mode()
    def run() -> Tensor:
        return model.pool(encoder(plain_volume(path, size)))

    return run


def plain_volume(path: Path, size: Size) -> Tensor:
    """(1, 1, D, H, W): the published preparation, step by step."""
    image = nibabel.as_closest_canonical(nibabel.load(path))
    voxels = image.get_fdata(dtype=np.float32)[::-1, ::-1].transpose(2, 1, 0)  # RAS to LPS
    voxels = (voxels - voxels.min()) / (voxels.max() - voxels.min())
    filled = np.argwhere(voxels > 0)
    low, high = filled.min(axis=0), filled.max(axis=0) + 1
    box = voxels[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    volume = torch.from_numpy(np.ascontiguousarray(box))[None, None]
    return F.interpolate(volume, size, mode="trilinear", align_corners=False)


def make_own(
    path: Path, variant: str, published: bool, size: Size, precision: str
) -> Callable[[], Tensor]:
    """What `embed_scans` does up to the pooled state."""
    model = example_encoder(variant, published=published).eval().optimize_for_inference(precision)
    preparation = replace(PRESETS["m3d"], size=size)

    @torch.inference_mode()
    def run() -> Tensor:
        volume = prepare(read_scan(path), preparation)
        return model.pool(model(torch.from_numpy(volume)[None], last=model.config.pool_reads))

    return run


def _parts(path: Path, variant: str, published: bool, size: Size, runs: int) -> list[Row]:
    """Median seconds of reading, preparing and encoding, each way."""
    model = example_encoder(variant, published=published).eval()
    plain = PlainDCFormer.like(model)
    model.optimize_for_inference()
    preparation = replace(PRESETS["m3d"], size=size)
    volume = torch.from_numpy(prepare(read_scan(path), preparation))[None]
    with torch.inference_mode():
        apart = closeness(plain_volume(path, size), volume)
        acts: dict[str, tuple[Callable, Callable]] = {
            "read and prepare": (
                lambda: plain_volume(path, size),
                lambda: prepare(read_scan(path), preparation),
            ),
            "encode": (lambda: plain(volume), lambda: model(volume)),
        }
        rows: list[Row] = []
        for name, (usual, own) in acts.items():
            times = np.array([[timed(usual), timed(own)] for _ in range(runs)])
            a, b = np.median(times, axis=0)
            rows.append({"part": name, "plain, s": a, "med3dvlm, s": b, "times as fast": a / b})
        read = float(np.median([timed(lambda: read_scan(path)) for _ in range(runs)]))
    rows.append({"part": "of it: read", "med3dvlm, s": read})
    rows.append(
        {"part": "difference of the volumes, of their range", "med3dvlm, s": apart["error"]}
    )
    return rows
