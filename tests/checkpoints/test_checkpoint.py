"""Checkpoints: bit exact, whole or named as damaged, of the right shape, and unable to run code."""

from __future__ import annotations

import errno
import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from torch import nn

from fastgpt.checkpoints import checkpoint, folder, rng, saver, write
from fastgpt.checkpoints.saver import AsyncSaver
from fastgpt.checkpoints.tree import split
from fastgpt.common import UserError
from fastgpt.config import Config, ModelConfig
from fastgpt.model import GPT
from fastgpt.optim.adamw import FusedAdamW
from tests import processes

SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=64)


def save(out, step, **extra):
    return saver.save(out, step, {"config": Config().to_dict(), "x": torch.arange(1000), **extra})


def same(a, b):
    """Equal to the bit: NaN payloads and negative zeros too."""
    raw = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))


def trained(make_optimizer=adamw, steps=2):
    torch.manual_seed(0)
    model = GPT(SHAPE)
    optimizer = make_optimizer(model)
    for _ in range(steps):
        one_step(model, optimizer)
    return model, optimizer


def one_step(model, optimizer):
    x = torch.randint(64, (2, 8))
    model(x, x)[1].backward()
    optimizer.step()
    optimizer.zero_grad()


# --- what is saved is what is loaded --------------------------------------------------------------------------------


def test_tensors_of_every_dtype_and_layout_come_back_bit_for_bit(tmp_path):
    noise = torch.randint(0, 256, (64,), dtype=torch.uint8)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
    dtypes += (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    tensors = {str(dtype)[6:]: noise.view(dtype) for dtype in dtypes}  # any bit pattern: NaNs, denormals
    tensors |= {
        "bool": noise > 100,
        "odd": noise[:3],  # what follows it must still be aligned
        "scalar": torch.tensor(-0.0),
        "count": torch.tensor(2**62 + 1),
        "transposed": torch.randn(3, 5).t(),
        "strided": torch.randn(10, 4)[::3],
        "nothing": torch.empty(0, 7),
    }
    loaded = checkpoint.load(saver.save(tmp_path, 1, {"tensors": tensors}))["tensors"]
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        assert same(loaded[name], tensor), name


def test_plain_values_come_back_as_they_were(tmp_path):
    state = {
        "loss": 0.1 + 0.2,
        "none": None,
        "best_val_loss": float("inf"),
        "betas": (0.9, 0.95),
        "by_int": {0: {"a": [1, True, "é"]}, 7: ()},
        "odd key": {"$tensor": "not a reference", "a.b": 1},
        "deep": [({"x": torch.ones(2)},)],
    }
    loaded = checkpoint.load(saver.save(tmp_path, 12, state))
    assert loaded.pop("step") == 12 and loaded.pop("world_size") == 1
    assert torch.equal(loaded["deep"][0][0].pop("x"), state["deep"][0][0].pop("x"))
    assert loaded == state and type(loaded["by_int"][7]) is tuple


def test_tied_weights_are_stored_once_and_load_as_one_tensor(tmp_path):
    weight = torch.randn(100, 10)
    path = saver.save(tmp_path, 1, {"model": {"wte": weight, "head": weight, "half": weight[:50]}})
    with safe_open(path / "tensors-00000.safetensors", "pt") as file:  # and any tool can read it
        assert sorted(file.keys()) == ["model.half", "model.wte"]
        assert torch.equal(file.get_tensor("model.wte"), weight)
    loaded = checkpoint.load(path)["model"]
    assert loaded["head"] is loaded["wte"] and torch.equal(loaded["half"], weight[:50])


@pytest.mark.parametrize(
    ("state", "error", "words"),
    [
        ({"model": {"f": print}}, TypeError, "model.f is a builtin_function_or_method"),
        ({"out": Path("x")}, TypeError, "out is a "),
        ({"a": {"b.c": torch.ones(1)}, "a.b": {"c": torch.ones(1)}}, ValueError, "both called a.b.c"),
    ],
)
def test_a_state_that_cannot_be_stored_is_refused_and_leaves_nothing(tmp_path, state, error, words):
    with pytest.raises(error, match=words):
        saver.save(tmp_path, 1, state)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [adamw, lambda m: FusedAdamW(m.parameters(), lr=1e-2)], ids=["AdamW", "FusedAdamW"])
