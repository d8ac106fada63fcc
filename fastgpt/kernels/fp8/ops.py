"""The linear layers of a GPT's blocks with fp8 operands: ``--precision fp8``, experimental.

For x (M, K) and weight W (N, K), q(.) rounding to fp8 with a scale per row::

    forward    y  = q(x) q(W)^T + b           e4m3 x e4m3
    backward   dx = q(dy) q(W^T)^T            e5m2 x e4m3
               dW = dy^T x, db                bf16, sums in fp32: fused_linear.py

Two thirds of the linears' FLOPs are fp8's. dW would need q of dy^T and x^T, transposed copies with scales along the tokens,
two more passes for a matmul whose error (docs/precision-modes.md) is the worst of the three. The head, the loss, attention,
norms, residual stream, embedding and optimizer are those of bf16.

Who quantises what, and what it costs (bytes per element of the tensor, besides its bf16 form, which dW reads):

    x of c_attn, c_fc           the norm, which has whole rows                        1 written
    gelu(z), and its gradient   the matmul that makes them, by a bound on the row     1 written
    dy of both c_proj           the norm's backward                                   1 written
    x of attention's c_proj     attention, with a scale per group of columns          1 written
    dy of c_attn                attention's backward, the same                        1 written
    weights, both ways round    once per optimizer step, from the fp32 master         10 in all, instead of 2 for the copy

A group is 64 columns of a head, or 32. Heads of a dimension that 32 does not divide have none: an fp8 product of the tensor
cores sums 32. What attention gives and takes is then quantised by a pass of its own, 12 bytes per token and C in each layer.

inf and NaN reach the gradients: quantise.py. A layer whose sizes are no multiples of 16, and every layer without gradients
(evaluation, sampling), runs in bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels import arguments, fused_attn, fused_layernorm, fused_linear, runtime, working_copy
from fastgpt.kernels.fp8 import launch
from fastgpt.kernels.fp8.launch import FORWARD, GRADIENT, Fp8, Grouped
from fastgpt.kernels.fused_linear import new_sums, rows_of, weight_and_bias
from fastgpt.kernels.operators import launches, operator
from fastgpt.kernels.quantise import group_size

# ---------------------------------------------------------------- ops
#
# q and stats: a tensor in fp8, as in launch.py; ``grouped``: stats are the scales of a Grouped one. They get no gradient;
# the tensors that they come from get it. wt: a weight (N, K) rounded along its other dimension, which is the contiguous one.


@operator("fp8_quantise")
def _quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values in x's shape (..., K), stats (2, rows)."""
    values, stats = launch.quantise(rows_of(x), dtype)
    return values.view(x.shape), stats


@_quantise.register_fake
def _(x, dtype):
    return tuple(launch.new(x.shape, dtype, x.device))


@operator("fp8_quantise_weight")
def _quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    forward, transposed = launch.quantise_weight(weight)
    return *forward, transposed.values.t(), transposed.stats


@_quantise_weight.register_fake
def _(weight):
    forward, transposed = (launch.new(shape, FORWARD, weight.device) for shape in (weight.shape, weight.t().shape))
    return *forward, transposed.values.t(), transposed.stats


def _operand(q: Tensor, stats: Tensor, grouped: bool) -> Fp8 | Grouped:
    return Grouped(rows_of(q), stats) if grouped else Fp8(rows_of(q), stats)


@operator("linear_fp8_fwd")
def _linear_fwd(
    x: Tensor, q: Tensor, stats: Tensor, weight: Tensor, w: Tensor, w_stats: Tensor, wt: Tensor, wt_stats: Tensor,
    bias: Tensor | None, in_place: bool, grouped: bool,
) -> Tensor:  # fmt: skip
    """y (..., N) in bf16. x and weight serve backward alone."""
    return launch.matmul(_operand(q, stats, grouped), Fp8(w, w_stats), bias).view(*x.shape[:-1], w.shape[0])


