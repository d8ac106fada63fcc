"""--precision fp8: when a run gets it, what it says, and a few steps of the real loop. The kernels' own tests are in
tests/kernels/fp8/test_ops.py."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from fastgpt import ops
from fastgpt.config import EXPERIMENTAL, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, parse
from fastgpt.hardware import cards
from fastgpt.kernels import runtime
from fastgpt.kernels.fp8 import launch
from fastgpt.model import GPT
from fastgpt.ops import precision_for, scales_loss, usable_precision
from fastgpt.optim.build import build_optimizer
from fastgpt.performance import memory
from fastgpt.training.loop import train
from fastgpt.training.step import Stepper
from tests.shards import write_shard

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=256)


def on(monkeypatch, name, capability):
    """On this card, which may be one that the table does not have."""
    card = cards.lookup(name)
    monkeypatch.setattr(cards, "present", lambda device=None: card)
    monkeypatch.setattr(launch, "capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card.name if card else name)


@pytest.mark.parametrize(
    "name, capability",
    [("rtx4070", (8, 9)), ("l4", (8, 9)), ("h100", (9, 0)), ("rtx5090", (12, 0)), ("NVIDIA Unheard Of", (8, 9))],
)
def test_cards_that_have_fp8_get_it(name, capability, monkeypatch):
    on(monkeypatch, name, capability)
    assert usable_precision("fp8", CUDA, "triton") == ("fp8", None)
    assert usable_precision("auto", CUDA, "triton") == ("bf16", None), "auto never picks it"


@pytest.mark.parametrize("name, capability", [("a100", (8, 0)), ("rtx3090", (8, 6)), ("NVIDIA Unheard Of", (7, 5))])
def test_cards_that_have_not_get_bf16_and_a_sentence(name, capability, monkeypatch):
    on(monkeypatch, name, capability)
    card = f"{getattr(cards.lookup(name), 'name', name)} (sm_{capability[0]}{capability[1]})"
    assert usable_precision("fp8", CUDA, "triton") == (
        "bf16",
        f"precision is 'fp8', but {card} has no fp8 tensor cores, which come with sm_89: bf16 is used instead",
    )


def test_plain_pytorch_and_a_cpu_without_the_interpreter_have_it_not(monkeypatch):
    on(monkeypatch, "rtx4070", (8, 9))
    assert usable_precision("fp8", CUDA, "eager") == (
        "bf16",
        "precision is 'fp8', which --kernels eager does not have: bf16 is used instead",
    )
    monkeypatch.setattr(runtime, "INTERPRET", False)
    assert usable_precision("fp8", CPU, "triton") == (
        "fp32",
        "precision is 'fp8', which only the Triton kernels have, and they do not run here: fp32 is used instead",
    )


def test_it_is_bf16_but_for_the_linears():
    assert "fp8" in EXPERIMENTAL and not scales_loss("fp8") and ops.DTYPES["fp8"] == torch.bfloat16
    table, bf16 = ops.get("triton", "fp8"), ops.TRITON
    assert table is ops.get("triton", "fp8") and table.name == "triton fp8"
    assert table.attention is bf16.attention and table.linear_cross_entropy is bf16.linear_cross_entropy
    assert ops.get("eager", "fp8") is ops.EAGER
    sizes = [
        memory.memory(ModelConfig(), micro_batch=8, kernels="triton", precision=name).total for name in ("bf16", "fp8")
    ]
    assert sizes[0] == sizes[1]


def stepper(device) -> Stepper:
    torch.manual_seed(0)
    model, optim = GPT(TINY, ops.get("triton", "fp8")).to(device), OptimConfig(lr=1e-2)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    return Stepper(model, model, build_optimizer(model, optim, "triton"), scaler, "fp8", optim.grad_clip)


@pytest.mark.usefixtures("needs_fp8")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of inf in the interpreter
def test_a_step_that_overflows_inside_fp8_is_skipped_and_counted(device):
    run = stepper(device)
    tokens = torch.randint(0, 256, (2, 17), device=device)
    with torch.no_grad():
        run.model.transformer.h[0].mlp.c_fc.weight[3, 4] = float("inf")
    before = [p.detach().clone() for p in run.model.parameters()]
    run([(tokens[:, :-1], tokens[:, 1:])], 1, 1e-2)
    assert run.skipped_steps() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters()))


@pytest.mark.usefixtures("needs_fp8")
def test_evaluation_is_bf16s(device):
    model = stepper(device).model.eval()
    other = GPT(TINY, ops.TRITON).to(device).eval()
    other.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 256, (2, 17), device=device)
    with torch.no_grad(), ops.autocast(device, "fp8"):
        assert torch.equal(model(tokens[:, :-1], tokens[:, 1:])[1], other(tokens[:, :-1], tokens[:, 1:])[1])


@pytest.mark.usefixtures("needs_fp8")
def test_a_run_says_that_it_is_experimental_trains_and_is_resumed_in_bf16(tmp_path, device):
    tokens = torch.randint(0, 256, (3000,), dtype=torch.int32).numpy()
    (tmp_path / "data").mkdir()
    for name, part in (("train", tokens[:2000]), ("val", tokens[2000:])):
        write_shard(tmp_path / "data" / f"{name}.bin", part)
    settings = TrainConfig(
        precision="fp8", max_iters=2, eval_interval=0, eval_iters=1, log_interval=1, tensorboard=False, doctor=False,
        out=tmp_path / "run",
    )  # fmt: skip
    data = DataConfig(data=str(tmp_path / "data"), tokenizer="bytes", batch_size=2, grad_accum=2)
    config = Config(model=TINY, data=data, optim=OptimConfig(warmup_iters=1), train=settings)

    def printed(config):
        with open(os.devnull, "w") as null:
            console = Console(file=null, record=True, soft_wrap=True, highlight=False)
            run, code = train(config, device, console)
        assert code == 0
        return run, console.export_text()

    run, text = printed(config)
    assert "triton, fp8 (experimental: no GPU has confirmed it yet)" in text
    assert run.step == 2 and run.stepper.precision == "fp8" and run.refused is None
    resumed = replace(config, train=replace(settings, precision="bf16", max_iters=3, resume="newest"))
    run, text = printed(resumed)
    assert run.step == 3 and "precision: fp8 -> bf16" in text
    run, text = printed(replace(config, train=replace(settings, kernels="eager", out=tmp_path / "eager")))
    safe = precision_for("auto", device)
    assert f"precision is 'fp8', which --kernels eager does not have: {safe} is used instead" in text


def test_the_flag():
    assert parse(["--precision", "fp8"], "cpu").train.precision == "fp8"
