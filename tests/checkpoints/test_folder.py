"""Which checkpoint of a folder is meant: the newest whole one, or the one named; and an earlier run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastgpt.checkpoints import checkpoint, folder, saver
from fastgpt.common import UserError


def save(out, step):
    return saver.save(out, step, {"x": torch.arange(1000)})


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
    path, damaged = folder.newest_valid(tmp_path)
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
        folder.newest_valid(tmp_path)
    assert all(str(path) in str(error.value) for path in paths)
    for nowhere in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(UserError, match="there is no checkpoint in"):
            folder.newest_valid(nowhere)


def test_resolve_takes_a_run_or_a_checkpoint(tmp_path):
    good, newest = save(tmp_path, 1), save(tmp_path, 2)
    assert folder.resolve(tmp_path) == newest and folder.resolve(good) == good
    with pytest.raises(UserError) as error:
        folder.resolve(tmp_path / "step-00000007")
    assert "step-00000007 does not exist" in str(error.value) and str(newest) in str(error.value)


def test_a_run_that_cannot_be_renamed_is_said(tmp_path, monkeypatch):
    save(tmp_path / "run", 900)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=r"holds an earlier run and cannot be renamed \(Permission denied\): use"):
        folder.set_aside(tmp_path / "run")


@pytest.mark.parametrize("below", ["", "sub", "sub/sub"])
def test_a_new_run_does_not_begin_inside_a_checkpoint(tmp_path, below):
    """The rotation of the run around it would delete it, finished or not."""
    inside = save(tmp_path / "run", 900) / below
    for out in (inside, tmp_path / "run" / ".." / inside.relative_to(tmp_path)):
        with pytest.raises(UserError, match=r"a checkpoint, which its run deletes in time: name another folder"):
            folder.check_free(out)
    folder.check_free(tmp_path / "run")
    folder.check_free(tmp_path / "step-00000900")  # a name alone is no checkpoint


def test_a_new_run_sets_an_earlier_one_aside(tmp_path):
    run = tmp_path / "run"
    assert folder.set_aside(run) is None
    for number in (1, 2):
        save(run, 900)
        assert folder.set_aside(run) == tmp_path / f"run.{number}"
        assert not run.exists()
    assert checkpoint.load(folder.resolve(tmp_path / "run.1"))["step"] == 900
