"""Rotary positions, RMS norm and a factor for queries and keys, and values with an embedding mixed in, in one pass over packed
projections. Su et al. 2021; QK-norm: Henry et al. 2020; value embeddings: Zhou et al. 2024.

For a head of queries or keys, whose D columns are D/2 pairs (a, b), at the position of its token:

    u = (a cos - b sin, a sin + b cos)        rstd = 1 / sqrt(mean(u^2) + eps)        y = scale rstd u

and for a head of values y = v + gate ve. Without the norm rstd is 1. Backward, with z = y / scale and the mean over D:

    du = scale rstd (dy - z mean(dy z))       (da, db) = (du_a cos + du_b sin, du_b cos - du_a sin)
    dv = dy        dve = gate dy        dgate = sum over D of dy ve

Saved for backward: y, and rstd in fp32; ve and gate. Not qkv: attention keeps y anyway, which is its input, so a layer keeps
one packed tensor and not two (37.7 MB less at 8192 x 2304 in bf16), for 4 bytes per head of queries or keys (0.8 MB). z is then
as rounded as the queries and keys that attention's gradient was formed from.

Bytes that have to move, e per element, N tokens: forward reads and writes N (H + 2 H_kv) D e, and reads N H_kv D e of ve;
backward reads dy, and of y the queries and keys, and writes dqkv: N (3 H + 5 H_kv) D e, with ve 2 N H_kv D e more. cos and sin
stay in L2 (256 KB at 1024 positions and D = 64).

A tile is some rows of D columns: heads, in the order in which they lie in memory, so loads and stores are contiguous. Rows of
one tile are of queries, keys and values alike; what is computed for the wrong kind is not selected, its loads are masked off.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import arguments, reference, runtime, tuning
from fastgpt.kernels.arguments import MAX_HEAD_DIM
from fastgpt.kernels.operators import operator

CONFIGS = [{"elements": elements, "num_warps": warps} for elements in (1024, 2048, 4096) for warps in (2, 4, 8)]


@lru_cache
def _pairs(D: int) -> int:
    """Pairs of columns in a tile: tl.arange needs a power of two."""
    return runtime.next_power_of_2(D // 2)


@tuning.cached
def _choice(kernel: str, dtype: torch.dtype, D: int, device: torch.device) -> tuning.Choice:
    """One bucket for any number of tokens and heads: a new batch size compiles nothing. By default a thread has 16 elements,
    8 of each half of a head: 128-bit accesses of bf16. Of heads wider than 128 it has 8: 16 spill in fp32."""
    elements = 2048 if D <= 128 else 1024
    if runtime.INTERPRET:
        elements = 2**14  # its cost is per program, whatever its size
    return tuning.choose(f"qk_norm_rope.{kernel}", dtype, f"D{D}", device, {"elements": elements, "num_warps": 4})


# ---------------------------------------------------------------- kernels
# A row is one head of one token: row = token * HEADS + head, with HEADS = H + 2 KV heads, of which the last KV are values.


@triton.jit
def _load(row, mask, D: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """(a, b) of the pairs in some rows, (ROWS, PAIRS) each, fp32; 0 past the edges. ``row``: pointers to column 0."""
    if INTERLEAVED:
        col = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.load(row[:, None] + col, mask=mask[:, None] & (col < D), other=0.0).to(tl.float32)
        return tl.split(tl.reshape(x, (ROWS, PAIRS, 2)))
    else:
        col = tl.arange(0, PAIRS)[None, :]
        inside = mask[:, None] & (col < D // 2)
        a = tl.load(row[:, None] + col, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(row[:, None] + (D // 2 + col), mask=inside, other=0.0).to(tl.float32)
        return a, b


@triton.jit
def _store(a, b, row, mask, D: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    if INTERLEAVED:
        col = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.reshape(tl.join(a, b), (ROWS, 2 * PAIRS)).to(row.dtype.element_ty)
        tl.store(row[:, None] + col, x, mask=mask[:, None] & (col < D))
    else:
        col = tl.arange(0, PAIRS)[None, :]
        inside = mask[:, None] & (col < D // 2)
        tl.store(row[:, None] + col, a.to(row.dtype.element_ty), mask=inside)
        tl.store(row[:, None] + (D // 2 + col), b.to(row.dtype.element_ty), mask=inside)


@triton.jit
def _rows(n_rows, HEADS: tl.constexpr, KV: tl.constexpr, ROWS: tl.constexpr):
    """(token, head, whether it is one of queries or keys, whether it is one of values) of the rows of this program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = row % HEADS
    exists, turns = row < n_rows, head < HEADS - KV
    return row // HEADS, head, exists & turns, exists & (turns == 0)


