"""The module structure of nanochat's GPT (Karpathy 2025, as of July 2026), written anew from its equations, in pieces that a
test can exchange: ``make(mlp=..., attention=...)``. What nanochat has as names of its Python module, this file has, too."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

COMPUTE_DTYPE = torch.float32
USE_FA3 = False


def norm(x):
    return F.rms_norm(x, x.shape[-1:])


class Linear(nn.Linear):
    """The weight is cast to what comes in."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def rotate(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def windowed(q, k, v, causal, window_size):
    """FlashAttention 3's signature; (B, T, H, D). FA3 itself takes neither fp32 nor a CPU's tensors."""
    assert causal and not USE_FA3
    T, before = q.shape[1], window_size[0]
    at = torch.arange(T, device=q.device)
    distance = at[:, None] - at[None, :]
    mask = (distance >= 0) & (distance <= (before if before >= 0 else T))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


flash_attn = SimpleNamespace(flash_attn_func=windowed)


class Attention(nn.Module):
    sharpness, most = 1.2, 3.0

    def __init__(self, config, layer_idx):
        super().__init__()
        C, D = config.n_embd, config.n_embd // config.n_head
        self.layer_idx, self.n_head, self.n_kv_head, self.head_dim = layer_idx, config.n_head, config.n_kv_head, D
        self.c_q = Linear(C, C, bias=False)
        self.c_k = Linear(C, config.n_kv_head * D, bias=False)
        self.c_v = Linear(C, config.n_kv_head * D, bias=False)
        self.c_proj = Linear(C, C, bias=False)
        self.ve_gate = Linear(12, config.n_kv_head, bias=False) if layer_idx % 2 == (config.n_layer - 1) % 2 else None

    def qkv(self, x, ve, cos_sin):
        q, k, v = (c(x).unflatten(-1, (-1, self.head_dim)) for c in (self.c_q, self.c_k, self.c_v))
        if ve is not None:
            v = v + (self.most * self.ve_gate(x[..., :12]).sigmoid())[..., None] * ve.view_as(v)
        q, k = (self.sharpness * norm(rotate(x, *cos_sin)) for x in (q, k))
        return q, k, v

    def forward(self, x, ve, cos_sin, window_size, kv_cache):
        q, k, v = self.qkv(x, ve, cos_sin)
        if kv_cache is not None:
            return self.c_proj(kv_cache.attend(self.layer_idx, q, k, v).flatten(2))
        return self.c_proj(flash_attn.flash_attn_func(q, k, v, causal=True, window_size=window_size).flatten(2))


class AttentionWithoutValueEmbedding(Attention):
    """January 2026."""

    sharpness = 1.0

    def forward(self, x, cos_sin, window_size, kv_cache):
        return super().forward(x, None, cos_sin, window_size, kv_cache)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def forward(self, x, ve, cos_sin, window_size, kv_cache):
        x = x + self.attn(norm(x), ve, cos_sin, window_size, kv_cache)
        return x + self.mlp(norm(x))


class BlockWithoutValueEmbedding(Block):
    def forward(self, x, cos_sin, window_size, kv_cache):
        x = x + self.attn(norm(x), cos_sin, window_size, kv_cache)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config, attention=Attention, mlp=MLP, block=Block):
        super().__init__()
        C, L, V = config.n_embd, config.n_layer, -(-config.vocab_size // 64) * 64
        blocks = nn.ModuleList(block() for _ in range(L))
        for layer, each in enumerate(blocks):
            each.attn, each.mlp = attention(config, layer), mlp(config)
        self.config, self.window_sizes = config, [(before, 0) for before in config.windows]
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(V, C), "h": blocks})
        self.lm_head = Linear(C, V, bias=False)
        self.resid_lambdas = nn.Parameter(torch.linspace(1.15, 1.05, L))
        self.x0_lambdas = nn.Parameter(torch.linspace(0.2, 0.05, L))
        self.smear_gate, self.smear_lambda = Linear(12, 1, bias=False), nn.Parameter(torch.tensor([0.3]))
        self.backout_lambda = nn.Parameter(torch.tensor([0.2]))
        width = C // config.n_head * config.n_kv_head
        gated = [layer for layer in range(L) if layer % 2 == (L - 1) % 2]
        self.value_embeds = nn.ModuleDict({str(layer): nn.Embedding(V, width) for layer in gated})
        D = C // config.n_head
        angles = torch.outer(torch.arange(4.0 * config.sequence_len), 100.0 ** -torch.linspace(0, 1, D // 2))
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, table[None, :, None, :], persistent=False)

    def trunk(self, idx, arguments, kv_cache):
        x = norm(self.transformer.wte(idx).to(COMPUTE_DTYPE))
        gate = self.smear_lambda.to(x.dtype) * self.smear_gate(x[:, 1:, :12]).sigmoid()
        x = torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), dim=1)
        x0 = x
        for layer, block in enumerate(self.transformer.h):
            x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * x0
            x = block(x, *arguments(layer), kv_cache)
            if layer == len(self.transformer.h) // 2:
                middle = x
        return norm(x - self.backout_lambda.to(x.dtype) * middle)

    def arguments(self, idx):
        """layer -> what its block takes beside x and the cache."""
        tables = self.cos[:, : idx.shape[1]], self.sin[:, : idx.shape[1]]

        def of(layer):
            ve = self.value_embeds[str(layer)](idx).to(COMPUTE_DTYPE) if str(layer) in self.value_embeds else None
            return ve, tables, self.window_sizes[layer]

        return of

    def cap(self, logits):
        return 15 * torch.tanh(logits / 15)

    def forward(self, idx, targets=None, kv_cache=None, loss_reduction="mean"):
        assert self.cos.dtype == COMPUTE_DTYPE
        x = self.trunk(idx, self.arguments(idx), kv_cache)
        logits = self.cap(self.lm_head(x)[..., : self.config.vocab_size].float())
        if targets is None:
            return logits
        rows = logits.view(-1, logits.size(-1))
        return F.cross_entropy(rows, targets.view(-1), ignore_index=-1, reduction=loss_reduction)


class GPTWithoutValueEmbedding(GPT):
    def arguments(self, idx):
        of = super().arguments(idx)
        return lambda layer: of(layer)[1:]


V = 67


def make(device="cpu", model=GPT, attention=Attention, mlp=MLP, block=Block, **shape):
    """A small model with weights that matter."""
    torch.manual_seed(0)
    config = {"sequence_len": 24, "vocab_size": V, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 24, **shape}
    config = SimpleNamespace(**config, windows=[5] * (config["n_layer"] - 1) + [config["sequence_len"]])
    made = model(config, attention, mlp, block)
    with torch.no_grad():
        for parameter in made.transformer.h.parameters():
            parameter.normal_(std=0.3)
        made.lm_head.weight.mul_(3)
    return made.to(device)
