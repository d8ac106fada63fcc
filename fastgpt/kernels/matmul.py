"""Matmuls of the linear layers with what follows them: by cuBLAS or by which Triton kernel, in which tiles.

Every matmul is ``C (M, N) = A (M, K) B (K, N)`` of 2-d operands with any strides; a transposed weight or activation is the same
memory with its strides exchanged. Operands are read as they lie in memory (16 bit: tensor cores; fp32: true fp32) and summed in
fp32. With CHUNK > 0 (fp16 only) products are summed in fp16 over CHUNK blocks of K, which GeForce tensor cores do at twice the
rate, and each such sum is added to the fp32 accumulator: the error does not grow with K.

Tiles of C are computed by one program each, in an order that keeps GROUP rows of tiles together, so that programs that run at
once read the same columns of B from L2.

``choose`` decides for each matmul who computes it, asking the tuning tables: cuBLAS unless Triton was measured to be quicker on
such a card, and Triton's kernels where products are summed in fp16, which no library does by chunks. Every epilogue runs on
both engines: cuBLAS is then followed by a kernel that only sweeps memory.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import arguments, column_sums, runtime, tuning
from fastgpt.kernels.philox import dropout

LINEAR_KINDS = ("none", "bias", "residual", "gelu", "dgelu", "weight_grad", "weight_grad_bias")
"""What follows a matmul (in "dgelu": precedes the next), or which gradient of a weight it is. "none" and "bias" stay with
cuBLAS, which adds a bias itself, unless sums are in fp16. relu^2 goes by the configs of GELU, beside which it is cheap."""
ACTIVATIONS = ("gelu", "gelu_erf", "relu2", "relu2_fp16")
"""Between an MLP's matmuls: GELU by its tanh approximation and without, and relu^2 (So et al. 2021). Backward of "relu2" reads
the result a alone, as relu'^2(z) = 2 relu(z) = 2 sqrt(a), and z is not kept. Not in fp16, where a of a z below 2^-12 is 0."""
FEWEST_TOKENS = 2048
"""Tokens of the smallest matmul in the tuning tables: a micro-batch of GPT-2 350M on 12 GB has as many."""
CHUNK_LIMITS = {"linear": 128, "weight_grad": 64}
"""Most products that may be summed in fp16 where results are stored in 16 bits, and in weight gradients, stored in fp32:
docs/precision-modes.md has the errors. No table has a config beyond."""
MAX_SPLITS = 8
FLOPS_PER_BYTE = 128
"""What a GPU computes while it moves a byte: 116 for the RTX 4070 in bf16, up to 300 elsewhere."""
PARTIALS_IN_L2 = 18 * 2**20
"""Half of the RTX 4070's L2."""


# ---------------------------------------------------------------- configs


def _tiles(m: int, n: int, k: int, num_warps: int, num_stages: int) -> tuning.Config:
    """Tiles of a matmul, as tables have them. A config with sums in fp16 also has "chunk", the blocks of K in each, and one of
    a weight gradient "splits", the ways to split K."""
    return {"block_m": m, "block_n": n, "block_k": k, "group": 8, "num_warps": num_warps, "num_stages": num_stages}


_TILES = ((128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8), (256, 128, 16), (128, 64, 4))
_DEPTHS = ((32, 3), (32, 4), (32, 5), (64, 3), (64, 4))


