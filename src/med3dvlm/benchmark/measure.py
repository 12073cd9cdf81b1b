"""Time and memory of several forms of one computation, against what the machine can do at best.

A benchmark makes a list of forms, the plain one first, and hands it to :func:`compare`, which
checks that they give the same, runs them by turns, and says in rows what each costs. The forms
meet the same noise, so that ratios hold where absolute times do not.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from med3dvlm.evaluate.tables import Row
from med3dvlm.train.memory import freed_memory_kept

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Form:
    """One way to compute something.

    Attributes:
        make: called with `arguments`, prepares everything (weights, input) and gives a function
            without arguments that does the work once and returns its result. A function of a
            module, not a lambda: memory is measured in a process of its own, which calls it anew.
        precision: "fp32" or "bf16", what its products are computed in.
        trains: it keeps the memory that it frees, as a training run does, and is timed in its
            second step in a row.
    """

    name: str
    make: Callable[..., Callable[[], Any]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    trains: bool = False

    def ready(self) -> Callable[[], Any]:
        return self.make(**self.arguments)

    def timed(self, act: Callable[[], Any]) -> float:
        """Seconds of what `ready` gave."""
        if not self.trains:
            return timed(act)
        with freed_memory_kept():
            act()
            return timed(act)


@dataclass(frozen=True)
class Work:
    """What any form must do at least: the method's operations (2 a multiply-add), and the bytes
    of its input, weights and output, each moved once, in fp32."""

    flop: float
    bytes: float


@dataclass(frozen=True)
class Ceiling:
    """What the machine did at best just now.

    Attributes:
        flops: floating-point operations a second of a matrix product, by precision.
        bandwidth: bytes a second of a copy, what is read and what is written.
    """

    flops: Mapping[str, float]
    bandwidth: float

    @classmethod
    def measure(cls, device: str = "cpu", *, runs: int = 8) -> Ceiling:
        """The best of a few runs: square products, and a copy far larger than the caches."""
        size, floats = (8192, 2**28) if device.startswith("cuda") else (2048, 2**26)
        flops = {}
        for name, dtype in DTYPES.items():
            a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            flops[name] = 2 * size**3 / _best(lambda a=a, b=b: a @ b, runs)
        source = torch.zeros(floats, device=device)
        target = torch.empty_like(source)
        return cls(flops, 8 * floats / _best(lambda: target.copy_(source), runs))

    def seconds(self, work: Work, precision: str) -> float:
        """The least time for this work: its operations or its bytes, whichever takes longer."""
        size = DTYPES[precision].itemsize / 4
        return max(work.flop / self.flops[precision], work.bytes * size / self.bandwidth)

    def facts(self) -> dict[str, Any]:
        rates = {f"matrix product {k}, GFLOP/s": round(v / 1e9) for k, v in self.flops.items()}
        return {**rates, "copy, GB/s": round(self.bandwidth / 1e9, 1)}


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a table of figures must name."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {"machine": name, "python": platform.python_version(), "torch": torch.__version__}


def compare(
    forms: Sequence[Form],
    *,
    runs: int = 5,
    agree: Callable[[Any, Any], Row] | None = None,
    work: Work | None = None,
    ceiling: Ceiling | None = None,
    memory: bool = True,
) -> list[Row]:
    """A row for each form; the first is the plain one that the others are held against.

    Args:
        runs: timed runs of each, by turns, after one that is not timed.
        agree: (result of the plain form, result of this one) -> columns that say how far they
            agree; :func:`closeness` where not given. It may raise, to refuse a wrong result.
        work, ceiling: to say which share of the ceiling a form reaches.
        memory: measure it, each form in a process of its own.

    Returns:
        Columns: median seconds with the quartiles; `times as fast`, the median over the runs of
        the plain form's time by this one's, with the quartiles; what `agree` says;
        `peak, MB` of a process that makes the form and runs it once, and of that `needed, MB`
        for the run; `share of the ceiling`.
    """
    ready = [form.ready() for form in forms]
    results = [run() for run in ready]
    found = [(agree or closeness)(results[0], result) for result in results]
    del results
    seconds = np.array([_round(forms, ready, start) for start in range(runs)])  # (runs, forms)
    del ready
    rows: list[Row] = []
    for i, form in enumerate(forms):
        low, middle, high = np.percentile(seconds[:, i], [25, 50, 75])
        ratios = np.percentile(seconds[:, 0] / seconds[:, i], [25, 50, 75])
        row: Row = {
            "form": form.name,
            "seconds": float(middle),
            "from": float(low),
            "to": float(high),
            "times as fast": float(ratios[1]),
            "spread": f"{ratios[0]:.2f}–{ratios[2]:.2f}",
            **found[i],
        }
        if memory:
            row["peak, MB"], row["needed, MB"] = peak_memory(form)
        if work is not None and ceiling is not None:
            row["share of the ceiling"] = ceiling.seconds(work, form.precision) / float(middle)
        rows.append(row)
    return rows


def closeness(plain: Any, other: Any) -> Row:
    """How far two results agree: tensors, or lists of them in the same order and shapes.

    The error is the largest difference over the largest value, of the tensor where that is worst;
    the cosine is of the tensor, flattened, where that is lowest.
    """
    pairs = list(zip(_tensors(plain), _tensors(other), strict=True))
    errors = [float((a - b).abs().max() / a.abs().max()) for a, b in pairs]
    cosines = [float(a.flatten() @ b.flatten() / (a.norm() * b.norm())) for a, b in pairs]
    return {"error": max(errors), "cosine": min(cosines)}


def count_flop(act: Callable[[], Any]) -> float:
    """Operations of the products and convolutions in `act`, 2 a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        act()
    return float(counter.get_total_flops())


def peak_memory(form: Form) -> tuple[float, float]:
    """(MB of a process that makes the form and runs it once, at its highest; MB of the run)."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (form, torch.get_num_threads()))


def _peak_memory(form: Form, threads: int) -> tuple[float, float]:
    torch.set_num_threads(threads)
    run = form.ready()
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peak = torch.cuda.max_memory_allocated()
        return peak / 1e6, (peak - before) / 1e6
    _forget_peak()
    before = _resident("VmRSS")
    with freed_memory_kept() if form.trains else nullcontext():
        run()
    peak = _resident("VmHWM")
    return peak / 1e6, (peak - before) / 1e6


def _forget_peak() -> None:
    """Give freed memory back and start the kernel's high-water mark anew."""
    if sys.platform != "linux":
        raise OSError("memory is measured on Linux only: benchmark without it.")
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _resident(key: str) -> int:
    """Bytes, from the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}.")


def _round(forms: Sequence[Form], ready: Sequence[Callable[[], Any]], start: int) -> list[float]:
    """Seconds of each, once; each round begins with another."""
    seconds = [0.0] * len(ready)
    for i in range(len(ready)):
        k = (start + i) % len(ready)
        seconds[k] = forms[k].timed(ready[k])
    return seconds


def timed(act: Callable[[], Any]) -> float:
    """Seconds, with whatever a GPU still has to do."""
    _finish()
    start = time.perf_counter()
    act()
    _finish()
    return time.perf_counter() - start


def _finish() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _best(act: Callable[[], Any], runs: int) -> float:
    act()
    return min(timed(act) for _ in range(runs))


def _tensors(result: Any) -> list[Tensor]:
    several = result if isinstance(result, list | tuple) else [result]
    return [torch.as_tensor(tensor).detach().cpu().double() for tensor in several]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
