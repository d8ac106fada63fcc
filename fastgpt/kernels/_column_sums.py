"""Sums of a tensor's columns: gradients of biases, and of the norms' weights.

The gradient of a bias is the sum of the rows of dy. Whoever makes dy, the backward pass of the norm or of the attention that
read y, has its rows in registers: a program adds up its own, 4 bytes per column of a tile, and a second kernel (``add_up``;
attention's, whose programs have one head each, torch.sum) adds up the programs' sums in a fixed order. No pass reads dy for it,
nothing is atomic.

dy's maker has to know that somebody will want them, and the linear layer has to find them. Both are notes (_notes.py): forward,
``expect`` marks y, which the op that reads it learns by ``expected``; backward, it gives dy its sums by ``give``, which the
linear layer has by ``take``. There are none under torch.compile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels._notes import Notes


@triton.jit(do_not_specialize=["rows"])
def add_up_kernel(PARTIALS, OUTS, rows, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Program i: columns [i BLOCK, (i + 1) BLOCK) of each of OUTS (C,) = the sums over the rows of each of PARTIALS (rows, C),
    fp32 and contiguous."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(OUTS)):
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, rows, ROWS):
            row = first + tl.arange(0, ROWS)
            mask = (row < rows)[:, None] & (cols < C)[None, :]
            total += tl.load(PARTIALS[i] + row.to(tl.int64)[:, None] * C + cols[None, :], mask=mask, other=0.0)
        tl.store(OUTS[i] + cols, tl.sum(total, axis=0).to(OUTS[i].dtype.element_ty), mask=cols < C)


def partial(rows: int, out: Tensor | None) -> Tensor | None:
    """Unwritten sums (rows, C) of so many rows of tiles, to be added up in ``out`` (C,). None if that is None."""
    return None if out is None else torch.empty((rows, len(out)), dtype=torch.float32, device=out.device)


def add_up(*pairs: tuple[Tensor | None, Tensor | None]) -> None:
    """For pairs of a ``partial`` and its ``out``, all of one size, or of None: out = partial summed over its rows."""
    partials = tuple(partial for partial, _ in pairs if partial is not None)
    outs = tuple(out for _, out in pairs if out is not None)
    if outs:
        rows, C = partials[0].shape
        add_up_kernel[(triton.cdiv(C, 32),)](partials, outs, rows, C, ROWS=64, BLOCK=32, num_warps=4)


_expected: Notes[bool] = Notes()
_sums: Notes[Tensor] = Notes()


def expect(y: Tensor, bias: Tensor | None) -> None:
    """``y`` ends in ``bias``: whoever makes y's gradient is asked to sum it over its rows, if the bias wants a gradient."""
    if bias is not None and bias.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _expected.give(y, True)


def expected(x: Tensor) -> bool:
    """Whether sums of the gradient of ``x`` are wanted."""
    return not torch.compiler.is_compiling() and _expected.take(x) is not None


def give(gradient: Tensor, sums: Tensor) -> None:
    """Note the sums (C,) of ``gradient`` (..., C) over all its rows."""
    _sums.give(gradient, sums)


def take(gradient: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """The sums noted for ``gradient``, in ``dtype``; None if nobody has made them, or wants them: without ``dtype``."""
    if dtype is None or torch.compiler.is_compiling():
        return None
    sums = _sums.take(gradient)
    return None if sums is None else sums.to(dtype)
