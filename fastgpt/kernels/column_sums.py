"""Sums of a tensor's columns that a kernel forms beside its result: gradients of biases, and of the norms' weights.

Each program adds up the rows that it has in registers and writes the sums, 4 bytes per column of a tile, to its own row of a
buffer (``partial``). A second kernel (``add_up``) adds up these rows in a fixed order. No atomics: repeat runs are bit-equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["rows"])
def add_up_kernel(PARTIALS, OUTS, rows, C, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Program i: columns [i BLOCK, (i + 1) BLOCK) of each of OUTS (C,) = the sums over the rows of each of PARTIALS (rows, C),
    fp32 and contiguous."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for i in tl.static_range(len(OUTS)):
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        # One program per block of columns walks all rows: the order of the sum depends on nothing but their number.
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
    partials, outs = [], []
    for partial, out in pairs:
        if partial is not None and out is not None:
            partials.append(partial)
            outs.append(out)
    if outs:
        rows, C = partials[0].shape
        add_up_kernel[(-(-C // 32),)](
            tuple(partials), tuple(outs), rows, C, ROWS=64, BLOCK=32, num_warps=4, enable_fp_fusion=True
        )
