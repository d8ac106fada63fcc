"""The backward ops of fused_linear.py, as torch.library sees them: what autograd's formulas there are made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgpt.kernels import _linear_launch as launch


def rows_of(t: Tensor) -> Tensor:
    """(rows, columns), also of no columns; a view where strides allow one."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


# dz and x are (..., N) and (..., K) here, and of the same 16- or 32-bit dtype.


@torch.library.custom_op("fastgpt::linear_bwd_input", mutates_args=())
def _bwd_input(dz: Tensor, weight: Tensor, pre: Tensor | None, erf: bool, fp16: bool) -> Tensor:
    """dz @ weight, times gelu'(pre) if given."""
    if pre is None:
        dx = launch.matmul(rows_of(dz), weight, None, None, None, 0.0, fp16)
    else:
        dx, _ = launch.matmul_dgelu(rows_of(dz), weight, rows_of(pre), erf, fp16)
    return dx.view(*dz.shape[:-1], weight.shape[1])


@_bwd_input.register_fake
def _(dz, weight, pre, erf, fp16):
    return dz.new_empty(*dz.shape[:-1], weight.shape[1])


@torch.library.custom_op("fastgpt::linear_bwd_input_sums", mutates_args=())
def _bwd_input_sums(
    dz: Tensor, weight: Tensor, pre: Tensor, erf: bool, fp16: bool, bias_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(dz @ weight) gelu'(pre), and its column sums: the gradient of the bias in ``pre``."""
    dpre, sums = launch.matmul_dgelu(rows_of(dz), weight, rows_of(pre), erf, fp16, bias_dtype)
    assert sums is not None
    return dpre.view(pre.shape), sums


@_bwd_input_sums.register_fake
def _(dz, weight, pre, erf, fp16, bias_dtype):
    return torch.empty_like(pre), dz.new_empty(pre.shape[-1], dtype=bias_dtype)


def _new_weight_grads(weight: Tensor, bias_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """dW with weight's layout, so that a transposed view gives its base a contiguous gradient; db, or empty."""
    dw = torch.empty_like(weight) if launch.dense(weight) else weight.new_empty(weight.shape)
    return dw, weight.new_empty(weight.shape[0] if bias_dtype else 0, dtype=bias_dtype or weight.dtype)


@torch.library.custom_op("fastgpt::linear_bwd_weight", mutates_args=())
def _bwd_weight(
    dz: Tensor, x: Tensor, weight: Tensor, bias_dtype: torch.dtype | None, fp16: bool
) -> tuple[Tensor, Tensor]:
    """dW and, if ``bias_dtype``, db. Of weight only shape, layout and dtype matter."""
    dw, db = _new_weight_grads(weight, bias_dtype)
    launch.weight_grad(rows_of(dz), rows_of(x), dw, db if bias_dtype else None, fp16)
    return dw, db


@_bwd_weight.register_fake
def _(dz, x, weight, bias_dtype, fp16):
    return _new_weight_grads(weight, bias_dtype)


@torch.library.custom_op("fastgpt::linear_bwd_weight_add", mutates_args=("grad",))
def _bwd_weight_add(grad: Tensor, dz: Tensor, x: Tensor, bias_dtype: torch.dtype | None, fp16: bool) -> Tensor:
    """grad += dW; returns db, empty without ``bias_dtype``."""
    db = grad.new_empty(grad.shape[0] if bias_dtype else 0, dtype=bias_dtype or grad.dtype)
    launch.weight_grad(rows_of(dz), rows_of(x), grad, db if bias_dtype else None, fp16, add=True)
    return db


@_bwd_weight_add.register_fake
def _(grad, dz, x, bias_dtype, fp16):
    return grad.new_empty(grad.shape[0] if bias_dtype else 0, dtype=bias_dtype or grad.dtype)


def _new_pointwise(dy: Tensor, dtype: torch.dtype, bias_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    N = dy.shape[-1]
    return dy.new_empty(dy.shape, dtype=dtype), dy.new_empty(N if bias_dtype else 0, dtype=bias_dtype or dtype)


def _pointwise(dy, dtype, bias_dtype, pre, seed, dropout_p, erf):
    dz, db = launch.pointwise_grad(
        rows_of(dy), dtype, None if pre is None else rows_of(pre), seed, dropout_p, erf, bias_dtype
    )
    return dz.view(dy.shape), dz.new_empty(0) if db is None else db


@torch.library.custom_op("fastgpt::gelu_bwd", mutates_args=())
def _gelu_bwd(
    dy: Tensor, pre: Tensor, erf: bool, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """dz = dy gelu'(pre) and, if ``bias_dtype``, its column sums: for a GELU whose next matmul is not ours."""
    return _pointwise(dy, dtype, bias_dtype, pre, None, 0.0, erf)


@_gelu_bwd.register_fake
def _(dy, pre, erf, dtype, bias_dtype):
    return _new_pointwise(dy, dtype, bias_dtype)


@torch.library.custom_op("fastgpt::dropout_bwd", mutates_args=())
def _dropout_bwd(
    dy: Tensor, seed: Tensor, dropout_p: float, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """dy through the dropout of forward, and if ``bias_dtype`` its column sums."""
    return _pointwise(dy, dtype, bias_dtype, None, seed, dropout_p, False)


@_dropout_bwd.register_fake
def _(dy, seed, dropout_p, dtype, bias_dtype):
    return _new_pointwise(dy, dtype, bias_dtype)
