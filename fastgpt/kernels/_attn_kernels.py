"""The Triton kernels of fused_attn.py, whose docstring has the maths. Arguments they share:

* q, k, v, out, grad_*: tensors of which (T, D) matrices are addressed through ``strides = (batch, row, head)``; columns
  are adjacent. ``lse`` and ``delta`` are (B, H, T_q) fp32, contiguous.
* kv_len (B,), docs (B, T_k), seed (1,), window: None when unused; the code for them is then not compiled.
* CAUSAL, and ALIGNED: queries stand at positions counted from the end of the keys (anything but plain attention to all).
* FP16_SUMS (fp16 operands): products are summed in fp16 over a block of keys, queries or columns, at most 64 of them, and
  these sums in fp32. Scores never are.
* out_form, grad_*_form: None, or where the result goes in fp8 too, as (values, with the strides of the 16-bit result; scales,
  one for every 64 columns of a row, (groups, B T) from this tensor's first group on; B T).

Query i stands at position i + offset. A loop over blocks has three parts (0: leading edge, which only a window has; 1:
blocks that need no mask; 2: trailing edge), unrolled by static_range so that part 1 compiles without any masking.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgpt.kernels._fp8_rows import group_size, quantise_groups

HIDDEN = tl.constexpr(-1e30)
"""Score of a key that a query does not see: finite, so that no inf - inf is formed where a tile shows a query no key."""

CHUNK = tl.constexpr(64)
"""Most products that are summed in fp16: docs/precision-modes.md has the errors."""

PHILOX_ROUNDS = tl.constexpr(7)
"""Seven rounds pass BigCrush (Salmon et al. 2011, table 2); ten, the usual number, only add margin."""


# ---- Who sees whom --------------------------------------------------------------------------------------------------


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


@triton.jit
def _narrow(docs, own, others, lo, hi, T_k, BLOCK: tl.constexpr):
    """Shorten lo..hi by the blocks at its ends whose ids all lie outside the range of ids at the positions ``own``.

    ``others`` is where position lo + arange(BLOCK) would be if lo were 0. Right for ids in any order, useful for packed
    documents, whose ids come in runs."""
    inside = (own >= 0) & (own < T_k)
    ids = _documents(docs, own, T_k)
    first = tl.min(tl.where(inside, ids, 2147483647))
    last = tl.max(tl.where(inside, ids, -2147483648))
    start = hi
    stop = lo
    for n in range(lo, hi, BLOCK):
        position = n + others
        other = _documents(docs, position, T_k)
        match = (position >= 0) & (position < T_k) & (other >= first) & (other <= last)
        found = tl.max(match.to(tl.int32)) > 0
        start = tl.minimum(start, tl.where(found, n, hi))
        stop = tl.maximum(stop, tl.where(found, n + BLOCK, lo))
    return start, tl.minimum(stop, hi)


@triton.jit
def _blocks(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """Ends of the three parts, in whole blocks: lo..full_lo, full_lo..full_hi, full_hi..hi."""
    lo = tl.maximum(lo, 0) // BLOCK * BLOCK
    full_lo = (tl.maximum(full_lo, 0) + BLOCK - 1) // BLOCK * BLOCK
    full_hi = tl.maximum(full_hi, 0) // BLOCK * BLOCK
    no_full = full_hi <= full_lo
    return lo, tl.where(no_full, lo, full_lo), tl.where(no_full, lo, full_hi), hi


@triton.jit
def _key_blocks(
    m, offset, T_q, n_keys, T_k, docs, window,
    CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys to visit for the queries m..m+BLOCK_M-1: some query sees lo..hi, all of them see full_lo..full_hi."""
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
    if ALIGNED:
        hi = tl.where(last < 0, 0, hi)
        full_hi = tl.where(first < 0, 0, full_hi)
    lo, full_lo, full_hi, hi = _blocks(lo, hi, full_lo, full_hi, BLOCK_N)
    if docs is not None:  # every block is masked
        lo, hi = _narrow(docs, first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), lo, hi, T_k, BLOCK_N)
        return lo, lo, lo, hi
    return lo, full_lo, full_hi, hi


