"""bench.precision: the simulated model is the model, what is recorded is what it multiplies, the report says what was found."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import precision
from bench.numerics import errors, report
from bench.numerics import training as training_module
from bench.numerics.ops import simulated
from bench.numerics.simulation import BF16, FP8, FP16, FP16_FAST, FP32, MODES
from bench.numerics.training import QUICK, Operands, SimulatedRun
from fastgpt import common
from fastgpt.model import GPT
from fastgpt.ops import EAGER

PAGE = Path(__file__).parents[2] / "docs" / "precision-modes.md"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokens():
    return training_module.corpus(QUICK.characters)


def gradients(ops):
    torch.manual_seed(0)
    model = GPT(QUICK.model, ops)
    x = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(1))
    loss = model(x[:, :-1], x[:, 1:])[1]
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


# The simulated model


def test_in_fp32_it_is_the_model_itself():
    (loss, grads), (theirs, expected) = gradients(simulated(FP32)), gradients(EAGER)
    torch.testing.assert_close(loss, theirs)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("mode", "least", "most"), [(BF16, 1e-3, 2e-2), (FP16, 1e-5, 3e-3), (FP8, 1e-2, 0.3)])
def test_a_mode_s_rounding_reaches_every_weight(mode, least, most):
    scale = 2.0**10 if mode.needs_loss_scaling else 1.0
    _, expected = gradients(EAGER)

    torch.manual_seed(0)
    model = GPT(QUICK.model, simulated(mode))
    x = torch.randint(0, 256, (3, 17), generator=torch.Generator().manual_seed(1))
    (scale * model(x[:, :-1], x[:, 1:])[1]).backward()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "wpe" not in name:
            distance = (parameter.grad / scale - expected[name]).norm() / expected[name].norm()
            assert least < distance < most, name


def test_logits_lose_nothing_to_their_scale_and_their_sums_do_not_overflow():
    """512 tokens of one target, and a head that reads 4: the scale for fp32 sums, 2^15, would be inf in the first chunk."""
    x, weight = torch.full((512, 16), 4.0, requires_grad=True), torch.zeros(8, 16, requires_grad=True)
    target = torch.zeros(512, dtype=torch.long)
    for mode in (FP16, *(FP16_FAST.with_chunk(chunk) for chunk in (64, 128, 256, None))):
        weight.grad = None
        simulated(mode).linear_cross_entropy(x, weight, target).backward()
        torch.testing.assert_close(weight.grad[0], torch.full((16,), -3.5), rtol=2e-3, atol=0)


def test_every_matmul_of_a_step_is_recorded(tokens):
    pairs = training_module.record(QUICK, tokens, (1,), most=8)
    counts = {kind: sum(pair.what == kind for pair in pairs) for kind in errors.KINDS}
    assert counts == {kind: 4 * QUICK.n_layer if kind in ("forward", "dX", "dW") else 1 for kind in errors.KINDS}
    assert {pair.step for pair in pairs} == {1} and sum(counts.values()) == len(pairs)
    (head,) = (pair for pair in pairs if pair.what == "head dW")
    assert head.a.shape == (8, 4 * QUICK.batch_size * QUICK.block_size)  # four times as many tokens are summed over


# Errors


def test_errors_of_drawn_operands_are_repeatable_and_complete():
    points = errors.drawn((64,), (BF16, FP16_FAST))
    assert points == errors.drawn((64,), (BF16, FP16_FAST))
    assert len(points) == 2 * len(errors.VALUES) and all(p.overflow == 0 for p in points)
    for kind in errors.VALUES:
        bf16, fast = (p.error for p in points if p.values == kind.name)
        assert 0 < fast < bf16 < 5e-3


def gradient(what="dX", size=1e-7):
    torch.manual_seed(0)
    return Operands(what, 0, size * torch.randn(16, 64), torch.randn(64, 16))


def test_a_loss_scale_saves_small_gradients():
    pair = gradient()
    lost, kept, over = errors.over_scales([pair], FP16_FAST, (0, 16, 40), head=False)
    assert lost.to_zero > 0.1 and lost.subnormal > 0.7 and lost.beside_bf16 > 50
    assert kept.beside_bf16 < 1 and kept.products_overflow == 0
    assert over.overflow > 0.5 and over.products_overflow == 1.0 and math.isinf(over.beside_bf16)
    assert errors.over_scales([pair], FP16_FAST, (0,), head=True)[0].to_zero == 0  # none of the head's


def test_recorded_errors_stand_beside_bf16_s_on_the_same_operands():
    pairs = [gradient(), gradient("dW"), Operands("forward", 0, torch.zeros(4, 8), torch.zeros(8, 4))]
    rows = {(row.what, row.mode): row for row in errors.recorded(pairs, 2.0**16, (BF16, FP16_FAST))}
    assert set(rows) == {
        (what, mode) for what in ("dX", "dW") for mode in ("bf16", "fp16-fast")
    }  # a zero product has no error
    for what in ("dX", "dW"):
        assert rows[what, "bf16"].beside_bf16 == rows[what, "bf16"].as_stored == 1.0
        assert rows[what, "fp16-fast"].beside_bf16 < 0.5 and rows[what, "fp16-fast"].K == 64
    assert rows["dW", "fp16-fast"].as_stored == rows["dW", "fp16-fast"].beside_bf16  # stays fp32
    assert rows["dX", "bf16"].worst < 2.6e-3


def test_the_product_with_dv_has_its_gradient_second():
    torch.manual_seed(0)
    p, dout = torch.rand(16, 64), 1e-7 * torch.randn(64, 16)
    pair = Operands("dV", 0, p, dout)
    summed, stored = errors.multiply(pair, FP16, 2.0**16)
    torch.testing.assert_close(summed, p @ dout, rtol=5e-3, atol=1e-9)
    assert not torch.equal(summed, stored)


# Training


def test_a_run_differs_in_nothing_but_the_mode(tokens):
    setup = replace(QUICK, steps=3)
    first, again = (training_module.train(BF16, setup, tokens) for _ in range(2))
    assert first.losses == again.losses and first.validation == again.validation
    other = training_module.train(FP16_FAST, setup, tokens)
    perturbed = training_module.train(BF16, setup, tokens, name="p", perturbed=1)
    for run in (other, perturbed):
        assert run.losses != first.losses
        assert run.losses == pytest.approx(first.losses, abs=0.01)
    assert (first.scale, other.scale, other.skipped) == (None, 65536.0, 0)


def test_validation_text_is_not_trained_on(tokens):
    train, held = (bytes(part.tolist()) for part in tokens)
    assert len(train) > 10 * len(held) > 0
    assert held[-200:] not in train, "the end: a file's first lines may be a licence that others have, too"


# The report


def result(final):
    rows = [SimulatedRun(name, [2.0], [(1, value)], seconds=1.0) for name, value in final.items()]
    return {"setup": vars(QUICK) | {}, "runs": [vars(run) | {"final": run.final} for run in rows]}


def test_a_mode_off_by_more_than_a_hundredth_of_a_nat_is_named():
    training = result({"bf16": 2.0, "fp16": 2.009, "fp8": 2.02, "fp16-fast": math.nan, "fp8-fast": 1.98})
    assert [ok for *_, ok in report.differences(training)] == [True, True, False, False, False]


def test_the_command_writes_tables_and_pictures(tmp_path, capsys):
    assert precision.main(["--quick", "--train", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "bf16: validation loss" in printed and "written to" in printed
    found = json.loads((tmp_path / "out" / "precision.json").read_text())
    assert {run["mode"] for run in found["training"]["runs"]} > {
        "bf16",
        "bf16, perturbed 2",
        "fp16-fast, chunk 64",
        "fp8",
    }
    assert found["environment"]["threads"] == 1 and found["quick"]
    assert len(found["errors"]["scales"]) == 4 and set(found["errors"]["readings"]) == {"32", "64", "128"}
    text = (tmp_path / "out" / "precision-tables.md").read_text()
    assert "these figures mean nothing" in text
    for title in (
        "by K",
        "recorded from training",
        "Loss scales",
        "If the chip rounds otherwise",
        "Trained in each mode",
    ):
        assert title in text
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == [f"precision-{name}.png" for name in ("errors", "recorded", "scales", "training")]


def test_bad_input_is_one_sentence_and_exit_2(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    for argv, said in (
        (["--out", str(tmp_path / "file")], "which cannot be written"),
        (["--chunk", "3"], "flag is '--chunk'"),
    ):
        monkeypatch.setattr("sys.argv", ["precision", *argv])
        with pytest.raises(SystemExit) as stopped:
            common.run(precision.main)
        captured = capsys.readouterr()
        assert stopped.value.code == 2 and said in captured.err and "Traceback" not in captured.err


# The committed page


def test_the_page_shows_a_full_run_and_its_pictures():
    page = PAGE.read_text()
    assert "mean nothing" not in page and "Simulated on a CPU" in page
    for name in ("errors", "recorded", "scales", "training"):
        assert f"images/precision-{name}.png" in page
        assert (PAGE.parent / "images" / f"precision-{name}.png").stat().st_size > 10_000
    for mode in MODES:
        assert f"| {mode} |" in page or f"| {mode}, chunk 64 |" in page, mode
