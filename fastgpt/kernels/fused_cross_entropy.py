"""Linear + cross-entropy that never holds the full logits.

For token i with classifier row w_v and target t, and q the smoothed one-hot (1 - e) [v = t] + e / V::

    z_v  = x_i . w_v + b_v,  then z_v <- c tanh(z_v / c) with a softcap c
    lse  = log sum_v exp(z_v),  p_v = exp(z_v - lse)
    loss = lse - (1 - e) z_t - e mean_v z_v + z_loss lse^2
    dz_v = p_v (1 + 2 z_loss lse) - q_v,  times 1 - tanh(z_v / c)^2 with a softcap
    dx_i = sum_v dz_v w_v,   dw_v = sum_i dz_v x_i,   db_v = sum_i dz_v

Tokens are taken in chunks (``chunk_rows``). Per chunk, cuBLAS writes the logits in x's dtype into one reused buffer,
one Triton kernel reads them row by row (statistics in fp32) and overwrites them with dz, and two more GEMMs take dz to
dx and, accumulated in fp32 over the chunks, to dW. Logits have ``padded(V)`` columns; those from V
on are zero before and after. Chunked classifiers: Hsu et al. 2024 (Liger-Kernel), Wijmans et al.
2024 (Cut Cross-Entropy). No gradient is filtered.

When dz is formed:

* no gradient wanted: never, only losses are computed;
* mean, sum: in the forward pass, while the logits are there: 3 GEMMs in all. Saved for backward are dx (tokens, C), dW
  and db of the *sum* of the losses, in fp32. Backward only multiplies them, in fp32 and into new tensors, by the
  upstream gradient, which the mean has divided by the number of tokens;
* none: in backward, by recomputing the chunks, as each row has an upstream gradient of its own: 4 GEMMs. Saved are the
  inputs and, per row, the largest logit and lse minus it (lse alone would cost p_t - 1 of a certain target its digits).

fp16: dz is rounded before 1/N (2e-5 / 8192 would be 0), scaled by a power of two, ``grad_scale``, taken out in fp32.

``accumulate="fp16"`` (fp16 operands): the GEMMs are those of linear layers (matmul.py) that sum products in fp16 over chunks of
K, up to 128 for the logits and dx and 64 for dW, which GeForce tensor cores do at twice the rate.
In dW a chunk may be 64 tokens of one target, each with dz near -1 and a large input:
``grad_scale`` then leaves room for their sum, as no loss scale can, being another factor.

Peak memory at 8192 x 768 x 50304, bf16 with an fp32 weight: eager holds the log-probabilities, their gradient and that
of the logits, each (tokens, V) in fp32: 3 x 1648 MB. Here: logits of a chunk 167 MB, weight in bf16 77 MB, dW 155 MB
and dx 25 MB in fp32: 424 MB in forward, and with the results beside dW and dx 347 MB in backward. That is 1/11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import arguments, matmul, reference, runtime, tuning
from fastgpt.kernels.matmul import matmul_fp32
from fastgpt.kernels.operators import operator

LOGITS_BUDGET = 256 * 2**20
"""Bytes that the logits of one chunk may take."""
GEMM_TILE = 128
"""Rows and columns of cuBLAS's usual output tile."""
FP16_SUMS_SCALE = 2.0**6
"""Scale of dz where its products are summed in fp16: 64 tokens of one target may then have an input of 15 each. From 2^0 to 2^8
the error is the same (docs/precision-modes.md)."""


# ---------------------------------------------------------------- configs, sizes and scales


def padded(V: int) -> int:
    """Row stride of logits: each row starts on 128 bytes whatever V is."""
    return runtime.cdiv(V, 64) * 64


def cross_entropy_bucket(V: int, logit_softcap: float | None) -> str | None:
    return "V>=8192" if V >= 8192 and logit_softcap is None else None


_CONFIGS = [{"tile": tile, "num_warps": warps} for tile, warps in product((2048, 4096, 8192), (4, 8, 16))]


