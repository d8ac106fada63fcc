"""Linear + cross-entropy that never holds the full logits.

For token i with classifier row w_v and target t, and q the smoothed one-hot (1 - e) [v = t] + e / V::

    z_v  = x_i . w_v + b_v,  then z_v <- c tanh(z_v / c) with a softcap c
    lse  = log sum_v exp(z_v),  p_v = exp(z_v - lse)
    loss = lse - (1 - e) z_t - e mean_v z_v + z_loss lse^2
    dz_v = p_v (1 + 2 z_loss lse) - q_v,  times 1 - tanh(z_v / c)^2 with a softcap
    dx_i = sum_v dz_v w_v,   dw_v = sum_i dz_v x_i,   db_v = sum_i dz_v

Tokens are taken in chunks (``chunk_rows``). Per chunk, cuBLAS writes the logits in x's dtype into one reused buffer,
one Triton kernel reads them row by row (statistics in fp32) and overwrites them with dz, and two more GEMMs take dz to
dx and, accumulated in fp32 over the chunks, to dW. Chunked classifiers: Hsu et al. 2024 (Liger-Kernel), Wijmans et al.
2024 (Cut Cross-Entropy). No gradient is filtered.

When dz is formed:

* no gradient wanted: never, only losses are computed;
* mean, sum: in the forward pass, while the logits are there: 3 GEMMs in all. Saved for backward are dx (tokens, C), dW
  and db of the *sum* of the losses, in fp32. Backward only multiplies them, in fp32 and into new tensors, by the
  upstream gradient, which the mean has divided by the number of tokens;
* none: in backward, by recomputing the chunks, as each row has an upstream gradient of its own: 4 GEMMs. Saved are the
  inputs and, per row, the largest logit and lse minus it (lse alone would cost p_t - 1 of a certain target its digits).

fp16: dz is rounded before 1/N (2e-5 / 8192 would be 0), scaled by a power of two, ``grad_scale``, taken out in fp32.

Peak memory at 8192 x 768 x 50304, bf16 with an fp32 weight: eager holds the log-probabilities, their gradient and that
of the logits, each (tokens, V) in fp32: 3 x 1648 MB. Here: logits of a chunk 167 MB, weight in bf16 77 MB, dW 155 MB
and dx 25 MB in fp32: 424 MB in forward, and with the results beside dW and dx 347 MB in backward. That is 1/11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
from torch import Tensor

from fastgpt.kernels import config_space, reference, runtime, tuning
from fastgpt.kernels._cross_entropy_kernels import rows_kernel

LOGITS_BUDGET = 256 * 2**20
"""Bytes that the logits of one chunk may take."""

GEMM_TILE = 128
"""Rows and columns of cuBLAS's usual output tile."""


