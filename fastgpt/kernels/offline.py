"""Launches as on a GPU that is not here: a dry run writes them down, bench/compiler/capture.py compiles them.

A process runs kernels either in triton's interpreter or in its compiler: under ``TRITON_INTERPRET=1``, ``absent_gpu`` raises
RuntimeError.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.runtime.jit import JITFunction

from fastgpt.hardware.device import interprets
from fastgpt.kernels import runtime, tuning


@contextmanager
def absent_gpu(arch: int, sms: int | None = None) -> Iterator[None]:
    """Inside, CPU tensors take the Triton path, as if they were on a GPU of compute capability ``arch`` (89 is 8.9) with
    ``sms`` SMs (default: the RTX 4070's 46). Raises RuntimeError under the interpreter."""
    if runtime.INTERPRET or interprets():
        raise RuntimeError(
            "TRITON_INTERPRET is set, so kernels of this process are interpreted and cannot be compiled: "
            "unset it, or compile in a child process without it"
        )
    before = runtime.compile_only, runtime.compile_only_sms
    runtime.compile_only, runtime.compile_only_sms = arch, sms or runtime.compile_only_sms
    tuning.choose_again()
    try:
        yield
    finally:
        runtime.compile_only, runtime.compile_only_sms = before
        tuning.choose_again()


@contextmanager
def launched_by(run: Any) -> Iterator[None]:
    """Inside, ``run(kernel, *args, grid=..., **options)`` stands in for every launch."""
    before, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = before
