"""What one optimizer step of a GPT-2 launches, operation by operation: FLOPs, bytes and kernels, for each way to run it.

Four variants of the same mathematics move very different numbers of bytes:

``nanogpt-compile``, ``compile``
    bf16 autocast under torch.compile (nanoGPT's program; this repository's model is the same graph). Inductor fuses each
    chain of pointwise operations with the norm or the loss beside it. Logits exist as a whole, in bf16. Every fp32 weight
    is cast once per micro-batch, every gradient is cast to fp32 and added in passes of its own. What is fused and what
    is saved was read off the code that Inductor writes for this repository's model (docs/projection.md).
``eager``
    bf16 autocast, one pass per pointwise operation and per cast; logits also exist in fp32, log-probabilities and their
    gradients with them. Weights are cast once per micro-batch (autocast keeps the copy).
``triton``
    this repository's kernels: residual add and norm in one pass over an fp32 residual stream, attention on packed qkv,
    loss in chunks, working copies of the weights, weight gradients in fp32 that are added where they lie. Linears are
    cuBLAS. ``fusions`` switches each of these off alone.

FLOPs, and bytes where an operation moves no more than it must, come from fastgpt/flops.py; the bytes of passes that only
some variants make are written here as bytes per element. docs/projection.md explains each. No torch, no GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastgpt import flops
from fastgpt.common import UserError
from fastgpt.flops import Shape
from fastgpt.operation_types import (
    AS_SHIPPED,
    GAPS,
    GROUPS,
    KERNELS,
    LINEARS,
    PASSES,
    PRECISIONS,
    Fusions,
    Operation,
    Sizes,
    cdiv,
    memory,
)
from fastgpt.operations_linear import fp8_group, loss_chunk, matrix_operations

__all__ = [
    "AS_SHIPPED",
    "GAPS",
    "GROUPS",
    "KERNELS",
    "LINEARS",
    "PASSES",
    "PRECISIONS",
    "Fusions",
    "Operation",
    "cdiv",
    "loss_chunk",
    "operations",
]


def operations(
    shape: Shape,
    kernels: str = "triton",
    micro_batch: int = 8,
    T: int | None = None,
    precision: str = "bf16",
    *,
    dropout: float = 0.0,
    sm_count: int = 46,
    fusions: Fusions = AS_SHIPPED,
) -> list[Operation]:
    """Every operation of one optimizer step, in the order of forward, backward, update.

    ``micro_batch`` sequences of ``T`` tokens (default: the block size). ``sm_count`` matters to triton's loss, which cuts its
    chunks to fill the SMs; ``fusions`` say what of triton is on. Raises UserError for a name that is not in KERNELS or
    PRECISIONS, and for sizes below 1.
    """
    T = shape.block_size if T is None else T
    _check(shape, kernels, precision, micro_batch, T)
    s = Sizes(shape, kernels, precision, micro_batch, T, dropout, sm_count, fusions)
    ops = [*_embedding(s), *_norms(s), *_attention(s), *matrix_operations(s)]
    return [op for op in ops if op.count]


def _check(shape: Shape, kernels: str, precision: str, micro_batch: int, T: int) -> None:
    for name, value, known in (("kernels", kernels, KERNELS), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise UserError(f"{name} is {value!r}: it can be {', '.join(known)}")
    for name, number in (("micro_batch", micro_batch), ("T", T)):
        if number < 1:
            raise UserError(f"{name} is {number}: it must be at least 1")
    if T > shape.block_size:
        raise UserError(f"T is {T}: the model's block_size is {shape.block_size}, so give at most that")


# ---------------------------------------------------------------- embedding and norms


def _embedding(s: Sizes) -> list[Operation]:
    """Token and position embedding in fp32, and their gradients."""
    rows, C, V, T = s.rows, s.shape.n_embd, s.shape.vocab_size, s.T
    distinct = min(V, rows)  # at most: text repeats itself, which the L2 would gain from
    forward = flops.embedding_forward(rows, distinct, C, 4).bytes
    if s.fused("embedding"):
        return [memory("embedding forward", "embedding", forward + 4 * T * C, own=True), *_fused_embedding_backward(s)]
    backward = flops.embedding_backward(rows, distinct, C, 4).bytes + 4 * V * C + 4 * rows * C  # zeros first; positions
    mask = 9 * rows * C if s.dropout else 0  # dropout: read and write fp32, write the mask
    if s.compiled:  # gather, add (and dropout) in one kernel
        return [
            memory("embedding forward", "embedding", forward + (rows * C if s.dropout else 0)),
            memory("embedding backward", "embedding", backward + (rows * C if s.dropout else 0), 3),
        ]
    return [
        memory("embedding forward", "embedding", forward + 8 * rows * C + mask, 4 if s.dropout else 3),
        memory("embedding backward", "embedding", backward + mask, 6 if s.dropout else 5),
        # The table is the head too: autograd adds the two gradients.
        memory("tied gradients added", "embedding", 12 * V * C),
    ]


SORT_LAUNCHES = 4
"""Assumed: kernels of PyTorch's sort of the token ids."""


