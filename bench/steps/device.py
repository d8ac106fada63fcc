"""The GPU that is here, for bench.gpu: what can be imported, versions, copy and matmul rates, and the clock under load.

    python -m bench.steps.device

The last line printed is JSON. An idle card's clock says nothing: it is read while matmuls keep the card busy.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from bench.steps.ceilings import measured_ceilings
from fastgpt import common
from fastgpt.common import UserError
from fastgpt.hardware.environment import environment
from fastgpt.hardware.telemetry import telemetry

MODULES = (
    "fastgpt.train", "fastgpt.training.loop", "bench.mfu", "bench.steps.profile", "bench.steps.step", "bench.kernels",
    "bench.ops", "bench.tune", "bench.ablation", "bench.project", "bench.reports.page", "pytest",
)  # fmt: skip
"""What the stages of bench.gpu import."""
PACKAGES = ("torch", "triton", "numpy", "pytest", "rich", "filelock", "jinja2", "matplotlib", "nvidia-ml-py", "psutil")
BUSY_S = 2.0


def failed_imports() -> dict[str, str]:
    """The modules that cannot be imported, and why."""
    failed = {}
    for name in MODULES:
        try:
            import_module(name)
        except Exception as error:
            traceback.print_exc()
            failed[name] = f"{type(error).__name__}: {error}"
    return failed


def under_load(device: torch.device) -> dict[str, Any] | None:
    """Clock, power and temperature while bf16 matmuls run; None where the driver does not say."""
    a, b = torch.randn(2, 4096, 4096, device=device, dtype=torch.bfloat16)
    end = time.monotonic() + BUSY_S
    found = None
    while time.monotonic() < end:
        for _ in range(20):
            a @ b
        found = telemetry(device.index or 0)  # while those are still queued
        torch.cuda.synchronize(device)
    return None if found is None else asdict(found)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def main(argv: list[str]) -> int:
    if argv:
        raise UserError(f"{argv[0]} is given, but bench.steps.device has no options: leave it out")
    device = torch.device("cuda", torch.cuda.current_device())
    result: dict[str, Any] = {
        "environment": environment(device),
        "total_memory": torch.cuda.get_device_properties(device).total_memory,
        "cores": os.cpu_count(),
        "packages": versions(),
        "failed_imports": failed_imports(),
        "under_load": under_load(device),
        "ceilings": asdict(measured_ceilings(device, refresh=True)),
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    common.run(main)
