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


# ---------------------------------------------------------------- Muon

CLASSIC = (3.4445, -4.7750, 2.0315)
"""a, b, c of Newton-Schulz with the steepest slope at 0 (Jordan et al. 2024): singular values end in about [0.7, 1.2]."""
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_MARGIN = 1.01
"""By which Polar Express stays below the largest singular value that its polynomials are made for, as bf16 rounds past it."""


def polynomials(coefficients: str, steps: int) -> list[tuple[float, float, float]]:
    """(a, b, c) of each Newton-Schulz step. "classic": the same at each; "polar": the best for what the steps before have left
    (Amsel et al. 2025, arXiv 2505.16932)."""
    if coefficients == "classic":
        return [CLASSIC] * steps
    best = [(a / _MARGIN, b / _MARGIN**3, c / _MARGIN**5) for a, b, c in _POLAR_EXPRESS]
    return [*best, *[(1.875, -1.25, 0.375)] * steps][:steps]


def margin(coefficients: str) -> float:
    """By what the Frobenius norm is multiplied before x is divided by it."""
    return _MARGIN if coefficients == "polar" else 1.0


def orthogonalize(x: Tensor, coefficients: str = "classic", steps: int = 5, eps: float = 1e-7) -> Tensor:
    """About U V^T of each x = U S V^T: all singular values come near 1. x (batch, n, m) of any floating dtype, quickest with
    n <= m; the result has x's shape and dtype, in which all is computed.

    ``x / max(|x|, eps)`` with the Frobenius norm (times 1.01 for "polar"), then per step A = x x^T, x <- a x + (b A + c A A) x.
    A matrix of zeros stays one. Jordan et al. 2024, Muon.
    """
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    x = (x / (norm * margin(coefficients)).clamp(min=eps)).to(x.dtype)
    for a, b, c in polynomials(coefficients, steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def muon_momentum(
    grad: Tensor,
    momentum_buffer: Tensor,
    out: Tensor,
    hyper: Tensor,
    nesterov: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """m <- m + (1 - mu)(g - m) in place, and into ``out`` the direction: g + mu (m - g) with Nesterov's look-ahead, else m.

    grad, momentum_buffer and out of one shape and any strides, each in its own dtype. hyper begins with learning rate, mu
    and weight decay. grad_scale (one element) divides the gradient; a found_inf that is not 0 leaves m as it was."""
    g = grad.to(momentum_buffer.dtype)
    if grad_scale is not None:
        g = g / grad_scale.squeeze()
    mu = hyper[1]
    m = momentum_buffer + (g - momentum_buffer) * (1 - mu)
    out.copy_(g + (m - g) * mu if nesterov else m)
    momentum_buffer.copy_(m if found_inf is None else torch.where(found_inf.squeeze() == 0, m, momentum_buffer))


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
    """p <- p - lr decay p - lr scale o in place; ``copy``, the parameter's working copy, is written, too.

    param and direction o (n, m) of any strides. ``rows`` (n,) multiplies o row by row. ``cautious``: weights decay only where
    o p >= 0, so that decay and update pull the same way (Chen et al. 2025, arXiv 2510.12402). A found_inf that is not 0 leaves
    p as it was."""
    lr, decay = hyper[0], hyper[2]
    o = direction.to(param.dtype)
    if rows is not None:
        o = o * rows[:, None]
    decayed = param * (o * param >= 0) if cautious else param
    new = param - lr * decay * decayed - lr * scale * o
    param.copy_(new if found_inf is None else torch.where(found_inf.squeeze() == 0, new, param))
    if copy is not None:
        copy.copy_(param)
