"""The @triton.jit functions of fused_linear.py: one matmul with epilogues, one weight gradient, and two that sweep memory.

Every matmul of a linear layer is ``C (M, N) = A (M, K) B (K, N)`` of operands with any strides; a transposed weight or
activation is the same memory with its strides exchanged. Tiles of C are computed by one program each, in an order that
keeps GROUP rows of tiles together, so that programs that run at once read the same columns of B from L2.

Arithmetic: operands as they lie in memory (16 bit: tensor cores; fp32: true fp32), sums in fp32. With CHUNK > 0 (fp16
only) products are summed in fp16 over CHUNK blocks of K, which GeForce tensor cores do at twice the rate, and each such
sum is added to the fp32 accumulator: the error does not grow with K.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastgpt.kernels._layernorm_kernels import dropout


@triton.jit
def gelu(x, ERF: tl.constexpr):
    """GELU of fp32 x: x Phi(x), or Phi's tanh approximation (Hendrycks & Gimpel 2016). sigmoid(2u) = (1 + tanh u) / 2."""
    if ERF:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * tl.sigmoid(x * (1.5957691216057308 + 0.07135481627159963 * x * x))


@triton.jit
def gelu_grad(x, ERF: tl.constexpr):
    """Its derivative at fp32 x."""
    if ERF:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    s = tl.sigmoid(x * (1.5957691216057308 + 0.07135481627159963 * x * x))
    return s + x * s * (1.0 - s) * (1.5957691216057308 + 0.21406444881479889 * x * x)


@triton.jit
def tile_of(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row, column) of the tile that program ``pid`` computes: column by column within GROUP rows of tiles."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * columns) * GROUP
    size = tl.minimum(rows - first, GROUP)
    within = pid % (GROUP * columns)
    return first + within % size, within // size


@triton.jit
def _product(
    A, B, rm, rn, M, N, first, last, stride_am, stride_ak, stride_bk, stride_bn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, CHUNK: tl.constexpr,
    ROW_SUM: tl.constexpr,
):  # fmt: skip
    """fp32 tile A[rm, first:last] B[first:last, rn], and with ROW_SUM the sums of A's rows over that range (else zeros).

    EVEN_K: last - first is a multiple of BK."""
    rk = tl.arange(0, BK)
    in_m, in_n = (rm < M)[:, None], (rn < N)[None, :]
    k = first.to(tl.int64) + rk
    a_ptr = A + rm.to(tl.int64)[:, None] * stride_am + k[None, :] * stride_ak
    b_ptr = B + k[:, None] * stride_bk + rn.to(tl.int64)[None, :] * stride_bn
    one_step = tl.full((), BK, tl.int64)
    step_a, step_b = one_step * stride_ak, one_step * stride_bk
    acc = tl.zeros((BM, BN), tl.float32)
    part = tl.zeros((BM, BN), tl.float16)
    row_sum = tl.zeros((BM,), tl.float32)
    steps = tl.cdiv(last - first, BK)
    for step in range(steps):
        if EVEN_K:
            a, b = tl.load(a_ptr, mask=in_m, other=0.0), tl.load(b_ptr, mask=in_n, other=0.0)
        else:
            in_k = rk < last - first - step * BK
            a = tl.load(a_ptr, mask=in_m & in_k[None, :], other=0.0)
            b = tl.load(b_ptr, mask=in_n & in_k[:, None], other=0.0)
        if CHUNK == 0:
            acc = tl.dot(a, b, acc, input_precision="ieee")
        elif CHUNK == 1:
            acc += tl.dot(a, b, out_dtype=tl.float16).to(tl.float32)
        else:
            part = tl.dot(a, b, part, out_dtype=tl.float16)
            if step % CHUNK == CHUNK - 1:
                acc += part.to(tl.float32)
                part = tl.zeros((BM, BN), tl.float16)
        if ROW_SUM:
            row_sum += tl.sum(a.to(tl.float32), axis=1)
        a_ptr += step_a
        b_ptr += step_b
    if CHUNK > 1:
        acc += part.to(tl.float32)
    return acc, row_sum


@triton.jit
def store_column_sums(tile, mask, COLUMN_SUM, row, rn, N):
    """The sums of a tile's columns, into their places in that row of COLUMN_SUM (rows, N)."""
    total = tl.sum(tl.where(mask, tile.to(tl.float32), 0.0), axis=0)
    tl.store(COLUMN_SUM + row.to(tl.int64) * N + rn, total, mask=rn < N)


