"""Other ways to run the encoder fast on a CPU, beside the one that was kept (decision 11).

    pip install openvino onnxruntime onnx onnxscript
    python benchmarks/encoder_engines.py [--published] [--only NAME …]

torch.compile needs a C++ compiler. Every form has the same weights and is compared with the plain
one in the same run.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from med3dvlm.benchmark import Form, compare, machine
from med3dvlm.benchmark.encoder import example_encoder
from med3dvlm.benchmark.plain import AXES, PlainDCFormer
from med3dvlm.evaluate.tables import Results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="small")
    parser.add_argument("--size", type=int, nargs=3, default=(128, 256, 256))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--published", action="store_true", help="a linear stem")
    parser.add_argument("--only", nargs="+", choices=FORMS, default=list(FORMS))
    options = parser.parse_args()
    shared = {"variant": options.variant, "size": options.size, "published": options.published}
    names = ["plain", *(name for name in options.only if name != "plain")]
    forms = [Form(name, make, {"name": name, **shared}) for name in names]
    results = Results({**machine(), **shared})
    rows = compare(forms, runs=options.runs, memory=False)
    results.add("Encoder, one volume", rows, shares=False)
    print(results.to_markdown())


def make(name: str, variant: str, size: tuple[int, int, int], published: bool) -> Callable:
    model = example_encoder(variant, published=published).eval()
    volumes = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(0))
    form = FORMS[name](model, volumes)

    @torch.inference_mode()
    def run() -> list[Tensor]:
        return form(volumes)

    return run


def folded(model: Any) -> PlainDCFormer:
    """The plain form with its batch norms folded."""
    plain = copy.deepcopy(PlainDCFormer.like(model))
    for part in plain.modules():
        for axis in AXES:
            if hasattr(part, f"along_{axis}"):
                conv, norm = getattr(part, f"along_{axis}"), getattr(part, f"norm_{axis}")
                setattr(part, f"along_{axis}", fuse_conv_bn_eval(conv, norm))
                setattr(part, f"norm_{axis}", nn.Identity())
    return plain


def channels_last(model: Any, volumes: Tensor) -> Callable:
    plain = folded(model).to(memory_format=torch.channels_last_3d)
    return lambda x: plain(x.to(memory_format=torch.channels_last_3d))


def channels_last_bf16(model: Any, volumes: Tensor) -> Callable:
    plain = folded(model).to(torch.bfloat16, memory_format=torch.channels_last_3d)
    return lambda x: plain(x.to(torch.bfloat16, memory_format=torch.channels_last_3d))


def compiled(model: Any, volumes: Tensor) -> Callable:
    return torch.compile(folded(model))


def graph(model: Any, volumes: Tensor, folder: str) -> Path:
    path = Path(folder) / "encoder.onnx"
    with torch.no_grad():
        torch.onnx.export(folded(model), (volumes,), path, external_data=False, verbose=False)
    return path


def onnx_runtime(model: Any, volumes: Tensor) -> Callable:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = graph(model, volumes, folder)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {name: x.numpy()})]


def openvino(model: Any, volumes: Tensor, precision: str = "f32") -> Callable:
    import openvino as ov

    with tempfile.TemporaryDirectory() as folder:
        core = ov.Core()
        hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        network = core.compile_model(core.read_model(graph(model, volumes, folder)), "CPU", hints)
    return lambda x: [torch.from_numpy(np.array(y)) for y in network(x.numpy()).values()]


FORMS: dict[str, Callable[[Any, Tensor], Callable]] = {
    "plain": lambda model, volumes: PlainDCFormer.like(model),
    "folded": lambda model, volumes: folded(model),
    "folded, channels last": channels_last,
    "folded, channels last, bf16": channels_last_bf16,
    "torch.compile": compiled,
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
    "OpenVINO, bf16": lambda model, volumes: openvino(model, volumes, "bf16"),
    "optimize_for_inference": lambda model, volumes: model.optimize_for_inference("fp32"),
    "optimize_for_inference, bf16": lambda model, volumes: model.optimize_for_inference("bf16"),
}


if __name__ == "__main__":
    main()
