"""fastgpt.convert: round trips bit for bit, the same function on both sides, and one sentence for what does not fit."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import shutil
import signal
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from bench.steps import nanogpt as nanogpt_model
from fastgpt import convert
from fastgpt.checkpoints import checkpoint, folder, lock, rng, saver
from fastgpt.checkpoints.formats import any, huggingface, nanogpt, own
from fastgpt.checkpoints.formats.portable import Portable, check_optimizer
from fastgpt.common import UserError
from fastgpt.config import Config, DataConfig, ModelConfig, load_preset
from fastgpt.data.tokenizer import CharTokenizer, get_tokenizer
from fastgpt.doctor.reading.checkpoints import read_checkpoint
from fastgpt.model import GPT
from fastgpt.training.evaluation import load_model

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 40, "block_size": 16}


def batch():
    return torch.randint(0, 40, (2, 9))


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def bias(request):
    return request.param


def nanogpt_checkpoint(path, bias=True, steps=2, prefix=""):
    """A ckpt.pt as nanoGPT's train.py writes it, and the model."""
    args = {**SHAPE, "bias": bias, "dropout": 0.1}
    model = nanogpt_model.GPT(nanogpt_model.GPTConfig(**args))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    for _ in range(steps):
        model(batch(), batch())[1].backward()
        optimizer.step()
    saved = {
        "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": steps,
        "best_val_loss": torch.tensor(3.25),
        "config": {"dataset": "shakespeare", "learning_rate": 1e-3},
    }
    torch.save(saved, path)
    return saved, model.eval()


def tables(depth):
    return [] if not depth else [tables(depth - 1)]


CYCLE: list = []
CYCLE.append(CYCLE)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"model": {"transformer.wte.weight": torch.zeros(1).expand(2**40)}},
            r"a tensor \(1099511627776,\) of 4 bytes",
        ),
        ({"model": {"transformer.wte.weight": torch.zeros(40, 16).to_sparse()}}, "a tensor on the device cpu.*sparse"),
        ({"extra": torch.empty(3, device="meta")}, "a tensor on the device meta"),
        ({"extra": CYCLE}, "nested deeper than 100"),
        ({"extra": tables(200)}, "nested deeper than 100"),
    ],
    ids=["repeated", "sparse", "meta", "cycle", "deep"],
)
def test_what_torch_load_takes_and_no_checkpoint_holds_is_refused(tmp_path, change, why):
    saved, _ = nanogpt_checkpoint(tmp_path / "ckpt.pt")
    torch.save(saved | change, tmp_path / "ckpt.pt")
    for read in (nanogpt.read, read_checkpoint):  # convert's, and the doctor's
        with pytest.raises(UserError, match=why):
            read(tmp_path / "ckpt.pt")


def test_a_compressed_zip_is_refused_before_it_is_unpacked(tmp_path):
    nanogpt_checkpoint(tmp_path / "ckpt.pt")
    kind = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(tmp_path / "ckpt.pt") as theirs, zipfile.ZipFile(tmp_path / "bomb.pt", "w", kind) as bomb:
        for entry in theirs.infolist():
            bomb.writestr(entry.filename, theirs.read(entry))
    with pytest.raises(UserError, match="BadZipFile"):
        nanogpt.load_file(tmp_path / "bomb.pt")


