"""Muon's update on matrices of one shape together: momentum, Newton-Schulz, update. Jordan et al. 2024, Muon.

For a batch X (b, n, m) with n <= m (``reference.py`` has the equations and the polynomials):

    muon_momentum_kernel    m <- m + (1 - mu)(g - m), X = g + mu (m - g) in 16 bits, transposed where the parameter is tall
    muon_symmetric_kernel   A = X X^T: symmetric, so the tiles on and below the diagonal are computed, and each is stored twice
    muon_symmetric_kernel   P = b A + c A A, the same kernel with an epilogue, as A A = A A^T
    muon_product_kernel     X <- a X + P X
    muon_update_kernel      p <- p - lr decay p - lr scale X, and p's working copy

The middle three repeat, five times as a rule. X is not normalised in a pass of its own: the first step multiplies A by 1/|X|^2
and the new X by 1/|X| in the epilogues. Nothing is brought to the host and all sums have a fixed order. Learning rate, momentum
and decay are read from a table on the device, so a captured CUDA graph sees them change.

Dtypes: parameters, momentum and arithmetic fp32, gradients fp32, fp16 or bf16, X bf16, fp16 or fp32 with sums in fp32.
FLOPs per step of the iteration and matrix: n^2 m + n^3 for the two symmetric products (in tiles: a little more), 2 n^2 m for
the third, where plain matmuls take 4 n^2 m + 2 n^3. Bytes that have to move, per parameter: 4 of the gradient, 8 of the
momentum, 8 of the parameter, 2 of its copy and 4 of X, beside the iterations (performance/flops.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import arguments, reference, runtime, tuning
from fastgpt.kernels.matmul import product_tile, tile_of
from fastgpt.kernels.operators import launches

BUCKET = "any"
_TILES = [(64, 64, 4, 3), (64, 64, 4, 4), (128, 32, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3)]
_CONFIGS = [
    {"block_m": m, "block_n": m, "block_k": k, "num_warps": warps, "num_stages": stages}
    for m, k, warps, stages in _TILES
]
BLOCK = 256 if runtime.INTERPRET else 32
"""Side of the tiles of the elementwise kernels: transposed accesses in 16 bits then fill whole sectors of memory, and a thread
has 8 elements, with which it spills nothing. The interpreter's cost is per program."""


@tuning.cached
def _choice(kernel: str, dtype: torch.dtype, n: int, m: int, device: torch.device) -> tuning.Choice:
    """The config of a table for this card, or the default. fp32 has no tensor cores to feed, and rows that do not begin at
    multiples of 16 bytes take an address per element, hence registers: smaller tiles spill nothing."""
    wide = dtype != torch.float32 and n % 8 == 0 and m % 8 == 0
    default = {"block_m": 128, "block_n": 128, "block_k": 64, "num_warps": 8, "num_stages": 3}
    if runtime.INTERPRET:  # the cost is per program and operation, hardly per element
        block = min(max(runtime.next_power_of_2(n), 16), 128)
        default |= {"block_m": block, "block_n": block, "num_stages": 1}
    elif not wide:
        depth = 16 if dtype == torch.float32 else 32
        default = {"block_m": 64, "block_n": 64, "block_k": depth, "num_warps": 8, "num_stages": 2}
    return tuning.choose(kernel, dtype, BUCKET if wide else None, device, default)


