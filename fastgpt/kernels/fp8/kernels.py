"""The @triton.jit functions of ops.py: a matmul of fp8 operands whose epilogue quantises its own result, the same
epilogue as a sweep, and a quantiser for tensors that no kernel of ours has made.

Sums: products of BK of K, 64 or a group of fewer, in the tensor core's accumulator, these sums in fp32. Ada's and Hopper's
tensor cores keep 13 fraction bits of fp8 sums, which at K = 65,536 would triple the error; every 128 would do
(docs/precision-modes.md).

Scales of a result that no program has a whole row of: |x_m . w_n| <= ||x_m|| ||w_n|| (Cauchy-Schwarz), so
``scale_m = (||x_m|| max_n ||w_n|| + max |b|) / F`` is known before the matmul begins and nothing can overflow, whatever tile
sees which columns. It is 8 to 30 times larger than the row needs, which a floating format hardly feels: e4m3 has full
precision over 15 octaves, e5m2 over 30. |gelu(z)| <= |z|, and |gelu'| <= 1.13.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgpt.kernels.matmul import gelu, gelu_grad, store_column_sums, tile_of
from fastgpt.kernels.quantise import nearest, norm_bound, row_scale, scaled_down

CHUNK = 64
"""Products along K that the tensor cores sum before they are added up in fp32."""


@triton.jit
def _quantise_bounded(value, rm, in_m, out, mask, first, Q, SCALE, NORM, MAX_NORM, MAX_BIAS, BACKWARD: tl.constexpr):
    """Write a tile of a matmul's result, after GELU or its gradient, 16 bits: Q, and SCALE where ``first`` (a tile per row)."""
    bound = tl.load(NORM + rm, mask=in_m, other=0.0) * tl.load(MAX_NORM)
    if MAX_BIAS is not None:
        bound += tl.load(MAX_BIAS)
    scale = row_scale(bound * 1.13 if BACKWARD else bound, Q)
    tl.store(Q + out, nearest(scaled_down(value.to(tl.float32), scale), Q), mask=mask)
    tl.store(SCALE + rm, scale, mask=in_m & first)  # all tiles of a row have the same


