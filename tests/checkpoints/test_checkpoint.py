"""Checkpoints: bit exact, whole or named as damaged, of the right shape, and unable to run code."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fastgpt.checkpoints import checkpoint, rng, saver
from fastgpt.checkpoints import folder as folder_module
from fastgpt.common import UserError
from fastgpt.config import Config, ModelConfig
from fastgpt.model import GPT
from fastgpt.optim.adamw import FusedAdamW

SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=64)


def save(folder, step, **extra):
    return saver.save(folder, step, {"config": Config().to_dict(), "x": torch.arange(1000), **extra})


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


def test_every_random_generator_repeats(tmp_path, device):
    def draw():
        numbers = [torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(1).tolist(), random.gauss(0, 1)]
        return numbers + ([torch.rand(3, device=device).tolist()] if device.type == "cuda" else [])

    random.gauss(0, 1), np.random.randn(1)  # both now hold back the second number of a pair
    path = saver.save(tmp_path, 1, {"rng": rng.rng_state()})
    first = draw()
    assert draw() != first
    rng.set_rng_state(checkpoint.load(path)["rng"])
    assert draw() == first
    rng.seed_all(7)
    first = draw()
    rng.seed_all(7)
    assert draw() == first


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
    monkeypatch.delattr("fastgpt.checkpoints.read.safe_open")  # no tensor can be read from here on
    assert set(checkpoint.load(path, without=["model", "optimizer"])) == {
        "config", "best_val_loss", "step", "world_size",
    }  # fmt: skip


# --- finding the one to resume from ---------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {"truncated": lambda p: p.write_bytes(p.read_bytes()[:-7]), "flipped": flip, "deleted": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "tensors.json", "tensors-00000.safetensors"])
def test_a_damaged_one_is_named_and_the_previous_used(tmp_path, name, damage):
    good, bad = save(tmp_path, 10), save(tmp_path, 20)
    DAMAGE[damage](bad / name)
    path, damaged = checkpoint.newest_valid(tmp_path)
    assert path == good and len(damaged) == 1 and str(bad) in damaged[0]
    assert name in damaged[0] or name == "manifest.json"
    with pytest.raises(UserError) as error:  # asked for by name: refused, with the previous one named
        checkpoint.load(bad)
    assert str(bad) in str(error.value) and str(good) in str(error.value)


def test_when_none_is_whole_each_is_named(tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2)]
    for path in paths:
        flip(path / "tensors-00000.safetensors")
    with pytest.raises(UserError) as error:
        checkpoint.newest_valid(tmp_path)
    assert all(str(path) in str(error.value) for path in paths)
    for nowhere in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(UserError, match="there is no checkpoint in"):
            checkpoint.newest_valid(nowhere)


def test_resolve_takes_a_run_or_a_checkpoint(tmp_path):
    good, newest = save(tmp_path, 1), save(tmp_path, 2)
    assert checkpoint.resolve(tmp_path) == newest and checkpoint.resolve(good) == good
    with pytest.raises(UserError) as error:
        checkpoint.resolve(tmp_path / "step-00000007")
    assert "step-00000007 does not exist" in str(error.value) and str(newest) in str(error.value)


def test_one_of_a_later_format_is_not_misread(tmp_path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 3}))
    with pytest.raises(UserError, match="its format is 3, and this version reads 2"):
        checkpoint.load(path)


def test_a_new_run_sets_an_earlier_one_aside(tmp_path):
    run = tmp_path / "run"
    assert folder_module.set_aside(run) is None
    for number in (1, 2):
        save(run, 900)
        assert folder_module.set_aside(run) == tmp_path / f"run.{number}"
        assert not run.exists()
    assert checkpoint.load(checkpoint.resolve(tmp_path / "run.1"))["step"] == 900


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
