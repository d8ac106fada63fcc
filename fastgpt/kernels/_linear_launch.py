"""How the matmuls of fused_linear.py are run: by cuBLAS or by which Triton kernel, in which tiles. 2-d tensors only.

``engine`` chooses who runs a matmul, ``config`` with which tiles; each is one function, so that a measured table can
take its place. Every epilogue runs on both engines: cuBLAS is then followed by a kernel that only sweeps memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastgpt.kernels import runtime
from fastgpt.kernels._linear_kernels import linear_kernel, pointwise_grad_kernel, sum_splits_kernel, weight_grad_kernel
from fastgpt.kernels.fused_cross_entropy import _matmul_fp32

MAX_SPLITS = 8
FLOPS_PER_BYTE = 128
"""What a GPU computes while it moves a byte: 116 for the RTX 4070 in bf16, up to 300 elsewhere."""
PARTIALS_IN_L2 = 18 * 2**20
"""Half of the RTX 4070's L2."""


class Config(NamedTuple):
    """Tiles of a matmul. ``chunk``: blocks of K whose products are summed in fp16, or 0 for fp32."""

    block_m: int
    block_n: int
    block_k: int
    group: int
    num_warps: int
    num_stages: int
    chunk: int = 0
    splits: int = 1

    def options(self, K: int) -> dict[str, int | bool]:
        """Keyword arguments of a launch."""
        return {
            "BM": self.block_m, "BN": self.block_n, "BK": self.block_k, "GROUP": self.group, "CHUNK": self.chunk,
            "EVEN_K": K % self.block_k == 0, "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


def engine(
    M: int, N: int, K: int, dtype: torch.dtype, epilogue: str, device: torch.device, accumulate: str = "fp32"
) -> str:
    """Who computes (M, K) @ (K, N) and what follows it: "cublas" or "triton".

    ``epilogue``: "none", "bias", "gelu", "residual" (with or without dropout), "dgelu", "weight_grad" and
    "weight_grad_bias" (there M and N are the weight's rows and columns and K counts tokens).

    cuBLAS, with the epilogue in a sweep of its own, until a measurement on the card says otherwise. No torch operation
    accumulates in fp16 by chunks, so that is Triton's.
    """
    return "triton" if accumulate == "fp16" else "cublas"


def config(
    kernel: str, M: int, N: int, K: int, dtype: torch.dtype, accumulate: str = "fp32", sms: int = 46, wide: bool = True
) -> Config:
    """Tiles for (M, K) @ (K, N). ``kernel``: "linear", "weight_grad" or "weight_grad_bias", which is split along K where
    its tiles leave SMs idle. ``wide``: whether memory can be read 128 bits at a time (see ``_wide``); where it cannot, an
    address per element takes the registers of a large tile. Nothing else depends on M: a new batch size compiles nothing.

    128 x 128 x 64 in 8 warps spills nothing, and its 64 KB of shared memory hold two blocks of K while a third is on its
    way. Sums of 128 products in fp16 err by 5e-4 and cost half the promotions of 64.
    """
    if runtime.INTERPRET:  # the cost there is per program and operation, hardly per element
        m, n, k = (min(max(triton.next_power_of_2(size), 16), 512) for size in (M, N, K))
        cfg = Config(m, n, min(k, 128), group=8, num_warps=4, num_stages=1)
    elif dtype == torch.float32 or not wide:
        cfg = Config(64, 64, 32, group=8, num_warps=8, num_stages=2)
    else:
        cfg = Config(128, 128, 64, group=8, num_warps=8, num_stages=3)
    if accumulate == "fp16":
        # Weight gradients sum over the tokens: beyond 64 their error passes bf16's (docs/precision-modes.md).
        products = 128 if kernel == "linear" else 64
        cfg = cfg._replace(chunk=max(products // cfg.block_k, 1))
    if kernel != "linear":
        cfg = cfg._replace(splits=splits(M, N, K, cfg.block_m, cfg.block_n, sms))
    return cfg


def splits(M: int, N: int, K: int, block_m: int, block_n: int, sms: int) -> int:
    """Ways to split K that take the least time, of one block per SM: more fill the last
    wave of SMs better, but each writes C in fp32 and reads it again, past what L2 keeps. At least 512 of K each.

    A model that no measurement has confirmed yet. On 46 SMs, 8192 tokens and C = 768: 5 for C x C, 2 for 3C x C, 4C x C."""
    tiles = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)

    def flops_of_one_sm(ways: int) -> float:
        waves, partial = triton.cdiv(tiles * ways, sms), 4 * ways * M * N
        moved = 0 if ways == 1 or partial <= PARTIALS_IN_L2 else 2 * partial
        return waves * 2 * block_m * block_n * K / ways + moved / sms * FLOPS_PER_BYTE

    return min(range(1, max(1, min(MAX_SPLITS, K // 512)) + 1), key=flops_of_one_sm)


# ---------------------------------------------------------------- launches


def _accumulate(fp16: bool) -> str:
    return "fp16" if fp16 else "fp32"


def _unit_columns(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _cublas(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b (+ bias) in their dtype. Autocast, which is still on inside an op, leaves the out= overloads alone."""
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias.to(a.dtype), a, b, out=out)


def _wide(*operands: Tensor) -> bool:
    """Whether 2-d tensors have neighbours along one dimension and multiples of 16 in all else, so that triton may read 16
    bytes at a time."""
    return all(
        1 in t.stride()
        and t.data_ptr() % 16 == 0
        and all(size % 16 == 0 if stride == 1 else stride % 16 == 0 for size, stride in zip(t.shape, t.stride()))
        for t in operands
    )


def _launch(
    a: Tensor, b: Tensor, out: Tensor, epilogue: str, *, bias: Tensor | None = None, pre: Tensor | None = None,
    residual: Tensor | None = None, seed: Tensor | None = None, dropout_p: float = 0.0, erf: bool = False, fp16: bool,
) -> None:  # fmt: skip
    (M, K), N = a.shape, b.shape[1]
    if M == 0 or N == 0:
        return
    cfg = config("linear", M, N, K, a.dtype, _accumulate(fp16), wide=_wide(a, b, out))
    residual = None if residual is None else _unit_columns(residual)
    with runtime.device_guard(a):
        linear_kernel[(triton.cdiv(M, cfg.block_m) * triton.cdiv(N, cfg.block_n),)](
            a, b, None if bias is None else bias.contiguous(), pre, residual, seed, out, M, N, K,
            *a.stride(), *b.stride(), 0 if residual is None else residual.stride(0), dropout_p,
            EPILOGUE=epilogue, ERF=erf, **cfg.options(K),
        )  # fmt: skip


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    fp16: bool,
) -> Tensor:
    """dropout(a @ b + bias) + residual: (M, N) in a's dtype, with a residual in its."""
    (M, K), N = a.shape, b.shape[1]
    ends = residual is not None or seed is not None
    kind = "residual" if ends else "none" if bias is None else "bias"
    if engine(M, N, K, a.dtype, kind, a.device, _accumulate(fp16)) == "triton":
        out = a.new_empty(M, N, dtype=a.dtype if residual is None else residual.dtype)
        _launch(a, b, out, "none", bias=bias, residual=residual, seed=seed, dropout_p=dropout_p, fp16=fp16)
        return out
    y = _cublas(a, b, bias)
    if seed is not None:
        y, _ = pointwise_grad(y, y.dtype, None, seed, dropout_p, False, None)  # dropout is its own gradient
    return y if residual is None else (y + residual).to(residual.dtype)


def matmul_gelu(a: Tensor, b: Tensor, bias: Tensor | None, erf: bool, fp16: bool, save: bool) -> tuple[Tensor, Tensor]:
    """(gelu(z), z) of z = a @ b + bias, both (M, N) in a's dtype; z is empty if not ``save``."""
    (M, K), N = a.shape, b.shape[1]
    if engine(M, N, K, a.dtype, "gelu", a.device, _accumulate(fp16)) == "triton":
        out, pre = a.new_empty(M, N), a.new_empty((M, N) if save else 0)
        _launch(a, b, out, "gelu", bias=bias, pre=pre if save else None, erf=erf, fp16=fp16)
        return out, pre
    pre = _cublas(a, b, bias)
    out = torch.nn.functional.gelu(pre, approximate="none" if erf else "tanh")
    return out, pre if save else a.new_empty(0)


def matmul_dgelu(a: Tensor, b: Tensor, pre: Tensor, erf: bool, fp16: bool) -> Tensor:
    """(a @ b) * gelu'(pre), in a's dtype."""
    (M, K), N = a.shape, b.shape[1]
    if engine(M, N, K, a.dtype, "dgelu", a.device, _accumulate(fp16)) == "triton":
        out = a.new_empty(M, N)
        _launch(a, b, out, "dgelu", pre=pre, erf=erf, fp16=fp16)
        return out
    return pointwise_grad(_cublas(a, b), a.dtype, pre, None, 0.0, erf, None)[0]


def _dense(t: Tensor) -> bool:
    return t.is_contiguous() or t.t().is_contiguous()


def adds_in_place(grad: Tensor | None, weight: Tensor) -> bool:
    """Whether ``weight_grad`` can add to this ``.grad``."""
    return grad is not None and grad.dtype == torch.float32 and grad.shape == weight.shape and _dense(grad)


def weight_grad(dz: Tensor, x: Tensor, dw: Tensor, db: Tensor | None, fp16: bool, *, add: bool = False) -> None:
    """dw (N, K) = dz (M, N)^T @ x (M, K), or += with ``add`` (fp32 only), and db (N,) = the sums of dz over its rows.

    dw is dense (contiguous, or the transpose of such) and written in its own dtype from fp32 sums, never through 16 bits.
    """
    (M, N), K = dz.shape, x.shape[1]
    if N == 0 or K == 0:
        if db is not None:
            db.copy_(dz.sum(0, dtype=torch.float32))
        return
    kind, accumulate = "weight_grad" if db is None else "weight_grad_bias", _accumulate(fp16)
    if engine(N, K, M, x.dtype, kind, x.device, accumulate) == "cublas":
        if dw.dtype == torch.float32:
            _matmul_fp32(dw, dz.t(), x, accumulate=add)
        else:
            torch.mm(dz.t(), x, out=dw)
        if db is not None:
            db.copy_(dz.sum(0, dtype=torch.float32))
        return
    cfg = config(kind, N, K, M, x.dtype, accumulate, runtime.sm_count(x.device), _wide(dz, x, dw))
    per_split = max(triton.cdiv(triton.cdiv(M, cfg.splits), cfg.block_k), 1) * cfg.block_k
    ways = max(triton.cdiv(M, per_split), 1)
    # A split's partial sums lie in memory as dw does, so that adding them up is one sweep.
    out = dw if ways == 1 else torch.empty(ways, N * K, dtype=torch.float32, device=x.device)
    sums = db if ways == 1 or db is None else torch.empty(ways, N, dtype=torch.float32, device=x.device)
    with runtime.device_guard(x):
        weight_grad_kernel[(triton.cdiv(N, cfg.block_m) * triton.cdiv(K, cfg.block_n), ways)](
            dz, x, out, sums, N, K, M, dz.stride(1), dz.stride(0), *x.stride(), *dw.stride(), per_split,
            ADD=add and ways == 1, **cfg.options(M),
        )  # fmt: skip
        if ways > 1:
            _sum_splits(out, dw, ways, add)
            if db is not None and sums is not None:
                _sum_splits(sums, db, ways, False)


def _sum_splits(partial: Tensor, out: Tensor, ways: int, add: bool) -> None:
    size, block = out.numel(), 2**16 if runtime.INTERPRET else 1024
    sum_splits_kernel[(triton.cdiv(size, block),)](partial, out, size, ways, ADD=add, BLOCK=block, num_warps=4)


def pointwise_grad(
    dy: Tensor, dtype: torch.dtype, pre: Tensor | None, seed: Tensor | None, dropout_p: float, erf: bool,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dz = dy * gelu'(pre), or dy through dropout, in ``dtype``; and with ``bias_dtype`` the sums of dz over its rows."""
    M, N = dy.shape
    dz = dy.new_empty(M, N, dtype=dtype)
    db = None if bias_dtype is None else dy.new_empty(N, dtype=bias_dtype)
    if M == 0 or N == 0:
        return dz, None if db is None else db.zero_()
    rows, block_m, block_n = (256, 256, 256) if runtime.INTERPRET else (64, 16, 128)
    blocks = triton.cdiv(M, rows)
    partial = None if db is None else torch.empty(blocks, N, dtype=torch.float32, device=dy.device)
    with runtime.device_guard(dy):
        pointwise_grad_kernel[(blocks, triton.cdiv(N, block_n))](
            dy, pre, seed, dz, partial, M, N, *dy.stride(), dropout_p,
            ERF=erf, ROWS=rows, BM=block_m, BN=block_n, num_warps=4,
        )  # fmt: skip
        if partial is not None and db is not None:
            _sum_splits(partial, db, blocks, False)
    return dz, db
