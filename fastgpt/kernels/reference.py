"""The specification: every fused operation in plain PyTorch.

These functions define what the kernels compute, in any floating dtype (tests run them in fp64), and compute CPU tensors
outside the interpreter. They are also the EAGER table of fastgpt/ops.py, and a strong baseline: PyTorch's own fused
attention, layer norm and cross-entropy are called wherever they can express the operation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(
    idx: Tensor,
    wte: Tensor,
    wpe: Tensor | None = None,
    *,
    position: int = 0,
    dropout_p: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """dropout(wte[idx] + wpe[position : position + T]), without the second term if wpe is None. idx (..., T) of int64 or int32,
    wte (V, C), wpe (P, C) -> (..., T, C) in ``out_dtype`` (default wte's). Radford et al. 2018."""
    x = F.embedding(idx, wte)
    if wpe is not None:
        positions = torch.arange(position, position + idx.shape[-1], device=idx.device)
        x = x + F.embedding(positions, wpe)
    x = F.dropout(x, dropout_p) if dropout_p else x
    return x.to(out_dtype or wte.dtype)


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
    """Layer norm over the last dimension, optionally of ``dropout(x) + residual``, which is then returned too.

    x (..., C), weight and bias (C,), residual of x's shape. Returns y, or (y, sum) with a residual. y has ``out_dtype``
    (default x's); the sum keeps the residual's dtype and the norm reads the sum as rounded to it. Ba et al. 2016.
    """
    if residual is not None:
        total = (F.dropout(x, dropout_p) + residual).to(residual.dtype)
    else:
        total = F.dropout(x, dropout_p) if dropout_p else x
    bias = None if bias is None else bias.to(total.dtype)
    y = F.layer_norm(total, x.shape[-1:], weight.to(total.dtype), bias, eps).to(out_dtype or x.dtype)
    return y if residual is None else (y, total)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: Tensor | None = None,
    x0: Tensor | None = None,
    x0_scale: Tensor | None = None,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS norm over the last dimension, s / sqrt(mean(s^2) + eps) [* weight], of
    ``s = scale * (dropout(x) + residual) + x0_scale * x0``, of which all but x may be left out.

    x (..., C), weight (C,), residual and x0 of x's shape, scale and x0_scale tensors of one element. Returns y, or (y, s)
    with a residual, a scale or x0. y has ``out_dtype`` (default x's); s has the residual's dtype (without one x's), and the
    norm reads it as rounded to that. Zhang & Sennrich 2019; the mixing as in modded-nanogpt and nanochat.
    """
    s = F.dropout(x, dropout_p) if dropout_p else x
    s = s if residual is None else s + residual
    s = s if scale is None else scale * s
    s = s if x0 is None or x0_scale is None else s + x0_scale * x0
    s = s.to((x if residual is None else residual).dtype)
    y = F.rms_norm(s, s.shape[-1:], None if weight is None else weight.to(s.dtype), eps).to(out_dtype or x.dtype)
    return y if residual is None and scale is None and x0 is None else (y, s)


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
    """Rotary positions, RMS norm and a factor for the queries and keys of packed projections, and values with an embedding
    mixed in: qkv (B, T, (H + 2 H_kv) D) -> the same shape and dtype.

    q, k = scale * rms_norm(rotate(q, k)), per head, without the norm if ``norm`` is False; v = v + gate[..., None] * ve if
    ``ve`` (B, T, H_kv D) and ``gate`` (B, T, H_kv) are given, else unchanged.

    Token t stands at ``position + t``; position is an int, or (B,) integers where each sequence starts elsewhere. There
    ``rotate`` turns each pair (a, b) of a head's columns into (a cos - b sin, a sin + b cos), with one row of cos and sin,
    (positions, D / 2), for each position. Pairs are columns i and i + D/2 (GPT-NeoX, Llama in Hugging Face), or 2i and 2i + 1
    if ``interleaved`` (Llama as Meta published it). Where a model turns the other way (nanochat), pass -sin.
    Su et al. 2021; QK-norm: Henry et al. 2020; value embeddings: Zhou et al. 2024.
    """
    D = qkv.shape[-1] // (n_head + 2 * n_kv_head)
    if D % 2:
        raise ValueError(f"the head size is {D}: rotary positions turn pairs of columns, so use an even one")
    wide = torch.promote_types(qkv.dtype, torch.float32)
    heads = qkv.unflatten(-1, (n_head + 2 * n_kv_head, D))
    x, v = heads.split((n_head + n_kv_head, n_kv_head), dim=2)
    start = position[:, None] if isinstance(position, Tensor) else position
    at = start + torch.arange(qkv.shape[1], device=qkv.device)
    cos, sin = cos[at].unsqueeze(-2), sin[at].unsqueeze(-2)  # by index: a table that is too short raises
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = a.to(wide) * cos - b.to(wide) * sin, a.to(wide) * sin + b.to(wide) * cos
    x = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    x = scale * (F.rms_norm(x, (D,), eps=eps) if norm else x)
    if ve is not None and gate is not None:
        v = v.to(wide) + gate[..., None].to(wide) * ve.view_as(v)
    return torch.cat((x.to(qkv.dtype), v.to(qkv.dtype)), dim=2).flatten(2)


def attention_mask(
    T_q: int,
    T_k: int,
    device: torch.device,
    *,
    causal: bool,
    window: int | None,
    doc_ids: Tensor | None,
    kv_len: Tensor | None,
) -> Tensor | None:
    """Which keys each query sees: a bool mask (B or 1, 1, T_q, T_k), or None when it is all of them.

    Query i of batch b stands at position ``p = kv_len[b] - T_q + i`` (kv_len defaults to T_k): bottom-right alignment.
    Causal: key <= p. Window W: key > p - W, and without causal also key < p + W. doc_ids (B, T_k): the ids of key and of
    position p must be equal. Keys at or past kv_len do not exist; a query at a negative position sees nothing.
    """
    if not causal and window is None and doc_ids is None and kv_len is None:
        return None
    length = torch.full((1,), T_k, device=device) if kv_len is None else kv_len.to(torch.int64)
    position = (length[:, None] - T_q + torch.arange(T_q, device=device))[:, :, None]  # (B, T_q, 1)
    key = torch.arange(T_k, device=device)[None, None, :]
    mask = (key < length[:, None, None]) & (position >= 0)
    if causal:
        mask = mask & (key <= position)
    if window is not None:
        mask = mask & (key > position - window) & (key < position + window)
    if doc_ids is not None:
        position = position.expand(doc_ids.shape[0], T_q, 1).squeeze(-1).clamp(min=0)
        mask = mask & (doc_ids.gather(1, position)[:, :, None] == doc_ids[:, None, :])
    return mask[:, None]


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
) -> Tensor:
    """Scaled dot-product attention. q (B, T_q, H, D), k and v (B, T_k, H_kv, D) -> (B, T_q, H, D).

    Head h reads key/value head ``h // (H / H_kv)``. ``attention_mask`` says who sees whom; a query that sees nothing gets
    zeros. ``scale`` defaults to 1/sqrt(D). Vaswani et al. 2017; grouped queries: Ainslie et al. 2023.
    """
    T_q, H, D = q.shape[1:]
    T_k, H_kv = k.shape[1:3]
    if q.numel() == 0 or k.numel() == 0 or dropout_p == 1:  # nothing to attend to, or nothing that is kept
        return q.new_zeros(q.shape) + sum((0 * x).sum() for x in (q, k, v))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    square = causal and T_q == T_k and window is None and doc_ids is None and kv_len is None
    mask, sees_any = None, None
    if not square:  # which PyTorch's flash attention does by itself, without a mask in memory
        mask = attention_mask(T_q, T_k, q.device, causal=causal, window=window, doc_ids=doc_ids, kv_len=kv_len)
    if mask is not None:
        # A row with no key: let it see all of them and zero the output, so that no NaN is ever formed.
        sees_any = mask.any(-1, keepdim=True)
        mask = mask | ~sees_any
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=square, scale=scale, dropout_p=dropout_p, enable_gqa=H != H_kv
    )
    return (out if sees_any is None else torch.where(sees_any, out, 0)).transpose(1, 2)


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
) -> Tensor:
    """Self-attention over packed projections: qkv (B, T, (H + 2 H_kv) D) -> (B, T, H D); (B, T, 3C) -> (B, T, C) when
    H_kv = H: all queries, then all keys, then all values, as nanoGPT's and GPT-2's c_attn packs them."""
    n_kv_head = n_kv_head or n_head
    q, k, v = qkv.unflatten(-1, (n_head + 2 * n_kv_head, -1)).split((n_head, n_kv_head, n_kv_head), dim=2)
    out = attention(q, k, v, causal=causal, scale=scale, window=window, doc_ids=doc_ids, dropout_p=dropout_p)
    return out.flatten(2)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    accumulate: str = "fp32",
) -> Tensor:
    """dropout(x @ weight.T + bias) + residual. x (..., in), weight (out, in), bias (out,), residual (..., out).

    The result has x's dtype (under autocast, autocast's), or with a residual the residual's. ``accumulate`` ("fp32",
    "fp16") is how a kernel sums; it does not change what is meant."""
    mixed = any(t is not None and t.dtype != x.dtype for t in (weight, bias))
    # Autocast casts by itself, each weight once per forward pass.
    if mixed and not torch.is_autocast_enabled(x.device.type):
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = F.linear(x, weight, bias)
    y = F.dropout(y, dropout_p) if dropout_p else y
    return y if residual is None else (y + residual).to(residual.dtype)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "tanh", accumulate: str = "fp32"
) -> Tensor:
    """gelu(x @ weight.T + bias), with the tanh approximation or ("none") without. Hendrycks & Gimpel 2016."""
    return F.gelu(linear(x, weight, bias), approximate=approximate)


def linear_relu2(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, accumulate: str = "fp32") -> Tensor:
    """relu(x @ weight.T + bias)^2. So et al. 2021."""
    return F.relu(linear(x, weight, bias)).square()


def mlp(
    x: Tensor,
    w_fc: Tensor,
    b_fc: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    activation: str = "gelu",
    approximate: str = "tanh",
    accumulate: str = "fp32",
) -> Tensor:
    """``linear`` of ``linear_gelu``, GPT-2's MLP, or with ``activation`` "relu2" of ``linear_relu2``. w_fc (H, C), w_proj (out,
    H). ``approximate`` concerns GELU alone."""
    gelu = activation == "gelu"
    hidden = linear_gelu(x, w_fc, b_fc, approximate=approximate) if gelu else linear_relu2(x, w_fc, b_fc)
    return linear(hidden, w_proj, b_proj, residual=residual, dropout_p=dropout_p)


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
    """Cross-entropy of the classifier ``x @ weight.T + bias``. x (..., C), weight (V, C), target (...) of int64.

    logits z are first capped, ``c * tanh(z / c)``, if ``logit_softcap`` is c; only the first ``vocab_size`` rows of a
    padded weight take part. Each token's loss is cross-entropy with ``label_smoothing`` plus ``z_loss * lse(z)**2``
    (PaLM, Chowdhery et al. 2022, section 5); 0 where target == ignore_index. mean divides by the number of tokens
    that are not ignored (0 if there are none). Returns fp32 (fp64 for fp64 inputs): a scalar, or target's shape for "none".
    """
    V = weight.shape[0] if vocab_size is None else vocab_size
    logits = F.linear(x, weight[:V].to(x.dtype), None if bias is None else bias[:V].to(x.dtype))
    logits = logits.reshape(-1, V)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    flat = target.reshape(-1).to(torch.int64)
    loss = F.cross_entropy(logits, flat, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    if z_loss:
        loss = loss + z_loss * torch.where(flat != ignore_index, torch.logsumexp(logits, -1).square(), 0)
    if reduction == "none":
        return loss.view(target.shape)
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / (flat != ignore_index).sum().clamp(min=1)
    raise ValueError(f"reduction is {reduction!r}: use 'none', 'mean' or 'sum'")
