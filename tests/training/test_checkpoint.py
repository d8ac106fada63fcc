"""Checkpoints are whole or absent, refuse another shape, and never run code."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgpt.config import Config, ModelConfig
from fastgpt.errors import UserError
from fastgpt.training import checkpoint


def save(folder, step, keep=5, **extra):
    return checkpoint.save(folder, step, {"config": Config().to_dict(), "x": torch.arange(1000), **extra}, keep)


def test_round_trip_and_keep(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.existing(tmp_path)] == ["ckpt-00000010.pt", "ckpt-00000100.pt"]
    state = checkpoint.load(checkpoint.resolve(tmp_path))
    assert state["step"] == 100 and torch.equal(state["x"], torch.arange(1000))


def test_a_save_that_dies_leaves_the_old_one_whole(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def dies(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", dies)
    with pytest.raises(OSError):
        save(tmp_path, 2)
    assert [p.name for p in checkpoint.existing(tmp_path)] == ["ckpt-00000001.pt"]
    assert checkpoint.load(checkpoint.resolve(tmp_path))["step"] == 1


@pytest.mark.parametrize("size", [0, 10, 2000, -1])
def test_a_truncated_one_is_named_with_the_previous_good_one(tmp_path, size):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    bad.write_bytes(bad.read_bytes()[:size])
    with pytest.raises(UserError) as error:
        checkpoint.load(checkpoint.resolve(tmp_path))
    assert str(bad) in str(error.value) and str(good) in str(error.value)


def test_a_missing_one_is_named_with_the_previous_good_one(tmp_path):
    good = save(tmp_path, 1)
    with pytest.raises(UserError) as error:
        checkpoint.resolve(checkpoint.path_for(tmp_path, 7))
    assert "ckpt-00000007.pt does not exist" in str(error.value) and str(good) in str(error.value)
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.resolve(tmp_path / "empty") if (tmp_path / "empty").mkdir() is None else None


def test_another_shape_is_refused_with_every_differing_key(tmp_path):
    path = save(tmp_path, 1)
    saved = checkpoint.load(path)["config"]
    checkpoint.check_shape(saved, replace(ModelConfig(), dropout=0.3), path)  # dropout is not shape
    with pytest.raises(UserError) as error:
        checkpoint.check_shape(saved, ModelConfig(n_embd=384, bias=True), path)
    for words in ("n_embd: 768 -> 384", "bias: False -> True", str(path)):
        assert words in str(error.value)
    assert "n_layer" not in str(error.value)


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("ran-code"),))


def test_a_hostile_checkpoint_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, write in enumerate(
        (lambda p: p.write_bytes(pickle.dumps(Hostile())), lambda p: torch.save(Hostile(), p))
    ):
        path = checkpoint.path_for(tmp_path, number)
        write(path)
        with pytest.raises(UserError, match="not a fastgpt checkpoint"):
            checkpoint.load(path)
    assert not (tmp_path / "ran-code").exists()


def test_rng_state_repeats(tmp_path):
    state = checkpoint.rng_state()
    first = torch.rand(3)
    checkpoint.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))


def test_a_new_run_sets_an_earlier_one_aside(tmp_path):
    run = tmp_path / "run"
    assert checkpoint.set_aside(run) is None
    for number in (1, 2):
        save(run, 900)
        assert checkpoint.set_aside(run) == tmp_path / f"run.{number}"
        assert not run.exists()
    assert checkpoint.load(checkpoint.resolve(tmp_path / "run.1"))["step"] == 900
