"""Linear layers whose bias, activation, dropout and residual cost no pass over memory of their own.

For x (M, K), weight W (N, K) and bias b (N,), with sums in fp32 and one rounding when a result is written::

    linear        y = dropout(x W^T + b) + residual
    linear_gelu   z = x W^T + b,  a = gelu(z)          one kernel writes both
    linear_relu2  a = relu(x W^T + b)^2                z is not kept (in fp16 it is: matmul.ACTIVATIONS)
    mlp           y = dropout(gelu(x W1^T + b1) W2^T + b2) + residual

    backward      dz = dy, or dy through the same dropout
                  dx = dz W,   dW = dz^T x,   db = column sums of dz
    of mlp        dz1 = (dz2 W2) gelu'(z1)             in the epilogue of that product: gelu(z1)'s gradient is never stored
                  or with relu^2, dz1 = (dz2 W2) 2 sqrt(a)

Saved for backward: x and z in the dtype of the operands, and in mlp also a, since dW2 = dz2^T a. With relu^2 x and a alone:
one tensor of 4C less than with GELU.

Bytes per MLP in units of e, one (M, 4C) tensor (50.3 MB at 8192 x 768 in bf16). Its six matmuls write or read one such
tensor each, 6e, whatever is done about the GELU. On top of that:

    PyTorch         5e   forward reads z and writes a; backward reads da and z, writes dz
    mlp             2e   forward writes z beside a; backward reads z in the product that gives da, and writes dz for da
    with relu^2     1e   no z: backward reads a there
    prologues       3e   gelu' where dz is read: both of these matmuls read z beside da, and evaluate it in every column of
                         tiles, 6 times at C = 768
    no a            1e   gelu where a is read: evaluated 6 times in forward, 24 times in dW2

dW is formed in the dtype of ``weight`` itself: the fp32 master is an input of the op, beside its 16-bit working copy, so
its gradient never goes through 16 bits. Where its tiles leave SMs idle the tokens are split, and partial sums added up in
a fixed order by a second kernel. No atomics: repeat runs are bit-equal.
db comes from the pass that forms dz where there is one (mlp's first, and dropout's). Elsewhere it comes from the tiles of dz
that dW reads or, behind cuBLAS, from a sum of its own.
Within ``gradients_in_place`` dW is added to ``weight.grad`` by the kernel that forms it.

``accumulate="fp16"`` (fp16 operands): products are summed in fp16 over 64 of K (a tuned config may take up to 128 where
results are stored in 16 bits), and these sums in fp32, in all three matmuls. matmul.py chooses between cuBLAS and
Triton.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.kernels import arguments, matmul, reference, runtime
from fastgpt.kernels.operators import operator
from fastgpt.kernels.working_copy import adds_to, working_copy

MLP_ACTIVATIONS = ("gelu", "relu2")


def rows_of(t: Tensor) -> Tensor:
    """(rows, columns), also of no columns; a view where strides allow one."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


# ---------------------------------------------------------------- backward ops
#
# What autograd's formulas below are made of. dz and x are (..., N) and (..., K), and of the same 16- or 32-bit dtype. Sums of
# columns, which are gradients of biases, are empty without ``bias_dtype``.


def new_sums(like: Tensor, columns: int, bias_dtype: torch.dtype | None) -> Tensor:
    """Unwritten sums of so many columns."""
    return like.new_empty(columns if bias_dtype else 0, dtype=bias_dtype or like.dtype)


@operator("linear_bwd_input")
def _bwd_input(dz: Tensor, weight: Tensor, fp16: bool) -> Tensor:
    """dz @ weight."""
    dx = matmul.matmul(rows_of(dz), weight, None, None, None, 0.0, fp16)
    return dx.view(*dz.shape[:-1], weight.shape[1])


@_bwd_input.register_fake
def _(dz, weight, fp16):
    return dz.new_empty(*dz.shape[:-1], weight.shape[1])


