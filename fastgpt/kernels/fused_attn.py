"""Flash attention, forward and backward, over any strides: packed (B, T, 3C) projections are read where they lie.

    S = scale Q K^T        P = softmax(S) over the keys a query sees        O = dropout(P) V

Dao et al. 2022 and Dao 2023 (FlashAttention 1 and 2): no T x T matrix reaches memory. A program of ``forward`` owns a
block of queries and walks over blocks of keys with a running maximum and sum per query, in base 2 (the scale is folded
into one constant). Kept for backward: O and lse = log2(sum of 2^(S log2 e)), (B, H, T_q) in fp32; +inf for a query
that sees nothing, which makes its P zero.

Backward, with delta = rowsum(dO O), and P and dropout's mask recomputed:

    dP = dropout(dO V^T)    dS = P (dP - delta)    dQ = scale dS K    dK = scale dS^T Q    dV = dropout(P)^T dO

``backward_q`` owns queries, writes dQ and, as it holds dO and O anyway, delta; ``backward_kv`` runs after it, owns keys,
sums over the query heads that share them, writes dK and dV. Every result has one owner that adds in a fixed order: no
atomics, bit-equal runs. Operands of dots have the inputs' dtype (P and dS are rounded to it), sums are fp32, and fp32
inputs are multiplied in full fp32.

Cost, causal, for T tokens of one head (without causal: twice that): forward 2 T^2 D FLOPs in 2 dots, backward 7 T^2 D in
7 (both backward kernels compute S and dP: the price of no atomics; 5 would be the least). Bytes: forward reads q, k, v
and writes O (4 T D elements) and lse; backward reads q, k, v, dO twice and O once and writes dq, dk, dv (12 T D), given
that a head's K and V stay in L2 while its blocks of queries, neighbours in the grid, use them. At T = 1024, D = 64 in
bf16 the forward does 256 FLOPs per byte: the tensor cores bind. A head dimension between powers of two is padded in
registers to the next one (80 costs what 128 costs), not in memory.

``accumulate="fp16"`` (fp16 operands): products are summed in fp16 over a block of at most 64 keys (O, dQ), queries (dK, dV)
or, up to D = 64, columns (dP), and these sums in fp32; GeForce tensor cores do that at twice the rate. S keeps fp32 sums, as
an absolute error in S is a relative one in P: docs/precision-modes.md has the figures. 1 of 2 dots of the forward and 5 of
the 7 of the backward are quicker, dP's 2 only up to D = 64.

Tiles that no query sees (future, outside the window, other documents) are never visited, only tiles on an edge are
masked, and the heaviest causal tiles of a head start first. The jit functions are in _attn_kernels.py, their launches and
blocks in _attn_launch.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgpt.kernels import _attn_launch as launch
from fastgpt.kernels import arguments, reference, runtime


def unpack(packed: Tensor, n_head: int, n_kv_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views (B, T, heads, D) of the queries, keys and values in (B, T, (n_head + 2 n_kv_head) D)."""
    heads = packed.unflatten(-1, (n_head + 2 * n_kv_head, -1))
    q, k, v = heads.split((n_head, n_kv_head, n_kv_head), dim=2)
    return q, k, v


# ---- Operators ------------------------------------------------------------------------------------------------------

_OPTIONS = "Tensor? doc_ids, {kv_len}Tensor? seed, bool causal, float scale, int? window, float dropout_p, bool fp16"
_SEPARATE = _OPTIONS.format(kv_len="Tensor? kv_len, ")
PACKED = "int n_head, int n_kv_head, " + _OPTIONS.format(kv_len="")


@torch.library.custom_op(
    "fastgpt::attention_fwd", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {_SEPARATE}) -> (Tensor, Tensor)"
)
def _attention_fwd(q, k, v, *options):
    out = q.new_empty(q.shape)
    return out, launch.launch_forward(q, k, v, out, *options)


@_attention_fwd.register_fake
def _(q, k, v, *options):
    B, T_q, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T_q), dtype=torch.float32)


@torch.library.custom_op(
    "fastgpt::attention_bwd",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_SEPARATE}) "
    "-> (Tensor, Tensor, Tensor)",
)
def _attention_bwd(grad_out, q, k, v, out, lse, *options):
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    launch.launch_backward(grad_out, q, k, v, out, lse, *grads, *options)
    return grads