def test_a_pickle_of_millions_of_opcodes_is_refused_before_torch_runs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(nanogpt, "MOST", 1000)
    monkeypatch.setattr(torch, "load", None)
    old = tmp_path / "old.pt"
    torch.save({"model": {}}, old, _use_new_zipfile_serialization=False)
    for opcode in (b"(", b"]", b"q\0", b"\x80\2"):
        (tmp_path / "bare.pt").write_bytes(b"\x80\2]" + 2000 * opcode)
        (tmp_path / "later.pt").write_bytes(old.read_bytes()[:15] + b"\x80\2]" + 2000 * opcode)
        with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\2]" + 2000 * opcode)
        for name in ("bare", "later", "zip"):
            with pytest.raises(UserError, match="more than 1,000 values: no checkpoint does"):
                nanogpt.load_file(tmp_path / f"{name}.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"fastgpt": {"config": 7}},
        {"fastgpt": {"config": {"data": 5}}},
        {"fastgpt": {"config": {"data": {"data": [1], "tokenizer": [1]}, "optim": {"lr": "x"}}, "loader": 1}},
        {"best_val_loss": torch.zeros(3)},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_a_file_may_say_anything_beside_its_model(tmp_path, capsys, change):
    saved, _ = nanogpt_checkpoint(tmp_path / "ckpt.pt")
    torch.save(saved | change, tmp_path / "ckpt.pt")
    for to in ("fastgpt", "hf"):
        assert convert.main([str(tmp_path / "ckpt.pt"), str(tmp_path / to), "--to", to]) == 0
    stays = "its dtype stays behind (dtype is a dtype: a checkpoint holds tensors and plain values only)"
    assert (stays in capsys.readouterr().out) == ("dtype" in change)


LETTERS = [chr(ord("0") + i) for i in range(39)] + ["\n"]


def letters_checkpoint(path):
    """A nanoGPT checkpoint of a model of characters, whose letters are in data/trains/meta.pkl beside its folder."""
    path.parent.mkdir()
    saved, _ = nanogpt_checkpoint(path)
    saved["config"]["dataset"] = "trains"
    torch.save(saved, path)
    data = path.parent.parent / "data" / "trains"
    data.mkdir(parents=True)
    meta = {"vocab_size": 40, "itos": dict(enumerate(LETTERS)), "stoi": {c: i for i, c in enumerate(LETTERS)}}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    return saved


def fastgpt_run(folder, bias=True, steps=2):
    """A run's folder with a checkpoint of a few steps, and the model."""
    shape = ModelConfig(**SHAPE, bias=bias)
    model = GPT(shape)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    for _ in range(steps):
        model(batch(), batch())[1].backward()
        optimizer.step()
    state = {
        "config": {
            **Config().to_dict(),
            "model": vars(shape),
            "data": {**Config().to_dict()["data"], "tokenizer": "bytes"},
        },
        **checkpoint.state_of(model, optimizer),
        "rng": rng.rng_state(),
        "best_val_loss": 2.5,
        "loader": {"epoch": 1},
    }
    folder.mkdir(exist_ok=True)
    saver.save(folder, steps, state)
    return model.eval()


def huggingface_folder(folder, **changes):
    config = GPT2Config(
        **{
            **{"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 40, "n_positions": 16},
            **{"bos_token_id": 0, "eos_token_id": 0, **changes},
        }
    )
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # biases too
    model.save_pretrained(folder)
    return model


def run(*args):
    return convert.main([str(arg) for arg in args])


def same(a, b):
    """Bit for bit, in values, dtypes and keys."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class TestRoundTrips:
    def test_nanogpt_through_fastgpt(self, tmp_path, bias):
        saved, _ = nanogpt_checkpoint(tmp_path / "ckpt.pt", bias)
        run(tmp_path / "ckpt.pt", tmp_path / "run", "--to", "fastgpt")
        run(tmp_path / "run", tmp_path / "back.pt")
        back = torch.load(tmp_path / "back.pt", weights_only=True)
        back.pop("fastgpt")
        assert same(back, saved)

    def test_fastgpt_through_nanogpt(self, tmp_path, bias):
        fastgpt_run(tmp_path / "run", bias)
        run(tmp_path / "run", tmp_path / "ckpt.pt")
        run(tmp_path / "ckpt.pt", tmp_path / "back", "--to", "fastgpt")
        before, after = (checkpoint.load(folder.resolve(tmp_path / name)) for name in ("run", "back"))
        after.pop("nanogpt"), after.pop("exact_gelu")
        assert same(after, before)

    def test_fastgpt_through_hugging_face(self, tmp_path, bias):
        fastgpt_run(tmp_path / "run", bias)
        run(tmp_path / "run", tmp_path / "hf")
        run(tmp_path / "hf", tmp_path / "back")
        before, after = (checkpoint.load(folder.resolve(tmp_path / name)) for name in ("run", "back"))
        assert same(after["model"], before["model"])
        assert same(after["config"]["model"], before["config"]["model"])
        assert after["config"]["data"]["tokenizer"] == "bytes"
        assert after["step"] == before["step"]

    def test_a_folder_to_publish_names_no_path_of_this_machine(self, tmp_path):
        fastgpt_run(tmp_path / "run")
        run(tmp_path / "run", tmp_path / "hf")
        assert json.loads((tmp_path / "hf" / "config.json").read_text())["fastgpt"].keys() == {
            "bias",
            "step",
            "tokenizer",
        }
        assert str(tmp_path) not in "".join(path.read_text("latin-1") for path in (tmp_path / "hf").iterdir())

    def test_hugging_face_through_fastgpt_and_nanogpt(self, tmp_path):
        huggingface_folder(tmp_path / "hf")
        run(tmp_path / "hf", tmp_path / "run")
        run(tmp_path / "run", tmp_path / "ckpt.pt")
        run(tmp_path / "ckpt.pt", tmp_path / "back", "--to", "hf")
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
        assert same(after, before)

    def test_the_exact_gelu_is_not_forgotten_on_the_way(self, tmp_path):
        huggingface_folder(tmp_path / "hf", activation_function="gelu")
        run(tmp_path / "hf", tmp_path / "run")
        run(tmp_path / "run", tmp_path / "back")
        assert json.loads((tmp_path / "back" / "config.json").read_text())["activation_function"] == "gelu"

    def test_letters_go_everywhere_and_come_back(self, tmp_path):
        saved = letters_checkpoint(tmp_path / "out" / "ckpt.pt")
        run(tmp_path / "out" / "ckpt.pt", tmp_path / "run", "--to", "fastgpt")
        run(tmp_path / "run", tmp_path / "hf")
        run(tmp_path / "hf", tmp_path / "again")
        run(tmp_path / "again", tmp_path / "back.pt")
        assert 'tokenizer("A", return_tensors="pt")' in (tmp_path / "hf" / "README.md").read_text()
        for name in ("run", "hf", "again", "back.pt"):
            portable = any.load_weights(str(tmp_path / name))
            assert (portable.letters, portable.tokenizer) == (LETTERS, "chars")
        back = torch.load(tmp_path / "back.pt", weights_only=True)
        assert same(dict(back["model"]), dict(saved["model"]))
        config = checkpoint.load(folder.resolve(tmp_path / "again"))["config"]
        assert config["data"]["tokenizer"] == "chars"

    def test_an_optimizer_goes_on_where_it_was(self, tmp_path):
        """One more step from the converted state equals one more step of the original."""
        saved, model = nanogpt_checkpoint(tmp_path / "ckpt.pt")
        run(tmp_path / "ckpt.pt", tmp_path / "run", "--to", "fastgpt")
        ours = GPT(ModelConfig(**SHAPE, bias=True, dropout=0.0))
        groups = [[p for p in ours.parameters() if p.dim() >= 2], [p for p in ours.parameters() if p.dim() < 2]]
        decays = [{"params": group, "weight_decay": decay} for group, decay in zip(groups, (0.1, 0.0))]
        optimizer = torch.optim.AdamW(decays, lr=1e-3, betas=(0.9, 0.95))
        checkpoint.load_into(folder.resolve(tmp_path / "run"), ours, optimizer)
        theirs = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        theirs.load_state_dict(saved["optimizer"])
        theirs_by_name = dict(model.named_parameters())
        for name, parameter in ours.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            theirs_by_name[name].grad = parameter.grad.clone()
        optimizer.step()
        theirs.step()
        assert same(dict(ours.named_parameters()), theirs_by_name)


def test_the_state_of_muon_has_to_fit_its_weights_too():
    weights = {"w": torch.zeros(3, 2)}
    check_optimizer("it", {"state": {"w": {"momentum_buffer": torch.zeros(3, 2)}}}, weights)
    with pytest.raises(UserError, match=r"does not fit its weights \(momentum_buffer of w\)"):
        check_optimizer("it", {"state": {"w": {"momentum_buffer": torch.zeros(2, 2)}}}, weights)


class TestSameFunction:
    def test_hugging_face_computes_what_nanogpt_did(self, tmp_path, bias):
        """Exact GELU on both sides."""
        _, model = nanogpt_checkpoint(tmp_path / "ckpt.pt", bias)
        run(tmp_path / "ckpt.pt", tmp_path / "hf", "--to", "hf")
        theirs, ids = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval(), batch()
        torch.testing.assert_close(theirs(ids).logits, model(ids, ids)[0], atol=1e-5, rtol=1e-4)

    def test_hugging_face_computes_what_fastgpt_did(self, tmp_path, bias):
        model, ids = fastgpt_run(tmp_path / "run", bias), batch()
        run(tmp_path / "run", tmp_path / "hf")
        theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "hf").eval()
        torch.testing.assert_close(theirs(ids).logits, model(ids)[0], atol=1e-5, rtol=1e-4)

    def test_from_pretrained_reads_a_local_folder(self, tmp_path):
        theirs, ids = huggingface_folder(tmp_path / "hf"), batch()
        ours = GPT.from_pretrained(str(tmp_path / "hf")).eval()
        assert ours.config.dropout == 0.1
        torch.testing.assert_close(ours(ids)[0], theirs(ids).logits, atol=1e-5, rtol=1e-4)

    def test_from_pretrained_reads_the_hub(self, tmp_path, monkeypatch):
        theirs, ids = huggingface_folder(tmp_path / "hf"), batch()
        asked = []
        monkeypatch.setattr(
            "huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(tmp_path / "hf")
        )
        monkeypatch.chdir(tmp_path)
        ours = GPT.from_pretrained("gpt2").eval()
        torch.testing.assert_close(ours(ids)[0], theirs(ids).logits, atol=1e-5, rtol=1e-4)
        assert asked == ["gpt2"]

    def test_nanogpt_loads_what_fastgpt_trained(self, tmp_path):
        ours, ids = fastgpt_run(tmp_path / "run"), batch()
        run(tmp_path / "run", tmp_path / "ckpt.pt")
        saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
        theirs = nanogpt_model.GPT(nanogpt_model.GPTConfig(**saved["model_args"])).eval()
        theirs.load_state_dict(saved["model"])
        optimizer = theirs.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        optimizer.load_state_dict(saved["optimizer"])
        for block in theirs.transformer.h:
            block.mlp.gelu = torch.nn.GELU(approximate="tanh")
        torch.testing.assert_close(theirs(ids, ids)[0], ours(ids)[0], atol=1e-5, rtol=1e-4)
        assert saved["iter_num"] == 2 and saved["best_val_loss"] == 2.5


class TestReading:
    def test_weights_come_without_the_optimizers_state_unless_it_is_asked_for(self, tmp_path):
        fastgpt_run(tmp_path / "run")
        assert any.load_weights(str(tmp_path / "run")).optimizer is None
        assert any.read(str(tmp_path / "run"))[1].optimizer["state"]

    def test_a_model_is_loaded_with_the_tokenizer_that_its_checkpoint_names(self, tmp_path):
        trained, ids = fastgpt_run(tmp_path / "run"), batch()
        model, tokenizer = load_model(str(tmp_path / "run"), "eager", torch.device("cpu"))
        assert not model.training and torch.equal(model(ids)[0], trained(ids)[0])
        assert tokenizer.vocab_size == 256
        nanogpt_checkpoint(tmp_path / "ckpt.pt")  # over 40 characters: of a tokenizer that it does not name
        with pytest.raises(UserError, match="vocabulary of 40, and does not say of which tokenizer"):
            load_model(str(tmp_path / "ckpt.pt"), "eager", torch.device("cpu"))

    def test_load_weights_gives_shape_and_state_dict(self, tmp_path):
        saved, _ = nanogpt_checkpoint(tmp_path / "ckpt.pt")
        portable = any.load_weights(str(tmp_path / "ckpt.pt"))
        config, weights = portable.config, portable.weights
        assert config == ModelConfig(**SHAPE, bias=True, dropout=0.1)
        GPT(config).load_state_dict(weights)
        assert weights["transformer.wte.weight"].equal(saved["model"]["lm_head.weight"])

    def test_a_compiled_nanogpt_models_prefix_is_dropped(self, tmp_path):
        saved, _ = nanogpt_checkpoint(tmp_path / "ckpt.pt", prefix="_orig_mod.")
        weights = any.load_weights(str(tmp_path / "ckpt.pt")).weights
        assert weights["transformer.ln_f.weight"].equal(saved["model"]["_orig_mod.transformer.ln_f.weight"])

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module._orig_mod."])
    def test_so_are_ddps_and_both(self, tmp_path, prefix):
        saved, _ = nanogpt_checkpoint(tmp_path / "ckpt.pt", prefix=prefix)
        weights = any.load_weights(str(tmp_path / "ckpt.pt")).weights
        assert weights["transformer.ln_f.weight"].equal(saved["model"][f"{prefix}transformer.ln_f.weight"])

    def test_a_file_of_before_torch_1_6_and_a_count_of_steps_that_is_a_tensor(self, tmp_path):
        saved, _ = nanogpt_checkpoint(tmp_path / "ckpt.pt")
        saved["iter_num"] = torch.tensor(7)
        torch.save(saved, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=False)
        portable = any.load_weights(str(tmp_path / "ckpt.pt"))
        assert portable.step == 7
        assert portable.weights["transformer.ln_f.weight"].equal(saved["model"]["transformer.ln_f.weight"])

    @pytest.mark.parametrize("count", [float("nan"), -4, "many"])
    def test_a_count_of_steps_that_is_none_is_said(self, tmp_path, count):
        saved, _ = nanogpt_checkpoint(tmp_path / "ckpt.pt")
        torch.save(saved | {"iter_num": count}, tmp_path / "ckpt.pt")
        portable = any.load_weights(str(tmp_path / "ckpt.pt"))
        assert portable.step == 0 and f"iter_num is {count!r}" in portable.notes[0]

    def test_a_mask_that_is_not_causal_is_another_models(self, tmp_path):
        saved, _ = nanogpt_checkpoint(tmp_path / "ckpt.pt")
        mask = saved["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        torch.save(saved, tmp_path / "ckpt.pt")
        any.load_weights(str(tmp_path / "ckpt.pt"))
        mask[..., :4] = 1  # a prefix that sees itself whole
        torch.save(saved, tmp_path / "ckpt.pt")
        with pytest.raises(UserError, match="is not a causal mask"):
            any.load_weights(str(tmp_path / "ckpt.pt"))

    @pytest.mark.parametrize("narrow", ["lm_head.weight", "transformer.wte.weight"])
    def test_a_head_that_is_a_bf16_copy_of_the_embedding_is_tied_to_it(self, tmp_path, narrow):
        saved, _ = nanogpt_checkpoint(tmp_path / "ckpt.pt")
        whole = saved["model"]["lm_head.weight"].clone()
        saved["model"][narrow] = whole.to(torch.bfloat16)
        torch.save(saved, tmp_path / "ckpt.pt")
        assert any.load_weights(str(tmp_path / "ckpt.pt")).weights["transformer.wte.weight"].equal(whole)

    def test_a_model_of_characters_is_loaded_with_its_letters(self, tmp_path, monkeypatch):
        letters_checkpoint(tmp_path / "out" / "ckpt.pt")
        tokenizer = load_model(str(tmp_path / "out" / "ckpt.pt"), "eager", torch.device("cpu"))[1]
        assert tokenizer.decode([17, 39, 18]) == "A\nB"
        (tmp_path / "data" / "trains" / "meta.pkl").rename(tmp_path / "out" / "meta.pkl")
        assert any.load_weights(str(tmp_path / "out" / "ckpt.pt")).letters == LETTERS
        (tmp_path / "out" / "meta.pkl").write_bytes(pickle.dumps({"itos": {0: "a", 1: "b"}}))  # of another vocabulary
        assert any.load_weights(str(tmp_path / "out" / "ckpt.pt")).letters is None
        (tmp_path / "out" / "meta.pkl").write_bytes(b"nothing")
        assert "meta.pkl is not read" in any.load_weights(str(tmp_path / "out" / "ckpt.pt")).notes[0]

    def test_weights_that_are_not_finite_are_found(self, tmp_path, capsys):
        saved, _ = nanogpt_checkpoint(tmp_path / "ckpt.pt")
        saved["model"]["transformer.h.1.attn.c_attn.weight"][0, 0] = math.nan
        saved["model"]["transformer.ln_f.bias"][0] = -math.inf
        torch.save(saved, tmp_path / "ckpt.pt")
        run(tmp_path / "ckpt.pt", tmp_path / "run", "--to", "fastgpt")
        assert (
            "2 of 28 weights hold NaN or infinity, transformer.h.1.attn.c_attn.weight first" in capsys.readouterr().out
        )
        with pytest.raises(UserError, match="NaN or infinity in 2 of 28 weights"):
            any.load_weights(str(tmp_path / "run"))

    def test_mask_buffers_of_old_checkpoints_are_dropped(self, tmp_path):
        saved, _ = nanogpt_checkpoint(tmp_path / "ckpt.pt")
        saved["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        torch.save(saved, tmp_path / "ckpt.pt")
        assert "transformer.h.0.attn.bias" not in any.load_weights(str(tmp_path / "ckpt.pt")).weights

    def test_shards_half_precision_and_names_without_prefix(self, tmp_path):
        """As OpenAI's weights lie on the hub, and as large models are saved."""
        model = huggingface_folder(tmp_path / "hf")
        tensors = {
            k.removeprefix("transformer."): v for k, v in load_file(tmp_path / "hf" / "model.safetensors").items()
        }
        tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
        names = sorted(tensors)
        parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
        for file, held in parts.items():
            save_file({name: tensors[name] for name in held}, tmp_path / "hf" / file)
        (tmp_path / "hf" / "model.safetensors").unlink()
        index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
        (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
        weights = any.load_weights(str(tmp_path / "hf")).weights
        want = model.transformer.h[0].attn.c_attn.weight.to(torch.bfloat16).float().t()
        assert weights["transformer.h.0.attn.c_attn.weight"].equal(want)

    def test_pytorch_model_bin(self, tmp_path):
        model = huggingface_folder(tmp_path / "hf")
        torch.save(model.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
        (tmp_path / "hf" / "model.safetensors").unlink()
        weights = any.load_weights(str(tmp_path / "hf")).weights
        assert weights["transformer.wte.weight"].equal(model.lm_head.weight)

    def test_an_untrained_run_has_no_optimizer_state(self, tmp_path, capsys):
        fastgpt_run(tmp_path / "run", steps=0)
        run(tmp_path / "run", tmp_path / "ckpt.pt")
        assert "optimizer state" not in capsys.readouterr().out


def hub(monkeypatch, broken=None):
    """The hub's client, as far as an upload needs it: the calls that it gets. ``broken``: what does not work."""
    calls = []

    class Address(str):
        repo_id = "you/mine"

    class Api:
        def works(self, name):
            if name == broken:
                raise OSError("no token")

        def whoami(self):
            self.works("whoami")

        def create_repo(self, name, **options):
            calls.append((name, options))
            return Address("https://hub/you/mine")

        def upload_folder(self, *, repo_id, folder_path):
            self.works("upload_folder")
            calls.append((repo_id, folder_path))

    module = None if broken == "package" else SimpleNamespace(HfApi=Api)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


class TestWriting:
    def test_the_tokenizer_comes_along(self, tmp_path, monkeypatch):
        monkeypatch.setitem(SHAPE, "vocab_size", 50304)
        model = GPT(ModelConfig(**{**SHAPE, "n_layer": 1, "n_embd": 4}))
        optimizer = torch.optim.AdamW(model.parameters())
        state = {"config": {**Config().to_dict(), "model": vars(model.config)}, **checkpoint.state_of(model, optimizer)}
        state["config"]["data"]["tokenizer"] = "gpt2"
        (tmp_path / "run").mkdir()
        saver.save(tmp_path / "run", 0, {**state, "best_val_loss": math.inf})
        run(tmp_path / "run", tmp_path / "hf")
        tokenizer = GPT2Tokenizer.from_pretrained(tmp_path / "hf")
        assert tokenizer("Hello world").input_ids == [15496, 995]
        assert tokenizer.eos_token_id == 50256

    @pytest.mark.parametrize("kind", ["bytes", "letters"])
    def test_transformers_reads_the_tokenizer_of_bytes_and_of_letters(self, tmp_path, kind):
        if kind == "letters":
            letters_checkpoint(tmp_path / "out" / "ckpt.pt")
        else:
            fastgpt_run(tmp_path / "out")
        source = tmp_path / "out" / "ckpt.pt" if kind == "letters" else tmp_path / "out"
        run(source, tmp_path / "hf", "--to", "hf")
        theirs, text = (
            AutoTokenizer.from_pretrained(tmp_path / "hf"),
            "AB\n0" if kind == "letters" else "naïve\n 日本\0x",
        )
        ours = CharTokenizer(LETTERS) if kind == "letters" else get_tokenizer("bytes")
        assert theirs(text).input_ids == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text

    def test_a_folder_to_publish_is_whole_and_readable_by_all(self, tmp_path):
        fastgpt_run(tmp_path / "run")
        run(tmp_path / "run", tmp_path / "hf")
        names = {path.name for path in (tmp_path / "hf").iterdir()}
        assert {"README.md", "generation_config.json", "tokenizer.json", "model.safetensors"} <= names
        assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1
        assert GPT2LMHeadModel.from_pretrained(tmp_path / "hf").generation_config.eos_token_id == 0

    def test_the_model_card_has_the_runs_figures(self, tmp_path):
        fastgpt_run(tmp_path / "run")
        run(tmp_path / "run", tmp_path / "my-gpt2")
        card = (tmp_path / "my-gpt2" / "README.md").read_text()
        for line in (
            "# my-gpt2",
            "| layers, heads, width | 2, 2, 16 |",
            "| vocabulary | 40 (bytes) |",
            "| optimizer steps | 2 |",
            "| tokens trained on | 256, 128 per step |",
            "| learning rate | 0.0006 at its peak, cosine |",
            "| best validation loss | 2.5000 nats per token |",
        ):
            assert line in card.splitlines(), card
        nanogpt_checkpoint(tmp_path / "ckpt.pt")
        run(tmp_path / "ckpt.pt", tmp_path / "theirs", "--to", "hf")
        assert "| best validation loss | 3.2500 nats per token |" in (tmp_path / "theirs" / "README.md").read_text()

    def test_the_model_card_names_data_that_is_known_and_says_nothing_else_of_it(self, tmp_path):
        """Neither a path of the author's, nor, of a model that was converted, our own defaults."""

        def card(source):
            run(source, tmp_path / "hf", "--to", "hf")
            text = (tmp_path / "hf" / "README.md").read_text()
            shutil.rmtree(tmp_path / "hf")
            return text

        fastgpt_run(tmp_path / "run")
        portable = any.read(str(tmp_path / "run"))[1]
        assert "| trained on | the source code of Python's standard library (licence of the text: PSF-2.0) |" in card(
            tmp_path / "run"
        )
        for source, said in (
            ("hf:HuggingFaceFW/fineweb", "HuggingFaceFW/fineweb (licence of the text: ODC-By 1.0)"),
            ("/home/me/x", "not stated"),
        ):
            (tmp_path / "manifest.json").write_text(json.dumps({"source": source}))
            portable.extras["fastgpt"]["config"]["data"]["data"] = str(tmp_path)
            shutil.rmtree(tmp_path / "run")
            own.write(tmp_path / "run", portable)
            shown = card(tmp_path / "run")
            assert f"| trained on | {said} |" in shown and "/home" not in shown and str(tmp_path) not in shown
            assert ("datasets:\n- HuggingFaceFW/fineweb\n---" in shown) == ("fineweb" in source)
        nanogpt_checkpoint(tmp_path / "ckpt.pt")
        run(tmp_path / "ckpt.pt", tmp_path / "ours", "--to", "fastgpt")
        assert "| trained on | not stated |" in card(tmp_path / "ours") and "learning rate" not in card(
            tmp_path / "ours"
        )

    def test_push_uploads_the_folder_with_a_card_of_that_name(self, tmp_path, monkeypatch, capsys):
        calls = hub(monkeypatch)
        fastgpt_run(tmp_path / "run")
        run(tmp_path / "run", tmp_path / "hf", "--push", "you/mine")
        assert calls == [("you/mine", {"private": True, "exist_ok": True}), ("you/mine", tmp_path / "hf")]
        assert capsys.readouterr().out.endswith("uploading to you/mine ...\n  https://hub/you/mine\n")
        assert 'auto.from_pretrained("you/mine")' in (tmp_path / "hf" / "README.md").read_text()

    def test_a_push_that_cannot_be_is_refused_before_anything_is_written(self, tmp_path, monkeypatch):
        fastgpt_run(tmp_path / "run")
        for words, broken, sentence in (
            (
                ["--to", "fastgpt", "--push", "you/mine"],
                None,
                "push is 'you/mine' but OUT is a fastgpt run: use --to hf",
            ),
            (["--push", "you/my model"], None, "push is 'you/my model': it must be a name on the hub"),
            (["--push", "you/mine"], "whoami", r"knows no user here \(no token\): run `hf auth login`"),
            (["--push", "you/mine"], "package", "push is 'you/mine', for which a package is missing: run `pip install"),
        ):
            hub(monkeypatch, broken)
            with pytest.raises(UserError, match=sentence):
                run(tmp_path / "run", tmp_path / "hf", *words)
            assert not (tmp_path / "hf").exists()
        hub(monkeypatch, "upload_folder")
        with pytest.raises(
            UserError, match=r"hf is written, but was not uploaded \(no token\): run `hf upload you/mine "
        ):
            run(tmp_path / "run", tmp_path / "hf", "--push", "you/mine")
        assert (tmp_path / "hf" / "model.safetensors").exists()

    def test_what_was_done_is_said(self, tmp_path, capsys):
        nanogpt_checkpoint(tmp_path / "ckpt.pt")
        run(tmp_path / "ckpt.pt", tmp_path / "run", "--to", "fastgpt")
        out = capsys.readouterr().out
        assert (
            "7.49k parameters, optimizer state, step 2: layers 2, heads 2, width 16, context 16, vocabulary 40" in out
        )
        assert "note: trained with the exact GELU" in out

    def test_what_stays_behind_is_said(self, tmp_path, capsys):
        fastgpt_run(tmp_path / "run")
        run(tmp_path / "run", tmp_path / "hf")
        assert "no place for the optimizer's state" in capsys.readouterr().out

    def test_an_empty_output_folder_may_exist(self, tmp_path):
        nanogpt_checkpoint(tmp_path / "ckpt.pt")
        for to in ("fastgpt", "hf"):
            (tmp_path / to).mkdir()
            run(tmp_path / "ckpt.pt", tmp_path / to, "--to", to)
            assert any.load_weights(str(tmp_path / to))


class Hostile:
    def __reduce__(self):
        return (print, ("this code ran",))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


class TestRefused:
    """One sentence, exit code 2, nothing written."""

    @pytest.fixture
    def fails(self, tmp_path, monkeypatch, capsys):
        def check(source, message, out="out", to="fastgpt"):
            monkeypatch.setattr(sys, "argv", ["convert", str(source), str(tmp_path / out), "--to", to])
            before = sorted(tmp_path.rglob("*"))
            capsys.readouterr()
            with pytest.raises(SystemExit) as stop:
                convert.common.run(convert.main)
            printed = capsys.readouterr()
            assert stop.value.code == 2
            assert message in printed.err, printed.err
            assert len(printed.err.strip().splitlines()) == 1 and "this code ran" not in printed.out
            assert sorted(tmp_path.rglob("*")) == before

        return check

    def test_a_pickle_that_names_code(self, tmp_path, fails):
        saved, _ = nanogpt_checkpoint(tmp_path / "ckpt.pt")
        torch.save({**saved, "config": Hostile()}, tmp_path / "ckpt.pt")
        fails(tmp_path / "ckpt.pt", "more than tensors and plain values, and a pickle can run code: it is refused")

    def test_a_bare_pickle(self, tmp_path, fails):
        (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(Hostile()))
        fails(tmp_path / "ckpt.pt", "is not a checkpoint that torch.load reads: torch.save did not write it")

    def test_a_hostile_pytorch_model_bin(self, tmp_path, fails):
        huggingface_folder(tmp_path / "hf")
        (tmp_path / "hf" / "model.safetensors").unlink()
        torch.save({"a": Hostile()}, tmp_path / "hf" / "pytorch_model.bin")
        fails(tmp_path / "hf", "a pickle can run code")

    def test_a_truncated_file(self, tmp_path, fails):
        nanogpt_checkpoint(tmp_path / "ckpt.pt")
        content = (tmp_path / "ckpt.pt").read_bytes()
        (tmp_path / "ckpt.pt").write_bytes(content[: len(content) // 2])
        fails(tmp_path / "ckpt.pt", "is not a checkpoint that torch.load reads")

    @pytest.mark.parametrize(
        "content, what",
        [
            ([1, 2], "is not nanoGPT's, which has 'model' and 'model_args': it is a list"),
            (torch.ones(2, 3), "it is one tensor (2, 3)"),
            ({"lm_head.weight": torch.ones(2)}, "it is a bare state_dict of 1 tensors (lm_head.weight)"),
            ({"state_dict": {}, "epoch": 3}, "it is a table of state_dict, epoch"),
            ({"model": {}, "model_args": 3}, "'model' and 'model_args' are dictionaries there"),
        ],
    )
    def test_another_torch_file(self, tmp_path, fails, content, what):
        torch.save(content, tmp_path / "other.pt")
        fails(tmp_path / "other.pt", what)

    @pytest.mark.parametrize(
        "content, what",
        [
            (b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
            (b"<!DOCTYPE html><html>", "it is a web page"),
            (b"GGUF\3\0\0\0", "it is a model of llama.cpp"),
            (b'\x10\0\0\0\0\0\0\0{"a": 1}', "it is a safetensors file: name the folder that it lies in"),
            (b"nothing of the kind", "is not a checkpoint that torch.load reads"),
        ],
    )
    def test_another_file_is_named(self, tmp_path, fails, content, what):
        (tmp_path / "other.pt").write_bytes(content)
        fails(tmp_path / "other.pt", what)

    @pytest.mark.parametrize("to, out", [("hf", "out"), ("nanogpt", "out.pt")])
    def test_a_modern_model_is_no_gpt2(self, tmp_path, fails, to, out):
        shape = ModelConfig(**{**SHAPE, "n_embd": 32}, family="modern")
        own.write(tmp_path / "run", Portable(shape, GPT(shape).state_dict()))
        fails(tmp_path / "run", "is a modern model, which a", out=out, to=to)

    def test_a_folder_of_tokens_is_named(self, tmp_path, fails):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "train.bin").write_bytes(b"ab")
        fails(tmp_path / "data", "holds tokens (train.bin), no checkpoint: it is what --data takes")

    @pytest.mark.parametrize(
        "edit, unknown",
        [
            (lambda s: s["model_args"].update(n_kv_head=1, window=256), "n_kv_head = 1, window = 256, which"),
            (lambda s: s["model_args"].update(logit_cap=30.0), "logit_cap = 30.0, which"),
            (
                lambda s: (
                    s["model_args"].update(norm="rms"),
                    s["model"].update({"transformer.h.0.rms.g": torch.ones(16)}),
                ),
                "norm = 'rms', transformer.h.N.rms.g, which",
            ),
            (lambda s: s.update(model_args={"dim": 16, "n_layers": 2}), "dim = 16, n_layers = 2, which"),
        ],
    )
    @pytest.mark.parametrize("to", ["fastgpt", "hf"])
    def test_another_model_is_refused_with_what_is_unknown(self, tmp_path, fails, edit, unknown, to):
        saved, _ = nanogpt_checkpoint(tmp_path / "ckpt.pt")
        edit(saved)
        torch.save(saved, tmp_path / "ckpt.pt")
        fails(
            tmp_path / "ckpt.pt",
            f"is a fork's, with another model than GPT-2: its model_args and weights have {unknown}",
            to=to,
        )

    @pytest.mark.parametrize(
        "edit, message",
        [
            (lambda s: s["model"].pop("transformer.ln_f.weight"), "transformer.ln_f.weight is missing"),
            (lambda s: s["model"].update({"transformer.rope": torch.ones(2)}), "transformer.rope is not GPT-2's"),
            (lambda s: s["model"].update({"transformer.ln_f.weight": torch.ones(5)}), "is (5,) instead of (16,)"),
            (lambda s: s["model_args"].update(n_layer=3), "transformer.h.2.attn.c_attn.bias is missing"),
            (lambda s: s["model_args"].update(n_layer="two"), "n_layer is 'two'"),
            (lambda s: s["model_args"].update(n_head=3), "n_head 3 does not divide"),
            (lambda s: s["model"].update({"lm_head.weight": torch.ones(40, 16)}), "head that is not tied"),
            (lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.ones(3)), "optimizer state that does not fit"),
            (lambda s: s["optimizer"]["param_groups"][0]["params"].pop(), "an optimizer"),
            (lambda s: s.update(optimizer=[1]), "not torch.optim.AdamW's"),
        ],
    )
    def test_a_nanogpt_checkpoint_that_does_not_hold_together(self, tmp_path, fails, edit, message):
        saved, _ = nanogpt_checkpoint(tmp_path / "ckpt.pt")
        saved = copy.deepcopy(saved)
        edit(saved)
        torch.save(saved, tmp_path / "ckpt.pt")
        fails(tmp_path / "ckpt.pt", message)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"model_type": "bert"}, "is a 'bert': only 'gpt2' is converted"),
            ({"activation_function": "relu"}, "has activation_function 'relu': fastgpt's GPT-2 has 'gelu'"),
            ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon 1e-06"),
            ({"n_inner": 32}, "n_inner 32: fastgpt's GPT-2 has None or 64"),
            ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
            ({"add_cross_attention": True}, "add_cross_attention True"),
            ({"n_embd": "wide"}, "n_embd is 'wide'"),
            ({"vocab_size": 41}, "wte.weight is (40, 16) instead of (41, 16)"),
        ],
    )
    def test_a_hugging_face_folder_of_another_model(self, tmp_path, fails, changes, message):
        huggingface_folder(tmp_path / "hf")
        edit_config(tmp_path / "hf", **changes)
        fails(tmp_path / "hf", message)

    @pytest.mark.parametrize(
        "edit, message",
        [
            (lambda t: t.pop("transformer.wpe.weight"), "transformer.wpe.weight is missing"),
            (lambda t: t.update({"transformer.extra": torch.ones(1)}), "transformer.extra is not GPT-2's"),
            (lambda t: t.update({"transformer.wpe.weight": torch.ones(16, 16, dtype=torch.int32)}), "is int32"),
        ],
    )
    def test_a_hugging_face_folder_with_other_keys(self, tmp_path, fails, edit, message):
        huggingface_folder(tmp_path / "hf")
        edit_tensors(tmp_path / "hf", edit)
        fails(tmp_path / "hf", message)

    def test_many_wrong_keys_are_counted(self, tmp_path, fails):
        huggingface_folder(tmp_path / "hf")
        edit_tensors(tmp_path / "hf", lambda t: [t.pop(name) for name in list(t) if ".h.1." in name])
        fails(tmp_path / "hf", "and 8 more")

    def test_damaged_hugging_face_folders(self, tmp_path, fails):
        huggingface_folder(tmp_path / "hf")
        (tmp_path / "hf" / "model.safetensors").write_bytes(b"\xff" * 30)
        fails(tmp_path / "hf", "model.safetensors cannot be read")
        (tmp_path / "hf" / "model.safetensors").unlink()
        fails(tmp_path / "hf", "model.safetensors is missing")
        for content in ("{", "[]"):
            (tmp_path / "hf" / "config.json").write_text(content)
            fails(tmp_path / "hf", "config.json is missing, or holds no JSON object")

    def test_a_damaged_fastgpt_checkpoint(self, tmp_path, fails):
        fastgpt_run(tmp_path / "run")
        (tmp_path / "run" / "step-00000002" / "state.json").write_text("{}")
        fails(tmp_path / "run", "there is no whole checkpoint", to="hf")

    def test_a_folder_that_is_no_checkpoint(self, tmp_path, fails):
        (tmp_path / "folder").mkdir()
        fails(tmp_path / "folder", "folder is not a checkpoint: a Hugging Face folder has a config.json")

    def test_nothing_there(self, tmp_path, fails):
        fails(tmp_path / "absent.pt", "absent.pt does not exist: name a checkpoint, or a model on the hub such as gpt2")

    def test_a_hub_that_does_not_answer(self, tmp_path, fails, monkeypatch):
        def offline(*_, **__):
            raise OSError("no network\nat all")

        monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
        monkeypatch.chdir(tmp_path)
        fails(
            "gpt2", "gpt2 is not a file or folder here, and the Hugging Face hub does not give it (OSError: no network)"
        )

    def test_without_huggingface_hub(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(UserError, match="run `pip install huggingface_hub`"):
            huggingface.download("gpt2")

    def test_an_output_that_exists(self, tmp_path, fails):
        nanogpt_checkpoint(tmp_path / "ckpt.pt")
        fails(tmp_path / "ckpt.pt", "ckpt.pt exists: name another output", out="ckpt.pt", to="nanogpt")

    def test_an_output_of_the_wrong_kind(self, tmp_path, fails):
        nanogpt_checkpoint(tmp_path / "ckpt.pt")
        fails(tmp_path / "ckpt.pt", "a file that ends in .pt", to="nanogpt")
        fails(tmp_path / "ckpt.pt", "is a folder, so leave .pt out", out="x.pt", to="hf")

    def test_no_kind_of_output_for_nanogpt(self, tmp_path):
        nanogpt_checkpoint(tmp_path / "ckpt.pt")
        with pytest.raises(UserError, match="say --to fastgpt or --to hf"):
            run(tmp_path / "ckpt.pt", tmp_path / "out")

    @pytest.mark.parametrize("to, out", [("fastgpt", "file/run"), ("hf", "file/hf"), ("nanogpt", "file/ckpt.pt")])
    def test_an_output_that_cannot_be_written(self, tmp_path, fails, to, out):
        nanogpt_checkpoint(tmp_path / "ckpt.pt")
        (tmp_path / "file").write_text("")
        fails(tmp_path / "ckpt.pt", "cannot be written", out=out, to=to)


def test_a_folder_that_a_run_writes_in_is_left_alone(tmp_path):
    nanogpt_checkpoint(tmp_path / "ckpt.pt")
    with lock.held(tmp_path / "run"), pytest.raises(UserError, match="has been writing since"):
        run(tmp_path / "ckpt.pt", tmp_path / "run", "--to", "fastgpt")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


@pytest.mark.parametrize("to", ["hf", "fastgpt"])
def test_what_others_made_stays_and_a_killed_conversion_can_be_run_again(tmp_path, monkeypatch, to):
    nanogpt_checkpoint(tmp_path / "ckpt.pt")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("x")
    (tmp_path / "out").mkdir()  # empty
    if (child := os.fork()) == 0:
        monkeypatch.setattr(type(tmp_path), "rename", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        run(tmp_path / "ckpt.pt", tmp_path / "out", "--to", to)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    run(tmp_path / "ckpt.pt", tmp_path / "out", "--to", to)
    assert run(tmp_path / "out", tmp_path / "back.pt") == 0
    assert (tmp_path / "out.partial" / "mine").read_text() == "x"
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    nanogpt_checkpoint(tmp_path / "ckpt.pt")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        run(tmp_path / "ckpt.pt", tmp_path / "hf", "--to", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


# ---------------------------------------------------------------- nanochat


def nanochat_logits(w, config, idx):
    """What nanochat's GPT computes from its own state_dict and model_config, in its order of operations."""
    T, H, H_kv, L = idx.shape[1], config["n_head"], config["n_kv_head"], config["n_layer"]
    D = config["n_embd"] // H
    angles = torch.outer(torch.arange(T), 100_000 ** (-torch.arange(0, D, 2) / D))[:, None]

    def norm(x):
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), eps=1e-6)

    def rotary(x):
        a, b = x.chunk(2, -1)
        return torch.cat((a * angles.cos() + b * angles.sin(), b * angles.cos() - a * angles.sin()), -1)

    x = norm(w["transformer.wte.weight"][idx])
    gate = w["smear_lambda"] * torch.sigmoid(x[:, 1:, :24] @ w["smear_gate.weight"].T)
    x = x0 = torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), 1)
    for i in range(L):
        block = f"transformer.h.{i}."
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        h = norm(x)
        q, k, v = (
            (h @ w[f"{block}attn.c_{name}.weight"].T).unflatten(-1, (heads, D))
            for name, heads in (("q", H), ("k", H_kv), ("v", H_kv))
        )
        if i % 2 == (L - 1) % 2:
            gate = 3 * torch.sigmoid(h[..., :12] @ w[f"{block}attn.ve_gate.weight"].T)
            v = v + gate[..., None] * w[f"value_embeds.{i}.weight"][idx].unflatten(-1, (H_kv, D))
        q, k = (1.2 * norm(rotary(part)) for part in (q, k))
        k, v = (part.repeat_interleave(H // H_kv, 2).transpose(1, 2) for part in (k, v))
        left = 128 if config["window_pattern"][i % 4] == "S" and i < L - 1 else T
        apart = torch.arange(T)[:, None] - torch.arange(T)
        sees = (apart >= 0) & (apart <= left)
        y = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=sees)
        x = x + y.transpose(1, 2).flatten(2) @ w[f"{block}attn.c_proj.weight"].T
        x = x + (norm(x) @ w[f"{block}mlp.c_fc.weight"].T).relu().square() @ w[f"{block}mlp.c_proj.weight"].T
        if i == L // 2:
            middle = x
    logits = (norm(x - w["backout_lambda"] * middle) @ w["lm_head.weight"].T)[..., : config["vocab_size"]]
    return 15 * torch.tanh(logits / 15)


def modern_run(out, **changes):
    """A fastgpt run's folder with a modern model whose every weight is drawn, and the model."""
    shape = {"n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32, "block_size": 512, "vocab_size": 40}
    config = ModelConfig(**{**vars(load_preset("modern-demo").model), **shape, **changes})
    model = GPT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    optimizer = {"state": {}, "param_groups": []}
    run = {"config": Config(model=config, data=DataConfig(tokenizer="bytes")).to_dict(), "best_val_loss": 1.5}
    saver.save(out, 7, {**run, "model": model.state_dict(), "optimizer": optimizer})
    return model.eval()


@pytest.mark.parametrize("more", [False, True])
def test_a_modern_model_becomes_nanochats_and_comes_back_bit_for_bit(tmp_path, capsys, more):
    model = modern_run(tmp_path / "run", smear=more, backout=more)
    convert.main([str(tmp_path / "run"), str(tmp_path / "d3")])
    assert "nanochat checkpoint" in capsys.readouterr().out
    meta = json.loads((tmp_path / "d3" / "meta_000007.json").read_text())
    weights = torch.load(tmp_path / "d3" / "model_000007.pt", weights_only=True)
    assert weights["lm_head.weight"].shape == weights["value_embeds.2.weight"].shape[:1] + (32,) == (64, 32)
    idx = torch.randint(0, 40, (2, 140))  # longer than the short window
    with torch.no_grad():
        torch.testing.assert_close(
            nanochat_logits(weights, meta["model_config"], idx), model(idx)[0], rtol=1e-4, atol=1e-4
        )
    convert.main([str(tmp_path / "d3" / "model_000007.pt"), str(tmp_path / "back"), "--to", "fastgpt"])
    for source in (tmp_path / "back", tmp_path / "d3"):  # as sample, hellaswag and --init-from read it
        again, tokenizer = load_model(str(source), "eager", torch.device("cpu"))
        assert again.config == model.config and tokenizer.vocab_size == 256
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


def test_only_what_has_a_row_per_token_is_padded_for_nanochat(tmp_path):
    """A vocabulary of letters can be as large as the model is wide."""
    model = modern_run(tmp_path / "run", n_embd=40, vocab_size=40)
    convert.main([str(tmp_path / "run"), str(tmp_path / "d3")])
    again, _ = load_model(str(tmp_path / "d3"), "eager", torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"softcap": 0.0}, "softcap is 0.0: nanochat's model has 15.0"),
        (
            {"block_size": 300},
            "the model has windows in a context of 300 tokens: .* only contexts that are a multiple of 512 are the same",
        ),
    ],
)
def test_what_nanochat_has_not_is_refused(tmp_path, change, words):
    modern_run(tmp_path / "run", **change)
    with pytest.raises(UserError, match=words):
        convert.main([str(tmp_path / "run"), str(tmp_path / "d3"), "--to", "nanochat"])
    assert not (tmp_path / "d3").exists()


def test_what_of_nanochat_is_not_here_is_refused(tmp_path):
    modern_run(tmp_path / "run")
    convert.main([str(tmp_path / "run"), str(tmp_path / "d3")])
    weights = torch.load(tmp_path / "d3" / "model_000007.pt", weights_only=True)
    del weights["smear_lambda"]
    torch.save(weights, tmp_path / "d3" / "model_000007.pt")
    with pytest.raises(
        UserError, match=r"is of a nanochat before March 2026, whose rotary base and factors were others"
    ):
        convert.main([str(tmp_path / "d3"), str(tmp_path / "back")])
    for out in (["out.pt"], ["hf", "--to", "hf"]):
        with pytest.raises(
            UserError, match=r"is a modern model, which a .* cannot hold: use --to fastgpt or --to nanochat"
        ):
            convert.main([str(tmp_path / "run"), str(tmp_path / out[0]), *out[1:]])