@lru_cache
def chunk_rows(rows: int, V: int, C: int, dtype: torch.dtype, sm_count: int) -> int:
    """Tokens per chunk: few chunks, as each reads and writes all of dW once more; logits within LOGITS_BUDGET; and
    tiles of dx, the small GEMM here, that fill whole waves of the SMs. At C = 768 on 46 SMs, 2048 rows are 96 tiles, 3
    waves that are 70% full; 1664 rows are 2 waves, 85% full.
    """
    budget = LOGITS_BUDGET // (padded(V) * dtype.itemsize) // GEMM_TILE * GEMM_TILE
    rows = max(rows, 1)
    fewest = runtime.cdiv(rows, max(budget, GEMM_TILE))
    best, best_fill = 0, 0.0
    for chunks in range(fewest, fewest + 3):
        candidate = runtime.cdiv(runtime.cdiv(rows, chunks), GEMM_TILE) * GEMM_TILE
        tiles = candidate // GEMM_TILE * runtime.cdiv(C, GEMM_TILE)
        fill = tiles / (runtime.cdiv(tiles, sm_count) * sm_count)
        if fill > best_fill:
            best, best_fill = candidate, fill
    return best


@tuning.cached
def _choice(dtype: torch.dtype, V: int, logit_softcap: float | None, device: torch.device) -> tuning.Choice:
    """The row kernel's ``tile``, the logits that a program holds at a time, and warps. The default is safe on any card: 16
    logits a thread, two 128-bit accesses in bf16 and four in fp32; half of that with a softcap, whose exponentials take
    registers."""
    default = {"tile": 4096 if logit_softcap is None else 2048, "num_warps": 8}
    return tuning.choose("cross_entropy.rows", dtype, cross_entropy_bucket(V, logit_softcap), device, default)


def config(rows: int, V: int, tile: int, num_warps: int) -> dict[str, int]:
    """Launch options of the row kernel for ``rows`` rows: ROWS x BLOCK logits at a time, ``tile`` in all."""
    block = min(max(runtime.next_power_of_2(V), 64), tile)
    # The interpreter pays per program and per operation, hardly per element.
    rows_each = min(2**18 // block, runtime.next_power_of_2(rows)) if runtime.INTERPRET else tile // block
    return {"ROWS": rows_each, "BLOCK": block, "num_warps": num_warps}


def grad_scale(
    dtype: torch.dtype, V: int, z_loss: float, logit_softcap: float | None, fp16_sums: bool = False
) -> float:
    """The power of two that scales dz before its cast to ``dtype``: 1 but for fp16, where it is the largest one that
    keeps |dz| <= 1 + 2 z_loss |lse| within range for any logits that are finite in fp16; with ``fp16_sums`` at most
    FP16_SUMS_SCALE."""
    if dtype != torch.float16:
        return 1.0
    largest = torch.finfo(dtype).max
    lse = (largest if logit_softcap is None else logit_softcap) + math.log(V)
    scale = 2.0 ** math.floor(math.log2(largest / (1 + 2 * z_loss * lse)))
    return min(scale, FP16_SUMS_SCALE) if fp16_sums else scale


# ---------------------------------------------------------------- kernel


@triton.jit
def softcap_of(z, cap, FINE: tl.constexpr):
    """cap * tanh(z / cap); the exponential cannot overflow. With FINE small logits keep their digits, which 1 - e loses: they
    are tanh's series."""
    t = z / cap
    e = tl.exp(-2 * tl.abs(t))
    capped = cap * (1 - e) / (1 + e)
    capped = tl.where(z < 0, -capped, capped)
    if FINE:
        s = t * t
        series = 1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835))))
        capped = tl.where(s < 0.0625, z * series, capped)  # the next term is below 2^-26
    return capped


@triton.jit
def softcap_slope(z, cap):
    """1 - tanh(z / cap)^2, without the cancellation where tanh is near 1."""
    e = tl.exp(-2 * tl.abs(z / cap))
    return 4 * e / ((1 + e) * (1 + e))


