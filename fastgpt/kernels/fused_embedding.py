"""The residual stream's first value: token row + position row, with its dropout, in one pass; and the two gradients. Without
positions: the rows of a table.

    x[b, t]  = dropout(wte[idx[b, t]] + wpe[position + t])     fp32 sums, rounded once, to out_dtype

Backward, with g = dx * keep / (1 - p):

    dwpe[position + t] = sum over b of g[b, t]                  in the order of b
    dwte[v]            = sum over the tokens with idx = v of g  in the order of the tokens; other rows 0

Saved for backward: ids in 32 bits (-1 for one outside the table), the seed.

**dwte without atomics.** The ids are sorted once (stable), so that equal ones are neighbours: a run. The sorted tokens are cut
into pieces of ``piece``; a program walks its piece and adds up run by run. A run that lies within a piece is written
to its row at once. A longer one leaves a partial sum in each piece that it touches, and a second kernel adds those up: 8192
times the same token are 512 programs and one sum over 512 rows, not one program. Every sum has one order, so repeat
runs are bit-equal. Sorting, as PyTorch's embedding_dense_backward does it, keeps the host out of it; llm.c's encoder_backward
forms the runs on the CPU instead.

**In place.** The embedding is tied to the LM head, so autograd gets two dense (V, C) gradients of one parameter and adds
them, of which the embedding's has at most N rows that are not 0. Within ``working_copy.gradients_in_place`` the rows that
occur are added to ``wte.grad`` where there is one. Autograd runs AccumulateGrad of a parameter once, after the backward of
its last use, with the sum of what the uses returned; a use that returns nothing adds nothing to it. So at this point
``wte.grad`` holds the earlier micro-batches, with or without the head's share of this one, and either is right: what is
missing comes later, by an addition. In a step's first micro-batch there is no ``.grad`` yet, and the gradient is dense.

Bytes, N tokens of which D differ, in MB at GPT-2 124M 8 x 1024 | 40M 16 x 1024, for D = N, the most there can be (4NC is 25.2 |
25.2, 4VC 154.5 | 77.3, 4TC 3.1 | 1.6). Counted, not measured:

    forward   PyTorch   gathers 4DC + 4NC and 8TC, sum 8NC + 4TC                            110.1 | 105.4
              here      4DC + 4TC + 4NC                                                      53.5 |  51.9
    dropout   PyTorch   9NC in each direction: fp32 in, fp32 out, a mask of bytes           113.2 | 113.2
              here      none: the mask is formed again from the seed                          0 |     0
    backward  PyTorch   wte: zeros 4VC, dx 4NC, rows 8DC; wpe: dx 4NC, then 20TC; the sum
                        with the head's gradient 12VC                                       734.5 | 417.6
              here      dense: the same, but rows 4DC, then 8TC                             699.9 | 387.7
              in place  dx 8NC (the second 4NC from L2, as far as it holds them), rows
                        8DC, 8TC                                                            106.9 | 103.8

Beside these, the sort of N ids (some passes over 12N bytes), and partial sums: up to 8NC / piece, written and read.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import arguments, reference, runtime, working_copy
from fastgpt.kernels.operators import operator
from fastgpt.kernels.philox import dropout


class EmbeddingLaunch(NamedTuple):
    """Launch geometry: tiles of ``rows`` x ``block`` elements; ``piece`` sorted tokens are walked one after another, and
    ``pieces`` of them by one program."""

    rows: int
    block: int
    piece: int = 16
    pieces: int = 1


@lru_cache
def config(C: int) -> EmbeddingLaunch:
    """Geometry for rows of C elements, safe on any card. Blocks of 256 or 128 columns, 1 KB or half of it at a time: at most
    127 lanes idle, none at C = 384, 768, 1024. Nothing here depends on the number of tokens: a new batch size compiles
    nothing."""
    if runtime.INTERPRET:  # the cost there is per program and operation, hardly per element
        return EmbeddingLaunch(64, max(16, runtime.next_power_of_2(C)), pieces=64)
    block = min(max(runtime.next_power_of_2(C), 16), 128 if C % 256 else 256)
    return EmbeddingLaunch(1024 // block, block)


# ---------------------------------------------------------------- kernels
# Tokens are numbered n = b T + t. A program owns BLOCK columns of some tokens: program id 1 says which columns.


@triton.jit(do_not_specialize=["n_tokens", "T", "V", "position", "idx_stride_b", "idx_stride_t"])
def embedding_forward_kernel(
    IDX, WTE, WPE, SEED, OUT, IDS,
    n_tokens, T, V, position, idx_stride_b, idx_stride_t, wte_stride, wpe_stride, dropout_p,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS tokens. IDS gets the ids in 32 bits, -1 for one outside [0, V), whose row of OUT is NaN and which reads no row
    of the table. SEED and WPE may be None."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists, inside = row < n_tokens, (cols < C)[None, :]
    b, t = (row // T).to(tl.int64), (row % T).to(tl.int64)
    idx = tl.load(IDX + b * idx_stride_b + t * idx_stride_t, mask=exists, other=-1).to(tl.int64)
    # An id outside the table never becomes an address: the host does not look, as asking a GPU would make it wait.
    known = exists & (idx >= 0) & (idx < V)
    token = WTE + tl.where(known, idx, 0)[:, None] * wte_stride + cols[None, :]
    x = tl.load(token, mask=known[:, None] & inside, other=float("nan")).to(tl.float32)
    mask = exists[:, None] & inside
    if WPE is not None:
        x += tl.load(WPE + (position + t)[:, None] * wpe_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if SEED is not None:
        x = dropout(x, SEED, row, tl.program_id(1) * BLOCK, dropout_p, ROWS, BLOCK)
    tl.store(OUT + row.to(tl.int64)[:, None] * C + cols[None, :], x.to(OUT.dtype.element_ty), mask=mask)
    # The programs that share these tokens would all write the same ids: one does.
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
    for b in range(0, B):  # one order of the sum whatever the grid: repeat runs are bit-equal
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
    # -2 stands for "no token": an id of its own, unlike -1, a token outside the table.
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
        total = tl.where((id == last)[:, None], total, 0.0) + dx  # a new run starts from 0
        last = id

        # A run ends here if the next token has another id. It is whole if it also began here: then its row is written once,
        # by this program alone.
        ends = tl.load(IDS + at + 1, mask=at + 1 < n_tokens, other=-2) != id
        whole = exists & ends & (id != before) & (id >= 0)
        out = GRAD + id.to(tl.int64)[:, None] * grad_stride + cols[None, :]
        result = total
        if ADD:
            result += tl.load(out, mask=whole[:, None] & inside, other=0.0).to(tl.float32)
        tl.store(out, result.to(GRAD.dtype.element_ty), mask=whole[:, None] & inside)
        # Else the part of it in this piece: at its end, or at the end of the piece.
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
    # Only the piece in which a long run begins adds it up, and only if it begins there: id != before.
    goes_on = (tl.load(IDS + end, mask=end < n_tokens, other=-2) == id) & (id >= 0) & (id != before)
    if goes_on:
        cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = (cols < C)[None, :]
        lanes = tl.arange(0, ROWS)
        # Lane 0 starts with what the first piece holds (its row 1); all lanes then add row 0 of the pieces that follow.
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


# ---------------------------------------------------------------- launcher of the gradients


def _launch_grads(
    wte_grad: Tensor | None, wpe_grad: Tensor | None, dx: Tensor, ids: Tensor, seed: Tensor | None, dropout_p: float,
    position: int, *, add: bool,
) -> None:  # fmt: skip
    """Fill both gradients, or add to them, where not None. They have adjacent columns. dx (..., T, C), ids (N,)."""
    if dx.numel() == 0:
        return
    T = dx.shape[-2]
    arguments.alike("dx's rows", (dx.numel() // dx.shape[-1],), ids=ids)
    for name, grad in (("wte_grad", wte_grad), ("wpe_grad", wpe_grad)):
        if grad is not None and (grad.shape[1] != dx.shape[-1] or grad.stride(1) != 1):
            raise ValueError(
                f"{name} is {tuple(grad.shape)}: dx of {tuple(dx.shape)} needs rows as long, of adjacent columns"
            )
    dx = runtime.columns_adjacent(dx.reshape(-1, dx.shape[-1]))
    (N, C), cfg = dx.shape, config(dx.shape[1])
    column_blocks = -(-C // cfg.block)
    if wpe_grad is not None:
        position_grad_kernel[(-(-T // cfg.rows), column_blocks)](
            dx, seed, wpe_grad, N // T, T, position, dx.stride(0), wpe_grad.stride(0), dropout_p,
            C=C, ADD=add, ROWS=cfg.rows, BLOCK=cfg.block, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    if wte_grad is not None:
        ids, order = ids.sort(stable=True)
        pieces = -(-N // cfg.piece)
        partial = torch.empty(2 * pieces, C, dtype=torch.float32, device=dx.device)
        token_grad_kernel[(-(-pieces // cfg.pieces), column_blocks)](
            dx, seed, ids, order, wte_grad, partial, N, dx.stride(0), wte_grad.stride(0), dropout_p,
            C=C, ADD=add, PIECE=cfg.piece, PIECES=cfg.pieces, BLOCK=cfg.block, num_warps=max(1, cfg.block // 128),
            enable_fp_fusion=True,
        )  # fmt: skip
        if pieces > 1:  # a run may have gone on from one to the next
            long_runs_kernel[(pieces - 1, column_blocks)](
                ids, wte_grad, partial, N, wte_grad.stride(0),
                C=C, ADD=add, PIECE=cfg.piece, ROWS=16, BLOCK=cfg.block, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip


def _check_ids(idx: Tensor, V: int) -> None:
    """Raise ValueError for an id that has no row. Only on a CPU: asking a GPU would make the host wait for it."""
    if idx.device.type == "cpu" and idx.numel():
        for value in (int(idx.min()), int(idx.max())):
            if not 0 <= value < V:
                raise ValueError(f"idx holds {value}: wte has the rows 0 to {V - 1}")


def _check_position(position: int, T: int, wpe: Tensor) -> None:
    if position < 0 or position + T > wpe.shape[0]:
        raise ValueError(f"position is {position} for sequences of {T} tokens: wpe has {wpe.shape[0]} positions")


# ---------------------------------------------------------------- ops


@operator("embedding_fwd")
def _forward(
    idx: Tensor, wte: Tensor, wpe: Tensor | None, seed: Tensor | None, dropout_p: float, position: int,
    out_dtype: torch.dtype, in_place: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x (..., T, C), and the ids (N,) in 32 bits, -1 for one outside the table."""
    x, ids = outputs = _new_outputs(idx, wte, out_dtype)
    if x.numel() == 0:
        return outputs
    (V, C), T = wte.shape, idx.shape[-1]
    if wpe is not None:
        arguments.alike("wte", (wpe.shape[0], C), wpe=wpe)
        _check_position(position, T, wpe)
        wpe = runtime.columns_adjacent(wpe)
    _check_ids(idx, V)
    rows, cfg, wte = idx.reshape(-1, idx.shape[-1]), config(C), runtime.columns_adjacent(wte)
    embedding_forward_kernel[(-(-rows.numel() // cfg.rows), -(-C // cfg.block))](
        rows, wte, wpe, seed, x, ids, rows.numel(), rows.shape[1], V, position, *rows.stride(),
        wte.stride(0), 0 if wpe is None else wpe.stride(0), dropout_p,
        C=C, ROWS=cfg.rows, BLOCK=cfg.block, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return outputs


def _new_outputs(idx: Tensor, wte: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = wte.new_empty(*idx.shape, wte.shape[1], dtype=out_dtype)
    return x, idx.new_empty(math.prod(idx.shape), dtype=torch.int32)


@_forward.register_fake
def _(idx, wte, wpe, seed, dropout_p, position, out_dtype, in_place):
    return _new_outputs(idx, wte, out_dtype)


@operator("embedding_bwd")
def _bwd(
    dx: Tensor, ids: Tensor, seed: Tensor | None, dropout_p: float, position: int, V: int, P: int,
    wte_dtype: torch.dtype | None, wpe_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dwte (V, C) and dwpe (P, C), dense; empty without a dtype."""
    dwte, dwpe = grads = _zero_gradients(dx, V, P, wte_dtype, wpe_dtype)
    wanted = dwte if wte_dtype else None, dwpe if wpe_dtype else None
    _launch_grads(*wanted, dx, ids, seed, dropout_p, position, add=False)
    return grads


def _zero_gradients(
    dx: Tensor, V: int, P: int, wte_dtype: torch.dtype | None, wpe_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    C = dx.shape[-1]
    dwte = dx.new_zeros((V, C) if wte_dtype else 0, dtype=wte_dtype)
    return dwte, dx.new_zeros((P, C) if wpe_dtype else 0, dtype=wpe_dtype)


@_bwd.register_fake
def _(dx, ids, seed, dropout_p, position, *tables):
    return _zero_gradients(dx, *tables)


@operator("embedding_bwd_add", mutates_args=("wte_grad", "wpe_grad"))
def _bwd_add(
    wte_grad: Tensor | None, wpe_grad: Tensor | None, dx: Tensor, ids: Tensor, seed: Tensor | None, dropout_p: float,
    position: int,
) -> None:  # fmt: skip
    """wte_grad += dwte, wpe_grad += dwpe, where not None: no other row than those that occur is read or written."""
    _launch_grads(wte_grad, wpe_grad, dx, ids, seed, dropout_p, position, add=True)


# ---------------------------------------------------------------- autograd


def _setup_context(ctx, inputs, output):
    _, wte, wpe, seed, ctx.dropout_p, ctx.position, _, ctx.in_place = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.shapes = wte.shape[0], 0 if wpe is None else wpe.shape[0]
    ctx.dtypes = wte.dtype, None if wpe is None else wpe.dtype
    # The tables only for their ``.grad``: else they may be written before backward, as torch's embedding allows.
    ctx.save_for_backward(output[1], seed, *((wte, wpe) if ctx.in_place else ()))


def _takes_sums(table: Tensor | None) -> bool:
    """Whether the kernels can add to this table's ``.grad``."""
    grad = None if table is None else table.grad
    if table is None or grad is None or grad.layout != torch.strided:
        return False
    return grad.dtype == torch.float32 and grad.shape == table.shape and grad.stride(1) == 1


def _backward(ctx, dx, _):
    if dx is None:
        return (None,) * 8
    ids, seed, *tables = ctx.saved_tensors
    wants, rest = list(ctx.needs_input_grad[1:3]), (dx, ids, seed, ctx.dropout_p, ctx.position)
    if tables and not torch.is_grad_enabled():
        adds = [want and _takes_sums(table) for want, table in zip(wants, tables)]
        if any(adds):
            _bwd_add(*(table.grad if add else None for table, add in zip(tables, adds)), *rest)
        wants = [want and not add for want, add in zip(wants, adds)]
    if not any(wants):
        return (None,) * 8
    dtypes = (dtype if want else None for dtype, want in zip(ctx.dtypes, wants))
    dwte, dwpe = _bwd(*rest, *ctx.shapes, *dtypes)
    return None, dwte if wants[0] else None, dwpe if wants[1] else None, *[None] * 5


_forward.register_autograd(_backward, setup_context=_setup_context)


# ---------------------------------------------------------------- public


def embedding(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor | None = None,
    *,
    position: int = 0,
    dropout_p: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """dropout(wte[idx] + wpe[position : position + T]), (..., T, C) in ``out_dtype`` (default: wte's). Without wpe, whose rows
    then are not added, ``position`` does not count.

    idx (..., T) int64 or int32, of any rank from 1 and any strides; wte (V, C) and wpe (P, C), each fp32, fp16 or bf16, read
    in place if neighbouring columns are adjacent. ``position``: where the sequences start, as in sampling from a cache.
    Autocast changes nothing. Gradients have their table's dtype and are dense; inside ``working_copy.gradients_in_place``, as
    in fastgpt's own training, they are added to ``.grad``. ``dropout_p`` > 0 draws a seed from torch's generator.

    Raises ValueError for arguments that do not fit, on a CPU also for ids that have no row; on a GPU, which is not asked, the
    output of such a token is NaN and it adds to no gradient. CPU tensors outside Triton's interpreter are computed by
    ``reference.embedding``.

    >>> idx, wte, wpe = torch.tensor([[1, 4, 4]]), torch.randn(50, 32), torch.randn(16, 32)
    >>> torch.equal(embedding(idx, wte, wpe, position=5), wte[idx] + wpe[5:8])
    True
    """
    _validate(idx, wte, wpe, position, dropout_p, out_dtype)
    if not runtime.runs_in_triton(wte):
        return reference.embedding(idx, wte, wpe, position=position, dropout_p=dropout_p, out_dtype=out_dtype)
    seed = runtime.draw_seed(wte.device) if dropout_p > 0 else None
    in_place = working_copy.adds_to(wte) and (wpe is None or working_copy.adds_to(wpe))
    return _forward(idx, wte, wpe, seed, dropout_p, position, out_dtype or wte.dtype, in_place)[0]


def _validate(
    idx: Tensor, wte: Tensor, wpe: Tensor | None, position: int, dropout_p: float, out_dtype: torch.dtype | None
) -> None:
    if wpe is None:
        if wte.dim() != 2:
            raise ValueError(f"wte is {tuple(wte.shape)}: it has to be (V, C)")
    elif wte.dim() != 2 or wpe.dim() != 2 or wte.shape[1] != wpe.shape[1]:
        raise ValueError(f"wte is {tuple(wte.shape)} and wpe {tuple(wpe.shape)}: they have to be (V, C) and (P, C)")
    arguments.indices("idx", idx, "wte", wte)
    if idx.dim() == 0:
        raise ValueError("idx is (): it has to be (..., T)")
    if wpe is not None:
        _check_position(position, idx.shape[-1], wpe)
    arguments.probability("dropout_p", dropout_p)
    arguments.dtype("out_dtype", out_dtype)
    arguments.tensors("wte", wte.shape, ("wte", wte, None), ("wpe", wpe, None))
