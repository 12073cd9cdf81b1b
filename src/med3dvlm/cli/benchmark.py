"""`benchmark`: speed, each against the plain way in the same run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from med3dvlm.cli import common
from med3dvlm.cli.common import JsonOption

if TYPE_CHECKING:
    from med3dvlm.evaluate.tables import Results

app = typer.Typer(no_args_is_help=True, help="Measure speed, each against the plain way.")

RunsOption = Annotated[int, typer.Option(min=1, help="Timed runs of each form, by turns.")]
VariantOption = Annotated[str, typer.Option(help="nano, naive, tiny, small, base or large.")]
SizeOption = Annotated[
    tuple[int, int, int], typer.Option(min=1, help="Depth, height and width of a volume, voxels.")
]
BatchOption = Annotated[int, typer.Option(min=1, help="Volumes at once.")]
PublishedOption = Annotated[
    bool, typer.Option("--published", help="The linear stem of the published weights.")
]
MemoryOption = Annotated[
    bool, typer.Option(help="Measure memory, each form in a process of its own.")
]


@app.command("encoder")
def encoder(
    variant: VariantOption = "small",
    size: SizeOption = (128, 256, 256),
    batch: BatchOption = 1,
    published: PublishedOption = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    runs: RunsOption = 5,
    memory: MemoryOption = True,
    plot: Annotated[
        Path | None, typer.Option(help="Measure other sizes and batches too, and draw a PNG.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The encoder's inference: arranged for speed, against the paper's form.

    Example: `med3dvlm benchmark encoder --variant small --plot cost.png`
    """
    from med3dvlm.benchmark.encoder import benchmark_encoder

    with common.errors.status("measuring"):
        results = benchmark_encoder(
            variant=variant,
            size=size,
            batch=batch,
            published=published,
            device=device,
            runs=runs,
            memory=memory,
            growth=plot is not None,
        )
    if plot is not None:
        from med3dvlm.benchmark.plot import draw_growth

        draw_growth(results, plot)
    _show(results, as_json)


@app.command("training-step")
def training_step(
    variant: VariantOption = "small",
    size: SizeOption = (128, 256, 256),
    batch: BatchOption = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "cpu",
    runs: RunsOption = 3,
    memory: MemoryOption = True,
    as_json: JsonOption = False,
) -> None:
    """One training step of the encoder, forward and backward, against the paper's form.

    Example: `med3dvlm benchmark training-step --variant nano --size 64 128 128 --batch 16`
    """
    from med3dvlm.benchmark.training import benchmark_training_step

    with common.errors.status("measuring"):
        results = benchmark_training_step(
            variant=variant, size=size, batch=batch, device=device, runs=runs, memory=memory
        )
    _show(results, as_json)


@app.command("end-to-end")
def end_to_end(
    scan: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="A NIfTI file; made from the bundled CT."),
    ] = None,
    variant: VariantOption = "small",
    published: PublishedOption = False,
    runs: RunsOption = 5,
    memory: MemoryOption = True,
    as_json: JsonOption = False,
) -> None:
    """From a NIfTI file to its embedding, against nibabel, interpolate and the paper's form.

    Example: `med3dvlm benchmark end-to-end --scan chest.nii.gz`
    """
    from med3dvlm.benchmark.end_to_end import benchmark_end_to_end

    with tempfile.TemporaryDirectory() as folder, common.errors.status("measuring"):
        results = benchmark_end_to_end(
            Path(folder),
            scan=scan,
            variant=variant,
            published=published,
            runs=runs,
            memory=memory,
        )
    _show(results, as_json)


@app.command("kernel")
def kernel(
    variant: Annotated[str, typer.Option(help="Whose stages: nano, …, small, base, large.")] = (
        "small"
    ),
    batch: Annotated[int, typer.Option(min=1, help="Volumes of 128×256×256 at once.")] = 8,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "bf16",
    runs: RunsOption = 20,
    as_json: JsonOption = False,
) -> None:
    """The fused depthwise convolution, against eager and torch.compile: needs a CUDA GPU.

    Example: `med3dvlm benchmark kernel --precision fp32`
    """
    from med3dvlm.benchmark.kernel import benchmark_kernel

    with common.errors.status("measuring"):
        results = benchmark_kernel(variant=variant, batch=batch, precision=precision, runs=runs)
    _show(results, as_json)


@app.command("loss")
def loss(
    batch: Annotated[int, typer.Option(min=8, help="Pairs.")] = 4096,
    dim: Annotated[int, typer.Option(min=1, help="Features of each.")] = 768,
    runs: RunsOption = 5,
    as_json: JsonOption = False,
) -> None:
    """The sigmoid loss with its gradients: in blocks, against the whole matrix at once.

    Example: `med3dvlm benchmark loss --batch 8192`
    """
    from med3dvlm.benchmark.loss import benchmark_loss

    with common.errors.status("measuring"):
        results = benchmark_loss(batch=batch, dim=dim, runs=runs)
    _show(results, as_json)


@app.command("generate")
def generate(
    model: common.ModelOption = "demo", runs: RunsOption = 5, as_json: JsonOption = False
) -> None:
    """Reports, answers and choices: together and remembered, against one by one and anew.

    Example: `med3dvlm benchmark generate`
    """
    from med3dvlm.benchmark.generate import benchmark_generate

    with common.errors.status("measuring"):
        results = benchmark_generate(model=model, runs=runs)
    _show(results, as_json)


@app.command("data")
def data(
    small_studies: Annotated[
        int, typer.Option(min=100, help="Studies of the store for random access.")
    ] = 5000,
    as_json: JsonOption = False,
) -> None:
    """The store: reading against .nii.gz, preparing with two workers, random access.

    Example: `med3dvlm benchmark data`
    """
    from med3dvlm.benchmark.store import benchmark_store

    with tempfile.TemporaryDirectory() as folder, common.errors.status("measuring"):
        results = benchmark_store(Path(folder), small_studies=small_studies)
    _show(results, as_json)


def _show(results: Results, as_json: bool) -> None:
    if as_json:
        common.print_json(results.to_dict())
    else:
        typer.echo(results.to_markdown())
