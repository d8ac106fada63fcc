"""Work of a step against the closed formulas, and the judgement of a profile by its roofs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.reports import mfu_tables
from bench.steps import roofs
from bench.steps.ceilings import Ceilings
from bench.steps.roofs import step_work
from bench.steps.trace import ProfiledOperation, StepProfile
from fastgpt import anatomy
from fastgpt.anatomy import GPT2_40M, GPT2_124M, Shape
from fastgpt.performance import flops
from fastgpt.performance.flops import Work
from fastgpt.performance.operations import GAPS, LINEARS
from tests.performance import formulas

B, T = 8, 1024
M, C = B * T, GPT2_124M.n_embd


@pytest.mark.parametrize("shape", [GPT2_124M, GPT2_40M, Shape(3, 4, 64, 96, 500, bias=True)])
@pytest.mark.parametrize("fused", [True, False])
def test_the_flops_of_all_operations_are_those_of_the_formula(shape, fused):
    # formulas.hardware with a tile of one query and the five matmuls of a backward pass in one loop: nothing computed twice.
    work = step_work(shape, 2, shape.block_size, grad_accum=3, fused=fused)
    tokens = 2 * shape.block_size * 3
    assert sum(w.flops for w in work.values()) == pytest.approx(formulas.hardware(shape, split_backward=False) * tokens)


MODERN = Shape(
    n_layer=6, n_head=4, n_embd=128, block_size=256, vocab_size=1024, family="modern", n_kv_head=2, rotary_base=1e4,
    qk_norm=True, activation="relu2", tied_head=False, embedding_norm=True, residual_scalars=True, value_embeddings=True,
    window_pattern="SSL",
)  # fmt: skip


def test_a_modern_step_has_windows_and_passes_of_its_own():
    work, rows, kv = step_work(MODERN, 2, 256, one_pass_loss=True), 512, 2 * 32
    pairs = 2 * (256 * 257 / 2) + 4 * (
        65 * 66 / 2 + (256 - 65) * 65
    )  # of two blocks that see all, and of four that see 65
    attention = work["attention forward"].flops + work["attention backward"].flops
    assert attention == 14 * 128 * 2 * pairs
    assert sum(w.flops for w in work.values()) == attention + 6 * anatomy.matmul_params(MODERN) * rows
    assert {"rotary forward", "rotary backward", "ReLU2 forward", "ReLU2 backward"} < set(work)
    assert "GELU forward" not in work
    # Every block reads and writes q, k and v; three read a value embedding and its gate; each head of q and k has its 1/rms.
    assert work["rotary forward"].bytes == rows * (6 * (2 * 2 * (128 + 2 * kv) + 4 * 6) + 3 * 2 * (kv + 2))


def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest():
    adamw, muon = (step_work(MODERN, 2, 256, optimizer=name) for name in ("adamw", "muon"))
    parts = anatomy.of(MODERN)
    own, rest = flops.muon(parts), flops.adamw(anatomy.n_params(MODERN) - parts.block_weights)
    assert muon.pop("optimizer") == Work(own.flops, own.bytes + rest.bytes)
    assert adamw.pop("optimizer") == flops.adamw(anatomy.n_params(MODERN)) and adamw == muon


def test_every_micro_batch_counts_and_the_update_once():
    one, four = (step_work(GPT2_124M, 8, 1024, grad_accum=n) for n in (1, 4))
    for name in one:
        if name == "gradient accumulation":
            assert one[name].bytes == 0 and four[name].bytes == 3 * 12 * anatomy.n_params(GPT2_124M)
        else:
            factor = 1 if name == "optimizer" else 4
            assert four[name] == Work(one[name].flops * factor, one[name].bytes * factor), name


def test_eager_adds_the_residual_apart_and_a_fused_step_within_the_norm():
    fused, eager = step_work(GPT2_124M, 8, 1024), step_work(GPT2_124M, 8, 1024, fused=False)
    assert fused["pointwise"].bytes == 0 < eager["pointwise"].bytes
    assert fused["norms forward"].bytes > eager["norms forward"].bytes
    # 24 norms with residual read branch (2) and residual (4), write sum (4) and norm (2); the first reads 4, writes 2.
    rows, C = 8192, 768
    assert fused["norms forward"].bytes == 24 * (12 * rows * C + 8 * rows + 4 * C) + 6 * rows * C + 8 * rows + 4 * C


def test_a_loss_in_one_pass_moves_the_logits_twice_and_not_three_times():
    one, three = step_work(GPT2_124M, 8, 1024, one_pass_loss=True), step_work(GPT2_124M, 8, 1024)
    logits = 8192 * 50304 * 2
    assert one["loss"].bytes == 2 * logits + 12 * 8192
    assert three["loss"].bytes == pytest.approx(3 * logits, rel=1e-3)


def test_the_working_copy_belongs_to_the_optimizer_of_our_kernels():
    plain, ours = step_work(GPT2_124M, 8, 1024), step_work(GPT2_124M, 8, 1024, one_pass_loss=True)
    assert ours["optimizer"].bytes - plain["optimizer"].bytes == 2 * anatomy.matmul_params(GPT2_124M)


# ---------------------------------------------------------------- beside what was profiled


def profile(*operations, wall_ms=10.0, unaccounted=None):
    return StepProfile(wall_ms, tuple(operations), unaccounted or {}, None, 0.0)


def against_roofs(found, work, tflops=1.0):
    ceilings = Ceilings("card", "host", "2.13", 0, copy_gbs=100.0, matmul_tflops={"bf16": tflops})
    return [roofs.JudgedOperation(**row) for row in roofs.judge(found, work, ceilings, GPT2_124M, B, T, "bf16")]


def test_the_nearer_roof_decides_and_the_gap_is_what_it_would_save():
    work = {"qkv forward": Work(2 * 10**9, 10**7), "norms forward": Work(0, 10**8)}
    rows = against_roofs(
        profile(ProfiledOperation("qkv forward", 12, 4.0), ProfiledOperation("norms forward", 24, 5.0)), work
    )
    matmul, norm = rows
    assert (matmul.roof_ms, matmul.bound, matmul.achieved, matmul.gap_ms) == (2.0, "compute", 0.5, 2.0)
    assert (norm.roof_ms, norm.bound, norm.achieved, norm.gap_ms) == (1.0, "memory", 0.2, 4.0)
    assert (matmul.share, norm.share, matmul.calls, matmul.flops, norm.bytes) == (0.4, 0.5, 12, 2 * 10**9, 10**8)


def test_time_without_work_is_all_gap_and_the_unknown_comes_last():
    found = profile(
        ProfiledOperation(GAPS, 0, 3.0), ProfiledOperation("pointwise", 9, 1.0), unaccounted={"a": 0.5, "b": 0.25}
    )
    gaps, pointwise, unknown = against_roofs(found, {"pointwise": Work(0, 0)})
    assert (gaps.gap_ms, gaps.roof_ms, gaps.achieved) == (3.0, None, None)
    assert (pointwise.gap_ms, pointwise.bound, pointwise.achieved) == (1.0, None, None)
    assert (unknown.name, unknown.ms, unknown.share) == ("unaccounted", 0.75, 0.075)


def test_an_operation_faster_than_memory_has_no_gap():
    (row,) = against_roofs(profile(ProfiledOperation("norms forward", 1, 0.5)), {"norms forward": Work(0, 10**8)})
    assert row.achieved == 2.0 and row.gap_ms == 0.0


def test_without_a_matmul_rate_a_matmul_has_no_roof_but_a_norm_has():
    work = {"qkv forward": Work(10**9, 10**7), "norms forward": Work(0, 10**8)}
    matmul, norm = against_roofs(
        profile(ProfiledOperation("qkv forward", 1, 4.0), ProfiledOperation("norms forward", 1, 5.0)), work, tflops=None
    )
    assert matmul.roof_ms is None and matmul.achieved is None and norm.roof_ms == pytest.approx(1.0)


@pytest.mark.parametrize(
    "name", [*step_work(GPT2_124M, 1, 64), *step_work(MODERN, 1, 64), GAPS, "data", "matmul (unknown which)"]
)
def test_there_is_advice_for_every_operation(name):
    assert mfu_tables.advice(name) != mfu_tables.advice("unaccounted")


def test_names_are_those_of_the_projection():
    work = step_work(GPT2_124M, 1, 64)
    assert {f"{linear} {way}" for linear in LINEARS for way in ("forward", "dX", "dW")} < set(work)


# ---------------------------------------------------------------- two arithmetics in one step

RATES = {"bf16": 50.0, "fp16": 50.0, "fp8": 100.0, "fp16_fp16acc": 100.0}
CEILINGS = Ceilings("a card", "host", "2.13", 0, copy_gbs=400.0, matmul_tflops=RATES)


def seconds_each(*names):
    return profile(*(ProfiledOperation(name, 1, 1e3) for name in names), wall_ms=9e3)


def needed(precision, *names, kernels="triton", compiled=False, shape=GPT2_124M, grad_accum=1):
    options = {"grad_accum": grad_accum, "precision": precision, "kernels": kernels, "compiled": compiled}
    return roofs.needed(seconds_each(*names), shape, B, T, **options)


def judged(precision, *names, ceilings=CEILINGS):
    work = needed(precision, *names)
    rows = roofs.judge(seconds_each(*names), work, ceilings, GPT2_124M, B, T, precision)
    return work, {row["name"]: row for row in rows}


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
    unknown = replace(seconds_each(*names), unaccounted={"secret": 0.5})
    work = roofs.step_work(GPT2_124M, B, T, size=4 if precision == "fp32" else 2, one_pass_loss=True)
    assert needed(precision, *names) == work
    rows = roofs.judge(unknown, work, ceilings, GPT2_124M, B, T, precision)
    for row in rows[:4]:
        expected = work[row["name"]].roof(40e12, 400e9)
        assert row["roof_ms"] == pytest.approx(1e3 * expected.seconds, rel=1e-12)
        assert row["bound"] == (expected.bound if expected.seconds else None)
    assert all(row["roof_ms"] is None and row["gap_ms"] == row["ms"] for row in rows[4:])
    assert [row["arithmetic"] for row in rows] == [precision, precision, *[None] * 5]
    assert [rows[-1][key] for key in ("name", "calls", "ms", "share")] == ["unaccounted", 1, 0.5, 0.5 / 9e3]


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


def test_steps_of_other_kernels_need_no_more_than_step_work():
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
