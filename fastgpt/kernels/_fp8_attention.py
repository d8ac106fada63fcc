"""Attention whose kernels also write in fp8 what the linears around it read: its output, for c_proj, and in backward the
gradient of qkv, for c_attn. Neither is then quantised by a pass of its own.

A program of attention has some rows of one head, so scales are per group of 64 columns of a row (32 where 64 does not divide
the head dimension), each exact: the largest value of a group becomes the largest of the format (_fp8_rows.py). The matmuls that
read them scale their sums over a group (_fp8_kernels.py). Bytes per element: 1 and 4 / group beside the 2 of bf16, which delta
and the weight gradients read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels import _fp8_copies as copies
from fastgpt.kernels import _fp8_launch as launch
from fastgpt.kernels import fused_attn as attn
from fastgpt.kernels import runtime
from fastgpt.kernels._fp8_launch import FORWARD, GRADIENT, Grouped
from fastgpt.kernels._fp8_rows import group_size

_ARGUMENTS = attn.PACKED


@torch.library.custom_op(
    "fastgpt::fp8_qkv_attention_fwd",
    mutates_args=(),
    schema=f"(Tensor qkv, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attention_fwd(qkv, n_head, n_kv_head, *options):
    """The output and lse as of qkv_attention_fwd, and the output in fp8: values (B, T, C), scales (C / group, B T)."""
    form = _form_of_output(qkv, n_head, n_kv_head)
    values = form.values.unflatten(-1, (n_head, -1))
    where = (values, form.scale, form.scale.shape[1])
    return *attn.packed_forward(qkv, n_head, n_kv_head, *options, form=where), *form


def _form_of_output(qkv: Tensor, n_head: int, n_kv_head: int) -> Grouped:
    B, T, width = qkv.shape
    D = width // (n_head + 2 * n_kv_head)
    return launch.new_grouped((B, T, n_head * D), FORWARD, qkv.device, group_size(D))


@_attention_fwd.register_fake
def _(qkv, n_head, n_kv_head, *options):
    return *attn.packed_outputs(qkv, n_head, n_kv_head, *options), *_form_of_output(qkv, n_head, n_kv_head)


@torch.library.custom_op(
    "fastgpt::fp8_qkv_attention_bwd",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def _attention_bwd(grad_out, qkv, out, lse, n_head, n_kv_head, *options):
    """The gradient of qkv, in its dtype and in fp8."""
    form = _form_of_gradient(qkv, n_head, n_kv_head)
    groups = form.scale.shape[0] // (n_head + 2 * n_kv_head)  # of a head
    scales = form.scale.split([heads * groups for heads in (n_head, n_kv_head, n_kv_head)])
    parts = zip(attn.unpack(form.values, n_head, n_kv_head), scales)
    forms = [(values, scale, form.scale.shape[1]) for values, scale in parts]
    return attn.packed_backward(grad_out, qkv, out, lse, n_head, n_kv_head, *options, forms=forms), *form


def _form_of_gradient(qkv: Tensor, n_head: int, n_kv_head: int) -> Grouped:
    columns = group_size(qkv.shape[-1] // (n_head + 2 * n_kv_head))
    return launch.new_grouped(qkv.shape, GRADIENT, qkv.device, columns)


@_attention_bwd.register_fake
def _(grad_out, qkv, out, lse, n_head, n_kv_head, *options):
    return qkv.new_empty(qkv.shape), *_form_of_gradient(qkv, n_head, n_kv_head)


def _attention_backward(ctx, grad_out, *_):
    grad_qkv, *form = attn.packed_gradients(ctx, _attention_bwd, grad_out)
    copies.give(grad_qkv, Grouped(*form))
    return grad_qkv, *[None] * 9


_attention_fwd.register_autograd(_attention_backward, setup_context=attn.packed_setup)


def _noted(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse, *form = _attention_fwd(*arguments)
    copies.give(out, Grouped(*form))
    return out, lse


def qkv_attention(qkv: Tensor, n_head: int, *, n_kv_head: int | None = None, **options: Any) -> Tensor:
    """fused_attn.qkv_attention, which for fused_fp8's ``linear`` also writes its output in fp8, and in backward qkv's gradient.

    Where nothing would read them (no gradients, operands not in bf16) or find them (under torch.compile), and where the head
    dimension is no multiple of 32, it is exactly that. Raises ValueError, also for a GPU without fp8.
    """
    (qkv,) = attn.autocast(qkv)
    heads = n_head + 2 * (n_kv_head or n_head)
    if (
        qkv.dtype != torch.bfloat16
        or torch.compiler.is_compiling()
        or not torch.is_grad_enabled()
        or not runtime.runs_in_triton(qkv)
        or qkv.numel() == 0
        or heads < 1
        or qkv.shape[-1] % heads
        or not group_size(qkv.shape[-1] // heads)
    ):
        return attn.qkv_attention(qkv, n_head, n_kv_head=n_kv_head, **options)
    launch.require(qkv.device)
    return attn.qkv_attention(qkv, n_head, n_kv_head=n_kv_head, _op=_noted, **options)
