"""Timing that compares fairly: variants take turns, on a warm device, and what is reported is a median with its spread.

Clocks drift while a benchmark runs (boost, heat, power limit): variants measured one after the other are measured at
different clocks. Here each round runs every variant once, and each round starts with another one.

On a GPU the time of a variant is what CUDA events around it say, with the queue kept ahead: a spin kernel before the
first event gives the host time to submit everything, so that launch overhead counts only where the device would really
wait. With ``cold`` the L2 cache is overwritten before each run, as it is in training, where other tensors pass through
between two uses of an operation; 8192 x 768 in bf16 is 12.6 MB and would otherwise stay in the 36 MB of an RTX 4070.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fastgpt.common import UserError

Work = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Milliseconds over ``runs`` runs."""

    median_ms: float
    iqr_ms: float
    """Distance between the quartiles."""
    runs: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [0.0, 0.0, 0.0]
        return cls(statistics.median(samples), quartiles[2] - quartiles[0], len(samples))


def interleave(
    variants: Mapping[str, Work],
    device: torch.device,
    *,
    rounds: int = 20,
    warmup: int = 3,
    cold: bool = True,
    budget_s: float | None = None,
    each: int = 1,
    turn: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Timing]:
    """Time every variant in ``rounds`` turns of ``each`` runs; in fewer turns (at least 3) if ``budget_s`` seconds are up, and
    in what there was when ``stop()`` becomes true.

    ``turn(name)`` is entered around a variant's turn. Exceptions are the caller's: warm a variant up on its own first if it may
    fail.
    """
    names = list(variants)
    measure = _cuda_timer(device, cold) if device.type == "cuda" else _cpu_timer
    for name in names:
        for _ in range(warmup):
            variants[name]()
    lead_s = dict.fromkeys(names, 0.0)
    if device.type == "cuda":
        lead_s = {name: _submission_s(variants[name], device) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for number in range(rounds):
        if budget_s is not None and number >= 3 and time.perf_counter() - start > budget_s:
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if stop() and samples[name]:
                continue
            with turn(name):
                samples[name] += [measure(variants[name], lead_s[name]) for _ in range(each)]
    return {name: Timing.of(values) for name, values in samples.items()}


def _submission_s(work: Work, device: torch.device) -> float:
    """Seconds that the host takes to submit the work."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize(device)
    return seconds


def _cpu_timer(work: Work, lead_s: float) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _cuda_timer(device: torch.device, cold: bool) -> Callable[[Work, float], float]:
    props = torch.cuda.get_device_properties(device)
    l2_bytes = getattr(props, "L2_cache_size", 0) or 2**26
    flush = torch.empty(2 * l2_bytes if cold else 0, dtype=torch.int8, device=device)
    clock_hz = 2e9  # of the spin; an upper end, so that it does not end early

    def measure(work: Work, lead_s: float) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        torch.cuda._sleep(int(min(1.5 * lead_s, 0.05) * clock_hz))
        if cold:
            flush.zero_()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end)

    return measure


def peak_memory(work: Work, device: torch.device) -> int | None:
    """Bytes that the work holds at its peak beyond what is allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    work()  # whatever it keeps (compiled code, caches) does not count
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def parse_budget(text: str) -> float:
    """Seconds of "90s", "10m", "1h" or "300". Raises UserError."""
    parsed = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip().lower())
    if not parsed or not float(parsed[1]):
        raise UserError(f"budget is {text!r}: it must be a time such as 90s, 10m or 1h")
    return float(parsed[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[parsed[2]]
