"""Flash attention, forward and backward, over any strides: packed (B, T, 3C) projections are read where they lie.

    S = scale Q K^T        P = softmax(S) over the keys a query sees        O = dropout(P) V

Dao et al. 2022 and Dao 2023 (FlashAttention 1 and 2): no T x T matrix reaches memory. A program of ``forward_kernel`` owns
a block of queries and walks over blocks of keys with a running maximum and sum per query, in base 2 (the scale is folded
into one constant). Saved for backward: the inputs, O, dropout's seed, and lse = log2(sum of 2^(S log2 e)), (B, H, T_q) in
fp32; +inf for a query that sees nothing, which makes its P zero.

Backward, with delta = rowsum(dO O), and P and dropout's mask recomputed:

    dP = dropout(dO V^T)    dS = P (dP - delta)    dQ = scale dS K    dK = scale dS^T Q    dV = dropout(P)^T dO

``backward_q_kernel`` owns queries, writes dQ and, as it holds dO and O anyway, delta; ``backward_kv_kernel`` runs after it,
owns keys, sums over the query heads that share them, writes dK and dV. Every result has one owner that adds in a fixed
order: no atomics, bit-equal runs. Operands of dots have the inputs' dtype (P and dS are rounded to it), sums are fp32, and
fp32 inputs are multiplied in full fp32.

Cost, causal, for T tokens of one head (without causal: twice that): forward 2 T^2 D FLOPs in 2 dots, backward 7 T^2 D in
7 (both backward kernels compute S and dP: the price of no atomics; 5 would be the least). Bytes: forward reads q, k, v
and writes O (4 T D elements) and lse; backward reads q, k, v, dO twice and O once and writes dq, dk, dv (12 T D), given
that the K and V of heads that are launched together stay in L2 while their blocks of queries use them. At T = 1024, D = 64 in
bf16 the forward does 256 FLOPs per byte: the tensor cores bind. A head dimension between powers of two is padded in
registers to the next one (80 costs what 128 costs), not in memory.

``accumulate="fp16"`` (fp16 operands): products are summed in fp16 over a block of at most 64 keys (O, dQ), queries (dK, dV)
or, up to D = 64, columns (dP), and these sums in fp32; GeForce tensor cores do that at twice the rate. S keeps fp32 sums, as
an absolute error in S is a relative one in P: docs/precision-modes.md has the figures. 1 of 2 dots of the forward and 5 of
the 7 of the backward are quicker, dP's 2 only up to D = 64.

``quantised`` is the hook for fp8 (quantise.py): where a result is written in 8 bits too, or None, which costs nothing.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import arguments, reference, runtime, tuning
from fastgpt.kernels.arguments import MAX_HEAD_DIM
from fastgpt.kernels.operators import operator
from fastgpt.kernels.philox import keep_mask
from fastgpt.kernels.quantise import group_size, quantise_groups

LOG2E = math.log2(math.e)
DECODING = 16
"""Queries up to which a forward pass is taken for sampling's."""

HIDDEN = tl.constexpr(-1e30)
"""Score of a key that a query does not see: finite, so that no inf - inf is formed where a tile shows a query no key."""

SPAN = tl.constexpr(32)
"""Positions for which documents' extents are noted together: the shortest block of keys, or of queries, that owns something."""

CHUNK = tl.constexpr(64)
"""Most products that are summed in fp16: docs/precision-modes.md has the errors."""


# ---- Configs --------------------------------------------------------------------------------------------------------

ROW_BOUNDS = (2**14, 2**16, 2**18, 2**20)
"""Upper ends of the tuning tables' buckets: B x heads x T. GPT-2 124M at 8 x 1024 has 98,304."""


def attention_bucket(D: int, rows: int, *, plain: bool, dropout: bool) -> str | None:
    """Bucket of causal attention with ``rows`` = B x heads x T and no option but dropout; None for everything else."""
    if D != 64 or not plain:
        return None
    bound = next((f"<={bound}" for bound in ROW_BOUNDS if rows <= bound), f">{ROW_BOUNDS[-1]}")
    return f"D{D}{' dropout' if dropout else ''} rows{bound}"


def _space(
    owned: str, walked: str, shapes: tuple[tuple[int, int], ...], stages: tuple[int, ...]
) -> list[tuning.Config]:
    """(rows of the side that a program owns, warps) x (rows of the other side) x stages; 8 warps on 128 queries also in
    128 registers, so that two blocks fit an SM."""
    found = []
    for (own, warps), walk, stage in product(shapes, (16, 32, 64), stages):
        base = {owned: own, walked: walk, "num_warps": warps, "num_stages": stage}
        found.append(base)
        if warps == 8 and owned == "BLOCK_M":
            found.append({**base, "maxnreg": 128})
    return found


_QUERIES = ((64, 4), (128, 4), (128, 8))
_KEYS = ((32, 4), (32, 8), (64, 4), (64, 8), (128, 8))


