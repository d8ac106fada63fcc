"""Batches from token files, made ahead by a thread. Every window appears once per epoch, in an order that is a function
of (seed, epoch); ``windows`` defines both.

All windows of all epochs form one endless sequence: epoch 0 shuffled, epoch 1 shuffled, ... A step on R ranks takes the
next R * batch_size windows, and rank i the i-th batch_size of them. So ranks never overlap and always have equal batches,
and a batch at the end of an epoch continues into the next instead of being cut or dropped. The loader's state is the
number of windows taken, so it resumes at the very next one, also on another number of ranks or with another batch size.

Windows are fetched in blocks of many batches, since one batch of 4 x 32 tokens is not worth a call to NumPy. The state
counts the windows that were handed out, not those that the thread has ready.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from fastgpt.common import UserError, at_least
from fastgpt.data.verification import verify_files
from fastgpt.data.windows import ORDER, Windows

BLOCK_TOKENS = 1 << 17
"""Tokens per block, but at least one batch: 2 MiB as two int64 tensors."""
PREFETCH = 2
"""Blocks that the thread makes ahead."""


class TokenLoader:
    """Shuffled batches of rank ``rank`` of ``world_size``, and fixed ones for evaluation.

    Args:
        paths: shards (llm.c) or headerless uint16 files (nanoGPT), memory-mapped.
        block_size: tokens per row, T.
        batch_size: rows per batch and rank, B.
        vocab_size: if given, every id of every file is checked against it here (see ``verification``).
        eot: if given, batches have a third tensor: the number of each token's document within its row. A document begins
            with this id.

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
        eot: int | None = None,
    ) -> None:
        at_least(1, block_size=block_size, batch_size=batch_size, world_size=world_size)
        at_least(0, seed=seed)
        if not 0 <= rank < world_size:
            raise UserError(f"rank is {rank}: it must be in 0..{world_size - 1}")
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.position = 0
        """Windows taken so far by all ranks together, over all epochs."""
        self._windows = Windows(paths, block_size)
        if vocab_size is not None:
            verify_files(paths, vocab_size)
        self.windows = self._windows.count
        """Windows per epoch."""
        self.tokens = self._windows.tokens
        """Tokens in all files."""
        self._eot = eot
        self._step = world_size * batch_size
        # At most one epoch, since each epoch's order has to be drawn.
        self._batches_per_block = max(1, min(BLOCK_TOKENS // (batch_size * block_size), self.windows // self._step))
        self._ready: deque[tuple[Tensor, ...]] = deque()
        self._ahead: deque[Future[Tensor]] = deque()
        self._thread = _thread()
        self._device = torch.device("cpu")
        self._process = os.getpid()

    def next_batch(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        """Inputs x and targets y, int64 (batch_size, block_size), on the device; y is x one token later.

        With ``eot`` also document ids, int32 (batch_size, block_size): they start at 0 in each row and go up by
        one at each end-of-text. An exception in the thread is raised here, and the position stays where it is.
        """
        if not self._ready or torch.device(device) != self._device:
            self._next_block(torch.device(device))
        self.position += self._step
        return self._ready.popleft()

    def eval_batches(
        self, n: int, device: torch.device | str = "cpu", batch_size: int | None = None
    ) -> Iterator[tuple[Tensor, ...]]:
        """At most n batches (of ``batch_size`` rows, if given) of the same windows at every call, spread evenly over the data.
        All have one size, so the mean of their losses is the mean over tokens. ``next_batch`` is not affected.

        With too few windows there are fewer batches; with too few for one batch, one smaller batch.
        """
        size = max(1, min(batch_size or self.batch_size, self.windows // self.world_size))
        step = size * self.world_size
        n = max(1, min(n, self.windows // step))
        chosen = np.arange(n * step, dtype=np.int64) * self.windows // (n * step)
        for ids in chosen.reshape(n, self.world_size, size)[:, self.rank]:
            block = _to_block(self._windows.read(ids), 1, torch.device(device))
            yield _batches_of(block.to(device, non_blocking=True), self._eot)[0]

    def state_dict(self) -> dict[str, int]:
        return {
            "position": self.position,
            "seed": self.seed,
            "windows": self.windows,
            "block_size": self.block_size,
            "order": ORDER,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the very next window, in the order of the state's seed.

        A state from before ``ORDER`` 2 continues at the same place of an epoch that is shuffled differently.

        Raises:
            UserError: the state belongs to other data or another block_size, for which a position means nothing.
        """
        wrong = [
            f"{name} {state[name]} then, {getattr(self, name)} now"
            for name in ("windows", "block_size")
            if state[name] != getattr(self, name)
        ]
        if wrong:
            raise UserError(f"the data is not what the checkpoint was trained on ({'; '.join(wrong)})")
        at_least(0, position=state["position"], seed=state["seed"])
        self.position, self.seed = state["position"], state["seed"]
        self._forget()

    def close(self) -> None:
        """End the thread now. (``next_batch`` would start another.)"""
        self._forget()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = _thread()

    def _forget(self) -> None:
        """Drop the batches that are ready or being made: they no longer continue at ``position``."""
        self._ready.clear()
        for block in self._ahead:
            block.cancel()
        self._ahead.clear()

    def _next_block(self, device: torch.device) -> None:
        if device != self._device:
            self._device = device
            self._forget()
        if os.getpid() != self._process:  # a forked child inherits the queue but not the thread
            self._process, self._thread = os.getpid(), _thread()
            self._forget()
        try:
            block = self._from_thread()
        except BaseException:
            self._forget()
            raise
        self._ready.extend(_batches_of(block.to(device, non_blocking=True), self._eot))

    def _from_thread(self) -> Tensor:
        """The block at ``position``. When this returns, the thread is making the blocks after it."""
        span = self._batches_per_block * self._step
        while len(self._ahead) <= PREFETCH:
            start = self.position + len(self._ahead) * span
            self._ahead.append(self._thread.submit(self._make_block, start))
        return self._ahead.popleft().result()

    def _make_block(self, position: int) -> Tensor:
        """The batches of this rank from a position on, as one tensor (see ``_to_block``)."""
        steps = np.arange(self._batches_per_block, dtype=np.int64)[:, None] * self._step
        mine = position + self.rank * self.batch_size + steps + np.arange(self.batch_size)
        # A new thread is on GPU 0, and pinned memory belongs to a GPU.
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            return _to_block(self._windows.in_order(mine.ravel(), self.seed), len(steps), self._device)


def _thread() -> ThreadPoolExecutor:
    """Starts with its first task."""
    return ThreadPoolExecutor(1, "tokens")


def _to_block(rows: np.ndarray, batches: int, device: torch.device) -> Tensor:
    """uint16 (batches * B, T + 1) -> int64 (2, batches, B, T): all x, all y.

    For a GPU the memory is pinned. It is new each time: PyTorch's allocator reuses it only after the copy has been made.
    """
    block = torch.empty(
        (2, batches, len(rows) // batches, rows.shape[1] - 1), dtype=torch.int64, pin_memory=device.type == "cuda"
    )
    x, y = block.numpy().reshape(2, len(rows), -1)
    x[:], y[:] = rows[:, :-1], rows[:, 1:]
    return block


def _batches_of(block: Tensor, eot: int | None) -> list[tuple[Tensor, ...]]:
    """(x, y) or (x, y, document ids) of each batch of a block, as views."""
    x, y = block
    parts = (x, y) if eot is None else (x, y, (x == eot).cumsum(-1, dtype=torch.int32))
    return list(zip(*(part.unbind(0) for part in parts)))
