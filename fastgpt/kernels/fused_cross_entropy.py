"""Linear + cross-entropy that never holds the full logits.

For token i with classifier row w_v and target t, and q the smoothed one-hot (1 - e) [v = t] + e / V::

    z_v  = x_i . w_v + b_v,  then z_v <- c tanh(z_v / c) with a softcap c
    lse  = log sum_v exp(z_v),  p_v = exp(z_v - lse)
    loss = lse - (1 - e) z_t - e mean_v z_v + z_loss lse^2
    dz_v = p_v (1 + 2 z_loss lse) - q_v,  times 1 - tanh(z_v / c)^2 with a softcap
    dx_i = sum_v dz_v w_v,   dw_v = sum_i dz_v x_i,   db_v = sum_i dz_v

Tokens are taken in chunks (``chunk_rows``). Per chunk, cuBLAS writes the logits in x's dtype into one reused buffer, one
Triton program per row reads them (statistics in fp32) and overwrites them with dz, and two more GEMMs take dz to dx and,
accumulated in fp32 over the chunks, to dW. Chunked classifiers: Wijmans et al. 2024 (Cut Cross-Entropy), Hsu et al. 2024
(Liger-Kernel). No gradient is filtered: results are exact to the operands' rounding.

When is dz formed?
* No gradient wanted: never. Only losses are computed.
* mean, sum: in the forward pass, while the logits are there: 3 GEMMs in all. Saved for backward: dx (tokens, C), dW and db
  of the *sum*, in fp32. Backward only multiplies them, in fp32 and into new tensors, by the upstream gradient and 1/N.
* none: in backward, by recomputing the chunks, as each row has an upstream gradient of its own: 4 GEMMs. Saved: two fp32
  numbers a row (max and log of the sum: their sum, lse, alone would cost p_t - 1 its digits), and the inputs.

Range of fp16. dz is not divided by N before it is rounded (2e-5 / 8192 is 0 in fp16), and is scaled by the largest power
of two that cannot overflow (``grad_scale``), taken out again in fp32.

Peak memory at 8192 x 768 x 50304 in bf16, fp32 weight, forward and backward. Eager holds log-probabilities, their gradient
and the gradient of the logits, each (tokens, V) in fp32: 3 x 1648 MB = 4945 MB, and more. Here: logits of one chunk 167 MB
(at most 256 MB), weight in bf16 77 MB, dW in fp32 155 MB, dx in fp32 25 MB: 424 MB in forward, and in backward dW twice: 372 MB
with both dx.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import reference, runtime

LOGITS_BUDGET = 256 * 2**20
"""Bytes that the logits of one chunk may take."""

GEMM_TILE = 128
"""Rows and columns of cuBLAS's usual output tile."""


def chunk_rows(rows: int, V: int, C: int, dtype: torch.dtype, sm_count: int) -> int:
    """Tokens per chunk: few chunks, as each reads and writes all of dW once more; logits within LOGITS_BUDGET; and tiles
    of dx that fill whole waves of the SMs. dx is the small GEMM here: 2048 rows at C = 768 are 96 tiles, 3 waves of 46
    SMs that are 70% full, where 1664 rows are 2 waves, 85% full.
    """
    budget = LOGITS_BUDGET // (_padded(V) * dtype.itemsize) // GEMM_TILE * GEMM_TILE
    rows = max(rows, 1)
    fewest = triton.cdiv(rows, max(budget, GEMM_TILE))
    best, best_fill = 0, 0.0
    for chunks in range(fewest, fewest + 3):
        candidate = triton.cdiv(triton.cdiv(rows, chunks), GEMM_TILE) * GEMM_TILE
        tiles = candidate // GEMM_TILE * triton.cdiv(C, GEMM_TILE)
        fill = tiles / (triton.cdiv(tiles, sm_count) * sm_count)
        if fill > best_fill:
            best, best_fill = candidate, fill
    return best


def config(V: int) -> dict[str, int]:
    """Launch options of the row kernel. 16 logits a thread: two 128-bit loads in bf16, four in fp32."""
    block = min(max(triton.next_power_of_2(V), 64), 4096)
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


def grad_scale(dtype: torch.dtype, V: int, z_loss: float, logit_softcap: float | None) -> float:
    """The power of two that scales dz before its cast to ``dtype``: 1 but for fp16, where it is the largest one that keeps
    |dz| <= 1 + 2 z_loss |lse| within range for any logits that are finite in fp16."""
    if dtype != torch.float16:
        return 1.0
    largest = torch.finfo(dtype).max
    lse = (largest if logit_softcap is None else logit_softcap) + math.log(V)
    return 2.0 ** math.floor(math.log2(largest / (1 + 2 * z_loss * lse)))


