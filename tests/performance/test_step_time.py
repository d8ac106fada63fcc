"""The model of a step's time obeys the limits that it is made of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastgpt.anatomy import GPT2_124M, Shape
from fastgpt.common import UserError
from fastgpt.hardware import cards
from fastgpt.performance import attention, operations, step_time
from fastgpt.performance.operation import Operation
from fastgpt.performance.step_time import CONSTANTS, DESCRIBED, RANGES, Chip, step_times

RTX4070, A100, H100 = (cards.lookup(name) for name in ("rtx4070", "a100", "h100"))
DOCS = Path(__file__).parents[2] / "docs" / "projection.md"


def matmul(m, n, k):
    return Operation("matmul", "qkv forward", "matmul", 2 * m * n * k, 2 * (m * k + n * k + m * n), 1, mnk=(m, n, k))


def moving(moved, fresh=0, **rest):
    return Operation("pass", "pointwise", "memory", 0, moved, 1, fresh=fresh, **rest)


def seconds(op, gpu=RTX4070, precision="bf16", constants=CONSTANTS):
    return max(Chip(gpu, precision, constants).times(op).values())


def bound(op, gpu=RTX4070, precision="bf16", constants=CONSTANTS):
    times = Chip(gpu, precision, constants).times(op)
    return max(times, key=times.get)


# ---- constants


def test_every_constant_has_a_meaning_a_source_and_lies_in_its_range():
    for name, about in DESCRIBED.items():
        assert about["meaning"] and about["source"], name
        assert about["low"] <= getattr(CONSTANTS, name) <= about["high"], name


def test_the_documentation_has_every_constant_with_its_value_and_range():
    text = DOCS.read_text(encoding="utf-8")
    for name, about in DESCRIBED.items():
        row = f"| `{name}` | {about['value']:g} | {about['low']:g} to {about['high']:g} |"
        assert f"{row} {about['meaning']} | {about['source']} |" in text, name


def test_doubled_arithmetic_never_counts_twice():
    assert RANGES["double_rate"] == (1.71, 1.87)


# ---- matrix products


def test_a_large_matmul_comes_close_to_the_rate_and_none_exceeds_it():
    chip = Chip(RTX4070, "bf16", CONSTANTS)
    rate = chip.flops_per_clock("bf16") * RTX4070.sm_count * chip.hz
    assert 0.95 * rate < 2 * 8192**3 / seconds(matmul(8192, 8192, 8192)) < rate
    for m, n, k in ((128, 128, 64), (8192, 768, 768), (50304, 768, 8192), (1000, 1000, 1000)):
        assert 2 * m * n * k / seconds(matmul(m, n, k)) < rate


def test_a_wave_that_is_hardly_full_costs_as_much_as_a_full_one(monkeypatch):
    monkeypatch.setattr(step_time, "TILES", ((128, 128),))
    monkeypatch.setattr(step_time, "SPLITS", (1,))
    chip = Chip(RTX4070, "bf16", CONSTANTS)
    one, full, over = (chip.times(matmul(128 * tiles, 128, 4096))["compute"] for tiles in (1, 46, 47))
    assert one == full and over == pytest.approx(2 * full)


def test_splitting_k_fills_the_machine_where_tiles_are_few(monkeypatch):
    few = matmul(256, 256, 65536)
    split = seconds(few)
    monkeypatch.setattr(step_time, "SPLITS", (1,))
    assert seconds(few) > 2 * split


def test_a_matmul_is_bound_by_l2_when_it_cannot_feed_the_tensor_cores():
    assert bound(matmul(8192, 3072, 768)) == "compute"
    starved = replace(CONSTANTS, l2_bytes_per_clock=2.0)
    assert bound(matmul(8192, 3072, 768), constants=starved) == "L2"


def test_a_thin_matmul_is_bound_by_memory():
    assert bound(matmul(16, 50304, 768)) == "memory"


@pytest.mark.parametrize(
    "gpu, precision, ratio",
    [
        (RTX4070, "fp16-fast", 1.79),
        (RTX4070, "fp8", 1.79),
        (H100, "fp8", 1.79),
        (A100, "fp16-fast", 1.0),
        (A100, "fp16", 1.0),
    ],
)
def test_arithmetic_that_is_nominally_doubled_runs_at_the_measured_ratio(gpu, precision, ratio):
    assert Chip(gpu, precision, CONSTANTS).matmul_per_clock() == pytest.approx(
        ratio * Chip(gpu, "bf16", CONSTANTS).matmul_per_clock()
    )


def test_geforce_cards_run_at_half_rate_and_the_fitted_clock_and_others_at_the_nominal_one():
    assert Chip(RTX4070, "bf16", CONSTANTS).flops_per_clock("bf16") == pytest.approx(512 * CONSTANTS.gemm_efficiency)
    assert Chip(A100, "bf16", CONSTANTS).flops_per_clock("bf16") == pytest.approx(
        2048 * CONSTANTS.gemm_efficiency_full_rate, rel=1e-3
    )
    assert Chip(RTX4070, "bf16", CONSTANTS).hz == 2475e6 * CONSTANTS.clock
    assert Chip(A100, "bf16", CONSTANTS).hz == 1410e6


@pytest.mark.parametrize(
    "name, precision, message",
    [
        ("v100", "bf16", "precision is 'bf16': Tesla V100-SXM2-16GB has no bf16 arithmetic, so use fp16"),
        ("a100", "fp8", "precision is 'fp8': NVIDIA A100-SXM4-80GB has no fp8 arithmetic, so use bf16"),
    ],
)
def test_arithmetic_that_a_card_lacks_is_refused(name, precision, message):
    with pytest.raises(UserError, match=message):
        Chip(cards.lookup(name), precision, CONSTANTS)


# ---- memory and attention


def test_a_pass_takes_its_bytes_over_the_bandwidth_that_copies_reach():
    assert seconds(moving(10**9)) == pytest.approx(1e9 / (504e9 * CONSTANTS.memory_efficiency))
    assert Chip(A100, "bf16", CONSTANTS).bandwidth == pytest.approx(2039e9 * CONSTANTS.memory_efficiency_hbm)


def test_what_l2_still_holds_costs_no_memory_time():
    small, large = 10 * 2**20, 1000 * 2**20
    assert seconds(moving(2 * small, fresh=small)) == pytest.approx(seconds(moving(small)))
    assert seconds(moving(2 * large, fresh=large)) == pytest.approx(seconds(moving(2 * large - 18 * 2**20)))


def test_own_kernels_take_the_factor_that_is_assumed_of_them():
    slow = replace(CONSTANTS, own_kernels=1.3)
    assert seconds(moving(10**9, own=True), constants=slow) == pytest.approx(1.3 * seconds(moving(10**9)))
    assert seconds(moving(10**9), constants=slow) == seconds(moving(10**9))


def test_softmax_weighs_more_where_heads_are_small():
    def share(H):
        ops = operations.operations(Shape(1, H, 768, 1024, 64), "eager", 8)
        (op,) = [op for op in ops if op.name == "attention forward"]
        return 1 - seconds(op, constants=replace(CONSTANTS, exposed_forward=0.0)) / seconds(op)

    assert 0.05 < share(12) < share(24) < 0.3


def test_blocks_of_unequal_length_end_unevenly():
    even = step_time.uneven_end
    assert even((4, 4), 2, 4, turns=False) == 1
    assert even((1, 7), 1, 2, turns=True) == 7 / 4
    rows = tuple(range(1, 9))
    taking_turns, in_sequence = (even(rows[::-1], 96, 46, turns=turns) for turns in (True, False))
    assert 1 < taking_turns < in_sequence < 1.1
    # Two on an SM: 3 and 5 at half of the rate, 3 ends after 6; the 2 that 5 has left take 4 beside the next, or 2 alone at
    # the whole rate.
    assert even((3, 5), 1, 1, turns=True, alone=1.0) == 1
    assert even((3, 5), 1, 1, turns=True, alone=0.5) == (6 + 2 / 0.5) / 8
    assert even((3, 5, 2), 1, 1, turns=True, alone=0.5) == 1


@pytest.mark.parametrize("kernels, dearer", [("eager", 1.002), ("triton", 1.005)])
def test_masked_tiles_and_dropout_execute_more(kernels, dearer):
    ops = operations.operations(GPT2_124M, kernels, 8)
    (op,) = [op for op in ops if op.name == "attention forward"]
    assert op.scores.masked == 8 * 128 * 128 and op.scores.number == 96 * 128 * 128 * 36
    plain, random = (replace(op, scores=replace(op.scores, **change)) for change in ({"masked": 0}, {"dropout": True}))
    assert dearer * seconds(plain) < seconds(op) < 1.03 * seconds(plain) < seconds(random)


def test_what_own_attention_executes_is_what_the_tables_configs_compile_to():
    """Where the table was ranked by today's count: a tile's clocks of issue (128 instructions each), of exponentials (16) and
    of shared memory (128 bytes)."""
    table = json.loads(
        (DOCS.parents[1] / "fastgpt" / "kernels" / "tables" / "sm89_46.json").read_text(encoding="utf-8")
    )
    ways = {
        "attention.forward": ("forward", 2),
        "attention.backward_q": ("dQ", 3),
        "attention.backward_kv": ("dK dV", 4),
    }
    compared = 0
    for entry in table["entries"]:
        way, products = ways.get(entry["kernel"], (None, 0))
        clocks = entry["evidence"].get("tile_clocks", {})
        if not way or (entry["dtype"], entry["bucket"]) != ("bf16", "D64 rows<=262144") or "shared" not in clocks:
            continue
        cost, scores = attention.OWN[way], entry["config"]["BLOCK_M"] * entry["config"]["BLOCK_N"]
        issued = (
            cost.instructions + cost.exponentials + products
        )  # a product of 16 x 8 x 16 is 64 columns / 64 per score
        assert clocks["issue"] * 128 / scores == pytest.approx(issued, rel=0.05), way
        assert clocks["exponential"] * 16 / scores == pytest.approx(cost.exponentials, rel=0.05), way
        assert clocks["shared"] * 128 / scores == pytest.approx(cost.shared * 64, rel=0.05), way
        compared += 1
    assert compared >= 2


# ---- a step


def test_the_step_is_the_sum_of_its_operations_and_the_gaps():
    ops = operations.operations(GPT2_124M, "triton", 8)
    times = step_times(ops, 64, RTX4070, "bf16", CONSTANTS)
    names = [op.name for op in times]
    assert len(names) == len(set(names))
    assert sum(op.launches for op in times) == sum(op.launches * op.executions(64) for op in ops)
    assert sum(op.flops for op in times) == sum(op.flops * op.executions(64) for op in ops)
    gaps = [op for op in times if op.group == operations.GAPS]
    assert sum(op.ms for op in gaps) == pytest.approx(1e-3 * sum(op.launches for op in times))  # 1 us each
    total = step_time.step_ms(GPT2_124M, RTX4070, "triton", "bf16", 8, 64, 1024, 0.0, CONSTANTS)
    assert sum(op.ms for op in times) == pytest.approx(total)


def test_a_step_of_tiny_kernels_waits_for_the_host():
    ops = operations.operations(Shape(12, 2, 64, 64, 256), "eager", 1)
    times = step_times(ops, 1, RTX4070, "bf16", CONSTANTS)
    assert times[-1].name == "waiting for the host" and times[-1].bound == "launch"
    launches = sum(op.launches for op in times)
    assert sum(op.ms for op in times) == pytest.approx(1e-3 * CONSTANTS.host_launch_us * launches)
