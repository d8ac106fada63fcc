"""What a model needs to write text token by token: the keys and values of the tokens before, and a choice from logits."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.config import ModelConfig


class KVCache:
    """Keys and values of one sequence batch, preallocated: per layer k and v (B, block_size, H_kv, D).

    ``length`` (B,) int32 on the device counts the tokens in it, as ops.attention's kv_len wants it; ``position`` is the same
    number on the host, so that slicing does not wait for the GPU."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype):
        shape = (config.n_layer, batch, config.block_size, config.kv_heads, config.head_size)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(batch, device=device, dtype=torch.int32)
        self.position = 0
        self.before: Tensor | None = None
        """The last token's embedding (B, C), where the model mixes it into the next."""

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v (B, T, H_kv, D) behind what is there; returns the layer's whole buffers."""
        end = self.position + k.shape[1]
        self.k[layer, :, self.position : end] = k
        self.v[layer, :, self.position : end] = v
        return self.k[layer], self.v[layer]

    def advance(self, T: int) -> None:
        self.position += T
        self.length += T


def sample(
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