@operator("linear_bwd_input_gelu")
def _bwd_input_gelu(
    dz: Tensor, weight: Tensor, pre: Tensor, act: str, fp16: bool, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """(dz @ weight) activation'(z), and its column sums: the gradient of z's bias. ``pre``: z, or of "relu2" the result."""
    sums = new_sums(pre, pre.shape[-1], bias_dtype)
    dpre = matmul.matmul_dgelu(rows_of(dz), weight, rows_of(pre), act, fp16, sums if bias_dtype else None)
    return dpre.view(pre.shape), sums


@_bwd_input_gelu.register_fake
def _(dz, weight, pre, act, fp16, bias_dtype):
    return pre.new_empty(pre.shape), new_sums(pre, pre.shape[-1], bias_dtype)


@operator("linear_bwd_weight")
def _bwd_weight(
    dz: Tensor, x: Tensor, weight: Tensor, bias_dtype: torch.dtype | None, fp16: bool
) -> tuple[Tensor, Tensor]:
    """dW, with weight's layout, so that a transposed view gives its base a contiguous gradient; and db. Of weight only shape,
    layout and dtype matter."""
    dw, db = torch.empty_like(weight), new_sums(weight, weight.shape[0], bias_dtype)
    matmul.weight_grad(rows_of(dz), rows_of(x), dw, db if bias_dtype else None, fp16)
    return dw, db


@_bwd_weight.register_fake
def _(dz, x, weight, bias_dtype, fp16):
    return torch.empty_like(weight), new_sums(weight, weight.shape[0], bias_dtype)


@operator("linear_bwd_weight_add", mutates_args=("grad",))
def _bwd_weight_add(grad: Tensor, dz: Tensor, x: Tensor, bias_dtype: torch.dtype | None, fp16: bool) -> Tensor:
    """grad += dW; returns db."""
    db = new_sums(grad, grad.shape[0], bias_dtype)
    matmul.weight_grad(rows_of(dz), rows_of(x), grad, db if bias_dtype else None, fp16, add=True)
    return db


@_bwd_weight_add.register_fake
def _(grad, dz, x, bias_dtype, fp16):
    return new_sums(grad, grad.shape[0], bias_dtype)


@operator("pointwise_bwd")
def _pointwise_bwd(
    dy: Tensor, pre: Tensor | None, seed: Tensor | None, dropout_p: float, act: str | None, dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dz in ``dtype``, and its column sums: dy activation'(z), for one whose next matmul is not ours, or dy through the dropout
    of ``seed``."""
    sums = new_sums(dy, dy.shape[-1], bias_dtype)
    pre = None if pre is None else rows_of(pre)
    dz = matmul.pointwise(rows_of(dy), dtype, pre, seed, dropout_p, act, sums if bias_dtype else None)
    return dz.view(dy.shape), sums


@_pointwise_bwd.register_fake
def _(dy, pre, seed, dropout_p, act, dtype, bias_dtype):
    return dy.new_empty(dy.shape, dtype=dtype), new_sums(dy, dy.shape[-1], bias_dtype)


# ---------------------------------------------------------------- forward ops
#
# ``copy``: weight in x's dtype, where weight has another. It gets no gradient; weight, the master, gets it.


@operator("linear_fwd")
def _linear_fwd(
    x: Tensor, weight: Tensor, copy: Tensor | None, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None,
    pre: Tensor | None, pre_bias: Tensor | None, dropout_p: float, act: str | None, fp16: bool, in_place: bool,
) -> Tensor:  # fmt: skip
    """y (..., N) in the residual's dtype, else x's. With ``pre``, x is activation(pre), and pre gets the gradient instead; and
    ``pre_bias``, the bias in pre, its column sums."""
    residual = None if residual is None else rows_of(residual)
    y = matmul.matmul(rows_of(x), (weight if copy is None else copy).t(), bias, residual, seed, dropout_p, fp16)
    return y.view(*x.shape[:-1], weight.shape[0])


@_linear_fwd.register_fake
def _(x, weight, copy, bias, residual, *_):
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype if residual is None else residual.dtype)


@operator("linear_gelu_fwd")
def _linear_gelu_fwd(
    x: Tensor, weight: Tensor, copy: Tensor | None, bias: Tensor | None, act: str, fp16: bool, save: bool,
    in_place: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """activation(z) and z (empty if not ``save``), (..., N) in x's dtype. "relu2" keeps no z: it is a single 0 then, expanded
    to z's shape, by which the gradient of z finds its way back."""
    keeps = save and act != "relu2"
    a, z = matmul.matmul_gelu(rows_of(x), (weight if copy is None else copy).t(), bias, act, fp16, keeps)
    shape = *x.shape[:-1], weight.shape[0]
    return a.view(shape), z.view(shape) if keeps else a.new_zeros(()).expand(shape) if save else z


@_linear_gelu_fwd.register_fake
def _(x, weight, copy, bias, act, fp16, save, in_place):
    shape = *x.shape[:-1], weight.shape[0]
    z = x.new_zeros(()).expand(shape) if save and act == "relu2" else x.new_empty(shape if save else 0)
    return x.new_empty(shape), z


# ---------------------------------------------------------------- autograd


def weight_and_bias(
    dz: Tensor, x: Tensor, weight: Tensor, wants_weight: bool, bias_dtype: torch.dtype | None, in_place: bool, *,
    fp16: bool = False, db: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(dW, db), None where not wanted or, in place, where done already. ``db``: if the pass that formed dz has it."""
    ask = bias_dtype if db is None else None
    if not wants_weight:
        return None, rows_of(dz).sum(0, dtype=torch.float32).to(ask) if ask else db
    dw: Tensor | None = None
    if in_place and not torch.is_grad_enabled() and matmul.adds_in_place(weight.grad, weight):
        summed = _bwd_weight_add(weight.grad, dz, x, ask, fp16)
    else:
        dw, summed = _bwd_weight(dz, x, weight, ask, fp16)
    return dw, summed if ask else db


def _save_linear(ctx, inputs, output):
    x, weight, copy, bias, residual, seed, pre, pre_bias, ctx.dropout_p, ctx.act, ctx.fp16, ctx.in_place = inputs
    wants = ctx.needs_input_grad
    ctx.dtype, ctx.bias_dtype = x.dtype, bias.dtype if bias is not None and wants[3] else None
    ctx.pre_bias_dtype = pre_bias.dtype if pre_bias is not None and wants[7] else None
    ctx.set_materialize_grads(False)
    pre = x if pre is not None and ctx.act == "relu2" else pre
    ctx.save_for_backward(
        x if wants[1] else None, weight if wants[1] else None, weight if copy is None else copy, seed, pre
    )


def _linear_backward(ctx, dy):
    if dy is None:
        return (None,) * 12
    x, weight, operand, seed, pre = ctx.saved_tensors
    wants, db, dx, dpre, dpre_bias = ctx.needs_input_grad, None, None, None, None
    if seed is not None:
        dz, sums = _pointwise_bwd(dy, None, seed, ctx.dropout_p, None, ctx.dtype, ctx.bias_dtype)
        db = sums if ctx.bias_dtype else None
    else:
        dz = dy.to(ctx.dtype)
    if pre is not None and (wants[0] or wants[6] or wants[7]):
        dpre, sums = _bwd_input_gelu(dz, operand, pre, ctx.act, ctx.fp16, ctx.pre_bias_dtype)
        dpre_bias = sums if ctx.pre_bias_dtype else None
    elif wants[0]:
        dx = _bwd_input(dz, operand, ctx.fp16)
    dw, db = weight_and_bias(dz, x, weight, wants[1], ctx.bias_dtype, ctx.in_place, fp16=ctx.fp16, db=db)
    return dx, dw, None, db, dy if wants[4] else None, None, dpre, dpre_bias, *[None] * 4


def _save_gelu(ctx, inputs, output):
    x, weight, copy, bias, ctx.act, ctx.fp16, _, ctx.in_place = inputs
    wants = ctx.needs_input_grad
    ctx.bias_dtype = bias.dtype if bias is not None and wants[3] else None
    ctx.set_materialize_grads(False)
    pre = output[0 if ctx.act == "relu2" else 1]
    ctx.save_for_backward(x if wants[1] else None, weight if wants[1] else None, weight if copy is None else copy, pre)


def _gelu_backward(ctx, da, dpre):
    """``dpre``: from mlp's second matmul, which has applied activation' already; ``da``: from any other use of the result."""
    x, weight, operand, pre = ctx.saved_tensors
    wants, db = ctx.needs_input_grad, None
    if da is not None:
        dz, sums = _pointwise_bwd(da, pre, None, 0.0, ctx.act, pre.dtype, ctx.bias_dtype)
        db = sums if ctx.bias_dtype else None
        if dpre is not None:
            dz, db = dz + dpre, None
    elif dpre is not None:
        dz = dpre
    else:
        return (None,) * 8
    dx = _bwd_input(dz, operand, ctx.fp16) if wants[0] else None
    dw, db = weight_and_bias(dz, x, weight, wants[1], ctx.bias_dtype, ctx.in_place, fp16=ctx.fp16, db=db)
    return dx, dw, None, db, None, None, None, None


_linear_fwd.register_autograd(_linear_backward, setup_context=_save_linear)
_linear_gelu_fwd.register_autograd(_gelu_backward, setup_context=_save_gelu)


# ---------------------------------------------------------------- public


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    accumulate: str = "fp32",
    keep_copy: bool = True,
) -> Tensor:
    """dropout(x @ weight.T + bias) + residual.

    x (..., in) of any rank from 1, weight (out, in), bias (out,), residual (..., out), any strides, each fp32, fp16 or
    bf16 (a transposed (in, out) weight is read in place). The matmul runs in x's dtype (under autocast, in autocast's);
    the result has that dtype, or the residual's. Each gradient has its input's dtype, that of an fp32 weight without
    going through 16 bits. ``dropout_p`` > 0 draws a seed from torch's generator. ``accumulate="fp16"``:
    docs/precision-modes.md.
    ``keep_copy``: whether a copy of the weight in another dtype is kept from call to call (working_copy.py), or cast at
    each.

    Raises ValueError for arguments that do not fit. CPU tensors outside Triton's interpreter are computed by
    ``reference.linear``.

    >>> x, weight, residual = torch.randn(2, 8, 32), torch.randn(64, 32), torch.randn(2, 8, 64)
    >>> torch.allclose(linear(x, weight, residual=residual), x @ weight.T + residual, atol=1e-4)
    True
    """
    dtype = check(x, weight, bias, accumulate, residual, dropout_p)
    if not runtime.runs_in_triton(x):
        return reference.linear(x, weight, bias, residual=residual, dropout_p=dropout_p, accumulate=accumulate)
    return _linear(x.to(dtype), None, None, weight, bias, residual, dropout_p, None, accumulate, keep_copy)


def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    approximate: str = "tanh",
    accumulate: str = "fp32",
    keep_copy: bool = True,
) -> Tensor:
    """gelu(x @ weight.T + bias), ``approximate`` as in torch.nn.functional.gelu: "tanh" or "none".

    x (..., in), weight (out, in), bias (out,) -> (..., out); strides, dtypes (fp32, fp16, bf16), ``accumulate`` and
    ``keep_copy`` as in ``linear``. Where a linear layer follows, ``mlp`` moves fewer bytes in backward. Raises ValueError for
    arguments that do not fit.

    >>> x, weight = torch.randn(2, 8, 32), torch.randn(64, 32)
    >>> expected = torch.nn.functional.gelu(x @ weight.T, approximate="tanh")
    >>> torch.allclose(linear_gelu(x, weight), expected, atol=1e-4)
    True
    """
    dtype = check(x, weight, bias, accumulate)
    arguments.approximate(approximate)
    if not runtime.runs_in_triton(x):
        return reference.linear_gelu(x, weight, bias, approximate=approximate, accumulate=accumulate)
    act = _act("gelu", approximate, dtype)
    return _activated(x.to(dtype), weight, bias, act, accumulate, keep_copy, _wanted(x, weight, bias))[0]


def linear_relu2(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, accumulate: str = "fp32", keep_copy: bool = True
) -> Tensor:
    """relu(x @ weight.T + bias)^2.

    x (..., in), weight (out, in), bias (out,) -> (..., out); strides, dtypes (fp32, fp16, bf16), ``accumulate`` and
    ``keep_copy`` as in ``linear``. Raises ValueError for arguments that do not fit.

    >>> x, weight = torch.randn(2, 8, 32), torch.randn(64, 32)
    >>> torch.allclose(linear_relu2(x, weight), (x @ weight.T).relu() ** 2, atol=1e-3)
    True
    """
    dtype = check(x, weight, bias, accumulate)
    if not runtime.runs_in_triton(x):
        return reference.linear_relu2(x, weight, bias, accumulate=accumulate)
    act = _act("relu2", "tanh", dtype)
    return _activated(x.to(dtype), weight, bias, act, accumulate, keep_copy, _wanted(x, weight, bias))[0]


def mlp(
    x: Tensor,
    w_fc: Tensor,
    b_fc: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    activation: str = "gelu",
    approximate: str = "tanh",
    accumulate: str = "fp32",
    keep_copy: bool = True,
) -> Tensor:
    """dropout(gelu(x @ w_fc.T + b_fc) @ w_proj.T + b_proj) + residual: ``linear`` of ``linear_gelu``, whose backward has
    no pass for the GELU; or, with ``activation="relu2"``, of ``linear_relu2``, which also keeps a tensor less for backward.

    x (..., C), w_fc (H, C), b_fc (H,), w_proj (out, H), b_proj (out,), residual and result (..., out); strides, dtypes (fp32,
    fp16, bf16), ``accumulate`` and ``keep_copy`` as in ``linear``. ``approximate`` concerns GELU alone. Raises ValueError for
    arguments that do not fit.

    >>> x, w_fc, w_proj = torch.randn(2, 8, 32), torch.randn(128, 32), torch.randn(32, 128)
    >>> expected = torch.nn.functional.gelu(x @ w_fc.T, approximate="tanh") @ w_proj.T + x
    >>> torch.allclose(mlp(x, w_fc, None, w_proj, None, residual=x), expected, atol=1e-3)
    True
    """
    arguments.approximate(approximate)
    arguments.choice("activation", activation, MLP_ACTIVATIONS)
    dtype = check_mlp(x, w_fc, b_fc, w_proj, b_proj, accumulate, residual, dropout_p)
    if not runtime.runs_in_triton(x):
        return reference.mlp(
            x, w_fc, b_fc, w_proj, b_proj, residual=residual, dropout_p=dropout_p,
            activation=activation, approximate=approximate, accumulate=accumulate,
        )  # fmt: skip
    pre_bias = b_fc if _wanted(b_fc) else None  # whose gradient comes with that of z, from the second matmul
    bias = b_fc if pre_bias is None or b_fc is None else b_fc.detach()
    act = _act(activation, approximate, dtype)
    a, pre = _activated(x.to(dtype), w_fc, bias, act, accumulate, keep_copy, _wanted(x, w_fc, b_fc))
    return _linear(a, pre, pre_bias, w_proj, b_proj, residual, dropout_p, act, accumulate, keep_copy)


def check_mlp(
    x: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None,
    accumulate: str = "fp32", residual: Tensor | None = None, dropout_p: float = 0.0,
) -> torch.dtype:  # fmt: skip
    """``check`` of both layers."""
    dtype = check(x, w_fc, b_fc, accumulate, names=("x", "w_fc", "b_fc"))
    hidden = x.new_empty(()).expand(*x.shape[:-1], w_fc.shape[0])
    check(
        hidden, w_proj, b_proj, accumulate, residual, dropout_p, names=("the activation's output", "w_proj", "b_proj")
    )
    return dtype


def _wanted(*tensors: Tensor | None) -> bool:
    """Whether any of them gets a gradient."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _act(activation: str, approximate: str, dtype: torch.dtype) -> str:
    """Which of matmul.ACTIVATIONS it is, for operands of this dtype."""
    if activation == "relu2":
        return "relu2_fp16" if dtype == torch.float16 else "relu2"
    return "gelu_erf" if approximate == "none" else "gelu"


def _activated(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, accumulate: str, keep_copy: bool, save: bool
) -> tuple[Tensor, Tensor | None]:
    """activation(z), and with ``save`` z or what stands for it, else None."""
    copy, fp16 = _copy(weight, x.dtype, keep_copy), accumulate == "fp16"
    few = x.numel() < matmul.FEWEST_TOKENS * x.shape[-1]
    if few and not fp16 and act.startswith("gelu") and not torch.is_grad_enabled():
        # As in ``_linear``: no table has a kernel for so few tokens, which is how sampling comes.
        z = F.linear(x, weight if copy is None else copy, None if bias is None else bias.to(x.dtype))
        return F.gelu(z, approximate="none" if act == "gelu_erf" else "tanh"), None
    a, pre = _linear_gelu_fwd(x, weight, copy, bias, act, fp16, save, adds_to(weight))
    return a, pre if save else None


def _linear(
    x: Tensor, pre: Tensor | None, pre_bias: Tensor | None, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None, dropout_p: float, act: str | None, accumulate: str, keep_copy: bool,
) -> Tensor:  # fmt: skip
    copy = _copy(weight, x.dtype, keep_copy)
    if not _wanted(x, weight, bias, pre_bias) and residual is None and dropout_p == 0 and accumulate == "fp32":
        # Plain PyTorch, which is cuBLAS as well: an op costs the host more, which sampling feels.
        return F.linear(x, weight if copy is None else copy, None if bias is None else bias.to(x.dtype))
    seed = runtime.draw_seed(x.device) if dropout_p > 0 else None
    options = dropout_p, act, accumulate == "fp16", adds_to(weight)
    return _linear_fwd(x, weight, copy, bias, residual, seed, pre, pre_bias, *options)


def _copy(weight: Tensor, dtype: torch.dtype, keep: bool) -> Tensor | None:
    """``weight`` in ``dtype``, with ``keep`` the working copy; None if it has that dtype."""
    if weight.dtype == dtype:
        return None
    return working_copy(weight, dtype, differentiable=False) if keep else weight.detach().to(dtype)


def check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    accumulate: str = "fp32",
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    names: tuple[str, str, str] = ("x", "weight", "bias"),
) -> torch.dtype:
    """Raise ValueError unless all fit together. Returns the dtype of the matmul's operands."""
    x_name, w_name, b_name = names
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{x_name} is {tuple(x.shape)} and {w_name} {tuple(weight.shape)}: they have to be (..., in) and (out, in)"
        )
    out, dtype = (*x.shape[:-1], weight.shape[0]), runtime.compute_dtype(x)
    rest = (w_name, weight, None), (b_name, bias, out[-1:]), ("residual", residual, out)
    arguments.tensors("the result", out, (x_name, x, None), *rest)
    if dropout_p:
        arguments.probability("dropout_p", dropout_p)
    if accumulate != "fp32":
        arguments.accumulate(accumulate, dtype)
    return dtype
