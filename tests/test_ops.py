"""--precision: what a run computes in, what it says about it, and training in fp16-fast.

The interpreter rounds each block's sum once, where a tensor core rounds every 8 products: what is shown here is that the mode
is wired up right. bench.precision simulates what the rounding costs.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastgpt import ops
from fastgpt.common import run as command
from fastgpt.config import EXPERIMENTAL, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, parse
from fastgpt.hardware import cards
from fastgpt.kernels import runtime
from fastgpt.model import GPT
from fastgpt.ops import precision_for, scales_loss, usable_precision
from fastgpt.optim.build import build_optimizer
from fastgpt.performance import memory
from fastgpt.training.loop import train
from fastgpt.training.step import LossScaler, Stepper
from tests.shards import write_shard

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=72, bias=True, dropout=0.1)
MODERN = ModelConfig(
    n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=72, dropout=0.1, family="modern", n_kv_head=1,
    rotary_base=100.0, qk_norm=True, activation="relu2", tied_head=False, embedding_norm=True, residual_scalars=True,
    value_embeddings=True, softcap=15.0,
)  # fmt: skip
FAMILIES = pytest.mark.parametrize("shape", [TINY, MODERN], ids=["gpt2", "modern"])


def stepper(precision, device, kernels="triton", init_scale=2.0**16, shape=TINY):
    torch.manual_seed(0)
    optimizer = "muon" if shape.family == "modern" else "adamw"
    model, optim = GPT(shape, ops.get(kernels, precision)).to(device), OptimConfig(optimizer, lr=1e-2)
    scaler = LossScaler(device.type, init_scale=init_scale, enabled=scales_loss(precision))
    return Stepper(model, model, build_optimizer(model, optim, kernels), scaler, precision, optim.grad_clip)


def batch(device, seed=3, rows=4):
    x = torch.randint(0, 72, (rows, 17), generator=torch.Generator().manual_seed(seed)).to(device)
    return x[:, :-1], x[:, 1:]


# ---- training in fp16-fast


def test_fp16_fast_trains_as_fp32_does(device):
    """Steps with dropout and a second micro-batch: the same losses and gradient norms to fp16's rounding, none skipped."""
    runs, results = [stepper(precision, device) for precision in ("fp32", "fp16-fast")], []
    for i, batches in enumerate([[batch(device)]] * 3 + [[batch(device), batch(device, 5)]]):
        step_of_each = []
        for run in runs:
            torch.manual_seed(i)
            step_of_each.append(run(batches, len(batches), 1e-2))
        results.append(step_of_each)
    for (loss, norm), (loss_fast, norm_fast) in results:
        torch.testing.assert_close(loss_fast, loss, rtol=3e-3, atol=0)
        torch.testing.assert_close(norm_fast.reshape(()), norm.reshape(()), rtol=2e-2, atol=0)
    assert results[2][1][0] < results[0][1][0] - 0.4, "it learns"
    assert runs[1].skipped_steps() == 0 and runs[1].scaler.get_scale() == 2.0**16


def test_a_modern_model_trains_in_fp16_fast_as_in_fp32(device):
    """Beside plain PyTorch: a step of Muon, and the loss after it."""
    still = replace(MODERN, dropout=0.0)
    runs = stepper("fp32", device, "eager", shape=still), stepper("fp16-fast", device, shape=still)
    (loss, norm), (loss_fast, norm_fast) = (run([batch(device)], 1, 1e-2) for run in runs)
    torch.testing.assert_close(loss_fast, loss, rtol=3e-3, atol=0)
    torch.testing.assert_close(norm_fast.reshape(()), norm.reshape(()), rtol=2e-2, atol=0)
    with torch.no_grad():
        after = []
        for run in runs:
            with ops.autocast(device, run.precision):
                after.append(run.model(*batch(device))[1])
    torch.testing.assert_close(after[1], after[0], rtol=3e-3, atol=0)
    assert after[1] < loss_fast and runs[1].skipped_steps() == 0


def test_an_overflow_skips_the_step_counts_it_and_halves_the_scale(device):
    run = stepper("fp16-fast", device, init_scale=2.0**40)
    before = [p.detach().clone() for p in run.model.parameters()]
    run([batch(device)], 1, 1e-2)
    assert all(torch.equal(p, old) for p, old in zip(run.model.parameters(), before))
    assert run.skipped_steps() == 1 and run.scaler.get_scale() == 2.0**39
    run.scaler.update(2.0**16)
    loss, norm = run([batch(device)], 1, 1e-2)
    assert torch.isfinite(loss) and torch.isfinite(norm) and run.skipped_steps() == 1
    assert not torch.equal(run.model.head, before[0])


