"""Predicted memory (fastgpt/performance/memory.py) beside what PyTorch's allocator counts on this machine's GPU:

    python -m bench.memory --presets gpt2-40m gpt2-124m --out memory.json

Each point is a training step with gradient accumulation (bench.steps.step) in a process of its own:
torch.cuda.max_memory_allocated against ``Memory.allocated``, max_memory_reserved against ``Memory.total``. A point that runs
out of memory is a result too.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from bench.reports.session import last_json
from bench.reports.tables import Cells, print_table, terminal
from fastgpt import command as command_module
from fastgpt import common
from fastgpt.command import Arg
from fastgpt.common import UserError, write_json
from fastgpt.config import load_preset
from fastgpt.hardware.device import device_name
from fastgpt.hardware.environment import ROOT, environment
from fastgpt.hardware.requirements import check_kernels, no_gpu
from fastgpt.performance.memory import CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_HOPPER, memory


def predict(preset: str, kernels: str, micro_batch: int, arch: int) -> dict[str, Any]:
    """Allocated and reserved bytes of a bf16 step, and their parts; ``arch``: the compute capability, as 89."""
    workspace = CUBLAS_WORKSPACE_HOPPER if arch >= 90 else CUBLAS_WORKSPACE
    counted = "nanogpt-compile" if kernels == "nanogpt" else kernels
    found = memory(load_preset(preset, "cuda").model, micro_batch=micro_batch, kernels=counted, workspace=workspace)
    return {"allocated": found.allocated, "reserved": found.total, "parts": found.parts(), "peak": found.peak}


def measure(preset: str, kernels: str, micro_batch: int, limit: float) -> dict[str, Any]:
    """The last line of bench.steps.step, or what went wrong. ``limit``: seconds."""
    command = [sys.executable, "-m", "bench.steps.step", "--preset", preset, "--variants", kernels]
    command += ["--batch-size", str(micro_batch), "--grad-accum", "2", "--steps", "2", "--seconds", "0"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {limit:.0f} seconds"}
    said = done.stderr.strip().splitlines() or ["no output"]
    found = last_json(done.stdout)
    return found["steps"][0] if found else {"error": said[-1][:200]}


def compare(point: dict[str, Any], predicted: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """One row: both, and predicted over measured minus 1 where there is something to divide by."""
    row = point | {"predicted": predicted, "measured": None, "error": measured.get("error"), "off": None}
    if measured.get("peak_memory"):
        row["measured"] = {"allocated": measured["peak_memory"], "reserved": measured["reserved_memory"]}
        row["off"] = {key: predicted[key] / value - 1 for key, value in row["measured"].items()}
    return row


def cells(rows: list[dict[str, Any]]) -> Cells:
    """A row per point: allocated, then reserved, each predicted, measured, and the error of the prediction."""
    head = [
        "preset",
        "kernels",
        "micro-batch",
        "predicted",
        "measured",
        "off",
        "reserved: predicted",
        "measured",
        "off",
    ]
    found = [head]
    for row in rows:
        figures = []
        for key in ("allocated", "reserved"):
            figures.append(f"{row['predicted'][key] / 1e9:.2f}")
            if row["measured"]:
                figures += [f"{row['measured'][key] / 1e9:.2f}", f"{row['off'][key]:+.1%}"]
            else:
                figures += [row["error"] or "-", "-"]
        found.append([row["preset"], row["kernels"], str(row["micro_batch"]), *figures])
    return found


@dataclass(frozen=True)
class MemoryConfig:
    out: Annotated[Path | None, Arg("FILE")] = None
    """Write the figures here as JSON."""
    presets: tuple[Literal["gpt2-40m", "gpt2-124m", "gpt2-350m"], ...] = ("gpt2-40m", "gpt2-124m", "gpt2-350m")
    """The models."""
    kernels: tuple[Literal["nanogpt", "eager", "compile", "triton"], ...] = ("nanogpt", "eager", "compile", "triton")
    """What computes them."""
    seconds: float = 240.0
    """Limit of one point; compiling takes a minute."""


def main(argv: list[str]) -> int:
    """Predicted and measured peak memory of training steps on this machine's CUDA GPU. Raises UserError without one."""
    args = command_module.parse(MemoryConfig, argv, "bench.memory", __doc__)
    if not torch.cuda.is_available():
        raise UserError(f"bench.memory needs a CUDA GPU, but {no_gpu()}")
    if "triton" in args.kernels:
        check_kernels("bench.memory")
    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    found: dict[str, Any] = {"environment": environment(device), "rows": []}
    for preset in args.presets:
        usual = load_preset(preset, "cuda").data.batch_size
        for kernels in args.kernels:
            for micro_batch in (max(usual // 2, 1), usual):
                point = {"preset": preset, "kernels": kernels, "micro_batch": micro_batch}
                measured = measure(preset, kernels, micro_batch, args.seconds)
                predicted = predict(preset, kernels, micro_batch, 10 * major + minor)
                found["rows"].append(compare(point, predicted, measured))
                if args.out:
                    write_json(args.out, found)
    title = f"Peak memory of a step, GB (10^9 bytes), {device_name(device)}"
    print_table(terminal(140), title, cells(found["rows"]))
    return 0


if __name__ == "__main__":
    common.run(main)
