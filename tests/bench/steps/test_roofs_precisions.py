"""Roofs of operations in the precisions that mix two arithmetics, and the bytes that such a step moves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.reports import mfu_tables
from bench.steps import roofs
from bench.steps.trace import ProfiledOperation, StepProfile
from fastgpt.anatomy import GPT2_124M
from fastgpt.hardware.ceilings import Ceilings
from fastgpt.performance import operations
from fastgpt.performance.flops import Work
from fastgpt.performance.operations import GAPS

B, T = 8, 1024
M, C = B * T, GPT2_124M.n_embd
RATES = {"bf16": 50.0, "fp16": 50.0, "fp8": 100.0, "fp16_fp16acc": 100.0}
CEILINGS = Ceilings("a card", "host", "2.13", 0, copy_gbs=400.0, matmul_tflops=RATES)


def profile(*names):
    return StepProfile(9e3, tuple(ProfiledOperation(name, 1, 1e3) for name in names), {}, None, 0.0)


def needed(precision, *names, kernels="triton", compiled=False, shape=GPT2_124M, grad_accum=1):
    options = {"grad_accum": grad_accum, "precision": precision, "kernels": kernels, "compiled": compiled}
    return roofs.needed(profile(*names), shape, B, T, **options)


def judged(precision, *names, ceilings=CEILINGS):
    work = needed(precision, *names)
    rows = roofs.judge(profile(*names), work, ceilings, GPT2_124M, B, T, precision)
    return work, {row["name"]: row for row in rows}


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("fp32", ("fp32",)), ("bf16", ("bf16",)), ("fp8", ("fp8", "bf16")), ("fp16-fast", ("fp16_fp16acc", "fp16"))],
)
def test_arithmetics_begin_with_the_one_that_mfu_is_a_share_of(precision, expected):
    assert operations.arithmetics(precision) == expected


def test_fp8_is_judged_by_its_own_rate_where_it_computes_in_it_and_by_bf16s_elsewhere():
    work, rows = judged(
        "fp8", "mlp up forward", "qkv dX", "qkv dW", "head forward", "attention forward", "optimizer", GAPS
    )
    arithmetic = {name: row["arithmetic"] for name, row in rows.items()}
    assert arithmetic == {
        "mlp up forward": "fp8",
        "qkv dX": "fp8",
        "qkv dW": "bf16",
        "head forward": "bf16",
        "attention forward": "bf16",
        "optimizer": None,
        GAPS: None,
    }
    for name in ("qkv dX", "qkv dW"):
        assert rows[name]["bound"] == "compute"
        assert rows[name]["roof_ms"] == pytest.approx(1e3 * work[name].flops / RATES[arithmetic[name]] / 1e12)


def test_attention_with_sums_in_fp16_has_a_rate_between_the_two():
    """P V of Q K^T and P V; in backward two thirds and three quarters of what the two kernels compute."""
    work, rows = judged("fp16-fast", "attention forward", "attention backward", "head dW")
    flops, row = work["attention forward"].flops, rows["attention forward"]
    assert row["arithmetic"] == "fp16_fp16acc + fp16"
    assert row["roof_ms"] == pytest.approx(1e3 * flops * (0.5 / 100 + 0.5 / 50) / 1e12)
    both, plain = 1e3 * work["attention backward"].flops / 100e12, 1e3 * work["attention backward"].flops / 50e12
    assert both < rows["attention backward"]["roof_ms"] < plain and rows["head dW"]["arithmetic"] == "fp16_fp16acc"


def test_a_rate_that_was_not_measured_gives_no_roof():
    ceilings = replace(CEILINGS, matmul_tflops={"bf16": 50.0, "fp8": None})
    _, rows = judged("fp8", "qkv forward", "qkv dW", "norms forward", ceilings=ceilings)
    assert rows["qkv forward"]["roof_ms"] is None is rows["qkv forward"]["achieved"]
    assert rows["qkv dW"]["achieved"] > 0 and rows["norms forward"]["achieved"] > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_one_arithmetic_is_judged_as_ever(precision):
    ceilings = replace(CEILINGS, matmul_tflops={precision: 40.0})
    names = ("qkv forward", "attention backward", "GELU forward", "pointwise", "who knows", GAPS)
    unknown = replace(profile(*names), unaccounted={"secret": 0.5})
    work = roofs.step_work(GPT2_124M, B, T, size=4 if precision == "fp32" else 2, one_pass_loss=True)
    assert needed(precision, *names) == work
    rows = roofs.judge(unknown, work, ceilings, GPT2_124M, B, T, precision)
    plain = roofs.against_roofs(unknown, work, roofs.Roofs.measured(ceilings, precision))
    assert [roofs.JudgedOperation(**{k: v for k, v in row.items() if k != "arithmetic"}) for row in rows] == plain
    assert rows[-1]["name"] == "unaccounted" and {row["arithmetic"] for row in rows[:2]} == {precision}


def test_fp8_moves_operands_of_a_byte_and_copies_of_one():
    bf16, fp8 = needed("bf16", "GELU forward"), needed("fp8", "mlp up forward")
    L, e = GPT2_124M.n_layer, M * C
    assert fp8["qkv forward"] == Work(bf16["qkv forward"].flops, bf16["qkv forward"].bytes - L * (e + 3 * C * C))
    assert fp8["qkv dW"] == bf16["qkv dW"] and fp8["head dX"] == bf16["head dX"]
    assert fp8["norms forward"].bytes - bf16["norms forward"].bytes == 2 * L * e
    assert fp8["attention forward"].bytes - bf16["attention forward"].bytes == L * e * 17 // 16
    # Its matmuls also write z in 16 bits and gelu(z) in 8.
    saved = L * (e + 4 * C * C)
    assert fp8["mlp up forward"].bytes == bf16["mlp up forward"].bytes - saved + L * 4 * e * 3
    assert fp8["optimizer"].bytes < bf16["optimizer"].bytes, "no working copies"
    assert fp8["pointwise"] == Work(0, 0), "passes of their own stay what could be saved"


def test_a_gelu_in_the_epilogues_is_counted_with_the_matmuls_whatever_the_precision():
    apart, inside = needed("bf16", "GELU forward"), needed("bf16", "mlp up forward")
    for name in ("mlp up forward", "mlp down dX"):
        assert inside[name].bytes - apart[name].bytes == 2 * 4 * M * C * GPT2_124M.n_layer
    hopper, other = needed("fp8", "GELU forward"), needed("fp8", "mlp up forward")
    assert hopper["mlp up forward"].bytes == other["mlp up forward"].bytes - 2 * 4 * M * C * GPT2_124M.n_layer


def test_compiled_norms_and_attention_write_nothing_in_fp8():
    compiled, bf16 = needed("fp8", "mlp up forward", compiled=True), needed("bf16", "GELU forward")
    assert compiled["norms backward"] == bf16["norms backward"]
    assert compiled["attention forward"] == bf16["attention forward"]


def test_other_kernels_have_roofline_pys_work():
    expected = roofs.step_work(GPT2_124M, B, T, grad_accum=2, fused=False)
    assert needed("bf16", "qkv forward", kernels="eager", grad_accum=2) == expected
    expected = roofs.step_work(GPT2_124M, B, T, grad_accum=2)
    assert needed("bf16", "qkv forward", kernels="eager", compiled=True, grad_accum=2) == expected


def test_tables_name_the_arithmetic_and_recommend_no_double_rate_to_what_has_it():
    _, rows = judged("fp8", "qkv forward", "qkv dW")
    found = {"rows": list(rows.values()), "profile": {"accounted": 1.0}}
    roof = mfu_tables.operation_cells(found)[0].index("which roof")
    assert [row[roof] for row in mfu_tables.operation_cells(found)[1:3]] == ["compute, fp8", "compute, bf16"]
    helps = {row[0]: row[2] for row in mfu_tables.help_cells(found)[1:]}
    assert helps["qkv forward"] == "tile shape and wave fill" and helps["qkv dW"].endswith("raises the roof itself")


def test_roofs_are_listed_for_what_a_step_computes_in():
    result = {"setup": {"precision": "fp8"}, "ceilings": {"copy_gbs": 400.0, "matmul_tflops": {**RATES, "fp8": None}}}
    assert mfu_tables.roofs(result) == "fp8 matmul n/a, bf16 matmul 50 TFLOP/s, copy 400 GB/s"