@FAMILIES
def test_every_product_of_a_step_but_the_scores_is_summed_in_fp16(device, monkeypatch, shape):
    """No library is called, and each of the kernels is told."""
    from fastgpt.kernels import fused_attn, fused_cross_entropy, matmul

    flags = []

    class Watched:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **options):
                flags.append(options["FP16_SUMS"] if "FP16_SUMS" in options else options["CHUNK"] > 0)
                return self.kernel[grid](*args, **options)

            return launch

    def refuse(*_, **__):
        pytest.fail("a library's matmul sums in fp32")

    for name in ("forward_kernel", "backward_q_kernel", "backward_kv_kernel"):
        monkeypatch.setattr(fused_attn, name, Watched(getattr(fused_attn, name)))
    for name in ("linear_kernel", "weight_grad_kernel"):
        monkeypatch.setattr(matmul, name, Watched(getattr(matmul, name)))
    for module, name in ((matmul, "_cublas"), (fused_cross_entropy, "matmul_fp32")):
        monkeypatch.setattr(module, name, refuse)
    stepper("fp16-fast", device, shape=shape)([batch(device)], 1, 1e-2)
    # Of four linears and the head forward, dX and dW each, and attention's three kernels.
    assert flags == [True] * (3 * 5 + 3)


def test_text_is_generated_from_the_same_table(device):
    model = stepper("fp16-fast", device).model.eval()
    prompt = torch.tensor([[1, 2, 3]], device=device)
    with ops.autocast(device, "fp16-fast"):
        tokens = list(model.generate(prompt, 3, temperature=0.0))
    plain = stepper("fp32", device).model.eval()
    assert [int(t) for t in tokens] == [int(t) for t in plain.generate(prompt, 3, temperature=0.0)]


def test_the_table_refuses_operands_that_are_not_fp16(device):
    """Outside autocast nothing is fp16: an error, not other arithmetic than was asked for."""
    model = GPT(TINY, ops.get("triton", "fp16-fast")).to(device)
    with pytest.raises(ValueError, match="accumulate is 'fp16', but the operands are"):
        model(*batch(device))


def test_tables_of_operations():
    assert ops.get("triton", "fp16") is ops.get("triton", "bf16") is ops.get("triton") is ops.TRITON
    fast = ops.get("triton", "fp16-fast")
    assert fast is ops.get("triton", "fp16-fast")
    assert (fast.layer_norm, fast.embedding) == (ops.TRITON.layer_norm, ops.TRITON.embedding)
    assert ops.get("eager", "fp16-fast") is ops.EAGER


# ---- where it runs


def on(monkeypatch, name):
    monkeypatch.setattr(cards, "present", lambda device=None: None if name is None else cards.lookup(name))


@pytest.mark.parametrize("name", ["rtx4070", "rtx3090", "rtx5090", None])
def test_a_geforce_card_and_one_that_is_unknown_get_what_is_asked_for(name, monkeypatch):
    on(monkeypatch, name)
    assert usable_precision("fp16-fast", CUDA, "triton") == ("fp16-fast", None)


@pytest.mark.parametrize("name", ["h100", "h200", "a100", "a6000", "l40s"])
def test_a_card_that_gains_nothing_gets_bf16_and_a_sentence(name, monkeypatch):
    on(monkeypatch, name)
    precision, why = usable_precision("fp16-fast", CUDA, "triton")
    assert precision == "bf16"
    assert why == (f"precision is 'fp16-fast', and {cards.lookup(name).name} is no faster in it: bf16 is used instead")


def test_plain_pytorch_and_a_cpu_without_the_interpreter_have_it_not(monkeypatch):
    on(monkeypatch, "rtx4070")
    precision, why = usable_precision("fp16-fast", CUDA, "eager")
    assert (precision, why) == (
        "bf16",
        "precision is 'fp16-fast', which --kernels eager does not have: bf16 is used instead",
    )
    on(monkeypatch, None)
    monkeypatch.setattr(runtime, "INTERPRET", True)
    assert usable_precision("fp16-fast", CPU, "triton") == ("fp16-fast", None)
    monkeypatch.setattr(runtime, "INTERPRET", False)
    assert usable_precision("fp16-fast", CPU, "triton")[0] == "fp32"


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_other_precisions_are_what_is_asked_for(name, monkeypatch):
    on(monkeypatch, "h100")
    assert usable_precision(name, CUDA, "eager") == usable_precision(name, CPU, "triton") == (name, None)