@triton.jit
def fp8_linear_kernel(
    A, B, SCALE_A, SCALE_B, BIAS, PRE, C, COLUMN_SUM, Q, SCALE, NORM, MAX_NORM, MAX_BIAS, M, N, K,
    EPILOGUE: tl.constexpr, ERF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """C (M, N) = epilogue(z), z = SCALE_A A B^T SCALE_B (+ BIAS) in fp32; A (M, K) and B (N, K) fp8, all contiguous.

    SCALE_A (M,), SCALE_B (N,); with COLUMNS, not 0 (which divides K, and BK it; epilogue "none") SCALE_A (K / COLUMNS, M), a
    scale for so many columns of a row of A.

    "none": z
    "gelu": PRE = z, C = gelu(z), and gelu(z) in fp8 as Q with SCALE
    "dgelu": C = z gelu'(PRE), and that in fp8; COLUMN_SUM, if given, as of linear_kernel
    """
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    rm, rn, rk = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    in_m, in_n = rm < M, rn < N
    # K is contiguous in both: 8-bit tensor-core operands are read along the summed side.
    a_ptr = A + rm.to(tl.int64)[:, None] * K + rk[None, :]
    b_ptr = B + rn.to(tl.int64)[None, :] * K + rk[:, None]
    tl.static_assert(COLUMNS % BK == 0)  # a chunk of K lies in one group: one scale per row and chunk
    z = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        if EVEN_K:  # no mask along K, which would split the loads
            a = tl.load(a_ptr, mask=in_m[:, None], other=0.0)
            b = tl.load(b_ptr, mask=in_n[None, :], other=0.0)
        else:
            a = tl.load(a_ptr, mask=in_m[:, None] & (k + rk < K)[None, :], other=0.0)
            b = tl.load(b_ptr, mask=in_n[None, :] & (k + rk < K)[:, None], other=0.0)
        # The limit keeps the compiler from folding this sum into the tensor core's.
        if COLUMNS:
            group = tl.full([], k // COLUMNS, tl.int64)
            scale = tl.load(SCALE_A + group * M + rm, mask=in_m, other=0.0)
            z += tl.dot(a, b, max_num_imprecise_acc=BK) * scale[:, None]
        else:
            z += tl.dot(a, b, max_num_imprecise_acc=BK)
        a_ptr += BK
        b_ptr += BK
    if not COLUMNS:  # one scale for all of a row comes out of the sum
        z *= tl.load(SCALE_A + rm, mask=in_m, other=0.0)[:, None]
    z *= tl.load(SCALE_B + rn, mask=in_n, other=0.0)[None, :]
    mask, out = in_m[:, None] & in_n[None, :], rm.to(tl.int64)[:, None] * N + rn[None, :]
    if BIAS is not None:
        z += tl.load(BIAS + rn, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == "gelu":
        tl.store(PRE + out, z.to(PRE.dtype.element_ty), mask=mask)
        z = gelu(z, ERF)
    elif EPILOGUE == "dgelu":
        z *= gelu_grad(tl.load(PRE + out, mask=mask, other=0.0).to(tl.float32), ERF)
    # What is quantised and summed below is C as stored: the fp8 form is then the same as a pass over C would make.
    rounded = z.to(C.dtype.element_ty)
    tl.store(C + out, rounded, mask=mask)
    if COLUMN_SUM is not None:
        store_column_sums(rounded, mask, COLUMN_SUM, pid_m, rn, N)
    if Q is not None:
        _quantise_bounded(
            rounded, rm, in_m, out, mask, pid_n == 0, Q, SCALE, NORM, MAX_NORM, MAX_BIAS, EPILOGUE == "dgelu"
        )


@triton.jit
def fp8_sweep_kernel(
    Z, DY, OUT, COLUMN_SUM, Q, SCALE, NORM, MAX_NORM, MAX_BIAS, M, N,
    BACKWARD: tl.constexpr, ERF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The two quantising epilogues of fp8_linear_kernel behind a matmul that has none: OUT and Q with SCALE = gelu(Z), or
    with BACKWARD DY gelu'(Z). All (M, N) contiguous. COLUMN_SUM as of linear_kernel."""
    rm, rn = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    in_m = rm < M
    mask, out = in_m[:, None] & (rn < N)[None, :], rm.to(tl.int64)[:, None] * N + rn[None, :]
    z = tl.load(Z + out, mask=mask, other=0.0).to(tl.float32)
    value = gelu(z, ERF) if not BACKWARD else gelu_grad(z, ERF) * tl.load(DY + out, mask=mask, other=0.0).to(tl.float32)
    rounded = value.to(OUT.dtype.element_ty)
    tl.store(OUT + out, rounded, mask=mask)
    if COLUMN_SUM is not None:
        store_column_sums(rounded, mask, COLUMN_SUM, tl.program_id(0), rn, N)
    first = tl.program_id(1) == 0
    _quantise_bounded(rounded, rm, in_m, out, mask, first, Q, SCALE, NORM, MAX_NORM, MAX_BIAS, BACKWARD)


@triton.jit
def fp8_quantise_kernel(
    X, Q, SCALE, NORM, M, K, stride_m, stride_k, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Q (M, K) contiguous, SCALE and NORM (M,) of X (M, K) with any strides. A program has ROWS rows, and reads them twice: the
    second time from cache."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_m = rows < M
    x_row = X + rows[:, None] * stride_m
    amax = tl.zeros((ROWS,), tl.float32)
    for first in range(0, K, BLOCK):
        cols = first + tl.arange(0, BLOCK).to(tl.int64)
        x = tl.load(x_row + cols[None, :] * stride_k, mask=in_m[:, None] & (cols < K)[None, :], other=0.0)
        amax = tl.maximum(amax, tl.max(tl.abs(x.to(tl.float32)), axis=1))
    scale = row_scale(amax, Q)
    squares = tl.zeros((ROWS,), tl.float32)
    for first in range(0, K, BLOCK):
        cols = first + tl.arange(0, BLOCK).to(tl.int64)
        mask = in_m[:, None] & (cols < K)[None, :]
        x = tl.load(x_row + cols[None, :] * stride_k, mask=mask, other=0.0).to(tl.float32)
        x = scaled_down(x, scale)
        tl.store(Q + rows[:, None] * K + cols[None, :], nearest(x, Q), mask=mask)
        squares += tl.sum(x * x, axis=1)
    tl.store(SCALE + rows, scale, mask=in_m)
    tl.store(NORM + rows, norm_bound(squares, scale, Q), mask=in_m)