@triton.jit
def linear_kernel(
    A, B, BIAS, PRE, RESIDUAL, SEED, C, COLUMN_SUM, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_residual, dropout_p,
    EPILOGUE: tl.constexpr, ERF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """C = epilogue(A B), C and PRE (M, N) contiguous. EPILOGUE, on the fp32 tile z of A B (+ BIAS):

    "none": z, then dropout with SEED, then + RESIDUAL, each if given
    "gelu": PRE = z (if PRE is given), C = gelu(z), from z in fp32
    "dgelu": C = z gelu'(PRE)

    COLUMN_SUM (rows of tiles, N), fp32, may be None: the sums of C's columns in each tile, as C holds them.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    rm, rn = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    z, _ = _product(
        A, B, rm, rn, M, N, tl.zeros((), tl.int32), K, stride_am, stride_ak, stride_bk, stride_bn,
        BM, BN, BK, EVEN_K, CHUNK, False,
    )  # fmt: skip
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    out = rm.to(tl.int64)[:, None] * N + rn[None, :]
    if BIAS is not None:
        z += tl.load(BIAS + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == "gelu":
        if PRE is not None:
            tl.store(PRE + out, z.to(PRE.dtype.element_ty), mask=mask)
        z = gelu(z, ERF)
    elif EPILOGUE == "dgelu":
        z *= gelu_grad(tl.load(PRE + out, mask=mask, other=0.0).to(tl.float32), ERF)
    if SEED is not None:
        z = dropout(z, SEED, rm, pid_n * BN, dropout_p, BM, BN)
    if RESIDUAL is not None:
        residual = RESIDUAL + rm.to(tl.int64)[:, None] * stride_residual + rn[None, :]
        z += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    rounded = z.to(C.dtype.element_ty)
    tl.store(C + out, rounded, mask=mask)
    if COLUMN_SUM is not None:
        store_column_sums(rounded, mask, COLUMN_SUM, pid_m, rn, N)


@triton.jit
def weight_grad_kernel(
    A, B, C, ROW_SUM, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn, per_split,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (i, s): tile i of C[s] = A B over K from s per_split to (s + 1) per_split, and ROW_SUM[s] = A's row sums.

    Here A is dy^T and B is x, so K counts tokens, C is dW and the row sums are the bias gradient (ROW_SUM may be None).
    C is (splits, M, N), the C[s] M N elements apart. ADD: to what C holds (one split only)."""
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    split = tl.program_id(1)
    rm, rn = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    first = split * per_split
    acc, row_sum = _product(
        A, B, rm, rn, M, N, first, tl.minimum(first + per_split, K), stride_am, stride_ak, stride_bk, stride_bn,
        BM, BN, BK, EVEN_K, CHUNK, ROW_SUM is not None,
    )  # fmt: skip
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    c_ptr = C + split.to(tl.int64) * M * N + rm.to(tl.int64)[:, None] * stride_cm + rn.to(tl.int64)[None, :] * stride_cn
    if ADD:
        acc += tl.load(c_ptr, mask=mask, other=0.0)
    tl.store(c_ptr, acc.to(C.dtype.element_ty), mask=mask)
    if ROW_SUM is not None:  # every column of tiles has them
        tl.store(ROW_SUM + split * M + rm, row_sum.to(ROW_SUM.dtype.element_ty), mask=(rm < M) & (pid_n == 0))


@triton.jit
def sum_splits_kernel(PARTIAL, OUT, size, splits, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """OUT (size,) = the sum of PARTIAL (splits, size) fp32, first to last (+ OUT with ADD)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    stride = tl.full((), size, tl.int64)  # an argument that is 1 is a plain int to triton, without .to
    for split in range(splits):
        total += tl.load(PARTIAL + split * stride + at, mask=mask, other=0.0)
    if ADD:
        total += tl.load(OUT + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(OUT + at, total.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def pointwise_grad_kernel(
    DY, PRE, SEED, DZ, COLUMN_SUM, M, N, stride_m, stride_n, dropout_p,
    ERF: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (i, j): DZ = DY gelu'(PRE), or DY through the dropout of SEED, for ROWS rows and BN columns; and
    COLUMN_SUM[i] = the sums of these columns as DZ holds them (may be None). PRE and DZ (M, N) contiguous."""
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    for start in range(0, ROWS, BM):
        rm = tl.program_id(0).to(tl.int64) * ROWS + start + tl.arange(0, BM)
        mask = (rm < M)[:, None] & (rn < N)[None, :]
        at = rm[:, None] * N + rn[None, :]
        dz = tl.load(DY + rm[:, None] * stride_m + rn.to(tl.int64)[None, :] * stride_n, mask=mask, other=0.0)
        dz = dz.to(tl.float32)
        if PRE is not None:
            dz *= gelu_grad(tl.load(PRE + at, mask=mask, other=0.0).to(tl.float32), ERF)
        if SEED is not None:
            dz = dropout(dz, SEED, rm, tl.program_id(1) * BN, dropout_p, BM, BN)
        rounded = dz.to(DZ.dtype.element_ty)
        tl.store(DZ + at, rounded, mask=mask)
        if COLUMN_SUM is not None:
            total += tl.sum(rounded.to(tl.float32), axis=0)
    if COLUMN_SUM is not None:
        tl.store(COLUMN_SUM + tl.program_id(0) * N + rn, total, mask=rn < N)
