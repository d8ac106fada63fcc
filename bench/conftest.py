"""``pytest bench --benchmark-only``: small benchmarks that are quick to repeat, through pytest-benchmark.

On a GPU the kernels; on any machine what the CPU does for a training step: loader, tokenizer, the host's share of a launch.
Each run is kept in bench/results/ (``--no-store`` does not, ``--label`` names it), so ``python -m bench.compare`` can tell
two apart. ``pytest tests``, or pytest alone, runs none of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

ENTRIES = pytest.StashKey[dict[str, dict[str, Any]]]()


def pytest_addoption(parser):
    parser.addoption("--no-store", action="store_true", help="do not keep the results in bench/results/")
    parser.addoption("--label", help="a name under which bench.compare finds these results")


def pytest_configure(config):
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: interpreted kernels have no speed to measure
    import torch

    torch.set_num_threads(1)
    config.stash[ENTRIES] = {}


@pytest.fixture
def measure(benchmark, request) -> Callable[..., None]:
    """``measure(work, tokens=None)``: time a function; ``tokens`` per call also gives tokens per second."""

    def run(work: Callable[[], Any], tokens: int | None = None) -> None:
        work()  # compiles, fills caches
        benchmark(work)
        if benchmark.stats is None:  # --benchmark-disable
            return
        stats = benchmark.stats.stats
        entry = {"ms": 1e3 * stats.median, "iqr_ms": 1e3 * stats.iqr, "runs": stats.rounds}
        if tokens is not None:
            entry["tokens_per_second"] = benchmark.extra_info["tokens_per_second"] = round(tokens / stats.median)
        request.config.stash[ENTRIES][request.node.name.removeprefix("test_")] = entry

    return run


def pytest_terminal_summary(terminalreporter, config):
    entries = config.stash.get(ENTRIES, {})
    for name, entry in entries.items():
        if "tokens_per_second" in entry:
            terminalreporter.write_line(f"{name}: {entry['tokens_per_second']:,} tokens/s")
    if entries and not config.getoption("--no-store"):
        import torch

        from bench.reports import results
        from fastgpt.hardware.device import present
        from fastgpt.hardware.environment import environment

        path = results.store("suite", environment(torch.device(present())), entries, config.getoption("--label"))
        terminalreporter.write_line(f"Kept in {path}.")
