"""The device and Triton's interpreter are chosen before the kernels are imported, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
