"""Layer norm over the last dimension, with (dropout +) residual add before it in the same pass. Ba et al. 2016.

    s    = dropout(x) + residual            (or dropout(x), or x), rounded to the residual's dtype
    xhat = (s - mean) * rstd                mean and the centred variance over C in fp32, rstd = 1 / sqrt(var + eps)
    y    = xhat * weight + bias

Backward, with g = dy * weight and the means taken over C:

    ds        = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum      dsum: upstream gradient of the returned s
    dresidual = ds
    dx        = ds * keep / (1 - p)
    dweight   = sum over rows of dy * xhat,    dbias = sum over rows of dy

Saved for backward: s (x itself without a residual), weight, mean and rstd (fp32, one each per row), the seed.

Bytes that have to move, e = bytes per element: forward 2e per element (read x, write y), 4e with a residual; backward
3e (read s and dy, write ds), one e more for dsum, one more for a second gradient. At 8192 x 768 in bf16: 25.2 MB and
37.7 MB. Weight and bias stay in cache; so do the backward's partial sums, at most 12 C bytes per program, 0.8 MB on 46 SMs.

Backward is one persistent kernel. Each program walks over tiles of rows, keeps its share of dweight and dbias in
registers, one fp32 accumulator per element of the tile, and writes it once to a (programs, C) buffer, which a second
kernel adds up (column_sums.py). Rows wider than MAX_BACKWARD_BLOCK leave too few registers for that: several programs then
share a row. Each reads all of it for the two means, but owns one block of its columns.

Dropout (philox.py) is repeated in backward from the seed: no mask is stored. ``quantised`` is the hook for fp8 (quantise.py):
where y or dx is written in 8 bits too; without, it costs nothing. RMS norm (fused_rmsnorm.py) is made of the same kernels: what
only it has is None here, and not compiled.
"""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import arguments, column_sums, reference, runtime, tuning
from fastgpt.kernels.operators import operator
from fastgpt.kernels.philox import dropout
from fastgpt.kernels.quantise import quantise_rows

MAX_BACKWARD_BLOCK = 4_096
"""Columns of a row that one program of the backward kernel owns at most."""


# ---------------------------------------------------------------- configs


@lru_cache
def block_of(C: int) -> int:
    """Columns of a tile that holds whole rows: tl.arange needs a power of two."""
    return max(16, runtime.next_power_of_2(C))


def layer_norm_bucket(C: int) -> str:
    """One bucket for any number of rows: a new batch size compiles nothing."""
    return f"C{C}"


def _space(**values: tuple[int, ...]) -> list[tuning.Config]:
    return [dict(zip(values, chosen)) for chosen in product(*values.values())]


FORWARD = _space(rows=(1, 2, 4, 8, 16), num_warps=(2, 4, 8))
BACKWARD = _space(rows=(1, 2, 4, 8), num_warps=(4, 8, 16), programs_per_sm=(1, 2, 3, 4, 6), num_stages=(1, 2))


