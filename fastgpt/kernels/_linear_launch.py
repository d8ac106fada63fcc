"""How the matmuls of fused_linear.py are run: by cuBLAS or by which Triton kernel, in which tiles. 2-d tensors only.

``choose`` decides it for each matmul, asking the tuning tables: cuBLAS unless Triton was measured to be quicker on such a
card, and Triton's kernels where products are summed in fp16, which no library does by chunks. Every epilogue runs on both
engines: cuBLAS is then followed by a kernel that only sweeps memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from fastgpt.kernels import _column_sums as column_sums
from fastgpt.kernels import runtime, tuning
from fastgpt.kernels._linear_kernels import linear_kernel, pointwise_grad_kernel, sum_splits_kernel, weight_grad_kernel
from fastgpt.kernels.matmul_fp32 import matmul_fp32

MAX_SPLITS = 8
FLOPS_PER_BYTE = 128
"""What a GPU computes while it moves a byte: 116 for the RTX 4070 in bf16, up to 300 elsewhere."""
PARTIALS_IN_L2 = 18 * 2**20
"""Half of the RTX 4070's L2."""


FEWEST_TOKENS = 2048
"""Tokens of the smallest matmul in the tuning tables: a micro-batch of GPT-2 350M on 12 GB has as many."""


def linear_bucket(N: int, K: int, tokens: int) -> str | None:
    """Bucket of a linear layer's matmul: (tokens, K) by (K, N), or the gradient (N, K) of a weight. Exact in N and K, which
    a model has few of; any number of tokens from FEWEST_TOKENS on, so that a new batch size compiles nothing."""
    return f"N{N} K{K}" if tokens >= FEWEST_TOKENS else None


CHUNK_LIMITS = {"linear": 128, "weight_grad": 64}
"""Most products that may be summed in fp16 where results are stored in 16 bits, and in weight gradients, stored in fp32:
docs/precision-modes.md has the errors. In no table is there a config beyond."""
_TILES = ((128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8), (256, 128, 16), (128, 64, 4))
_DEPTHS = ((32, 3), (32, 4), (32, 5), (64, 3), (64, 4))


