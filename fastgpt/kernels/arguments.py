"""What every fused operation checks before it launches: one function for each kind of argument, with one message.

Each raises ValueError, whose message names the argument, its value and what to use instead. Messages are formatted only when
raised: torch.compile would otherwise tie a graph to the sizes in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastgpt.kernels import runtime

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What kernels read and write, in any mixture unless an operation says otherwise."""
MAX_WIDTH = 16_384
"""Columns of the widest row that layer norm takes."""
MAX_HEAD_DIM = 256
"""The widest head that attention takes."""


def tensors(
    of: str,
    size: Sequence[int],
    first: tuple[str, Tensor, None],
    *others: tuple[str, Tensor | None, Sequence[int] | None],
) -> None:
    """Floating-point tensors, each given as (name, tensor or None, the shape that it must have or None for any).

    They must have these shapes, which follow from the shape ``size`` of ``of``, be on the first one's device, and have a
    dtype that kernels read (where PyTorch computes instead, it decides itself). One call for all: eager training pays for
    each."""
    x_name, x, _ = first
    for name, tensor, needed in (first, *others):
        if tensor is None:
            continue
        if needed is not None and tensor.shape != needed:
            shape(name, tensor, needed, of, size)
        if tensor.device != x.device:
            raise _elsewhere(name, tensor, x_name, x)
        if tensor.dtype not in DTYPES and runtime.runs_in_triton(x):
            raise ValueError(f"{name} is {tensor.dtype}: use float32, float16 or bfloat16")


def _elsewhere(name: str, tensor: Tensor, x_name: str, x: Tensor) -> ValueError:
    return ValueError(f"{name} is on {tensor.device}: move it to {x.device}, where {x_name} is")


def shape(name: str, tensor: Tensor, needed: Sequence[int], of: str, size: Sequence[int]) -> None:
    """``tensor`` must have the shape ``needed``, which follows from the shape ``size`` of ``of``."""
    if tuple(tensor.shape) != tuple(needed):
        raise ValueError(f"{name} is {tuple(tensor.shape)}: {of} of {tuple(size)} needs {tuple(needed)}")


_Named = Mapping[str, Tensor | None]


_NONE: _Named = {}


def alike(
    name: str, size: Sequence[int], *, rows: _Named = _NONE, columns: _Named = _NONE, **others: Tensor | None
) -> None:
    """What a launcher hands to a kernel beside ``name`` must have its ``size``; ``rows`` one number for each of its rows, and
    ``columns`` for each of its columns. The operators may be called by anybody, and a kernel goes by address: of a smaller
    tensor it would read, or write, what lies behind."""
    for named, needed in ((others, size), (rows, size[:-1]), (columns, size[-1:])):
        for other, tensor in named.items():
            if tensor is not None and tensor.shape != needed:
                shape(other, tensor, needed, name, size)


def integers(name: str, tensor: Tensor, needed: Sequence[int], x_name: str, x: Tensor) -> None:
    """``tensor`` (doc_ids, kv_len) must hold integers, have the shape ``needed`` and be on x's device."""
    if tuple(tensor.shape) != tuple(needed) or tensor.is_floating_point():
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}: use integers of shape {tuple(needed)}")
    if tensor.device != x.device:
        raise _elsewhere(name, tensor, x_name, x)


def indices(name: str, tensor: Tensor, x_name: str, x: Tensor) -> None:
    """``tensor`` must hold token ids or classes and be on x's device."""
    if tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} is {tensor.dtype}: use int64 or int32")
    if tensor.device != x.device:
        raise _elsewhere(name, tensor, x_name, x)


def dtype(name: str, value: torch.dtype | None) -> None:
    if value is not None and value not in DTYPES:
        raise ValueError(f"{name} is {value}: use float32, float16 or bfloat16")


def width(name: str, x: Tensor) -> torch.Size:
    """A norm's rows: ``x`` (..., C). Returns (C,)."""
    if x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"{name} is {tuple(x.shape)}: its last dimension must have 1 to {MAX_WIDTH} elements")
    return x.shape[-1:]


def probability(name: str, value: float) -> None:
    """``value`` (dropout_p, label_smoothing) must be in [0, 1]. A dropout of 1 leaves nothing, and no gradient."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value}: it must lie in [0, 1]")


def choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}: use {', '.join(map(repr, known[:-1]))} or {known[-1]!r}")


def accumulate(value: str, operands: torch.dtype) -> None:
    """How products of a matmul are summed whose operands have this dtype, unless in fp32."""
    choice("accumulate", value, ("fp32", "fp16"))
    if value == "fp16" and operands != torch.float16:
        raise ValueError(f"accumulate is 'fp16', but the operands are {operands}: use float16 ones, or 'fp32'")


def approximate(value: str) -> None:
    """GELU's formula, as in torch.nn.functional.gelu."""
    choice("approximate", value, ("tanh", "none"))
