"""Before the first step: one line when clean, in a fraction of a second."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastgpt.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, load_preset, preset_names
from fastgpt.doctor.evidence import Machine
from fastgpt.doctor.preflight import announce, preflight
from fastgpt.hardware import cards
from tests.doctor.runs import RTX4070

MACHINE = Machine("linux", "2.11.0", cuda=True, triton=True, nvidia_driver=True)
CPU = torch.device("cpu")


@pytest.fixture
def on_4070(monkeypatch):
    monkeypatch.setattr(cards, "present", lambda device=None: RTX4070)


def said(findings):
    console = Console(file=io.StringIO(), width=300, highlight=False)
    announce(findings, console)
    return console.file.getvalue()


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_presets_are_clean_or_say_what_the_user_should_know(name, device, on_4070):
    found = {f.check for f in preflight(load_preset(name, device), CPU, MACHINE)}
    # The 40M preset repeats a real run, which is far past Chinchilla; the 350M one is for longer runs; XL for larger cards.
    known = {"gpt2-40m": {"many"}, "gpt2-350m": {"many"}, "gpt2-xl": {"too_little_vram"}}
    assert found <= known.get(name, set())


@pytest.mark.parametrize("precision, warned", [("auto", False), ("fp16", False), ("bf16", True)])
def test_on_a_card_without_bf16_auto_is_fp16(monkeypatch, precision, warned):
    monkeypatch.setattr(cards, "present", lambda device=None: cards.lookup("t4"))
    config = load_preset("demo", "cuda")
    config = replace(config, train=replace(config.train, kernels="eager", precision=precision))
    assert ("no_bf16" in {f.check for f in preflight(config, CPU, MACHINE)}) == warned


def test_one_line_when_clean(on_4070):
    findings = preflight(load_preset("gpt2-124m", "cuda"), CPU)
    assert said(findings).count("\n") == 1 and "nothing found" in said([])


def test_what_is_wrong_with_a_config_in_fastgpts_own_words():
    config = Config(
        model=ModelConfig(vocab_size=50257, dropout=0.1),
        data=DataConfig(data="x", batch_size=8, grad_accum=64),
        optim=OptimConfig(warmup_iters=5000),
        train=TrainConfig(max_iters=6000, eval_interval=500),
    )
    found = {f.check: f for f in preflight(config, CPU, MACHINE)}
    assert set(found) == {"warmup_too_long", "vocabulary_not_padded", "dropout_on_large_corpus"}
    text = said(list(found.values()))
    assert text.count("\n") == 3 and "-> vocab_size = 50304" in text and "preflight warning" in text


def test_memory_is_judged_on_the_card_that_is_here(on_4070):
    large = replace(load_preset("gpt2-124m", "cuda"), data=DataConfig(batch_size=256, grad_accum=2))
    (finding,) = preflight(large, CPU, MACHINE)
    assert finding.check == "too_little_vram" and "grad_accum = " in finding.advice


def test_shards_give_the_epochs(tmp_path: Path):
    for name, tokens in (("train.bin", 30_000), ("val.bin", 1000)):
        (tmp_path / name).write_bytes(b"\0\0" * tokens)
    small = replace(load_preset("demo"), data=DataConfig(data=str(tmp_path)), model=ModelConfig(dropout=0.1))
    assert {f.check for f in preflight(small, CPU, MACHINE)} == set(), "50 steps of 8,192 tokens: 14 epochs"
    once = replace(small, train=TrainConfig(max_iters=3), optim=OptimConfig(warmup_iters=1))
    found = {f.check: f for f in preflight(once, CPU, MACHINE)}
    assert "0.82 epochs" in found["dropout_on_large_corpus"].explanation


def test_a_machine_that_lacks_triton(on_4070):
    windows = Machine("win32", "2.11.0", cuda=True, nvidia_driver=True)
    (finding,) = preflight(load_preset("gpt2-124m", "cuda"), CPU, windows)
    assert finding.advice == "pip install triton-windows"
    eager = replace(load_preset("gpt2-124m", "cuda"), train=TrainConfig(kernels="eager", max_iters=4700))
    assert not [f for f in preflight(eager, CPU, windows) if f.check == "no_triton"]