def _padded(V: int) -> int:
    """Row stride of the logits buffer: rows start on 128 bytes for any V, so that every access is a 128-bit one."""
    return triton.cdiv(V, 64) * 64


# ---------------------------------------------------------------- kernel


@triton.jit
def _softcap(z, cap):
    """cap * tanh(z / cap) and its derivative, from one exponential that neither overflows nor cancels in the tail."""
    e = tl.exp(-2 * tl.abs(z / cap))
    capped = cap * (1 - e) / (1 + e)
    return tl.where(z < 0, -capped, capped), 4 * e / ((1 + e) * (1 + e))


@triton.jit
def _rows_kernel(
    logits_ptr,  # (rows, stride) in x's dtype; overwritten by dz if GRAD
    target_ptr,  # (rows,) int32 or int64
    loss_ptr,  # (rows,) fp32, written if LOSS
    max_ptr,  # (rows,) fp32: largest logit; written if LOSS, else read
    log_sum_ptr,  # (rows,) fp32: lse - max; written if LOSS, else read
    row_scale_ptr,  # (rows,) fp32, read if PER_ROW
    V,
    stride,
    ignore_index,
    scale,
    smoothing,
    z_loss,
    softcap,
    LOSS: tl.constexpr,
    GRAD: tl.constexpr,
    PER_ROW: tl.constexpr,
    SMOOTH: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: loss and statistics in a first pass over the vocabulary, dz in place in a second (the row is in L2 then).

    Blocks are loaded up to ``stride``, a multiple of 64, and cut at V in registers: a mask at an odd V would break every
    access into single elements. A target outside [0, V) that is not ignored makes loss and dz of its row NaN."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(target_ptr + row).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    if target == ignore_index:
        if LOSS:
            tl.store(loss_ptr + row, 0.0)
            tl.store(max_ptr + row, 0.0)
            tl.store(log_sum_ptr + row, 0.0)
        if GRAD:
            zeros = tl.zeros((BLOCK,), logits_ptr.dtype.element_ty)
            for start in range(0, V, BLOCK):
                tl.store(logits_ptr + start + lanes, zeros, mask=start + lanes < stride)
    else:
        in_range = (target >= 0) & (target < V)
        if LOSS:
            z_target = tl.load(logits_ptr + target, mask=in_range, other=float("nan")).to(tl.float32)
            if CAP:
                z_target, _ = _softcap(z_target, softcap)
            z_max = tl.full((), float("-inf"), tl.float32)
            exp_sum = tl.zeros((), tl.float32)
            z_sum = tl.zeros((), tl.float32)
            for start in range(0, V, BLOCK):
                columns = start + lanes
                z = tl.load(logits_ptr + columns, mask=columns < stride, other=0.0).to(tl.float32)
                if CAP:
                    z, _ = _softcap(z, softcap)
                if SMOOTH:
                    z_sum += tl.sum(tl.where(columns < V, z, 0.0), 0)
                z = tl.where(columns < V, z, float("-inf"))
                new_max = tl.maximum(z_max, tl.max(z, 0))
                # While every logit so far is -inf, subtract 0 instead: -inf - -inf is NaN.
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)
                exp_sum = exp_sum * tl.exp(z_max - shift) + tl.sum(tl.exp(z - shift), 0)
                z_max = new_max
            log_sum = tl.log(exp_sum)
            lse = z_max + log_sum
            # z_max - z_target first: lse - z_target would cancel where the target is certain.
            loss = log_sum + (z_max - z_target)
            if SMOOTH:
                loss += smoothing * (z_target - z_sum / V)
            tl.store(loss_ptr + row, loss + z_loss * lse * lse)
            tl.store(max_ptr + row, z_max)
            tl.store(log_sum_ptr + row, log_sum)
        else:
            z_max = tl.load(max_ptr + row)
            log_sum = tl.load(log_sum_ptr + row)
        if GRAD:
            # Every thread has read the target's logit before any thread overwrites it.
            tl.debug_barrier()
            p_factor = 1 + 2 * z_loss * (z_max + log_sum)
            uniform = smoothing / V
            hit = tl.where(in_range, 1 - smoothing, float("nan"))
            if PER_ROW:
                scale *= tl.load(row_scale_ptr + row)
            for start in range(0, V, BLOCK):
                columns = start + lanes
                z = tl.load(logits_ptr + columns, mask=columns < stride, other=0.0).to(tl.float32)
                slope = 1.0
                if CAP:
                    z, slope = _softcap(z, softcap)
                p = tl.exp(z - z_max - log_sum)
                # In fp32 up to here: p - 1 of a certain target keeps its digits.
                dz = p * p_factor - uniform - tl.where(columns == target, hit, 0.0)
                dz = tl.where(in_range, dz * slope * scale, float("nan"))
                dz = tl.where(columns < V, dz, 0.0)
                tl.store(logits_ptr + columns, dz.to(logits_ptr.dtype.element_ty), mask=columns < stride)


