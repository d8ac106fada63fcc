"""The device and Triton's interpreter are chosen before the kernels are imported, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.hardware.device import is_out_of_memory

ROOT = Path(__file__).parents[2]


def run(code):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_picking_first_interprets_the_kernels():
    code = "from fastgpt.hardware import device; where = device.pick('cpu', 'triton'); import torch; from fastgpt import ops;"
    code += "from fastgpt.kernels import runtime; assert runtime.runs_in_triton(torch.empty(0, device=where))"
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("earlier", ["fastgpt.ops", "fastgpt.model", "fastgpt.kernels", "triton"])
def test_picking_too_late_is_refused_and_never_falls_back_in_silence(earlier):
    result = run(f"import {earlier}; from fastgpt.hardware import device; device.pick('cpu', 'triton')")
    assert "UserError: the kernels are already imported" in result.stderr


def test_an_unpicked_cpu_is_no_ground_for_a_parity_figure():
    result = run("import torch; from bench.training_parity import measure; measure(1, torch.device('cpu'))")
    assert "UserError: the kernels would not run here" in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB. GPU 0 has ..."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:40],
)
def test_whoever_had_no_room_it_is_out_of_memory(error):
    assert is_out_of_memory(error)


def test_what_torch_says_of_a_cpu_without_room():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**55)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
        KeyError("out of memory"),
    ],
)
def test_other_errors_are_not(error):
    assert not is_out_of_memory(error)
