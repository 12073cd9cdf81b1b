"""The encoder's inference: arranged for speed, against the paper's form."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from med3dvlm.benchmark.measure import Ceiling, Form, Work, closeness, compare, count_flop, machine
from med3dvlm.benchmark.plain import PlainDCFormer
from med3dvlm.evaluate.tables import Results, Row
from med3dvlm.models import DCFormer, DCFormerConfig

GROWTH_SIZES = ((32, 64, 64), (48, 96, 96), (64, 128, 128), (96, 192, 192), (128, 256, 256))
GROWTH_BATCHES = (1, 2, 4, 8)
GROWTH_VOLUME = (64, 128, 128)
"""The volume of which several are taken at once."""


def benchmark_encoder(
    *,
    variant: str = "small",
    size: Sequence[int] = (128, 256, 256),
    batch: int = 1,
    published: bool = False,
    device: str = "cpu",
    runs: int = 5,
    memory: bool = True,
    growth: bool = False,
) -> Results:
    """Time, memory and errors of one inference.

    Args:
        published: the linear stem of the published weights, not the project's with GELU.
        growth: also tables of the cost against the volume's size and the batch.
    """
    what = {"variant": variant, "published": published, "device": device}
    ceiling = Ceiling.measure(device)
    results = Results(
        {**machine(device), **ceiling.facts(), "variant": variant, "stem": _stem(published)}
    )
    forms = encoder_forms(what, size, batch)
    work = encoder_work(variant, size, batch)
    rows = compare(forms, runs=runs, agree=agree, work=work, ceiling=ceiling, memory=memory)
    grid = "×".join(map(str, size))
    results.add(f"Encoder, {batch} × {grid}", rows, shares=False)
    results.notes.append(
        f"{work.flop / 1e9:.1f} GFLOP in the paper's form, and at least {work.bytes / 1e6:.0f} MB "
        "of volume, weights and streams in fp32"
    )
    if growth:
        sizes = [(f"1 × {'×'.join(map(str, s))}", s, 1) for s in GROWTH_SIZES]
        results.add("Growth with the volume", _growth(what, sizes, runs), shares=False)
        batches = [
            (f"{n} × {'×'.join(map(str, GROWTH_VOLUME))}", GROWTH_VOLUME, n) for n in GROWTH_BATCHES
        ]
        results.add("Growth with the batch", _growth(what, batches, runs), shares=False)
    return results


def encoder_forms(what: dict, size: Sequence[int], batch: int) -> list[Form]:
    shared = {**what, "size": tuple(size), "batch": batch}
    return [
        Form("plain", make_encoder, {"precision": None, **shared}),
        Form("optimized, fp32", make_encoder, {"precision": "fp32", **shared}),
        Form("optimized, bf16", make_encoder, {"precision": "bf16", **shared}, "bf16"),
    ]


def make_encoder(
    precision: str | None, variant: str, published: bool, device: str, size: tuple, batch: int
) -> Callable[[], list[Tensor]]:
    """Gives the two streams that a language model reads and the pooled state, the embedding
    before its projection; the plain form, which keeps all streams, where no precision is given."""
    model = example_encoder(variant, published=published).eval()
    volumes = torch.rand(batch, 1, *size, generator=torch.Generator().manual_seed(0)).to(device)
    if precision is None:
        form = PlainDCFormer.like(model).to(device)
    else:
        form = model.to(device).optimize_for_inference(precision)

    wanted = {} if precision is None else {"last": model.config.language_reads}

    @torch.inference_mode()
    def run() -> list[Tensor]:
        streams = form(volumes, **wanted)
        return [*model.streams(streams), model.pool(streams)]

    with torch.inference_mode():
        form(volumes[..., :8, :8, :8])  # so that folding the weights counts with loading them
    return run


def example_encoder(variant: str, *, published: bool = False) -> DCFormer:
    """Random weights: what they are changes no cost. Scales and statistics as after training."""
    torch.manual_seed(0)
    activation = "none" if published else "gelu"
    model = DCFormer(DCFormerConfig(variant=variant, stem_activation=activation))
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("layer_scale", "running_var")):
                value.uniform_(0.3, 1.2)
            elif name.endswith(("bias", "running_mean")):
                value.normal_(0, 0.2)
    return model


def agree(plain: list[Tensor], other: list[Tensor]) -> Row:
    """The worst token's error, and error and direction of the pooled state."""
    pooled = closeness(plain[-1], other[-1])
    return {
        "error, worst stream": closeness(plain[:-1], other[:-1])["error"],
        "error, pooled": pooled["error"],
        "cosine, pooled": pooled["cosine"],
    }


def encoder_work(variant: str, size: Sequence[int], batch: int) -> Work:
    """Counted on the plain form, without computing anything."""
    with torch.device("meta"):
        model = PlainDCFormer(DCFormerConfig(variant=variant)).eval()
        volumes = torch.empty(batch, 1, *size)
        streams: list[Tensor] = []
        with torch.no_grad():
            flop = count_flop(lambda: streams.extend(model(volumes)))
    values = [volumes, *streams, *model.parameters()]
    return Work(flop=flop, bytes=4.0 * sum(value.numel() for value in values))


def _growth(what: dict, cases: Sequence[tuple[str, Sequence[int], int]], runs: int) -> list[Row]:
    rows = []
    for name, size, batch in cases:
        forms = encoder_forms(what, size, batch)
        found = compare(forms, runs=runs, agree=agree, memory=False)
        voxels = batch * size[0] * size[1] * size[2]
        row: Row = {"volumes": name, "million voxels": voxels / 1e6}
        row |= {
            f"{form.name}, s": entry["seconds"] for form, entry in zip(forms, found, strict=True)
        }
        rows.append(row)
    return rows


def _stem(published: bool) -> str:
    return "linear, as published" if published else "GELU"