@triton.jit
def expm1(x):
    """exp(x) - 1 of fp32 x, with the digits that the subtraction loses near 0, where exp's error on a GPU, 2^-22, is much of
    it. Kahan's formula: log, which is right to 1 ulp, takes the error out again, as (u - 1) / log(u) hardly depends on u."""
    u = tl.exp(x)
    near = (u - 1.0) * tl.div_rn(x, tl.where(u == 1.0, 1.0, tl.log(u)))
    return tl.where(u < 0.5, u - 1.0, tl.where(u == 1.0, x, near))


@tuning.space("cross_entropy.rows", _CONFIGS)
@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    logits_ptr,  # (rows, stride) in x's dtype, columns [V, stride) are 0; overwritten by dz if GRAD
    target_ptr,  # (rows,) int32 or int64
    loss_ptr,  # (rows,) fp32, written if LOSS
    stats_ptr,  # (rows, 2) fp32: the largest logit, and lse minus it; written if LOSS, else read
    row_scale_ptr,  # (rows,) fp32, read if PER_ROW
    rows, V, stride, ignore_index, scale, smoothing, z_loss, softcap,
    LOSS: tl.constexpr, GRAD: tl.constexpr, PER_ROW: tl.constexpr, SMOOTH: tl.constexpr, CAP: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows: loss and statistics in a first pass over the vocabulary; dz, in place, in a second, which finds the rows
    in L2. Logits of ignored rows are not read. A target outside [0, V) that is not ignored makes its row's loss and dz
    NaN.

    Accesses are masked at ``stride``, a multiple of 64, and cut at V in registers: a mask at an odd V would break every
    one of them into single elements."""
    FINE: tl.constexpr = logits_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    target = tl.load(target_ptr + row, mask=exists, other=0).to(tl.int64)
    live = exists & (target != ignore_index)
    in_range = (target >= 0) & (target < V)
    row_ptr = logits_ptr + row * stride
    lanes = tl.arange(0, BLOCK)
    z_target = tl.load(row_ptr + target, mask=live & in_range, other=float("nan")).to(tl.float32)
    if CAP:
        z_target = softcap_of(z_target, softcap, FINE)

    if LOSS:
        z_max = tl.full((ROWS,), float("-inf"), tl.float32)
        exp_sum = tl.full((ROWS,), 0.0, tl.float32)
        z_sum = tl.full((ROWS,), 0.0, tl.float32)
        for start in range(0, V, BLOCK):
            columns = start + lanes
            mask = live[:, None] & (columns < stride)[None, :]
            z = tl.load(row_ptr[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            if CAP:
                z = softcap_of(z, softcap, FINE)
            if SMOOTH:
                z_sum += tl.sum(z, 1)  # before the cut at V: the padding is 0
            z = tl.where((columns < V)[None, :], z, float("-inf"))
            # Sum of exponentials in one pass: what was summed is scaled down whenever the largest logit grows.
            new_max = tl.maximum(z_max, tl.max(z, 1))
            # While every logit so far is -inf, subtract 0 instead: -inf - -inf is NaN.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            exp_sum = exp_sum * tl.exp(z_max - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
            z_max = new_max
        log_sum = tl.log(exp_sum)
        lse = z_max + log_sum
        # z_max - z_target first: lse - z_target would cancel where the target is certain.
        loss = log_sum + (z_max - z_target) + z_loss * lse * lse
        if SMOOTH:
            loss += smoothing * (z_target - z_sum / V)
        tl.store(loss_ptr + row, tl.where(live, loss, 0.0), mask=exists)
        tl.store(stats_ptr + 2 * row, z_max, mask=exists)
        tl.store(stats_ptr + 2 * row + 1, log_sum, mask=exists)
    else:
        z_max = tl.load(stats_ptr + 2 * row, mask=exists, other=0.0)
        log_sum = tl.load(stats_ptr + 2 * row + 1, mask=exists, other=0.0)

    if GRAD:
        # Every thread has read its target's logit before any thread overwrites it.
        tl.debug_barrier()
        z_slope = 2 * z_loss * (z_max + log_sum)
        # p - 1 of a certain target keeps its digits: worked out once per row, in fp32 until the store.
        log_p = z_target - z_max - log_sum
        dz_target = expm1(log_p) + tl.exp(log_p) * z_slope + smoothing
        if PER_ROW:
            scale *= tl.load(row_scale_ptr + row, mask=exists, other=0.0)
        row_scale = tl.where(in_range, scale, float("nan"))  # a target that does not exist shows, and raises nothing
        for start in range(0, V, BLOCK):
            columns = start + lanes
            inside = (columns < stride)[None, :]
            z = tl.load(row_ptr[:, None] + columns[None, :], mask=live[:, None] & inside, other=0.0).to(tl.float32)
            factor = row_scale[:, None]
            if CAP:
                factor *= softcap_slope(z, softcap)
                z = softcap_of(z, softcap, FINE)
            p = tl.exp(z - z_max[:, None] - log_sum[:, None])
            dz = tl.where(columns[None, :] == target[:, None], dz_target[:, None], p * (1 + z_slope)[:, None])
            if SMOOTH:
                dz -= smoothing / V
            dz = tl.where(live[:, None] & (columns < V)[None, :], dz * factor, 0.0).to(logits_ptr.dtype.element_ty)
            tl.store(row_ptr[:, None] + columns[None, :], dz, mask=exists[:, None] & inside)


# ---------------------------------------------------------------- matmuls


class Fp32Sums:
    """The GEMMs of a chunk by cuBLAS. weight (V, C) and bias (V,) or None are in x's dtype, V without rows past the vocabulary;
    chunks have at most ``rows`` tokens, and share a buffer for their logits."""

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
    """The same by matmul.py, with sums in fp16. Operands are padded to whole rows of 128 bytes, so that the kernel reads 16
    bytes at a time."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        more = padded(weight.shape[0]) - weight.shape[0]
        self.weight = torch.nn.functional.pad(weight, (0, 0, 0, more)) if more else weight
        self.bias = torch.nn.functional.pad(bias, (0, more)) if more and bias is not None else bias

    def logits(self, x: Tensor) -> Tensor:
        with self._recorded("head.logits", x, self.weight.shape):
            return matmul.matmul(x, self.weight.t(), self.bias, None, None, 0.0, True)

    def input_grad(self, dz: Tensor, dx: Tensor) -> None:
        with self._recorded("head.input_grad", dz, self.weight.t().shape):
            dx.copy_(matmul.matmul(dz, self.weight, None, None, None, 0.0, True))

    def weight_grad(self, dz: Tensor, x: Tensor, dw: Tensor, add: bool) -> None:
        rows = min(dz.shape[1], dw.shape[0])  # those past V get the zeros that they have to have
        with self._recorded("head.weight_grad", dz.t(), x.t().shape):
            matmul.weight_grad(dz[:, :rows], x, dw[:rows], None, True, add=add)

    @staticmethod
    def _recorded(op: str, a: Tensor, columns: torch.Size) -> AbstractContextManager:
        return runtime.record(op, (a.shape[0], *columns), a.dtype, "triton")


