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
masked, and the heaviest causal tiles of a head start first. The jit functions are in _attn_kernels.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from fastgpt.kernels import _attn_kernels as kernels
from fastgpt.kernels import _column_sums as column_sums
from fastgpt.kernels import config_space, reference, runtime, tuning

MAX_HEAD_DIM = 256
LOG2E = math.log2(math.e)
DECODING = 16
"""Queries up to which a forward pass is taken for sampling's."""


# (BLOCK_M, BLOCK_N, num_warps, num_stages) by padded head dimension. A tensor-core dot holds all of its second operand in
# registers, hence the short second sides.
_HALF = {
    "forward": {64: (128, 32, 8, 3), 128: (64, 32, 4, 2), 256: (64, 32, 8, 2)},
    "backward_q": {64: (128, 32, 8, 2), 128: (128, 32, 8, 2), 256: (64, 16, 8, 2)},
    "backward_kv": {64: (32, 64, 4, 3), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
}
# Instead of the above where options take registers: anything but plain causal attention without groups.
_HALF_OPTIONS = {
    ("forward", 64): (64, 32, 4, 3),
    ("backward_q", 256): (32, 16, 4, 1),
    ("backward_kv", 64): (32, 32, 8, 2),
    ("backward_kv", 128): (32, 32, 8, 2),
}
_FLOAT = {
    "forward": {64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
    "backward_q": {64: (16, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
    "backward_kv": {64: (16, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
}

# By compute capability, kernel, whether fp32, padded head dimension, dropout: where the above spills on one architecture.
_CORRECTIONS: dict[tuple, dict[str, int]] = {
    (120, "backward_q", False, 64, False): {"num_stages": 1},  # a load in flight would not fit 128 registers
    (80, "forward", True, 256, False): {"maxnreg": 255},  # ptxas would stop at 168, for a third block per SM
    (80, "backward_q", True, 64, True): {"BLOCK_N": 16},
    (80, "backward_kv", True, 64, True): {"BLOCK_N": 16},
    (90, "backward_q", True, 64, False): {"BLOCK_N": 16},
    (90, "backward_kv", True, 256, False): {"num_stages": 2},
}
# The same without "fp32", where results are written in fp8 too.
_FP8_CORRECTIONS: dict[tuple, dict[str, int]] = {
    (120, "backward_q", 64, False): {"BLOCK_N": 16},
    (89, "backward_q", 256, True): {"maxnreg": 255},  # triton 3.6's ptxas would stop at 168, for a third block per SM
}


def config(
    kernel: str,
    dtype: torch.dtype,
    D: int,
    T_own: int,
    *,
    dropout: bool = False,
    plain: bool = True,
    fp16_sums: bool = False,
    fp8: bool = False,
    arch: int | None = None,
) -> dict[str, int]:
    """Launch parameters of ``kernel`` ("forward", "backward_q", "backward_kv") for head dimension D that are safe on any
    card; ``T_own`` is the length of the side that its programs own, ``plain`` is causal attention with no option and no
    groups. ``_choice`` asks the tuning tables first.

    Chosen by compiling: no spills on sm_80 to sm_120, at most 101,376 bytes of shared memory. ``maxnreg`` makes room for
    two blocks of 8 warps per SM in the kernels that fit 128 registers."""
    if runtime.INTERPRET:  # a block operation costs the same whatever its size
        block = 64 if T_own <= 256 or fp16_sums else 128
        return {"BLOCK_M": block, "BLOCK_N": block}
    width = max(64, _block_d(D))
    if dtype == torch.float32:
        block_m, block_n, warps, stages = _FLOAT[kernel][width]
    else:
        tile = _HALF[kernel][width]
        block_m, block_n, warps, stages = tile if plain else _HALF_OPTIONS.get((kernel, width), tile)
        if kernel == "forward" and T_own <= DECODING:
            block_m, block_n, warps, stages = 16, 32, 4, 2
        elif dropout and kernel == "backward_kv" and width == 64:
            # 8 warps would have 4 warps' products to share, and compute them twice.
            block_m, block_n, warps, stages = 32, 32, 4, 2
        elif dropout:  # Philox needs registers
            block_m, block_n = (16, block_n) if kernel == "backward_kv" else (block_m, 16)
        elif fp16_sums and not plain and kernel == "backward_kv" and _block_d(D) == 64:
            stages = 1  # a load in flight would spill on sm_120
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
    if dtype != torch.float32 and plain and width == 64 and warps == 8:
        options["maxnreg"] = 128
    options |= _CORRECTIONS.get((arch, kernel, dtype == torch.float32, width, dropout), {})
    return options | (_FP8_CORRECTIONS.get((arch, kernel, width, dropout), {}) if fp8 else {})


def _block_d(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


# ---- Launchers ------------------------------------------------------------------------------------------------------


def _columns_adjacent(x: Tensor) -> Tensor:
    """x itself, or a copy if its last dimension is strided or expanded (dO from .sum()); all other strides are free."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _common(
    q: Tensor,
    k: Tensor,
    docs: Tensor | None,
    kv_len: Tensor | None,
    seed: Tensor | None,
    window: int | None,
    dropout_p: float,
    causal: bool,
    fp16: bool,
) -> dict[str, Any]:
    """Arguments that all three kernels take alike."""
    return {
        "kv_len": None if kv_len is None else kv_len.contiguous(),
        "docs": None if docs is None else docs.contiguous(),
        "seed": seed,
        "H": q.shape[2],
        "T_q": q.shape[1],
        "T_k": k.shape[1],
        "window": window,
        "threshold": int(dropout_p * 2**31),
        "inv_keep": 1.0 / (1.0 - dropout_p),
        "D": q.shape[3],
        "GROUP": q.shape[2] // k.shape[2],
        "CAUSAL": causal,
        "FP16_SUMS": fp16,
        "ALIGNED": causal or window is not None or docs is not None or kv_len is not None,
        "BLOCK_D": _block_d(q.shape[3]),
    }


def _strides(**tensors: Tensor) -> dict[str, tuple[int, ...]]:
    return {f"{name}_strides": tensor.stride()[:3] for name, tensor in tensors.items()}


def _choice(kernel: str, q: Tensor, heads: int, T_own: int, common: dict[str, Any], form: Any) -> tuning.Choice:
    """The config of a kernel whose programs own T_own rows of ``heads`` heads in each batch. ``form``: of fp8, or None."""
    dropout, D = common["seed"] is not None, q.shape[-1]
    options = any(common[name] is not None for name in ("docs", "kv_len", "window"))
    grouped = kernel == "backward_kv" and common["GROUP"] > 1  # adds a loop there, nothing elsewhere
    causal, fp16 = common["CAUSAL"] and not options and not grouped, common["FP16_SUMS"]
    default = config(
        kernel, q.dtype, D, T_own,
        dropout=dropout, plain=causal and not dropout, fp16_sums=fp16, fp8=form is not None,
        arch=tuning.arch_of(q.device),
    )  # fmt: skip
    rows = q.shape[0] * heads * T_own
    bucket = config_space.attention_bucket(D, rows, plain=causal and T_own > DECODING, dropout=dropout)
    # With sums in fp16 another binary, with a limit of its own to its blocks: entries for the usual one are not for it.
    return tuning.choose(f"attention{'_fast' if fp16 else ''}.{kernel}", q.dtype, bucket, q.device, default)


def _launch_forward(q, k, v, out, docs, kv_len, seed, causal, scale, window, dropout_p, fp16, *, form=None) -> Tensor:
    """Write attention of q (B, T_q, H, D), k and v (B, T_k, H_kv, D) into ``out``, and in fp8 into ``form`` (the kernels'
    out_form); return lse (B, H, T_q)."""
    B, T_q, H, _ = q.shape
    lse = torch.empty((B, H, T_q), dtype=torch.float32, device=q.device)
    q, k, v = map(_columns_adjacent, (q, k, v))
    common = _common(q, k, docs, kv_len, seed, window, dropout_p, causal, fp16)

    def run(options: dict[str, int]) -> None:
        kernels.forward[(triton.cdiv(T_q, options["BLOCK_M"]) * B * H,)](
            q, k, v, out, form, lse, c=abs(scale) * LOG2E, FLIP=scale < 0,
            **_strides(q=q, k=k, v=v, out=out), **common, **options,
        )  # fmt: skip

    with runtime.device_guard(q):
        tuning.launch(_choice("forward", q, H, T_q, common, form), run)
    return lse


def _program_sums(blocks: int, B: int, out: Tensor | None) -> Tensor | None:
    """Unwritten sums of columns of the programs of a backward kernel, in their order, for ``out`` (heads D,)."""
    return None if out is None else torch.empty(B * blocks * len(out), dtype=torch.float32, device=out.device)


def _add_up(partial: Tensor | None, B: int, heads: int, out: Tensor | None) -> None:
    if partial is not None and out is not None:
        D = len(out) // heads
        torch.sum(partial.view(B, heads, -1, D), (0, 2), out=out.view(heads, D))


def _launch_backward(
    grad_out, q, k, v, out, lse, grad_q, grad_k, grad_v, docs, kv_len, seed, causal, scale, window, dropout_p, fp16,
    *, forms=(None, None, None), sums=(None, None, None),
) -> None:  # fmt: skip
    """Write all of grad_q, grad_k and grad_v, in fp8 into ``forms``, and the sums of their columns into ``sums``, (heads D,)
    each."""
    B, T_q, H, _ = q.shape
    T_k, H_kv = k.shape[1:3]
    q, k, v, grad_out = map(_columns_adjacent, (q, k, v, grad_out))
    delta = torch.empty_like(lse)
    common = _common(q, k, docs, kv_len, seed, window, dropout_p, causal, fp16)
    common = {"c": scale * LOG2E, "scale": scale, **common}

    def run_q(options: dict[str, int]) -> None:
        blocks = triton.cdiv(T_q, options["BLOCK_M"])
        partial = _program_sums(blocks, B, sums[0])
        kernels.backward_q[(blocks * B * H,)](
            q, k, v, out, grad_out, lse, delta, grad_q, forms[0], partial,
            **_strides(q=q, k=k, v=v, out=out, grad_out=grad_out, grad_q=grad_q), **common, **options,
        )  # fmt: skip
        _add_up(partial, B, H, sums[0])

    def run_kv(options: dict[str, int]) -> None:
        blocks = triton.cdiv(T_k, options["BLOCK_N"])
        partials = [_program_sums(blocks, B, out) for out in sums[1:]]
        kernels.backward_kv[(blocks * B * H_kv,)](
            q, k, v, grad_out, lse, delta, grad_k, grad_v, *forms[1:], *partials,
            **_strides(q=q, k=k, v=v, grad_out=grad_out, grad_k=grad_k, grad_v=grad_v), **common, **options,
        )  # fmt: skip
        for partial, out in zip(partials, sums[1:]):
            _add_up(partial, B, H_kv, out)

    with runtime.device_guard(q):
        tuning.launch(_choice("backward_q", q, H, T_q, common, forms[0]), run_q)
        tuning.launch(_choice("backward_kv", q, H_kv, T_k, common, forms[1]), run_kv)


def _unpack(packed: Tensor, n_head: int, n_kv_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views (B, T, heads, D) of the queries, keys and values in (B, T, (n_head + 2 n_kv_head) D)."""
    heads = packed.unflatten(-1, (n_head + 2 * n_kv_head, -1))
    q, k, v = heads.split((n_head, n_kv_head, n_kv_head), dim=2)
    return q, k, v


# ---- Operators ------------------------------------------------------------------------------------------------------

_OPTIONS = "Tensor? doc_ids, {kv_len}Tensor? seed, bool causal, float scale, int? window, float dropout_p, bool fp16"
_SEPARATE = _OPTIONS.format(kv_len="Tensor? kv_len, ")
_PACKED = "int n_head, int n_kv_head, bool sums, " + _OPTIONS.format(kv_len="")
# ``sums``: whether backward sums the gradient of qkv over its rows, too, for others: _column_sums.py


@torch.library.custom_op(
    "fastgpt::attention_fwd", mutates_args=(), schema=f"(Tensor q, Tensor k, Tensor v, {_SEPARATE}) -> (Tensor, Tensor)"
)
def _attention_fwd(q, k, v, *options):
    out = q.new_empty(q.shape)
    return out, _launch_forward(q, k, v, out, *options)


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
    _launch_backward(grad_out, q, k, v, out, lse, *grads, *options)
    return grads


@_attention_bwd.register_fake
def _(grad_out, q, k, v, out, lse, *options):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.custom_op(
    "fastgpt::qkv_attention_fwd", mutates_args=(), schema=f"(Tensor qkv, {_PACKED}) -> (Tensor, Tensor)"
)
def _qkv_attention_fwd(qkv, n_head, n_kv_head, *options):
    return packed_forward(qkv, n_head, n_kv_head, *options)


def packed_forward(qkv, n_head, n_kv_head, sums, doc_ids, *options, form=None):
    """The output (B, T, H D) of qkv, and lse."""
    q, k, v = _unpack(qkv, n_head, n_kv_head)
    out = qkv.new_empty(q.shape)
    lse = _launch_forward(q, k, v, out, doc_ids, None, *options, form=form)
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
    schema=f"(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, {_PACKED}) -> (Tensor, Tensor)",
)
def _qkv_attention_bwd(grad_out, qkv, out, lse, n_head, n_kv_head, *options):
    return packed_backward(grad_out, qkv, out, lse, n_head, n_kv_head, *options)


def packed_backward(grad_out, qkv, out, lse, n_head, n_kv_head, sums, doc_ids, *options, forms=(None, None, None)):
    """The gradient of qkv and, empty unless ``sums``, the sums of its columns in fp32."""
    grad_qkv, summed = packed_gradient(grad_out, qkv, out, lse, n_head, n_kv_head, sums)
    D = qkv.shape[-1] // (n_head + 2 * n_kv_head)
    parts = summed.split([n_head * D, n_kv_head * D, n_kv_head * D]) if sums else (None, None, None)
    grad_out, out = (x.unflatten(-1, (n_head, -1)) for x in (grad_out, out))
    inputs, grads = _unpack(qkv, n_head, n_kv_head), _unpack(grad_qkv, n_head, n_kv_head)
    _launch_backward(grad_out, *inputs, out, lse, *grads, doc_ids, None, *options, forms=forms, sums=parts)
    return grad_qkv, summed


@_qkv_attention_bwd.register_fake
def packed_gradient(grad_out, qkv, out, lse, n_head, n_kv_head, sums, *rest):
    """What packed_backward returns, unwritten."""
    return qkv.new_empty(qkv.shape), qkv.new_empty(qkv.shape[-1] if sums else 0, dtype=torch.float32)


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
    qkv, n_head, n_kv_head, ctx.sums, doc_ids, seed, *ctx.options = inputs
    ctx.heads = n_head, n_kv_head
    ctx.save_for_backward(qkv, *output[:2], doc_ids, seed)
    _without_grad_of(ctx, *output[1:])


def packed_gradients(ctx, op, grad_out):
    """The gradient of qkv, its sums noted, and the rest of what ``op`` returns: _qkv_attention_bwd or one that returns more."""
    qkv, out, lse, doc_ids, seed = ctx.saved_tensors
    grad_qkv, sums, *more = op(grad_out, qkv, out, lse, *ctx.heads, ctx.sums, doc_ids, seed, *ctx.options)
    if ctx.sums:
        column_sums.give(grad_qkv, sums)
    return grad_qkv, more


def _qkv_attention_backward(ctx, grad_out, _):
    grad_qkv, _ = packed_gradients(ctx, _qkv_attention_bwd, grad_out)
    return grad_qkv, *[None] * 10


_attention_fwd.register_autograd(_attention_backward, setup_context=_attention_setup)
_qkv_attention_fwd.register_autograd(_qkv_attention_backward, setup_context=packed_setup)


# ---- Public functions -----------------------------------------------------------------------------------------------


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, in its dtype, as PyTorch's attention does (it leaves fp64 alone)."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _check(
    x: Tensor, D: int, B: int, T_k: int, window: int | None, doc_ids: Tensor | None, dropout_p: float, accumulate: str
) -> None:
    """Raise ValueError for options that no kernel takes."""
    if runtime.runs_in_triton(x) and x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"attention is given {x.dtype}: use float32, float16 or bfloat16")
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"the head dimension is {D}: use 1 to {MAX_HEAD_DIM}")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: use 1 (a query sees itself) or more, or None")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}: use a probability in [0, 1)")
    if accumulate not in ("fp32", "fp16"):
        raise ValueError(f"accumulate is {accumulate!r}: use 'fp32' or 'fp16'")
    if accumulate == "fp16" and x.dtype != torch.float16:
        raise ValueError(f"accumulate is 'fp16', but the operands are {x.dtype}: use float16 ones, or 'fp32'")
    if doc_ids is not None and (doc_ids.shape != (B, T_k) or doc_ids.is_floating_point()):
        raise ValueError(f"doc_ids is {doc_ids.dtype} {tuple(doc_ids.shape)}: use integers of shape {(B, T_k)}")


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
    q, k, v = _autocast(q, k, v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention is given {q.dtype}, {k.dtype}, {v.dtype} for q, k, v: use one dtype")
    _check(q, D, B, T_k, window, doc_ids, dropout_p, accumulate)
    if kv_len is not None and (kv_len.shape != (B,) or kv_len.is_floating_point()):
        raise ValueError(f"kv_len is {kv_len.dtype} {tuple(kv_len.shape)}: use integers of shape {(B,)}")
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
    (qkv,) = _autocast(qkv)
    _check(qkv, D, B, T, window, doc_ids, dropout_p, accumulate)
    if not runtime.runs_in_triton(qkv) or qkv.numel() == 0:
        return reference.qkv_attention(
            qkv, n_head, n_kv_head=n_kv_head, causal=causal, scale=scale, window=window, doc_ids=doc_ids,
            dropout_p=dropout_p,
        )  # fmt: skip
    seed = runtime.draw_seed(qkv.device) if dropout_p else None
    scale = D**-0.5 if scale is None else scale
    options = causal, scale, window, dropout_p, accumulate == "fp16"
    return _op(qkv, n_head, n_kv_head, column_sums.expected(qkv), doc_ids, seed, *options)[0]