@_attention_bwd.register_fake
def _(grad_out, q, k, v, out, lse, *options):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op(
    "fastgpt::qkv_attention_fwd", mutates_args=(), schema=f"(Tensor qkv, {PACKED}) -> (Tensor, Tensor)"
)
def _qkv_attention_fwd(qkv, n_head, n_kv_head, *options):
    return packed_forward(qkv, n_head, n_kv_head, *options)


def packed_forward(qkv, n_head, n_kv_head, doc_ids, *options, form=None):
    """The output (B, T, H D) of qkv, and lse."""
    q, k, v = unpack(qkv, n_head, n_kv_head)
    out = qkv.new_empty(q.shape)
    lse = launch.launch_forward(q, k, v, out, doc_ids, None, *options, form=form)
    return out.flatten(2), lse


@_qkv_attention_fwd.register_fake
def packed_outputs(qkv, n_head, n_kv_head, *options):
    """What packed_forward returns, unwritten."""
    B, T, width = qkv.shape
    C = width // (n_head + 2 * n_kv_head) * n_head
    return qkv.new_empty((B, T, C)), qkv.new_empty((B, n_head, T), dtype=torch.float32)


@torch.library.custom_op(
    "fastgpt::qkv_attention_bwd",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, {PACKED}) -> Tensor",
)
def _qkv_attention_bwd(grad_out, qkv, out, lse, n_head, n_kv_head, *options):
    return packed_backward(grad_out, qkv, out, lse, n_head, n_kv_head, *options)


def packed_backward(grad_out, qkv, out, lse, n_head, n_kv_head, doc_ids, *options, forms=(None, None, None)):
    """The gradient of qkv."""
    grad_qkv = qkv.new_empty(qkv.shape)
    grad_out, out = (x.unflatten(-1, (n_head, -1)) for x in (grad_out, out))
    inputs, grads = unpack(qkv, n_head, n_kv_head), unpack(grad_qkv, n_head, n_kv_head)
    launch.launch_backward(grad_out, *inputs, out, lse, *grads, doc_ids, None, *options, forms=forms)
    return grad_qkv


@_qkv_attention_bwd.register_fake
def _(grad_out, qkv, *rest):
    return qkv.new_empty(qkv.shape)


def _without_grad_of(ctx, *outputs: Tensor) -> None:
    """Nothing flows back through lse, or through fp8: spare backward tensors of zeros for them."""
    ctx.mark_non_differentiable(*outputs)
    ctx.set_materialize_grads(False)


def _attention_setup(ctx, inputs, output):
    q, k, v, doc_ids, kv_len, seed, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, doc_ids, kv_len, seed)
    _without_grad_of(ctx, output[1])


def _attention_backward(ctx, grad_out, _):
    return *_attention_bwd(grad_out, *ctx.saved_tensors, *ctx.options), *[None] * 8


def packed_setup(ctx, inputs, output):
    qkv, n_head, n_kv_head, doc_ids, seed, *ctx.options = inputs
    ctx.heads = n_head, n_kv_head
    ctx.save_for_backward(qkv, *output[:2], doc_ids, seed)
    _without_grad_of(ctx, *output[1:])


def packed_gradients(ctx, op, grad_out):
    """What ``op`` returns: _qkv_attention_bwd, or an op that takes the same arguments."""
    qkv, out, lse, doc_ids, seed = ctx.saved_tensors
    return op(grad_out, qkv, out, lse, *ctx.heads, doc_ids, seed, *ctx.options)


def _qkv_attention_backward(ctx, grad_out, _):
    return packed_gradients(ctx, _qkv_attention_bwd, grad_out), *[None] * 9


_attention_fwd.register_autograd(_attention_backward, setup_context=_attention_setup)
_qkv_attention_fwd.register_autograd(_qkv_attention_backward, setup_context=packed_setup)


