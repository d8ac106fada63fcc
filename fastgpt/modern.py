"""The modern recipe's model, readable top to bottom: what model.py has as a GPT-2, with the parts that bought the most loss per
token since. Each is one field of ModelConfig, and without it the model is what it was before; docs/recipe.md has their papers
and what each bought.

    x = norm(wte[token])                                   embedding_norm
    x = x + c sigmoid(smear_gate(x[:24])) x[token before]  smear (c learned)
    x0 = x
    for each block:
        x = a x + b x0                                     residual_scalars (a, b learned, per block)
        q, k, v = c_attn(norm(x))                          n_kv_head: fewer heads of k and v
        q, k = 1.2 norm(rotate(q, k))                      rotary_base, qk_norm
        v = v + 3 sigmoid(ve_gate(norm(x)[:12])) value_embeds[token]       value_embeddings, every other block
        x = x + c_proj(attention(q, k, v, window))         window_pattern; zero_init: c_proj begins at 0
        x = x + c_proj(relu(c_fc(norm(x)))^2)              activation
    x = x - d x[after block L // 2]                        backout (d learned)
    logits = 15 tanh(lm_head(norm(x)) / 15)                tied_head, softcap: in model.py, as is the loss

norm is the RMS norm without a weight, in one pass with the sum before it, as model.py's layer norms are. Names, initialisation
and the direction of the rotation are those of nanochat (Karpathy 2025), which has most of its recipe from modded-nanogpt
(Jordan et al. 2024).
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastgpt.anatomy import GATE_COLUMNS, SMEAR_COLUMNS, has_value_embedding, window
from fastgpt.config import ModelConfig
from fastgpt.decoding import KVCache
from fastgpt.ops import Ops, compute_dtype

QK_SCALE = 1.2
"""Factor of normed queries and keys: their products are then at most 1.44 sqrt(D) instead of sqrt(D)."""
GATE_SCALE = 3.0
"""A value embedding's gate lies in (0, GATE_SCALE)."""


