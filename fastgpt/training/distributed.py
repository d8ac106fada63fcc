"""The ranks of a run: one process per GPU, started by torchrun; without it, a world of one and nothing to do.

Every rank runs the same loop in the same order. What they must agree on goes through ``World``; the tokens of a step are
split between them, never multiplied, so that a run means the same on one GPU and on eight.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgpt.common import UserError, first_line, report


@dataclass(frozen=True)
class World:
    """This process among ``size``; collectives are called by all ranks, in one order."""

    rank: int = 0
    size: int = 1
    store: dist.Store | None = None
    """Where ranks leave plain values for each other: needs no group and no GPU. None in a world of one."""
    _turns: Iterator[int] = field(default_factory=count, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this rank prints, evaluates HellaSwag and writes metrics."""
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all ranks, on every rank."""
        if self.size == 1:
            return value
        total = value.clone()  # gloo has no average
        dist.all_reduce(total)
        return total / self.size

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank. Goes over the CPU's group: does not wait for a GPU."""
        return flag if self.size == 1 else self.mean(torch.tensor(float(flag))).item() > 0

    def gather(self, value: Any) -> list[Any]:
        """A plain value of every rank (what JSON can hold), by rank, on every rank. Goes over the store."""
        if self.store is None:
            return [value]
        turn = next(self._turns)
        self.store.set(f"{turn}/{self.rank}", json.dumps(value))
        keys = [f"{turn}/{rank}" for rank in range(self.size)]
        while not self.store.check(keys):  # the watch ends this process if one never comes
            time.sleep(0.01)
        return [json.loads(self.store.get(key)) for key in keys]

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise UserError on every rank, naming the first of ``facts`` in which one differs from rank 0."""
        first, *others = self.gather(facts)
        for rank, theirs in enumerate(others, 1):
            for name in {**first, **theirs}:
                if first.get(name) != theirs.get(name):
                    raise UserError(
                        f"the ranks of this run disagree: {name} is {first.get(name)!r} on rank 0 and {theirs.get(name)!r} on "
                        f"rank {rank}: start every rank with the same command and the same files"
                    )


def place() -> tuple[int, int, int]:
    """(rank, number of ranks, rank on this machine), as torchrun says in environment variables; (0, 1, 0) without them. Raises
    UserError for values that cannot be."""
    size = _variable("WORLD_SIZE", 1, 2**16 - 1, 1)
    unset = 0 if size == 1 else None
    if size > 1:
        _variable("MASTER_PORT", 1, 2**16 - 1, None)
        if not os.environ.get("MASTER_ADDR"):
            raise UserError("MASTER_ADDR is not set but WORLD_SIZE is: start with torchrun, or unset WORLD_SIZE")
    return _variable("RANK", 0, size - 1, unset), size, _variable("LOCAL_RANK", 0, size - 1, unset)


def _variable(name: str, least: int, most: int, unset: int | None) -> int:
    text = os.environ.get(name)
    if text is None and unset is not None:
        return unset
    if text is None:
        raise UserError(f"{name} is not set but WORLD_SIZE is: start with torchrun, or unset WORLD_SIZE")
    if not (text.strip().isdecimal() and least <= int(text) <= most):
        raise UserError(
            f"{name} is {text!r} in the environment: it must be a whole number from {least} to {most}; start with torchrun, "
            "which sets it, or unset it"
        )
    return int(text)


@contextmanager
def connect(device: torch.device, patience: float = 60.0) -> Iterator[tuple[World, torch.device]]:
    """Join the ranks that torchrun started: yields the world and this rank's device; leaves the group at the end. Where this
    rank fails the others end, too, and say why; where another is gone for ``patience`` seconds this process ends.

    Raises UserError for a place among the ranks that cannot be.
    """
    rank, size, local = place()
    if size == 1:
        yield World(), device
        return
    from fastgpt.training.watch import Watch, restart

    store = _store(rank, size, patience)
    watch = Watch(store, rank, size, patience, end=partial(_end, size))
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        if device.type == "cuda":
            if local >= torch.cuda.device_count():
                raise UserError(
                    f"nproc_per_node is more than {local} but there are {torch.cuda.device_count()} GPUs: start one process "
                    "per GPU"
                )
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        # gloo as well on a GPU: for flags, and for checkpoints, which are planned and written over it in the background.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank, world_size=size)
        yield World(rank, size, store), device
        watch.stop()
        watch.leave()
        dist.destroy_process_group()
        signal.signal(signal.SIGTERM, before)
    except BaseException as error:
        # An orderly end would wait for the other ranks. This one takes seconds at most, and is not to be interrupted.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        watch.stop()
        if isinstance(error, UserError):
            watch.fail(str(error))
            _end(size, str(error))
        if isinstance(error, KeyboardInterrupt):
            watch.fail("it was interrupted")
            leave(size, 130)
        lost = isinstance(error, (dist.DistBackendError, dist.DistNetworkError, _Terminated))
        if lost or (isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))):
            # Two looks: the first may find a sign of life from before.
            reason = watch.reason() or watch.reason()
            _end(size, reason or f"another rank of this run is gone, or was stopped, {restart(rank)}")
        watch.fail(f"{type(error).__name__}: {first_line(error)}")
        traceback.print_exception(error)
        leave(size, 1)


class _Terminated(BaseException):
    """SIGTERM while nothing is there to save: torchrun sends it to all when one rank has failed."""


def _terminate(*_: object) -> None:
    raise _Terminated


def _store(rank: int, size: int, patience: float) -> dist.Store:
    """What connects the ranks, of this start of theirs. Raises UserError if it does not answer."""
    try:
        store, *_ = next(iter(dist.rendezvous("env://", rank, size, timeout=timedelta(seconds=patience))))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"rank {rank} cannot join the other {size - 1} at {where} ({first_line(error)})") from error
    return dist.PrefixStore(f"fastgpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _end(size: int, sentence: str) -> None:
    report(UserError(sentence))
    leave(size, 2)


def parallelize(
    model: nn.Module, blocks: nn.ModuleList, kind: str, world: World
) -> tuple[nn.Module, Callable[[bool], None]]:
    """Spread ``model`` over the ranks: (what to call for the forward pass, a switch for gradient synchronisation).

    kind "ddp": a whole model on each rank. "fsdp": parameters, gradients and optimizer state in shards, each of ``blocks``
    gathered while it is needed (FSDP2, ``fully_shard``), in place. The switch is set before a micro-batch's forward pass:
    only the last of a step has to exchange gradients.
    """
    if world.size == 1:
        return model, lambda last: None
    if kind == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        on_cuda = next(model.parameters()).is_cuda
        wrapped = DistributedDataParallel(model, device_ids=[torch.cuda.current_device()] if on_cuda else None)

        def switch(last: bool) -> None:
            wrapped.require_backward_grad_sync = last

        return wrapped, switch
    from torch.distributed.fsdp import fully_shard

    from fastgpt.kernels import working_copy

    # FSDP refills the storage of gathered parameters without raising their version: no copy of them can be trusted.
    working_copy.enabled = False
    for block in blocks:
        fully_shard(block)
    sharded = fully_shard(model)
    return model, sharded.set_requires_gradient_sync


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and for FSDP the outermost parameters gathered: methods other than ``forward`` find them, and after forward
    passes without a backward pass nothing else would release them."""
    from torch.distributed.fsdp import FSDPModule

    from fastgpt.kernels.working_copy import copies_kept

    model.eval()
    if isinstance(model, FSDPModule):
        model.unshard()
    try:
        with copies_kept():
            yield
    finally:
        if isinstance(model, FSDPModule):
            model.reshard()
        model.train()


def leave(world_size: int, code: int) -> None:
    """End this process if it is one rank of several, now: while Python takes FSDP's groups apart, C++ threads that are still
    joined to them now and then abort it (seen with torch 2.13 and gloo), and torchrun would report a failure."""
    if world_size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