# ---------------------------------------------------------------- chunks


def _check_targets(target: Tensor, ignore_index: int, V: int) -> None:
    """Raise ValueError for a class that does not exist. Only on a CPU: asking a GPU would make the host wait for it."""
    if target.device.type == "cpu":
        wrong = target[((target < 0) | (target >= V)) & (target != ignore_index)]
        if wrong.numel():
            value = wrong[0].item()
            raise ValueError(f"target holds {value}: classes are 0 to {V - 1}, and {ignore_index} where ignored")


def _run_chunks(
    x: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, options: tuple, stats: Tensor, *,
    losses: Tensor | None = None, row_scale: Tensor | None = None, wants: Sequence[bool] = (False, False, False),
) -> list[Tensor]:  # fmt: skip
    """Every chunk in turn. With ``losses`` (rows,), writes them and ``stats`` (rows, 2); without, reads ``stats``.

    Returns [dx, dW, db] in fp32, those that ``wants`` does not ask for empty: of the sum of the losses times
    ``grad_scale``, or with ``row_scale`` (rows,), of the losses weighted by it.
    """
    ignore_index, smoothing, z_loss, softcap, V, fp16 = options
    rows, C = x.shape
    per_row = {"target": target, "losses": losses, "row_scale": row_scale}
    arguments.alike("x's rows and 2", (rows, 2), stats=stats, rows=per_row)
    _check_targets(target, ignore_index, V)
    target = target.contiguous()  # a strided or expanded view: the kernel takes neighbours
    allocate = x.new_empty if rows else x.new_zeros
    dx = allocate(x.shape if wants[0] else 0, dtype=torch.float32)
    dw = allocate(weight.shape if wants[1] else 0, dtype=torch.float32)
    db = x.new_zeros(weight.shape[0] if wants[2] else 0, dtype=torch.float32)
    if not rows:
        return [dx, dw, db]

    dw[V:].zero_()
    size = min(rows, chunk_rows(rows, V, C, x.dtype, runtime.sm_count(x.device)))
    weight, bias = weight[:V].to(x.dtype), None if bias is None else bias[:V].to(x.dtype)
    matmuls = Fp16Sums(weight, bias, size) if fp16 else Fp32Sums(weight, bias, size)
    for start in range(0, rows, size):
        chunk = slice(start, min(start + size, rows))
        logits = matmuls.logits(x[chunk])
        _launch_rows(
            logits, target[chunk], stats[chunk], options, size,
            losses=None if losses is None else losses[chunk],
            row_scale=None if row_scale is None else row_scale[chunk],
            grad=any(wants),
        )  # fmt: skip
        if wants[0]:
            matmuls.input_grad(logits, dx[chunk])
        if wants[1]:
            matmuls.weight_grad(logits, x[chunk], dw, add=start > 0)
        if wants[2]:
            db[:V] += logits[:, :V].sum(0, dtype=torch.float32)
        del logits  # before the next ones are made
    return [dx, dw, db]


