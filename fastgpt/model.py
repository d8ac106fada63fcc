"""GPT-2, readable top to bottom: learned positions, pre-norm blocks, GELU (tanh), the LM head tied to the token embedding.

The residual add (and its dropout) belongs to the norm that follows it, so a block takes the residual stream and the branch
that is still to be added: ``layer_norm(branch, residual=x)`` returns the normed sum and the sum in one pass.
Parameter names are nanoGPT's. Radford et al. 2019; scaled initialisation from section 2.3 there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastgpt.common import UserError
from fastgpt.config import ModelConfig
from fastgpt.ops import EAGER, Ops, compute_dtype


class LayerNorm(nn.Module):
    """Weight and optional bias (C,) of a layer norm; ``residual`` and ``dropout_p`` as in ops.layer_norm."""

    def __init__(self, width: int, bias: bool, ops: Ops):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.ops = ops

    def forward(self, x: Tensor, residual: Tensor | None = None, dropout_p: float = 0.0):
        return self.ops.layer_norm(x, self.weight, self.bias, residual=residual, dropout_p=dropout_p)


class KVCache:
    """Keys and values of one sequence batch, preallocated: per layer k and v (B, block_size, H, D).

    ``length`` (B,) int32 on the device counts the tokens in it, as ops.attention's kv_len wants it; ``position`` is the same
    number on the host, so that slicing does not wait for the GPU."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, batch, config.block_size, config.n_head, config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(batch, device=device, dtype=torch.int32)
        self.position = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, T, H, D) behind what is there; returns the layer's whole buffers."""
        end = self.position + k.shape[1]
        self.k[layer, :, self.position : end] = k
        self.v[layer, :, self.position : end] = v
        return self.k[layer], self.v[layer]

    def advance(self, T: int) -> None:
        self.position += T
        self.length += T


class Attention(nn.Module):
    """Causal self-attention from one packed projection."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout, self.layer, self.ops = config.n_head, config.dropout, layer, ops

    def forward(self, x: Tensor, cache: KVCache | None = None, doc_ids: Tensor | None = None) -> Tensor:
        qkv = self.ops.linear(x, self.c_attn.weight, self.c_attn.bias)
        if cache is None:
            dropout_p = self.dropout if self.training else 0.0
            y = self.ops.qkv_attention(qkv, self.n_head, doc_ids=doc_ids, dropout_p=dropout_p)
        else:
            B, T, C = x.shape
            q, k, v = qkv.view(B, T, 3, self.n_head, C // self.n_head).unbind(2)
            k, v = cache.append(self.layer, k, v)
            y = self.ops.attention(q, k, v, kv_len=cache.length + T).reshape(B, T, C)
        return self.ops.linear(y, self.c_proj.weight, self.c_proj.bias)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.mlp(x, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias)


class Block(nn.Module):
    """residual stream x and pending branch (None before the first block) -> the same, one block later."""

    def __init__(self, config: ModelConfig, layer: int, ops: Ops):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias, ops)
        self.attn = Attention(config, layer, ops)
        self.ln_2 = LayerNorm(config.n_embd, config.bias, ops)
        self.mlp = MLP(config, ops)
        self.dropout = config.dropout

    def forward(
        self, x: Tensor, branch: Tensor | None, cache: KVCache | None = None, doc_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        dropout_p = self.dropout if self.training else 0.0
        # The embedding has no branch to add, and has had its dropout.
        h, x = (self.ln_1(x), x) if branch is None else self.ln_1(branch, x, dropout_p)
        branch = self.attn(h, cache, doc_ids)
        h, x = self.ln_2(branch, x, dropout_p)
        return x, self.mlp(h)


class Transformer(nn.Module):
    """The parameters of GPT under nanoGPT's names."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer, ops) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.bias, ops)


