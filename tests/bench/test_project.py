"""python -m bench.project as a user meets it, and predicted beside measured on results files."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from rich.console import Console

from bench import ops, project
from bench.ops import common
from bench.reports import against_projection
from fastgpt import common as common_module
from fastgpt.common import UserError
from fastgpt.hardware import cards
from fastgpt.performance.memory import KERNELS
from fastgpt.performance.projection import RUN_40M, calibration_error
from fastgpt.performance.step_time import CONSTANTS, Chip

ENVIRONMENT = {"device": "NVIDIA GeForce RTX 4070", "sms": 46, "memory_gib": 11.7, "commit": "abc"}
SHAPE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304, "bias": False}
ERROR = f"calibration error {calibration_error():.1%}"


RTX_4070 = cards.lookup("rtx4070")


def run(capsys, *argv):
    assert project.main(list(argv)) == 0
    return capsys.readouterr().out


# ---- the tables


def test_the_tables_say_projected_and_the_error_wherever_there_are_figures(capsys):
    out = run(capsys, "--gpu", "rtx4070", "--model", "gpt2-124m")
    for title in ("NVIDIA GeForce RTX 4070, gpt2-124m, triton, bf16", "The step", "Operations of a step"):
        line = next(line for line in out.splitlines() if line.startswith(title))
        assert "projected, uncalibrated" in line and ERROR in line
    words = ("tokens/s", "low", "central", "high", "of an A100's 312 TFLOP/s", "attention backward dQ", "gaps", "sum")
    assert all(word in out for word in words)


def test_a_narrow_terminal_cuts_no_figure(capsys):
    found = project.projected(project.ProjectConfig(), RTX_4070)
    project.show(found, "gpt2-124m", project.assumptions(found, RTX_4070), Console(width=80))
    out = capsys.readouterr().out
    for cells in (project.step_cells(found), project.operation_cells(found)):
        assert all(figure in out for row in cells[1:] for figure in row[1:])


def test_shares_and_times_add_up():
    head, *rows, total = project.operation_cells(project.projected(project.ProjectConfig(kernels="eager"), RTX_4070))
    assert head[1:3] == ["ms", "share"] and total[2] == "100.0%"
    assert sum(float(row[2][:-1]) for row in rows) == pytest.approx(100, abs=1)
    assert sum(float(row[1].replace(",", "")) for row in rows) == pytest.approx(float(total[1].replace(",", "")), abs=2)


@pytest.mark.parametrize("kernels", KERNELS)
def test_json_has_what_is_promised(capsys, kernels):
    found = json.loads(run(capsys, "--gpu", "rtx4070", "--model", "gpt2-124m", "--kernels", kernels, "--json"))
    assert found["projected"] is True and found["calibrated"] == (kernels == "nanogpt-compile")
    assert found["tokens_per_second_low"] < found["tokens_per_second"] < found["tokens_per_second_high"]
    assert {"ms_per_step", "mfu", "mfu_nanogpt", "operations", "calibration_error"} <= set(found)
    assert found["tokens_per_step"] == 524_288


def test_what_is_assumed_is_said(capsys):
    def assumed(*flags):
        return " ".join(json.loads(run(capsys, *flags, "--json"))["assumptions"])

    assert "uncalibrated" in assumed() and "uncalibrated" not in assumed("--kernels", "nanogpt-compile")
    for other in (("--precision", "fp16"), ("--gpu", "rtx4070ti"), ("--seq", "512")):
        assert "uncalibrated" in assumed("--kernels", "nanogpt-compile", *other), other
    assert "1.71 to 1.87" in assumed("--precision", "fp16-fast")
    on_a100 = assumed("--gpu", "a100", "--precision", "fp16-fast")
    assert "gains nothing" in on_a100 and "1,410 MHz, nominal memory 89% of 2039 GB/s" in on_a100
    rtx4090 = Chip(cards.lookup("rtx4090"), "bf16", CONSTANTS)
    assert f"SM clock {rtx4090.hz / 1e6:,.0f} MHz, from the fit" in assumed("--gpu", "rtx4090")


def test_the_fitted_run_is_found_again(capsys):
    found = json.loads(run(capsys, "--kernels", "nanogpt-compile", "--json"))
    assert found["ms_per_step"] == pytest.approx(9350, rel=1e-3)
    of_40m = ("--model", "gpt2-40m", "--kernels", "nanogpt-compile", "--dropout", "0.1", "--json")
    assert json.loads(run(capsys, *of_40m))["tokens_per_second"] == pytest.approx(RUN_40M.predicted())


def test_geometry_comes_from_the_preset_and_from_flags(capsys):
    found = json.loads(run(capsys, "--model", "gpt2-350m", "--json"))
    assert (found["micro_batch"], found["T"], found["tokens_per_step"]) == (2, 1024, 524_288)
    found = json.loads(run(capsys, "--batch", "6", "--seq", "512", "--json"))
    assert (found["micro_batch"], found["T"]) == (6, 512)
    assert abs(found["tokens_per_step"] - 524_288) <= 6 * 512 / 2
    found = json.loads(run(capsys, "--batch", "4", "--tokens-per-step", "8192", "--json"))
    assert (found["grad_accum"], found["tokens_per_step"]) == (2, 8192)


# ---- bad input


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--gpu", "rtx407"], "gpu is 'rtx407', which is not in the table: nearest are NVIDIA GeForce RTX 4070, "),
        (["--model", "gpt2-125m"], "model is 'gpt2-125m': it can be demo, gpt2-124m, gpt2-350m, gpt2-40m, gpt2-xl"),
        (["--kernels", "cuda"], "kernels is 'cuda': it can be nanogpt-compile, eager, compile, triton"),
        (["--precision", "fp32"], "precision is 'fp32': it can be bf16, fp16, fp16-fast, fp8"),
        (["--gpu", "a100", "--precision", "fp8"], "precision is 'fp8': NVIDIA A100-SXM4-80GB has no fp8"),
        (["--batch", "0"], "batch is 0: it must be at least 1"),
        (["--seq", "2048"], "seq is 2048: gpt2-124m has a block_size of 1024, so give at most that"),
        (["--dropout", "1"], "dropout is 1.0: it must lie in"),
        (["--tokens-per-step", "10000"], "tokens_per_step is 10000: it must be a multiple"),
        (["--measured", "nowhere.json"], "measured file nowhere.json cannot be read: No such file"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_exit_code_2(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench.project", *argv])
    with pytest.raises(SystemExit) as ended:
        common_module.run(project.main)
    assert ended.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err


# ---- predicted beside measured


def write(tmp_path, results):
    path = tmp_path / "results.json"
    path.write_text(results if isinstance(results, str) else json.dumps(results), encoding="utf-8")
    return path


def profiled(**backends):
    setup = {"shape": SHAPE, "precision": "bf16", "batch_size": 8, "grad_accum": 4, "seq": 1024}
    return {"schema": "fastgpt.mfu", "environment": ENVIRONMENT, "setup": setup, "backends": backends}


def test_a_profiled_step_is_compared_operation_by_operation(tmp_path, capsys):
    rows = [{"name": "qkv forward", "ms": 30.0}, {"name": "loss", "ms": 20.0}, {"name": "data", "ms": 1.0}]
    results = profiled(
        triton={"ms": 600.0, "rows": rows}, eager={"error": "out of memory"}, **{"triton+compile": {"ms": 500.0}}
    )
    gpu, pairs = against_projection.read(write(tmp_path, results))
    assert gpu.name == ENVIRONMENT["device"]
    found = {(pair.variant, pair.what): pair for pair in pairs}
    step = found["triton", "step"]
    assert step.measured_ms == 600 and step.error == pytest.approx(step.projected_ms / 600 - 1)
    assert "uncalibrated" in step.status
    parts = [p for key, p in found.items() if key[0] == "triton" and p.what != "step" and p.projected_ms]
    assert sum(p.projected_ms for p in parts) == pytest.approx(step.projected_ms)
    assert found["triton", "qkv forward"].projected_ms > 10 and found["triton", "loss"].projected_ms > 10
    assert found["triton", "data"].note == "not in the model" and found["triton", "data"].error is None
    optimizer = found["triton", "optimizer"]
    assert optimizer.note == "not in the profile" and optimizer.measured_ms is None and optimizer.error is None
    assert found["triton+compile", "step"].note == "no projection of this variant"
    assert not any(variant == "eager" for variant, _ in found)
    out = run(capsys, "--measured", str(tmp_path / "results.json"))
    assert "Measured on NVIDIA GeForce RTX 4070 beside projected" in out and ERROR in out and "qkv forward" in out
    found = json.loads(run(capsys, "--measured", str(tmp_path / "results.json"), "--json"))
    assert found["projected"] is True and len(found["pairs"]) == len(pairs)


def test_whole_steps_are_compared_and_those_without_speed_are_not(tmp_path):
    step = {
        "preset": "gpt2-124m",
        "batch_size": 8,
        "grad_accum": 4,
        "cap_gb": 12.0,
        "ms": 600.0,
        "tokens_per_second": 54_613,
    }
    wrong = {key: value for key, value in step.items() if key != "tokens_per_second"}
    steps = [
        {**step, "variant": "compile"},
        {**step, "variant": "compile max-autotune"},
        {**wrong, "variant": "triton"},
    ]
    _, pairs = against_projection.read(write(tmp_path, {"environment": ENVIRONMENT, "steps": steps}))
    assert [pair.variant for pair in pairs] == ["compile", "compile max-autotune"]
    assert pairs[0].what == "step of gpt2-124m, 8 x 4, 12 GB cap"
    assert pairs[0].projected_ms == pytest.approx(9350 / 16, rel=0.02)
    assert pairs[1].projected_ms is None


def test_every_entry_of_the_kernel_benchmark_that_a_step_has_is_projected(tmp_path, device):
    tiny = common.TINY
    made = [make(tiny, torch.device("cpu"), False) for make in ops.ENTRIES]
    described = [
        {
            "name": entry.name,
            "shape": entry.shape,
            "bytes": entry.work.bytes,
            "variants": {"triton": {"ms": 1.0}, "eager": {"ms": 2.0}, "liger": {"ms": 3.0}, "compile": {"error": "no"}},
        }
        for entry in made
    ]
    _, pairs = against_projection.read(write(tmp_path, {"environment": ENVIRONMENT, "entries": described}))
    ours = {
        pair.what.split(" ")[0] + (" +" if "+" in pair.what else ""): pair for pair in pairs if pair.variant == "triton"
    }
    for name in ("layer_norm +", "attention", "linear_cross_entropy", "adamw +"):
        assert ours[name].projected_ms > 0 and ours[name].status == "projected, uncalibrated", name
    assert ours["layer_norm"].note == "no counterpart in a step"
    assert {pair.note for pair in pairs if pair.variant == "liger"} == {"no projection of this variant"}
    assert not any(pair.variant == "compile" for pair in pairs)


def test_a_kernel_is_projected_once_per_call_whatever_the_step_does(tmp_path):
    def pair(name, shape, moved=0):
        entry = {"name": name, "shape": shape, "bytes": moved, "variants": {"triton": {"ms": 1.0}}}
        return against_projection.read(write(tmp_path, {"environment": ENVIRONMENT, "entries": [entry]}))[1][0]

    bandwidth = 504e9 * 0.91 / 1e3  # bytes per ms
    norm = pair("layer_norm + residual", "65536 x 768").projected_ms
    assert norm == pytest.approx((12 + 16) * 65536 * 768 / bandwidth, rel=0.01)
    params = 100_000_000
    assert pair("adamw + clip", "100.0 M parameters", 32 * params).projected_ms == pytest.approx(
        32 * params / bandwidth, rel=0.01
    )
    half, whole = (pair("attention", f"B={B} T=1024 H=12 D=64, causal").projected_ms for B in (8, 16))
    assert whole == pytest.approx(2 * half, rel=0.02)  # heads take turns: 96 end as evenly as 192


@pytest.mark.parametrize(
    "results, message",
    [
        ("{", "is not JSON"),
        ([], "is not a results file"),
        ({}, "is not a results file"),
        ({"environment": ENVIRONMENT}, "holds no time"),
        ({"environment": {"device": "AMD EPYC"}, "steps": []}, "comes from 'AMD EPYC', which is no GPU of the table"),
        ({"environment": {**ENVIRONMENT, "sms": 23}}, "is no GPU of the table"),
        ({"environment": ENVIRONMENT, "entries": [{"name": "attention"}]}, "is not a results file"),
        ({"environment": ENVIRONMENT, "steps": [{"ms": 1.0, "tokens_per_second": 1.0}]}, "is not a results file"),
        ({"environment": ENVIRONMENT, "setup": {}, "backends": {"eager": {"ms": 1}}}, "is not a results file"),
    ],
)
def test_a_results_file_that_is_none_is_refused_in_one_sentence(tmp_path, results, message):
    with pytest.raises(UserError, match=message):
        against_projection.read(write(tmp_path, results))
