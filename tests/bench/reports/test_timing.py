"""Fair turns, medians, and peak memory."""

from __future__ import annotations

import time
from contextlib import contextmanager

import pytest
import torch

from bench.reports import timing

CPU = torch.device("cpu")


def test_variants_take_turns_and_take_turns_at_being_first():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "abc"}
    found = timing.interleave(variants, CPU, rounds=4, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"  # warm-up, four rounds
    assert {name: t.runs for name, t in found.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_turn_may_have_several_runs_and_something_around_them():
    calls = []

    @contextmanager
    def turn(name):
        calls.append("(")
        yield
        calls.append(")")

    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    options = {"rounds": 9, "warmup": 0, "each": 2, "turn": turn, "stop": lambda: "".join(calls).endswith("(bb)")}
    found = timing.interleave(variants, CPU, **options)
    assert "".join(calls).startswith("(aa)(bb)"), "the stop comes after each has had a turn"
    assert found["a"].runs >= 2 and found["b"].runs >= 2


def test_a_budget_ends_the_rounds_but_not_before_three():
    found = timing.interleave({"a": lambda: time.sleep(0.01)}, CPU, rounds=1000, warmup=0, budget_s=0.0)
    assert found["a"].runs == 3 and found["a"].median_ms >= 10


def test_a_timing_is_a_median_and_the_distance_of_the_quartiles():
    found = timing.Timing.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.median_ms, found.runs) == (3.0, 5)
    assert timing.Timing.of([7.0]) == timing.Timing(7.0, 0.0, 1)
    assert timing.Timing.of([1.0, 2.0]) == timing.Timing(1.5, 1.5, 2)
    assert timing.Timing.of([4.0, 1.0, 2.0, 3.0]) == timing.Timing(2.5, 2.5, 4)


def test_peak_memory_of_a_gpu_and_of_no_gpu(device):
    peak = timing.peak_memory(lambda: torch.empty(2**20, dtype=torch.uint8, device=device), device)
    assert peak == (2**20 if device.type == "cuda" else None)


@pytest.mark.parametrize("text, seconds", [("90s", 90), ("10m", 600), ("1h", 3600), ("300", 300), ("1.5m", 90)])
def test_budgets(text, seconds):
    assert timing.parse_budget(text) == seconds
