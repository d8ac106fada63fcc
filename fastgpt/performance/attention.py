"""Attention's operations in a training step, and what its kernels execute per score.

FlashAttention-2's counts are by its source, those of this repository's kernels by what the compiler made of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastgpt.performance import flops
from fastgpt.performance.flops import cdiv
from fastgpt.performance.operation import Operation, PerScore, Scores, StepSizes, sweep

FLASH_ATTENTION_2 = {"forward": PerScore(128, 8, 10, 2.25, 0.17), "backward": PerScore(128, 8, 10, 2.25, 0.41, 16)}
"""By its source. Instructions: scale and subtract, maximum, sum, half a convert, its share of loads and addresses. Masked
(mask.h): a compare and a select, and the column's number, which 4 rows share. Bytes: P and dS, written once and read for each
product of backward; the other operands that each warp reads for a tile of 128 x 128 (4 warps forward, 8 backward); loads."""
OWN = {
    "forward": PerScore(128, 9.8, 25, 7.4, 0.35, exponentials=1.13),
    "dQ": PerScore(128, 7.8, 20, 5.9, 0.54),
    "dK dV": PerScore(64, 14.8, 28, 5.9, 0.77),
}
"""This repository's kernels with the tiles that they launch on an RTX 4070 for 64 columns, 98,304 rows, as compiled
(bench.compiler.ranking.loops; the tables' ``tile_clocks`` come from the same count)."""
OWN_DOCUMENTS = {
    "forward": PerScore(64, 42, 25, 0, 0.55, exponentials=1.5),
    "dQ": PerScore(128, 25, 23, 0, 0.56),
    "dK dV": PerScore(32, 66, 34, 0, 1.91, exponentials=2, products=1.5),
}
"""The same with documents and a window, 128 columns: every tile is masked, and 8 warps compute a part of S and dP twice."""


def attention(s: StepSizes) -> list[Operation]:
    """Lists attention's operations over all transformer blocks: the passes before it, then its kernels, one operation per
    length of window."""
    found = [op for window, blocks in s.model.attention.reach.items() for op in _attention_within(s, window, blocks)]
    return [*_prepared(s), *found]


def _prepared(s: StepSizes) -> list[Operation]:
    """Rotary positions, QK-norm and value embeddings: a pass over the packed projection, forward and backward. Plain PyTorch
    moves 12 times as much: 74 bytes for each element of queries and keys (casts 12, products 16, sums 12, two concatenations
    12, norm 8, factor 8, cast 6), taken to be as many times in backward. Inductor's passes are taken to be as few as ours."""
    parts = s.model.attention
    if not parts.prepared:
        return []
    found, tables = [], [table for table in s.model.embeddings if table.in_blocks]
    valued = sum(table.count for table in tables)
    for embedded, blocks in ((False, parts.count - valued), (True, valued)):
        sizes = (s.rows, parts.heads, parts.head_dim)
        options: dict[str, Any] = {"kv_heads": parts.kv_heads, "value_embedding": embedded}
        works = flops.qk_norm_rope_forward(*sizes, **options), flops.qk_norm_rope_backward(*sizes, **options)
        for way, work in zip(("forward", "backward"), works):
            passes = 12 if s.kernels == "eager" else 1
            own = s.kernels == "triton"
            found.append(sweep(f"rotary {way}", f"rotary {way}", passes * work.bytes, passes, count=blocks, own=own))
    # A matmul of few columns, sigmoid and factor, and their gradients. That of the norm's few columns is filled up with
    # zeros (2), and added to the linear's (6). Inductor does both at once.
    whole = (4 if s.compiled else 8) * s.rows * s.shape.n_embd
    gates = [sweep("value gate", "pointwise", 12 * s.rows * parts.kv_heads + whole, 12, count=valued)]
    return [*found, *gates]


def _attention_within(s: StepSizes, window: int, L: int) -> list[Operation]:
    """Attention of ``L`` blocks in which a query sees ``window`` keys at most; 0: all before it."""
    parts = s.model.attention
    B, T, H, C, rows = s.B, s.T, parts.heads, parts.width, s.rows
    D = _padded_head(parts.head_dim, power_of_two=s.fusions.attention)
    own, options = s.fusions.attention, s.shape.family == "modern"  # whose presets mask documents
    costs = (OWN_DOCUMENTS if options else OWN) if own else FLASH_ATTENTION_2

    def op(name: str, group: str, way: str, moved: int, **more: Any) -> Operation:
        tile = min(costs[way].rows, T)
        tiles, most = cdiv(T, tile), cdiv(window - 1, tile) + 1 if window else T
        blocks = [tile * tile * min(n, most) for n in range(1, tiles + 1)]
        # FlashAttention-2 launches forward's longest rows last, and blocks of 4 warps there, of which two share an SM.
        shortest_first = way == "forward" and not own
        scores = Scores(
            blocks=tuple(blocks if shortest_first else reversed(blocks)),
            heads=B * H,
            masked=tile * tile * (tiles + max(0, tiles - most)),
            cost=costs[way],
            dropout=s.dropout > 0,
            columns=D,
            turns=own,
            pairs=shortest_first,
        )
        work = flops.attention_forward if way == "forward" else flops.attention_backward
        count = work(B, T, H, D, tile=tile, window=window, **more).flops
        return Operation(name, group, "attention", count, moved, 1, count=L, scores=scores, own=own)

    # The padding of heads is in registers, not in memory.
    least = flops.attention_forward(B, T, H, parts.head_dim, kv_heads=parts.kv_heads).bytes
    kv_width, columns = parts.kv_heads * parts.head_dim, fp8_group(s)
    # In fp8 a byte is written beside 16 bits, and an fp32 scale for a group of columns.
    extra, kv_extra = (rows * (width + 4 * width // columns) if columns else 0 for width in (C, kv_width))
    found = [op("attention forward", "attention forward", "forward", least + extra)]
    group, vector, kv_vector, log_sums = "attention backward", 2 * rows * C, 2 * rows * kv_width, 4 * rows * H
    if s.fusions.attention:
        # Two kernels, each with scores and dP of its own; each reads q, k, v, dO, the first also O; writes dq or dk, dv.
        query_bytes = 4 * vector + 2 * kv_vector + 2 * log_sums + extra
        key_bytes = 2 * vector + 4 * kv_vector + 2 * log_sums + 2 * kv_extra
        found += [
            op("attention backward dQ", group, "dQ", query_bytes, matmuls=3),
            op("attention backward dK dV", group, "dK dV", key_bytes, matmuls=4),
        ]
        if s.precision == "fp16-fast":  # all products but S, and dP's only up to 64 columns
            shares = (1 / 2, 2 / 3, 3 / 4) if D <= 64 else (1 / 2, 1 / 3, 2 / 4)
            found = [replace(each, summed_in_fp16=share) for each, share in zip(found, shares)]
        return found
    # FlashAttention-2: delta, and zeros into an fp32 dQ; the loop, which adds to that dQ; dQ rounded to 16 bits.
    moved, packed = 2 * vector + 4 * kv_vector + 2 * log_sums + 8 * rows * C, vector + 2 * kv_vector
    return [
        *found,
        sweep("attention backward, delta", group, 2 * vector + log_sums + 4 * rows * C, count=L, fresh=vector),
        op("attention backward", group, "backward", moved),
        sweep("attention backward, dQ cast", group, 4 * rows * C + vector, count=L, fresh=4 * rows * C),
        # q, k and v are views of one projection: their gradients are copied together.
        sweep("attention backward, dQ dK dV packed", group, 2 * packed, count=L, fresh=packed),
    ]


def _padded_head(D: int, *, power_of_two: bool) -> int:
    """The head dimension that a kernel computes with: triton's next power of two, FlashAttention-2's next 32."""
    return max(16, 1 << (D - 1).bit_length()) if power_of_two else 32 * cdiv(D, 32)


def fp8_group(s: StepSizes) -> int:
    """Columns that share a scale in what attention's kernels write in fp8 for the linears around it: ``quantise.group_size``.
    0 where they write none."""
    D = s.model.attention.head_dim
    return 0 if not s.own_fp8 else 64 if D % 64 == 0 else 32 if D % 32 == 0 else 0