def test_model_and_optimizer_go_on_bit_for_bit(tmp_path, kind):
    model, optimizer = trained(kind)
    path = saver.save(tmp_path, 2, {**checkpoint.state_of(model, optimizer), "rng": rng.rng_state()})
    one_step(model, optimizer)
    again = GPT(SHAPE)
    fresh = kind(again)
    checkpoint.load_into(path, again, fresh)
    rng.set_rng_state(checkpoint.load(path, only=["rng"])["rng"])
    one_step(again, fresh)
    assert all(same(a, b) for a, b in zip(model.parameters(), again.parameters()))
    for a, b in zip(model.parameters(), again.parameters()):
        for key, value in optimizer.state[a].items():
            assert same(value, fresh.state[b][key]), key


def test_hyperparameters_are_not_the_checkpoints_and_the_order_of_groups_is_free(tmp_path):
    model, optimizer = trained()
    path = saver.save(tmp_path, 2, checkpoint.state_of(model, optimizer))
    again = GPT(SHAPE)
    parameters = list(again.parameters())
    other = torch.optim.AdamW([{"params": parameters[2:], "weight_decay": 0.5}, {"params": parameters[:2]}], lr=3.0)
    checkpoint.load_into(path, again, other)
    assert [group["lr"] for group in other.param_groups] == [3.0, 3.0]
    assert other.param_groups[0]["weight_decay"] == 0.5
    for a, b in zip(model.parameters(), again.parameters()):
        assert same(optimizer.state[a]["exp_avg_sq"], other.state[b]["exp_avg_sq"])


def test_parts_can_be_loaded_alone(tmp_path, monkeypatch):
    model, optimizer = trained()
    state = {"config": {"model": {"n_layer": 1}}, "best_val_loss": 3.5, **checkpoint.state_of(model, optimizer)}
    path = saver.save(tmp_path, 9, state)
    assert set(checkpoint.load(path, only=["config", "model"])) == {"config", "model", "step", "world_size"}
    monkeypatch.delattr("safetensors.safe_open")  # no tensor can be read from here on
    assert set(checkpoint.load(path, without=["model", "optimizer"])) == {
        "config", "best_val_loss", "step", "world_size",
    }  # fmt: skip


def test_one_of_a_later_format_is_not_misread(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 3}))
    with pytest.raises(UserError, match="its format is 3, and this version reads 2"):
        checkpoint.load(path)


# --- another model --------------------------------------------------------------------------------------------------


def test_another_shape_is_refused_with_every_differing_key(tmp_path):
    path = save(tmp_path, 1)
    saved = checkpoint.load(path)["config"]
    checkpoint.check_shape(saved, replace(ModelConfig(), dropout=0.3), path)  # dropout is not shape
    with pytest.raises(UserError) as error:
        checkpoint.check_shape(saved, ModelConfig(n_embd=384, bias=True), path)
    for words in ("n_embd: 768 -> 384", "bias: False -> True", str(path)):
        assert words in str(error.value)
    assert "n_layer" not in str(error.value)


def test_weights_that_do_not_fit_are_all_named_and_nothing_is_changed(tmp_path):
    model, optimizer = trained()
    path = saver.save(tmp_path, 1, checkpoint.state_of(model, optimizer))
    other = GPT(replace(SHAPE, vocab_size=128, n_layer=2)).to(torch.bfloat16)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(UserError) as error:
        checkpoint.load_into(path, other)
    for words in (
        "transformer.wte.weight: (64, 32) float32 -> (128, 32) bfloat16",
        "transformer.h.1.ln_1.weight is missing",
        "transformer.ln_f.weight: (32,) float32 -> (32,) bfloat16",
    ):
        assert words in str(error.value)
    assert all(same(a, b) for a, b in zip(before, other.parameters()))
    with pytest.raises(UserError, match=r"transformer\.h\.0\.ln_1\.bias is not in the model"):
        with_bias = GPT(replace(SHAPE, bias=True))
        checkpoint.load_into(saver.save(tmp_path, 2, {"model": with_bias.state_dict()}), GPT(SHAPE))


