"""What the CPU does for a training step: read tokens, make them, and submit kernels."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.compiler.capture import JITFunction, compile_for
from fastgpt.common import UserError
from fastgpt.config import load_preset
from fastgpt.data.loader import TokenLoader
from fastgpt.data.tokenizer import get_tokenizer
from fastgpt.doctor.preflight import preflight
from fastgpt.doctor.reading.logs import read_log
from fastgpt.kernels import runtime
from fastgpt.training.schedule import learning_rate

TEXT = Path(argparse.__file__).read_text(encoding="utf-8")  # 100 kB of what the stdlib corpus holds


@pytest.mark.parametrize("B", [8, 16])
def test_loader(measure, tmp_path, B):
    """256 batches of 1024-token rows, as GPT-2 124M and 40M take them: one alone would be a slice of a block read ahead."""
    np.arange(2**23, dtype=np.uint64).astype(np.uint16).tofile(tmp_path / "train.bin")
    with closing(TokenLoader([tmp_path / "train.bin"], 1024, B)) as loader:
        measure(lambda: [loader.next_batch() for _ in range(256)], tokens=256 * B * 1024)


@pytest.mark.parametrize("name", ["gpt2", "bytes"])
def test_tokenizer(measure, name):
    try:
        tokenizer = get_tokenizer(name)
    except UserError as error:
        pytest.skip(f"no vocabulary here: {error}")
    measure(lambda: tokenizer.encode(TEXT), tokens=len(tokenizer.encode(TEXT)))


def test_log(measure, tmp_path):
    """A nanoGPT log of 100,000 steps, 5.3 MB."""
    path = tmp_path / "train.log"
    path.write_text("".join(f"iter {i}: loss 3.1234, time 3917.80ms, mfu 12.87%\n" for i in range(100_000)))
    measure(lambda: read_log(path))


def test_preflight(measure):
    config, device = load_preset("gpt2-124m", "cuda"), torch.device("cpu")
    measure(lambda: preflight(config, device))


def test_learning_rate(measure):
    optim = load_preset("gpt2-124m", "cuda").optim
    measure(lambda: [learning_rate(step, optim, 19000) for step in range(0, 19000, 19)])


# ---- the host's share of a launch: everything from the call to handing a compiled kernel to the driver, which is not there


@pytest.fixture
def no_driver(monkeypatch):
    """Inside, launches end where the driver would begin: arguments are bound, the compiled kernel is looked up."""
    if runtime.INTERPRET:
        pytest.skip("this process interprets kernels (TRITON_INTERPRET was set before it started)")
    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda *args, warmup=False, **options: run(*args, warmup=True, **options))
    with compile_for(89), torch.no_grad():
        yield


def test_launch_layer_norm(measure, no_driver):
    from fastgpt.kernels import layer_norm

    x, weight = torch.empty(64, 768, dtype=torch.bfloat16), torch.empty(768)
    measure(lambda: layer_norm(x, weight))


def test_launch_attention(measure, no_driver):
    from fastgpt.kernels import qkv_attention

    qkv = torch.empty(1, 128, 3 * 768, dtype=torch.bfloat16)
    measure(lambda: qkv_attention(qkv, 12))


def test_launch_adamw(measure, no_driver):
    """One step over the 148 tensors of GPT-2 124M, small ones: the kernels do not run."""
    from fastgpt.optim.adamw import FusedAdamW

    parameters = [torch.nn.Parameter(torch.zeros(16)) for _ in range(148)]
    for parameter in parameters:
        parameter.grad = torch.zeros(16)
    measure(FusedAdamW(parameters, max_grad_norm=1.0).step)
