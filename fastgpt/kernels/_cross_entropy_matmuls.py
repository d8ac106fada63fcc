"""The matmuls around the row kernel of fused_cross_entropy.py: logits of a chunk of tokens, and what dz turns into.

``Fp32Sums`` is cuBLAS. ``Fp16Sums`` sums products in fp16 over chunks of K and these sums in fp32, which no library does: it
is the matmul of linear layers (_linear_launch.py), the logits and dx with up to 128 products to a chunk, dW with 64.

Both hold the classifier's first V rows in x's dtype. A chunk's logits (rows, ``padded(V)``) are zero past column V, and are
overwritten by dz, zero there as well.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

from fastgpt.kernels import _linear_launch as launch
from fastgpt.kernels import runtime
from fastgpt.kernels.matmul_fp32 import matmul_fp32


def padded(V: int) -> int:
    """Row stride of logits: each row starts on 128 bytes whatever V is."""
    return triton.cdiv(V, 64) * 64


class Fp32Sums:
    """weight (V, C) and bias (V,) or None in x's dtype, for chunks of at most ``rows`` tokens, whose logits share a buffer."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        self.weight, self.bias, self.V = weight, bias, weight.shape[0]
        self.buffer = weight.new_empty(rows, padded(self.V))
        self.buffer[:, self.V :].zero_()

    def logits(self, x: Tensor) -> Tensor:
        """The logits of x (rows, C)."""
        out = self.buffer[: x.shape[0]]
        if self.bias is None:
            torch.mm(x, self.weight.t(), out=out[:, : self.V])
        else:
            torch.addmm(self.bias, x, self.weight.t(), out=out[:, : self.V])
        return out

    def input_grad(self, dz: Tensor, dx: Tensor) -> None:
        """dx (rows, C) fp32 = dz W."""
        matmul_fp32(dx, dz[:, : self.V], self.weight, accumulate=False)

    def weight_grad(self, dz: Tensor, x: Tensor, dw: Tensor, add: bool) -> None:
        """dw[:V] fp32 = dz^T x, or += with ``add``."""
        matmul_fp32(dw[: self.V], dz[:, : self.V].t(), x, accumulate=add)


class Fp16Sums:
    """The same with sums in fp16. Operands are padded to whole rows of 128 bytes, which the kernel reads 16 bytes at a time."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        more = padded(weight.shape[0]) - weight.shape[0]
        self.weight = torch.nn.functional.pad(weight, (0, 0, 0, more)) if more else weight
        self.bias = torch.nn.functional.pad(bias, (0, more)) if more and bias is not None else bias

    def logits(self, x: Tensor) -> Tensor:
        with self._recorded("head.logits", x, self.weight.shape):
            return launch.matmul(x, self.weight.t(), self.bias, None, None, 0.0, True)

    def input_grad(self, dz: Tensor, dx: Tensor) -> None:
        with self._recorded("head.input_grad", dz, self.weight.t().shape):
            dx.copy_(launch.matmul(dz, self.weight, None, None, None, 0.0, True))

    def weight_grad(self, dz: Tensor, x: Tensor, dw: Tensor, add: bool) -> None:
        rows = min(dz.shape[1], dw.shape[0])  # those past V get the zeros that they have to have
        with self._recorded("head.weight_grad", dz.t(), x.t().shape):
            launch.weight_grad(dz[:, :rows], x, dw[:rows], None, True, add=add)

    @staticmethod
    def _recorded(op: str, a: Tensor, columns: torch.Size) -> AbstractContextManager:
        return runtime.record(op, (a.shape[0], *columns), a.dtype, "triton")
