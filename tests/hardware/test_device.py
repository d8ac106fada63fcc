"""The device and Triton's interpreter are chosen before the kernels are imported, or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