# ---------------------------------------------------------------- chunks

Options = tuple[int, float, float, "float | None", int]
"""ignore_index, label_smoothing, z_loss, logit_softcap, vocab_size: the last arguments of every op, in its order."""


def _matmul_fp32(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """out = a @ b, or out += a @ b: fp32 from operands in any dtype, without an intermediate in theirs."""
    beta = 1 if accumulate else 0
    # Only out= overloads: autocast, which is still on inside an op, leaves those alone.
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, out=out)
    else:
        torch.addmm(out, a.float(), b.float(), beta=beta, out=out)


def _check_targets(target: Tensor, ignore_index: int, V: int) -> None:
    """Raise ValueError for a class that does not exist. CPU only: on a GPU this would wait for the device, and the loss of
    such a row is NaN instead."""
    if target.device.type == "cpu":
        wrong = target[((target < 0) | (target >= V)) & (target != ignore_index)]
        if wrong.numel():
            raise ValueError(
                f"target holds {wrong[0].item()}: classes go from 0 to {V - 1}, ignored ones are {ignore_index}"
            )


def _run_chunks(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: Options,
    stats: Tensor,
    *,
    losses: Tensor | None = None,
    row_scale: Tensor | None = None,
    wants: Sequence[bool] = (False, False, False),
) -> tuple[Tensor, Tensor, Tensor]:
    """Every chunk in turn. With ``losses`` (rows,), writes them and ``stats`` (2, rows); without, reads ``stats``.

    Returns dx, dW and db in fp32, empty where ``wants`` does not ask for one: of the sum of the losses times
    ``grad_scale``, or with ``row_scale`` (rows,), of the losses weighted by it.
    """
    ignore_index, smoothing, z_loss, softcap, V = options
    rows, C = x.shape
    _check_targets(target, ignore_index, V)
    want_dx, want_dw, want_db = wants
    new = x.new_empty if rows else x.new_zeros
    dx = new(x.shape if want_dx else 0, dtype=torch.float32)
    dw = new(weight.shape if want_dw else 0, dtype=torch.float32)
    db = x.new_zeros(weight.shape[0] if want_db else 0, dtype=torch.float32)
    dw[V:].zero_()  # padding of the vocabulary
    if not rows:
        return dx, dw, db

    weight = weight[:V].to(x.dtype)
    bias = None if bias is None else bias[:V].to(x.dtype)
    size = min(rows, chunk_rows(rows, V, C, x.dtype, runtime.sm_count(x.device)))
    buffer = x.new_empty(size, _padded(V))
    for start in range(0, rows, size):
        chunk = slice(start, min(start + size, rows))
        x_chunk, count = x[chunk], chunk.stop - start
        logits = buffer[:count, :V]
        if bias is None:
            torch.mm(x_chunk, weight.t(), out=logits)
        else:
            torch.addmm(bias, x_chunk, weight.t(), out=logits)
        with runtime.device_guard(x):
            _rows_kernel[(count,)](
                logits,
                target[chunk],
                losses[chunk] if losses is not None else None,
                stats[0, chunk],
                stats[1, chunk],
                row_scale[chunk] if row_scale is not None else None,
                V,
                buffer.stride(0),
                ignore_index,
                grad_scale(x.dtype, V, z_loss, softcap) if row_scale is None else 1.0,
                smoothing,
                z_loss,
                softcap or 0.0,
                LOSS=losses is not None,
                GRAD=any(wants),
                PER_ROW=row_scale is not None,
                SMOOTH=smoothing != 0,
                CAP=softcap is not None,
                **config(V),
            )
        if want_dx:
            _matmul_fp32(dx[chunk], logits, weight, accumulate=False)
        if want_dw:
            _matmul_fp32(dw[:V], logits.t(), x_chunk, accumulate=start > 0)
        if want_db:
            db[:V] += logits.sum(0, dtype=torch.float32)
    return dx, dw, db


