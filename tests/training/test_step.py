"""One optimizer step: accumulation, clipping, precision; and loss scaling: GradScaler's decisions, without its pass over the
gradients and without waiting for the device."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import ops
from fastgpt.config import ModelConfig, OptimConfig
from fastgpt.kernels import fused_linear, working_copy
from fastgpt.kernels.fp8 import launch
from fastgpt.model import GPT
from fastgpt.optim.adamw import FusedAdamW
from fastgpt.optim.build import build_optimizer
from fastgpt.training.step import LossScaler, Stepper

TINY = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=64, bias=True)
OPTIM = OptimConfig(lr=1e-2)


def make(kernels, device, precision="fp32", optim=OPTIM, adds_in_place=False):
    torch.manual_seed(0)
    model = GPT(TINY, ops.get(kernels)).to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    optimizer = build_optimizer(model, optim, kernels)
    return Stepper(model, model, optimizer, scaler, precision, optim.grad_clip, adds_in_place=adds_in_place)


def batch(device, rows):
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 64, (rows, 17), generator=generator).to(device)
    return x[:, :-1], x[:, 1:]


@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_eight_micro_batches_of_one_equal_one_of_eight(kernels, device):
    x, y = batch(device, 8)
    whole, parts = make(kernels, device), make(kernels, device)
    loss, norm = whole([(x, y)], 1, 1e-3)
    loss_parts, norm_parts = parts([(x[i : i + 1], y[i : i + 1]) for i in range(8)], 8, 1e-3)
    torch.testing.assert_close(loss_parts, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm_parts, norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_triton_steps_as_eager_does(precision, device):
    """Loss and gradient norm of three steps agree to the rounding of the precision."""
    eps = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 3e-3}[precision]
    steppers = [make(kernels, device, precision) for kernels in ("eager", "triton")]
    for _ in range(3):
        (loss, norm), (loss_triton, norm_triton) = [stepper([batch(device, 4)], 1, 1e-3) for stepper in steppers]
        assert loss_triton.dtype == torch.float32
        torch.testing.assert_close(loss_triton, loss, rtol=eps, atol=0)
        torch.testing.assert_close(norm_triton.reshape(()), norm.reshape(()), rtol=eps, atol=0)


def test_weights_are_cast_once_and_then_written_by_the_optimizer(device, monkeypatch):
    cast, keep = [], working_copy.keep
    monkeypatch.setattr(
        working_copy, "keep", lambda entries, param, made: (cast.append(param), keep(entries, param, made))
    )
    stepper = make("triton", device, "bf16")
    for _ in range(2):
        stepper([batch(device, 1)] * 2, 2, 1e-3)
    assert len(cast) == 4, "the matrices of the one block"
    for param in cast:
        assert torch.equal(working_copy.existing(param), param.bfloat16())


@pytest.mark.parametrize("precision", ["bf16", "fp16-fast", "fp8"])
def test_all_that_a_step_makes_lies_where_its_inputs_do(precision, device):
    if precision == "fp8" and launch.refusal(device):
        pytest.skip("no fp8")
    model = GPT(replace(TINY, dropout=0.1), ops.get("triton", precision)).to(device)
    scaler = LossScaler(device.type, enabled=precision == "fp16-fast")
    stepper = Stepper(model, model, build_optimizer(model, OPTIM, "triton"), scaler, precision, 1.0, adds_in_place=True)
    tokens = batch(device, 2)
    with torch.device("meta"):  # what names no device is made there, where no kernel and no sum can use it
        losses = [stepper.micro_step(tokens, 2) for _ in range(2)]
    assert all(loss.isfinite() for loss in losses)
    assert all(p.grad.device.type == device.type for p in model.parameters())


def accumulated(device, grad_accum, adds_in_place, hooks=False):
    """Gradients of ``grad_accum`` micro-batches by parameter name, and which of them stay at one address throughout."""
    stepper = make("triton", device, "bf16", adds_in_place=adds_in_place)
    seen = []
    if hooks:
        for parameter in stepper.model.parameters():
            parameter.register_hook(lambda grad: seen.append(grad))
    x, y = batch(device, grad_accum)
    added = []
    real = fused_linear._bwd_weight_add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_linear, "_bwd_weight_add", lambda grad, *rest: added.append(grad) or real(grad, *rest))
        for i in range(grad_accum):
            stepper.micro_step((x[i : i + 1], y[i : i + 1]), grad_accum)
    assert len(seen) == (grad_accum * len(list(stepper.model.parameters())) if hooks else 0)
    return {name: p.grad for name, p in stepper.model.named_parameters()}, len(added)


@pytest.mark.parametrize("grad_accum", [1, 2, 3])
def test_gradients_added_in_place_are_those_that_autograd_adds(device, grad_accum):
    """To the rounding of fp32 sums, also that of the head, which is tied to the embedding. The first micro-batch's are
    new tensors either way, with the same bits."""
    plain, none = accumulated(device, grad_accum, False)
    ours, added = accumulated(device, grad_accum, True)
    assert none == 0 and added == 4 * (grad_accum - 1)
    for name, grad in ours.items():
        if grad_accum == 1:
            assert torch.equal(grad, plain[name]), name
        else:
            torch.testing.assert_close(
                grad, plain[name], rtol=1e-5, atol=1e-6 * float(plain[name].abs().max()), msg=name
            )


def test_where_hooks_want_to_see_gradients_none_is_added_in_place(device):
    plain, _ = accumulated(device, 2, False, hooks=True)
    ours, added = accumulated(device, 2, True, hooks=True)
    assert added == 0 and all(torch.equal(grad, plain[name]) for name, grad in ours.items())


@pytest.mark.parametrize("kernels", ["eager", "triton"])
def test_clipping_reports_the_norm_before_it(kernels, device):
    tight = make(kernels, device, optim=OptimConfig(grad_clip=1e-3))
    _, norm = tight([batch(device, 2)], 1, 1e-3)
    assert norm.item() > 1e-3
    free = make(kernels, device, optim=OptimConfig(grad_clip=0))
    _, unclipped = free([batch(device, 2)], 1, 1e-3)
    torch.testing.assert_close(norm, unclipped, rtol=1e-5, atol=0)


# ---- loss scaling

ATEN = torch.ops.aten
SCALERS = [LossScaler, torch.amp.GradScaler]


class Calls(TorchDispatchMode):
    """Counts what brings a value to the host (a GPU would be waited for), and passes over the gradients."""

    def __init__(self):
        super().__init__()
        self.reads, self.passes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (
            ATEN._local_scalar_dense.default,
            ATEN.is_nonzero.default,
            ATEN.nonzero.default,
            ATEN.equal.default,
        ):
            self.reads.append(str(func))
        self.passes += func is ATEN._amp_foreach_non_finite_check_and_unscale_.default
        return func(*args, **(kwargs or {}))


def scaled(scaler, device, kernels="triton"):
    torch.manual_seed(0)
    model = GPT(TINY, ops.EAGER).to(device)
    optimizer = build_optimizer(model, OptimConfig(), kernels)
    return Stepper(model, model, optimizer, scaler(device.type, init_scale=2.0**10), "fp32", 1.0)


@pytest.mark.parametrize("scaler", SCALERS)
def test_a_training_step_with_loss_scaling_reads_nothing_back(scaler, device):
    run = scaled(scaler, device)
    run([batch(device, 2)], 1, 1e-3)  # the first makes the scale, the moments and the table of hyperparameters
    with Calls() as calls:
        for lr in (2e-3, 3e-3):
            run([batch(device, 2), batch(device, 2)], 2, lr)
    assert calls.reads == []
    assert calls.passes == (0 if scaler is LossScaler else 2)


def test_the_count_sees_a_read(device):
    """torch's own AdamW, unless it is fused, has no device-side skip: GradScaler asks for the flag."""
    run = scaled(torch.amp.GradScaler, torch.device("cpu"), kernels="eager")
    run.optimizer = torch.optim.AdamW(run.model.parameters(), fused=False)
    with Calls() as calls:
        run([batch(torch.device("cpu"), 2)], 1, 1e-3)
    assert calls.reads


