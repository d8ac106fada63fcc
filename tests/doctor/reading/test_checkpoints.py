"""Checkpoints: what nanoGPT's and fastgpt's files say, without running code."""

from __future__ import annotations

import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt.checkpoints import saver
from fastgpt.common import UserError
from fastgpt.config import ModelConfig, load_preset
from fastgpt.doctor.diagnosis import diagnose
from fastgpt.doctor.evidence import Evidence
from fastgpt.doctor.reading.checkpoints import is_checkpoint, newest, read_checkpoint
from fastgpt.model import GPT

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "bias": False, "vocab_size": 64}
PARAMETERS = 64 * 32 + 2 * 12 * 32 * 32 + 5 * 32


def nanogpt(prefix: str = "", **changes) -> dict:
    """What nanoGPT's train.py saves, of a tiny model: head and embedding are one tensor under two names."""
    shape = SHAPE | {k: changes.pop(k) for k in list(changes) if k in SHAPE}
    weights = GPT(ModelConfig(**shape)).state_dict()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return {
        "model": {prefix + name: tensor for name, tensor in weights.items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "model_args": shape | {"dropout": 0.1},
        "iter_num": 14500,
        "best_val_loss": torch.tensor(3.5696),
        "config": {"n_embd": 768, "learning_rate": 1e-3, "dataset": "fineweb", "compile": True, "max_iters": 20000},
    } | changes


@pytest.fixture
def saved(tmp_path):
    def save(state, name: str = "ckpt.pt", **options) -> Path:
        torch.save(state, tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_nanogpt_checkpoint(prefix, zipped, saved):
    facts = read_checkpoint(saved(nanogpt(prefix), _use_new_zipfile_serialization=zipped))
    assert (facts.kind, facts.shape, facts.step) == ("nanogpt", SHAPE, 14500)
    assert facts.best_val_loss == pytest.approx(3.5696)
    assert facts.parameters == PARAMETERS, "the tied head counted once, excluding position embeddings"
    assert facts.config.get("n_embd") == 768 and facts.config.get("dataset") == "fineweb"
    assert not facts.unread and not facts.config.unread


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_is_a_copy_of_the_embedding_counts_once(dtype, saved):
    state = nanogpt()
    state["model"]["lm_head.weight"] = state["model"]["lm_head.weight"].clone().to(dtype)
    assert read_checkpoint(saved(state)).parameters == PARAMETERS


def test_weights_in_fp8_are_passed_over(saved):
    state = nanogpt()
    state["model"]["extra"] = torch.zeros(4).to(torch.float8_e5m2)
    assert read_checkpoint(saved(state)).not_finite == []


def test_an_untied_head_counts(saved):
    state = nanogpt()
    state["model"]["lm_head.weight"] = torch.zeros(64, 32)
    assert read_checkpoint(saved(state)).parameters == PARAMETERS + 64 * 32


def test_biases_count_and_a_causal_mask_does_not(saved):
    state = nanogpt(bias=True)
    expected = sum(t.numel() for k, t in state["model"].items() if "wpe" not in k and k != "lm_head.weight")
    state["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    facts = read_checkpoint(saved(state))
    assert (facts.parameters, facts.shape["bias"]) == (expected, True)


def test_the_40m_model_is_counted_as_nanogpt_counts_it(saved):
    with torch.device("meta"):
        shapes = GPT(ModelConfig(n_embd=384)).state_dict()
    weights = {name: torch.zeros(()).expand(tensor.shape) for name, tensor in shapes.items()}
    state = nanogpt(model=weights, model_args=dict(n_layer=12, n_head=12, n_embd=384, block_size=1024))
    assert read_checkpoint(saved(state)).parameters == 40_560_000


def test_where_tensors_and_words_differ_the_tensors_count(saved):
    facts = read_checkpoint(saved(nanogpt(model_args=SHAPE | {"n_embd": 768})))
    assert facts.shape["n_embd"] == 32
    assert "says 768, its tensors 32" in facts.unread[0].why


@pytest.mark.parametrize("args", [None, {}, 3, {"n_layer": "x", "n_head": -1, "n_embd": None, "vocab_size": [1]}])
def test_damaged_words_leave_what_the_tensors_say(args, saved):
    facts = read_checkpoint(saved(nanogpt(model_args=args, iter_num="x", best_val_loss=torch.zeros(3), config=[1])))
    assert facts.shape == {k: v for k, v in SHAPE.items() if k != "n_head"}
    assert (facts.step, facts.best_val_loss, facts.config) == (None, None, None)


def test_a_bare_state_dict_is_read(saved):
    facts = read_checkpoint(saved(nanogpt()["model"]))
    assert facts.shape["n_layer"] == 2 and facts.step is None


def test_best_val_loss_that_was_never_set_is_none(saved):
    assert read_checkpoint(saved(nanogpt(best_val_loss=float("inf")))).best_val_loss is None


# --- fastgpt ---


def sections() -> dict:
    config = load_preset("demo").to_dict()
    config["model"].update(SHAPE)
    config["optim"]["lr"] = 2e-3
    return config


def folder(path: Path, step: int = 250, **weights: torch.Tensor) -> Path:
    """A checkpoint that is a folder, as a run writes it."""
    model = {**GPT(ModelConfig(**SHAPE)).state_dict(), **weights}
    state = {"config": sections(), "model": model, "optimizer": {"exp_avg": torch.ones(9, 9)}, "best_val_loss": 4.5}
    return Path(saver.save(path, step, state))


def test_a_fastgpt_folder(tmp_path):
    facts = read_checkpoint(folder(tmp_path))
    assert (facts.kind, facts.shape, facts.step, facts.best_val_loss) == ("fastgpt", SHAPE, 250, 4.5)
    assert facts.parameters == PARAMETERS
    assert facts.config.get("learning_rate") == 2e-3


@pytest.mark.parametrize("name", ["state.json", "tensors.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]", b'{"a": 1}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_fastgpt_folder_is_refused_in_one_sentence(name, content, tmp_path):
    path = folder(tmp_path)
    (path / name).unlink() if content is None else (path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint .* (is damaged|cannot be read)"):
        read_checkpoint(path)


def test_weights_of_a_fastgpt_folder_that_are_not_finite_are_found(tmp_path):
    broken = {"transformer.ln_f.weight": torch.full((32,), math.nan), "transformer.wpe.weight": torch.ones(16, 32)}
    broken["transformer.wpe.weight"][3, 4] = math.inf
    assert read_checkpoint(folder(tmp_path, **broken)).not_finite == [
        "transformer.wpe.weight",
        "transformer.ln_f.weight",
    ]


def test_a_fastgpt_folder_whose_tensors_are_cut_is_refused(tmp_path):
    path = folder(tmp_path)
    tensors = path / "tensors-00000.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-50])
    with pytest.raises(UserError, match="is damaged or cannot be read"):
        read_checkpoint(path)


def test_a_fastgpt_folder_alone_is_held_against_nothing_but_itself(tmp_path):
    """Seen: the presets' defaults were taken for its config, and a small model was "another shape than the config"."""
    report = diagnose(Evidence(checkpoint=read_checkpoint(folder(tmp_path))))
    assert report.figures.parameters == PARAMETERS and report.figures.config.get("learning_rate") == 2e-3
    assert [finding.check for finding in report.findings if finding.severity == "critical"] == []


def test_the_newest_of_a_folder(tmp_path, saved):
    assert newest(tmp_path) is None
    saved({}, "ckpt.pt")
    assert newest(tmp_path).name == "ckpt.pt"
    folder(tmp_path, 100)
    assert newest(tmp_path).name == "step-00000100"
    folder(tmp_path, 250)
    (tmp_path / "step-00000300").mkdir()  # not finished: no manifest
    assert newest(tmp_path).name == "step-00000250"
    assert is_checkpoint(newest(tmp_path), b"")


# --- what is refused ---


class Code:
    def __init__(self, canary: Path):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "pickle 5"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(form, tmp_path):
    path, canary = tmp_path / "ckpt.pt", tmp_path / "canary"
    state = nanogpt() | {"optimizer": Code(canary)}
    if form.startswith("pickle"):
        state.pop("model")
        path.write_bytes(pickle.dumps(state, protocol=5 if form.endswith("5") else 2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError) as refused:
        read_checkpoint(path)
    assert not canary.exists()
    assert "refused" in str(refused.value) and "\n" not in str(refused.value)
    if form in ("zip", "legacy"):
        assert re.search(r"would run _?io\.open", str(refused.value))  # with the underscore from Python 3.12 on


def test_objects_that_are_no_plain_data_are_refused_by_name(saved):
    with pytest.raises(UserError, match="loading it would run numpy"):
        read_checkpoint(saved(nanogpt(best_val_loss=np.float64(3.5))))


@pytest.mark.parametrize(
    "state", [[1, 2], "text", {}, {"model": {}}, {"model": {"weight": torch.ones(2)}}, {"a": torch.ones(2)}]
)
def test_another_programs_file_is_refused(state, saved):
    with pytest.raises(UserError, match=r"it is neither nanoGPT's nor fastgpt's|holds no GPT-2"):
        read_checkpoint(saved(state))


@pytest.mark.parametrize("keep", [5, 100, 5000, -100])
def test_a_truncated_file_is_refused_in_one_sentence(keep, saved):
    path = saved(nanogpt())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"is not a checkpoint that torch\.load reads|more than tensors"):
        read_checkpoint(path)


def test_flipped_bytes_never_give_a_traceback(saved):
    path = saved(nanogpt())
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(whole)
        for at in generator.integers(0, 6000, 5):
            damaged[at] = generator.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            read_checkpoint(path)
        except UserError as error:
            assert "\n" not in str(error)


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from fastgpt.doctor.reading.checkpoints import read_checkpoint
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert read_checkpoint(Path(sys.argv[1])).step == 14500
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_large_checkpoint_is_not_read_into_memory(saved):
    state = nanogpt()
    state["optimizer"] = {"state": {0: {"exp_avg": torch.zeros(50_000_000)}}}
    path = saved(state)
    assert path.stat().st_size > 2e8
    child = [sys.executable, "-c", MEASURE, str(path)]  # a process that has not held it: its peak is the reader's
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    printed = subprocess.run(child, env=environment, capture_output=True, text=True, check=True).stdout
    assert int(printed) / (1e6 if sys.platform == "darwin" else 1e3) < 50