def _space(kind: str, *, fast: bool) -> list[tuning.Config]:
    """Tiles of C and warps, x depth of a block of K and stages, x products to a sum in fp16 (``fast``), x ways to split the
    tokens of a weight gradient; and cuBLAS, which has no sums in fp16 by chunks."""
    grad = kind.startswith("weight_grad")
    limit = CHUNK_LIMITS["weight_grad" if grad else "linear"]
    found = [] if fast else [tuning.CUBLAS]
    for (m, n, warps), (k, stages) in product(_TILES, _DEPTHS):
        chunks = [{"chunk": products // k} for products in (64, 128) if products <= limit] if fast else [{}]
        ways = [{"splits": splits} for splits in range(1, MAX_SPLITS + 1)] if grad else [{}]
        found += [{**_tiles(m, n, k, warps, stages), **chunk, **split} for chunk, split in product(chunks, ways)]
    return found


def _options(config: tuning.Config, K: int) -> dict[str, int | bool]:
    """Keyword arguments of a launch."""
    return {
        "BM": config["block_m"], "BN": config["block_n"], "BK": config["block_k"], "GROUP": config["group"],
        "CHUNK": config.get("chunk", 0), "EVEN_K": K % config["block_k"] == 0,
        "num_warps": config["num_warps"], "num_stages": config["num_stages"],
    }  # fmt: skip


def linear_bucket(N: int, K: int, tokens: int) -> str | None:
    """Bucket of a linear layer's matmul: (tokens, K) by (K, N), or the gradient (N, K) of a weight. Exact in N and K, which
    a model has few of; any number of tokens from FEWEST_TOKENS on, so that a new batch size compiles nothing."""
    return f"N{N} K{K}" if tokens >= FEWEST_TOKENS else None


def splits(M: int, N: int, K: int, block_m: int, block_n: int, sms: int) -> int:
    """Ways to split K that take the least time, with one block per SM: more ways fill the last wave of SMs better, but each
    writes C in fp32 and reads it again, past what L2 keeps. At least 512 of K each.

    A model that no measurement has confirmed yet. On 46 SMs, 8192 tokens and C = 768: 5 for C x C, 2 for 3C x C, 4C x C."""
    tiles = runtime.cdiv(M, block_m) * runtime.cdiv(N, block_n)

    def flops_of_one_sm(ways: int) -> float:
        waves, partial = runtime.cdiv(tiles * ways, sms), 4 * ways * M * N
        moved = 0 if ways == 1 or partial <= PARTIALS_IN_L2 else 2 * partial
        return waves * 2 * block_m * block_n * K / ways + moved / sms * FLOPS_PER_BYTE

    return min(range(1, max(1, min(MAX_SPLITS, K // 512)) + 1), key=flops_of_one_sm)


def default_tiles(
    kind: str, M: int, N: int, K: int, dtype: torch.dtype, fp16: bool = False, sms: int = 46, wide: bool = True
) -> tuning.Config:  # fmt: skip
    """Tiles where no table has any, as a config. ``wide``: whether memory can be read 128 bits at a time (see ``_wide``);
    where it cannot, an address per element takes the registers of a large tile. A weight gradient is split along K where
    its tiles leave SMs idle. Nothing else depends on M: a new batch size compiles nothing.

    128 x 128 x 64 in 8 warps spills nothing, and its 64 KB of shared memory hold two blocks of K while a third is on its
    way. Sums in fp16 are of 64 products: those of 128, which tables may have, err more and gain nothing by the model of
    bench/compiler/ranking.py, as L2 binds and not the promotions.
    """
    if runtime.INTERPRET:  # the cost there is per program and operation, hardly per element
        m, n, k = (min(max(runtime.next_power_of_2(size), 16), 512) for size in (M, N, K))
        found = _tiles(m, n, min(k, 64 if fp16 else 128), num_warps=4, num_stages=1)
    elif dtype == torch.float32 or not wide:
        found = _tiles(64, 64, 32, num_warps=8, num_stages=2)
    else:
        # A third block of K would spill beside gelu' and the sums of its columns: with triton 3.6, on sm_120 with any.
        found = _tiles(128, 128, 64, num_warps=8, num_stages=2 if fp16 and kind == "dgelu" else 3)
    if fp16:
        found["chunk"] = max(64 // found["block_k"], 1)
    if kind.startswith("weight_grad"):
        found["splits"] = splits(M, N, K, found["block_m"], found["block_n"], sms)
    return found


@tuning.cached
def choose(
    kind: str, M: int, N: int, K: int, dtype: torch.dtype, device: torch.device, fp16: bool = False, *,
    wide: bool = True, usual: bool = True,
) -> tuning.Choice:  # fmt: skip
    """The engine that computes (M, K) @ (K, N) and what goes with it, and its tiles: ``tuning.CUBLAS``, or a config.

    ``kind``: one of ``LINEAR_KINDS``; in weight gradients M and N are the weight's rows and columns, and K counts tokens.
    ``wide``: see ``_wide``. ``usual``: whether layout and options are those that tables were made for.
    """
    bucket, default = None, tuning.CUBLAS
    if wide and usual:
        bucket = linear_bucket(M, N, K) if kind.startswith("weight_grad") else linear_bucket(N, K, M)
    if fp16:
        default = default_tiles(kind, M, N, K, dtype, fp16, runtime.sm_count(device), wide)
    return tuning.choose(f"linear_fast.{kind}" if fp16 else f"linear.{kind}", dtype, bucket, device, default)


# ---------------------------------------------------------------- kernels


@triton.jit
def sigmoid(x):
    """sigmoid(x) of fp32 x, and its derivative: from t = exp(-|x|) neither overflows nor loses the digits of 1 - sigmoid(x)."""
    t = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + t)
    # One step of Newton's: / may be 2 ulp off on a GPU, and sigmoid(x) of a large x not 1. div_rn would take more registers.
    r = tl.fma(r, tl.fma(-(1.0 + t), r, 1.0), r)
    return tl.where(x < 0, t * r, r), t * r * r


@triton.jit
def gelu(x, ERF: tl.constexpr):
    """GELU of fp32 x: x Phi(x), or Phi's tanh approximation (Hendrycks & Gimpel 2016). sigmoid(2u) = (1 + tanh u) / 2."""
    if ERF:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    # 2u = 2 sqrt(2 / pi) (x + 0.044715 x^3)
    s, _ = sigmoid(x * (1.5957691216057308 + 0.07135481627159963 * x * x))
    return x * s


@triton.jit
def gelu_grad(x, ERF: tl.constexpr):
    """GELU's derivative at fp32 x."""
    if ERF:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    s, slope = sigmoid(x * (1.5957691216057308 + 0.07135481627159963 * x * x))
    return s + x * slope * (1.5957691216057308 + 0.21406444881479889 * x * x)


@triton.jit
def activation(z, KIND: tl.constexpr):
    """What follows the first matmul of an MLP, of fp32 z. KIND: one of ACTIVATIONS."""
    if KIND == "relu2" or KIND == "relu2_fp16":
        z = tl.where(z < 0, 0.0, z)  # tl.maximum would turn NaN into 0, and hide it from the loss
        return z * z
    return gelu(z, KIND == "gelu_erf")


@triton.jit
def activation_grad(saved, KIND: tl.constexpr):
    """Its derivative at z, from what is saved for backward, in fp32: z or, of "relu2", the result a = relu(z)^2."""
    if KIND == "relu2":
        return 2.0 * tl.sqrt(saved)
    if KIND == "relu2_fp16":
        return 2.0 * tl.where(saved < 0, 0.0, saved)
    return gelu_grad(saved, KIND == "gelu_erf")


@triton.jit
def tile_of(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row, column) of the tile that program ``pid`` computes: column by column within GROUP rows of tiles."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * columns) * GROUP
    size = tl.minimum(rows - first, GROUP)
    within = pid % (GROUP * columns)
    return first + within % size, within // size


@triton.jit
def product_tile(
    A, B, rm, rn, M, N, first, last, stride_am, stride_ak, stride_bk, stride_bn,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, CHUNK: tl.constexpr,
    ROW_SUM: tl.constexpr,
):  # fmt: skip
    """fp32 tile A[rm, first:last] B[first:last, rn], and with ROW_SUM the sums of A's rows over that range (else zeros).

    EVEN_K: last - first is a multiple of BK."""
    # Offsets in 64 bits: rows times strides pass 2^31 elements, in logits for example.
    rk = tl.arange(0, BK)
    in_m, in_n = (rm < M)[:, None], (rn < N)[None, :]
    k = first.to(tl.int64) + rk
    a_ptr = A + rm.to(tl.int64)[:, None] * stride_am + k[None, :] * stride_ak
    b_ptr = B + k[:, None] * stride_bk + rn.to(tl.int64)[None, :] * stride_bn
    one_step = tl.full(
        (), BK, tl.int64
    )  # BK stride_ak in 64 bits, also where the stride is 1 and triton's own constant
    step_a, step_b = one_step * stride_ak, one_step * stride_bk
    acc = tl.zeros((BM, BN), tl.float32)
    part = tl.zeros((BM, BN), tl.float16)
    row_sum = tl.zeros((BM,), tl.float32)
    steps = tl.cdiv(last - first, BK)
    for step in range(steps):
        if EVEN_K:
            a, b = tl.load(a_ptr, mask=in_m, other=0.0), tl.load(b_ptr, mask=in_n, other=0.0)
        else:  # a mask that changes with the step costs registers and an access's width, so only here
            in_k = rk < last - first - step * BK
            a = tl.load(a_ptr, mask=in_m & in_k[None, :], other=0.0)
            b = tl.load(b_ptr, mask=in_n & in_k[:, None], other=0.0)
        if CHUNK == 0:
            acc = tl.dot(a, b, acc, input_precision="ieee")  # fp32 operands: no TF32
        elif CHUNK == 1:
            acc += tl.dot(a, b, out_dtype=tl.float16).to(tl.float32)
        else:
            part = tl.dot(a, b, part, out_dtype=tl.float16)
            if step % CHUNK == CHUNK - 1:
                acc += part.to(tl.float32)
                part = tl.zeros((BM, BN), tl.float16)
        if ROW_SUM:
            row_sum += tl.sum(a.to(tl.float32), axis=1)
        a_ptr += step_a
        b_ptr += step_b
    if CHUNK > 1:
        acc += part.to(tl.float32)
    return acc, row_sum


@triton.jit
def store_column_sums(tile, mask, COLUMN_SUM, row, rn, N):
    """The sums of a tile's columns, into their places in that row of COLUMN_SUM (rows, N)."""
    total = tl.sum(tl.where(mask, tile.to(tl.float32), 0.0), axis=0)
    tl.store(COLUMN_SUM + row.to(tl.int64) * N + rn, total, mask=rn < N)


@triton.jit
def linear_kernel(
    A, B, BIAS, PRE, RESIDUAL, SEED, C, COLUMN_SUM, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_residual, dropout_p,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """C = epilogue(A B), C and PRE (M, N) contiguous. EPILOGUE, on the fp32 tile z of A B (+ BIAS):

    "none": z, then dropout with SEED, then + RESIDUAL, each if given
    "gelu": PRE = z (if PRE is given), C = activation(z), from z in fp32
    "dgelu": C = z activation'(PRE)

    COLUMN_SUM (rows of tiles, N), fp32, may be None: the sums of C's columns in each tile, as C holds them.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    rm, rn = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    z, _ = product_tile(
        A, B, rm, rn, M, N, tl.zeros((), tl.int32), K, stride_am, stride_ak, stride_bk, stride_bn,
        BM, BN, BK, EVEN_K, CHUNK, False,
    )  # fmt: skip
    mask = (rm < M)[:, None] & (rn < N)[None, :]  # product_tile took rows and columns past the edges for zeros
    out = rm.to(tl.int64)[:, None] * N + rn[None, :]
    if BIAS is not None:
        z += tl.load(BIAS + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    if EPILOGUE == "gelu":
        if PRE is not None:
            tl.store(PRE + out, z.to(PRE.dtype.element_ty), mask=mask)
        z = activation(z, ACTIVATION)
    elif EPILOGUE == "dgelu":
        z *= activation_grad(tl.load(PRE + out, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    if SEED is not None:
        z = dropout(z, SEED, rm, pid_n * BN, dropout_p, BM, BN)
    if RESIDUAL is not None:
        residual = RESIDUAL + rm.to(tl.int64)[:, None] * stride_residual + rn[None, :]
        z += tl.load(residual, mask=mask, other=0.0).to(tl.float32)
    rounded = z.to(C.dtype.element_ty)  # the only rounding; sums of columns are of what C holds
    tl.store(C + out, rounded, mask=mask)
    if COLUMN_SUM is not None:
        store_column_sums(rounded, mask, COLUMN_SUM, pid_m, rn, N)


@triton.jit
def weight_grad_kernel(
    A, B, C, ROW_SUM, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn, per_split,
    ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (i, s): tile i of C[s] = A B over K from s per_split to (s + 1) per_split, and ROW_SUM[s] = A's row sums.

    Here A is dy^T and B is x, so K counts tokens, C is dW and the row sums are the bias gradient (ROW_SUM may be None).
    C is (splits, M, N), the C[s] M N elements apart. ADD: to what C holds (one split only)."""
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    split = tl.program_id(1)
    rm, rn = pid_m * BM + tl.arange(0, BM), pid_n * BN + tl.arange(0, BN)
    first = split * per_split
    acc, row_sum = product_tile(
        A, B, rm, rn, M, N, first, tl.minimum(first + per_split, K), stride_am, stride_ak, stride_bk, stride_bn,
        BM, BN, BK, EVEN_K, CHUNK, ROW_SUM is not None,
    )  # fmt: skip
    mask = (rm < M)[:, None] & (rn < N)[None, :]
    c_ptr = C + split.to(tl.int64) * M * N + rm.to(tl.int64)[:, None] * stride_cm + rn.to(tl.int64)[None, :] * stride_cn
    if ADD:
        acc += tl.load(c_ptr, mask=mask, other=0.0)
    tl.store(c_ptr, acc.to(C.dtype.element_ty), mask=mask)
    if ROW_SUM is not None:  # every column of tiles has them: the first one stores
        tl.store(ROW_SUM + split * M + rm, row_sum.to(ROW_SUM.dtype.element_ty), mask=(rm < M) & (pid_n == 0))


@triton.jit
def sum_splits_kernel(PARTIAL, OUT, size, splits, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """OUT (size,) = the sum of PARTIAL (splits, size) fp32, first to last (+ OUT with ADD)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    stride = tl.full((), size, tl.int64)  # an argument that is 1 is a plain int to triton, without .to
    for split in range(splits):
        total += tl.load(PARTIAL + split * stride + at, mask=mask, other=0.0)
    if ADD:
        total += tl.load(OUT + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(OUT + at, total.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def pointwise_kernel(
    DY, PRE, SEED, DZ, COLUMN_SUM, M, N, stride_m, stride_n, dropout_p,
    ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (i, j): DZ = DY activation'(PRE), or DY through the dropout of SEED, for ROWS rows and BN columns; and
    COLUMN_SUM[i] = the sums of these columns as DZ holds them (may be None). PRE and DZ (M, N) contiguous. Without DY it is
    the forward pass, DZ = activation(PRE)."""
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BN,), tl.float32)
    # ROWS rows in pieces of BM: a program then writes one row of sums for many rows of dz.
    for start in range(0, ROWS, BM):
        rm = tl.program_id(0).to(tl.int64) * ROWS + start + tl.arange(0, BM)
        mask = (rm < M)[:, None] & (rn < N)[None, :]
        at = rm[:, None] * N + rn[None, :]
        if DY is None:
            dz = activation(tl.load(PRE + at, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
        else:
            dz = tl.load(DY + rm[:, None] * stride_m + rn.to(tl.int64)[None, :] * stride_n, mask=mask, other=0.0)
            dz = dz.to(tl.float32)
        if DY is not None and PRE is not None:
            dz *= activation_grad(tl.load(PRE + at, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
        if SEED is not None:
            dz = dropout(dz, SEED, rm, tl.program_id(1) * BN, dropout_p, BM, BN)
        rounded = dz.to(DZ.dtype.element_ty)
        tl.store(DZ + at, rounded, mask=mask)
        if COLUMN_SUM is not None:
            total += tl.sum(rounded.to(tl.float32), axis=0)
    if COLUMN_SUM is not None:
        tl.store(COLUMN_SUM + tl.program_id(0) * N + rn, total, mask=rn < N)


for _name, _kinds in (("linear", LINEAR_KINDS[2:]), ("linear_fast", LINEAR_KINDS)):
    for _kind in _kinds:
        _function = weight_grad_kernel if _kind.startswith("weight_grad") else linear_kernel
        tuning.space(f"{_name}.{_kind}", _space(_kind, fast=_name == "linear_fast"))(_function)


# ---------------------------------------------------------------- cuBLAS


def _recorded(op: str, shape: tuple[int, ...], a: Tensor, engine: str) -> AbstractContextManager:
    return runtime.UNCHANGED if runtime.recorder is None else runtime.record(op, shape, a.dtype, engine)


def matmul_fp32(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """out = a @ b, or out += a @ b, in fp32 from operands of any dtype. Autocast, which is still on inside an op,
    leaves the out= overloads alone, and operands that have its dtype already."""
    with _recorded("matmul_fp32", (*out.shape, a.shape[1]), a, "cublas"):
        if not a.is_cuda or a.dtype == torch.float32:
            torch.addmm(out, a.float(), b.float(), beta=int(accumulate), out=out)
        elif accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)  # type: ignore[call-overload]
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)  # type: ignore[call-overload]


def _cublas(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b (+ bias) in their dtype. Autocast, which is still on inside an op, leaves the out= overloads alone."""
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias.to(a.dtype), a, b, out=out)


# ---------------------------------------------------------------- launches


@lru_cache(maxsize=4096)
def _in_16s(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a matrix has neighbours along one dimension and multiples of 16 in all else."""
    return 1 in strides and all((size if stride == 1 else stride) % 16 == 0 for size, stride in zip(shape, strides))


def _wide(*operands: Tensor) -> bool:
    """Whether triton may read these 16 bytes at a time, for which it asks multiples of 16 in address, sizes and strides."""
    wide = True
    for t in operands:  # asked at every launch, so no generator expression: Python calls one per operand
        wide = wide and t.data_ptr() % 16 == 0 and _in_16s(t.shape, t.stride())
    return wide


def _choice(kind: str, a: Tensor, b: Tensor, fp16: bool, usual: bool, *others: Tensor) -> tuning.Choice:
    """What computes a @ b. ``usual``: as in ``choose``. ``others``: what else has to be aligned."""
    (M, K), N = a.shape, b.shape[1]
    if b.shape[0] != K:
        raise ValueError(
            f"a {kind} matmul is given {tuple(a.shape)} and {tuple(b.shape)}: they have to be (M, K) and (K, N)"
        )
    return choose(kind, M, N, K, a.dtype, a.device, fp16, wide=_wide(a, b, *others), usual=usual)


def _computing(choice: tuning.Choice, a: Tensor, b: Tensor) -> AbstractContextManager:
    """What a @ b and all that goes with it runs in: listeners are told."""
    if runtime.recorder is None and runtime.listener is None:
        return runtime.UNCHANGED
    cublas = choice.config == tuning.CUBLAS
    found = runtime.record(
        choice.key.kernel, (*a.shape[:1], b.shape[1], a.shape[1]), a.dtype, "cublas" if cublas else "triton"
    )
    if cublas:
        tuning.announce(choice)
    return found


def _launch(
    choice: tuning.Choice, a: Tensor, b: Tensor, out: Tensor, epilogue: str, *, bias: Tensor | None = None,
    pre: Tensor | None = None, residual: Tensor | None = None, seed: Tensor | None = None, dropout_p: float = 0.0,
    act: str | None = None, sums: Tensor | None = None,
) -> None:  # fmt: skip
    """``act``: one of ACTIVATIONS. ``sums`` (N,): of out's columns."""
    (M, K), N = a.shape, b.shape[1]
    arguments.alike("the product", (M, N), pre=pre, residual=residual, columns={"bias": bias})
    if M == 0 or N == 0:
        if sums is not None:
            sums.zero_()
        return
    residual = None if residual is None else runtime.columns_adjacent(residual)
    rows = runtime.cdiv(M, choice.config["block_m"])
    partial, grid = column_sums.partial(rows, sums), (rows * runtime.cdiv(N, choice.config["block_n"]),)
    runtime.Launch(linear_kernel, grid, choice, EPILOGUE=epilogue, ACTIVATION=act, **_options(choice.config, K))(
        a, b, None if bias is None else bias.contiguous(), pre, residual, seed, out, partial, M, N, K,
        *a.stride(), *b.stride(), 0 if residual is None else residual.stride(0), dropout_p,
    )  # fmt: skip
    column_sums.add_up((partial, sums))


def matmul(
    a: Tensor, b: Tensor, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None, dropout_p: float, fp16: bool
) -> Tensor:  # fmt: skip
    """dropout(a @ b + bias) + residual: (M, N) in a's dtype, with a residual in its."""
    kind = "residual" if residual is not None or seed is not None else "none" if bias is None else "bias"
    # A weight lies (out, in), so B of a forward pass is transposed; "none" is dx as well, where it is not. Tables have both.
    usual = seed is None and a.stride(1) == 1 and (kind == "none" or b.stride(0) == 1)
    choice = _choice(kind, a, b, fp16, usual)
    with _computing(choice, a, b):
        if choice.config == tuning.CUBLAS:
            y = _cublas(a, b, bias)
            if seed is not None:
                y = pointwise(y, y.dtype, None, seed, dropout_p, None, None)  # dropout is its own gradient
            return y if residual is None else (y + residual).to(residual.dtype)
        out = a.new_empty(a.shape[0], b.shape[1], dtype=a.dtype if residual is None else residual.dtype)
        _launch(choice, a, b, out, "none", bias=bias, residual=residual, seed=seed, dropout_p=dropout_p)
        return out


def matmul_gelu(a: Tensor, b: Tensor, bias: Tensor | None, act: str, fp16: bool, save: bool) -> tuple[Tensor, Tensor]:
    """(activation(z), z) of z = a @ b + bias, both (M, N) in a's dtype; z is empty if not ``save``."""
    choice = _choice("gelu", a, b, fp16, act != "gelu_erf" and a.stride(1) == 1 and b.stride(0) == 1)
    with _computing(choice, a, b):
        if choice.config == tuning.CUBLAS:
            pre = _cublas(a, b, bias)
            if act.startswith("relu2"):
                out = pointwise(None, a.dtype, pre, None, 0.0, act, None)
            else:
                out = torch.nn.functional.gelu(pre, approximate="none" if act == "gelu_erf" else "tanh")
            return out, pre if save else a.new_empty(0)
        M, N = a.shape[0], b.shape[1]
        out, pre = a.new_empty(M, N), a.new_empty((M, N) if save else 0)
        _launch(choice, a, b, out, "gelu", bias=bias, pre=pre if save else None, act=act)
        return out, pre


def matmul_dgelu(a: Tensor, b: Tensor, pre: Tensor, act: str, fp16: bool, sums: Tensor | None = None) -> Tensor:
    """(a @ b) * activation'(z), in a's dtype, and in ``sums`` (N,) its column sums, from the kernel that forms it. ``pre``: z,
    or what else is saved."""
    choice = _choice("dgelu", a, b, fp16, act != "gelu_erf" and a.stride(1) == 1 and b.stride(1) == 1)
    with _computing(choice, a, b):
        if choice.config == tuning.CUBLAS:
            return pointwise(_cublas(a, b), a.dtype, pre, None, 0.0, act, sums)
        out = a.new_empty(a.shape[0], b.shape[1])
        _launch(choice, a, b, out, "dgelu", pre=pre, act=act, sums=sums)
        return out


def adds_in_place(grad: Tensor | None, weight: Tensor) -> bool:
    """Whether ``weight_grad`` can add to this ``.grad``."""
    if grad is None or grad.dtype != torch.float32 or grad.shape != weight.shape:
        return False
    return grad.is_contiguous() or grad.t().is_contiguous()


def weight_grad(dz: Tensor, x: Tensor, dw: Tensor, db: Tensor | None, fp16: bool, *, add: bool = False) -> None:
    """dw (N, K) = dz (M, N)^T @ x (M, K), or += with ``add`` (fp32 only), and db (N,) = the sums of dz over its rows.

    dw is dense (contiguous, or the transpose of such) and written in its own dtype from fp32 sums, never through 16 bits.
    """
    arguments.alike("the columns of dz and x", (dz.shape[1], x.shape[1]), dw=dw)
    if dw.numel() == 0:
        if db is not None:
            db.copy_(dz.sum(0, dtype=torch.float32))
        return
    usual, a = dz.stride(1) == 1 and x.stride(1) == 1 and dw.is_contiguous(), dz.t()
    choice = _choice("weight_grad" if db is None else "weight_grad_bias", a, x, fp16, usual, dw)
    with _computing(choice, a, x):
        if choice.config != tuning.CUBLAS:
            _weight_grad_in_tiles(choice, dz, x, dw, db, add)
            return
        if dw.dtype == torch.float32:
            matmul_fp32(dw, a, x, accumulate=add)
        else:
            torch.mm(a, x, out=dw)
        if db is not None:
            db.copy_(dz.sum(0, dtype=torch.float32))


def _weight_grad_in_tiles(
    choice: tuning.Choice, dz: Tensor, x: Tensor, dw: Tensor, db: Tensor | None, add: bool
) -> None:
    (M, N), K, config = dz.shape, x.shape[1], choice.config
    block_m, block_n, block_k = (config[name] for name in ("block_m", "block_n", "block_k"))
    per_split = max(runtime.cdiv(runtime.cdiv(M, config["splits"]), block_k), 1) * block_k
    ways = max(runtime.cdiv(M, per_split), 1)
    # A split's partial sums lie in memory as dw does, so that adding them up is one sweep.
    out = dw if ways == 1 else torch.empty(ways, N * K, dtype=torch.float32, device=x.device)
    sums = db if ways == 1 or db is None else torch.empty(ways, N, dtype=torch.float32, device=x.device)
    grid = runtime.cdiv(N, block_m) * runtime.cdiv(K, block_n), ways
    runtime.Launch(weight_grad_kernel, grid, choice, ADD=add and ways == 1, **_options(config, M))(
        dz, x, out, sums, N, K, M, dz.stride(1), dz.stride(0), *x.stride(), *dw.stride(), per_split
    )
    if ways > 1:
        _sum_splits(out, dw, ways, add)
        if db is not None and sums is not None:
            _sum_splits(sums, db, ways, False)


def _sum_splits(partial: Tensor, out: Tensor, ways: int, add: bool) -> None:
    size, block = out.numel(), 2**16 if runtime.INTERPRET else 1024
    sum_splits_kernel[(runtime.cdiv(size, block),)](
        partial, out, size, ways, ADD=add, BLOCK=block, num_warps=4, enable_fp_fusion=True
    )


def pointwise(
    dy: Tensor | None, dtype: torch.dtype, pre: Tensor | None, seed: Tensor | None, dropout_p: float, act: str | None,
    sums: Tensor | None,
) -> Tensor:  # fmt: skip
    """dz = dy * activation'(z), or dy through dropout, in ``dtype``; and in ``sums`` (N,) those of dz over its rows. Without
    ``dy``: activation(pre)."""
    given = pre if dy is None else dy
    assert given is not None
    M, N = given.shape
    arguments.alike("dy", given.shape, pre=pre)
    dz = given.new_empty(M, N, dtype=dtype)
    if M == 0 or N == 0:
        if sums is not None:
            sums.zero_()
        return dz
    rows, block_m, block_n = (256, 256, 256) if runtime.INTERPRET else (64, 16, 128)
    blocks = -(-M // rows)
    partial = column_sums.partial(blocks, sums)
    op = "dropout_grad" if pre is None else "gelu" if dy is None else "gelu_grad"
    with _recorded(op, (M, N), given, "triton"):
        pointwise_kernel[(blocks, -(-N // block_n))](
            dy, pre, seed, dz, partial, M, N, *given.stride(), dropout_p,
            ACTIVATION=act, ROWS=rows, BM=block_m, BN=block_n, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        column_sums.add_up((partial, sums))
    return dz
