"""What a launcher needs to know before it launches: whether a tensor runs in Triton, on which device and how many SMs, and
with which dropout seed; and the hook through which a profiler learns what is launched.

Nothing here touches CUDA at import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastgpt.hardware.device import interprets

INTERPRET = interprets()
"""True when triton runs kernels in its CPU interpreter. Fixed for the life of the process, as triton's own switch is."""

compile_only: int | None = None
"""Inside offline.absent_gpu the compute capability (89): CPU tensors then take the Triton path, and launches only compile or
are counted."""

INTERPRETER_SMS = 4
"""Programs that a persistent kernel starts in the interpreter: enough to test the reduction over programs, few enough
to be quick (a program costs 0.06 ms there)."""

compile_only_sms = 46
"""SM count that launchers see while ``compile_only``: the RTX 4070's."""

ABSENT_L2_BYTES = 36 * 2**20
"""L2 cache where there is no GPU: the RTX 4070's."""


def runs_in_triton(x: Tensor) -> bool:
    """Whether launchers send this tensor to a Triton kernel. False (a CPU tensor and no interpreter): the PyTorch
    reference computes instead, so that a model built on these ops runs on any machine."""
    return x.is_cuda or (x.device.type == "cpu" and (INTERPRET or compile_only is not None))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matmul operands for ``x``: autocast's where it is on, else x's own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def columns_adjacent(x: Tensor) -> Tensor:
    """x itself, or a copy if its last dimension is strided or expanded (dO from .sum()); all other strides are free."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


UNCHANGED = nullcontext()


def device_guard(x: Tensor) -> AbstractContextManager:
    """Launch on the device that holds ``x``, whichever is current (Liger-Kernel#1303). Inside an operator it is already."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return UNCHANGED


@lru_cache
def _cuda_sm_count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``; what stands in for them in the interpreter and in compile-only runs."""
    if device.type == "cuda":
        return _cuda_sm_count(device.index if device.index is not None else torch.cuda.current_device())
    return compile_only_sms if compile_only else INTERPRETER_SMS


@lru_cache
def l2_bytes(device: torch.device) -> int:
    """L2 cache of ``device``, or ABSENT_L2_BYTES."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else ABSENT_L2_BYTES


# Plain integers: triton's own cdiv and next_power_of_2 also serve kernels, and cost the host a microsecond per call.


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, whose replays check and decide nothing anew."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class NoRoom(Exception):
    """``error`` of triton's: this GPU has no room for the config of ``choice``, a tuning.Choice."""

    def __init__(self, choice: Any, error: Exception) -> None:
        self.choice, self.error = choice, error


listener: Callable[[Any], None] | None = None
"""``tuning.heard`` sets it: it is told of the choice of every launch."""


class Launch:
    """A kernel with all of a launch that shapes, dtypes and device decide: prepared once for each of these, in a function under
    ``tuning.cached``, then called with tensors and numbers, as often as the shapes come again.

    ``choice``: the tuning.Choice from which ``grid`` and ``options``, the kernel's constexprs and warps, were made."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], choice: Any, **options: Any) -> None:
        self.kernel, self.grid, self.choice = kernel, grid, choice
        # From triton 3.10 on, a product and its sum are rounded twice unless asked.
        self.options = {**options, "enable_fp_fusion": True}

    def __call__(self, *args: Any, **more: Any) -> None:
        """Raises NoRoom, which operators.py answers with another config."""
        if listener is not None:
            listener(self.choice)
        try:
            self.kernel[self.grid](*args, **more, **self.options)
        except Exception as error:
            from triton.runtime.errors import OutOfResources

            if isinstance(error, OutOfResources):
                raise NoRoom(self.choice, error) from error
            raise


Recorder = Callable[[str, tuple[int, ...], torch.dtype, str], AbstractContextManager | None]
recorder: Recorder | None = None


def record(op: str, shape: tuple[int, ...], dtype: torch.dtype, engine: str) -> AbstractContextManager:
    """Tell a dry run or a profiler, inside ``recorded``, which matmul or sweep runs next; it runs in the context returned.

    ``op``: a kernel of the tuning tables ("linear.gelu"), "matmul_fp32", or what frames of a trace cannot tell apart.
    ``shape``: (m, n, k) of a matmul, (m, n) of a sweep. ``dtype``: of the operands. ``engine``: "cublas" or "triton"."""
    found = None if recorder is None else recorder(op, shape, dtype, engine)
    return UNCHANGED if found is None else found


@contextmanager
def recorded(other: Recorder) -> Iterator[None]:
    """Inside, ``other`` has every call of ``record``, and returns what the operation is to run in, or None."""
    global recorder
    before, recorder = recorder, other
    try:
        yield
    finally:
        recorder = before


def draw_seed(device: torch.device) -> Tensor:
    """A one-element int64 dropout seed on ``device`` from torch's generator.

    Drawn outside the custom op and saved for backward: activation checkpointing repeats it (it restores the RNG state),
    CUDA graphs and torch.compile advance it."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
