"""Launches as on a GPU that is not here; tests/bench/compiler/test_capture.py compiles some."""

from __future__ import annotations

import pytest

from fastgpt.kernels import offline, runtime


def test_the_interpreter_refuses_to_compile(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it, or compile in a child process"), offline.absent_gpu(89):
        pass
    assert runtime.compile_only is None
