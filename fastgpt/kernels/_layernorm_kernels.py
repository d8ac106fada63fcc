"""The @triton.jit functions of fused_layernorm.py, and the dropout that the linears and the embedding share with it."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgpt.kernels._fp8_rows import quantise_rows


@triton.jit
def dropout(value, SEED, rows, first_col, p, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Dropout of a (ROWS, BLOCK) fp32 tile that starts at column first_col, a multiple of 4."""
    zero = tl.zeros((ROWS, BLOCK // 4), tl.int32)
    group = zero + (first_col // 4 + tl.arange(0, BLOCK // 4))[None, :]
    a, b, c, d = tl.philox(tl.load(SEED), group, zero + rows.to(tl.int32)[:, None], zero, zero)
    a, b = tl.uint_to_uniform_float(a) >= p, tl.uint_to_uniform_float(b) >= p
    c, d = tl.uint_to_uniform_float(c) >= p, tl.uint_to_uniform_float(d) >= p
    # As bytes: what a bool is when it moves between threads.
    keep = tl.join(tl.join(a.to(tl.int8), c.to(tl.int8)), tl.join(b.to(tl.int8), d.to(tl.int8)))
    scale = 1.0 / tl.maximum(1.0 - p, 1e-30)  # finite for p = 1, which keeps nothing
    return tl.where(tl.reshape(keep, (ROWS, BLOCK)) != 0, value * scale, 0.0)


@triton.jit(do_not_specialize=["n_rows"])
def layer_norm_forward_kernel(
    X, RESIDUAL, WEIGHT, BIAS, SEED, Y, SUM, MEAN, RSTD, Q, SCALE, NORM,
    n_rows, x_stride, residual_stride, eps, dropout_p,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ROWS whole rows. RESIDUAL and SUM, BIAS, SEED, and Q, SCALE and NORM (y in fp8) may be None."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    row_mask = rows < n_rows
    mask = row_mask[:, None] & (cols < C)[None, :]
    out = (rows * C)[:, None] + cols[None, :]
    s = tl.load(X + (rows * x_stride)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if SEED is not None:
        s = dropout(s, SEED, rows, 0, dropout_p, ROWS, BLOCK)
        if RESIDUAL is None:
            s = s.to(X.dtype.element_ty).to(tl.float32)
    if RESIDUAL is not None:
        residual = RESIDUAL + (rows * residual_stride)[:, None] + cols[None, :]
        s += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
        # The norm reads the sum as backward will: rounded.
        rounded = s.to(SUM.dtype.element_ty)
        tl.store(SUM + out, rounded, mask=mask)
        s = rounded.to(tl.float32)

    mean = tl.sum(s, axis=1) / C
    centred = tl.where((cols < C)[None, :], s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    tl.store(MEAN + rows, mean, mask=row_mask)
    tl.store(RSTD + rows, rstd, mask=row_mask)

    y = centred * rstd[:, None] * tl.load(WEIGHT + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    if BIAS is not None:
        y += tl.load(BIAS + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    y = y.to(Y.dtype.element_ty)
    tl.store(Y + out, y, mask=mask)
    if Q is not None:
        quantise_rows(y.to(tl.float32), rows, row_mask, out, mask, Q, SCALE, NORM)


@triton.jit
def _xhat_and_dy(
    s_row, dy_row, S_SEED, mean, rstd, rows, row_mask, first_col, dropout_p,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """xhat and dy of one tile, fp32; dy is 0 past the edges. s_row, dy_row: pointers to column 0, (ROWS,)."""
    cols = first_col + tl.arange(0, BLOCK)
    mask = row_mask[:, None] & (cols < C)[None, :]
    s = tl.load(s_row[:, None] + cols[None, :], mask=mask, other=0.0)
    dy = tl.load(dy_row[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if S_SEED is not None:
        dropped = dropout(s.to(tl.float32), S_SEED, rows, first_col, dropout_p, ROWS, BLOCK)
        s = dropped.to(s.dtype)
    return (s.to(tl.float32) - mean[:, None]) * rstd[:, None], dy


@triton.jit(do_not_specialize=["n_rows"])
def layer_norm_backward_kernel(
    DY, DSUM, S, WEIGHT, MEAN, RSTD, SEED, S_SEED, DX, DRESIDUAL, DW_PARTIAL, DB_PARTIAL, Q, SCALE, NORM,
    n_rows, dy_stride, dsum_stride, s_stride, dropout_p,
    C: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, j): tiles i, i + programs, ... of ROWS rows; columns [j BLOCK, (j + 1) BLOCK) of CHUNKS such.

    S_SEED is SEED where S holds x before its dropout (no residual). May be None: DSUM (s got no gradient), DRESIDUAL
    (it equals DX), the seeds (no dropout), DW_PARTIAL and DB_PARTIAL (no such gradient is wanted), Q, SCALE and NORM (dx in
    fp8; with CHUNKS = 1 only).
    """
    chunk = tl.program_id(1)
    first_col = chunk * BLOCK
    cols = first_col + tl.arange(0, BLOCK)
    weight = tl.load(WEIGHT + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    first_tile = tl.program_id(0).to(tl.int64)
    for tile in tl.range(first_tile, tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        row_mask = rows < n_rows
        mask = row_mask[:, None] & (cols < C)[None, :]
        out = (rows * C)[:, None] + cols[None, :]
        mean = tl.load(MEAN + rows, mask=row_mask, other=0.0)
        rstd = tl.load(RSTD + rows, mask=row_mask, other=0.0)
        s_row, dy_row = S + rows * s_stride, DY + rows * dy_stride
        xhat, dy = _xhat_and_dy(s_row, dy_row, S_SEED, mean, rstd, rows, row_mask, first_col, dropout_p, C, ROWS, BLOCK)
        if DW_PARTIAL is not None:
            dw += dy * xhat
        if DB_PARTIAL is not None:
            db += dy
        g = dy * weight
        mean_g = tl.sum(g, axis=1) / C
        mean_g_xhat = tl.sum(g * xhat, axis=1) / C
        for step in range(1, CHUNKS):  # the rest of these rows, which other programs own
            other_first = (chunk + step) % CHUNKS * BLOCK
            other_cols = other_first + tl.arange(0, BLOCK)
            other_weight = tl.load(WEIGHT + other_cols, mask=other_cols < C, other=0.0).to(tl.float32)[None, :]
            other_xhat, other_dy = _xhat_and_dy(
                s_row, dy_row, S_SEED, mean, rstd, rows, row_mask, other_first, dropout_p, C, ROWS, BLOCK
            )
            mean_g += tl.sum(other_dy * other_weight, axis=1) / C
            mean_g_xhat += tl.sum(other_dy * other_weight * other_xhat, axis=1) / C
        ds = (g - mean_g[:, None] - xhat * mean_g_xhat[:, None]) * rstd[:, None]
        if DSUM is not None:
            dsum = DSUM + (rows * dsum_stride)[:, None] + cols[None, :]
            ds += tl.load(dsum, mask=mask, other=0.0).to(tl.float32)
        if DRESIDUAL is not None:
            tl.store(DRESIDUAL + out, ds.to(DRESIDUAL.dtype.element_ty), mask=mask)
        if SEED is not None:
            ds = dropout(ds, SEED, rows, first_col, dropout_p, ROWS, BLOCK)
        dx = ds.to(DX.dtype.element_ty)
        tl.store(DX + out, dx, mask=mask)
        if Q is not None:
            quantise_rows(dx.to(tl.float32), rows, row_mask, out, mask, Q, SCALE, NORM)

    partial = tl.program_id(0) * C + cols
    if DW_PARTIAL is not None:
        tl.store(DW_PARTIAL + partial, tl.sum(dw, axis=0), mask=cols < C)
    if DB_PARTIAL is not None:
        tl.store(DB_PARTIAL + partial, tl.sum(db, axis=0), mask=cols < C)
