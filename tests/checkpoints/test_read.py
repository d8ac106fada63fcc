"""A checkpoint from a stranger runs no code and allocates nothing absurd: it is refused in one sentence, or harmless."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from fastgpt.checkpoints import checkpoint, saver
from fastgpt.checkpoints.folder import newest_valid
from fastgpt.common import UserError
from fastgpt.config import ModelConfig
from fastgpt.model import GPT

SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=64)


def save(folder, step):
    return saver.save(folder, step, {"config": {}, "x": torch.arange(1000)})


class Hostile:
    def __reduce__(self):
        return (Path.touch, (Path("ran-code"),))


def forge(path, name, content):
    """Put ``content`` into a checkpoint, under a manifest that vouches for it."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def changed_json(path, name, change):
    content = json.loads((path / name).read_text())
    change(content)
    return json.dumps(content).encode()


def set_in(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


HOSTILE_JSON = {
    "outside the folder": ("tensors.json", set_in("x", "chunks", 0, "file", value="../../secret.safetensors")),
    "huge": ("tensors.json", lambda c: c["x"].update(shape=[2**50], chunks=[{**c["x"]["chunks"][0], "sizes": [2**50]}])),
    "longer than it is": ("tensors.json", set_in("x", "shape", value=[2000])),
    "another shape": ("tensors.json", lambda c: c["x"].update(shape=[10], chunks=[{**c["x"]["chunks"][0], "sizes": [10]}])),
    "other dimensions": ("tensors.json", set_in("x", "chunks", 0, "offsets", value=[])),
    "another dtype": ("tensors.json", set_in("x", "dtype", value="F64")),
    "unknown dtype": ("tensors.json", set_in("x", "dtype", value="object")),
    "a negative size": ("tensors.json", set_in("x", "shape", value=[-1])),
    "outside of the tensor": ("tensors.json", set_in("x", "chunks", 0, "offsets", value=[7])),
    "before the tensor": ("tensors.json", set_in("x", "chunks", 0, "offsets", value=[-1])),
    "one part on another": (
        "tensors.json",
        lambda c: c["x"].update(chunks=[{**c["x"]["chunks"][0], "offsets": [at], "sizes": [500]} for at in (0, 400)]),
    ),
    "more parts than ranks": (
        "tensors.json",
        lambda c: c["x"].update(chunks=[{**c["x"]["chunks"][0], "offsets": [i], "sizes": [i % 2]} for i in range(2000)]),
    ),
    "a step before the first": ("state.json", set_in("step", value=-1)),
    "a step in words": ("state.json", set_in("step", value="3")),
    "a list as state": ("state.json", set_in("state", value=[])),
    "a config that is a list": ("state.json", set_in("state", "config", value=[1])),
    "a section that is a number": ("state.json", set_in("state", "config", value={"data": 3})),
    "a size in words": ("state.json", set_in("state", "config", value={"model": {"n_layer": "2"}})),
    "a newer version's field": ("state.json", set_in("state", "config", value={"model": {"rope": True}})),
    "an unknown tokenizer": ("state.json", set_in("state", "config", value={"data": {"tokenizer": ["gpt2"]}})),
    "a best loss in words": ("state.json", set_in("state", "best_val_loss", value="low")),
    "a best loss that is none": ("state.json", set_in("state", "best_val_loss", value=float("nan"))),
    "no table": ("tensors.json", set_in("x", value=[])),
    "no step": ("state.json", lambda c: c.pop("step")),
    "no such tensor": ("state.json", set_in("state", "x", value={"$tensor": "y"})),
    "a list as a tensor": ("state.json", set_in("state", "x", value={"$tensor": ["x"]})),
    "a number as a tuple": ("state.json", set_in("state", "x", value={"$tuple": 5})),
    "numbers as items": ("state.json", set_in("state", "x", value={"$items": [5]})),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE_JSON)
def test_forged_tables_are_refused_in_one_sentence(tmp_path, what):
    path = save(tmp_path, 1)
    name, change = HOSTILE_JSON[what]
    forge(path, name, changed_json(path, name, change))
    with pytest.raises(UserError, match="is damaged or not a fastgpt checkpoint"):
        checkpoint.load(path)


def test_bottomless_json_is_refused(tmp_path):
    path = save(tmp_path, 1)
    for name in ("state.json", "tensors.json"):
        forge(path, name, b"[" * 200_000)
        with pytest.raises(UserError, match="is damaged or not a fastgpt checkpoint"):
            checkpoint.load(path)


def test_a_pickle_in_a_checkpoint_is_never_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps(Hostile())
    path = save(tmp_path / "run", 1)
    for name in (".metadata", "__0_0.distcp", "data.pkl"):  # where torch.distributed.checkpoint would look
        (path / name).write_bytes(evil)
    assert checkpoint.load(path)["step"] == 1 and newest_valid(tmp_path / "run")[1] == []
    for name in ("tensors-00000.safetensors", "state.json", "tensors.json"):  # in the place of a real file, vouched for
        bad = save(tmp_path / "bad", 1)
        forge(bad, name, evil + b" " * 9000)
        for read in (checkpoint.load, checkpoint.load_into):
            with pytest.raises(UserError):
                read(bad, *([GPT(SHAPE)] if read is checkpoint.load_into else []))
    forge(bad, "evil.pkl", evil)
    with pytest.raises(UserError, match=r"names a file 'evil\.pkl'"):
        checkpoint.load(bad)
    assert not (tmp_path / "ran-code").exists()


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "tensors.json", "tensors-00000.safetensors"])
def test_a_fifo_in_a_checkpoint_is_not_waited_for(tmp_path, name):
    path = save(tmp_path, 1)
    (path / name).unlink()
    os.mkfifo(path / name)
    if name != "manifest.json":
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name]["bytes"] = 0
        (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is damaged or not a fastgpt checkpoint"):
        checkpoint.load(path)
