"""One quick run of python -m bench.mfu that the tests of its command and of its report look at."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from bench import mfu
from bench.steps import ceilings, elsewhere
from bench.steps.ceilings import Ceilings

TINY = "L1H2C32T32V160"
INTERPRETED = "L1H1C32T24V80"
"""What stands in for mfu.TINY."""
CEILINGS = Ceilings("test CPU", "host", "2.13", 1, copy_gbs=10.0, matmul_tflops={"fp32": 0.1, "bf16": 0.05})
AUDIT_ROW = {
    "module": "fused_attn",
    "kernel": "forward_kernel",
    "launches": 24,
    "registers": 128,
    "shared": 32768,
    "blocks_per_sm": 2,
    "limiter": "registers",
    "waves": 8.35,
    "last_wave": 0.35,
    "tensor_core": {"HMMA.16816.F32.BF16": 64},
}
AUDIT = {
    "gpu": "NVIDIA GeForce RTX 4070",
    "arch": "sm_89",
    "cases": "step gpt2-124m bf16",
    "triton": "3.7.1",
    "rows": [AUDIT_ROW, AUDIT_ROW | {"waves": None, "last_wave": None, "tensor_core": {}}],
    "failures": [],
}


def quick_run(monkeypatch, folder):
    """No seconds spent on ceilings, few in the interpreter, and torch.compile as on a machine without a compiler. Returns
    main's flags."""

    def compile_without_compiler(model, **_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\n  in torch._inductor.config.cpp.cxx")

    monkeypatch.setattr(ceilings, "measured_ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(mfu, "TINY", INTERPRETED)
    monkeypatch.setattr(torch, "compile", compile_without_compiler)
    return ["--device", "cpu", "--model", TINY, "--batch", "2", "--steps", "3", "--out", str(folder / "out")]


def with_flags(quick, flags):
    """The flags of a quick run, those of ``flags`` in their place."""
    kept = [(name, value) for name, value in zip(quick[::2], quick[1::2]) if name not in flags]
    return [word for pair in kept for word in pair] + [*flags]


@pytest.fixture
def quick(monkeypatch, tmp_path):
    return quick_run(monkeypatch, tmp_path)


@pytest.fixture(scope="session")
def result(tmp_path_factory, request):
    """A run of the whole command on a tiny model: eager and the interpreter real, compile without its compiler."""
    if request.config.getoption("--device") == "cuda":
        pytest.skip("with --device cuda this process does not interpret kernels")
    return whole_run(tmp_path_factory.getbasetemp() / "mfu")


@cache
def whole_run(folder):
    """Once, although each module that imports the fixture has a session's of its own."""
    with pytest.MonkeyPatch.context() as patch:
        flags = quick_run(patch, folder)
        patch.setattr(elsewhere, "audit", lambda *_: AUDIT)
        assert mfu.main(flags) == 0
        return json.loads((folder / "out" / "mfu.json").read_text()), folder / "out"