def _space(kind: str, *, fast: bool) -> list[tuning.Config]:
    """Tiles of C and warps, x depth of a block of K and stages, x products to a sum in fp16 (``fast``), x ways to split the
    tokens of a weight gradient; and cuBLAS, which has no sums in fp16 by chunks."""
    grad = kind.startswith("weight_grad")
    limit = CHUNK_LIMITS["weight_grad" if grad else "linear"]
    found = [] if fast else [tuning.CUBLAS]
    for (m, n, warps), (k, stages) in product(_TILES, _DEPTHS):
        base = {"block_m": m, "block_n": n, "block_k": k, "group": 8, "num_warps": warps, "num_stages": stages}
        chunks = [{"chunk": products // k} for products in (64, 128) if products <= limit] if fast else [{}]
        ways = [{"splits": splits} for splits in range(1, MAX_SPLITS + 1)] if grad else [{}]
        found += [{**base, **chunk, **split} for chunk, split in product(chunks, ways)]
    return found


LINEAR_KINDS = ("none", "bias", "residual", "gelu", "dgelu", "weight_grad", "weight_grad_bias")
"""What follows a matmul (in "dgelu": precedes the next), or which gradient of a weight it is. "none" and "bias" stay with
cuBLAS, which adds a bias itself, unless sums are in fp16."""
for _kind in LINEAR_KINDS[2:]:
    tuning.space(f"linear.{_kind}", _space(_kind, fast=False))
for _kind in LINEAR_KINDS:
    tuning.space(f"linear_fast.{_kind}", _space(_kind, fast=True))


class Tiles(NamedTuple):
    """Tiles of a matmul in Triton, as tables have them. ``chunk``: blocks of K whose products are summed in fp16, or 0 for
    fp32. ``splits``: ways to split K, of weight gradients."""

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


def choose(
    kind: str,
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    device: torch.device,
    accumulate: str = "fp32",
    *,
    wide: bool = True,
    usual: bool = True,
) -> tuning.Choice:
    """The engine that computes (M, K) @ (K, N) and what goes with it, and its tiles: ``tuning.CUBLAS``, or the fields of Tiles.

    ``kind``: one of ``LINEAR_KINDS``; of weight gradients M and N are the weight's rows and columns and K
    counts tokens. ``wide``: see ``_wide``. ``usual``: whether layout and options are those that tables were made for.
    """
    fast = accumulate == "fp16"
    bucket = None
    if wide and usual:
        rows, columns, tokens = (M, N, K) if kind.startswith("weight_grad") else (N, K, M)
        bucket = linear_bucket(rows, columns, tokens)
    default = tuning.CUBLAS
    if fast:
        sms, arch = runtime.sm_count(device), tuning.arch_of(device)
        default = default_tiles(kind, M, N, K, dtype, accumulate, sms, wide, arch)
    return tuning.choose(f"linear{'_fast' if fast else ''}.{kind}", dtype, bucket, device, default)


@lru_cache(maxsize=1024)
def default_tiles(
    kind: str, M: int, N: int, K: int, dtype: torch.dtype, accumulate: str = "fp32", sms: int = 46, wide: bool = True,
    arch: int | None = None,
) -> tuning.Config:  # fmt: skip
    """Tiles where no table has any, as a config. ``wide``: whether memory can be read 128 bits at a time (see ``_wide``);
    where it cannot, an address per element takes the registers of a large tile. A weight gradient is split along K where
    its tiles leave SMs idle. Nothing else depends on M: a new batch size compiles nothing.

    128 x 128 x 64 in 8 warps spills nothing, and its 64 KB of shared memory hold two blocks of K while a third is on its
    way. Sums in fp16 are of 64 products: those of 128, which tables may have, err more and gain nothing by the model of
    ranking.py, as L2 binds and not the promotions.
    """
    grad = kind.startswith("weight_grad")
    if runtime.INTERPRET:  # the cost there is per program and operation, hardly per element
        m, n, k = (min(max(triton.next_power_of_2(size), 16), 512) for size in (M, N, K))
        tiles = Tiles(m, n, min(k, 64 if accumulate == "fp16" else 128), group=8, num_warps=4, num_stages=1)
    elif dtype == torch.float32 or not wide:
        tiles = Tiles(64, 64, 32, group=8, num_warps=8, num_stages=2)
    else:
        tiles = Tiles(128, 128, 64, group=8, num_warps=8, num_stages=3)
    found = tiles._asdict()
    del found["chunk"], found["splits"]
    if accumulate == "fp16":
        found["chunk"] = max(64 // tiles.block_k, 1)
        if kind == "dgelu" and arch == 120:
            found["num_stages"] = min(tiles.num_stages, 2)  # a third block of K on its way would spill
    if grad:
        found["splits"] = splits(M, N, K, tiles.block_m, tiles.block_n, sms)
    return found


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


def _choose(kind: str, a: Tensor, b: Tensor, fp16: bool, *, plain: bool = True) -> tuning.Choice:
    """The choice for a @ b. ``plain``: without the options that take registers, dropout and the exact GELU."""
    (M, K), N = a.shape, b.shape[1]
    weights_lie = {"none": True, "dgelu": b.stride(1) == 1}.get(kind, b.stride(0) == 1)  # as in (out, in), of a linear
    usual = plain and weights_lie and a.stride(1) == 1
    return choose(kind, M, N, K, a.dtype, a.device, _accumulate(fp16), wide=_wide(a, b), usual=usual)


Result = TypeVar("Result")


def _run(choice: tuning.Choice, a: Tensor, b: Tensor, run: Callable[[tuning.Config], Result]) -> Result:
    """What a @ b is computed by: ``run`` with the config of ``choice``."""
    shape, engine = (a.shape[0], b.shape[1], a.shape[1]), "cublas" if choice.config == tuning.CUBLAS else "triton"
    with runtime.record(choice.key.kernel, shape, a.dtype, engine):
        return tuning.launch(choice, run)


def _launch(
    tiles: Tiles, a: Tensor, b: Tensor, out: Tensor, epilogue: str, *, bias: Tensor | None = None,
    pre: Tensor | None = None, residual: Tensor | None = None, seed: Tensor | None = None, dropout_p: float = 0.0,
    erf: bool = False, sums: Tensor | None = None,
) -> None:  # fmt: skip
    """``sums`` (N,): of out's columns."""
    (M, K), N = a.shape, b.shape[1]
    if M == 0 or N == 0:
        return
    residual = None if residual is None else runtime.columns_adjacent(residual)
    rows = triton.cdiv(M, tiles.block_m)
    partial = column_sums.partial(rows, sums)
    with runtime.device_guard(a):
        linear_kernel[(rows * triton.cdiv(N, tiles.block_n),)](
            a, b, None if bias is None else bias.contiguous(), pre, residual, seed, out, partial, M, N, K,
            *a.stride(), *b.stride(), 0 if residual is None else residual.stride(0), dropout_p,
            EPILOGUE=epilogue, ERF=erf, **tiles.options(K),
        )  # fmt: skip
        column_sums.add_up((partial, sums))


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
    ends = residual is not None or seed is not None
    kind = "residual" if ends else "none" if bias is None else "bias"

    def run(config: tuning.Config) -> Tensor:
        if config == tuning.CUBLAS:
            y = _cublas(a, b, bias)
            if seed is not None:
                y, _ = pointwise_grad(y, y.dtype, None, seed, dropout_p, False, None)  # dropout is its own gradient
            return y if residual is None else (y + residual).to(residual.dtype)
        out = a.new_empty(a.shape[0], b.shape[1], dtype=a.dtype if residual is None else residual.dtype)
        _launch(Tiles(**config), a, b, out, "none", bias=bias, residual=residual, seed=seed, dropout_p=dropout_p)
        return out

    return _run(_choose(kind, a, b, fp16, plain=seed is None), a, b, run)


def matmul_gelu(a: Tensor, b: Tensor, bias: Tensor | None, erf: bool, fp16: bool, save: bool) -> tuple[Tensor, Tensor]:
    """(gelu(z), z) of z = a @ b + bias, both (M, N) in a's dtype; z is empty if not ``save``."""

    def run(config: tuning.Config) -> tuple[Tensor, Tensor]:
        if config == tuning.CUBLAS:
            pre = _cublas(a, b, bias)
            out = torch.nn.functional.gelu(pre, approximate="none" if erf else "tanh")
            return out, pre if save else a.new_empty(0)
        M, N = a.shape[0], b.shape[1]
        out, pre = a.new_empty(M, N), a.new_empty((M, N) if save else 0)
        _launch(Tiles(**config), a, b, out, "gelu", bias=bias, pre=pre if save else None, erf=erf)
        return out, pre

    return _run(_choose("gelu", a, b, fp16, plain=not erf), a, b, run)


def matmul_dgelu(
    a: Tensor, b: Tensor, pre: Tensor, erf: bool, fp16: bool, bias_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """(a @ b) * gelu'(pre), in a's dtype, and with ``bias_dtype`` its column sums, from the kernel that forms it."""

    def run(config: tuning.Config) -> tuple[Tensor, Tensor | None]:
        if config == tuning.CUBLAS:
            return pointwise_grad(_cublas(a, b), a.dtype, pre, None, 0.0, erf, bias_dtype)
        out = a.new_empty(a.shape[0], b.shape[1])
        sums = None if bias_dtype is None else a.new_zeros(b.shape[1], dtype=bias_dtype)
        _launch(Tiles(**config), a, b, out, "dgelu", pre=pre, erf=erf, sums=sums)
        return out, sums

    return _run(_choose("dgelu", a, b, fp16, plain=not erf), a, b, run)


def dense(t: Tensor) -> bool:
    return t.is_contiguous() or t.t().is_contiguous()


def adds_in_place(grad: Tensor | None, weight: Tensor) -> bool:
    """Whether ``weight_grad`` can add to this ``.grad``."""
    return grad is not None and grad.dtype == torch.float32 and grad.shape == weight.shape and dense(grad)


def weight_grad(dz: Tensor, x: Tensor, dw: Tensor, db: Tensor | None, fp16: bool, *, add: bool = False) -> None:
    """dw (N, K) = dz (M, N)^T @ x (M, K), or += with ``add`` (fp32 only), and db (N,) = the sums of dz over its rows.

    dw is dense (contiguous, or the transpose of such) and written in its own dtype from fp32 sums, never through 16 bits.
    """
    (M, N), K = dz.shape, x.shape[1]
    if N == 0 or K == 0:
        if db is not None:
            db.copy_(dz.sum(0, dtype=torch.float32))
        return
    kind = "weight_grad" if db is None else "weight_grad_bias"
    usual = dz.stride(1) == 1 and x.stride(1) == 1 and dw.is_contiguous()
    choice = choose(kind, N, K, M, x.dtype, x.device, _accumulate(fp16), wide=_wide(dz, x, dw), usual=usual)

    def run(config: tuning.Config) -> None:
        if config != tuning.CUBLAS:
            _weight_grad_in_tiles(Tiles(**config), dz, x, dw, db, add)
            return
        if dw.dtype == torch.float32:
            matmul_fp32(dw, dz.t(), x, accumulate=add)
        else:
            torch.mm(dz.t(), x, out=dw)
        if db is not None:
            db.copy_(dz.sum(0, dtype=torch.float32))

    _run(choice, dz.t(), x, run)


def _weight_grad_in_tiles(tiles: Tiles, dz: Tensor, x: Tensor, dw: Tensor, db: Tensor | None, add: bool) -> None:
    (M, N), K = dz.shape, x.shape[1]
    per_split = max(triton.cdiv(triton.cdiv(M, tiles.splits), tiles.block_k), 1) * tiles.block_k
    ways = max(triton.cdiv(M, per_split), 1)
    # A split's partial sums lie in memory as dw does, so that adding them up is one sweep.
    out = dw if ways == 1 else torch.empty(ways, N * K, dtype=torch.float32, device=x.device)
    sums = db if ways == 1 or db is None else torch.empty(ways, N, dtype=torch.float32, device=x.device)
    with runtime.device_guard(x):
        weight_grad_kernel[(triton.cdiv(N, tiles.block_m) * triton.cdiv(K, tiles.block_n), ways)](
            dz, x, out, sums, N, K, M, dz.stride(1), dz.stride(0), *x.stride(), *dw.stride(), per_split,
            ADD=add and ways == 1, **tiles.options(M),
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
    partial = column_sums.partial(blocks, db)
    op = "dropout_grad" if pre is None else "gelu_grad"
    with runtime.record(op, (M, N), dy.dtype, "triton"), runtime.device_guard(dy):
        pointwise_grad_kernel[(blocks, triton.cdiv(N, block_n))](
            dy, pre, seed, dz, partial, M, N, *dy.stride(), dropout_p,
            ERF=erf, ROWS=rows, BM=block_m, BN=block_n, num_warps=4,
        )  # fmt: skip
        column_sums.add_up((partial, db))
    return dz, db