# ---- Public functions -----------------------------------------------------------------------------------------------


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, in its dtype, as PyTorch's attention does (it leaves fp64 alone)."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check(
    name: str, x: Tensor, D: int, B: int, T_k: int, window: int | None, doc_ids: Tensor | None, dropout_p: float,
    accumulate: str,
) -> None:  # fmt: skip
    """Raise ValueError for options that no kernel takes."""
    if not 1 <= D <= launch.MAX_HEAD_DIM:
        raise ValueError(f"the head dimension is {D}: use 1 to {launch.MAX_HEAD_DIM}")
    arguments.window(window)
    arguments.probability("dropout_p", dropout_p)
    arguments.accumulate(accumulate, x.dtype)
    arguments.integers("doc_ids", doc_ids, (B, T_k), name, x)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    doc_ids: Tensor | None = None,
    kv_len: Tensor | None = None,
    dropout_p: float = 0.0,
    accumulate: str = "fp32",
) -> Tensor:
    """Scaled dot-product attention. q (B, T_q, H, D), k and v (B, T_k, H_kv, D) -> (B, T_q, H, D), contiguous.

    One dtype (fp32, fp16, bf16), any strides (a tensor whose last dimension is not adjacent is copied), H a multiple of
    H_kv, D up to 256. ``scale`` defaults to 1/sqrt(D). A query stands at position kv_len - T_q + i (kv_len, (B,)
    integers, defaults to T_k) and sees the keys before kv_len that are not after it (``causal``), fewer than ``window``
    away, and of its own document (``doc_ids``, (B, T_k) integers); one that sees none gets zeros. Keys at or past
    kv_len are never read. ``accumulate="fp16"``: see above. Saved for backward: q, k, v, the output, lse (B, H, T_q) and
    dropout's seed.
    Raises ValueError for shapes, dtypes or options that do not fit.
    """
    if not (q.dim() == k.dim() == 4 and k.shape == v.shape and k.shape[0] == q.shape[0] and k.shape[3] == q.shape[3]):
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"attention is given {shapes}: use q (B, T_q, H, D), k and v (B, T_k, H_kv, D)")
    B, T_q, H, D = q.shape
    T_k, H_kv = k.shape[1:3]
    if H_kv == 0 or H % H_kv:
        raise ValueError(f"q has {H} heads and k has {H_kv}: use a number of query heads that k's divides")
    arguments.tensors("q", q.shape, ("q", q, None), ("k", k, None), ("v", v, None))
    q, k, v = autocast(q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention is given {q.dtype}, {k.dtype}, {v.dtype} for q, k, v: use one dtype")
    _check("q", q, D, B, T_k, window, doc_ids, dropout_p, accumulate)
    arguments.integers("kv_len", kv_len, (B,), "q", q)
    if not runtime.runs_in_triton(q) or q.numel() == 0 or k.numel() == 0:
        return reference.attention(
            q, k, v, causal=causal, scale=scale, window=window, doc_ids=doc_ids, kv_len=kv_len, dropout_p=dropout_p
        )
    seed = runtime.draw_seed(q.device) if dropout_p else None
    scale = D**-0.5 if scale is None else scale
    options = causal, scale, window, dropout_p, accumulate == "fp16"
    return _attention_fwd(q, k, v, doc_ids, kv_len, seed, *options)[0]


def qkv_attention(
    qkv: Tensor,
    n_head: int,
    *,
    n_kv_head: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    doc_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    accumulate: str = "fp32",
    _op: Any = _qkv_attention_fwd,
) -> Tensor:
    """Self-attention over packed projections: qkv (B, T, (H + 2 H_kv) D) -> (B, T, H D); (B, T, 3C) -> (B, T, C) when
    H_kv = H, as GPT-2's c_attn packs them: all queries, all keys, all values.

    ``attention`` without a transpose or a copy in either direction: q, k and v are read inside qkv, and the gradient is
    written into one tensor of qkv's shape. Saved for backward: qkv, the output, lse and dropout's seed. Raises ValueError.
    """
    n_kv_head = n_kv_head or n_head
    if qkv.dim() != 3 or n_head < 1 or n_head % n_kv_head or qkv.shape[-1] % (n_head + 2 * n_kv_head):
        raise ValueError(
            f"qkv is {tuple(qkv.shape)} for n_head={n_head}, n_kv_head={n_kv_head}: use (B, T, (n_head + 2 n_kv_head) D) "
            "with n_head a multiple of n_kv_head"
        )
    B, T, width = qkv.shape
    D = width // (n_head + 2 * n_kv_head)
    arguments.tensors("qkv", qkv.shape, ("qkv", qkv, None))
    (qkv,) = autocast(qkv)
    _check("qkv", qkv, D, B, T, window, doc_ids, dropout_p, accumulate)
    if not runtime.runs_in_triton(qkv) or qkv.numel() == 0:
        return reference.qkv_attention(
            qkv, n_head, n_kv_head=n_kv_head, causal=causal, scale=scale, window=window, doc_ids=doc_ids,
            dropout_p=dropout_p,
        )  # fmt: skip
    seed = runtime.draw_seed(qkv.device) if dropout_p else None
    scale = D**-0.5 if scale is None else scale
    options = causal, scale, window, dropout_p, accumulate == "fp16"
    return _op(qkv, n_head, n_kv_head, doc_ids, seed, *options)[0]