@_linear_fwd.register_fake
def _(x, q, stats, weight, w, *_):
    return x.new_empty(*x.shape[:-1], w.shape[0])


@operator("linear_fp8_mlp_fwd")
def _mlp_fwd(
    x: Tensor, q: Tensor, stats: Tensor, w_fc: Tensor, fc: Tensor, fc_stats: Tensor, fct: Tensor, fct_stats: Tensor,
    b_fc: Tensor | None, w_proj: Tensor, proj: Tensor, proj_stats: Tensor, projt: Tensor, projt_stats: Tensor,
    b_proj: Tensor | None, erf: bool, fc_in_place: bool, proj_in_place: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (..., out), and gelu(z) and z (..., H) for backward, all in bf16."""
    a, z, a8 = launch.matmul_gelu(Fp8(rows_of(q), stats), Fp8(fc, fc_stats), b_fc, erf)
    y = launch.matmul(a8, Fp8(proj, proj_stats), b_proj)
    y, a, z = (t.view(*x.shape[:-1], t.shape[-1]) for t in (y, a, z))
    return y, a, z


@_mlp_fwd.register_fake
def _(x, q, stats, w_fc, fc, fc_stats, fct, fct_stats, b_fc, w_proj, *_):
    y, a, z = (x.new_empty(*x.shape[:-1], size) for size in (w_proj.shape[0], w_fc.shape[0], w_fc.shape[0]))
    return y, a, z


@operator("linear_fp8_bwd_input")
def _bwd_input(q: Tensor, stats: Tensor, wt: Tensor, wt_stats: Tensor, grouped: bool) -> Tensor:
    """dx (..., K) in bf16, from dz in fp8."""
    return launch.matmul(_operand(q, stats, grouped), Fp8(wt.t(), wt_stats)).view(*q.shape[:-1], wt.shape[1])


@_bwd_input.register_fake
def _(q, stats, wt, wt_stats, grouped):
    return q.new_empty(*q.shape[:-1], wt.shape[1], dtype=torch.bfloat16)


@operator("linear_fp8_bwd_input_gelu")
def _bwd_gelu(
    q: Tensor, stats: Tensor, wt: Tensor, wt_stats: Tensor, pre: Tensor, erf: bool, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of ``pre`` in bf16 and in fp8, from the fp8 gradient of the layer that reads gelu(pre); and, if
    ``bias_dtype``, its column sums: the gradient of the bias in ``pre``."""
    a, b, sums = Fp8(rows_of(q), stats), Fp8(wt.t(), wt_stats), new_sums(pre, pre.shape[-1], bias_dtype)
    dz, form = launch.matmul_dgelu(a, b, rows_of(pre), erf, sums if bias_dtype else None)
    return dz.view(pre.shape), form.values.view(pre.shape), form.stats, sums


@_bwd_gelu.register_fake
def _(q, stats, wt, wt_stats, pre, erf, bias_dtype):
    sums = new_sums(pre, pre.shape[-1], bias_dtype)
    return pre.new_empty(pre.shape), *launch.new(pre.shape, GRADIENT, pre.device), sums


# ---------------------------------------------------------------- autograd


def _form(tensor: Tensor, dtype: torch.dtype, grouped: bool = False) -> Fp8 | Grouped:
    """``tensor`` in fp8: as the kernel that made it has written it, or by a pass of its own. ``grouped``: for a matmul whose
    epilogue needs no norms of rows."""
    found = None if torch.compiler.is_compiling() else launch.take(tensor, dtype, grouped)
    return Fp8(*_quantise(tensor.detach(), dtype)) if found is None else found


def _save_linear(ctx, inputs, output):
    x, _, _, weight, _, _, wt, wt_stats, bias, ctx.adds, _ = inputs
    wants = ctx.needs_input_grad
    ctx.bias_dtype = bias.dtype if bias is not None and wants[8] else None
    ctx.save_for_backward(x if wants[3] else None, weight, wt, wt_stats)


def _linear_backward(ctx, dy):
    x, weight, wt, wt_stats = ctx.saved_tensors
    dx = None
    if ctx.needs_input_grad[0]:
        form = _form(dy, GRADIENT, grouped=True)
        dx = _bwd_input(*form, wt, wt_stats, isinstance(form, Grouped))
    dw, db = weight_and_bias(dy, x, weight, ctx.needs_input_grad[3], ctx.bias_dtype, ctx.adds)
    return dx, None, None, dw, None, None, None, None, db, None, None


def _save_mlp(ctx, inputs, output):
    x, _, _, w_fc, _, _, fct, fct_stats, b_fc, w_proj, _, _, projt, projt_stats, b_proj, ctx.erf, *ctx.adds = inputs
    _, a, z = output
    ctx.mark_non_differentiable(a, z)
    ctx.set_materialize_grads(False)  # zeros for a and z
    wants = ctx.needs_input_grad
    ctx.fc_bias = b_fc.dtype if b_fc is not None and wants[8] else None
    ctx.proj_bias = b_proj.dtype if b_proj is not None and wants[14] else None
    ctx.save_for_backward(x, w_fc, fct, fct_stats, w_proj, projt, projt_stats, a, z)


def _mlp_backward(ctx, dy, _da, _dz):
    if dy is None:
        return (None,) * 18
    x, w_fc, fct, fct_stats, w_proj, projt, projt_stats, a, z = ctx.saved_tensors
    dz, q, stats, db_fc = _bwd_gelu(*_form(dy, GRADIENT), projt, projt_stats, z, ctx.erf, ctx.fc_bias)
    wants = ctx.needs_input_grad
    dw_proj, db_proj = weight_and_bias(dy, a, w_proj, wants[9], ctx.proj_bias, ctx.adds[1])
    dx = _bwd_input(q, stats, fct, fct_stats, False) if wants[0] else None
    dw_fc, _ = weight_and_bias(dz, x, w_fc, wants[3], None, ctx.adds[0])
    db_fc = db_fc if ctx.fc_bias else None
    none = (None,) * 4
    return dx, None, None, dw_fc, *none, db_fc, dw_proj, *none, db_proj, None, None, None


_linear_fwd.register_autograd(_linear_backward, setup_context=_save_linear)
_mlp_fwd.register_autograd(_mlp_backward, setup_context=_save_mlp)


# ---------------------------------------------------------------- layer norm and attention
#
# What writes a form has to be run eagerly, or nothing would find it: these are no registered ops, but autograd.Functions.


class LayerNormInFp8(torch.autograd.Function):
    """fused_layernorm's, which writes y in fp8 too, and in backward dx."""

    @staticmethod
    @launches
    def forward(x, weight, bias, residual, seed, dropout_p, eps):
        """y in bf16, s, mean, rstd as of layer_norm_fwd, and y in fp8."""
        outputs = fused_layernorm.forward_outputs(x, residual, torch.bfloat16)
        form = launch.new(x.shape, FORWARD, x.device)
        quantised = form.values, form.scale, form.norm
        fused_layernorm.launch_forward(x, weight, bias, residual, seed, dropout_p, eps, outputs, quantised)
        return (*outputs, *form)

    @staticmethod
    def setup_context(ctx, inputs, output):
        fused_layernorm.setup_context(ctx, inputs, output)
        # Without a residual x is the embedding's output, whose gradient no matmul reads.
        fits = inputs[0].shape[-1] <= fused_layernorm.MAX_BACKWARD_BLOCK
        ctx.quantises = ctx.has_residual and ctx.x_dtype == torch.bfloat16 and fits

    @staticmethod
    def backward(ctx, dy, dsum, *_):
        op = _norm_backward if ctx.quantises else fused_layernorm.layer_norm_bwd
        return fused_layernorm.backward(op, ctx, dy, dsum)[:7]


@launches
def _norm_backward(dy, dsum, s, weight, mean, rstd, seed, dropout_p, x_dtype, s_is_x, two_gradients, *wanted):
    """layer_norm_bwd, which also gives dx its form."""
    outputs = fused_layernorm.backward_outputs(s, weight, x_dtype, two_gradients, *wanted)
    form = launch.new(s.shape, GRADIENT, s.device)
    quantised = form.values, form.scale, form.norm
    fused_layernorm.launch_backward(
        dy, dsum, s, weight, mean, rstd, seed, dropout_p, s_is_x, two_gradients, outputs, quantised
    )
    launch.give(outputs[0], form)
    return outputs


class AttentionInFp8(torch.autograd.Function):
    """Its output, which c_proj reads, and in backward the gradient of qkv, which c_attn reads, are written in fp8 too. A
    program of attention has some rows of one head, so each scale is of a group of columns (quantise.py)."""

    @staticmethod
    @launches
    def forward(qkv, doc_ids, seed, n_head, n_kv_head, *options):
        """The output and lse as of qkv_attention_fwd, and the output in fp8: values (B, T, C), scales (C / group, B T)."""
        D = qkv.shape[-1] // (n_head + 2 * n_kv_head)
        form = launch.new_grouped((*qkv.shape[:-1], n_head * D), FORWARD, qkv.device, group_size(D))
        where = form.values.unflatten(-1, (n_head, D)), form.scale, form.scale.shape[1]
        return *fused_attn.packed_forward(qkv, doc_ids, seed, n_head, n_kv_head, *options, quantised=where), *form

    setup_context = staticmethod(fused_attn.packed_setup)

    @staticmethod
    @launches
    def backward(ctx, grad_out, *_):
        (qkv, *saved), (n_head, n_kv_head, *_) = ctx.saved_tensors, ctx.options
        all_heads = n_head + 2 * n_kv_head
        form = launch.new_grouped(qkv.shape, GRADIENT, qkv.device, group_size(qkv.shape[-1] // all_heads))
        groups = form.scale.shape[0] // all_heads  # of a head
        scales = form.scale.split([heads * groups for heads in (n_head, n_kv_head, n_kv_head)])
        parts = zip(fused_attn.unpack(form.values, n_head, n_kv_head), scales)
        where = [(values, scale, form.scale.shape[1]) for values, scale in parts]
        grad_qkv = fused_attn.packed_backward(grad_out, qkv, *saved, *ctx.options, quantised=where)
        launch.give(grad_qkv, form)
        return grad_qkv, *[None] * 9


def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    out, lse, *form = AttentionInFp8.apply(*arguments)
    launch.give(out, Grouped(*form))
    return out, lse


# ---------------------------------------------------------------- public


def _wants_form(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether what is made of x in ``dtype`` is written in fp8 too: not where nothing would read that (no gradients, not in
    bf16) or find it (under torch.compile)."""
    if dtype != torch.bfloat16 or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return runtime.runs_in_triton(x)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """fused_layernorm.layer_norm, which for ``linear`` and ``mlp`` also writes y in fp8, and in backward x's gradient.

    Where no form is wanted it is exactly that.
    """
    if not _wants_form(x, out_dtype or x.dtype):
        options: dict[str, Any] = {"residual": residual, "dropout_p": dropout_p, "eps": eps, "out_dtype": out_dtype}
        return fused_layernorm.layer_norm(x, weight, bias, **options)
    launch.require(x.device)
    fused_layernorm.validate(x, weight, bias, residual, dropout_p, out_dtype)
    seed = runtime.draw_seed(x.device) if dropout_p > 0 else None
    y, s, _, _, *form = LayerNormInFp8.apply(x, weight, bias, residual, seed, dropout_p, eps)
    launch.give(y, Fp8(*form))
    return y if residual is None else (y, s)


def qkv_attention(qkv: Tensor, n_head: int, *, n_kv_head: int | None = None, **options: Any) -> Tensor:
    """fused_attn.qkv_attention, which for ``linear`` also writes its output in fp8, and in backward qkv's gradient.

    Where no form is wanted, or the head dimension is no multiple of 32, it is exactly that. Raises ValueError, also for a GPU
    without fp8.
    """
    heads = n_head + 2 * (n_kv_head or n_head)
    fits = heads >= 1 and qkv.numel() > 0 and qkv.shape[-1] % heads == 0 and group_size(qkv.shape[-1] // heads)
    if not fits or not _wants_form(qkv, runtime.compute_dtype(qkv)):
        return fused_attn.qkv_attention(qkv, n_head, n_kv_head=n_kv_head, **options)
    launch.require(qkv.device)
    return fused_attn.qkv_attention(qkv, n_head, n_kv_head=n_kv_head, operator=_attention, **options)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, with x and weight rounded to fp8.

    x (..., in) bf16, or anything under bf16 autocast; weight (out, in) and bias (out,) fp32 or bf16. Returns bf16; each
    gradient has its input's dtype. In bf16 throughout (fused_linear.linear) where no gradient is wanted, or a size of the
    weight is not a multiple of 16. CPU tensors outside Triton's interpreter are computed by ``reference.linear``.

    Raises ValueError for arguments that do not fit, for a GPU without fp8, and for a DTensor.
    """
    if not _in_fp8(x, weight):
        # Without the weight's 16-bit copy: training in fp8 has no other use for it.
        return fused_linear.linear(x, weight, bias, keep_copy=False)
    x = x.to(_bf16(fused_linear.check(x, weight, bias)))
    form, weights = _form(x, FORWARD, grouped=True), launch.of_weight(weight)
    return _linear_fwd(x, *form, weight, *weights, bias, working_copy.adds_to(weight), isinstance(form, Grouped))


def mlp(
    x: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, *,
    activation: str = "gelu", approximate: str = "tanh",
) -> Tensor:  # fmt: skip
    """gelu(x @ w_fc.T + b_fc) @ w_proj.T + b_proj. x (..., C), w_fc (H, C), w_proj (out, H); the rest is as in ``linear``.

    ``activation="relu2"`` has relu(z)^2 for gelu(z), by passes of its own: a bound on a row of z, which the epilogues here go
    by, says little of its squares."""
    arguments.approximate(approximate)
    if not (_in_fp8(x, w_fc) and _in_fp8(x, w_proj)):
        options: dict[str, Any] = {"activation": activation, "approximate": approximate, "keep_copy": False}
        return fused_linear.mlp(x, w_fc, b_fc, w_proj, b_proj, **options)
    arguments.choice("activation", activation, fused_linear.MLP_ACTIVATIONS)
    if activation == "relu2":
        return linear(torch.relu(linear(x, w_fc, b_fc)).square(), w_proj, b_proj)
    x = x.to(_bf16(fused_linear.check_mlp(x, w_fc, b_fc, w_proj, b_proj)))
    y, _, _ = _mlp_fwd(
        x, *_form(x, FORWARD), w_fc, *launch.of_weight(w_fc), b_fc, w_proj, *launch.of_weight(w_proj), b_proj,
        approximate == "none", working_copy.adds_to(w_fc), working_copy.adds_to(w_proj),
    )  # fmt: skip
    return y


def _in_fp8(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer is computed in fp8 at all. Raises ValueError where it should be and cannot."""
    if not runtime.runs_in_triton(x):
        return False
    launch.require(x.device)
    if type(weight).__name__ == "DTensor":
        raise ValueError(
            "weight is a DTensor, which the fp8 kernels cannot read: use FSDP, which hands over whole weights, or bf16"
        )
    return torch.is_grad_enabled() and x.numel() > 0 and not any(size % launch.MULTIPLE for size in weight.shape)


def _bf16(operands: torch.dtype) -> torch.dtype:
    if operands != torch.bfloat16:
        raise ValueError(f"x is {operands}: in fp8 mode it must be bfloat16, or torch.autocast be on with it")
    return operands