def _launch_rows(
    logits: Tensor, target: Tensor, stats: Tensor, options: tuple, size: int, *,
    losses: Tensor | None, row_scale: Tensor | None, grad: bool,
) -> None:  # fmt: skip
    """The row kernel on one chunk's logits; ``size``: rows of a whole chunk."""
    ignore_index, smoothing, z_loss, softcap, V, fp16 = options
    scale = 1.0 if row_scale is not None else grad_scale(logits.dtype, V, z_loss, softcap, fp16)
    choice = _choice(logits.dtype, V, softcap, logits.device)
    launch = config(size, V, choice.config["tile"], choice.config["num_warps"])
    runtime.Launch(
        rows_kernel, (runtime.cdiv(logits.shape[0], launch["ROWS"]),), choice, LOSS=losses is not None, GRAD=grad,
        PER_ROW=row_scale is not None, SMOOTH=smoothing != 0, CAP=softcap is not None, **launch,
    )(
        logits, target, losses, stats, row_scale, logits.shape[0], V, logits.stride(0),
        ignore_index, scale, smoothing, z_loss, softcap or 0.0,
    )  # fmt: skip


# ---------------------------------------------------------------- ops
#
# x is (rows, C) and target (rows,) here. ``wants`` says which of dx, dW and db to compute; the others come back empty.

_INPUTS = "Tensor x, Tensor weight, Tensor target, Tensor? bias"
_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float? logit_softcap, SymInt vocab_size, bool fp16"


def _new_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """losses (rows,) and stats (rows, 2) in fp32."""
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], 2, dtype=torch.float32)


def _dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[torch.dtype, ...]:
    return x.dtype, weight.dtype, torch.float32 if bias is None else bias.dtype