# ---------------------------------------------------------------- ops

_INPUTS = "Tensor x, Tensor weight, Tensor target, Tensor? bias"
_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float? logit_softcap, SymInt vocab_size"
_WANTS = "bool want_dx, bool want_dw, bool want_db"


@torch.library.custom_op(
    "fastgpt::linear_cross_entropy_fwd",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)",
)
def _forward(x, weight, target, bias, *options):
    """x (rows, C), target (rows,) -> losses (rows,) fp32, statistics (2, rows) fp32. No gradient is formed here."""
    losses = x.new_empty(x.shape[0], dtype=torch.float32)
    stats = x.new_empty(2, x.shape[0], dtype=torch.float32)
    _run_chunks(x, weight, target, bias, options, stats, losses=losses)
    return losses, stats


@torch.library.custom_op(
    "fastgpt::linear_cross_entropy_bwd",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, Tensor stats, {_WANTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _backward(grad, x, weight, target, bias, stats, want_dx, want_dw, want_db, *options):
    """Gradients of ``sum(grad * losses)``, in the dtypes of x, weight and bias, by recomputing the chunks."""
    ignore_index, _, z_loss, softcap, V = options
    row_scale, unscale = None, grad.new_ones((), dtype=torch.float32)
    if grad.numel():
        # dW sums over rows, so grad has to enter before that, and so before the cast: as a fraction of its largest
        # power of two, in order not to leave fp16's range, whatever its own scale.
        grad = torch.where(target == ignore_index, 0.0, grad.float())
        exponent = torch.frexp(grad.abs().amax()).exponent.clamp(-126, 126)
        scale = grad_scale(x.dtype, V, z_loss, softcap)
        row_scale = torch.ldexp(grad, -exponent) * scale
        unscale = torch.ldexp(grad.new_tensor(1 / scale), exponent)
    wants = want_dx, want_dw, want_db
    sums = _run_chunks(x, weight, target, bias, options, stats, row_scale=row_scale, wants=wants)
    dtypes = x.dtype, weight.dtype, _dtype(bias)
    dx, dw, db = (_scaled(total, unscale, dtype) for total, dtype in zip(sums, dtypes))
    return dx, dw, db


@torch.library.custom_op(
    "fastgpt::linear_cross_entropy_fwd_bwd",
    mutates_args=(),
    schema=f"({_INPUTS}, {_WANTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward_backward(x, weight, target, bias, want_dx, want_dw, want_db, *options):
    """Sum of the losses, and its gradients times ``grad_scale``, all in fp32."""
    losses = x.new_empty(x.shape[0], dtype=torch.float32)
    stats = x.new_empty(2, x.shape[0], dtype=torch.float32)
    wants = want_dx, want_dw, want_db
    sums = _run_chunks(x, weight, target, bias, options, stats, losses=losses, wants=wants)
    return losses.sum(), *sums


@_forward.register_fake
def _(x, weight, target, bias, *options):
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(2, x.shape[0], dtype=torch.float32)


@_backward.register_fake
def _(grad, x, weight, target, bias, stats, want_dx, want_dw, want_db, *options):
    dx = x.new_empty(x.shape if want_dx else 0)
    dw = weight.new_empty(weight.shape if want_dw else 0)
    return dx, dw, x.new_empty(weight.shape[0] if want_db else 0, dtype=_dtype(bias))


@_forward_backward.register_fake
def _(x, weight, target, bias, want_dx, want_dw, want_db, *options):
    dx = x.new_empty(x.shape if want_dx else 0, dtype=torch.float32)
    dw = x.new_empty(weight.shape if want_dw else 0, dtype=torch.float32)
    db = x.new_empty(weight.shape[0] if want_db else 0, dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), dx, dw, db


# ---------------------------------------------------------------- autograd


def _dtype(bias: Tensor | None) -> torch.dtype:
    return torch.float32 if bias is None else bias.dtype


def _scaled(total: Tensor, factor: Tensor | float, dtype: torch.dtype) -> Tensor:
    return (total * factor).to(dtype)


def _setup_forward(ctx, inputs, output) -> None:
    x, weight, target, bias, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, target, bias, output[1])


def _forward_autograd(ctx, grad, _stats):
    wants = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    dx, dw, db = _backward(grad, *ctx.saved_tensors, *wants, *ctx.options)
    none = [None] * len(ctx.options)
    return dx if wants[0] else None, dw if wants[1] else None, None, db if wants[2] else None, *none


def _setup_forward_backward(ctx, inputs, output) -> None:
    x, weight, _, bias, *ctx.wants = inputs[:7]
    _, _, z_loss, softcap, V = inputs[7:]
    ctx.dtypes = x.dtype, weight.dtype, _dtype(bias)
    ctx.unscale = 1 / grad_scale(x.dtype, V, z_loss, softcap)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])