def rotation(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin (block_size, D / 2) of each position's angles, in fp32 on the CPU; all angles are 0 without rotary positions.
    The sine's sign turns by the negative angle, as nanochat does: only differences between positions count."""
    D, positions = config.head_size, torch.arange(config.block_size, device="cpu", dtype=torch.float64)
    speeds = torch.zeros(D // 2, dtype=torch.float64, device="cpu")
    if config.rotary_base:
        speeds = config.rotary_base ** (-torch.arange(0, D, 2, device="cpu", dtype=torch.float64) / D)
    angles = torch.outer(positions, speeds)
    return angles.cos().float(), -angles.sin().float()


def spread(weight: Tensor, config: ModelConfig, factor: float = 1.0) -> None:
    """Draw a weight uniformly, with a standard deviation of ``factor`` / sqrt(C)."""
    bound = factor * (3 / config.n_embd) ** 0.5
    nn.init.uniform_(weight, -bound, bound)


def projection(columns: int, config: ModelConfig) -> nn.Linear:
    """A linear whose output is added to the residual stream."""
    linear = nn.Linear(columns, config.n_embd, bias=False)
    nn.init.normal_(linear.weight, std=0.0 if config.zero_init else 0.02 / (2 * config.n_layer) ** 0.5)
    return linear


class ModernAttention(nn.Module):
    """Causal self-attention from one packed projection (C + 2 H_kv D, C): all queries, all keys, all values."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops):
        super().__init__()
        H, H_kv, C = config.n_head, config.kv_heads, config.n_embd
        self.c_attn = nn.Linear(C, (H + 2 * H_kv) * config.head_size, bias=False)
        spread(self.c_attn.weight, config)
        self.c_proj = projection(C, config)
        gated = has_value_embedding(config, layer)
        self.ve_gate = nn.Linear(min(GATE_COLUMNS, C), H_kv, bias=False) if gated else None
        if self.ve_gate is not None:
            nn.init.uniform_(self.ve_gate.weight, 0.0, 0.02)
        self.heads, self.window = (H, H_kv), window(config, layer) or None
        self.limit: int | None = None
        self.turns, self.norm = config.rotary_base > 0, config.qk_norm
        self.dropout, self.layer, self.ops = config.dropout, layer, ops

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], ve: Tensor | None, cache: KVCache | None, doc_ids: Tensor | None
    ) -> Tensor:
        """x (B, T, C); cos and sin of ``rotation``; ve (B, T, H_kv D), this block's value embeddings."""
        H, H_kv = self.heads
        qkv, gate = self.ops.linear(x, self.c_attn.weight), None
        if self.ve_gate is not None:
            weight = self.ve_gate.weight
            gate = GATE_SCALE * torch.sigmoid(F.linear(x[..., : weight.shape[1]], weight))
        if self.turns or self.norm or ve is not None:
            position, scale = 0 if cache is None else cache.position, QK_SCALE if self.norm else 1.0
            qkv = self.ops.qk_norm_rope(
                qkv, H, H_kv, *angles, norm=self.norm, scale=scale, position=position, ve=ve, gate=gate
            )
        if cache is None:
            dropout_p, reach = self.dropout if self.training else 0.0, self.window
            if self.training and self.limit is not None:
                reach = min(self.limit, reach or self.limit)
            y = self.ops.qkv_attention(qkv, H, n_kv_head=H_kv, window=reach, doc_ids=doc_ids, dropout_p=dropout_p)
        else:
            q, k, v = qkv.unflatten(-1, (H + 2 * H_kv, -1)).split((H, H_kv, H_kv), dim=2)
            k, v = cache.append(self.layer, k, v)
            y = self.ops.attention(q, k, v, window=self.window, kv_len=cache.length + x.shape[1]).flatten(2)
        return self.ops.linear(y, self.c_proj.weight)


class ModernMLP(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        spread(self.c_fc.weight, config, 0.4)
        self.c_proj = projection(4 * config.n_embd, config)
        self.activation, self.ops = config.activation, ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.mlp(x, self.c_fc.weight, None, self.c_proj.weight, None, activation=self.activation)


class ModernBlock(nn.Module):
    """residual stream x and pending branch (None before the first block) -> the same, one block later."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops):
        super().__init__()
        self.attn = ModernAttention(config, layer, ops)
        self.mlp = ModernMLP(config, ops)
        self.dropout, self.ops = config.dropout, ops

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        mix: dict[str, Tensor],
        angles: tuple[Tensor, Tensor],
        ve: Tensor | None = None,
        cache: KVCache | None = None,
        doc_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``mix``: scale, x0 and x0_scale of ops.rms_norm, or nothing."""
        norm, dropout_p = self.ops.rms_norm, self.dropout if self.training else 0.0
        if branch is not None:
            h, x = norm(branch, residual=x, dropout_p=dropout_p, **mix)
        elif mix:
            h, x = norm(x, out_dtype=compute_dtype(x), **mix)
        else:
            h = norm(x, out_dtype=compute_dtype(x))
        branch = self.attn(h, angles, ve, cache, doc_ids)
        h, x = norm(branch, residual=x, dropout_p=dropout_p)
        return x, self.mlp(h)


class ModernTransformer(nn.Module):
    """Token ids to the final norm's output, parameters under nanochat's names (q, k and v in one)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        L, C = config.n_layer, config.n_embd
        depth = torch.linspace(0, 1, L)
        self.resid_lambdas = nn.Parameter(1.15 - 0.10 * depth) if config.residual_scalars else None
        self.x0_lambdas = nn.Parameter(0.20 - 0.15 * depth) if config.residual_scalars else None
        self.smear_lambda = nn.Parameter(torch.zeros(1)) if config.smear else None
        self.backout_lambda = nn.Parameter(torch.full((1,), 0.2)) if config.backout else None
        self.smear_gate = nn.Linear(min(SMEAR_COLUMNS, C), 1, bias=False) if config.smear else None
        if self.smear_gate is not None:
            nn.init.uniform_(self.smear_gate.weight, 0.0, 0.02)
        self.wte = nn.Embedding(config.vocab_size, C)
        nn.init.normal_(self.wte.weight, std=0.02 if config.tied_head else 0.8)
        self.h = nn.ModuleList(ModernBlock(config, layer, ops) for layer in range(L))
        self.value_embeds = nn.ModuleDict()
        for layer in filter(partial(has_value_embedding, config), range(L)):
            table = nn.Embedding(config.vocab_size, config.kv_heads * config.head_size)
            spread(table.weight, config)
            self.value_embeds[str(layer)] = table
        for name, angles in zip(("cos", "sin"), rotation(config)):
            self.register_buffer(name, angles, persistent=False)
        self.config, self.ops = config, ops

    def limit_windows(self, tokens: int | None) -> None:
        """Let a token attend to at most so many in training, itself among them; None takes the limit away."""
        for block in self.h:
            assert isinstance(block, ModernBlock)
            block.attn.limit = tokens

    def smeared(self, x: Tensor, cache: KVCache | None, doc_ids: Tensor | None) -> Tensor:
        """x (B, T, C) with a share of the token before added to each, but across no document's start."""
        if self.smear_gate is None or self.smear_lambda is None:
            return x
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        if cache is not None:
            if cache.before is not None:
                before[:, 0] = cache.before
            cache.before = x[:, -1]
        weight = self.smear_gate.weight
        few = x[..., : weight.shape[1]].contiguous()  # a view would keep all of x for backward
        gate = self.smear_lambda * torch.sigmoid(F.linear(few, weight))
        if doc_ids is not None:
            gate = gate * F.pad(doc_ids[:, 1:] == doc_ids[:, :-1], (1, 0))[..., None]
        return x + (gate * before).to(x.dtype)

    def forward(self, idx: Tensor, cache: KVCache | None = None, doc_ids: Tensor | None = None) -> Tensor:
        ops, L, dropout_p = self.ops, len(self.h), self.config.dropout if self.training else 0.0
        x, branch = ops.embedding(idx, self.wte.weight, None, dropout_p=dropout_p), None
        if self.config.embedding_norm:
            x = ops.rms_norm(x, out_dtype=x.dtype)
        x = self.smeared(x, cache, doc_ids)
        mixes: list[dict[str, Tensor]] = [{}] * L
        if self.resid_lambdas is not None and self.x0_lambdas is not None:
            # unbind: the gradients of all blocks come back in one stack
            scalars = zip(self.resid_lambdas.unbind(), self.x0_lambdas.unbind())
            mixes = [{"scale": a, "x0": x, "x0_scale": b} for a, b in scalars]
        narrow, backout = compute_dtype(x), {}
        for layer, (block, mix) in enumerate(zip(self.h, mixes)):
            table = self.value_embeds[str(layer)].weight if str(layer) in self.value_embeds else None
            ve = None if table is None else ops.embedding(idx, table, None, out_dtype=narrow)
            x, branch = block(x, branch, mix, (self.cos, self.sin), ve, cache, doc_ids)
            if self.backout_lambda is not None and layer == L // 2:
                x, branch = x + F.dropout(branch, dropout_p), None
                backout = {"x0": x, "x0_scale": -self.backout_lambda}
        if branch is None:
            h, _ = ops.rms_norm(x, out_dtype=narrow, **backout)
        else:
            h, _ = ops.rms_norm(branch, residual=x, dropout_p=dropout_p, **backout)
        return h