def test_an_optimizer_of_another_model_is_the_callers_error(tmp_path):
    model, optimizer = trained()
    path = saver.save(tmp_path, 1, checkpoint.state_of(model, optimizer))
    with pytest.raises(ValueError, match="not the model's"):
        checkpoint.load_into(path, GPT(SHAPE), optimizer)


# --- 1 rank -> 2 ranks under fully_shard -> 1 rank, in one pair of gloo processes -------------------------------------


def uneven(shard=lambda module: None):
    """Sizes that two ranks cannot share evenly, one row that only one of them can have, and a buffer that both do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 1))
    model.register_buffer("scale", torch.tensor(3.0))
    for module in (model[0], model[2], model):
        shard(module)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train_uneven(model, optimizer, steps):
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


def two_ranks(rank, out, port):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from torch.distributed.fsdp import fully_shard

    model, optimizer = uneven(fully_shard)
    # 1 -> 2: what one rank saved comes back in shards, bit for bit.
    one = out / "one" / "step-00000003"
    checkpoint.load_into(one, model, optimizer)
    whole = checkpoint.load(one)
    assert plain(checkpoint.state_of(model, optimizer)) == plain({k: whole[k] for k in ("model", "optimizer")})
    assert len(model[2].weight.to_local()) == (1 if rank == 0 else 0)
    assert ("rng" in whole) == (rank == 0)  # the second rank has no random state there

    # 2 -> 1, in the background while training goes on; something else on each rank is random states only.
    own = {"cpu": torch.full((4,), rank, dtype=torch.uint8)}
    background = AsyncSaver(out / "two", keep=1)
    background.save(3, {**checkpoint.state_of(model, optimizer), "rng": own, "loader": {"rank": rank}})
    train_uneven(model, optimizer, 1)
    background.wait()
    assert background.last_error is None and folder.existing(out / "two") == [out / "two" / "step-00000003"]
    mine = checkpoint.load(out / "two" / "step-00000003", without=["model"])
    assert torch.equal(mine["rng"]["cpu"], own["cpu"]) and mine["loader"] == {"rank": 0} and mine["world_size"] == 2

    # The disk is full for one rank: no rank has saved, both say why, and the next save succeeds.
    if rank == 1:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        write.open = full
    background.save(4, checkpoint.state_of(model, optimizer))
    background.wait()
    assert "the checkpoint of step 4 was not saved: the disk of" in background.last_error
    assert [path.name for path in folder.existing(out / "two")] == ["step-00000003"]
    assert rank == 1 or not (out / "two" / "step-00000004.partial").exists()
    if rank == 1:
        del write.open
    background.save(5, checkpoint.state_of(model, optimizer))
    background.wait()
    assert background.last_error is None

    # Back to three steps: sharded state over sharded state. Then the file for the single rank, synchronous.
    checkpoint.load_into(one, model, optimizer)
    path = saver.save(out / "back", 3, checkpoint.state_of(model, optimizer))
    assert path == out / "back" / "step-00000003"
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of torch has no gloo")
def test_one_rank_to_two_to_one_bit_for_bit(tmp_path):
    model, optimizer = uneven()
    train_uneven(model, optimizer, 3)
    saved = {**checkpoint.state_of(model, optimizer), "rng": rng.rng_state()}
    saver.save(tmp_path / "one", 3, saved)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.ensure_server()
    mp.start_processes(two_ranks, args=(tmp_path, port), nprocs=2, start_method="forkserver")

    path, damaged = folder.newest_valid(tmp_path / "back")
    assert damaged == [] and len(list(path.glob("tensors-*.safetensors"))) == 2
    again, fresh = uneven()
    checkpoint.load_into(path, again, fresh)
    wanted = plain(checkpoint.state_of(model, optimizer))
    assert plain(checkpoint.state_of(again, fresh)) == wanted
    whole = checkpoint.load(path)
    assert whole["model"]["0.weight"].shape == (7, 5)
    assert plain({k: whole[k] for k in ("model", "optimizer")}) == wanted
    assert [p.name for p in folder.existing(tmp_path / "two")] == ["step-00000005"]
