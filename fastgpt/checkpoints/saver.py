"""Saving a checkpoint: at once, or in the background while training goes on."""

from __future__ import annotations

import math
import os
import platform
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastgpt.checkpoints.folder import clean, last_saved, rotate
from fastgpt.checkpoints.tree import split
from fastgpt.checkpoints.write import Shard, has_group, own_rank, write
from fastgpt.common import first_line, why_unwritten


def save(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write ``state`` as the checkpoint of ``step`` (steps done) and return its path; all ranks call it.

    Raises OSError if it cannot be written: then nothing has changed in the folder, and the earlier ones are whole."""
    return write(folder, step, *_parts(step, state, is_best=False))


class AsyncSaver:
    """Saves into ``folder`` from a background thread, one checkpoint at a time, and keeps the last ``keep`` and the best.

    Several GPUs: every rank has one and calls ``save`` at the same steps; the threads talk over a gloo group of their own.
    Making one removes what a killed save left in the folder.

    Nothing that goes wrong with the disk is raised: the earlier checkpoints stay whole, the partial one is removed,
    ``last_error`` says it in a sentence, and the next ``save`` tries again.

    As a context manager it waits for the save under way, but not after a KeyboardInterrupt: that leaves at once."""

    last_error: str | None = None
    """Why the latest finished save failed, in one sentence; None if it did not. The same on every rank."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._thread: threading.Thread | None = None
        self._saved: Path | None = None
        self._trouble: tuple[Any, ...] | None = None
        self._news: list[str] = []
        if own_rank() == 0:
            try:
                clean(folder)
            except OSError as error:
                self._news.append(f"leftovers of a killed save in {folder} cannot be removed ({error.strerror})")
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=10)) if has_group() else None

    def save(self, step: int, state: Mapping[str, Any], *, is_best: bool = False) -> None:
        """Copy ``state`` to the host and begin to write it as the checkpoint of ``step`` (steps done). Returns when the copy
        is made: training may change everything at once. Waits first for an earlier save.

        ``is_best``: ``state["best_val_loss"]`` is the validation loss (nats) of these very weights, and the lowest so far.
        That is checked against what the folder holds: the best kept is never replaced by a worse one.

        Raises TypeError for a state that is not tensors and plain values, whatever torch raises while copying, and nothing
        else."""
        self.wait()
        header, own, tensors = _parts(step, state, is_best)
        copies = _on_host(tensors)
        self._thread = threading.Thread(
            target=self._run, args=(step, header, own, copies), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when no save is under way. A signal handler's exception gets through."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def check(self) -> None:
        """Note it as ``last_error`` if the checkpoint that was saved last is no longer there."""
        if self.last_error is None and self._saved is not None and not os.path.exists(self._saved):
            self.last_error = f"checkpoint {self._saved} is gone: it was deleted or moved away after it had been saved"
            self._news.append(self.last_error)

    def news(self) -> list[str]:
        """What has happened since the last call, a sentence each: saved, or not saved and why."""
        taken = len(self._news)
        sentences, self._news[:taken] = self._news[:taken], []
        return sentences

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not issubclass(kind, KeyboardInterrupt):
            self.wait()

    def _run(self, step: int, header: dict[str, Any], own: Any, copies: dict[str, Any]) -> None:
        start = time.perf_counter()
        try:
            path = self._saved = write(self.folder, step, header, own, copies, self._group)
        except BaseException as error:
            self.last_error = _failure(self.folder, step, error)
            trouble = type(error), getattr(error, "errno", None)
            if trouble != self._trouble:  # a disk that stays full is said once
                self._news.append(f"{self.last_error}; the next save tries again")
            self._trouble = trouble
            return
        self.last_error = self._trouble = None
        self._news.append(f"saved {path} (in the background, {time.perf_counter() - start:.1f} s)")
        try:
            if own_rank() == 0:
                rotate(self.folder, self.keep)
        except OSError as error:
            self._news.append(f"older checkpoints in {self.folder} cannot be deleted ({error.strerror})")


@torch.no_grad()
def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor | Shard]:
    """Copies of the values at this point of the current stream; waits until they are there. They lie in pinned memory, which
    PyTorch keeps when it is freed, so that the next save pins nothing."""
    copies: dict[str, Tensor | Shard] = {}
    devices = set()
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        try:
            host = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        except RuntimeError:  # the system allows no more pinned memory: slower, but it works
            host = torch.empty(local.shape, dtype=local.dtype)
        copies[name] = host.copy_(local, non_blocking=True)
        devices |= {local.device} if local.is_cuda else set()
        if isinstance(tensor, DTensor):
            [chunk] = tensor.__create_chunk_list__()  # fully_shard gives each rank one piece
            copies[name] = Shard(host, tensor.shape, chunk)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return copies


def _parts(step: int, state: Mapping[str, Any], is_best: bool) -> tuple[dict[str, Any], Any, dict[str, Any]]:
    """(content of state.json, this rank's own tree, tensors by name) of a state."""
    tree, tensors = split({key: value for key, value in state.items() if key != "rng"})
    own, own_tensors = split({"rng": state["rng"]} if "rng" in state else {}, f"rank{own_rank()}")
    loss = state["best_val_loss"] if is_best else None
    header = {
        "step": step,
        "best": loss if loss is not None and math.isfinite(loss) else None,
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
        "state": tree,
    }
    return header, own, {**tensors, **own_tensors}


def _failure(folder: Path, step: int, error: BaseException) -> str:
    reason = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, OSError):
        reason = why_unwritten(error, folder)
    earlier = last_saved(folder)
    good = f"the last good checkpoint is {earlier}" if earlier else "there is no checkpoint yet"
    return f"the checkpoint of step {step} was not saved: {reason}; {good}"
