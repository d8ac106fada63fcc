"""A trace of a few training steps (``--profile``): what the host and the GPU did when, operation by operation."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fastgpt.training.outlets import Outlet

FILE = "trace.json.gz"
SETTLED, STEPS = 2, 3
"""Steps before the trace, in which kernels are compiled and memory is found, and those in it."""


@contextmanager
def traced(
    folder: Path, device: torch.device, say: Callable[[str], None], news: list[str]
) -> Iterator[Callable[[], None]]:
    """Write ``FILE`` into a run's ``folder``: a Chrome trace of the steps after the first ``SETTLED`` of this process. Yields
    what to call after each step. A file that cannot be written is said in ``news``, and the run goes on."""
    path, device_too = folder / FILE, [ProfilerActivity.CUDA] if device.type == "cuda" else []
    # Else "USDT: profiler_start" between the log lines, of kineto's highest level: its errors go with it, and ``write`` looks.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    done = 0

    def write(recorder: profile) -> None:
        nonlocal done
        done = recorder.step_num - SETTLED
        outlet = Outlet(str(path), news, folder, caught=Exception)  # of kineto, too
        outlet.take(recorder.export_chrome_trace, str(path))
        if not outlet.failing:
            say(f"{path} has {done} steps: open it in https://ui.perfetto.dev, which keeps it on this machine")
            if device_too and not _has_kernels(path):
                say(f"{path} has no kernel of the GPU, as CUPTI is missing or not permitted: docs/troubleshooting.md")

    with profile(
        activities=[ProfilerActivity.CPU, *device_too],
        schedule=schedule(wait=0, warmup=SETTLED, active=STEPS, repeat=1),
        on_trace_ready=write,
    ) as recorder:
        yield recorder.step
    if not done:
        say("there is no trace: it begins with the third step of a process, and this one ended before")


def _has_kernels(path: Path) -> bool:
    """Whether a trace has anything that ran on a GPU."""
    with gzip.open(path) as file:
        return b'"cat": "kernel"' in file.read()
