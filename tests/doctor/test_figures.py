"""Runs in fastgpt's own precisions: each judged by the peak of its own arithmetic, under the name that its user gave it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from rich.console import Console

from bench.reports import mfu_tables
from fastgpt.config import EXPERIMENTAL, Precision, load_preset
from fastgpt.doctor import figures
from fastgpt.doctor.checks import environment
from fastgpt.doctor.diagnosis import diagnose
from fastgpt.doctor.evidence import Evidence
from fastgpt.doctor.reading.configs_fastgpt import parse_fastgpt
from fastgpt.doctor.reading.logs import LogReader
from fastgpt.doctor.report.page import render
from fastgpt.doctor.report.text import summary, to_json
from fastgpt.hardware import cards
from fastgpt.training.report import banner
from tests.doctor.runs import RTX4070, config, curve, log, note, only

A100, H100, T4 = (cards.lookup(name) for name in ("a100", "h100", "t4"))
IN_FORCE = [name for name in get_args(Precision) if name != "auto"]


def ours(precision="auto", more=""):
    """GPT-2 124M as a fastgpt config."""
    return parse_fastgpt(f'[data]\nbatch_size = 8\n[train]\nprecision = "{precision}"\n{more}', "c.toml")


def ran(precision=None, ms=5000.0, **more):
    """A fastgpt log, whose banner names the precision in force."""
    notes = (note("precision", f"kernels  triton, {precision}", precision),) if precision else ()
    return log(curve(100), ms=ms, kind="fastgpt", notes=notes, **more)


def found(facts=None, run=None, gpu=RTX4070):
    return figures.compute(Evidence(facts, run), gpu)


def test_tokens_of_a_warmup_of_micro_batches_are_what_the_run_trains_on():
    facts = parse_fastgpt("[data]\ngrad_accum = 4\n[optim]\nbatch_warmup_iters = 6\n[train]\nmax_iters = 8\n", "c.toml")
    plain = parse_fastgpt("[data]\ngrad_accum = 4\n[train]\nmax_iters = 8\n", "c.toml")
    assert found(facts).tokens_planned * 32 == found(plain).tokens_planned * (1 + 2 + 2 + 3 + 3 + 4 + 4 + 4)


# --- which ---


def _notes(log: str, kind: str):
    reader = LogReader("run.log")
    reader.take(log)
    return reader.facts().all(kind)


@pytest.mark.parametrize("precision", IN_FORCE)
@pytest.mark.parametrize("compiled, graphs", [(False, None), (True, object())])
def test_the_banner_of_a_run_tells(precision, compiled, graphs):
    settings = load_preset("demo")
    settings = replace(settings, train=replace(settings.train, compile=compiled))
    run = SimpleNamespace(
        config=settings,
        model=SimpleNamespace(n_params=lambda: 10**6),
        world=SimpleNamespace(size=1),
        device=torch.device("cpu"),
        stepper=SimpleNamespace(precision=precision, graphs=graphs),
        micro_batch=1,
        grad_accum=1,
        refused=None,
        train_loader=SimpleNamespace(tokens=10**6),
        val_loader=SimpleNamespace(tokens=10**5),
        corpus=None,
        tokens=lambda steps: 0,
        step=0,
    )
    console = Console(file=io.StringIO(), width=80)
    banner(console, run)
    said = _notes(console.file.getvalue(), "precision")
    assert [note.value for note in said] == [precision]


@pytest.mark.parametrize(
    "line", ["kernels  triton, fp64", "kernels  triton", "kernels  triton, fp8-e4m3", "the kernels  a, fp8"]
)
def test_no_other_line_does(line):
    assert not _notes(line + "\n", "precision")


@pytest.mark.parametrize(
    "facts, run, gpu, precision",
    [
        (ours("fp16-fast"), None, RTX4070, "fp16-fast"),
        (ours("fp8"), None, RTX4070, "fp8"),
        (ours("fp8"), None, None, "fp8"),
        (ours("fp32"), None, RTX4070, "fp32"),
        (ours("fp16"), None, RTX4070, "fp16"),
        (ours(), None, RTX4070, "bf16"),
        # Where they do not run, bf16 takes their place.
        (ours("fp16-fast"), None, H100, "bf16"),
        (ours("fp8"), None, A100, "bf16"),
        (ours("fp8", 'kernels = "eager"'), None, RTX4070, "bf16"),
        # The log knows what happened.
        (ours(), ran("fp8"), RTX4070, "fp8"),
        (ours("fp8"), ran("bf16"), RTX4070, "bf16"),
        (ours("fp16-fast"), ran(), RTX4070, "fp16-fast"),
        (None, ran("fp16-fast"), RTX4070, "fp16-fast"),
        (None, ran("fp32"), RTX4070, "fp32"),
        # nanoGPT has no such modes, and switches tf32 on.
        (config("dtype = 'fp8'"), None, RTX4070, "bf16"),
        (config("dtype = 'float32'"), None, RTX4070, "tf32"),
        (config("dtype = 'float16'"), None, RTX4070, "fp16"),
    ],
)
def test_the_precision_in_force(facts, run, gpu, precision):
    assert found(facts, run, gpu).precision == precision


# --- by which peak ---


@pytest.mark.parametrize("precision", IN_FORCE)
def test_mfu_is_of_the_peak_that_training_itself_divides_by(precision):
    numbers, peak = found(ours(precision), ran()), RTX4070.peak_flops(cards.arithmetic_of(precision))
    assert numbers.nominal_tflops == peak / 1e12
    assert numbers.mfu_nominal == pytest.approx(numbers.model_tflops * 1e12 / peak)


@pytest.mark.parametrize("precision", IN_FORCE)
def test_every_report_calls_it_by_its_users_name_and_says_once_what_is_out_of_reach(precision):
    evidence = Evidence(ours(precision), ran())
    report = diagnose(evidence, RTX4070)
    text = "\n".join(line for _, line in summary(report.figures, RTX4070))
    page, data = render(report, evidence, RTX4070), to_json(report, RTX4070)
    assert f"TFLOP/s {precision})" in text and f"nominal dense {precision}<" in page and data["precision"] == precision
    once = int(precision in EXPERIMENTAL)
    assert text.count("nothing could reach 100%") == page.count("nothing could reach 100%") == once
    assert "fp16acc" not in text + page + json.dumps(data)


def test_without_a_card_there_is_no_peak_to_speak_of():
    assert "100%" not in str(summary(found(ours("fp8"), ran(), None), None))


def test_the_words_are_those_of_bench_mfu():
    figure = {
        "name": "x",
        "denominator": "x",
        "denominator_tflops": 1.0,
        "flops_per_token": 1.0,
        "formula": "x",
        "value": 0.1,
    }
    result = {"setup": {"precision": "fp8"}, "backends": {"triton": {"ms": 1.0, "mfu": [figure]}}}
    assert mfu_tables.mfu_notes(result)[-1] == figures.Figures(ours(), precision="fp8").out_of_reach


@pytest.mark.parametrize("precision", EXPERIMENTAL)
def test_no_accumulation_in_fp32_is_claimed_of_them(precision):
    """A log of nanoGPT beside a config of fastgpt."""
    printed = log(curve(100), ms=9350.0, mfu=15.4)
    text = only(diagnose(Evidence(ours(precision), printed), RTX4070).findings, "mfu_denominator").explanation
    assert "fp32 accumulation" not in text and f"100% of the {precision} peak" in text and "fp16acc" not in text


# --- what else depends on it ---


@pytest.mark.parametrize("facts, precision", [*((ours(p), p) for p in IN_FORCE), (config("dtype = 'float32'"), "fp32")])
def test_memory_is_planned_in_it(facts, precision, monkeypatch):
    asked, plan = [], environment.predicted
    monkeypatch.setattr(
        environment, "predicted", lambda *args, **kw: asked.append(kw["precision"]) or plan(*args, **kw)
    )
    numbers = found(facts)
    assert environment.bytes_needed(numbers.shape, 8, numbers) and asked == [precision]


@pytest.mark.parametrize("precision, leave", [("bf16", False), ("fp16", True), ("fp16-fast", True), ("fp8", True)])
def test_after_a_nan_the_advice_is_bf16(precision, leave):
    run = ran()
    run.notes.append(note("nan", "step 10: loss nan", line=20))
    finding = only(diagnose(Evidence(ours(precision), run), RTX4070).findings, "nan")
    assert finding.advice.startswith("precision = 'bf16'\n") == leave
    assert (f"{precision} is experimental" in finding.explanation) == (precision in EXPERIMENTAL)


def test_a_card_without_bf16_is_told_to_take_fp16_in_fastgpts_words():
    finding = only(diagnose(Evidence(ours("bf16")), T4).findings, "no_bf16")
    assert finding.advice.startswith("precision = 'fp16'    # with loss scaling")


@pytest.mark.parametrize("precision", ["auto", "fp16", "fp8"])
def test_what_computes_in_fp16_on_a_card_without_bf16_is_not_warned(precision):
    """fastgpt takes fp16 for auto there, and for an experimental mode that the card does not have."""
    found = diagnose(Evidence(ours(precision)), T4)
    assert found.figures.precision == "fp16" and "no_bf16" not in {f.check for f in found.findings}


def test_the_error_of_a_mean():
    mean = figures.Mean.of(np.array([1.0, 2.0, 3.0, 4.0]), since=0)
    assert (mean.value, mean.error) == pytest.approx((2.5, 0.6455), rel=1e-3)
