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
from torch import Tensor

from fastgpt.common import UserError
from fastgpt.config import ModelConfig
from fastgpt.decoding import KVCache, sample
from fastgpt.modern import ModernTransformer
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
    """Token ids to the final norm's output, parameters under nanoGPT's names."""

    def __init__(self, config: ModelConfig, ops: Ops):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer, ops) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config.n_embd, config.bias, ops)
        self.dropout, self.ops = config.dropout, ops
        self.apply(self._init)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # two of them add to the residual stream per block
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx: Tensor, cache: KVCache | None = None, doc_ids: Tensor | None = None) -> Tensor:
        dropout_p, start = self.dropout if self.training else 0.0, 0 if cache is None else cache.position
        x, branch = self.ops.embedding(idx, self.wte.weight, self.wpe.weight, position=start, dropout_p=dropout_p), None
        for block in self.h:
            x, branch = block(x, branch, cache, doc_ids)
        h, _ = self.ln_f(branch, x, dropout_p)
        return h


class GPT(nn.Module):
    """``GPT(config, ops)``: the model of ``config.family``, a GPT-2 or the one in modern.py; ops is fastgpt.ops.EAGER (default)
    or TRITON.

    >>> shape = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=64)
    >>> model = GPT(shape)
    >>> idx = torch.randint(0, 64, (2, 17))
    >>> _, loss = model(idx[:, :-1], idx[:, 1:])  # with targets the logits are not kept
    >>> loss.backward()
    """

    def __init__(self, config: ModelConfig, ops: Ops = EAGER):
        super().__init__()
        self.config, self.ops = config, ops
        self.transformer = (ModernTransformer if config.family == "modern" else Transformer)(config, ops)
        self.lm_head = None if config.tied_head else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if self.lm_head is not None:
            nn.init.normal_(self.lm_head.weight, std=0.001)  # the first loss is that of equal chances

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

    @property
    def head(self) -> Tensor:
        """The weight of the LM head (vocab_size, C): the token embedding's, unless the model has another."""
        return (self.transformer.wte if self.lm_head is None else self.lm_head).weight

    def hidden(self, idx: Tensor, cache: KVCache | None = None, doc_ids: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> the final norm's output (B, T, C)."""
        T, start = idx.shape[1], 0 if cache is None else cache.position
        if start + T > self.config.block_size:
            raise ValueError(f"sequence of {start + T} tokens is longer than block_size {self.config.block_size}")
        h = self.transformer(idx, cache, doc_ids)
        if cache is not None:
            cache.advance(T)
        return h

    def logits(self, h: Tensor) -> Tensor:
        """Logits (..., vocab_size) of ``hidden``'s output (..., C), in its dtype, or in fp32 with a softcap."""
        z, cap = self.ops.linear(h, self.head), self.config.softcap
        return cap * torch.tanh(z.float() / cap) if cap else z

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """idx, targets (B, T) int64 -> (logits (B, T, vocab_size), None) without targets, (None, mean loss fp32) with them.

        With targets the logits are never formed as a whole; targets of -100 are ignored. ``doc_ids`` (B, T) int32: tokens
        attend within their own document only. Raises ValueError when T exceeds block_size.
        """
        h = self.hidden(idx, doc_ids=doc_ids)
        if targets is None:
            return self.logits(h), None
        cap = {"logit_softcap": self.config.softcap} if self.config.softcap else {}
        return None, self.ops.linear_cross_entropy(h, self.head, targets, **cap)

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
        block_size; past it the window slides, positions shift under every cached key, and each step encodes the last
        block_size tokens anew, as without a cache.
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
            logits = self.logits(h[:, -1]).float()[:, :vocab_size]
            pending = sample(logits, temperature, top_k, top_p, generator)
            sequence = torch.cat((sequence, pending), 1)
            yield pending
