"""Compile for a GPU that is not here, or count what would be launched on it.

No GPU, no CUDA driver: triton lowers a kernel to a cubin with the ``ptxas`` that its wheel carries. A dry run counts launches
(``count_launches``); bench/compiler/capture.py compiles them, and cubin.py beside it reads what the compiler made.

A process runs kernels either in triton's interpreter or in its compiler: under ``TRITON_INTERPRET=1``, ``compile_for`` raises
RuntimeError.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from fastgpt.kernels import runtime, tuning


class CompileOnlyDriver(DriverBase):
    """What triton asks of a GPU driver before it launches, answered for an absent GPU of compute capability ``arch``
    (89 is 8.9). It can compile; it has no launcher."""

    def __init__(self, arch: int) -> None:
        super().__init__()
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return False  # never picked by triton itself, only through compile_for

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        # A JITFunction keeps its compiled kernels, and the target they are for, per device number: one number per
        # architecture, none of them a real device's.
        return -self.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty  # asked for by launchers only

    def get_benchmarker(self):
        raise RuntimeError("a compile-only driver cannot time kernels")


@contextmanager
def compile_for(arch: int, sms: int | None = None) -> Iterator[CompileOnlyDriver]:
    """Inside, triton targets sm_``arch`` and CPU tensors take the Triton path (``runtime.compile_only``).

    Both are restored after. ``sms`` is the SM count that launchers see (default: the RTX 4070's 46). Raises
    RuntimeError under the interpreter.
    """
    if runtime.INTERPRET or os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError(
            "TRITON_INTERPRET is set, so kernels of this process are interpreted and cannot be compiled: "
            "unset it, or compile in a child process without it"
        )
    active = triton.runtime.driver
    before = active._active, runtime.compile_only, runtime.compile_only_sms
    driver = CompileOnlyDriver(arch)
    active.set_active(driver)
    runtime.compile_only, runtime.compile_only_sms = True, sms or runtime.compile_only_sms
    tuning.choose_again()
    try:
        yield driver
    finally:
        active._active, runtime.compile_only, runtime.compile_only_sms = before
        tuning.choose_again()


@contextmanager
def launched_by(run: Any) -> Iterator[None]:
    """Inside, ``run(kernel, *args, grid=..., **options)`` stands in for every launch."""
    before, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = before


@contextmanager
def count_launches(arch: int, sms: int) -> Iterator[Counter[tuple[str, str]]]:
    """Inside, launches for sm_``arch`` are counted by (file, function): nothing is launched or compiled."""
    found: Counter[tuple[str, str]] = Counter()

    def count(function: JITFunction, *args: Any, **kwargs: Any) -> None:
        found[function.module.rpartition(".")[2], function.__name__] += 1

    with compile_for(arch, sms), launched_by(count):
        yield found
