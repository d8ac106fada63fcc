"""cuBLAS's product of 16-bit matrices, with the result in fp32: what weight gradients are summed in."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fastgpt.kernels import runtime


@lru_cache
def _adds_to_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch adds 16-bit products to an fp32 sum in one GEMM; older ones wanted the sum in 16 bits too
    (pytorch#167931)."""
    try:
        operand, total = torch.ones(16, 16, device=device, dtype=dtype), torch.ones(16, 16, device=device)
        torch.addmm(total, operand, operand, out_dtype=torch.float32, out=total)  # type: ignore[call-overload]
        return True
    except RuntimeError:
        return False


def matmul_fp32(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """out = a @ b, or out += a @ b, in fp32 from operands of any dtype. Autocast, which is still on inside an op,
    leaves the out= overloads alone, and operands that have its dtype already."""
    with runtime.record("matmul_fp32", (*out.shape, a.shape[1]), a.dtype, "cublas"):
        if not a.is_cuda or a.dtype == torch.float32:
            torch.addmm(out, a.float(), b.float(), beta=int(accumulate), out=out)
        elif not accumulate:
            torch.mm(a, b, out_dtype=torch.float32, out=out)  # type: ignore[call-overload]
        elif _adds_to_fp32(a.device, a.dtype):
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)  # type: ignore[call-overload]
        else:
            out += torch.mm(a, b, out_dtype=torch.float32)  # type: ignore[call-overload]
