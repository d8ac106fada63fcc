"""Random bits inside kernels: which elements dropout keeps, and stochastic rounding. Philox-4x32, Salmon et al. 2011."""

from __future__ import annotations

import triton
import triton.language as tl

PHILOX_ROUNDS = tl.constexpr(7)
"""Seven rounds pass BigCrush (Salmon et al. 2011, table 2); ten, the usual number, only add margin."""


@triton.jit
def _interleaved(a, b, c, d):
    """Four tiles (..., n) as one (..., n, 2, 2) whose elements lie in memory order a[0] b[0] c[0] d[0] a[1] ...: the four words
    of a Philox call are those of four neighbours."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def keep_mask(seed, m, n, head_row, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Attention's dropout mask of the tile of P at (m, n), kept with probability 1 - threshold / 2^31.

    Philox's counter is (query, key // 4, batch x head) and the key picks one of the four words of its output: no two
    elements share a number, whatever the shapes, and every kernel finds the same one whatever its blocks."""
    query = (m + tl.arange(0, BLOCK_M))[:, None]
    key = (n // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    zero = tl.zeros([BLOCK_M, BLOCK_N // 4], tl.int32)
    words = tl.philox(tl.load(seed), query + zero, key + zero, head_row + zero, zero, PHILOX_ROUNDS)
    # The upper 31 bits: as int32 they are not negative, and compare with the threshold.
    k0 = ((words[0] >> 1).to(tl.int32) >= threshold).to(tl.int8)
    k1 = ((words[1] >> 1).to(tl.int32) >= threshold).to(tl.int8)
    k2 = ((words[2] >> 1).to(tl.int32) >= threshold).to(tl.int8)
    k3 = ((words[3] >> 1).to(tl.int32) >= threshold).to(tl.int8)
    return tl.reshape(_interleaved(k0, k1, k2, k3), [BLOCK_M, BLOCK_N]) != 0


@triton.jit
def dropout(value, SEED, rows, first_col, p, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Dropout of a (ROWS, BLOCK) fp32 tile that starts at column first_col, a multiple of 4.

    Philox's counter is (column // 4, row): forward, backward and every kernel find the same mask whatever their blocks."""
    zero = tl.zeros((ROWS, BLOCK // 4), tl.int32)
    group = zero + (first_col // 4 + tl.arange(0, BLOCK // 4))[None, :]
    a, b, c, d = tl.philox(tl.load(SEED), group, zero + rows.to(tl.int32)[:, None], zero, zero)
    a, b = tl.uint_to_uniform_float(a) >= p, tl.uint_to_uniform_float(b) >= p
    c, d = tl.uint_to_uniform_float(c) >= p, tl.uint_to_uniform_float(d) >= p
    # As bytes: what a bool is when it moves between threads.
    keep = _interleaved(a.to(tl.int8), b.to(tl.int8), c.to(tl.int8), d.to(tl.int8))
    scale = 1.0 / tl.maximum(1.0 - p, 1e-30)  # finite for p = 1, which keeps nothing
    return tl.where(tl.reshape(keep, (ROWS, BLOCK)) != 0, value * scale, 0.0)


@triton.jit
def stochastic_bf16(x, seed, tensor, step, first, BLOCK: tl.constexpr):
    """Round fp32 up or down to bf16, with the odds that make the mean x. ``first``, a multiple of 4, is the index of
    x's first element in its tensor: one Philox call serves four elements."""
    quad = first // 4 + tl.arange(0, BLOCK // 4)
    low = quad.to(tl.uint32)
    zero = low * 0
    r0, r1, r2, r3 = tl.philox(seed, low, (quad >> 32).to(tl.uint32), zero + tensor.to(tl.uint32), zero + step)
    bits = _interleaved(r0, r1, r2, r3).reshape(BLOCK)
    # A random number below one bf16 step, then cut off: it carries with the odds of what would be cut off.
    rounded = (x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
    # Not for NaN: a GPU's is 0x7FFFFFFF, and adding to those bits makes -0.
    return tl.where(tl.abs(x) < float("inf"), rounded.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