def _fused_embedding_backward(s: Sizes) -> list[Operation]:
    """The sort of the ids, the sums over equal ones and those over sequences. In a micro-batch that finds gradients in place
    only rows that occur are read and written; one that does not makes a dense gradient, which autograd adds to the head's."""
    rows, C, V, T = s.rows, s.shape.n_embd, s.shape.vocab_size, s.T
    distinct, positions, once = min(V, rows), s.shape.block_size, 12 * rows * 2
    added = 8 * rows * C + 8 * distinct * C + 8 * T * C + once
    dense = 8 * rows * C + 4 * distinct * C + 4 * T * C + 4 * (V + positions) * C + once
    launches = SORT_LAUNCHES + 3
    when: dict[str, Any] = {"own": True, "fresh": 4 * rows * C}
    if not s.fused("in_place"):
        return [
            memory("embedding backward", "embedding", dense, launches + 2, **when),
            memory("tied gradients added", "embedding", 12 * V * C),
        ]
    return [
        memory("embedding backward", "embedding", dense, launches + 2, per="step", **when),
        memory("tied gradients added", "embedding", 12 * V * C, per="step"),
        memory("embedding backward", "embedding", added, launches, per="accumulation", **when),
    ]


def _norms(s: Sizes) -> list[Operation]:
    """2L norms behind a residual add, and the first. Bytes per element: the residual stream is fp32, branches 16 bits."""
    n, elements = 2 * s.shape.n_layer, s.rows * s.shape.n_embd

    def op(name: str, group: str, per_element: int, launches: int = 1, count: int = n, fresh: int = 0) -> Operation:
        own = s.fused("norms") and group != "pointwise"
        return memory(name, group, per_element * elements, launches, count=count, fresh=fresh * elements, own=own)

    forward, backward, apart = "norms forward", "norms backward", "pointwise"
    mask = 1 if s.dropout else 0  # a byte per element, kept from forward for backward
    first = [
        op("first norm forward", forward, 4 + 2, count=1),
        op("first norm backward", backward, 2 + 4 + 4, 2, count=1),
        op("first norm, gradients added", apart, 12, count=1),
    ]
    if s.fused("norms"):  # Philox again in backward: no mask
        return [
            *first,
            # Reads branch 2 and residual 4, writes sum 4 and norm 2, with fp8 also that in 1.
            op("norm forward", forward, 12 + s.own_fp8, fresh=2),
            # Reads dy 2, sum 4, the sum's gradient 4; writes the branch's gradient 2 (with fp8 also in 1), the residual's 4.
            op("norm backward", backward, 16 + s.own_fp8, 2, fresh=2),
        ]
    if s.compiled:
        return [
            *first,
            # Reads the last sum 4 and the branches since, 2 each (1 to 4 of them: a sum is written every fourth time, 1 on
            # average); writes the normed 4, kept for backward, and its cast 2.
            op("norm forward", forward, 4 + 5 + 1 + 4 + 2 + mask, fresh=2),
            # Reads dy 2, the normed 4, the sum's gradient 4; writes that 4, and its cast 2 for the branch.
            op("norm backward", backward, 16 + mask, fresh=2),
            # A reduction over rows is a kernel of its own, in two stages: reads dy 2 and the normed 4 again.
            op("norm weight gradient", backward, 6, 2),
        ]
    passes = [
        *first,
        op("residual add", apart, 2 + 4 + 4, fresh=2),
        op("norm forward", forward, 4 + 4, fresh=4),
        op("norm cast", apart, 4 + 2, fresh=4),
        op("norm gradient cast", apart, 2 + 4, fresh=2),
        op("norm backward", backward, 4 + 4 + 4, fresh=4),
        op("norm weight gradient", backward, 8),
        op("residual gradient add", apart, 12, fresh=4),
        op("branch gradient cast", apart, 4 + 2, fresh=4),
    ]
    if s.dropout:
        passes += [op("dropout", apart, 2 + 2 + 1, fresh=2), op("dropout backward", apart, 2 + 1 + 2, fresh=2)]
    return passes


