"""RMS norm over the last dimension, with what comes before it in a block in the same pass. Zhang & Sennrich 2019.

    u    = dropout(x) + residual            (or dropout(x), or x)
    s    = scale * u + x0_scale * x0        rounded to the residual's dtype (without one, to x's); or s = u
    xhat = s * rstd                         rstd = 1 / sqrt(mean(s^2) + eps), the mean over C in fp32
    y    = xhat * weight                    (or xhat)

Backward, with g = dy * weight and the mean taken over C:

    ds        = rstd * (g - xhat * mean(g * xhat)) + dsum      dsum: upstream gradient of the returned s
    dscale    = sum of ds * u,    dx0_scale = sum of ds * x0,    dx0 = x0_scale * ds
    dresidual = scale * ds
    dx        = scale * ds * keep / (1 - p)
    dweight   = sum over rows of dy * xhat

``scale`` and ``x0_scale`` are numbers on the device, parameters of the model: of its residual stream and of its embedding x0,
which modded-nanogpt and nanochat mix into it before each block.

Saved for backward: s (x itself without a residual), weight and rstd (fp32, one per row), the seed. With ``scale`` or ``x0`` it
is what s was made of, x, residual and x0, and s is formed again: dscale needs u, which s does not give back where scale is 0.
That keeps no more: the residual is saved by the norm that made it, and x0 is one for all layers.

Bytes that have to move, e = bytes per element: forward 2e per element (read x, write y), 4e with a residual; backward 3e,
with a residual 4e. With scale and x0 forward reads e more (x0), and backward 2e more (x, x0) and writes e more (dx0).

The kernels are layer norm's (fused_layernorm.py) without the mean; sums of scale's gradients leave each program as one number,
which column_sums.py adds up in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import arguments, column_sums, fused_layernorm, reference, runtime, tuning
from fastgpt.kernels.fused_layernorm import (
    BACKWARD,
    FORWARD,
    as_rows,
    backward_launch,
    forward_launch,
    layer_norm_backward_kernel,
    layer_norm_forward_kernel,
)
from fastgpt.kernels.operators import operator

# ---------------------------------------------------------------- kernels
#
# FACTOR and X0_FACTOR, one number each, may lie at any address: entries of one vector of parameters share a binary.


@tuning.space("rms_norm.forward", FORWARD)
@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["FACTOR", "X0_FACTOR"])
def rms_norm_forward_kernel(
    X, RESIDUAL, X0, FACTOR, X0_FACTOR, WEIGHT, SEED, Y, SUM, RSTD,
    n_rows, x_stride, residual_stride, x0_stride, eps, dropout_p,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: ROWS whole rows. All but X, Y and RSTD may be None."""
    layer_norm_forward_kernel(
        X, RESIDUAL, WEIGHT, None, SEED, Y, SUM, None, RSTD, None, None, None,
        n_rows, x_stride, residual_stride, eps, dropout_p, C, ROWS, BLOCK, X0, FACTOR, X0_FACTOR, x0_stride,
    )  # fmt: skip