@triton.jit
def _tile(BLOCK: tl.constexpr, R, C):
    """This program's (rows, columns, mask) of an (R, C) matrix, rows in 64 bits."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return rows, columns, (rows < R)[:, None] & (columns < C)[None, :]


@triton.jit
def muon_momentum_kernel(
    GRAD, MOMENTUM, OUT, HYPER, GRAD_SCALE, FOUND_INF, R, C, stride_out,
    NESTEROV: tl.constexpr, TALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """GRAD and MOMENTUM (R, C) contiguous; OUT (R, C), or (C, R) where TALL, its rows ``stride_out`` apart."""
    rows, columns, mask = _tile(BLOCK, R, C)
    at = rows[:, None] * C + columns[None, :]
    g = tl.load(GRAD + at, mask=mask, other=0.0).to(tl.float32)
    if GRAD_SCALE is not None:
        g *= tl.div_rn(1.0, tl.load(GRAD_SCALE))  # / may be off, also for a power of two
    m = tl.load(MOMENTUM + at, mask=mask, other=0.0)
    mu = tl.load(HYPER + 1)  # fp64: 1 - mu would lose digits
    m += (g - m) * (1.0 - mu).to(tl.float32)
    happens = mask
    if FOUND_INF is not None:
        happens = mask & (tl.load(FOUND_INF) == 0)
    tl.store(MOMENTUM + at, m, mask=happens)
    if NESTEROV:
        m = g + (m - g) * mu.to(tl.float32)
    x = m.to(OUT.dtype.element_ty)
    if TALL:
        tl.store(OUT + columns.to(tl.int64)[:, None] * stride_out + rows[None, :], tl.trans(x), mask=tl.trans(mask))
    else:
        tl.store(OUT + rows[:, None] * stride_out + columns[None, :], x, mask=mask)


@tuning.space("muon.symmetric", _CONFIGS)
@triton.jit
def muon_symmetric_kernel(
    X, OUT, SCALE, n, m, b, c, POLYNOMIAL: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """OUT (batch, n, n) = X X^T of X (batch, n, m), times SCALE[batch]^2 if it is given; with POLYNOMIAL b X + c X X^T of a
    symmetric X. One program per tile; those above the diagonal have nothing to do."""
    tiles = tl.cdiv(n, BLOCK)
    row, column = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if column <= row:
        batch = tl.program_id(1).to(tl.int64)
        X += batch * n * m
        OUT += batch * n * n
        rm, rn = row * BLOCK + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
        z, _ = product_tile(
            X, X, rm, rn, n, n, tl.zeros((), tl.int32), m, m, 1, 1, m, BLOCK, BLOCK, BK, EVEN_K, 0, False
        )
        mask = (rm < n)[:, None] & (rn < n)[None, :]
        at = rm.to(tl.int64)[:, None] * n + rn[None, :]
        if POLYNOMIAL:
            z = b * tl.load(X + at, mask=mask, other=0.0).to(tl.float32) + c * z
        if SCALE is not None:
            scale = tl.load(SCALE + batch)
            z *= scale * scale
        rounded = z.to(OUT.dtype.element_ty)
        tl.store(OUT + at, rounded, mask=mask)
        if column < row:
            mirrored = rn.to(tl.int64)[:, None] * n + rm[None, :]
            tl.store(OUT + mirrored, tl.trans(rounded), mask=tl.trans(mask))


@tuning.space("muon.product", _CONFIGS)
@triton.jit
def muon_product_kernel(
    P, X, OUT, SCALE, n, m, a, BLOCK: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr
):
    """OUT (batch, n, m) = a X + P X, times SCALE[batch] if it is given; P (batch, n, n)."""
    batch = tl.program_id(1).to(tl.int64)
    P += batch * n * n
    X += batch * n * m
    row, column = tile_of(tl.program_id(0), n, m, BLOCK, BLOCK, GROUP)
    rm, rn = row * BLOCK + tl.arange(0, BLOCK), column * BLOCK + tl.arange(0, BLOCK)
    z, _ = product_tile(P, X, rm, rn, n, m, tl.zeros((), tl.int32), n, n, 1, m, 1, BLOCK, BLOCK, BK, EVEN_K, 0, False)
    mask = (rm < n)[:, None] & (rn < m)[None, :]
    at = rm.to(tl.int64)[:, None] * m + rn[None, :]
    z += a * tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    if SCALE is not None:
        z *= tl.load(SCALE + batch)
    tl.store(OUT + batch * n * m + at, z.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def muon_update_kernel(
    PARAM, DIRECTION, COPY, ROWS, HYPER, FOUND_INF, R, C, stride_direction, scale,
    CAUTIOUS: tl.constexpr, TALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """PARAM and COPY (R, C) contiguous; DIRECTION as OUT of muon_momentum_kernel; ROWS (R,) multiplies its rows."""
    rows, columns, mask = _tile(BLOCK, R, C)
    at = rows[:, None] * C + columns[None, :]
    if TALL:
        across = DIRECTION + columns.to(tl.int64)[:, None] * stride_direction + rows[None, :]
        o = tl.trans(tl.load(across, mask=tl.trans(mask), other=0.0)).to(tl.float32)
    else:
        o = tl.load(DIRECTION + rows[:, None] * stride_direction + columns[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    if ROWS is not None:
        o *= tl.load(ROWS + rows, mask=rows < R, other=0.0)[:, None]
    p = tl.load(PARAM + at, mask=mask, other=0.0)
    lr, decay = tl.load(HYPER), tl.load(HYPER + 2)  # fp64
    kept = 1.0 - (lr * decay).to(tl.float32)
    if CAUTIOUS:
        kept = tl.where(o * p >= 0, kept, 1.0)
    p = p * kept - (lr * scale).to(tl.float32) * o
    if FOUND_INF is not None:
        mask = mask & (tl.load(FOUND_INF) == 0)
    tl.store(PARAM + at, p, mask=mask)
    if COPY is not None:
        tl.store(COPY + at, p.to(COPY.dtype.element_ty), mask=mask)


@launches
def muon_momentum(
    grad: Tensor,
    momentum_buffer: Tensor,
    out: Tensor,
    hyper: Tensor,
    nesterov: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """As reference.muon_momentum. The momentum is fp32 and contiguous; rows or columns of ``out`` are adjacent in memory."""
    if not runtime.runs_in_triton(grad) or momentum_buffer.dtype != torch.float32:
        return reference.muon_momentum(grad, momentum_buffer, out, hyper, nesterov, grad_scale, found_inf)
    size = momentum_buffer.shape
    arguments.tensors("momentum_buffer", size, ("grad", grad, None), ("grad", grad, size), ("out", out, size))
    _contiguous("momentum_buffer", momentum_buffer)
    grad, grid = grad.contiguous(), (runtime.cdiv(size[0], BLOCK), runtime.cdiv(size[1], BLOCK))
    tall = _transposed(out)
    if momentum_buffer.numel():
        muon_momentum_kernel[grid](
            grad, momentum_buffer, out, hyper, grad_scale, found_inf, *size, out.stride(int(tall)),
            NESTEROV=nesterov, TALL=tall, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


@launches
def muon_update(
    param: Tensor,
    direction: Tensor,
    hyper: Tensor,
    scale: float,
    cautious: bool,
    rows: Tensor | None = None,
    found_inf: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """As reference.muon_update. The parameter is fp32 and contiguous, as is its bf16 or fp16 copy."""
    if not runtime.runs_in_triton(param) or param.dtype != torch.float32:
        return reference.muon_update(param, direction, hyper, scale, cautious, rows, found_inf, copy)
    size = param.shape
    others = ("direction", direction, size), ("copy", copy, size), ("rows", rows, size[:1])
    arguments.tensors("param", size, ("param", param, None), *others)
    _contiguous("param", param)
    tall, grid = _transposed(direction), (runtime.cdiv(size[0], BLOCK), runtime.cdiv(size[1], BLOCK))
    if param.numel():
        muon_update_kernel[grid](
            param, direction, copy, rows, hyper, found_inf, *size, direction.stride(int(tall)), scale,
            CAUTIOUS=cautious, TALL=tall, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        torch.autograd.graph.increment_version(param)


def _contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}: the kernels go by address, so make it .contiguous()")


def _transposed(matrix: Tensor) -> bool:
    """Whether columns and not rows are adjacent. Raises ValueError if neither are."""
    if matrix.stride(1) == 1:
        return False
    if matrix.stride(0) != 1:
        raise ValueError(
            f"a direction has strides {matrix.stride()}: its rows or its columns must be adjacent in memory"
        )
    return True


@launches
def orthogonalize(x: Tensor, coefficients: str = "classic", steps: int = 5, eps: float = 1e-7) -> Tensor:
    """As reference.orthogonalize, in about half its FLOPs. ``x`` (batch, n, m), n <= m, is overwritten."""
    if not runtime.runs_in_triton(x) or x.dtype not in arguments.DTYPES or not x.numel():
        return reference.orthogonalize(x, coefficients, steps, eps)
    x, (batch, n, _) = x.contiguous(), x.shape
    margin = reference.margin(coefficients)
    inverse = (torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float32) * margin).clamp(min=eps).reciprocal()
    gram, polynomial, other = x.new_empty(batch, n, n), x.new_empty(batch, n, n), torch.empty_like(x)
    scale: Tensor | None = inverse
    for a, b, c in reference.polynomials(coefficients, steps):
        _symmetric(x, gram, scale)
        _symmetric(gram, polynomial, None, (b, c))
        _product(polynomial, x, other, scale, a)
        x, other, scale = other, x, None
    return x


def _symmetric(x: Tensor, out: Tensor, scale: Tensor | None, polynomial: tuple[float, float] | None = None) -> None:
    batch, n, m = x.shape
    choice = _choice("muon.symmetric", x.dtype, n, m, x.device)
    block, deep = choice.config["block_m"], choice.config["block_k"]
    runtime.Launch(
        muon_symmetric_kernel, (runtime.cdiv(n, block) ** 2, batch), choice, POLYNOMIAL=polynomial is not None,
        BLOCK=block, BK=deep, EVEN_K=m % deep == 0,
        num_warps=choice.config["num_warps"], num_stages=choice.config["num_stages"],
    )(x, out, scale, n, m, *(polynomial or (0.0, 1.0)))  # fmt: skip


def _product(polynomial: Tensor, x: Tensor, out: Tensor, scale: Tensor | None, a: float) -> None:
    batch, n, m = x.shape
    choice = _choice("muon.product", x.dtype, n, m, x.device)
    block, deep = choice.config["block_m"], choice.config["block_k"]
    runtime.Launch(
        muon_product_kernel, (runtime.cdiv(n, block) * runtime.cdiv(m, block), batch), choice,
        BLOCK=block, BK=deep, GROUP=8, EVEN_K=n % deep == 0,
        num_warps=choice.config["num_warps"], num_stages=choice.config["num_stages"],
    )(polynomial, x, out, scale, n, m, a)  # fmt: skip
