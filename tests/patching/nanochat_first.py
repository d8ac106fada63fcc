"""nanochat as it began, in October 2025: no windows, no value embeddings, rotary tables in bf16 in any case. In a file of its
own, as there was no COMPUTE_DTYPE either."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.patching import nanochat_model


class Attention(nanochat_model.Attention):
    sharpness = 1.0

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        del self.ve_gate

    def forward(self, x, cos_sin, kv_cache):
        q, k, v = (x.transpose(1, 2) for x in self.qkv(x, None, cos_sin))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class Block(nanochat_model.Block):
    def forward(self, x, cos_sin, kv_cache):
        x = x + self.attn(nanochat_model.norm(x), cos_sin, kv_cache)
        return x + self.mlp(nanochat_model.norm(x))


class GPT(nanochat_model.GPT):
    def __init__(self, *parts):
        super().__init__(*parts)
        del self.value_embeds
        self.cos, self.sin = self.cos.bfloat16(), self.sin.bfloat16()

    def arguments(self, idx):
        tables = self.cos[:, : idx.shape[1]], self.sin[:, : idx.shape[1]]
        return lambda layer: (tables,)

    def forward(self, idx, targets=None, kv_cache=None, loss_reduction="mean"):
        assert self.cos.dtype == torch.bfloat16
        x = self.trunk(idx, self.arguments(idx), kv_cache)
        logits = 15 * torch.tanh(self.lm_head(x) / 15)
        if targets is None:
            return logits
        rows = logits.view(-1, logits.size(-1))
        return F.cross_entropy(rows, targets.view(-1), ignore_index=-1, reduction=loss_reduction)
