"""The benchmarks compare what is equal, and count what they say. No time is asserted."""

from __future__ import annotations

import pytest
import torch

from med3dvlm.benchmark import Ceiling, Form, Work, closeness, compare
from med3dvlm.benchmark.encoder import benchmark_encoder, encoder_work, example_encoder
from med3dvlm.benchmark.end_to_end import benchmark_end_to_end
from med3dvlm.benchmark.loss import benchmark_loss
from med3dvlm.benchmark.measure import peak_memory
from med3dvlm.benchmark.plain import PlainDCFormer
from med3dvlm.benchmark.plot import draw_growth
from med3dvlm.benchmark.training import benchmark_training_step
from med3dvlm.scan import save_nifti
from tests.scan.samples import make_scan


def hold(megabytes: int):
    """Gives the sum of an array of that size, made when it runs."""
    return lambda: torch.ones(megabytes, 2**18).sum()


def test_memory_is_that_of_the_run_in_a_process_of_its_own():
    _, small = peak_memory(Form("small", hold, {"megabytes": 1}))
    peak, large = peak_memory(Form("large", hold, {"megabytes": 200}))
    assert 190 < (large - small) / 1.048576 < 210
    assert peak > large


def test_forms_are_compared_with_the_first():
    forms = [Form("one", hold, {"megabytes": 1}), Form("two", hold, {"megabytes": 2}, "bf16")]
    ceiling = Ceiling({"fp32": 1e9, "bf16": 2e9}, bandwidth=1e9)
    work = Work(flop=1e6, bytes=1e3)
    first, second = compare(forms, runs=2, memory=False, work=work, ceiling=ceiling)
    assert first["times as fast"] == 1 and first["error"] == 0
    assert second["error"] == 1  # twice the sum
    assert first["share of the ceiling"] == pytest.approx(1e-3 / first["seconds"])
    assert second["share of the ceiling"] == pytest.approx(5e-4 / second["seconds"])


def test_closeness_names_the_worst():
    a = [torch.tensor([1.0, 2.0]), torch.tensor([4.0, 0.0])]
    b = [torch.tensor([1.0, 2.0]), torch.tensor([4.0, 1.0])]
    found = closeness(a, b)
    assert found["error"] == 0.25
    assert found["cosine"] == pytest.approx(4 / 17**0.5)


def test_the_plain_form_is_the_model_and_its_work_is_the_published_one():
    model = example_encoder("nano").eval()
    volumes = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert closeness(PlainDCFormer.like(model)(volumes), model(volumes))["error"] < 1e-5
    work = encoder_work("small", (128, 256, 256), 1)
    assert work.flop == pytest.approx(42.7e9, rel=0.01)


def test_encoder_and_its_growth(tmp_path, monkeypatch):
    monkeypatch.setattr("med3dvlm.benchmark.encoder.GROWTH_SIZES", ((8, 8, 8), (16, 16, 16)))
    monkeypatch.setattr("med3dvlm.benchmark.encoder.GROWTH_VOLUME", (8, 8, 8))
    monkeypatch.setattr(Ceiling, "measure", lambda *_: Ceiling({"fp32": 1e9, "bf16": 1e9}, 1e9))
    results = benchmark_encoder(
        variant="nano", size=(16, 16, 16), runs=1, memory=False, growth=True
    )
    plain, fp32, bf16 = results.tables[0].rows
    assert plain["error, worst stream"] == 0
    assert fp32["error, worst stream"] < 1e-5 < bf16["error, worst stream"] < 0.1
    assert bf16["cosine, pooled"] > 0.999
    draw_growth(results, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_training_step_and_loss_have_the_plain_gradients(monkeypatch):
    monkeypatch.setattr(Ceiling, "measure", lambda *_: Ceiling({"fp32": 1e9, "bf16": 1e9}, 1e9))
    results = benchmark_training_step(
        variant="nano", size=(32, 32, 32), batch=4, runs=1, memory=False
    )
    rows = {row["form"]: row for row in results.tables[0].rows}
    assert rows["DCFormer, fp32"]["cosine of the gradient"] > 0.99999
    # a stem and a grid so small average little of the rounding away
    assert rows["DCFormer, bf16"]["cosine of the gradient"] > 0.95
    loss = benchmark_loss(batch=16, dim=8, runs=1, memory=False)
    assert loss.tables[0].rows[1]["error"] < 1e-4


def test_end_to_end_prepares_and_embeds_alike(tmp_path, monkeypatch):
    path = tmp_path / "scan.nii.gz"
    save_nifti(make_scan((20, 40, 36)), path)
    results = benchmark_end_to_end(
        tmp_path, scan=path, variant="nano", size=(16, 32, 32), runs=1, memory=False
    )
    _, fp32, bf16 = results.tables[0].rows
    assert fp32["error"] < 1e-4 and bf16["cosine"] > 0.999