def _forward_backward_autograd(ctx, grad, *_):
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy has no second derivative: call backward without create_graph=True")
    factor = grad * ctx.unscale
    dx, dw, db = (
        _scaled(total, factor, dtype) if want else None
        for total, dtype, want in zip(ctx.saved_tensors, ctx.dtypes, ctx.wants)
    )
    return dx, dw, None, db, *[None] * 8


_forward.register_autograd(_forward_autograd, setup_context=_setup_forward)
_forward_backward.register_autograd(_forward_backward_autograd, setup_context=_setup_forward_backward)


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
) -> Tensor:
    """Cross-entropy of the classifier ``x @ weight.T + bias``, without holding its logits.

    x (..., C), weight (V, C), bias (V,), any strides, each fp32, fp16 or bf16; target (...) int64 or int32. The GEMMs run in
    x's dtype, or under autocast in autocast's, with fp32 accumulation; the rest is fp32, and so is the result: a scalar, or
    target's shape for "none". Each gradient has its input's dtype. Meaning of the options, and what CPU tensors outside
    the interpreter get: ``reference.linear_cross_entropy``. Rows of weight at and past ``vocab_size`` take no part; their
    gradient is zero.

    A target that is neither ``ignore_index`` nor in [0, vocab_size) raises ValueError on a CPU; on a GPU, which is not waited
    for, its loss and its gradients are NaN. All rows ignored: the mean is 0, and so are the gradients. No second derivative.
    Raises ValueError for arguments that do not fit together.
    """
    V = weight.shape[0] if vocab_size is None else vocab_size
    _check_arguments(x, weight, target, bias, reduction, label_smoothing, z_loss, logit_softcap, V)
    if not runtime.runs_in_triton(x):
        if not torch.compiler.is_compiling():
            _check_targets(target, ignore_index, V)
        return reference.linear_cross_entropy(
            x,
            weight,
            target,
            bias=bias,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            logit_softcap=logit_softcap,
            vocab_size=vocab_size,
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"{name} is {tensor.dtype}: the kernel takes float32, float16 and bfloat16")

    x2, flat = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    options = ignore_index, label_smoothing, z_loss, logit_softcap, V
    wants = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in (x, weight, bias)]
    if reduction == "none":
        return _forward(x2, weight, flat, bias, *options)[0].view(target.shape)
    total = (
        _forward_backward(x2, weight, flat, bias, *wants, *options)[0]
        if any(wants)
        else _forward(x2, weight, flat, bias, *options)[0].sum()
    )
    return total if reduction == "sum" else total / (flat != ignore_index).sum().clamp(min=1)


def _check_arguments(x, weight, target, bias, reduction, label_smoothing, z_loss, logit_softcap, V) -> None:
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}: they have to be (..., C) and (vocabulary, C)"
        )
    if target.shape != x.shape[:-1]:
        raise ValueError(f"target is {tuple(target.shape)}: x {tuple(x.shape)} needs {tuple(x.shape[:-1])}")
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"target is {target.dtype}: use int64 or int32")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)}: weight {tuple(weight.shape)} needs {tuple(weight.shape[:1])}")
    if any(t is not None and t.device != x.device for t in (weight, target, bias)):
        raise ValueError(f"x is on {x.device}: weight, target and bias have to be there too")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: use 'none', 'mean' or 'sum'")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}: use a number from 0 to 1")
    if z_loss < 0:
        raise ValueError(f"z_loss is {z_loss}: use a number >= 0")
    if logit_softcap is not None and logit_softcap <= 0:
        raise ValueError(f"logit_softcap is {logit_softcap}: use a number > 0, or None for no cap")
    if not 1 <= V <= weight.shape[0]:
        raise ValueError(f"vocab_size is {V}: use 1 to {weight.shape[0]}, the rows of weight")