@triton.jit
def _angles(COS, SIN, POSITIONS, token, turns, T, position, n_positions, D: tl.constexpr, PAIRS: tl.constexpr):
    """cos and sin for some rows, (ROWS, PAIRS); and which of the rows stand at a position that the tables have. A position
    outside never becomes an address: the host does not look at POSITIONS, as asking a GPU would make it wait."""
    token = token.to(tl.int32)
    at = (token % T).to(tl.int64) + position
    if POSITIONS is not None:
        at += tl.load(POSITIONS + token // T, mask=turns, other=0)
    known = turns & (at >= 0) & (at < n_positions)
    pair = tl.arange(0, PAIRS)[None, :]
    offset, mask = at[:, None] * (D // 2) + pair, known[:, None] & (pair < D // 2)
    cos = tl.load(COS + offset, mask=mask, other=0.0).to(tl.float32)
    return cos, tl.load(SIN + offset, mask=mask, other=0.0).to(tl.float32), known


@tuning.space("qk_norm_rope.forward", CONFIGS)
@triton.jit(do_not_specialize=["n_rows", "T", "position", "n_positions"])
def qk_norm_rope_forward_kernel(
    X, COS, SIN, POSITIONS, VE, GATE, Y, RSTD, n_rows, T, position, n_positions, x_stride, ve_stride, gate_stride,
    scale, eps, D: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows. A query or key at a position that the tables do not have becomes NaN. May be None: POSITIONS (of
    each sequence's first token, added to ``position``), VE and GATE, and RSTD (no norm)."""
    token, head, turns, is_v = _rows(n_rows, HEADS, KV, ROWS)
    a, b = _load(X + token * x_stride + head * D, turns | is_v, D, INTERLEAVED, ROWS, PAIRS)
    cos, sin, known = _angles(COS, SIN, POSITIONS, token, turns, T, position, n_positions, D, PAIRS)
    u, w = a * cos - b * sin, a * sin + b * cos
    factor = tl.where(known, scale, float("nan"))
    if RSTD is not None:
        rstd = tl.rsqrt((tl.sum(u * u, axis=1) + tl.sum(w * w, axis=1)) / D + eps)
        tl.store(RSTD + token * (HEADS - KV) + head, rstd, mask=turns)
        factor *= rstd
    a, b = tl.where(turns[:, None], factor[:, None] * u, a), tl.where(turns[:, None], factor[:, None] * w, b)
    if VE is not None:  # 0 for queries and keys
        kv = head - (HEADS - KV)
        va, vb = _load(VE + token * ve_stride + kv * D, is_v, D, INTERLEAVED, ROWS, PAIRS)
        gate = tl.load(GATE + token * gate_stride + kv, mask=is_v, other=0.0).to(tl.float32)[:, None]
        a, b = a + gate * va, b + gate * vb
    _store(a, b, Y + (token * HEADS + head) * D, turns | is_v, D, INTERLEAVED, ROWS, PAIRS)


@tuning.space("qk_norm_rope.backward", CONFIGS)
@triton.jit(do_not_specialize=["n_rows", "T", "position", "n_positions"])
def qk_norm_rope_backward_kernel(
    DY, Y, RSTD, COS, SIN, POSITIONS, VE, GATE, DX, DVE, DGATE, n_rows, T, position, n_positions, dy_stride, ve_stride,
    gate_stride, scale, inv_scale, D: tl.constexpr, HEADS: tl.constexpr, KV: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows. May be None as in forward; ``inv_scale`` is 0 where scale is."""
    token, head, turns, is_v = _rows(n_rows, HEADS, KV, ROWS)
    a, b = _load(DY + token * dy_stride + head * D, turns | is_v, D, INTERLEAVED, ROWS, PAIRS)
    cos, sin, known = _angles(COS, SIN, POSITIONS, token, turns, T, position, n_positions, D, PAIRS)
    factor = tl.where(known, scale, float("nan"))
    u, w = a, b
    if RSTD is not None:
        z, zw = _load(Y + (token * HEADS + head) * D, turns, D, INTERLEAVED, ROWS, PAIRS)
        z, zw = z * inv_scale, zw * inv_scale
        along = (tl.sum(u * z, axis=1) + tl.sum(w * zw, axis=1)) / D
        u, w = u - z * along[:, None], w - zw * along[:, None]
        factor *= tl.load(RSTD + token * (HEADS - KV) + head, mask=turns, other=0.0)
    u, w = factor[:, None] * u, factor[:, None] * w
    da = tl.where(turns[:, None], u * cos + w * sin, a)
    db = tl.where(turns[:, None], w * cos - u * sin, b)
    _store(da, db, DX + (token * HEADS + head) * D, turns | is_v, D, INTERLEAVED, ROWS, PAIRS)
    if VE is not None:
        kv = head - (HEADS - KV)
        va, vb = _load(VE + token * ve_stride + kv * D, is_v, D, INTERLEAVED, ROWS, PAIRS)
        gate = tl.load(GATE + token * gate_stride + kv, mask=is_v, other=0.0).to(tl.float32)[:, None]
        _store(gate * a, gate * b, DVE + (token * KV + kv) * D, is_v, D, INTERLEAVED, ROWS, PAIRS)
        dgate = tl.sum(a * va, axis=1) + tl.sum(b * vb, axis=1)
        tl.store(DGATE + token * KV + kv, dgate.to(DGATE.dtype.element_ty), mask=is_v)


# ---------------------------------------------------------------- launchers and operators


def _tokens(x: Tensor) -> Tensor:
    """x (B, T, C) as (B T, C) with adjacent columns: a view if its strides allow one, else a copy."""
    return runtime.columns_adjacent(x.flatten(0, 1))


def _common(
    packed: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, ve: Tensor | None, gate: Tensor | None,
    n_head: int, n_kv_head: int, position: int, interleaved: bool,
) -> dict[str, Any]:  # fmt: skip
    """Arguments that both kernels take alike. ``packed`` is qkv or its gradient."""
    B, T, width = packed.shape
    heads = n_head + 2 * n_kv_head
    D = width // heads
    arguments.alike("qkv's pairs of columns", (cos.shape[0], D // 2), cos=cos, sin=sin)
    arguments.alike("qkv's batch", (B,), positions=positions)
    arguments.alike("qkv's values", (B, T, n_kv_head * D), ve=ve)
    arguments.alike("qkv's tokens and heads of values", (B, T, n_kv_head), gate=gate)
    ve, gate = None if ve is None else _tokens(ve), None if gate is None else _tokens(gate)
    return {
        "COS": cos.contiguous(), "SIN": sin.contiguous(),
        "POSITIONS": None if positions is None else positions.contiguous(), "VE": ve, "GATE": gate,
        "n_rows": B * T * heads, "T": T, "position": position, "n_positions": cos.shape[0],
        "ve_stride": 0 if ve is None else ve.stride(0), "gate_stride": 0 if gate is None else gate.stride(0),
        "D": D, "HEADS": heads, "KV": n_kv_head, "INTERLEAVED": interleaved, "PAIRS": _pairs(D),
    }  # fmt: skip


def _launch(name: str, kernel: Any, x: Tensor, given: dict[str, Any]) -> None:
    """``x``: what the kernel reads first."""
    if given["n_rows"]:
        choice = _choice(name, x.dtype, given["D"], x.device)
        rows = max(1, choice.config["elements"] // (2 * given["PAIRS"]))
        grid = (runtime.cdiv(given["n_rows"], rows),)
        runtime.Launch(kernel, grid, choice, ROWS=rows, num_warps=choice.config["num_warps"])(**given)


@operator("qk_norm_rope_fwd")
def qk_norm_rope_fwd(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, ve: Tensor | None, gate: Tensor | None,
    n_head: int, n_kv_head: int, norm: bool, scale: float, position: int, interleaved: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and rstd (B, T, n_head + n_kv_head), empty without the norm."""
    common = _common(qkv, cos, sin, positions, ve, gate, n_head, n_kv_head, position, interleaved)
    y, rstd = _outputs(qkv, n_head, n_kv_head, norm)
    x = _tokens(qkv)
    own = {"X": x, "x_stride": x.stride(0), "Y": y, "RSTD": rstd if norm else None, "scale": scale, "eps": eps}
    _launch("forward", qk_norm_rope_forward_kernel, x, common | own)
    return y, rstd


def _outputs(qkv: Tensor, n_head: int, n_kv_head: int, norm: bool) -> tuple[Tensor, Tensor]:
    B, T, _ = qkv.shape
    size = (B, T, n_head + n_kv_head) if norm else (0,)
    return qkv.new_empty(qkv.shape), qkv.new_empty(size, dtype=torch.float32)


@qk_norm_rope_fwd.register_fake
def _(qkv, cos, sin, positions, ve, gate, n_head, n_kv_head, norm, *options):
    return _outputs(qkv, n_head, n_kv_head, norm)


@operator("qk_norm_rope_bwd")
def qk_norm_rope_bwd(
    dy: Tensor, y: Tensor | None, rstd: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None,
    ve: Tensor | None, gate: Tensor | None, n_head: int, n_kv_head: int, scale: float, position: int, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of qkv, ve and gate, the latter two empty without ve. y and rstd are None without the norm."""
    common = _common(dy, cos, sin, positions, ve, gate, n_head, n_kv_head, position, interleaved)
    arguments.alike("dy", dy.shape, y=y)
    arguments.alike("dy's tokens and heads that turn", (*dy.shape[:2], n_head + n_kv_head), rstd=rstd)
    dqkv, dve, dgate = _gradients(dy, ve, gate)
    upstream = _tokens(dy)
    own = {
        "DY": upstream, "dy_stride": upstream.stride(0), "DX": dqkv, "DVE": dve, "DGATE": dgate,
        "Y": None if y is None else y.contiguous(), "RSTD": None if rstd is None else rstd.contiguous(),
        "scale": scale, "inv_scale": 1 / scale if scale else 0.0,
    }  # fmt: skip
    _launch("backward", qk_norm_rope_backward_kernel, dy, common | own)
    return dqkv, dve, dgate


def _gradients(dy: Tensor, ve: Tensor | None, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dve, dgate = (dy.new_empty(0) if x is None else x.new_empty(x.shape) for x in (ve, gate))
    return dy.new_empty(dy.shape), dve, dgate


@qk_norm_rope_bwd.register_fake
def _(dy, y, rstd, cos, sin, positions, ve, gate, *options):
    return _gradients(dy, ve, gate)


def _setup(ctx, inputs, output):
    _, cos, sin, positions, ve, gate, n_head, n_kv_head, norm, scale, position, interleaved, _ = inputs
    ctx.options = n_head, n_kv_head, scale, position, interleaved
    ctx.save_for_backward(*(output if norm else (None, None)), cos, sin, positions, ve, gate)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    dqkv, dve, dgate = qk_norm_rope_bwd(dy, *ctx.saved_tensors, *ctx.options)
    has_ve = ctx.saved_tensors[5] is not None
    return dqkv, None, None, None, dve if has_ve else None, dgate if has_ve else None, *[None] * 7


qk_norm_rope_fwd.register_autograd(_backward, setup_context=_setup)


# ---------------------------------------------------------------- public


def qk_norm_rope(
    qkv: Tensor,
    n_head: int,
    n_kv_head: int,
    cos: Tensor,
    sin: Tensor,
    *,
    norm: bool = True,
    scale: float = 1.0,
    position: int | Tensor = 0,
    interleaved: bool = False,
    ve: Tensor | None = None,
    gate: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rotary positions, RMS norm and a factor for queries and keys, values with an embedding mixed in: what
    ``reference.qk_norm_rope`` says. qkv (B, T, (n_head + 2 n_kv_head) D) -> the same shape and dtype, contiguous.

    D is even and at most 256; n_kv_head divides n_head. cos, sin (positions, D / 2), which get no gradient, have a row for
    each position; ``position`` is that of the first token, an int, or (B,) integers, which are not looked at: queries and
    keys at a position without a row become NaN. ve (B, T, n_kv_head D) and gate (B, T, n_kv_head) go together. Each tensor
    fp32, fp16 or bf16, of any strides. Each gradient has its input's dtype. Autocast changes nothing: the arithmetic is fp32.
    Raises ValueError for shapes, dtypes, devices and positions that do not fit.

    >>> angles = torch.arange(16)[:, None] / 10_000 ** (torch.arange(0, 32, 2) / 32)
    >>> qkv = torch.randn(2, 16, (4 + 2 * 2) * 32)  # 4 heads of queries, 2 of keys, 2 of values
    >>> y = qk_norm_rope(qkv, 4, 2, angles.cos(), angles.sin())
    >>> torch.equal(y[..., -64:], qkv[..., -64:])  # the values are as they were
    True
    """
    heads = n_head + 2 * n_kv_head
    if qkv.dim() != 3 or n_kv_head < 1 or n_head < 1 or n_head % n_kv_head or qkv.shape[-1] % heads:
        raise ValueError(
            f"qkv is {tuple(qkv.shape)} for n_head={n_head}, n_kv_head={n_kv_head}: use (B, T, (n_head + 2 n_kv_head) D) "
            "with n_head a multiple of n_kv_head"
        )
    B, T, width = qkv.shape
    D = width // heads
    if D % 2 or not 2 <= D <= MAX_HEAD_DIM:
        raise ValueError(
            f"the head size is {D}: rotary positions turn pairs of columns, so use an even one, 2 to {MAX_HEAD_DIM}"
        )
    if cos.dim() != 2 or cos.shape[1] != D // 2:
        raise ValueError(f"cos is {tuple(cos.shape)}: a head size of {D} needs (positions, {D // 2})")
    if (ve is None) != (gate is None):
        raise ValueError("ve is given without gate, or gate without ve: use both, or neither")
    rest = ("ve", ve, (B, T, n_kv_head * D)), ("gate", gate, (B, T, n_kv_head))
    arguments.tensors("qkv", qkv.shape, ("qkv", qkv, None), ("cos", cos, None), ("sin", sin, cos.shape), *rest)
    positions, first = (position, 0) if isinstance(position, Tensor) else (None, position)
    if positions is not None:
        arguments.integers("position", positions, (B,), "qkv", qkv)
    elif first < 0 or first + T > cos.shape[0]:
        raise ValueError(
            f"position is {first}: for {T} tokens use 0 to {cos.shape[0] - T}, as cos has {cos.shape[0]} rows"
        )
    if not runtime.runs_in_triton(qkv):
        return reference.qk_norm_rope(
            qkv, n_head, n_kv_head, cos, sin, norm=norm, scale=scale, position=position, interleaved=interleaved,
            ve=ve, gate=gate, eps=eps,
        )  # fmt: skip
    options = n_head, n_kv_head, norm, scale, first, interleaved, eps
    return qk_norm_rope_fwd(qkv, cos, sin, positions, ve, gate, *options)[0]
