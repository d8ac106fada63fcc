"""Batches from token shards: every window once per epoch, in an order that is one function of (seed, epoch).

A window is block_size + 1 tokens, and the next begins block_size later, so that every token but a file's first is the
target of exactly one window. A file of n tokens has w = (n - 1) // block_size windows; the r = n - 1 - w * block_size
targets left over (always fewer than block_size) are dropped, at its start, its end or both: each epoch begins at
another of the r + 1 offsets, so nothing is skipped for ever and the number of windows never changes.

All windows of all epochs form one endless sequence: epoch 0 shuffled, epoch 1 shuffled, ... Step s of a run on R ranks
takes the next R * batch_size of it, and rank i its i-th part. So ranks never overlap, a batch at the end of an epoch
goes on into the next rather than being cut or dropped, and the loader's whole state is how many windows were taken:
it resumes at the very next one, on another number of ranks or another batch size too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastgpt.data.shards import check_ids, open_shard
from fastgpt.errors import UserError


class TokenLoader:
    """Shuffled batches of rank ``rank`` of ``world_size``, and fixed ones for evaluation.

    Args:
        paths: shards (llm.c) or headerless uint16 files (nanoGPT), memory-mapped.
        block_size: tokens per row, T.
        batch_size: rows per batch and rank, B.
        vocab_size: if given, every id of every file is checked against it here.

    Raises:
        UserError: a file is damaged or holds other ids, or all files together hold no window.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        block_size: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        for name, value in (("block_size", block_size), ("batch_size", batch_size), ("world_size", world_size)):
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        if not 0 <= rank < world_size:
            raise UserError(f"rank is {rank}: it must be in 0..{world_size - 1}")
        if seed < 0:
            raise UserError(f"seed is {seed}: it must not be negative")
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.position = 0
        """Windows taken so far by all ranks together, over all epochs."""

        # Plain views: indexing np.memmap itself costs a Python-level wrapper each time.
        files = [np.asarray(open_shard(path)) for path in paths]
        if vocab_size is not None:
            for path, tokens in zip(paths, files):
                check_ids(tokens, vocab_size, path)
        targets = np.array([len(tokens) - 1 for tokens in files], dtype=np.int64)
        counts = targets // block_size
        self.windows = int(counts.sum())
        """Windows per epoch."""
        if self.windows == 0:
            names = ", ".join(repr(str(path)) for path in paths[:3]) or "no file"
            raise UserError(
                f"data ({names}) holds {max((len(f) for f in files), default=0)} tokens, fewer than block_size + 1 = "
                f"{block_size + 1}: use more text or a smaller block_size"
            )
        self.tokens = int(targets.sum() + len(files))
        self._slack = np.where(counts > 0, targets % block_size, 0)
        self._first = np.concatenate(([0], np.cumsum(counts)[:-1]))
        self._views = [
            np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1) if count else None
            for tokens, count in zip(files, counts)
        ]
        self._order = lru_cache(maxsize=2)(self._make_order)

    @property
    def epoch(self) -> int:
        """The epoch that the next window belongs to, from 0."""
        return self.position // self.windows

    def next_batch(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Inputs x and targets y, int64 (batch_size, block_size); y is x one token later."""
        mine = self.position + self.rank * self.batch_size + np.arange(self.batch_size)
        batch = np.empty((self.batch_size, self.block_size + 1), np.uint16)
        for epoch in range(int(mine[0]) // self.windows, int(mine[-1]) // self.windows + 1):
            rows = mine // self.windows == epoch
            order, offsets = self._order(epoch)
            batch[rows] = self.read(order[mine[rows] % self.windows], offsets)
        self.position += self.world_size * self.batch_size
        return _to_tensors(batch, device)

    def eval_batches(self, n: int, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """The same windows at every call, spread evenly over the data: at most n batches, all of one size, so that the
        mean of their losses is the mean over tokens. ``next_batch`` is not moved by it.

        Data with fewer windows than asked for gives fewer batches; with fewer than one batch, one smaller batch.
        """
        size = max(1, min(self.batch_size, self.windows // self.world_size))
        step = size * self.world_size
        n = max(1, min(n, self.windows // step))
        chosen = np.arange(n * step, dtype=np.int64) * self.windows // (n * step)
        for ids in chosen.reshape(n, self.world_size, size)[:, self.rank]:
            yield _to_tensors(self.read(ids), device)

    def read(self, ids: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
        """Windows by number, uint16 (len(ids), block_size + 1); ``offsets`` (one per file) shift where files begin."""
        file = np.searchsorted(self._first, ids, side="right") - 1
        start = (ids - self._first[file]) * self.block_size
        if offsets is not None:
            start += offsets[file]
        if file[0] == file[-1] and (file == file[0]).all():
            return self._views[file[0]][start]
        out = np.empty((len(ids), self.block_size + 1), np.uint16)
        for f in np.unique(file):
            rows = file == f
            out[rows] = self._views[f][start[rows]]
        return out

    def state_dict(self) -> dict[str, int]:
        return {
            "position": self.position,
            "seed": self.seed,
            "windows": self.windows,
            "block_size": self.block_size,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on at the very next window, in the order of the seed that the state was made with.

        Raises:
            UserError: the state belongs to other data or another block_size, where a position means nothing.
        """
        wrong = [
            f"{name} {state[name]} then, {getattr(self, name)} now"
            for name in ("windows", "block_size")
            if state[name] != getattr(self, name)
        ]
        if wrong:
            raise UserError(f"the data is not what the checkpoint was trained on ({'; '.join(wrong)})")
        self.position, self.seed = state["position"], state["seed"]
        self._order.cache_clear()

    def _make_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The order of the windows in an epoch, and where each file begins.

        From raw PCG64 output and a stable sort, not Generator.permutation: NumPy promises the former never to change,
        so a run resumed under another NumPy goes on in the same order.
        """
        files = len(self._slack)
        raw = np.random.PCG64(np.random.SeedSequence([self.seed, epoch])).random_raw(files + self.windows)
        offsets = raw[:files] % (self._slack + 1).astype(np.uint64)
        return np.argsort(raw[files:], kind="stable"), offsets.astype(np.int64)


def _to_tensors(batch: np.ndarray, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """uint16 (B, T + 1) -> x, y int64 (B, T), copied to a GPU without waiting for it.

    The pinned memory is new each time: PyTorch's allocator hands it out again only after the copy has happened.
    """
    device = torch.device(device)
    rows, width = batch.shape
    both = torch.empty((2, rows, width - 1), dtype=torch.int64, pin_memory=device.type == "cuda")
    x, y = both.numpy()
    x[:], y[:] = batch[:, :-1], batch[:, 1:]
    both = both.to(device, non_blocking=True)
    return both[0], both[1]
