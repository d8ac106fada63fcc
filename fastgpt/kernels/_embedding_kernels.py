"""The @triton.jit functions of fused_embedding.py: the sum of two rows, and the gradients of the two tables.

Tokens are numbered n = b T + t. A program owns BLOCK columns: program id 1 says which.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgpt.kernels._layernorm_kernels import dropout


@triton.jit(do_not_specialize=["n_tokens", "T", "V", "position", "idx_stride_b", "idx_stride_t"])
def embedding_forward_kernel(
    IDX, WTE, WPE, SEED, OUT, IDS,
    n_tokens, T, V, position, idx_stride_b, idx_stride_t, wte_stride, wpe_stride, dropout_p,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS tokens. IDS gets the ids in 32 bits, -1 for one outside [0, V), whose row of OUT is NaN and which reads no row
    of the table. SEED may be None."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists, inside = row < n_tokens, (cols < C)[None, :]
    b, t = (row // T).to(tl.int64), (row % T).to(tl.int64)
    idx = tl.load(IDX + b * idx_stride_b + t * idx_stride_t, mask=exists, other=-1).to(tl.int64)
    known = exists & (idx >= 0) & (idx < V)
    token = WTE + tl.where(known, idx, 0)[:, None] * wte_stride + cols[None, :]
    x = tl.load(token, mask=known[:, None] & inside, other=float("nan")).to(tl.float32)
    mask = exists[:, None] & inside
    x += tl.load(WPE + (position + t)[:, None] * wpe_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if SEED is not None:
        x = dropout(x, SEED, row, tl.program_id(1) * BLOCK, dropout_p, ROWS, BLOCK)
    tl.store(OUT + row.to(tl.int64)[:, None] * C + cols[None, :], x.to(OUT.dtype.element_ty), mask=mask)
    tl.store(IDS + row, tl.where(known, idx, -1).to(tl.int32), mask=exists & (tl.program_id(1) == 0))


@triton.jit(do_not_specialize=["B", "T", "position"])
def position_grad_kernel(
    DX, SEED, GRAD, B, T, position, dx_stride, grad_stride, dropout_p,
    C: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS positions: GRAD[position + t] = (with ADD: +=) the sum of dx[b, t] over b = 0, 1, ... SEED may be None."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (t < T)[:, None] & (cols < C)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for b in range(0, B):
        row = t + b * T
        dx = tl.load(DX + row[:, None] * dx_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if SEED is not None:
            dx = dropout(dx, SEED, row, tl.program_id(1) * BLOCK, dropout_p, ROWS, BLOCK)
        total += dx
    out = GRAD + (position + t)[:, None] * grad_stride + cols[None, :]
    if ADD:
        total += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, total.to(GRAD.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_tokens"])
def token_grad_kernel(
    DX, SEED, IDS, ORDER, GRAD, PARTIAL, n_tokens, dx_stride, grad_stride, dropout_p,
    C: tl.constexpr, ADD: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """PIECES pieces of PIECE neighbours in the sorted order, each walked from its first token to its last.

    IDS: the ids, sorted; ORDER: the token that each belongs to. A run of equal ids within one piece ends in GRAD[id]
    (with ADD: is added to it). The part of a longer run goes to PARTIAL, two rows per piece: row 0 if the run began
    before the piece, row 1 if it begins in it. Ids below 0 have no row of GRAD. SEED may be None.
    """
    piece = tl.program_id(0).to(tl.int64) * PIECES + tl.arange(0, PIECES)
    first_col = tl.program_id(1) * BLOCK
    cols = first_col + tl.arange(0, BLOCK)
    inside = (cols < C)[None, :]
    # -2 stands for "no token": an id of its own.
    before = tl.load(IDS + piece * PIECE - 1, mask=(piece > 0) & (piece * PIECE < n_tokens), other=-2)
    total = tl.zeros((PIECES, BLOCK), tl.float32)
    last = tl.full((PIECES,), -2, tl.int32)
    for step in range(PIECE):
        at = piece * PIECE + step
        exists = at < n_tokens
        id = tl.load(IDS + at, mask=exists, other=-2)
        row = tl.load(ORDER + at, mask=exists, other=0)
        dx = tl.load(DX + row[:, None] * dx_stride + cols[None, :], mask=exists[:, None] & inside, other=0.0)
        dx = dx.to(tl.float32)
        if SEED is not None:
            dx = dropout(dx, SEED, row, first_col, dropout_p, PIECES, BLOCK)
        total = tl.where((id == last)[:, None], total, 0.0) + dx
        last = id

        ends = tl.load(IDS + at + 1, mask=at + 1 < n_tokens, other=-2) != id
        whole = exists & ends & (id != before) & (id >= 0)
        out = GRAD + id.to(tl.int64)[:, None] * grad_stride + cols[None, :]
        result = total
        if ADD:
            result += tl.load(out, mask=whole[:, None] & inside, other=0.0).to(tl.float32)
        tl.store(out, result.to(GRAD.dtype.element_ty), mask=whole[:, None] & inside)
        begins = id != before
        part = exists & (ends | (step == PIECE - 1)) & ((ends == 0) | (begins == 0))
        slot = 2 * piece + tl.where(begins, 1, 0)
        tl.store(PARTIAL + slot[:, None] * C + cols[None, :], total, mask=part[:, None] & inside)


@triton.jit(do_not_specialize=["n_tokens"])
def long_runs_kernel(
    IDS, GRAD, PARTIAL, n_tokens, grad_stride,
    C: tl.constexpr, ADD: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The run that begins in one piece and goes on in the next: its partial sums are added up, ROWS at a time, and end in
    GRAD[id]. A program per piece; most have no such run, and end at once."""
    piece = tl.program_id(0).to(tl.int64)
    end = (piece + 1) * PIECE  # the first token of the next piece
    id = tl.load(IDS + end - 1, mask=end < n_tokens, other=-2)
    before = tl.load(IDS + piece * PIECE - 1, mask=piece > 0, other=-2)
    goes_on = (tl.load(IDS + end, mask=end < n_tokens, other=-2) == id) & (id >= 0) & (id != before)
    if goes_on:
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = (cols < C)[None, :]
        lanes = tl.arange(0, ROWS)
        first = PARTIAL + (2 * piece + 1) * C + cols[None, :] + tl.zeros((ROWS, 1), tl.int32)
        total = tl.load(first, mask=(lanes == 0)[:, None] & inside, other=0.0)
        ahead = piece + 1 + lanes
        more = goes_on
        while more:
            at = ahead * PIECE
            same = tl.load(IDS + at, mask=at < n_tokens, other=-2) == id
            total += tl.load(PARTIAL + (2 * ahead)[:, None] * C + cols[None, :], mask=same[:, None] & inside, other=0.0)
            ahead += ROWS
            more = tl.min(same.to(tl.int32), axis=0) == 1
        sums = tl.sum(total, axis=0)
        out = GRAD + id.to(tl.int64) * grad_stride + cols
        if ADD:
            sums += tl.load(out, mask=cols < C, other=0.0).to(tl.float32)
        tl.store(out, sums.to(GRAD.dtype.element_ty), mask=cols < C)
