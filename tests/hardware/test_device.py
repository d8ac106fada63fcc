"""The device and Triton's interpreter are chosen before the kernels are imported, or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.hardware.device import is_out_of_memory

ROOT = Path(__file__).parents[2]


PICK = "from fastgpt.hardware import device; where = device.pick('cpu', 'triton')"
CODES = {
    "first": f"{PICK}; from fastgpt import ops; from fastgpt.kernels import runtime\n"
    "assert runtime.runs_in_triton(torch.empty(0, device=where))",
    **{name: f"import {name}; {PICK}" for name in ("fastgpt.ops", "fastgpt.model", "fastgpt.kernels", "triton")},
    "never": "from bench.training_parity import measure; measure(1, torch.device('cpu'))",
}
EACH = """
import json, os, sys, torch, traceback
for name, code in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        try:
            exec(code, {"torch": torch})
            said = "fine"
        except BaseException as error:
            said = traceback.format_exception_only(error)[-1]
        print(json.dumps([name, said]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def said():
    """How each of CODES ends in a process that has imported torch and no more: "fine", or its error."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", EACH, json.dumps(CODES)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return dict(map(json.loads, done.stdout.splitlines()))


def test_picking_first_interprets_the_kernels(said):
    assert said["first"] == "fine"


@pytest.mark.parametrize("earlier", ["fastgpt.ops", "fastgpt.model", "fastgpt.kernels", "triton"])
def test_picking_too_late_is_refused_and_never_falls_back_in_silence(said, earlier):
    assert "UserError: the kernels are already imported" in said[earlier]


def test_an_unpicked_cpu_is_no_ground_for_a_parity_figure(said):
    assert "UserError: the kernels would not run here" in said["never"]


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
