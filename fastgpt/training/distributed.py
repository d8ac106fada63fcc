"""The ranks of a run: one process per GPU, started by torchrun; without it, a world of one and nothing to do.

Every rank runs the same loop in the same order. What they must agree on goes through ``World``; the tokens of a step are
split between them, never multiplied, so that a run means the same on one GPU and on eight.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgpt.common import UserError, report


@dataclass(frozen=True)
class World:
    """This process among ``size``; collectives are called by all ranks, in one order."""

    rank: int = 0
    size: int = 1

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

    def broadcast(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        if self.size == 1:
            return text
        box = [text]
        dist.broadcast_object_list(box)
        return box[0]


@contextmanager
def connect(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """Join the ranks that torchrun started: yields the world and this rank's device; leaves the group at the end, and ends
    the process where another rank is gone.

    Raises UserError for more ranks than GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(), device
        return
    local = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"nproc_per_node is more than {local} but there are {torch.cuda.device_count()} GPUs: start one process per GPU"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # gloo as well on a GPU: for flags, and for checkpoints, which are planned and written over it in the background.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    world = World(dist.get_rank(), dist.get_world_size())
    try:
        yield world, device
    except RuntimeError as error:
        lost = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
        if lost or "gloo" in str(error) or "NCCL" in str(error):
            sentence = (
                f"another rank of this run is gone, so rank {world.rank} stops: start again with --resume (on any number of "
                "GPUs that divides grad_accum)"
            )
            report(UserError(sentence))
            leave(world.size, 2)  # an orderly end would wait for the rank that is gone
        raise
    finally:
        dist.destroy_process_group()


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

    model.eval()
    if isinstance(model, FSDPModule):
        model.unshard()
    try:
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
