"""What the CPU does for a training step: read tokens, make them, and submit kernels."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.compiler.capture import JITFunction, compile_for
from fastgpt import ops
from fastgpt.common import UserError
from fastgpt.config import ModelConfig, load_preset
from fastgpt.data.loader import TokenLoader
from fastgpt.data.tokenizer import get_tokenizer
from fastgpt.doctor.preflight import preflight
from fastgpt.doctor.reading.logs import read_log
from fastgpt.kernels import runtime, working_copy
from fastgpt.model import GPT
from fastgpt.schedule import learning_rate

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


T, C = 4, 16
"""Tokens and columns so few that a CPU spends its time on calling operations, as it would for a GPU. With 64 columns and 16
tokens oneDNN's products in bf16 are over half of PyTorch's step."""


def _norm(kernels, x, residual, weight):
    return kernels.layer_norm(x, weight, residual=residual, out_dtype=x.dtype)


OPERATIONS: dict[str, tuple[Callable, list]] = {
    "layer_norm": (_norm, [(C,), (C,), None]),
    "qkv_attention": (lambda kernels, qkv: kernels.qkv_attention(qkv, 1), [(3 * C,)]),
    "linear": (lambda kernels, x, weight: kernels.linear(x, weight), [(C,), (C, C)]),
    "mlp": (lambda kernels, x, up, down: kernels.mlp(x, up, None, down, None), [(C,), (4 * C, C), (C, 4 * C)]),
}


@pytest.mark.parametrize("table", ["triton", "eager"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_forward_backward(measure, no_driver, name, table):
    """One operation under autocast to bf16, beside plain PyTorch's: to be compared within one run."""
    op, shapes = OPERATIONS[name]
    first = torch.randn(1, T, *shapes[0], dtype=torch.bfloat16, requires_grad=True)
    others = [
        torch.nn.Parameter(torch.ones(C)) if shape is None
        else torch.nn.Parameter(torch.randn(shape)) if len(shape) == 2
        else torch.randn(1, T, *shape, requires_grad=True)
        for shape in shapes[1:]
    ]  # fmt: skip

    def work():
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
            found = op(ops.get(table), first, *others)
        found = found if isinstance(found, tuple) else (found,)
        torch.autograd.grad(found, [first, *others], [torch.ones_like(y) for y in found])

    measure(work)


def tiny_gpt(table):
    torch.manual_seed(0)
    shape = ModelConfig(n_layer=12, n_head=1, n_embd=C, block_size=T, vocab_size=64)
    return GPT(shape, ops.get(table))


@pytest.mark.parametrize("table", ["triton", "eager"])
def test_step_of_12_layers(measure, no_driver, table):
    """Forward and backward of a model as deep as GPT-2 124M."""
    model, idx = tiny_gpt(table), torch.randint(0, 64, (1, T))

    def work():
        in_place = working_copy.gradients_in_place() if table == "triton" else nullcontext()
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16), in_place:
            loss = model(idx, idx)[1]
        loss.backward()

    measure(work)


@pytest.mark.parametrize("table", ["triton", "eager"])
def test_one_token_through_12_layers(measure, no_driver, table):
    model, idx = tiny_gpt(table).eval(), torch.zeros(1, 1, dtype=torch.long)

    def work():
        with torch.autocast("cpu", torch.bfloat16):
            model(idx)

    measure(work)


def test_launch_adamw(measure, no_driver):
    """One step over the 148 tensors of GPT-2 124M, small ones: the kernels do not run."""
    from fastgpt.optim.adamw import FusedAdamW

    parameters = [torch.nn.Parameter(torch.zeros(16)) for _ in range(148)]
    for parameter in parameters:
        parameter.grad = torch.zeros(16)
    measure(FusedAdamW(parameters, max_grad_norm=1.0).step)