# ---------------------------------------------------------------- attention

SOFTMAX_INSTRUCTIONS = 8  # per score, beside the exponential: scale and subtract, maximum, sum, masks, half a convert
DROPOUT_INSTRUCTIONS = 10  # per score: its share of a Philox call, compare, select


def _attention(s: Sizes) -> list[Operation]:
    B, T, H, L, C = s.B, s.T, s.shape.n_head, s.shape.n_layer, s.shape.n_embd
    rows, D = s.rows, _padded_head(C // H, power_of_two=s.fused("attention"))
    instructions = SOFTMAX_INSTRUCTIONS + (DROPOUT_INSTRUCTIONS if s.dropout else 0)

    def op(name: str, group: str, work: flops.Work, moved: int, tile: int, launches: int = 1) -> Operation:
        scores = round(B * H * T * flops.attended_keys(T, tile=min(tile, T)))
        rest: dict[str, Any] = {"count": L, "scores": scores, "instructions": instructions, "own": s.fused("attention")}
        return Operation(name, group, "attention", work.flops, moved, launches, **rest)

    forward = flops.attention_forward(B, T, H, D, s.e, tile=min(128, T))
    least = flops.attention_forward(B, T, H, C // H, s.e).bytes  # padding is in registers, not in memory
    columns = fp8_group(s)
    extra = rows * (C + 4 * C // columns) if columns else 0  # a byte beside 16 bits, and an fp32 scale for a group
    found = [op("attention forward", "attention forward", forward, least + extra, 128)]
    group, vector, log_sums = "attention backward", s.e * rows * C, 4 * rows * H
    if s.fused("attention"):
        # Two kernels, each with scores and dP of its own; each reads q, k, v, dO, the first also O; writes dq or dk, dv.
        query = flops.attention_backward(B, T, H, D, s.e, tile=min(128, T), matmuls=3)
        key = flops.attention_backward(B, T, H, D, s.e, tile=min(64, T), matmuls=4)
        # For c_attn's bias each program also writes the sums of its rows, which are then added up.
        bias = int(s.shape.bias)
        q_sums, kv_sums = (bias * 8 * C * cdiv(rows, tile) for tile in (128, 64))
        moved = 6 * vector + 2 * log_sums
        found += [
            op("attention backward dQ", group, query, moved + extra + q_sums, 128, 1 + bias),
            op("attention backward dK dV", group, key, moved + 2 * (extra + kv_sums), 64, 1 + 2 * bias),
        ]
        if s.precision == "fp16-fast":  # all products but S, and dP's only up to 64 columns
            shares = (1 / 2, 2 / 3, 3 / 4) if D <= 64 else (1 / 2, 1 / 3, 2 / 4)
            found = [replace(each, summed_in_fp16=share) for each, share in zip(found, shares)]
        return found
    # FlashAttention-2: delta, and zeros into an fp32 dQ; the loop, which adds to that dQ; dQ rounded to 16 bits.
    loop = flops.attention_backward(B, T, H, D, s.e, tile=min(128, T))
    return [
        *found,
        memory("attention backward, delta", group, 2 * vector + log_sums + 4 * rows * C, count=L, fresh=vector),
        op("attention backward", group, loop, 6 * vector + 2 * log_sums + 8 * rows * C, 128),
        memory("attention backward, dQ cast", group, 4 * rows * C + vector, count=L, fresh=4 * rows * C),
        # q, k and v are views of one projection: their gradients are copied together.
        memory("attention backward, dQ dK dV packed", group, 6 * vector, count=L, fresh=3 * vector),
    ]


def _padded_head(D: int, *, power_of_two: bool) -> int:
    """The head dimension that a kernel computes with: triton's next power of two, FlashAttention-2's next 32."""
    return max(16, 1 << (D - 1).bit_length()) if power_of_two else 32 * cdiv(D, 32)
