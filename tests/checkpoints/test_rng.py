"""A checkpoint is the same whoever saved it: 1 rank -> 2 ranks under fully_shard -> 1 rank, in one pair of gloo processes."""

from __future__ import annotations

import errno
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fastgpt.checkpoints import checkpoint, write
from fastgpt.checkpoints import folder as folder_module
from fastgpt.checkpoints import rng as rng_module
from fastgpt.checkpoints import saver as saver_module
from fastgpt.checkpoints.tree import split


def build(shard=lambda module: None):
    """Sizes that two ranks cannot share evenly, one row that only one of them can have, and a buffer that both do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 1))
    model.register_buffer("scale", torch.tensor(3.0))
    for module in (model[0], model[2], model):
        shard(module)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model, optimizer, steps):
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def plain(state):
    """A state's tensors by name, as bytes, whole."""
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).numpy().tobytes()
        for name, t in split(state)[1].items()
    }


def two_ranks(rank, folder, port):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from torch.distributed.fsdp import fully_shard

    model, optimizer = build(fully_shard)
    # 1 -> 2: what one rank saved comes back in shards, bit for bit.
    one = folder / "one" / "step-00000003"
    checkpoint.load_into(one, model, optimizer)
    whole = checkpoint.load(one)
    assert plain(checkpoint.state_of(model, optimizer)) == plain({k: whole[k] for k in ("model", "optimizer")})
    assert len(model[2].weight.to_local()) == (1 if rank == 0 else 0)
    assert ("rng" in whole) == (rank == 0)  # the second rank has no random state there

    # 2 -> 1, in the background while training goes on; something else on each rank is random states only.
    rng = {"cpu": torch.full((4,), rank, dtype=torch.uint8)}
    saver = saver_module.AsyncSaver(folder / "two", keep=1)
    saver.save(3, {**checkpoint.state_of(model, optimizer), "rng": rng, "loader": {"rank": rank}})
    train(model, optimizer, 1)
    saver.wait()
    assert (saver.last_error, saver.last_saved) == (None, folder / "two" / "step-00000003")
    mine = checkpoint.load(saver.last_saved, without=["model"])
    assert torch.equal(mine["rng"]["cpu"], rng["cpu"]) and mine["loader"] == {"rank": 0} and mine["world_size"] == 2

    # The disk is full for one rank: no rank has saved, both say why, and the next save succeeds.
    real = write.HashedFile.write
    if rank == 1:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        write.HashedFile.write = full
    saver.save(4, checkpoint.state_of(model, optimizer))
    saver.wait()
    assert "the checkpoint of step 4 was not saved: the disk of" in saver.last_error
    assert [path.name for path in folder_module.existing(folder / "two")] == ["step-00000003"]
    assert rank == 1 or not (folder / "two" / "step-00000004.partial").exists()
    write.HashedFile.write = real
    saver.save(5, checkpoint.state_of(model, optimizer))
    saver.close()
    assert saver.last_error is None

    # Back to three steps: sharded state over sharded state. Then the file for the single rank, synchronous.
    checkpoint.load_into(one, model, optimizer)
    path = saver_module.save(folder / "back", 3, checkpoint.state_of(model, optimizer))
    assert path == folder / "back" / "step-00000003"
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
def test_one_rank_to_two_to_one_bit_for_bit(tmp_path):
    model, optimizer = build()
    train(model, optimizer, 3)
    saved = {**checkpoint.state_of(model, optimizer), "rng": rng_module.rng_state()}
    saver_module.save(tmp_path / "one", 3, saved)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(two_ranks, args=(tmp_path, port), nprocs=2, start_method="spawn")

    path, damaged = checkpoint.newest_valid(tmp_path / "back")
    assert damaged == [] and len(list(path.glob("tensors-*.safetensors"))) == 2
    again, fresh = build()
    checkpoint.load_into(path, again, fresh)
    wanted = plain(checkpoint.state_of(model, optimizer))
    assert plain(checkpoint.state_of(again, fresh)) == wanted
    whole = checkpoint.load(path)
    assert whole["model"]["0.weight"].shape == (7, 5)
    assert plain({k: whole[k] for k in ("model", "optimizer")}) == wanted
    assert [p.name for p in folder_module.existing(tmp_path / "two")] == ["step-00000005"]