def parameters(device):
    torch.manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in ((5, 3), (7,))]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_it_decides_as_gradscaler_does(bad, device):
    """Overflow halves the scale and skips the step, a row of good steps doubles it; the parameters agree bit for bit."""
    runs = []
    for scaler in SCALERS:
        params = parameters(device)
        optimizer = FusedAdamW(params, max_grad_norm=1.0)
        grow = scaler(device.type, init_scale=1024.0, growth_interval=2)
        history = []
        for factor in (1.0, bad, 1.0, 2.0, 0.5, bad, bad, 1.0):
            optimizer.zero_grad()
            before = [p.detach().clone() for p in params]
            grow.scale(sum((p * factor).sin().sum() for p in params)).backward()
            grow.step(optimizer)
            grow.update()
            moved = not all(torch.equal(p, old) for p, old in zip(params, before))
            assert moved == (factor in (1.0, 2.0, 0.5))
            history.append(grow.get_scale())
        assert int(optimizer.skipped_steps) == 3 and not hasattr(optimizer, "grad_scale")
        runs.append((history, params))
    assert runs[0][0] == runs[1][0] == [1024.0, 512.0, 512.0, 1024.0, 1024.0, 512.0, 256.0, 256.0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1]))


def test_gradients_unscaled_beforehand_are_left_to_gradscaler(device):
    params, theirs = parameters(device), parameters(device)
    scaler, reference = LossScaler(device.type), FusedAdamW(theirs)
    optimizer = FusedAdamW(params)
    scaler.scale(sum(p.sin().sum() for p in params)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    sum(p.sin().sum() for p in theirs).backward()
    reference.step()
    assert all(torch.equal(a, b) for a, b in zip(params, theirs))


def test_another_optimizer_gets_gradscalers_own_step(device):
    params = parameters(device)
    before = [p.detach().clone() for p in params]
    optimizer, scaler = torch.optim.SGD(params, lr=0.1), LossScaler(device.type)
    scaler.scale(sum(p.sum() for p in params)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.allclose(p, old - 0.1) for p, old in zip(params, before))


def test_a_step_twice_without_update_is_refused_and_a_disabled_scaler_only_steps(device):
    params = parameters(device)
    optimizer, scaler = FusedAdamW(params), LossScaler(device.type)
    scaler.scale(sum(p.sum() for p in params)).backward()
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    off = LossScaler(device.type, enabled=False)
    before = [p.detach().clone() for p in params]
    off.step(optimizer)
    assert not torch.equal(params[0], before[0])


def test_its_state_is_gradscalers(device):
    scaler, other = LossScaler(device.type, init_scale=256.0), torch.amp.GradScaler(device.type)
    params = parameters(device)
    optimizer = FusedAdamW(params)
    scaler.scale(sum(p.sum() for p in params)).backward()
    scaler.step(optimizer)
    scaler.update()
    other.load_state_dict(copy.deepcopy(scaler.state_dict()))
    assert other.state_dict() == scaler.state_dict() and other.get_scale() == 256.0
