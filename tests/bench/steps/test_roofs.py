"""Work of a step against the closed formulas, and the judgement of a profile by its roofs."""

from __future__ import annotations

import pytest

from bench.reports import mfu_tables
from bench.steps.roofs import Roofs, against_roofs, step_work
from bench.steps.trace import ProfiledOperation, StepProfile
from fastgpt import anatomy
from fastgpt.anatomy import GPT2_40M, GPT2_124M, Shape
from fastgpt.hardware.ceilings import Ceilings
from fastgpt.performance import flops
from fastgpt.performance.flops import Work
from fastgpt.performance.operations import GAPS, LINEARS

ROOFS = Roofs(flops_per_second=1e12, bytes_per_second=1e11)


@pytest.mark.parametrize("shape", [GPT2_124M, GPT2_40M, Shape(3, 4, 64, 96, 500, bias=True)])
@pytest.mark.parametrize("fused", [True, False])
def test_the_flops_of_all_operations_are_those_of_the_formula(shape, fused):
    # flops.hardware with a tile of one query and the five matmuls of a backward pass in one loop: nothing computed twice.
    work = step_work(shape, 2, shape.block_size, grad_accum=3, fused=fused)
    tokens = 2 * shape.block_size * 3
    assert sum(w.flops for w in work.values()) == pytest.approx(flops.hardware(shape, split_backward=False) * tokens)


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


def profile(*operations, wall_ms=10.0, unaccounted=None):
    return StepProfile(wall_ms, tuple(operations), unaccounted or {}, None, 0.0)


def test_the_nearer_roof_decides_and_the_gap_is_what_it_would_save():
    work = {"qkv forward": Work(2 * 10**9, 10**7), "norms forward": Work(0, 10**8)}
    rows = against_roofs(
        profile(ProfiledOperation("qkv forward", 12, 4.0), ProfiledOperation("norms forward", 24, 5.0)), work, ROOFS
    )
    matmul, norm = rows
    assert (matmul.roof_ms, matmul.bound, matmul.achieved, matmul.gap_ms) == (2.0, "compute", 0.5, 2.0)
    assert (norm.roof_ms, norm.bound, norm.achieved, norm.gap_ms) == (1.0, "memory", 0.2, 4.0)
    assert (matmul.share, norm.share, matmul.calls, matmul.flops, norm.bytes) == (0.4, 0.5, 12, 2 * 10**9, 10**8)


def test_time_without_work_is_all_gap_and_the_unknown_comes_last():
    found = profile(
        ProfiledOperation(GAPS, 0, 3.0), ProfiledOperation("pointwise", 9, 1.0), unaccounted={"a": 0.5, "b": 0.25}
    )
    gaps, pointwise, unknown = against_roofs(found, {"pointwise": Work(0, 0)}, ROOFS)
    assert (gaps.gap_ms, gaps.roof_ms, gaps.achieved) == (3.0, None, None)
    assert (pointwise.gap_ms, pointwise.bound, pointwise.achieved) == (1.0, None, None)
    assert (unknown.name, unknown.ms, unknown.share) == ("unaccounted", 0.75, 0.075)


def test_an_operation_faster_than_memory_has_no_gap():
    (row,) = against_roofs(
        profile(ProfiledOperation("norms forward", 1, 0.5)), {"norms forward": Work(0, 10**8)}, ROOFS
    )
    assert row.achieved == 2.0 and row.gap_ms == 0.0


def test_without_a_matmul_rate_a_matmul_has_no_roof_but_a_norm_has():
    ceilings = Ceilings("card", "host", "2.13", 0, copy_gbs=100.0, matmul_tflops={"bf16": None})
    roofs = Roofs.measured(ceilings, "bf16")
    work = {"qkv forward": Work(10**9, 10**7), "norms forward": Work(0, 10**8)}
    matmul, norm = against_roofs(
        profile(ProfiledOperation("qkv forward", 1, 4.0), ProfiledOperation("norms forward", 1, 5.0)), work, roofs
    )
    assert matmul.roof_ms is None and matmul.achieved is None and norm.roof_ms == pytest.approx(1.0)


@pytest.mark.parametrize("name", [*step_work(GPT2_124M, 1, 64), GAPS, "data", "matmul (not told apart)"])
def test_there_is_advice_for_every_operation(name):
    assert mfu_tables.advice(name) != mfu_tables.advice("unaccounted")


def test_names_are_those_of_the_projection():
    work = step_work(GPT2_124M, 1, 64)
    assert {f"{linear} {way}" for linear in LINEARS for way in ("forward", "dX", "dW")} < set(work)
