"""bench.kernels: no speed without parity, shares of measured roofs, sweeps; and the pytest-benchmark suite. No GPU needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import kernels, ops
from bench.ops import attention, layer_norm
from bench.ops.common import Entry, Sizes
from bench.reports import markdown, timing
from bench.reports import results as results_module
from bench.steps.ceilings import Ceilings
from fastgpt.common import UserError
from fastgpt.hardware.environment import ROOT
from fastgpt.performance.flops import Work

CPU = torch.device("cpu")
ENVIRONMENT = {
    "device": "NVIDIA GeForce RTX 4070",
    "sms": 46,
    "kernels": "compiled",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "driver": "580.1",
    "commit": "abc123",
    "time": "2026-01-01T00:00:00+00:00",
}


def entry(parity=lambda: None, **variants):
    """An operation whose variants are the given functions."""
    makers = {name: lambda work=work: work for name, work in variants.items()}
    return Entry("copy", "8", Work(flops=0, bytes=10**6), parity, makers)


def test_every_kernel_passes_parity_and_gets_times(device, tmp_path, capsys):
    # On a GPU the shapes are real ones and all of them take minutes.
    only = [] if device.type == "cpu" else ["--only", "layer_norm"]
    assert kernels.main(["--device", device.type, "--quick", "--out", str(tmp_path), *only]) == 0
    results = json.loads((tmp_path / "kernels.json").read_text())
    assert {e["parity"] for e in results["entries"]} == {"passed"}
    for e in results["entries"]:
        assert e["bytes"] > 0 and {"triton"} < set(e["variants"]), e["name"]
        assert all(v["ms"] > 0 for v in e["variants"].values()), e
    if device.type == "cpu":
        assert len(results["entries"]) == len(ops.ENTRIES) and results["environment"]["kernels"] == "interpreted"
        assert all(v["share"] is None for e in results["entries"] for v in e["variants"].values()), "no roof on a CPU"
    assert "layer_norm" in capsys.readouterr().out
    assert "| layer_norm" in (tmp_path / "kernels.md").read_text()


def test_a_kernel_that_fails_parity_gets_no_speed():
    def parity():
        raise AssertionError("out0: rms error 0.1")

    def timed():
        raise RuntimeError("was run")

    result = kernels.measure(entry(parity, triton=timed), CPU, None, rounds=3)
    assert result["parity"].startswith("failed: AssertionError: out0") and result["variants"] == {}
    table = markdown.kernels_markdown({"environment": ENVIRONMENT, "entries": [result]})
    assert "no speed: parity failed" in table


def test_a_peer_that_crashes_is_reported_and_the_others_are_timed():
    def crash():
        raise RuntimeError("no such backend")

    result = kernels.measure(entry(triton=lambda: None, cudnn=crash), CPU, None, rounds=3)
    assert "no such backend" in result["variants"]["cudnn"]["error"] and result["variants"]["triton"]["runs"] == 3
    assert "error: RuntimeError: no such backend" in markdown.kernels_markdown(
        {"environment": ENVIRONMENT, "entries": [result]}
    )


def test_a_share_is_of_the_measured_roof_that_binds():
    ceilings = Ceilings("card", "host", "2.13", 0, copy_gbs=500.0, matmul_tflops={"bf16": 50.0})
    one_ms = timing.Timing(1.0, 0.0, 9)
    memory = kernels.rates(Work(flops=0, bytes=400 * 10**6), one_ms, ceilings)
    assert memory["share"] == pytest.approx(0.8) and memory["of"] == "measured copy bandwidth"
    assert memory["gbs"] == pytest.approx(400)
    compute = kernels.rates(Work(flops=40 * 10**9, bytes=10**6), one_ms, ceilings)
    assert compute["share"] == pytest.approx(0.8) and compute["of"] == "measured bf16 matmul rate"
    assert compute["tflops"] == pytest.approx(40)


def test_a_sweep_has_the_usual_shape_first_and_every_shape_once():
    for make in ops.ENTRIES:
        sizes = ops.shapes(make, Sizes())
        assert sizes[0] == Sizes() and 3 <= len(sizes) == len(set(sizes)), make.__name__
    lengths = ops.shapes(attention.attention, Sizes())
    assert {size.T for size in lengths} == {512, 1024, 2048, 4096} and {size.D for size in lengths} == {32, 64, 128}
    assert all(size.B * size.T == 16384 and size.H * size.D == 768 for size in lengths)
    assert {size.C for size in ops.shapes(layer_norm.layer_norm, Sizes())} == {384, 768, 1024, 1600}


def test_a_sweep_measures_several_shapes_and_says_that_interpreted_times_mean_nothing(device, tmp_path, capsys):
    if device.type == "cuda":
        pytest.skip("a sweep of real shapes takes minutes")
    assert kernels.main(["--device", "cpu", "--sweep", "--only", "linear_cross_entropy", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "kernels.json").read_text())["entries"]
    assert [e["shape"] for e in found] == ["64 x 64 x 256", "32 x 128 x 256"]
    assert "the times say nothing about speed" in capsys.readouterr().out


def test_warm_times_have_rates_but_no_share_of_a_memory_roof():
    ceilings = Ceilings("card", "host", "2.13", 0, copy_gbs=500.0, matmul_tflops={"bf16": 50.0})
    warm = kernels.rates(Work(flops=0, bytes=10**9), timing.Timing(1.0, 0.1, 9), ceilings, share=False)
    assert warm == {"ms": 1.0, "iqr_ms": 0.1, "runs": 9, "gbs": pytest.approx(1000), "tflops": 0.0}


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--device", "cuda"], "device is 'cuda' but torch .* sees no CUDA GPU: use --device cpu"),
        (
            ["--device", "cpu", "--only", "matmul"],
            "only is 'matmul': it can be embedding, layer_norm, layer_norm_residual",
        ),
        (["--device", "cpu", "--out", "{file}/x"], "which cannot be written [(]Not a directory[)]: name another"),
    ],
)
def test_bad_input_of_bench_kernels_is_one_sentence(monkeypatch, tmp_path, arguments, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=sentence):
        kernels.main([argument.format(file=tmp_path / "file") for argument in arguments])


def test_a_card_that_torch_cannot_use_is_named_and_nothing_is_interpreted_instead(monkeypatch):
    monkeypatch.setattr(kernels, "unused_gpu", lambda: "this machine has a card")
    monkeypatch.setattr(kernels, "run", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(UserError, match=r"^this machine has a card; --device cpu does without the card$"):
        kernels.main([])


# ---- the suite: pytest bench --benchmark-only


def test_the_suite_runs_when_asked_for_and_keeps_its_results(tmp_path):
    # Not a worker of the xdist that may run this test: pytest-benchmark would switch itself off.
    mine = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment = {**mine, "FASTGPT_RESULTS": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    options = [
        "--benchmark-only",
        "--benchmark-max-time=0.01",
        "--benchmark-min-rounds=3",
        "-rs",
        "-p",
        "no:cacheprovider",
    ]
    command = [sys.executable, "-m", "pytest", "bench", "-k", "learning_rate or tokenizer or test_kernel", *options]
    done = subprocess.run(
        [*command, "--label", "mine"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "needs a CUDA GPU: interpreted kernels have no speed to measure" in done.stdout
    assert "tokenizer[bytes]: " in done.stdout and " tokens/s" in done.stdout
    ((path, found),) = results_module.find(str(next(tmp_path.glob("*/*-suite.json"))))
    assert found["label"] == "mine" and found["entries"]["learning_rate"]["ms"] > 0
    assert found["entries"]["tokenizer[bytes]"]["tokens_per_second"] > 0


def test_pytest_alone_runs_none_of_the_suite(request):
    assert request.config.getini("testpaths") == ["tests"]