def chunk_rows(rows: int, V: int, C: int, dtype: torch.dtype, sm_count: int) -> int:
    """Tokens per chunk: few chunks, as each reads and writes all of dW once more; logits within LOGITS_BUDGET; and
    tiles of dx, the small GEMM here, that fill whole waves of the SMs. At C = 768 on 46 SMs, 2048 rows are 96 tiles, 3
    waves that are 70% full; 1664 rows are 2 waves, 85% full.
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


def _choice(x: Tensor, V: int, logit_softcap: float | None) -> tuning.Choice:
    """The row kernel's ``tile``, the logits that a program holds at a time, and warps. The default is safe on any card: 16
    logits a thread, two 128-bit accesses in bf16 and four in fp32; half of that with a softcap, whose exponentials take
    registers."""
    default = {"tile": 4096 if logit_softcap is None else 2048, "num_warps": 8}
    bucket = config_space.cross_entropy_bucket(V, logit_softcap)
    return tuning.choose("cross_entropy.rows", x.dtype, bucket, x.device, default)


def config(rows: int, V: int, tile: int, num_warps: int) -> dict[str, int]:
    """Launch options of the row kernel for ``rows`` rows: ROWS x BLOCK logits at a time, ``tile`` in all."""
    block = min(max(triton.next_power_of_2(V), 64), tile)
    # The interpreter pays per program and per operation, hardly per element.
    rows_each = min(2**18 // block, triton.next_power_of_2(rows)) if runtime.INTERPRET else tile // block
    return {"ROWS": rows_each, "BLOCK": block, "num_warps": num_warps}


def grad_scale(dtype: torch.dtype, V: int, z_loss: float, logit_softcap: float | None) -> float:
    """The power of two that scales dz before its cast to ``dtype``: 1 but for fp16, where it is the largest one that
    keeps |dz| <= 1 + 2 z_loss |lse| within range for any logits that are finite in fp16."""
    if dtype != torch.float16:
        return 1.0
    largest = torch.finfo(dtype).max
    lse = (largest if logit_softcap is None else logit_softcap) + math.log(V)
    return 2.0 ** math.floor(math.log2(largest / (1 + 2 * z_loss * lse)))


def _padded(V: int) -> int:
    """Row stride of the logits buffer: each row starts on 128 bytes whatever V is."""
    return triton.cdiv(V, 64) * 64


# ---------------------------------------------------------------- chunks


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


def _matmul_fp32(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """out = a @ b, or out += a @ b, in fp32 from operands of any dtype. Autocast, which is still on inside an op,
    leaves the out= overloads alone, and operands that have its dtype already."""
    if not a.is_cuda or a.dtype == torch.float32:
        torch.addmm(out, a.float(), b.float(), beta=int(accumulate), out=out)
    elif not accumulate:
        torch.mm(a, b, out_dtype=torch.float32, out=out)  # type: ignore[call-overload]
    elif _adds_to_fp32(a.device, a.dtype):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)  # type: ignore[call-overload]
    else:
        out += torch.mm(a, b, out_dtype=torch.float32)  # type: ignore[call-overload]


def _check_targets(target: Tensor, ignore_index: int, V: int) -> None:
    """Raise ValueError for a class that does not exist. Only on a CPU: asking a GPU would make the host wait for it."""
    if target.device.type == "cpu":
        wrong = target[((target < 0) | (target >= V)) & (target != ignore_index)]
        if wrong.numel():
            value = wrong[0].item()
            raise ValueError(f"target holds {value}: classes are 0 to {V - 1}, and {ignore_index} where ignored")


def _run_chunks(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: tuple,
    stats: Tensor,
    *,
    losses: Tensor | None = None,
    row_scale: Tensor | None = None,
    wants: Sequence[bool] = (False, False, False),
) -> list[Tensor]:
    """Every chunk in turn. With ``losses`` (rows,), writes them and ``stats`` (rows, 2); without, reads ``stats``.

    Returns [dx, dW, db] in fp32, those that ``wants`` does not ask for empty: of the sum of the losses times
    ``grad_scale``, or with ``row_scale`` (rows,), of the losses weighted by it.
    """
    ignore_index, smoothing, z_loss, softcap, V = options
    rows, C = x.shape
    _check_targets(target, ignore_index, V)
    target = target.contiguous()  # a strided or expanded view: the kernel takes neighbours
    allocate = x.new_empty if rows else x.new_zeros
    dx = allocate(x.shape if wants[0] else 0, dtype=torch.float32)
    dw = allocate(weight.shape if wants[1] else 0, dtype=torch.float32)
    db = x.new_zeros(weight.shape[0] if wants[2] else 0, dtype=torch.float32)
    if not rows:
        return [dx, dw, db]

    dw[V:].zero_()
    weight = weight[:V].to(x.dtype)
    bias = None if bias is None else bias[:V].to(x.dtype)
    size = min(rows, chunk_rows(rows, V, C, x.dtype, runtime.sm_count(x.device)))
    buffer = x.new_empty(size, _padded(V))
    buffer[:, V:].zero_()
    choice = _choice(x, V, softcap)
    for start in range(0, rows, size):
        chunk = slice(start, min(start + size, rows))
        count = chunk.stop - start
        logits = buffer[:count, :V]
        if bias is None:
            torch.mm(x[chunk], weight.t(), out=logits)
        else:
            torch.addmm(bias, x[chunk], weight.t(), out=logits)

        def run(options: dict[str, int], chunk: slice = chunk, count: int = count, logits: Tensor = logits) -> None:
            launch = config(size, V, options["tile"], options["num_warps"])
            rows_kernel[(triton.cdiv(count, launch["ROWS"]),)](
                logits,
                target[chunk],
                None if losses is None else losses[chunk],
                stats[chunk],
                None if row_scale is None else row_scale[chunk],
                count,
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
                **launch,
            )

        with runtime.device_guard(x):
            tuning.launch(choice, run)
        if wants[0]:
            _matmul_fp32(dx[chunk], logits, weight, accumulate=False)
        if wants[1]:
            _matmul_fp32(dw[:V], logits.t(), x[chunk], accumulate=start > 0)
        if wants[2]:
            db[:V] += logits.sum(0, dtype=torch.float32)
    return [dx, dw, db]


# ---------------------------------------------------------------- ops
#
# x is (rows, C) and target (rows,) here. ``wants`` says which of dx, dW and db to compute; the others come back empty.

_INPUTS = "Tensor x, Tensor weight, Tensor target, Tensor? bias"
_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float? logit_softcap, SymInt vocab_size"


def _new_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """losses (rows,) and stats (rows, 2) in fp32."""
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], 2, dtype=torch.float32)


def _dtypes(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[torch.dtype, ...]:
    return x.dtype, weight.dtype, torch.float32 if bias is None else bias.dtype


def _new_gradients(x: Tensor, weight: Tensor, wants: Sequence[bool], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    shapes = x.shape, weight.shape, weight.shape[:1]
    return [x.new_empty(shape if want else 0, dtype=dtype) for shape, want, dtype in zip(shapes, wants, dtypes)]


@torch.library.custom_op(
    "fastgpt::linear_cross_entropy_fwd", mutates_args=(), schema=f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)"
)
def _forward(x, weight, target, bias, *options):
    """losses (rows,) fp32 and statistics (rows, 2) fp32. No gradient is formed here."""
    losses, stats = _new_statistics(x)
    _run_chunks(x, weight, target, bias, options, stats, losses=losses)
    return losses, stats


@_forward.register_fake
def _(x, weight, target, bias, *options):
    return _new_statistics(x)


@torch.library.custom_op(
    "fastgpt::linear_cross_entropy_bwd",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor stats, bool[] wants, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _backward(grad, stats, wants, x, weight, target, bias, *options):
    """Gradients of ``sum(grad * losses)``, in the dtypes of x, weight and bias, by recomputing the chunks."""
    ignore_index, _, z_loss, softcap, V = options
    row_scale: Tensor | None = None
    unscale: Tensor | float = 1.0
    if grad.numel():
        # dW sums over rows, so grad enters before the cast of dz: as a fraction of the power of two above its largest
        # element, so that its own scale (1/N, a loss scale) does not push dz out of fp16's range.
        grad = torch.where(target == ignore_index, 0.0, grad.float())
        exponent = torch.frexp(grad.abs().amax()).exponent.clamp(-126, 126)
        scale = grad_scale(x.dtype, V, z_loss, softcap)
        row_scale = torch.ldexp(grad, -exponent) * scale
        unscale = torch.ldexp(
            torch.full_like(exponent, 1 / scale, dtype=torch.float32), exponent
        )  # no copy from the host
    sums = _run_chunks(x, weight, target, bias, options, stats, row_scale=row_scale, wants=wants)
    return tuple((total * unscale).to(dtype) for total, dtype in zip(sums, _dtypes(x, weight, bias)))


@_backward.register_fake
def _(grad, stats, wants, x, weight, target, bias, *options):
    return tuple(_new_gradients(x, weight, wants, _dtypes(x, weight, bias)))


@torch.library.custom_op(
    "fastgpt::linear_cross_entropy_fwd_bwd",
    mutates_args=(),
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
    return dx, dw, None, db, *[None] * 5


def _save_gradients(ctx, inputs, output):
    ctx.wants, x, weight, _, bias, _, _, z_loss, softcap, V = inputs
    ctx.dtypes, ctx.unscale = _dtypes(x, weight, bias), 1 / grad_scale(x.dtype, V, z_loss, softcap)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else zeros of dW's size
    ctx.save_for_backward(*output[1:])


def _scale_gradients(ctx, grad, *_):
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy has no second derivative: call backward without create_graph=True")
    factor = grad * ctx.unscale
    sums = zip(ctx.saved_tensors, ctx.dtypes, ctx.wants)
    dx, dw, db = ((total * factor).to(dtype) if want else None for total, dtype, want in sums)
    return None, dx, dw, None, db, *[None] * 5


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
) -> Tensor:
    """Cross-entropy of the classifier ``x @ weight.T + bias``, without holding its logits.

    x (..., C), weight (V, C), bias (V,), any strides, each fp32, fp16 or bf16; target (...) int64 or int32. The GEMMs
    run in x's dtype (under autocast, in autocast's) with fp32 accumulation; the rest is fp32, and so is the result: a
    scalar, or target's shape for "none". Each gradient has its input's dtype. ``reference.linear_cross_entropy`` says
    what the options mean, and computes for CPU tensors outside the interpreter. Rows of weight at and past
    ``vocab_size`` take no part: their gradient is zero. All tokens ignored: the mean is 0, and so are the gradients.

    Raises ValueError for arguments that do not fit together, and on a CPU for a target that is neither ``ignore_index``
    nor in [0, vocab_size); on a GPU, which is not waited for, the loss of such a token and its gradients are NaN.
    RuntimeError from a backward pass with create_graph=True.
    """
    V = weight.shape[0] if vocab_size is None else vocab_size
    options = ignore_index, label_smoothing, z_loss, logit_softcap, V
    _check_arguments(x, weight, target, bias, reduction, options)
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


def _check_arguments(x, weight, target, bias, reduction, options) -> None:
    _, smoothing, z_loss, softcap, V = options
    x_shape, w_shape = tuple(x.shape), tuple(weight.shape)
    if len(w_shape) != 2 or not x_shape or x_shape[-1] != w_shape[1]:
        raise ValueError(f"x is {x_shape} and weight {w_shape}: they have to be (..., C) and (vocabulary, C)")
    if tuple(target.shape) != x_shape[:-1]:
        raise ValueError(f"target is {tuple(target.shape)}: x of {x_shape} needs {x_shape[:-1]}")
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"target is {target.dtype}: use int64 or int32")
    if bias is not None and tuple(bias.shape) != w_shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)}: weight of {w_shape} needs {w_shape[:1]}")
    if any(t is not None and t.device != x.device for t in (weight, target, bias)):
        raise ValueError(f"x is on {x.device}: weight, target and bias have to be there too")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}: use 'none', 'mean' or 'sum'")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing is {smoothing}: use a number from 0 to 1")
    if z_loss < 0:
        raise ValueError(f"z_loss is {z_loss}: use a number that is not negative")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"logit_softcap is {softcap}: use a positive number, or None for no cap")
    if not 1 <= V <= w_shape[0]:
        raise ValueError(f"vocab_size is {V}: weight has rows for 1 to {w_shape[0]}")
