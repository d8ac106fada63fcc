"""The windows of token files and their order in an epoch, as pure functions of (seed, epoch, position).

A window is block_size + 1 tokens, and the next one begins block_size later, so every token except a file's first is the
target of exactly one window. A file of n tokens has w = (n - 1) // block_size windows. The r = n - 1 - w * block_size
remaining targets (always fewer than block_size) are dropped at its start, its end or both: each epoch begins at another
of the r + 1 offsets, so no token is skipped in every epoch, and the number of windows stays the same.

The order of an epoch is a permutation that is computed where it is needed: ten billion tokens are ten million windows,
and drawing a shuffled list of them would take a second and 80 MB at every start. It is a Feistel network over Z_a x Z_b
with a * b just above the number of windows (the generalised Feistel construction of Black and Rogaway, Ciphers with
Arbitrary Finite Domains, 2002); the few results outside the range go through it again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from fastgpt.common import UserError
from fastgpt.data.shards import open_shard

ROUNDS = 8
ORDER = 2
"""The version of the order of windows (1 sorted random numbers)."""


class Windows:
    """All windows of some token files, memory-mapped.

    Raises:
        UserError: a file is damaged, or all of them together hold no window.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], block_size: int) -> None:
        self.block_size = block_size
        # Plain views: indexing np.memmap itself costs a Python-level wrapper each time.
        files = [np.asarray(open_shard(path)) for path in paths]
        self.tokens = sum(map(len, files))
        targets = np.array([len(tokens) - 1 for tokens in files], dtype=np.int64)
        counts = targets // block_size
        self.count = int(counts.sum())
        """Windows per epoch."""
        if self.count == 0:
            names = ", ".join(repr(str(path)) for path in paths[:3]) or "no file"
            raise UserError(
                f"data ({names}) holds {max((len(f) for f in files), default=0)} tokens, fewer than block_size + 1 = "
                f"{block_size + 1}: use more text or a smaller block_size"
            )
        self._slack = np.where(counts > 0, targets % block_size, 0)
        self._first = np.concatenate(([0], np.cumsum(counts)[:-1]))
        self._views: list[Any] = [  # a file without windows has no window ids
            np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1) if count else None
            for tokens, count in zip(files, counts)
        ]
        self._epoch = lru_cache(maxsize=4)(self._draw_epoch)

    def in_order(self, positions: np.ndarray, seed: int) -> np.ndarray:
        """The windows at these positions (int64, ascending) of the endless sequence epoch 0, epoch 1, ..., as uint16
        (len(positions), block_size + 1)."""
        batch = np.empty((len(positions), self.block_size + 1), np.uint16)
        epochs = positions // self.count
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            keys, offsets = self._epoch(seed, epoch)
            mine = slice(*np.searchsorted(epochs, [epoch, epoch + 1]))
            batch[mine] = self.read(permute(positions[mine] % self.count, self.count, keys), offsets)
        return batch

    def read(self, ids: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
        """The windows with these numbers (0..count-1 in the order of the files), as uint16 (len(ids), block_size + 1)."""
        offsets = np.zeros_like(self._slack) if offsets is None else offsets
        if len(self._views) == 1:
            return self._views[0][ids * self.block_size + offsets[0]]
        out = np.empty((len(ids), self.block_size + 1), np.uint16)
        files = np.searchsorted(self._first, ids, side="right") - 1
        starts = (ids - self._first[files]) * self.block_size + offsets[files]
        for i in np.unique(files):
            mine = np.flatnonzero(files == i)
            out[mine] = self._views[i][starts[mine]]
        return out

    def _draw_epoch(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys of the permutation, and the offset of the first window in each file. They come from raw PCG64 output, which
        NumPy promises never to change, so a resumed run continues in the same order."""
        raw = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(ROUNDS + len(self._slack))
        offsets = raw[ROUNDS:] % (self._slack + 1).astype(np.uint64)
        return raw[:ROUNDS], offsets.astype(np.int64)


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """The images of index (int64, in 0..n-1) under the permutation of 0..n-1 that the keys (uint64) select."""
    a = math.isqrt(n - 1) + 1 if n > 1 else 1
    b = -(-n // a)
    out = _feistel(index.astype(np.uint64), a, b, keys)
    while len(outside := np.flatnonzero(out >= n)):
        out[outside] = _feistel(out[outside], a, b, keys)
    return out.astype(np.int64)


def _feistel(x: np.ndarray, a: int, b: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of 0..a*b-1: x = left * b + right, and each round shifts one of the two by a hash of the other."""
    left, right = x // np.uint64(b), x % np.uint64(b)
    for i, key in enumerate(keys):
        if i % 2 == 0:
            left = (left + _mix(right ^ key) % np.uint64(a)) % np.uint64(a)
        else:
            right = (right + _mix(left ^ key) % np.uint64(b)) % np.uint64(b)
    return left * np.uint64(b) + right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every bit of the result depends on every bit of x (uint64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