@triton.jit
def _query_blocks(
    n, offset, T_q, n_keys, T_k, docs, window,
    CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Queries to visit for the keys n..n+BLOCK_N-1: lo..hi see some of them, full_lo..full_hi see all."""
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
    lo, full_lo, full_hi, hi = _blocks(lo, hi, full_lo, full_hi, BLOCK_M)
    if docs is not None:
        lo, hi = _narrow(docs, n + tl.arange(0, BLOCK_N), offset + tl.arange(0, BLOCK_M), lo, hi, T_k, BLOCK_M)
        return lo, lo, lo, hi
    return lo, full_lo, full_hi, hi


# ---- Tiles ----------------------------------------------------------------------------------------------------------


@triton.jit
def _matrix(tensor, strides, batch, head):
    """First element and row stride of one batch's and head's (T, D) matrix, in 64-bit arithmetic."""
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
def _store_fp8(
    tile, form, strides, batch, head, start, T, D: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``tile``, in the dtype of the result it is of, rounded once more: rows start... of T."""
    base, stride = _matrix(form[0], strides, batch, head)
    row = tl.arange(0, ROWS)
    col = tl.arange(0, COLS)[None, :]
    pointers = base + start * stride + (row[:, None] * stride + col)
    n_rows = tl.full([], form[2], tl.int64)
    scales = form[1] + (head * (D // group_size(D)) * n_rows + batch.to(tl.int64) * T + start)
    within = start + row < T
    quantise_groups(tile.to(tl.float32), pointers, within[:, None] & (col < D), scales + row, within, n_rows, D, COLS)


@triton.jit
def _kept(seed, m, n, head_row, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout's mask of the tile of P at (m, n), kept with probability 1 - threshold / 2^31.

    Philox's counter is (query, key // 4, batch x head) and the key picks one of the four words of its output: no two
    elements share a number, whatever the shapes, and every kernel finds the same one whatever its blocks."""
    query = (m + tl.arange(0, BLOCK_M))[:, None]
    key = (n // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    words = tl.philox(tl.load(seed), query + zero, key + zero, head_row + zero, zero, PHILOX_ROUNDS)
    k0 = ((words[0] >> 1).to(tl.int32) >= threshold).to(tl.int8)
    k1 = ((words[1] >> 1).to(tl.int32) >= threshold).to(tl.int8)
    k2 = ((words[2] >> 1).to(tl.int32) >= threshold).to(tl.int8)
    k3 = ((words[3] >> 1).to(tl.int32) >= threshold).to(tl.int8)
    return tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), [BLOCK_M, BLOCK_N]) != 0


# ---- Products -------------------------------------------------------------------------------------------------------


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


# ---- Kernels --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T_q", "T_k", "window", "threshold"])
def forward(
    q, k, v, out, out_form, lse, kv_len, docs, seed, q_strides, k_strides, v_strides, out_strides,
    H, T_q, T_k, window, c, threshold, inv_keep, D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    ALIGNED: tl.constexpr, FLIP: tl.constexpr, FP16_SUMS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M queries of one head. ``c`` is |scale| log2(e); FLIP: scale is negative.

    Grid: blocks of queries x heads x batch, blocks fastest and last (heaviest, when causal) first."""
    n_blocks = tl.cdiv(T_q, BLOCK_M)
    m = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_M
    head_row = tl.program_id(0) // n_blocks
    batch = head_row // H
    head = head_row % H
    if docs is not None:
        docs += batch.to(tl.int64) * T_k
    offset, n_keys = _alignment(kv_len, batch, T_q, T_k)
    lo, full_lo, full_hi, hi = _key_blocks(m, offset, T_q, n_keys, T_k, docs, window, CAUSAL, ALIGNED, BLOCK_M, BLOCK_N)
    q_base, q_stride = _matrix(q, q_strides, batch, head)
    k_base, k_stride = _matrix(k, k_strides, batch, head // GROUP)
    v_base, v_stride = _matrix(v, v_strides, batch, head // GROUP)
    out_base, out_stride = _matrix(out, out_strides, batch, head)

    query = m + tl.arange(0, BLOCK_M)
    q_tile = _load(q_base, q_stride, m, T_q, D, BLOCK_M, BLOCK_D, True)
    if FLIP:
        q_tile = (-q_tile.to(tl.float32)).to(q_tile.dtype)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], HIDDEN, tl.float32)
    for part in tl.static_range(3):
        start = lo if part == 0 else (full_lo if part == 1 else full_hi)
        stop = full_lo if part == 0 else (full_hi if part == 1 else hi)
        if part > 0 or window is not None:
            for n in range(start, stop, BLOCK_N):
                k_tile = _load(k_base, k_stride, n, n_keys, D, BLOCK_N, BLOCK_D, part != 1)
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                if part != 1:
                    key = n + tl.arange(0, BLOCK_N)
                    seen = _visible((query + offset)[:, None], key[None, :], docs, n_keys, T_k, window, CAUSAL, ALIGNED)
                    s = tl.where(seen, s, HIDDEN)
                new_peak = tl.maximum(peak, tl.max(s, 1) * c)
                p = tl.exp2(s * c - new_peak[:, None])
                if part != 1:
                    p = tl.where(seen, p, 0.0)
                shrink = tl.exp2(peak - new_peak)
                total = total * shrink + tl.sum(p, 1)  # of all p: dropout comes after the softmax
                peak = new_peak
                if seed is not None:
                    p = tl.where(_kept(seed, m, n, head_row, threshold, BLOCK_M, BLOCK_N), p, 0.0)
                v_tile = _load(v_base, v_stride, n, n_keys, D, BLOCK_N, BLOCK_D, part != 1)
                acc = _add_dot(acc * shrink[:, None], p.to(v_tile.dtype), v_tile, FP16_SUMS)

    sees_any = total > 0
    acc = acc * (inv_keep / tl.where(sees_any, total, 1.0))[:, None]
    _store(acc, out_base, out_stride, m, T_q, D, BLOCK_M, BLOCK_D)
    if out_form is not None:
        _store_fp8(acc.to(out.dtype.element_ty), out_form, out_strides, batch, head, m, T_q, D, BLOCK_M, BLOCK_D)
    log_sum = tl.where(sees_any, peak + tl.log2(tl.where(sees_any, total, 1.0)), float("inf"))
    tl.store(lse + head_row.to(tl.int64) * T_q + query, log_sum, mask=query < T_q)


@triton.jit(do_not_specialize=["T_q", "T_k", "window", "threshold"])
def backward_q(
    q, k, v, out, grad_out, lse, delta, grad_q, grad_q_form, kv_len, docs, seed, q_strides, k_strides,
    v_strides, out_strides, grad_out_strides, grad_q_strides, H, T_q, T_k, window, c, scale, threshold, inv_keep,
    D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr, FP16_SUMS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_q, and delta for ``backward_kv``, of BLOCK_M queries of one head. Grid as ``forward``."""
    n_blocks = tl.cdiv(T_q, BLOCK_M)
    m = (n_blocks - 1 - tl.program_id(0) % n_blocks) * BLOCK_M
    head_row = tl.program_id(0) // n_blocks
    batch = head_row // H
    head = head_row % H
    if docs is not None:
        docs += batch.to(tl.int64) * T_k
    offset, n_keys = _alignment(kv_len, batch, T_q, T_k)
    lo, full_lo, full_hi, hi = _key_blocks(m, offset, T_q, n_keys, T_k, docs, window, CAUSAL, ALIGNED, BLOCK_M, BLOCK_N)
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
    row_delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + statistics, row_delta, mask=query < T_q)
    row_lse = tl.load(lse + statistics, mask=query < T_q, other=float("inf"))
    q_tile = _load(q_base, q_stride, m, T_q, D, BLOCK_M, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(3):
        start = lo if part == 0 else (full_lo if part == 1 else full_hi)
        stop = full_lo if part == 0 else (full_hi if part == 1 else hi)
        if part > 0 or window is not None:
            for n in range(start, stop, BLOCK_N):
                k_tile = _load(k_base, k_stride, n, n_keys, D, BLOCK_N, BLOCK_D, part != 1)
                if q_tile.dtype == tl.float32:  # or q is read before a barrier and kept in registers across it: spills
                    tl.debug_barrier()
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                p = tl.exp2(s * c - row_lse[:, None])
                if part != 1:
                    key = n + tl.arange(0, BLOCK_N)
                    seen = _visible((query + offset)[:, None], key[None, :], docs, n_keys, T_k, window, CAUSAL, ALIGNED)
                    p = tl.where(seen, p, 0.0)
                v_tile = _load(v_base, v_stride, n, n_keys, D, BLOCK_N, BLOCK_D, part != 1)
                if q_tile.dtype == tl.float32:
                    tl.debug_barrier()
                dp = _dot(do_tile, tl.trans(v_tile), FP16_SUMS and BLOCK_D <= CHUNK)
                if seed is not None:
                    dp = tl.where(_kept(seed, m, n, head_row, threshold, BLOCK_M, BLOCK_N), dp * inv_keep, 0.0)
                ds = p * (dp - row_delta[:, None])
                acc = _add_dot(acc, ds.to(k_tile.dtype), k_tile, FP16_SUMS)
    dq = (acc * scale).to(grad_q.dtype.element_ty)
    _store(dq, dq_base, dq_stride, m, T_q, D, BLOCK_M, BLOCK_D)
    if grad_q_form is not None:
        _store_fp8(dq, grad_q_form, grad_q_strides, batch, head, m, T_q, D, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["T_q", "T_k", "window", "threshold"])
def backward_kv(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, grad_k_form, grad_v_form, kv_len, docs, seed,
    q_strides, k_strides, v_strides, grad_out_strides, grad_k_strides, grad_v_strides, H, T_q, T_k, window, c, scale,
    threshold, inv_keep, D: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, ALIGNED: tl.constexpr,
    FP16_SUMS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_k and grad_v of BLOCK_N keys of one key/value head, summed over its GROUP of query heads.

    Grid: blocks of keys x key/value heads x batch, blocks fastest; the first blocks are the heaviest when causal. Tiles
    are transposed, (keys, queries): P^T and dS^T then are first operands of their dots as they stand."""
    n_blocks = tl.cdiv(T_k, BLOCK_N)
    n = (tl.program_id(0) % n_blocks) * BLOCK_N
    kv_row = tl.program_id(0) // n_blocks
    batch = kv_row // (H // GROUP)
    kv_head = kv_row % (H // GROUP)
    if docs is not None:
        docs += batch.to(tl.int64) * T_k
    offset, n_keys = _alignment(kv_len, batch, T_q, T_k)
    lo, full_lo, full_hi, hi = _query_blocks(
        n, offset, T_q, n_keys, T_k, docs, window, CAUSAL, ALIGNED, BLOCK_M, BLOCK_N
    )
    k_base, k_stride = _matrix(k, k_strides, batch, kv_head)
    v_base, v_stride = _matrix(v, v_strides, batch, kv_head)
    dk_base, dk_stride = _matrix(grad_k, grad_k_strides, batch, kv_head)
    dv_base, dv_stride = _matrix(grad_v, grad_v_strides, batch, kv_head)

    key = n + tl.arange(0, BLOCK_N)
    k_tile = _load(k_base, k_stride, n, n_keys, D, BLOCK_N, BLOCK_D, True)
    v_tile = _load(v_base, v_stride, n, n_keys, D, BLOCK_N, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        head_row = batch * H + head
        q_base, q_stride = _matrix(q, q_strides, batch, head)
        do_base, do_stride = _matrix(grad_out, grad_out_strides, batch, head)
        row_statistics = head_row.to(tl.int64) * T_q
        for part in tl.static_range(3):
            start = lo if part == 0 else (full_lo if part == 1 else full_hi)
            stop = full_lo if part == 0 else (full_hi if part == 1 else hi)
            for m in range(start, stop, BLOCK_M):
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
                dropped = p
                if seed is not None:
                    kept = tl.trans(_kept(seed, m, n, head_row, threshold, BLOCK_M, BLOCK_N))
                    dropped = tl.where(kept, p, 0.0)
                    dp = tl.where(kept, dp * inv_keep, 0.0)
                dv = _add_dot(dv, dropped.to(do_tile.dtype), do_tile, FP16_SUMS)
                ds = p * (dp - row_delta[None, :])
                dk = _add_dot(dk, ds.to(q_tile.dtype), q_tile, FP16_SUMS)
    dk_rounded = (dk * scale).to(grad_k.dtype.element_ty)
    dv_rounded = (dv * inv_keep).to(grad_v.dtype.element_ty)
    _store(dk_rounded, dk_base, dk_stride, n, T_k, D, BLOCK_N, BLOCK_D)
    _store(dv_rounded, dv_base, dv_stride, n, T_k, D, BLOCK_N, BLOCK_D)
    if grad_k_form is not None:
        _store_fp8(dk_rounded, grad_k_form, grad_k_strides, batch, kv_head, n, T_k, D, BLOCK_N, BLOCK_D)
        _store_fp8(dv_rounded, grad_v_form, grad_v_strides, batch, kv_head, n, T_k, D, BLOCK_N, BLOCK_D)