def _new_gradients(x: Tensor, weight: Tensor, wants: Sequence[bool], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    shapes = x.shape, weight.shape, weight.shape[:1]
    return [x.new_empty(shape if want else 0, dtype=dtype) for shape, want, dtype in zip(shapes, wants, dtypes)]


@operator("linear_cross_entropy_fwd", schema=f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
def _forward(x, weight, target, bias, *options):
    """losses (rows,) fp32 and statistics (rows, 2) fp32. No gradient is formed here."""
    losses, stats = _new_statistics(x)
    _run_chunks(x, weight, target, bias, options, stats, losses=losses)
    return losses, stats


@_forward.register_fake
def _(x, weight, target, bias, *options):
    return _new_statistics(x)


@operator(
    "linear_cross_entropy_bwd",
    schema=f"(Tensor grad, Tensor stats, bool[] wants, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _backward(grad, stats, wants, x, weight, target, bias, *options):
    """Gradients of ``sum(grad * losses)``, in the dtypes of x, weight and bias, by recomputing the chunks."""
    ignore_index, _, z_loss, softcap, V, fp16 = options
    row_scale: Tensor | None = None
    unscale: Tensor | float = 1.0
    if grad.numel():
        # dW sums over rows, so grad enters before the cast of dz: as a fraction of the power of two above its largest
        # element, so that its own scale (1/N, a loss scale) does not push dz out of fp16's range.
        grad = torch.where(target == ignore_index, 0.0, grad.float())
        exponent = torch.frexp(grad.abs().amax()).exponent.clamp(-126, 126)
        scale = grad_scale(x.dtype, V, z_loss, softcap, fp16)
        row_scale = torch.ldexp(grad, -exponent) * scale
        # Made on the device: no copy from the host.
        unscale = torch.ldexp(torch.full_like(exponent, 1 / scale, dtype=torch.float32), exponent)
    sums = _run_chunks(x, weight, target, bias, options, stats, row_scale=row_scale, wants=wants)
    return tuple((total * unscale).to(dtype) for total, dtype in zip(sums, _dtypes(x, weight, bias)))


@_backward.register_fake
def _(grad, stats, wants, x, weight, target, bias, *options):
    return tuple(_new_gradients(x, weight, wants, _dtypes(x, weight, bias)))


@operator(
    "linear_cross_entropy_fwd_bwd",
    schema=f"(bool[] wants, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward_backward(wants, x, weight, target, bias, *options):
    """Sum of the losses, and its gradients times ``grad_scale``; all in fp32."""
    losses, stats = _new_statistics(x)
    sums = _run_chunks(x, weight, target, bias, options, stats, losses=losses, wants=wants)
    return losses.sum(), *sums


@_forward_backward.register_fake
def _(wants, x, weight, target, bias, *options):
    return x.new_empty((), dtype=torch.float32), *_new_gradients(x, weight, wants, [torch.float32] * 3)


def _save_for_recomputation(ctx, inputs, output):
    x, weight, target, bias, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], x, weight, target, bias)


def _recompute(ctx, grad, _):
    wants = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    stats, *inputs = ctx.saved_tensors
    dx, dw, db = (d if want else None for d, want in zip(_backward(grad, stats, wants, *inputs, *ctx.options), wants))
    return dx, dw, None, db, *[None] * 6


def _save_gradients(ctx, inputs, output):
    ctx.wants, x, weight, _, bias, _, _, z_loss, softcap, V, fp16 = inputs
    ctx.dtypes, ctx.unscale = _dtypes(x, weight, bias), 1 / grad_scale(x.dtype, V, z_loss, softcap, fp16)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros of dW's size
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx, grad, *_):
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy has no second derivative: call backward without create_graph=True")
    factor = grad * ctx.unscale
    sums = zip(ctx.saved_tensors, ctx.dtypes, ctx.wants)
    dx, dw, db = ((total * factor).to(dtype) if want else None for total, dtype, want in sums)
    return None, dx, dw, None, db, *[None] * 6


_forward.register_autograd(_recompute, setup_context=_save_for_recomputation)
_forward_backward.register_autograd(_scale_gradients, setup_context=_save_gradients)


# ---------------------------------------------------------------- public


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    accumulate: str = "fp32",
) -> Tensor:
    """Cross-entropy of the classifier ``x @ weight.T + bias``, without holding its logits.

    x (..., C), weight (V, C), bias (V,), any strides, each fp32, fp16 or bf16; target (...) int64 or int32. The GEMMs
    run in x's dtype (under autocast, in autocast's) with fp32 accumulation (``accumulate="fp16"``: docs/precision-modes.md);
    the rest is fp32, and so is the result: a scalar, or target's shape for "none". Each gradient has its input's dtype.
    ``reference.linear_cross_entropy`` says what the options mean, and computes for CPU tensors outside the interpreter.
    Rows of weight at and past ``vocab_size`` take no part: their gradient is zero. All tokens ignored: the mean is 0,
    and so are the gradients.

    Raises ValueError for arguments that do not fit together, and on a CPU for a target that is neither ``ignore_index``
    nor in [0, vocab_size); on a GPU, which is not waited for, the loss of such a token and its gradients are NaN.
    RuntimeError from a backward pass with create_graph=True.

    >>> x, weight, target = torch.randn(2, 8, 32), torch.randn(100, 32), torch.randint(100, (2, 8))
    >>> expected = torch.nn.functional.cross_entropy((x @ weight.T).flatten(0, 1), target.flatten())
    >>> torch.allclose(linear_cross_entropy(x, weight, target), expected)
    True
    """
    V = weight.shape[0] if vocab_size is None else vocab_size
    options = ignore_index, label_smoothing, z_loss, logit_softcap, V, accumulate == "fp16"
    _check_arguments(x, weight, target, bias, reduction, accumulate, options)
    if not runtime.runs_in_triton(x):
        if not torch.compiler.is_compiling():
            _check_targets(target, ignore_index, V)
        return reference.linear_cross_entropy(
            x, weight, target, bias=bias, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, z_loss=z_loss, logit_softcap=logit_softcap, vocab_size=vocab_size,
        )  # fmt: skip
    x = x.to(runtime.compute_dtype(x))
    flat = target.reshape(-1)
    inputs = x.reshape(-1, x.shape[-1]), weight, flat, bias
    wants = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (x, weight, bias)]
    if reduction != "none" and any(wants):
        total = _forward_backward(wants, *inputs, *options)[0]
    else:
        losses, _ = _forward(*inputs, *options)
        if reduction == "none":
            return losses.view(target.shape)
        total = losses.sum()
    return total if reduction == "sum" else total / (flat != ignore_index).sum().clamp(min=1)


def _check_arguments(x, weight, target, bias, reduction, accumulate, options) -> None:
    _, smoothing, z_loss, softcap, V, _ = options
    x_shape, w_shape = tuple(x.shape), tuple(weight.shape)
    if len(w_shape) != 2 or not x_shape or x_shape[-1] != w_shape[1]:
        raise ValueError(f"x is {x_shape} and weight {w_shape}: they have to be (..., C) and (vocabulary, C)")
    arguments.shape("target", target, x_shape[:-1], "x", x_shape)
    arguments.tensors("weight", w_shape, ("x", x, None), ("weight", weight, None), ("bias", bias, w_shape[:1]))
    arguments.indices("target", target, "x", x)
    arguments.choice("reduction", reduction, ("none", "mean", "sum"))
    arguments.accumulate(accumulate, runtime.compute_dtype(x))
    arguments.probability("label_smoothing", smoothing)
    if z_loss < 0:
        raise ValueError(f"z_loss is {z_loss}: use a number that is not negative")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"logit_softcap is {softcap}: use a positive number, or None for no cap")
    if not 1 <= V <= w_shape[0]:
        raise ValueError(f"vocab_size is {V}: weight has rows for 1 to {w_shape[0]}")
