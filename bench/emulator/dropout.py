"""The dropout masks that the kernels' docstrings promise, written anew: Philox-4x32 (Salmon et al. 2011) in numpy.

Inside ``same_masks(seed)`` the references of fastgpt/kernels/reference.py drop what the kernels drop with that seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.kernels import reference, runtime

_A, _B, _KA, _KB = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85


def philox(seed: int, counter: tuple[np.ndarray, ...], rounds: int) -> np.ndarray:
    """(4, ...) uint32, of four counters that broadcast."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) & low for c in np.broadcast_arrays(*counter))
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(rounds):
        pa, pb = c0 * np.uint64(_A), c2 * np.uint64(_B)
        c0, c1, c2, c3 = (pb >> half) ^ c1 ^ np.uint64(k0), pb & low, (pa >> half) ^ c3 ^ np.uint64(k1), pa & low
        k0, k1 = (k0 + _KA) & 0xFFFFFFFF, (k1 + _KB) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def _word(words: np.ndarray, which: np.ndarray) -> np.ndarray:
    return np.take_along_axis(words, np.broadcast_to(which, words.shape[1:])[None], axis=0)[0]


def attention_mask(seed: int, p: float, heads: int, T_q: int, T_k: int) -> Tensor:
    """(batch x heads, T_q, T_k) of what is kept: counter (query, key // 4, head), the key picks the word, seven rounds."""
    head, query, key = np.arange(heads)[:, None, None], np.arange(T_q)[None, :, None], np.arange(T_k)[None, None, :]
    word = _word(philox(seed, (query, key // 4, head, 0 * key), 7), key % 4)
    return torch.from_numpy((word >> 1).astype(np.int64) >= int(p * 2**31))


def rows_mask(seed: int, p: float, rows: int, C: int) -> Tensor:
    """(rows, C) of what is kept: counter (column // 4, row), ten rounds, uniform >= p."""
    row, column = np.arange(rows)[:, None], np.arange(C)[None, :]
    word = _word(philox(seed, (column // 4, row, 0 * row, 0 * row), 10), column % 4).view(np.int32)
    magnitude = np.where(word < 0, -word - 1, word)
    return torch.from_numpy(magnitude.astype(np.float32) * np.float32(4.6566127342e-10) >= np.float32(p))


class _SameMasks:
    """torch.nn.functional, with the kernels' dropout."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    def dropout(self, x: Tensor, p: float) -> Tensor:
        kept = rows_mask(self.seed, p, x.numel() // x.shape[-1], x.shape[-1]).view(x.shape)
        return torch.where(kept, x / (1 - p), 0) if p else x

    def scaled_dot_product_attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, **options: Any
    ) -> Tensor:
        if not dropout_p:
            return F.scaled_dot_product_attention(q, k, v, **options)
        B, H, T_q, D = q.shape
        k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * (options["scale"] or D**-0.5)
        mask = torch.ones(T_q, k.shape[2], dtype=torch.bool).tril() if options["is_causal"] else options["attn_mask"]
        scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
        kept = attention_mask(self.seed, dropout_p, B * H, T_q, k.shape[2]).view(scores.shape)
        return torch.where(kept, scores.softmax(-1) / (1 - dropout_p), 0) @ v


@contextmanager
def same_masks(seed: int) -> Iterator[None]:
    """Inside, kernels draw this seed, and references drop what it drops."""
    drawn = torch.full((1,), seed, dtype=torch.int64)
    with (
        mock.patch.object(runtime, "draw_seed", lambda device: drawn),
        mock.patch.object(reference, "F", _SameMasks(seed)),
    ):
        yield