# (BLOCK_M, BLOCK_N, num_warps, num_stages) by padded head dimension. "plain" is causal attention with no option and no groups;
# options take registers, Philox more of them. A tensor-core dot holds all of its second operand in registers, hence the short
# second sides.
_TILES = {
    "forward": {
        # At 64, 3 stages spill 8 bytes on sm_86 and sm_89, plain with triton 3.8 and 3.9, with documents with 3.7 too.
        "plain": {64: (128, 32, 8, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
        "options": {64: (64, 32, 4, 2), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
        "dropout": {64: (64, 16, 4, 3), 128: (64, 16, 4, 2), 256: (64, 16, 8, 2)},
        "fp32": {64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
    },
    "backward_q": {
        "plain": {64: (128, 32, 8, 2), 128: (128, 32, 8, 2), 256: (64, 16, 8, 2)},
        "options": {64: (128, 32, 8, 2), 128: (128, 32, 8, 2), 256: (32, 16, 4, 1)},
        "dropout": {64: (128, 16, 8, 2), 128: (128, 16, 8, 2), 256: (32, 16, 4, 1)},
        "fp32": {64: (16, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
    },
    "backward_kv": {
        "plain": {64: (32, 64, 4, 3), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
        "options": {64: (32, 32, 8, 2), 128: (32, 32, 8, 2), 256: (32, 32, 8, 1)},
        # At 64, 8 warps would have 4 warps' products to share, and compute them twice.
        "dropout": {64: (32, 32, 4, 2), 128: (16, 32, 8, 2), 256: (16, 32, 8, 1)},
        "fp32": {64: (16, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
    },
}

# Where the above spills on one architecture: by compute capability, kernel, dtype ("fp8": of a result that is written beside
# the 16-bit one), padded head dimension, dropout.
_CORRECTIONS: dict[tuple, dict[str, int]] = {
    # A load in flight would not fit plain attention's 128 registers, and with documents triton 3.6's ptxas stops at as many.
    (120, "backward_q", "16-bit", 64, False): {"num_stages": 1, "maxnreg": 255},
    (120, "forward", "fp8", 64, False): {"maxnreg": 255},  # or it stops at 168, for a third block per SM
    (120, "backward_q", "fp8", 64, False): {"BLOCK_N": 16},
    (120, "backward_q", "fp8", 128, True): {"num_stages": 1},  # triton 3.9 spills with 2
    (89, "backward_kv", "fp8", 64, False): {"BLOCK_N": 32},  # triton 3.6 spills 16 bytes with 64
    (80, "backward_q", "fp32", 64, True): {"BLOCK_N": 16},
    # Where ptxas would stop at fewer registers, with triton 3.6 or 3.9, for one more block per SM.
    (89, "backward_q", "fp8", 256, True): {"maxnreg": 255},
    (80, "forward", "fp32", 256, False): {"maxnreg": 255},
    (120, "backward_q", "fp32", 64, False): {"maxnreg": 128},
    **{(arch, "backward_kv", "fp32", 64, True): {"maxnreg": 255} for arch in (80, 86, 89)},
    (90, "backward_q", "fp32", 64, False): {"BLOCK_N": 16},
    (90, "backward_kv", "fp32", 256, False): {"num_warps": 8},
}


@lru_cache
def _block_d(D: int) -> int:
    """Columns of a tile: tl.arange needs a power of two, tl.dot at least 16."""
    return max(16, runtime.next_power_of_2(D))


def config(
    kernel: str, dtype: torch.dtype, D: int, T_own: int, *, dropout: bool = False, plain: bool = True,
    fp16_sums: bool = False, quantised: bool = False, arch: int | None = None,
) -> dict[str, int]:  # fmt: skip
    """Launch parameters of ``kernel`` ("forward", "backward_q", "backward_kv") for head dimension D that are safe on any
    card; ``T_own`` is the length of the side that its programs own, ``plain`` is causal attention with no option and no
    groups. ``_prepared`` asks the tuning tables first.

    Chosen by compiling: no spills on sm_80 to sm_120, at most 101,376 bytes of shared memory. ``maxnreg`` makes room for
    two blocks of 8 warps per SM in the kernels that fit 128 registers."""
    if runtime.INTERPRET:  # a block operation costs the same whatever its size
        block = 64 if T_own <= 256 or fp16_sums else 128
        return {"BLOCK_M": block, "BLOCK_N": block}
    width = max(64, _block_d(D))
    kind = "fp32" if dtype == torch.float32 else "plain" if plain else "dropout" if dropout else "options"
    block_m, block_n, warps, stages = _TILES[kernel][kind][width]
    fast_kv = kernel == "backward_kv" and fp16_sums and width == 64
    decoding = kernel == "forward" and T_own <= DECODING and kind != "fp32"
    if decoding:
        block_m, block_n, warps, stages = 16, 32, 4, 2
    elif fast_kv and kind != "plain" and _block_d(D) == 64:
        stages = 1  # a load in flight would spill on sm_90 and sm_120
    elif fast_kv:
        stages = {80: 2, 120: 1}.get(arch or 0, stages)
    elif kernel == "forward" and kind == "options" and quantised and width == 64:
        stages = 3  # with documents, 2 spill 8 bytes on sm_89
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
    options |= _CORRECTIONS.get((arch, kernel, "fp32" if kind == "fp32" else "16-bit", width, dropout), {})
    if quantised:
        options |= _CORRECTIONS.get((arch, kernel, "fp8", width, dropout), {})
    if kind == "plain" and width == 64 and warps == 8:
        options["maxnreg"] = 128
    elif decoding or (fast_kv and (kind != "plain" or arch in (80, 120))):
        options["maxnreg"] = (
            128 if warps == 8 else 255
        )  # ptxas would stop at less, for one more block per SM, and spill
    return options


@tuning.cached
def _prepared(
    kernel: Any, name: str, dtype: torch.dtype, device: torch.device, l2_bytes: int, size: torch.Size, T_k: int, H_kv: int,
    docs: bool, kv_len: bool, dropout: bool, quantised: bool, causal: bool, scale: float, window: int | None,
    dropout_p: float, fp16: bool,
) -> runtime.Launch:  # fmt: skip
    """``kernel``, which is attention.``name`` in the tables, for q of this ``size`` and whatever else is given."""
    B, T_q, H, D = size
    options = docs or kv_len or window is not None
    owns_keys = name == "backward_kv"
    T_own, heads, walked = (T_k, H_kv, T_q * H) if owns_keys else (T_q, H, T_k * H_kv)
    plain = causal and not options and not (owns_keys and H != H_kv)  # a group adds a loop, and with it registers
    default = config(
        name, dtype, D, T_own, dropout=dropout, plain=plain and not dropout, fp16_sums=fp16, quantised=quantised,
        arch=tuning.arch_of(device),
    )  # fmt: skip
    # Other binaries, with other registers, write fp8 or sum in fp16: entries for the usual one are not for them.
    usual = plain and T_own > DECODING and not quantised
    bucket = attention_bucket(D, B * heads * T_own, plain=usual, dropout=dropout)
    choice = tuning.choose(f"attention{'_fast' if fp16 else ''}.{name}", dtype, bucket, device, default)
    blocks = runtime.cdiv(T_own, choice.config["BLOCK_N" if owns_keys else "BLOCK_M"])
    scales = {"c": abs(scale) * LOG2E, "FLIP": scale < 0} if name == "forward" else {"c": scale * LOG2E, "scale": scale}
    return runtime.Launch(
        kernel, (blocks * B * heads,), choice, H=H, T_q=T_q, T_k=T_k, window=window,
        # Philox keeps what its 31 random bits put at or above the threshold; with dropout_p = 1 nothing.
        threshold=min(int(dropout_p * 2**31), 2**31 - 1), inv_keep=1.0 / (1.0 - dropout_p) if dropout_p < 1 else 0.0,
        together=heads_together(B * heads, 2 * B * walked * D * dtype.itemsize, l2_bytes),
        D=D, GROUP=H // H_kv, CAUSAL=causal, ALIGNED=causal or options, FP16_SUMS=fp16,
        INNER=not docs or (not dropout and D <= 64 and dtype != torch.float32), BLOCK_D=_block_d(D),
        **scales, **choice.config,
    )  # fmt: skip


# ---- Kernels --------------------------------------------------------------------------------------------------------
#
# Arguments they share:
#
# * q, k, v, out, grad_*: tensors of which (T, D) matrices are addressed through ``strides = (batch, row, head)``; columns
#   are adjacent. ``lse`` and ``delta`` are (B, H, T_q) fp32, contiguous.
# * kv_len (B,), docs (B, T_k) and extents (of document_extents_kernel), seed (1,), window: None when unused; the code for them
#   is then not compiled.
# * INNER: blocks that need no mask have a loop of their own. Where documents come with dropout, fp32 or heads wider than 64,
#   three loops take too many registers, and one masks every block.
# * CAUSAL, and ALIGNED: queries stand at positions counted from the end of the keys (anything but plain attention to all).
# * FP16_SUMS (fp16 operands): products are summed in fp16 over CHUNK keys, queries or columns at most. Scores never are.
# * quantised: None, or where the result goes in fp8 too, as (values, with the strides of the 16-bit result; scales, one for
#   every group of columns of a row, (groups, B T) from this tensor's first group on; B T).
#
# Query i stands at position i + offset. A loop over blocks has three parts (0: leading edge, which among keys only windows and
# documents have; 1: blocks that need no mask; 2: trailing edge), unrolled by static_range so that part 1 compiles without any
# masking.


@triton.jit
def _in_turn(n_blocks, together):
    """(row of heads, block) of this program: ``together`` rows of heads take turns, so that the heaviest blocks of all of them
    start before any lighter one. A long program that starts late runs alone at the end."""
    first = tl.program_id(0) // (n_blocks * together) * together
    within = tl.program_id(0) - first * n_blocks
    taking_turns = tl.minimum(together, tl.num_programs(0) // n_blocks - first)
    return first + within % taking_turns, within // taking_turns


@triton.jit
def _alignment(kv_len, batch, T_q, T_k):
    """(offset, n_keys) of one batch; keys at or past n_keys do not exist."""
    if kv_len is not None:
        length = tl.load(kv_len + batch).to(tl.int32)
        return length - T_q, tl.minimum(length, T_k)
    else:
        return T_k - T_q, T_k


@triton.jit
def _documents(docs, position, T_k):
    return tl.load(docs + position, mask=(position >= 0) & (position < T_k), other=0)


@triton.jit
def _visible(position, key, docs, n_keys, T_k, window, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr):
    """reference.attention_mask of one tile. ``position`` and ``key`` come shaped to broadcast, in either orientation."""
    seen = key < n_keys
    if ALIGNED:
        seen = seen & (position >= 0)
    if CAUSAL:
        seen = seen & (key <= position)
    if window is not None:
        seen = seen & (key > position - window)
        if not CAUSAL:
            seen = seen & (key < position + window)
    if docs is not None:
        seen = seen & (_documents(docs, position, T_k) == _documents(docs, key, T_k))
    return seen


@triton.jit(do_not_specialize=["T"])
def document_extents_kernel(docs, extents, T, SPAN: tl.constexpr, WIDTH: tl.constexpr):
    """Where the documents of SPAN positions of one sequence lie: extents (B, 4, spans) gets the first position, and the one
    behind the last, of ids between the least and the greatest of the span; then the ends of the run of one id around the span
    (none if it has several). Right for ids in any order, exact for packed documents, whose ids come in runs.

    Grid: batch x spans, since a grid's second side ends at 65,535. WIDTH positions are looked at at a time."""
    n_spans = tl.num_programs(1)
    batch = tl.program_id(0).to(tl.int64)
    docs += batch * T
    start = tl.program_id(1) * SPAN
    ids = tl.load(docs + tl.minimum(start + tl.arange(0, SPAN), T - 1))
    least, greatest = tl.min(ids), tl.max(ids)
    first, end, run_first, run_end = T, 0, 0, T
    for n in range(0, T, WIDTH):
        position = n + tl.arange(0, WIDTH)
        inside = position < T
        other = tl.load(docs + position, mask=inside, other=0)
        met = inside & (other >= least) & (other <= greatest)
        first = tl.minimum(first, tl.min(tl.where(met, position, T)))
        end = tl.maximum(end, tl.max(tl.where(met, position + 1, 0)))
        differs = inside & ((other != least) | (least != greatest))
        run_first = tl.maximum(run_first, tl.max(tl.where(differs & (position < start), position + 1, 0)))
        run_end = tl.minimum(run_end, tl.min(tl.where(differs & (position >= start), position, T)))
    extents += batch * 4 * n_spans + tl.program_id(1)
    tl.store(extents, first)
    tl.store(extents + n_spans, end)
    tl.store(extents + 2 * n_spans, run_first)
    tl.store(extents + 3 * n_spans, run_end)


@triton.jit
def _extent(extents, first, last, T_k, ROWS: tl.constexpr):
    """What document_extents_kernel found for the ROWS positions first..last: ends of what some of them may see, and of what
    all of them see."""
    n_spans = tl.cdiv(T_k, SPAN)
    span = tl.maximum(first, 0) // SPAN + tl.arange(0, triton.next_power_of_2(ROWS // SPAN + 2))
    met = (span < n_spans) & (span * SPAN <= last)
    at = extents + span
    # Runs around different ids have no position in common: together they are empty.
    return (
        tl.min(tl.load(at, mask=met, other=T_k)),
        tl.max(tl.load(at + n_spans, mask=met, other=0)),
        tl.max(tl.load(at + 2 * n_spans, mask=met, other=0)),
        tl.min(tl.load(at + 3 * n_spans, mask=met, other=T_k)),
    )


@triton.jit
def _blocks(lo, hi, full_lo, full_hi, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """Ends of the three parts, in whole blocks: lo..full_lo, full_lo..full_hi, full_hi..hi."""
    lo = tl.maximum(lo, 0) // BLOCK * BLOCK
    full_lo = (tl.maximum(full_lo, 0) + BLOCK - 1) // BLOCK * BLOCK
    full_hi = tl.maximum(full_hi, 0) // BLOCK * BLOCK
    # With no block that needs no mask, parts 0 and 1 are empty and part 2 walks over everything.
    no_full = full_hi <= full_lo
    if not INNER:
        return lo, lo, lo, hi
    return lo, tl.where(no_full, lo, full_lo), tl.where(no_full, lo, full_hi), hi


@triton.jit
def _key_blocks(
    m, offset, T_q, n_keys, T_k, extents, window,
    CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, INNER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Ends of the three parts of the keys for the queries m..m+BLOCK_M-1: some query sees lo..hi, all see full_lo..full_hi."""
    first = m + offset
    last = tl.minimum(m + BLOCK_M, T_q) - 1 + offset
    lo = 0
    full_lo = 0
    hi = n_keys
    full_hi = n_keys
    if CAUSAL:
        hi = tl.minimum(hi, last + 1)
        full_hi = tl.minimum(full_hi, first + 1)
    if window is not None:
        lo = first - window + 1
        full_lo = last - window + 1
        if not CAUSAL:
            hi = tl.minimum(hi, last + window)
            full_hi = tl.minimum(full_hi, first + window)
    if ALIGNED:  # queries at negative positions, before the first key, see nothing
        hi = tl.where(last < 0, 0, hi)
        full_hi = tl.where(first < 0, 0, full_hi)
    if extents is not None:
        seen_first, seen_end, run_first, run_end = _extent(extents, first, last, T_k, BLOCK_M)
        lo, hi = tl.maximum(lo, seen_first), tl.minimum(hi, seen_end)
        full_lo, full_hi = tl.maximum(full_lo, run_first), tl.minimum(full_hi, run_end)
    return _blocks(lo, hi, full_lo, full_hi, INNER, BLOCK_N)


@triton.jit
def _query_blocks(
    n, offset, T_q, n_keys, T_k, extents, window,
    CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, INNER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Ends of the three parts of the queries for the keys n..n+BLOCK_N-1: lo..hi see some key, full_lo..full_hi see all."""
    last = n + BLOCK_N - 1
    lo = 0
    full_lo = 0
    hi = tl.where(n < n_keys, T_q, 0)
    full_hi = tl.where(last < n_keys, T_q, 0)
    if ALIGNED:
        lo = -offset
        full_lo = -offset
    if CAUSAL:
        lo = tl.maximum(lo, n - offset)
        full_lo = tl.maximum(full_lo, last - offset)
    if window is not None:
        hi = tl.minimum(hi, last + window - offset)
        full_hi = tl.minimum(full_hi, n + window - offset)
        if not CAUSAL:
            lo = tl.maximum(lo, n - window + 1 - offset)
            full_lo = tl.maximum(full_lo, last - window + 1 - offset)
    if extents is not None:
        seen_first, seen_end, run_first, run_end = _extent(extents, n, last, T_k, BLOCK_N)
        lo, hi = tl.maximum(lo, seen_first - offset), tl.minimum(hi, seen_end - offset)
        full_lo, full_hi = tl.maximum(full_lo, run_first - offset), tl.minimum(full_hi, run_end - offset)
    return _blocks(lo, hi, full_lo, full_hi, INNER, BLOCK_M)


@triton.jit
def _matrix(tensor, strides, batch, head):
    """First element and row stride of one batch's and head's (T, D) matrix, in 64-bit arithmetic."""
    # Triton passes a stride that fits 32 bits as such (and 1 as a constant); its product with a row may not fit them.
    b = tl.full([], strides[0], tl.int64)
    t = tl.full([], strides[1], tl.int64)
    h = tl.full([], strides[2], tl.int64)
    return tensor + (batch * b + head * h), t


@triton.jit
def _load(base, stride, start, end, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EDGE: tl.constexpr):
    """Rows start... of a (T, D) matrix; zeros past ``end`` (which only an EDGE tile reaches) and past D."""
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    pointers = base + start * stride + (row * stride + col)
    # A mask costs registers and splits wide loads, so each is compiled only where rows or columns can be missing.
    if EDGE and D < COLS:
        return tl.load(pointers, mask=(start + row < end) & (col < D), other=0.0)
    elif EDGE:
        return tl.load(pointers, mask=start + row < end, other=0.0)
    elif D < COLS:
        return tl.load(pointers, mask=col < D, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store(tile, base, stride, start, end, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    pointers = base + start * stride + (row * stride + col)
    if D < COLS:
        tl.store(pointers, tile.to(base.dtype.element_ty), mask=(start + row < end) & (col < D))
    else:
        tl.store(pointers, tile.to(base.dtype.element_ty), mask=start + row < end)


@triton.jit
def _store_quantised(
    tile, quantised, strides, batch, head, start, T, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Rows start... of T of ``tile``, which holds a result as already rounded to its own dtype, rounded once more to fp8."""
    base, stride = _matrix(quantised[0], strides, batch, head)
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)[None, :]
    pointers = base + start * stride + (row[:, None] * stride + col)
    n_rows = tl.full([], quantised[2], tl.int64)
    scales = quantised[1] + (head * (D // group_size(D)) * n_rows + batch.to(tl.int64) * T + start)
    within = start + row < T
    quantise_groups(tile.to(tl.float32), pointers, within[:, None] & (col < D), scales + row, within, n_rows, D, COLS)


@triton.jit
def _dot(a, b, FP16_SUMS: tl.constexpr):
    """a b in fp32, from fp32 sums, or with FP16_SUMS from sums in fp16. fp32 operands are multiplied in full fp32."""
    if FP16_SUMS:
        return tl.dot(a, b, out_dtype=tl.float16).to(tl.float32)
    else:
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _add_dot(acc, a, b, FP16_SUMS: tl.constexpr):
    """acc + a b, acc in fp32: with FP16_SUMS the products of a b alone are summed in fp16."""
    if FP16_SUMS:
        return acc + tl.dot(a, b, out_dtype=tl.float16).to(tl.float32)
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@tuning.space("attention.forward", _space("BLOCK_M", "BLOCK_N", _QUERIES, (2, 3)))
@triton.jit(do_not_specialize=["T_q", "T_k", "together", "window", "threshold"])
def forward_kernel(
    q, k, v, out, quantised, lse, kv_len, docs, extents, seed, q_strides, k_strides, v_strides, out_strides,
    H, T_q, T_k, together, window, c, threshold, inv_keep, D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    ALIGNED: tl.constexpr, INNER: tl.constexpr, FLIP: tl.constexpr, FP16_SUMS: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M queries of one head. ``c`` is |scale| log2(e); FLIP: scale is negative.

    Grid: blocks of queries x heads x batch, in the order of ``_in_turn``, last blocks (heaviest, when causal) first."""
    n_blocks = tl.cdiv(T_q, BLOCK_M)
    head_row, turn = _in_turn(n_blocks, together)
    m = (n_blocks - 1 - turn) * BLOCK_M  # the last queries see the most keys when causal
    batch = head_row // H
    head = head_row % H
    if docs is not None:
        docs += batch.to(tl.int64) * T_k
        extents += batch.to(tl.int64) * 4 * tl.cdiv(T_k, SPAN)
    offset, n_keys = _alignment(kv_len, batch, T_q, T_k)
    ends = _key_blocks(m, offset, T_q, n_keys, T_k, extents, window, CAUSAL, ALIGNED, INNER, BLOCK_M, BLOCK_N)
    q_base, q_stride = _matrix(q, q_strides, batch, head)
    k_base, k_stride = _matrix(k, k_strides, batch, head // GROUP)
    v_base, v_stride = _matrix(v, v_strides, batch, head // GROUP)
    out_base, out_stride = _matrix(out, out_strides, batch, head)

    query = m + tl.arange(0, BLOCK_M)
    q_tile = _load(q_base, q_stride, m, T_q, D, BLOCK_M, BLOCK_D, True)
    if FLIP:  # -q and |scale|: the running maximum below needs c >= 0, so that the largest s is the largest s c
        q_tile = (-q_tile.to(tl.float32)).to(q_tile.dtype)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], HIDDEN, tl.float32)
    for part in tl.static_range(3):
        if part > 0 or window is not None or docs is not None:
            for n in range(ends[part], ends[part + 1], BLOCK_N):
                k_tile = _load(k_base, k_stride, n, n_keys, D, BLOCK_N, BLOCK_D, part != 1)
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                if part != 1:
                    key = n + tl.arange(0, BLOCK_N)
                    seen = _visible((query + offset)[:, None], key[None, :], docs, n_keys, T_k, window, CAUSAL, ALIGNED)
                    s = tl.where(seen, s, HIDDEN)
                new_peak = tl.maximum(peak, tl.max(s, 1) * c)
                # c = |scale| log2(e), so this is exp(scale s - max) in one FMA and one exp2 instruction.
                p = tl.exp2(s * c - new_peak[:, None])
                if part != 1:  # a query that sees no key of this tile has peak HIDDEN, and p = 1 at hidden keys
                    p = tl.where(seen, p, 0.0)
                # What was summed under the old maximum, in units of the new one.
                shrink = tl.exp2(peak - new_peak)
                total = total * shrink + tl.sum(p, 1)  # of all p: dropout comes after the softmax
                peak = new_peak
                if seed is not None:
                    p = tl.where(keep_mask(seed, m, n, head_row, threshold, BLOCK_M, BLOCK_N), p, 0.0)
                v_tile = _load(v_base, v_stride, n, n_keys, D, BLOCK_N, BLOCK_D, part != 1)
                acc = _add_dot(acc * shrink[:, None], p.to(v_tile.dtype), v_tile, FP16_SUMS)

    sees_any = total > 0  # the output of a query that sees no key is 0, not 0 / 0
    acc = acc * (inv_keep / tl.where(sees_any, total, 1.0))[:, None]
    _store(acc, out_base, out_stride, m, T_q, D, BLOCK_M, BLOCK_D)
    if quantised is not None:
        _store_quantised(acc.to(out.dtype.element_ty), quantised, out_strides, batch, head, m, T_q, D, BLOCK_M, BLOCK_D)
    # lse = +inf makes 2^(S - lse) zero in backward, which needs no mask of its own for such queries.
    log_sum = tl.where(sees_any, peak + tl.log2(tl.where(sees_any, total, 1.0)), float("inf"))
    tl.store(lse + head_row.to(tl.int64) * T_q + query, log_sum, mask=query < T_q)


@tuning.space("attention.backward_q", _space("BLOCK_M", "BLOCK_N", _QUERIES, (1, 2)))
@triton.jit(do_not_specialize=["T_q", "T_k", "together", "window", "threshold"])
def backward_q_kernel(
    q, k, v, out, grad_out, lse, delta, grad_q, quantised, kv_len, docs, extents, seed, q_strides, k_strides,
    v_strides, out_strides, grad_out_strides, grad_q_strides, H, T_q, T_k, together, window, c, scale, threshold, inv_keep,
    D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, INNER: tl.constexpr,
    FP16_SUMS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_q, and delta for ``backward_kv_kernel``, of BLOCK_M queries of one head. Grid as of ``forward_kernel``."""
    n_blocks = tl.cdiv(T_q, BLOCK_M)
    head_row, turn = _in_turn(n_blocks, together)
    m = (n_blocks - 1 - turn) * BLOCK_M
    batch = head_row // H
    head = head_row % H
    if docs is not None:
        docs += batch.to(tl.int64) * T_k
        extents += batch.to(tl.int64) * 4 * tl.cdiv(T_k, SPAN)
    offset, n_keys = _alignment(kv_len, batch, T_q, T_k)
    ends = _key_blocks(m, offset, T_q, n_keys, T_k, extents, window, CAUSAL, ALIGNED, INNER, BLOCK_M, BLOCK_N)
    q_base, q_stride = _matrix(q, q_strides, batch, head)
    k_base, k_stride = _matrix(k, k_strides, batch, head // GROUP)
    v_base, v_stride = _matrix(v, v_strides, batch, head // GROUP)
    out_base, out_stride = _matrix(out, out_strides, batch, head)
    do_base, do_stride = _matrix(grad_out, grad_out_strides, batch, head)
    dq_base, dq_stride = _matrix(grad_q, grad_q_strides, batch, head)

    query = m + tl.arange(0, BLOCK_M)
    statistics = head_row.to(tl.int64) * T_q + query
    o_tile = _load(out_base, out_stride, m, T_q, D, BLOCK_M, BLOCK_D, True)
    do_tile = _load(do_base, do_stride, m, T_q, D, BLOCK_M, BLOCK_D, True)
    # rowsum(dO O) = rowsum(P dP): what the softmax's gradient subtracts, with dropout too, for no pass over the keys.
    row_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + statistics, row_delta, mask=query < T_q)
    row_lse = tl.load(lse + statistics, mask=query < T_q, other=float("inf"))
    q_tile = _load(q_base, q_stride, m, T_q, D, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(3):
        if part > 0 or window is not None or docs is not None:
            for n in range(ends[part], ends[part + 1], BLOCK_N):
                k_tile = _load(k_base, k_stride, n, n_keys, D, BLOCK_N, BLOCK_D, part != 1)
                if q_tile.dtype == tl.float32:  # or q is read before a barrier and kept in registers across it: spills
                    tl.debug_barrier()
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                p = tl.exp2(s * c - row_lse[:, None])  # normalised already: lse has the sum in it
                if part != 1:
                    key = n + tl.arange(0, BLOCK_N)
                    seen = _visible((query + offset)[:, None], key[None, :], docs, n_keys, T_k, window, CAUSAL, ALIGNED)
                    p = tl.where(seen, p, 0.0)
                v_tile = _load(v_base, v_stride, n, n_keys, D, BLOCK_N, BLOCK_D, part != 1)
                if q_tile.dtype == tl.float32:
                    tl.debug_barrier()
                dp = _dot(do_tile, tl.trans(v_tile), FP16_SUMS and BLOCK_D <= CHUNK)
                if seed is not None:
                    dp = tl.where(keep_mask(seed, m, n, head_row, threshold, BLOCK_M, BLOCK_N), dp * inv_keep, 0.0)
                ds = p * (dp - row_delta[:, None])
                acc = _add_dot(acc, ds.to(k_tile.dtype), k_tile, FP16_SUMS)
    dq = (acc * scale).to(grad_q.dtype.element_ty)
    _store(dq, dq_base, dq_stride, m, T_q, D, BLOCK_M, BLOCK_D)
    if quantised is not None:
        _store_quantised(dq, quantised, grad_q_strides, batch, head, m, T_q, D, BLOCK_M, BLOCK_D)


@tuning.space("attention.backward_kv", _space("BLOCK_N", "BLOCK_M", _KEYS, (2, 3)))
@triton.jit(do_not_specialize=["T_q", "T_k", "together", "window", "threshold"])
def backward_kv_kernel(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, quantised_k, quantised_v, kv_len, docs, extents, seed,
    q_strides, k_strides, v_strides, grad_out_strides, grad_k_strides, grad_v_strides, H, T_q, T_k, together, window, c,
    scale, threshold, inv_keep, D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr,
    INNER: tl.constexpr, FP16_SUMS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of BLOCK_N keys of one key/value head, summed over its GROUP of query heads.

    Grid: blocks of keys x key/value heads x batch, in the order of ``_in_turn``. Tiles are transposed, (keys, queries):
    P^T and dS^T then are first operands of their dots as they stand."""
    n_blocks = tl.cdiv(T_k, BLOCK_N)
    kv_row, turn = _in_turn(n_blocks, together)
    n = turn * BLOCK_N  # the first keys are seen by the most queries when causal
    batch = kv_row // (H // GROUP)
    kv_head = kv_row % (H // GROUP)
    if docs is not None:
        docs += batch.to(tl.int64) * T_k
        extents += batch.to(tl.int64) * 4 * tl.cdiv(T_k, SPAN)
    offset, n_keys = _alignment(kv_len, batch, T_q, T_k)
    ends = _query_blocks(n, offset, T_q, n_keys, T_k, extents, window, CAUSAL, ALIGNED, INNER, BLOCK_M, BLOCK_N)
    k_base, k_stride = _matrix(k, k_strides, batch, kv_head)
    v_base, v_stride = _matrix(v, v_strides, batch, kv_head)
    dk_base, dk_stride = _matrix(grad_k, grad_k_strides, batch, kv_head)
    dv_base, dv_stride = _matrix(grad_v, grad_v_strides, batch, kv_head)

    key = n + tl.arange(0, BLOCK_N)
    k_tile = _load(k_base, k_stride, n, n_keys, D, BLOCK_N, BLOCK_D, True)
    v_tile = _load(v_base, v_stride, n, n_keys, D, BLOCK_N, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(GROUP):  # query heads that share this key/value head: one owner adds them up, without atomics
        head = kv_head * GROUP + member
        head_row = batch * H + head
        q_base, q_stride = _matrix(q, q_strides, batch, head)
        do_base, do_stride = _matrix(grad_out, grad_out_strides, batch, head)
        row_statistics = head_row.to(tl.int64) * T_q
        for part in tl.static_range(3):
            for m in range(ends[part], ends[part + 1], BLOCK_M):
                query = m + tl.arange(0, BLOCK_M)
                q_tile = _load(q_base, q_stride, m, T_q, D, BLOCK_M, BLOCK_D, part != 1)
                do_tile = _load(do_base, do_stride, m, T_q, D, BLOCK_M, BLOCK_D, part != 1)
                # Past T_q: lse = inf makes p zero, delta = 0 keeps what is left of the scratch out of it.
                row_lse = tl.load(lse + row_statistics + query, mask=query < T_q, other=float("inf"))
                row_delta = tl.load(delta + row_statistics + query, mask=query < T_q, other=0.0)
                s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                p = tl.exp2(s * c - row_lse[None, :])
                if part != 1:
                    seen = _visible((query + offset)[None, :], key[:, None], docs, n_keys, T_k, window, CAUSAL, ALIGNED)
                    p = tl.where(seen, p, 0.0)
                dp = _dot(v_tile, tl.trans(do_tile), FP16_SUMS and BLOCK_D <= CHUNK)
                # 1 / (1 - p) goes into dP here and, as it is one factor of all of dV, into dV once after the loop.
                dropped = p
                if seed is not None:
                    kept = tl.trans(keep_mask(seed, m, n, head_row, threshold, BLOCK_M, BLOCK_N))
                    dropped = tl.where(kept, p, 0.0)
                    dp = tl.where(kept, dp * inv_keep, 0.0)
                dv = _add_dot(dv, dropped.to(do_tile.dtype), do_tile, FP16_SUMS)
                ds = p * (dp - row_delta[None, :])
                dk = _add_dot(dk, ds.to(q_tile.dtype), q_tile, FP16_SUMS)
    dk_rounded = (dk * scale).to(grad_k.dtype.element_ty)
    dv_rounded = (dv * inv_keep).to(grad_v.dtype.element_ty)
    _store(dk_rounded, dk_base, dk_stride, n, T_k, D, BLOCK_N, BLOCK_D)
    _store(dv_rounded, dv_base, dv_stride, n, T_k, D, BLOCK_N, BLOCK_D)
    if quantised_k is not None:
        _store_quantised(dk_rounded, quantised_k, grad_k_strides, batch, kv_head, n, T_k, D, BLOCK_N, BLOCK_D)
        _store_quantised(dv_rounded, quantised_v, grad_v_strides, batch, kv_head, n, T_k, D, BLOCK_N, BLOCK_D)


# ---- Launchers ------------------------------------------------------------------------------------------------------
#
# q (B, T_q, H, D), k and v (B, T_k, H_kv, D), out and gradients alike: any strides, columns adjacent.


def document_extents(docs: Tensor | None) -> Tensor | None:
    """(B, 4, spans) int32, as document_extents_kernel says, of docs (B, T), contiguous. One launch for all heads: a program
    that looked for its own document would walk over all ids before it: in a long context for longer than its attention."""
    if docs is None:
        return None
    B, T = docs.shape
    n_spans = runtime.cdiv(T, SPAN.value)
    extents = torch.empty((B, 4, n_spans), dtype=torch.int32, device=docs.device)
    width = runtime.next_power_of_2(T) if runtime.INTERPRET else 1024
    document_extents_kernel[(B, n_spans)](
        docs, extents, T, SPAN=SPAN.value, WIDTH=width, num_warps=4, enable_fp_fusion=True
    )
    return extents


def heads_together(rows: int, walked_bytes: int, l2_bytes: int) -> int:
    """How many of ``rows`` (B x heads) take turns at launching their blocks (``_in_turn``). What the blocks of such a group
    walk over, its share of ``walked_bytes`` (K and V; for dK and dV Q and dO), fits half of L2; the other half is for what
    passes through once. Groups are as equal as can be: a small last one would end unevenly."""
    most = max(1, rows * l2_bytes // (2 * walked_bytes))
    return runtime.cdiv(rows, runtime.cdiv(rows, most))


def _given(
    q: Tensor, k: Tensor, docs: Tensor | None, kv_len: Tensor | None, seed: Tensor | None, *rest: Any
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Arguments that all three kernels take alike, and those of ``_prepared``: what follows from tensors, and ``rest``."""
    B, _, H, D = q.shape
    if k.shape[0] != B or k.shape[3] != D or H % k.shape[2]:
        raise ValueError(
            f"k is {tuple(k.shape)}: q of {tuple(q.shape)} needs its batch and head size, and a divisor of its heads"
        )
    if docs is not None:
        arguments.alike("k's batch and tokens", k.shape[:2], doc_ids=docs)
        docs = docs.contiguous()
    if kv_len is not None:
        arguments.alike("k's batch", k.shape[:1], kv_len=kv_len)
        kv_len = kv_len.contiguous()
    given = {"kv_len": kv_len, "docs": docs, "extents": document_extents(docs), "seed": seed}
    known = docs is not None, kv_len is not None, seed is not None
    return given, (q.dtype, q.device, runtime.l2_bytes(q.device), q.shape, k.shape[1], k.shape[2], *known, *rest)


def launch_forward(q, k, v, out, docs, kv_len, seed, *options, quantised=None) -> Tensor:
    """Write attention into ``out``, and in fp8 into ``quantised``; return lse (B, H, T_q)."""
    B, T_q, H, _ = q.shape
    arguments.alike("q", q.shape, out=out)
    arguments.alike("k", k.shape, v=v)
    lse = torch.empty((B, H, T_q), dtype=torch.float32, device=q.device)
    given, key = _given(q, k, docs, kv_len, seed, quantised is not None, *options)
    _prepared(forward_kernel, "forward", *key)(
        q, k, v, out, quantised, lse, q_strides=q.stride()[:3], k_strides=k.stride()[:3], v_strides=v.stride()[:3],
        out_strides=out.stride()[:3], **given,
    )  # fmt: skip
    return lse


def launch_backward(
    grad_out, q, k, v, out, lse, grad_q, grad_k, grad_v, docs, kv_len, seed, *options, quantised=(None, None, None)
) -> None:
    """Write all of grad_q, grad_k and grad_v, and in fp8 into ``quantised``."""
    B, T_q, H, _ = q.shape
    arguments.alike("q", q.shape, grad_out=grad_out, out=out, grad_q=grad_q)
    arguments.alike("k", k.shape, v=v, grad_k=grad_k, grad_v=grad_v)
    arguments.alike("q's batch, heads and tokens", (B, H, T_q), lse=lse)
    delta = torch.empty_like(lse)
    given, key = _given(q, k, docs, kv_len, seed, quantised[0] is not None, *options)
    given |= {
        "q_strides": q.stride()[:3], "k_strides": k.stride()[:3], "v_strides": v.stride()[:3],
        "grad_out_strides": grad_out.stride()[:3],
    }  # fmt: skip
    _prepared(backward_q_kernel, "backward_q", *key)(
        q, k, v, out, grad_out, lse, delta, grad_q, quantised[0],
        out_strides=out.stride()[:3], grad_q_strides=grad_q.stride()[:3], **given,
    )  # fmt: skip
    _prepared(backward_kv_kernel, "backward_kv", *key)(
        q, k, v, grad_out, lse, delta, grad_k, grad_v, *quantised[1:],
        grad_k_strides=grad_k.stride()[:3], grad_v_strides=grad_v.stride()[:3], **given,
    )  # fmt: skip


def unpack(packed: Tensor, n_head: int, n_kv_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views (B, T, heads, D) of the queries, keys and values in (B, T, (n_head + 2 n_kv_head) D)."""
    B, T, width = packed.shape
    heads = n_head + 2 * n_kv_head
    q, k, v = packed.view(B, T, heads, width // heads).split_with_sizes((n_head, n_kv_head, n_kv_head), 2)
    return q, k, v


def packed_forward(qkv, doc_ids, seed, n_head, n_kv_head, *options, quantised=None) -> tuple[Tensor, Tensor]:
    """The output (B, T, H D) of qkv, and lse."""
    q, k, v = unpack(runtime.columns_adjacent(qkv), n_head, n_kv_head)
    out = qkv.new_empty(q.shape)
    lse = launch_forward(q, k, v, out, doc_ids, None, seed, *options, quantised=quantised)
    return out.flatten(2), lse


def packed_outputs(qkv, doc_ids, seed, n_head, n_kv_head, *options) -> tuple[Tensor, Tensor]:
    """What packed_forward returns, unwritten."""
    B, T, width = qkv.shape
    C = width // (n_head + 2 * n_kv_head) * n_head
    return qkv.new_empty((B, T, C)), qkv.new_empty((B, n_head, T), dtype=torch.float32)


def packed_backward(
    grad_out, qkv, out, lse, doc_ids, seed, n_head, n_kv_head, *options, quantised=(None, None, None)
) -> Tensor:
    """The gradient of qkv."""
    grad_qkv = qkv.new_empty(qkv.shape)
    inputs, grads = unpack(runtime.columns_adjacent(qkv), n_head, n_kv_head), unpack(grad_qkv, n_head, n_kv_head)
    grad_out, out = runtime.columns_adjacent(grad_out).unflatten(-1, (n_head, -1)), out.unflatten(-1, (n_head, -1))
    launch_backward(grad_out, *inputs, out, lse, *grads, doc_ids, None, seed, *options, quantised=quantised)
    return grad_qkv


# ---- Operators ------------------------------------------------------------------------------------------------------

_OPTIONS = "bool causal, float scale, int? window, float dropout_p, bool fp16"
_SEPARATE = f"Tensor? doc_ids, Tensor? kv_len, Tensor? seed, {_OPTIONS}"
PACKED = f"Tensor? doc_ids, Tensor? seed, int n_head, int n_kv_head, {_OPTIONS}"


@operator("attention_fwd", schema=f"(Tensor q, Tensor k, Tensor v, {_SEPARATE}) -> (Tensor, Tensor)")
def _attention_fwd(q, k, v, *options):
    q, k, v = map(runtime.columns_adjacent, (q, k, v))
    out = q.new_empty(q.shape)
    return out, launch_forward(q, k, v, out, *options)


@_attention_fwd.register_fake
def _(q, k, v, *options):
    B, T_q, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T_q), dtype=torch.float32)


@operator(
    "attention_bwd",
    schema=f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SEPARATE}) "
    "-> (Tensor, Tensor, Tensor)",
)
def _attention_bwd(grad_out, q, k, v, out, lse, *options):
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    grad_out, q, k, v = map(runtime.columns_adjacent, (grad_out, q, k, v))
    launch_backward(grad_out, q, k, v, out, lse, *grads, *options)
    return grads


@_attention_bwd.register_fake
def _(grad_out, q, k, v, out, lse, *options):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_qkv_attention_fwd = operator("qkv_attention_fwd", packed_forward, schema=f"(Tensor qkv, {PACKED}) -> (Tensor, Tensor)")
_qkv_attention_fwd.register_fake(packed_outputs)
_qkv_attention_bwd = operator(
    "qkv_attention_bwd",
    packed_backward,
    schema=f"(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, {PACKED}) -> Tensor",
)
_qkv_attention_bwd.register_fake(lambda grad_out, qkv, *rest: qkv.new_empty(qkv.shape))


def _attention_setup(ctx, inputs, output):
    q, k, v, doc_ids, kv_len, seed, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, doc_ids, kv_len, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or backward would be given zeros for lse


def _attention_backward(ctx, grad_out, _):
    return *_attention_bwd(grad_out, *ctx.saved_tensors, *ctx.options), *[None] * 8


def packed_setup(ctx, inputs, output):
    """``output``: the result, lse, and what else has no gradient."""
    qkv, doc_ids, seed, *ctx.options = inputs
    ctx.save_for_backward(qkv, *output[:2], doc_ids, seed)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _qkv_attention_backward(ctx, grad_out, _):
    return _qkv_attention_bwd(grad_out, *ctx.saved_tensors, *ctx.options), *[None] * 9


_attention_fwd.register_autograd(_attention_backward, setup_context=_attention_setup)
_qkv_attention_fwd.register_autograd(_qkv_attention_backward, setup_context=packed_setup)


# ---- Public functions -----------------------------------------------------------------------------------------------


def _autocast(x: Tensor) -> Tensor:
    """Under autocast in its dtype, as PyTorch's attention does (which leaves fp64 alone)."""
    return x if x.dtype == torch.float64 else x.to(runtime.compute_dtype(x))


def _check(
    name: str, x: Tensor, D: int, B: int, T_k: int, window: int | None, doc_ids: Tensor | None, dropout_p: float,
    accumulate: str,
) -> None:  # fmt: skip
    """Raise ValueError for options that no kernel takes."""
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"the head dimension is {D}: use 1 to {MAX_HEAD_DIM}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: use 1 (a query sees itself) or more, or None")
    if dropout_p:
        arguments.probability("dropout_p", dropout_p)
    if accumulate != "fp32":
        arguments.accumulate(accumulate, x.dtype)
    if doc_ids is not None:
        arguments.integers("doc_ids", doc_ids, (B, T_k), name, x)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    doc_ids: Tensor | None = None,
    kv_len: Tensor | None = None,
    dropout_p: float = 0.0,
    accumulate: str = "fp32",
) -> Tensor:
    """Scaled dot-product attention. q (B, T_q, H, D), k and v (B, T_k, H_kv, D) -> (B, T_q, H, D), contiguous.

    One dtype (fp32, fp16, bf16), any strides (a tensor whose last dimension is not adjacent is copied), H a multiple of
    H_kv, D up to 256. ``scale`` defaults to 1/sqrt(D). A query stands at position kv_len - T_q + i (kv_len, (B,)
    integers, defaults to T_k) and sees the keys before kv_len that are not after it (``causal``), fewer than ``window``
    away, and of its own document (``doc_ids``, (B, T_k) integers); one that sees none gets zeros. Keys at or past
    kv_len are never read. ``accumulate="fp16"`` sums products of fp16 operands in fp16 (docs/precision-modes.md).
    Raises ValueError for shapes, dtypes or options that do not fit.

    >>> q, k, v = torch.randn(3, 2, 16, 4, 32)
    >>> sdpa = torch.nn.functional.scaled_dot_product_attention
    >>> expected = sdpa(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
    >>> torch.allclose(attention(q, k, v), expected, atol=1e-5)
    True

    One new token, and a cache with room for 16, of which each sequence has filled as much as kv_len says:

    >>> attention(q[:, :1], k, v, kv_len=torch.tensor([5, 9])).shape
    torch.Size([2, 1, 4, 32])
    """
    if not (q.dim() == k.dim() == 4 and k.shape == v.shape and k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3]):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"attention is given {shapes}: use q (B, T_q, H, D), k and v (B, T_k, H_kv, D)")
    B, T_q, H, D = q.shape
    T_k, H_kv = k.shape[1:3]
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"q has {H} heads and k has {H_kv}: use a number of query heads that k's divides")
    arguments.tensors("q", q.shape, ("q", q, None), ("k", k, None), ("v", v, None))
    q, k, v = _autocast(q), _autocast(k), _autocast(v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention is given {q.dtype}, {k.dtype}, {v.dtype} for q, k, v: use one dtype")
    _check("q", q, D, B, T_k, window, doc_ids, dropout_p, accumulate)
    if kv_len is not None:
        arguments.integers("kv_len", kv_len, (B,), "q", q)
    if not runtime.runs_in_triton(q) or q.numel() == 0 or k.numel() == 0:
        return reference.attention(
            q, k, v, causal=causal, scale=scale, window=window, doc_ids=doc_ids, kv_len=kv_len, dropout_p=dropout_p
        )
    seed = runtime.draw_seed(q.device) if dropout_p else None
    scale = D**-0.5 if scale is None else scale
    options = causal, scale, window, dropout_p, accumulate == "fp16"
    return _attention_fwd(q, k, v, doc_ids, kv_len, seed, *options)[0]


def qkv_attention(
    qkv: Tensor,
    n_head: int,
    *,
    n_kv_head: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    doc_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    accumulate: str = "fp32",
    operator: Any = _qkv_attention_fwd,
) -> Tensor:
    """Self-attention over packed projections: qkv (B, T, (H + 2 H_kv) D) -> (B, T, H D); (B, T, 3C) -> (B, T, C) when
    H_kv = H, as GPT-2's c_attn packs them: all queries, all keys, all values.

    ``attention`` without a transpose or a copy in either direction: q, k and v are read inside qkv, and the gradient is
    written into one tensor of qkv's shape. fp32, fp16 or bf16, any strides; under autocast, autocast's. The options are
    those of ``attention``. ``operator``: kernels/fp8 puts its own in place of the registered one, with the same arguments.
    Raises ValueError for shapes, dtypes or options that do not fit.

    >>> qkv = torch.randn(2, 16, 3 * 64, requires_grad=True)
    >>> y = qkv_attention(qkv, n_head=2, window=8)
    >>> y.sum().backward()
    >>> y.shape, qkv.grad.shape
    (torch.Size([2, 16, 64]), torch.Size([2, 16, 192]))
    """
    n_kv_head = n_kv_head or n_head
    if qkv.dim() != 3 or n_head < 1 or n_head % n_kv_head or qkv.shape[-1] % (n_head + 2 * n_kv_head):
        raise ValueError(
            f"qkv is {tuple(qkv.shape)} for n_head={n_head}, n_kv_head={n_kv_head}: use (B, T, (n_head + 2 n_kv_head) D) "
            "with n_head a multiple of n_kv_head"
        )
    B, T, width = qkv.shape
    D = width // (n_head + 2 * n_kv_head)
    arguments.tensors("qkv", qkv.shape, ("qkv", qkv, None))
    qkv = _autocast(qkv)
    _check("qkv", qkv, D, B, T, window, doc_ids, dropout_p, accumulate)
    if not runtime.runs_in_triton(qkv) or qkv.numel() == 0:
        return reference.qkv_attention(
            qkv, n_head, n_kv_head=n_kv_head, causal=causal, scale=scale, window=window, doc_ids=doc_ids,
            dropout_p=dropout_p,
        )  # fmt: skip
    seed = runtime.draw_seed(qkv.device) if dropout_p else None
    scale = D**-0.5 if scale is None else scale
    options = causal, scale, window, dropout_p, accumulate == "fp16"
    return operator(qkv, doc_ids, seed, n_head, n_kv_head, *options)[0]