def test_auto_is_never_experimental_on_any_card(monkeypatch):
    assert "fp16-fast" in EXPERIMENTAL
    for gpu in cards.GPUS:
        monkeypatch.setattr(cards, "present", lambda device=None, gpu=gpu: gpu)
        assert usable_precision("auto", CUDA, "triton") == (precision_for("auto", CUDA), None) == ("bf16", None)
    assert usable_precision("auto", CPU, "triton") == ("fp32", None)


@FAMILIES
def test_it_needs_the_memory_of_fp16(shape):
    model = shape
    assert memory.memory(model, micro_batch=8, kernels="triton", precision="fp16-fast") == memory.memory(
        model, micro_batch=8, kernels="triton", precision="fp16"
    )


# ---- a run


@pytest.fixture
def config(tmp_path):
    text = torch.frombuffer(bytearray(Path(__file__).read_bytes()), dtype=torch.uint8).to(torch.int32).numpy()
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "train.bin", text[:3000])
    write_shard(tmp_path / "data" / "val.bin", text[3000:4000])
    return Config(
        model=replace(TINY, vocab_size=256),
        data=DataConfig(data=str(tmp_path / "data"), tokenizer="bytes", batch_size=2),
        optim=OptimConfig(warmup_iters=1),
        train=TrainConfig(
            kernels="triton", precision="fp16-fast", max_iters=2, eval_interval=0, eval_iters=1, log_interval=1,
            tensorboard=False, doctor=False, out=tmp_path / "run",
        ),
    )  # fmt: skip


def with_train(config, **changes):
    return replace(config, train=replace(config.train, **changes))


def printed(config, device):
    with open(os.devnull, "w") as null:
        console = Console(file=null, record=True, soft_wrap=True, highlight=False)
        run, code = train(config, device, console)
    assert code == 0
    return run, " ".join(console.export_text().split())  # whatever the width that lines are broken at


def test_a_run_says_that_it_is_experimental_and_goes_on_from_its_checkpoint_in_either_direction(
    config, device, monkeypatch
):
    on(monkeypatch, "rtx4070")  # whatever card is here: others are refused it
    run, text = printed(config, device)
    assert "triton, fp16-fast (experimental: no GPU has confirmed it yet)" in text
    assert run.stepper.precision == "fp16-fast" and run.stepper.scaler.is_enabled() and run.refused is None
    assert json.loads((config.train.out / "config.json").read_text())["train"]["precision"] == "fp16-fast"
    # To a precision that scales no loss, and back: its checkpoint has no scale to go on with.
    run, text = printed(with_train(config, precision="fp32", max_iters=3, resume="newest"), device)
    assert run.step == 3 and "precision: fp16-fast -> fp32" in text and not run.stepper.scaler.is_enabled()
    run, _ = printed(with_train(config, max_iters=4, resume="newest"), device)
    assert run.step == 4 and run.stepper.scaler.get_scale() == 2.0**16 and run.stepper.skipped_steps() == 0


def test_a_run_that_cannot_have_it_says_so_and_trains(config, device):
    run, text = printed(with_train(config, kernels="eager"), device)
    safe = precision_for("auto", device)
    assert f"precision is 'fp16-fast', which --kernels eager does not have: {safe} is used instead" in text
    assert "experimental" not in text and f"eager, {safe}" in text
    assert run.step == 2 and run.stepper.precision == safe


# ---- the command line


def test_the_flag_and_its_help(capsys):
    assert parse(["--precision", "fp16-fast"], "cpu").train.precision == "fp16-fast"
    with pytest.raises(SystemExit) as stopped:
        parse(["--help"], "cpu")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stopped.value.code == 0
    assert "fp16-fast, which is experimental: fp16 operands, products summed in fp16" in shown


def test_a_precision_that_does_not_exist_is_one_sentence_and_exit_2(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--precision", "fp17"])
    with pytest.raises(SystemExit) as stopped:
        command(lambda args: parse(args, "cpu"))
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and "fp17" in shown.err and "Traceback" not in shown.err