@tuning.space("rms_norm.backward", BACKWARD)
@triton.jit(do_not_specialize=["n_rows"], do_not_specialize_on_alignment=["FACTOR", "X0_FACTOR"])
def rms_norm_backward_kernel(
    DY, DSUM, S, RESIDUAL, X0, FACTOR, X0_FACTOR, WEIGHT, RSTD, SEED, S_SEED,
    DX, DRESIDUAL, DX0, DW_PARTIAL, DF_PARTIAL, DX0F_PARTIAL,
    n_rows, dy_stride, dsum_stride, s_stride, residual_stride, x0_stride, dropout_p,
    C: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    layer_norm_backward_kernel(
        DY, DSUM, S, WEIGHT, None, RSTD, SEED, S_SEED, DX, DRESIDUAL, DW_PARTIAL, None, None, None, None,
        n_rows, dy_stride, dsum_stride, s_stride, dropout_p, C, CHUNKS, ROWS, BLOCK, STAGES,
        RESIDUAL, X0, FACTOR, X0_FACTOR, DX0, DF_PARTIAL, DX0F_PARTIAL, residual_stride, x0_stride,
    )  # fmt: skip


# ---------------------------------------------------------------- launchers and ops


def _forward_outputs(
    x: Tensor, residual: Tensor | None, returns_s: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten y, s (empty unless it is returned) and rstd."""
    size, dtype = x.shape if returns_s else 0, (x if residual is None else residual).dtype
    return (
        torch.empty(x.shape, dtype=out_dtype, device=x.device),
        torch.empty(size, dtype=dtype, device=x.device),
        torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device),
    )


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _single(**factors: Tensor | None) -> None:
    for name, factor in factors.items():
        if factor is not None and factor.numel() != 1:
            raise ValueError(f"{name} is {tuple(factor.shape)}: use a tensor of one element")


@operator("rms_norm_fwd")
def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, x0: Tensor | None, scale: Tensor | None,
    x0_scale: Tensor | None, seed: Tensor | None, dropout_p: float, eps: float, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, s, rstd; s is an empty tensor without residual, scale and x0. All contiguous."""
    returns_s = residual is not None or scale is not None or x0 is not None
    y, s, rstd = outputs = _forward_outputs(x, residual, returns_s, out_dtype)
    arguments.alike("x", x.shape, residual=residual, x0=x0, columns={"weight": weight})
    _single(scale=scale, x0_scale=x0_scale)
    if x.numel() == 0:
        return outputs
    x, residual, x0 = as_rows(x), None if residual is None else as_rows(residual), None if x0 is None else as_rows(x0)
    n_rows, C = x.shape
    forward_launch(rms_norm_forward_kernel, "rms_norm.forward", x.dtype, n_rows, C, x.device)(
        x, residual, x0, scale, x0_scale, None if weight is None else weight.contiguous(), seed,
        y, s if returns_s else None, rstd, n_rows, x.stride(0), _stride(residual), _stride(x0), eps, dropout_p,
    )  # fmt: skip
    return outputs


@rms_norm_fwd.register_fake
def _(x, weight, residual, x0, scale, x0_scale, seed, dropout_p, eps, out_dtype):
    returns_s = residual is not None or scale is not None or x0 is not None
    return _forward_outputs(x, residual, returns_s, out_dtype)


def _backward_outputs(
    s: Tensor, weight: Tensor | None, residual: Tensor | None, x0: Tensor | None, scale: Tensor | None,
    x0_scale: Tensor | None, x_dtype: torch.dtype, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Unwritten dx, then those wanted (else empty) of dresidual, dx0, dweight, dscale and dx0_scale."""

    def new(i: int, like: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        if like is None or not wanted[i]:
            return s.new_empty(0)
        return torch.empty(like.shape, dtype=dtype or like.dtype, device=s.device)

    dresidual = new(0, s, (s if residual is None else residual).dtype)
    return s.new_empty(s.shape, dtype=x_dtype), dresidual, new(1, x0), new(2, weight), new(3, scale), new(4, x0_scale)


@operator("rms_norm_bwd")
def rms_norm_bwd(
    dy: Tensor, dsum: Tensor | None, s: Tensor, weight: Tensor | None, residual: Tensor | None, x0: Tensor | None,
    scale: Tensor | None, x0_scale: Tensor | None, rstd: Tensor, seed: Tensor | None, dropout_p: float,
    x_dtype: torch.dtype, s_is_x: bool, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dresidual (where dx does not serve both), dx0, dweight, dscale, dx0_scale; empty where not ``wanted``. With scale or
    x0, s is x, and residual is given."""
    outputs = _backward_outputs(s, weight, residual, x0, scale, x0_scale, x_dtype, wanted)
    dx, dresidual, dx0, dweight, dscale, dx0_scale = outputs
    rows, columns = {"rstd": rstd}, {"weight": weight}
    arguments.alike("s", s.shape, dy=dy, dsum=dsum, residual=residual, x0=x0, rows=rows, columns=columns)
    _single(scale=scale, x0_scale=x0_scale)
    sums = [out for out in (dweight, dscale, dx0_scale) if out.numel()]
    if s.numel() == 0:
        for out in sums:
            out.zero_()
        return outputs
    s, dy = as_rows(s), as_rows(dy)
    dsum, residual, x0 = (None if t is None else as_rows(t) for t in (dsum, residual, x0))
    n_rows, C = s.shape
    launch = backward_launch(
        rms_norm_backward_kernel, "rms_norm.backward", dy.dtype, n_rows, C, s.device, fused_layernorm.MAX_BACKWARD_BLOCK,
        crowded=seed is not None and (scale is not None or x0 is not None),
    )  # fmt: skip
    programs, chunks = launch.grid
    partials = [
        column_sums.partial(programs * many, out.view(-1)) if out.numel() else None
        for out, many in ((dweight, 1), (dscale, chunks), (dx0_scale, chunks))
    ]
    launch(
        dy, dsum, s, residual, x0, scale, x0_scale, None if weight is None else weight.contiguous(), rstd,
        seed, seed if s_is_x else None, dx, dresidual if wanted[0] else None, dx0 if wanted[1] else None, *partials,
        n_rows, dy.stride(0), _stride(dsum), s.stride(0), _stride(residual), _stride(x0), dropout_p,
    )  # fmt: skip
    column_sums.add_up((partials[0], dweight))
    column_sums.add_up((partials[1], dscale.view(-1)), (partials[2], dx0_scale.view(-1)))
    return outputs


@rms_norm_bwd.register_fake
def _(dy, dsum, s, weight, residual, x0, scale, x0_scale, rstd, seed, dropout_p, x_dtype, s_is_x, wanted):
    return _backward_outputs(s, weight, residual, x0, scale, x0_scale, x_dtype, wanted)


def _setup(ctx, inputs, output):
    x, weight, residual, x0, scale, x0_scale, seed, ctx.dropout_p, *_ = inputs
    y, s, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    mixes = scale is not None or x0 is not None
    ctx.s_is_x, ctx.returns_s = mixes or residual is None, mixes or residual is not None
    ctx.x_dtype, ctx.y_dtype, ctx.sum_dtype = x.dtype, y.dtype, (x if residual is None else residual).dtype
    saved_residual = residual if mixes else None
    ctx.save_for_backward(x if ctx.s_is_x else s, weight, saved_residual, x0, scale, x0_scale, rstd, seed)


def _backward(ctx, dy, dsum, _):
    *made_of, rstd, seed = ctx.saved_tensors
    s = made_of[0]
    if dy is None:  # only s was used
        dy = torch.zeros(s.shape, dtype=ctx.y_dtype, device=s.device)
    _, weight, residual, x0, scale, x0_scale, *_ = ctx.needs_input_grad
    # One gradient in one dtype: autograd may get the same tensor for both inputs, so it is written once.
    two_gradients = residual and (seed is not None or ctx.sum_dtype != ctx.x_dtype)
    wanted = [two_gradients, x0, weight, scale, x0_scale]
    dsum = dsum if ctx.returns_s else None
    dx, *rest = rms_norm_bwd(dy, dsum, *made_of, rstd, seed, ctx.dropout_p, ctx.x_dtype, ctx.s_is_x, wanted)
    dresidual, dx0, dweight, dscale, dx0_scale = (grad if asked else None for grad, asked in zip(rest, wanted))
    if residual and not two_gradients:
        dresidual = dx
    return dx, dweight, dresidual, dx0, dscale, dx0_scale, *[None] * 4


rms_norm_fwd.register_autograd(_backward, setup_context=_setup)


# ---------------------------------------------------------------- public


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: Tensor | None = None,
    x0: Tensor | None = None,
    x0_scale: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """RMS norm of ``scale * (dropout(x) + residual) + x0_scale * x0`` over the last dimension.

    x (..., C) with C up to 16,384, of any rank from 1 and any strides: views whose rows lie a constant stride apart are
    read in place, others copied first. weight (C,). residual and x0 of x's shape. scale and x0_scale: tensors of one element,
    as of a vector of parameters; x0 and x0_scale come together. Each tensor fp32, fp16 or bf16.

    Returns y in ``out_dtype`` (default: x's); with a residual, a scale or x0 (y, s), s in the residual's dtype, else x's.
    Both are contiguous. Each gradient has its input's dtype. Autocast changes nothing: the arithmetic is fp32 anyway.
    Raises ValueError for shapes, dtypes and devices that do not fit. CPU tensors outside Triton's interpreter are
    computed by ``reference.rms_norm``.

    >>> x, residual = torch.randn(2, 8, 64), torch.randn(2, 8, 64)
    >>> y, s = rms_norm(x, residual=residual, scale=torch.tensor([0.5]))
    >>> torch.allclose(y, torch.nn.functional.rms_norm(s, (64,), eps=1e-6), atol=1e-5)
    True
    """
    if (x0 is None) != (x0_scale is None):
        missing = "x0" if x0 is None else "x0_scale"
        raise ValueError(f"{missing} is None: give x0 and x0_scale together, or neither")
    if not runtime.runs_in_triton(x):
        return reference.rms_norm(
            x, weight, residual=residual, dropout_p=dropout_p, scale=scale, x0=x0, x0_scale=x0_scale, eps=eps,
            out_dtype=out_dtype,
        )  # fmt: skip
    arguments.width("x", x)
    arguments.probability("dropout_p", dropout_p)
    arguments.dtype("out_dtype", out_dtype)
    rest = ("residual", residual, x.shape), ("x0", x0, x.shape), ("scale", scale, None), ("x0_scale", x0_scale, None)
    arguments.tensors("x", x.shape, ("x", x, None), ("weight", weight, x.shape[-1:]), *rest)
    seed = runtime.draw_seed(x.device) if dropout_p > 0 else None
    y, s, _ = rms_norm_fwd(x, weight, residual, x0, scale, x0_scale, seed, dropout_p, eps, out_dtype or x.dtype)
    return y if residual is None and scale is None and x0 is None else (y, s)