class GPT(nn.Module):
    """``GPT(config, ops)``; ops is fastgpt.ops.EAGER (default) or TRITON."""

    def __init__(self, config: ModelConfig, ops: Ops = EAGER):
        super().__init__()
        self.config, self.ops = config, ops
        self.transformer = Transformer(config, ops)
        self.apply(self._init)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # two of them add to the residual stream per block
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @classmethod
    def from_pretrained(cls, source: str, ops: Ops = EAGER) -> GPT:
        """A trained model, on the CPU in fp32: ``source`` is any checkpoint that fastgpt.convert reads (nanoGPT's ckpt.pt, a
        fastgpt run, a Hugging Face folder) or a name on the Hugging Face hub such as "gpt2". Raises UserError."""
        from fastgpt.checkpoints.formats.any import load_weights

        portable = load_weights(str(source))
        return cls.from_weights(portable.config, portable.weights, ops)

    @classmethod
    def from_weights(cls, config: ModelConfig, weights: dict[str, Tensor], ops: Ops = EAGER) -> GPT:
        """A model whose parameters are these very tensors, by name: nothing is drawn or copied."""
        with torch.device("meta"):
            model = cls(config, ops)
        model.load_state_dict(weights, assign=True)
        return model

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def head(self) -> Tensor:
        """The weight of the LM head (vocab_size, C), which is tied to the token embedding."""
        return self.transformer.wte.weight

    def hidden(self, idx: Tensor, cache: KVCache | None = None, doc_ids: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> the final norm's output (B, T, C)."""
        T, start = idx.shape[1], 0 if cache is None else cache.position
        if start + T > self.config.block_size:
            raise ValueError(f"sequence of {start + T} tokens is longer than block_size {self.config.block_size}")
        dropout_p = self.config.dropout if self.training else 0.0
        wte, wpe = self.transformer.wte.weight, self.transformer.wpe.weight
        x, branch = self.ops.embedding(idx, wte, wpe, position=start, dropout_p=dropout_p), None
        for block in self.transformer.h:
            x, branch = block(x, branch, cache, doc_ids)
        if cache is not None:
            cache.advance(T)
        h, _ = self.transformer.ln_f(branch, x, dropout_p)
        return h

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """idx, targets (B, T) int64 -> (logits (B, T, vocab_size), None) without targets, (None, mean loss fp32) with them.

        With targets the logits are never formed as a whole; targets of -100 are ignored. ``doc_ids`` (B, T) int32: tokens
        attend within their own document only. Raises ValueError when T exceeds block_size.
        """
        h = self.hidden(idx, doc_ids=doc_ids)
        if targets is None:
            return self.ops.linear(h, self.head), None
        return None, self.ops.linear_cross_entropy(h, self.head, targets)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        vocab_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yield one (B, 1) tensor of new ids after another, continuing the prompt idx (B, T), T >= 1.

        temperature 0 is greedy; ``top_k`` keeps the k likeliest tokens, ``top_p`` the fewest whose probabilities reach p
        (nucleus sampling, Holtzman et al. 2020); ``vocab_size`` excludes the padded rows. Keys and values are cached up to
        block_size; past it the window slides, learned positions shift under every cached key, and each step encodes the
        last block_size tokens anew, as without a cache.
        """
        if idx.shape[1] == 0:
            raise UserError("the prompt is empty: give at least one token")
        limit = self.config.block_size
        sequence, pending, cache = idx, idx[:, -limit:], None
        for _ in range(max_new_tokens):
            if sequence.shape[1] <= limit:
                if cache is None:
                    cache = KVCache(self.config, idx.shape[0], idx.device, compute_dtype(self.head))
                h = self.hidden(pending, cache)
            else:
                h = self.hidden(sequence[:, -limit:])
            logits = self.ops.linear(h[:, -1], self.head).float()[:, :vocab_size]
            pending = _sample(logits, temperature, top_k, top_p, generator)
            sequence = torch.cat((sequence, pending), 1)
            yield pending


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One id per row of logits (B, V): greedy at temperature 0, else from the softmax over what top_k and top_p leave."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        threshold = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    least = 1e-30  # numbers below it may be 0 in fp32
    probabilities = F.softmax(logits / max(temperature, least), -1)
    if top_p is not None:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # the likeliest token always stays
        probabilities = torch.zeros_like(probabilities).scatter(
            -1, order, ordered.masked_fill(before >= max(top_p, least), 0.0)
        )
    return torch.multinomial(probabilities, 1, generator=generator)