def config(name: str, C: int) -> tuning.Config:
    """The config for rows of C elements that is safe on any card. ``name``: of the kernel in the tables.

    A thread holds 16 or 32 elements of a tile in forward, 8 in backward, where s, dy, weight and two accumulators are
    alive at once: no spills, enough bytes in flight, 128-bit loads of bf16.
    """
    block = block_of(C)
    if name.endswith("forward"):
        # 2 rows of 2048 in 4 warps spill on sm_90 with bf16 in, fp32 out and a bias; 4 of 1024 in RMS norm, with triton 3.6.
        narrower = block == 2048 or (block == 1024 and name.startswith("rms"))
        rows = min(64, max(1, (2048 if narrower else 4096) // block))
        found = {"rows": rows, "num_warps": 4 if block <= 2048 else 8 if block <= 8192 else 16}
    else:
        rows, num_warps = min(64, max(1, 2048 // block)), 8 if block <= 2048 else 16
        # As many programs as fit at once with a residual (97 to 128 registers a thread): a third block per SM would wait
        # for the other two and then run alone, on a half empty card. 2 stages load the next tile while one is worked on.
        found = {"rows": rows, "num_warps": num_warps, "programs_per_sm": 16 // num_warps, "num_stages": 2}
    # The interpreter's cost is per program, whatever its size.
    return {**found, "rows": 32} if runtime.INTERPRET else found


@tuning.cached
def forward_launch(
    kernel: Any, name: str, dtype: torch.dtype, n_rows: int, C: int, device: torch.device, quantised: bool = False
) -> runtime.Launch:
    """``kernel``, which is ``name`` in the tables, for x of so many rows in ``dtype``."""
    choice = tuning.choose(name, dtype, layer_norm_bucket(C), device, config(name, C))
    rows, num_warps, registers = choice.config["rows"], choice.config["num_warps"], None
    if quantised:  # rounding to fp8 takes registers, too: half as many elements per thread, and no stop at 64 registers
        rows, num_warps = (rows // 2, num_warps) if rows > 1 else (1, min(2 * num_warps, 16))
        registers = 128
    grid = (runtime.cdiv(n_rows, rows),)
    return runtime.Launch(
        kernel, grid, choice, C=C, ROWS=rows, BLOCK=block_of(C), num_warps=num_warps, maxnreg=registers
    )


@tuning.cached
def backward_launch(
    kernel: Any, name: str, dtype: torch.dtype, n_rows: int, C: int, device: torch.device, widest: int,
    crowded: bool = False,
) -> runtime.Launch:  # fmt: skip
    """The same for dy in ``dtype``. A program owns at most ``widest`` columns. ``crowded``: half as many elements per thread,
    since what else is computed takes registers. The grid: programs, and how many share a row."""
    choice = tuning.choose(name, dtype, layer_norm_bucket(C), device, config(name, C))
    rows, num_warps, per_sm = (choice.config[key] for key in ("rows", "num_warps", "programs_per_sm"))
    if crowded and rows > 1:
        rows //= 2
    elif crowded and num_warps < 16:
        num_warps, per_sm = 2 * num_warps, max(1, per_sm // 2)
    elif crowded:
        widest //= 2
    block = min(block_of(C), widest)
    programs = min(runtime.sm_count(device) * per_sm, runtime.cdiv(n_rows, rows))
    chunks = runtime.cdiv(C, block)
    # 16 warps, of whatever programs, leave each thread 128 registers. ptxas would save some, and spill, to let more fit.
    return runtime.Launch(
        kernel, (programs, chunks), choice, C=C, CHUNKS=chunks, ROWS=rows, BLOCK=block,
        STAGES=choice.config["num_stages"], num_warps=num_warps, maxnreg=128,
    )  # fmt: skip


# ---------------------------------------------------------------- kernels


@triton.jit
def mixed(
    x, RESIDUAL, X0, FACTOR, X0_FACTOR, SEED, residual_stride, x0_stride, rows, mask, first_col, dropout_p,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is normed of one tile x (ROWS, BLOCK), as loaded: s = FACTOR u + X0_FACTOR x0 with u = dropout(x) + residual,
    rounded to the residual's dtype, or without one to x's, as backward will read it; then u and x0 in fp32. All but x may be
    None."""
    cols = first_col + tl.arange(0, BLOCK)
    u = x.to(tl.float32)
    if SEED is not None:
        u = dropout(u, SEED, rows, first_col, dropout_p, ROWS, BLOCK)
    if RESIDUAL is not None:
        residual = RESIDUAL + (rows * residual_stride)[:, None] + cols[None, :]
        u += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    s, x0 = u, u
    if FACTOR is not None:
        s *= tl.load(FACTOR).to(tl.float32)
    if X0 is not None:
        x0 = tl.load(X0 + (rows * x0_stride)[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        s += x0 * tl.load(X0_FACTOR).to(tl.float32)
    if RESIDUAL is not None:
        x = s.to(RESIDUAL.dtype.element_ty)
    elif SEED is not None or FACTOR is not None or X0 is not None:
        x = s.to(x.dtype)
    return x, u, x0


@tuning.space("layer_norm.forward", FORWARD)
@triton.jit(do_not_specialize=["n_rows"])
def layer_norm_forward_kernel(
    X, RESIDUAL, WEIGHT, BIAS, SEED, Y, SUM, MEAN, RSTD, Q, SCALE, NORM,
    n_rows, x_stride, residual_stride, eps, dropout_p,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    X0=None, FACTOR=None, X0_FACTOR=None, x0_stride=None,
):  # fmt: skip
    """One program: ROWS whole rows. RESIDUAL and SUM, BIAS, SEED, and Q, SCALE and NORM (y in fp8) may be None.

    RMS norm: MEAN is None; WEIGHT may be; and X0, FACTOR and X0_FACTOR as in ``mixed``."""
    # 64 bits: row x stride passes 2^31 elements at a batch that still fits the card.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    row_mask = rows < n_rows
    mask = row_mask[:, None] & (cols < C)[None, :]
    out = (rows * C)[:, None] + cols[None, :]
    x = tl.load(X + (rows * x_stride)[:, None] + cols[None, :], mask=mask, other=0.0)
    rounded, _, _ = mixed(
        x, RESIDUAL, X0, FACTOR, X0_FACTOR, SEED, residual_stride, x0_stride, rows, mask, 0, dropout_p, ROWS, BLOCK
    )
    if SUM is not None:
        tl.store(SUM + out, rounded, mask=mask)
    s = rounded.to(tl.float32)

    if MEAN is not None:
        # The variance around the mean, not E[s^2] - mean^2: that cancels where the mean is large. Lanes past C are 0 in the
        # sum, but would be -mean once centred.
        # div_rn, as / may be 2 ulp off: a mean that is off leaves a row of equal numbers with a spread, which rstd then blows
        # up.
        mean = tl.div_rn(tl.sum(s, axis=1), C)
        s = tl.where((cols < C)[None, :], s - mean[:, None], 0.0)
        var = tl.sum(s * s, axis=1) / C + eps
        # rsqrt may be 2 ulp off, and y's error is that of all its row: one step of Newton's rounds it. Not at an rstd of inf or
        # nan, where the step would be nan.
        rstd = tl.rsqrt(var)
        off = tl.fma(-var * rstd, rstd, 1.0)
        rstd = tl.where(off == off, tl.fma(0.5 * rstd, off, rstd), rstd)
        tl.store(MEAN + rows, mean, mask=row_mask)
    else:
        # Rounded: ds is at right angles to s, and little is left of the sum of ds u, FACTOR's gradient, but errors of xhat.
        rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(s * s, axis=1), C) + eps))
    tl.store(RSTD + rows, rstd, mask=row_mask)

    y = s * rstd[:, None]
    if WEIGHT is not None:
        y *= tl.load(WEIGHT + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    if BIAS is not None:
        y += tl.load(BIAS + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    y = y.to(Y.dtype.element_ty)
    tl.store(Y + out, y, mask=mask)
    # fp8 of y as rounded, so that the linear multiplies what a pass over Y would have given it.
    if Q is not None:
        quantise_rows(y.to(tl.float32), rows, row_mask, out, mask, Q, SCALE, NORM)


@triton.jit
def _xhat_and_dy(
    s_row, dy_row, RESIDUAL, X0, FACTOR, X0_FACTOR, S_SEED, mean, rstd, residual_stride, x0_stride,
    rows, row_mask, first_col, dropout_p, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """xhat and dy of one tile, fp32, dy being 0 past the edges; then u and x0 as in ``mixed``. s_row, dy_row: pointers to
    column 0, (ROWS,)."""
    cols = first_col + tl.arange(0, BLOCK)
    mask = row_mask[:, None] & (cols < C)[None, :]
    s = tl.load(s_row[:, None] + cols[None, :], mask=mask, other=0.0)
    dy = tl.load(dy_row[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    s, u, x0 = mixed(
        s, RESIDUAL, X0, FACTOR, X0_FACTOR, S_SEED, residual_stride, x0_stride, rows, mask, first_col, dropout_p,
        ROWS, BLOCK,
    )  # fmt: skip
    xhat = s.to(tl.float32)
    if mean is not None:
        xhat -= mean[:, None]
    return xhat * rstd[:, None], dy, u, x0


@tuning.space("layer_norm.backward", BACKWARD)
@triton.jit(do_not_specialize=["n_rows"])
def layer_norm_backward_kernel(
    DY, DSUM, S, WEIGHT, MEAN, RSTD, SEED, S_SEED, DX, DRESIDUAL, DW_PARTIAL, DB_PARTIAL, Q, SCALE, NORM,
    n_rows, dy_stride, dsum_stride, s_stride, dropout_p,
    C: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    RESIDUAL=None, X0=None, FACTOR=None, X0_FACTOR=None, DX0=None, DF_PARTIAL=None, DX0F_PARTIAL=None,
    residual_stride=None, x0_stride=None,
):  # fmt: skip
    """Program (i, j): tiles i, i + programs, ... of ROWS rows; columns [j BLOCK, (j + 1) BLOCK) of CHUNKS such.

    S_SEED is SEED where S holds x before its dropout (no residual). May be None: DSUM (s got no gradient), DRESIDUAL
    (it equals DX), the seeds (no dropout), DW_PARTIAL and DB_PARTIAL (no such gradient is wanted), Q, SCALE and NORM (dx in
    fp8; with CHUNKS = 1 only).

    RMS norm: MEAN is None, WEIGHT may be. Where FACTOR or X0 is given S holds x, and s is formed again as in forward.
    DF_PARTIAL and DX0F_PARTIAL: a sum for each program, of FACTOR's and X0_FACTOR's gradient.
    """
    # Weight and the sums stay in registers for all tiles of this program. The sums are added up over a tile's rows only
    # at the end: in the loop that would be a reduction across threads per tile.
    chunk = tl.program_id(1)
    first_col = chunk * BLOCK
    cols = first_col + tl.arange(0, BLOCK)
    if WEIGHT is not None:
        weight = tl.load(WEIGHT + cols, mask=cols < C, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    dfactor = tl.zeros((ROWS, BLOCK), tl.float32)
    dx0_factor = tl.zeros((ROWS, BLOCK), tl.float32)
    first_tile = tl.program_id(0).to(tl.int64)  # 64 bits for all that is formed from it
    for tile in tl.range(first_tile, tl.cdiv(n_rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        row_mask = rows < n_rows
        mask = row_mask[:, None] & (cols < C)[None, :]
        out = (rows * C)[:, None] + cols[None, :]
        mean = None if MEAN is None else tl.load(MEAN + rows, mask=row_mask, other=0.0)
        rstd = tl.load(RSTD + rows, mask=row_mask, other=0.0)
        s_row, dy_row = S + rows * s_stride, DY + rows * dy_stride
        xhat, dy, u, x0 = _xhat_and_dy(
            s_row, dy_row, RESIDUAL, X0, FACTOR, X0_FACTOR, S_SEED, mean, rstd, residual_stride, x0_stride,
            rows, row_mask, first_col, dropout_p, C, ROWS, BLOCK,
        )  # fmt: skip
        if DW_PARTIAL is not None:
            dw += dy * xhat
        if DB_PARTIAL is not None:
            db += dy
        g = dy if WEIGHT is None else dy * weight
        sum_g = tl.sum(g, axis=1)
        sum_g_xhat = tl.sum(g * xhat, axis=1)
        for step in range(1, CHUNKS):  # what other programs own of these rows, from the neighbour's part on
            other_first = (chunk + step) % CHUNKS * BLOCK
            other_cols = other_first + tl.arange(0, BLOCK)
            if WEIGHT is not None:
                other_weight = tl.load(WEIGHT + other_cols, mask=other_cols < C, other=0.0).to(tl.float32)[None, :]
            other_xhat, other_dy, _, _ = _xhat_and_dy(
                s_row, dy_row, RESIDUAL, X0, FACTOR, X0_FACTOR, S_SEED, mean, rstd, residual_stride, x0_stride,
                rows, row_mask, other_first, dropout_p, C, ROWS, BLOCK,
            )  # fmt: skip
            other_g = other_dy if WEIGHT is None else other_dy * other_weight
            sum_g += tl.sum(other_g, axis=1)
            sum_g_xhat += tl.sum(other_g * other_xhat, axis=1)
        mean_g, mean_g_xhat = tl.div_rn(sum_g, C), tl.div_rn(sum_g_xhat, C)
        # Past C, where dy and g are 0, xhat is -mean * rstd and ds not 0: the stores are masked.
        ds = ((g if MEAN is None else g - mean_g[:, None]) - xhat * mean_g_xhat[:, None]) * rstd[:, None]
        if DSUM is not None:
            dsum = DSUM + (rows * dsum_stride)[:, None] + cols[None, :]
            ds += tl.load(dsum, mask=mask, other=0.0).to(tl.float32)
        if DF_PARTIAL is not None:
            dfactor += ds * u
        if DX0F_PARTIAL is not None:
            dx0_factor += ds * x0
        if DX0 is not None:
            tl.store(DX0 + out, (ds * tl.load(X0_FACTOR).to(tl.float32)).to(DX0.dtype.element_ty), mask=mask)
        if FACTOR is not None:
            ds *= tl.load(FACTOR).to(tl.float32)
        # The residual's gradient is ds before dropout's mask, in its own dtype.
        if DRESIDUAL is not None:
            tl.store(DRESIDUAL + out, ds.to(DRESIDUAL.dtype.element_ty), mask=mask)
        if SEED is not None:
            ds = dropout(ds, SEED, rows, first_col, dropout_p, ROWS, BLOCK)
        dx = ds.to(DX.dtype.element_ty)
        tl.store(DX + out, dx, mask=mask)
        if Q is not None:
            quantise_rows(tl.where(mask, dx.to(tl.float32), 0.0), rows, row_mask, out, mask, Q, SCALE, NORM)

    partial = tl.program_id(0) * C + cols
    if DW_PARTIAL is not None:
        tl.store(DW_PARTIAL + partial, tl.sum(dw, axis=0), mask=cols < C)
    if DB_PARTIAL is not None:
        tl.store(DB_PARTIAL + partial, tl.sum(db, axis=0), mask=cols < C)
    if DF_PARTIAL is not None:
        tl.store(DF_PARTIAL + tl.program_id(0) * CHUNKS + chunk, tl.sum(dfactor))
    if DX0F_PARTIAL is not None:
        tl.store(DX0F_PARTIAL + tl.program_id(0) * CHUNKS + chunk, tl.sum(dx0_factor))


# ---------------------------------------------------------------- launchers and ops


def as_rows(x: Tensor) -> Tensor:
    """x as (rows, C) with neighbouring columns adjacent: a view if its strides allow one, else a contiguous copy. The
    kernels take any stride between rows."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def forward_outputs(
    x: Tensor, residual: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unwritten y, s (empty without a residual: it never leaves the op's autograd formula), mean, rstd."""
    size, dtype = (0, x.dtype) if residual is None else (x.shape, residual.dtype)
    return (
        torch.empty(x.shape, dtype=out_dtype, device=x.device),
        torch.empty(size, dtype=dtype, device=x.device),
        torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device),
        torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device),
    )


@operator("layer_norm_fwd")
def layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None,
    dropout_p: float, eps: float, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, s, mean, rstd; s is an empty tensor without a residual. All contiguous."""
    outputs = forward_outputs(x, residual, out_dtype)
    launch_forward(x, weight, bias, residual, seed, dropout_p, eps, outputs)
    return outputs


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None,
    dropout_p: float, eps: float, outputs: tuple[Tensor, ...], quantised: tuple[Tensor, ...] = (),
) -> None:  # fmt: skip
    """Fill y, s, mean, rstd, and ``quantised``: y rounded to fp8, its scales and norms."""
    y, s, mean, rstd = outputs
    arguments.alike("x", x.shape, residual=residual, columns={"weight": weight, "bias": bias})
    if x.numel() == 0:
        return
    x, residual = as_rows(x), None if residual is None else as_rows(residual)
    n_rows, C = x.shape
    launch = forward_launch(
        layer_norm_forward_kernel, "layer_norm.forward", x.dtype, n_rows, C, x.device, bool(quantised)
    )
    launch(
        x, residual, weight.contiguous(), None if bias is None else bias.contiguous(), seed,
        y, None if residual is None else s, mean, rstd, *(quantised or (None, None, None)),
        n_rows, x.stride(0), 0 if residual is None else residual.stride(0), eps, dropout_p,
    )  # fmt: skip


@layer_norm_fwd.register_fake
def _(x, weight, bias, residual, seed, dropout_p, eps, out_dtype):
    return forward_outputs(x, residual, out_dtype)


def backward_outputs(
    s: Tensor, weight: Tensor, x_dtype: torch.dtype, two_gradients: bool, weight_grad: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Unwritten dx, dresidual, dweight, dbias."""
    C = weight.shape[0]
    return (
        torch.empty(s.shape, dtype=x_dtype, device=s.device),
        torch.empty(s.shape if two_gradients else 0, dtype=s.dtype, device=s.device),
        torch.empty(C if weight_grad else 0, dtype=weight.dtype, device=s.device),
        torch.empty(C if bias_dtype else 0, dtype=bias_dtype or weight.dtype, device=s.device),
    )


@operator("layer_norm_bwd")
def layer_norm_bwd(
    dy: Tensor, dsum: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, seed: Tensor | None,
    dropout_p: float, x_dtype: torch.dtype, s_is_x: bool, two_gradients: bool, weight_grad: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dresidual (if ``two_gradients``: else dx serves both), dweight (if ``weight_grad``), dbias (if
    ``bias_dtype``). Those not asked for are empty."""
    outputs = backward_outputs(s, weight, x_dtype, two_gradients, weight_grad, bias_dtype)
    launch_backward(dy, dsum, s, weight, mean, rstd, seed, dropout_p, s_is_x, two_gradients, outputs)
    return outputs


def launch_backward(
    dy: Tensor, dsum: Tensor | None, s: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, seed: Tensor | None,
    dropout_p: float, s_is_x: bool, two_gradients: bool, outputs: tuple[Tensor, ...], quantised: tuple[Tensor, ...] = (),
) -> None:  # fmt: skip
    """Fill dx, dresidual, dweight and dbias where they are not empty, and ``quantised``: dx rounded to fp8, its scales and
    norms (C <= MAX_BACKWARD_BLOCK)."""
    dx, dresidual, dweight, dbias = outputs
    arguments.alike("s", s.shape, dy=dy, dsum=dsum, rows={"mean": mean, "rstd": rstd}, columns={"weight": weight})
    if s.numel() == 0:
        dweight.zero_()
        dbias.zero_()
        return
    s, dy, dsum = as_rows(s), as_rows(dy), None if dsum is None else as_rows(dsum)
    n_rows, C = s.shape
    launch = backward_launch(
        layer_norm_backward_kernel, "layer_norm.backward", dy.dtype, n_rows, C, s.device, MAX_BACKWARD_BLOCK
    )
    programs = launch.grid[0]
    dw_partial = column_sums.partial(programs, dweight) if dweight.numel() else None
    db_partial = column_sums.partial(programs, dbias) if dbias.numel() else None
    launch(
        dy, dsum, s, weight.contiguous(), mean, rstd, seed, seed if s_is_x else None,
        dx, dresidual if two_gradients else None, dw_partial, db_partial, *(quantised or (None, None, None)),
        n_rows, dy.stride(0), 0 if dsum is None else dsum.stride(0), s.stride(0), dropout_p,
    )  # fmt: skip
    column_sums.add_up((dw_partial, dweight), (db_partial, dbias))


@layer_norm_bwd.register_fake
def _(dy, dsum, s, weight, mean, rstd, seed, dropout_p, x_dtype, s_is_x, *wanted):
    return backward_outputs(s, weight, x_dtype, *wanted)


def setup_context(ctx, inputs, output):
    x, weight, bias, residual, seed, dropout_p, *_ = inputs
    y, s, mean, rstd, *quantised = output
    ctx.mark_non_differentiable(mean, rstd, *quantised)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else s, weight, mean, rstd, seed)
    ctx.dropout_p, ctx.x_dtype, ctx.y_dtype = dropout_p, x.dtype, y.dtype
    ctx.has_residual, ctx.bias_dtype = residual is not None, None if bias is None else bias.dtype


def backward(op, ctx, dy, dsum, *_):
    """The autograd formula. ``op``: layer_norm_bwd, or what takes and returns the same."""
    s, weight, mean, rstd, seed = ctx.saved_tensors
    if dy is None:  # only the sum was used
        dy = torch.zeros(s.shape, dtype=ctx.y_dtype, device=s.device)
    _, weight_grad, bias_grad, residual_grad, *_ = ctx.needs_input_grad
    # One gradient in one dtype: autograd may get the same tensor for both inputs, so it is written once.
    two_gradients = residual_grad and (seed is not None or s.dtype != ctx.x_dtype)
    dx, dresidual, dw, db = op(
        dy, dsum if ctx.has_residual else None, s, weight, mean, rstd, seed, ctx.dropout_p, ctx.x_dtype,
        not ctx.has_residual, two_gradients, weight_grad, ctx.bias_dtype if bias_grad else None,
    )  # fmt: skip
    if not two_gradients:
        dresidual = dx if residual_grad else None
    return dx, dw if weight_grad else None, db if bias_grad else None, dresidual, *[None] * 4


layer_norm_fwd.register_autograd(partial(backward, layer_norm_bwd), setup_context=setup_context)


# ---------------------------------------------------------------- public


def validate(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, p: float, out_dtype: torch.dtype | None
) -> None:
    C = arguments.width("x", x)
    if p:
        arguments.probability("dropout_p", p)
    if out_dtype is not None and out_dtype is not x.dtype:
        arguments.dtype("out_dtype", out_dtype)
    rest = ("weight", weight, C), ("bias", bias, C), ("residual", residual, x.shape)
    arguments.tensors("x", x.shape, ("x", x, None), *rest)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Layer norm of ``dropout(x) + residual`` over the last dimension.

    x (..., C) with C up to 16,384, of any rank from 1 and any strides: views whose rows lie a constant stride apart are
    read in place, others copied first. weight, bias (C,). residual of x's shape. Each tensor fp32, fp16 or bf16.

    Returns y in ``out_dtype`` (default: x's); with a residual (y, sum), the sum in the residual's dtype. Both are
    contiguous. Each gradient has its input's dtype. Autocast changes nothing: the arithmetic is fp32 anyway.
    Raises ValueError for shapes, dtypes and devices that do not fit. CPU tensors outside Triton's interpreter are
    computed by ``reference.layer_norm``.

    >>> x, residual, weight = torch.randn(2, 8, 64), torch.randn(2, 8, 64), torch.ones(64)
    >>> y, s = layer_norm(x, weight, residual=residual)
    >>> torch.equal(s, x + residual), torch.allclose(y, torch.nn.functional.layer_norm(s, (64,)), atol=1e-5)
    (True, True)
    """
    if not runtime.runs_in_triton(x):
        return reference.layer_norm(
            x, weight, bias, residual=residual, dropout_p=dropout_p, eps=eps, out_dtype=out_dtype
        )
    validate(x, weight, bias, residual, dropout_p, out_dtype)
    seed = runtime.draw_seed(x.device) if dropout_p > 0 else None
    options = dropout_p, eps, out_dtype or x.dtype
    y, s, _, _ = layer_norm_fwd(x, weight, bias, residual, seed, *options)
    return y if residual is None else (y, s)
