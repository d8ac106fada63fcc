"""What every operation accepts and refuses alike."""

from __future__ import annotations

import pytest
import torch

from fastgpt.kernels import arguments as checks
from fastgpt.kernels import (
    attention,
    embedding,
    layer_norm,
    linear,
    linear_cross_entropy,
    linear_gelu,
    mlp,
    qkv_attention,
    reference,
)
from fastgpt.kernels.fp8 import ops

BF16 = torch.bfloat16


def matrix(*shape, dtype=torch.float32, device=None):
    """Without a zero, so that what dropout leaves is zero because it was dropped."""
    count = torch.Size(shape).numel()
    return torch.linspace(0.5, 2.0, count, device=device).view(shape).to(dtype).requires_grad_()


def weight(*shape, device):
    return torch.nn.Parameter(matrix(*shape, device=device).detach())


def calls(module, device, dtype=torch.float32):
    """Each operation with dropout: (its function of dropout_p, the tensors that get a gradient, the residual or None)."""
    x, stream = matrix(3, 16, dtype=dtype, device=device), matrix(3, 16, device=device)
    square, fc, proj = (weight(*shape, device=device) for shape in ((16, 16), (32, 16), (16, 32)))
    ones, qkv = weight(16, device=device), matrix(1, 5, 192, dtype=dtype, device=device)
    found = {
        "layer_norm": (lambda p: module.layer_norm(x, ones, residual=stream, dropout_p=p)[1], (x, stream), stream),
        "qkv_attention": (lambda p: module.qkv_attention(qkv, 2, dropout_p=p), (qkv,), None),
    }
    if module is not ops:  # in fp8 the linears have no dropout: the model's is in its norms
        found["linear"] = (lambda p: module.linear(x, square, dropout_p=p), (x, square), None)
        found["linear, residual"] = (
            lambda p: module.linear(x, square, residual=stream, dropout_p=p),
            (x, stream),
            stream,
        )
        found["mlp"] = (
            lambda p: module.mlp(x, fc, None, proj, None, residual=stream, dropout_p=p),
            (x, fc, proj),
            stream,
        )
    if hasattr(module, "attention"):
        q, k, v = (matrix(1, 5, 2, 16, dtype=dtype, device=device) for _ in range(3))
        ids = torch.arange(6, device=device).view(2, 3)
        tables = weight(7, 16, device=device), weight(3, 16, device=device)
        found["attention"] = (lambda p: module.attention(q, k, v, dropout_p=p), (q, k, v), None)
        found["attention, window"] = (lambda p: module.attention(q, k, v, window=2, dropout_p=p), (q, k, v), None)
        found["embedding"] = (lambda p: module.embedding(ids, *tables, dropout_p=p), tables, None)
    return found


class Kernels:
    attention, qkv_attention, embedding = staticmethod(attention), staticmethod(qkv_attention), staticmethod(embedding)
    layer_norm, linear, mlp = staticmethod(layer_norm), staticmethod(linear), staticmethod(mlp)


@pytest.mark.parametrize("module", [Kernels, reference, ops], ids=["kernels", "reference", "fp8"])
def test_a_dropout_of_one_leaves_the_residual_alone(device, module, request):
    if module is ops:
        request.getfixturevalue("needs_fp8")
    for name, (op, inputs, residual) in calls(module, device, BF16 if module is ops else torch.float32).items():
        out = op(1.0)
        assert torch.equal(out, torch.zeros_like(out) if residual is None else residual), name
        gradients = torch.autograd.grad(out.sum(), inputs)
        for tensor, gradient in zip(inputs, gradients):
            assert torch.equal(gradient, torch.full_like(gradient, float(tensor is residual))), name


@pytest.mark.parametrize("p", [-0.5, 1.5])
def test_a_dropout_outside_zero_to_one_is_named_alike(device, p):
    for op, _, _ in calls(Kernels, device).values():
        with pytest.raises(ValueError, match=rf"dropout_p is {p}: it must lie in \[0, 1\]"):
            op(p)


def test_sums_in_an_unknown_dtype_are_named_alike(device):
    x, w = matrix(3, 16, device=device), weight(16, 16, device=device)
    target, q = torch.zeros(3, dtype=torch.int64, device=device), matrix(1, 5, 2, 16, device=device)
    operations = (
        lambda how: linear(x, w, accumulate=how),
        lambda how: linear_gelu(x, w, accumulate=how),
        lambda how: mlp(x, w, None, w, None, accumulate=how),
        lambda how: linear_cross_entropy(x, w, target, accumulate=how),
        lambda how: attention(q, q, q, accumulate=how),
        lambda how: qkv_attention(matrix(1, 5, 96, device=device), 2, accumulate=how),
    )
    for op in operations:
        with pytest.raises(ValueError, match="accumulate is 'bf16': use 'fp32' or 'fp16'"):
            op("bf16")
        with pytest.raises(
            ValueError, match=r"accumulate is 'fp16', but the operands are torch\.float32: use float16 ones"
        ):
            op("fp16")


def test_tensors_elsewhere_are_named(device):
    q, elsewhere = matrix(1, 5, 2, 16, device=device), torch.zeros(1, 5, 2, 16, device="meta")
    with pytest.raises(ValueError, match=r"k is on meta: move it to .*, where q is"):
        attention(q, elsewhere, elsewhere)
    doc_ids = torch.zeros(1, 5, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"doc_ids is on meta: move it to .*, where qkv is"):
        qkv_attention(matrix(1, 5, 96, device=device), 2, doc_ids=doc_ids)


def test_choices_are_listed():
    with pytest.raises(ValueError, match="reduction is 'average': use 'none', 'mean' or 'sum'"):
        checks.choice("reduction", "average", ("none", "mean", "sum"))
