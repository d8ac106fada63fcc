"""Loss scaling: GradScaler's decisions, without its pass over the gradients and without waiting for the device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import ops
from fastgpt.config import ModelConfig, OptimConfig
from fastgpt.model import GPT
from fastgpt.optim.adamw import FusedAdamW
from fastgpt.optim.build import build_optimizer
from fastgpt.training.step import LossScaler, Stepper

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


def stepper(scaler, device, kernels="triton"):
    torch.manual_seed(0)
    config = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=64, bias=True)
    model = GPT(config, ops.EAGER).to(device)
    optimizer = build_optimizer(model, OptimConfig(), kernels)
    return Stepper(model, model, optimizer, scaler(device.type, init_scale=2.0**10), "fp32", 1.0)


def batch(device):
    x = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(3)).to(device)
    return x[:, :-1], x[:, 1:]


@pytest.mark.parametrize("scaler", SCALERS)
def test_a_training_step_with_loss_scaling_reads_nothing_back(scaler, device):
    run = stepper(scaler, device)
    run([batch(device)], 1, 1e-3)  # the first makes the scale, the moments and the table of hyperparameters
    with Calls() as calls:
        for lr in (2e-3, 3e-3):
            run([batch(device), batch(device)], 2, lr)
    assert calls.reads == []
    assert calls.passes == (0 if scaler is LossScaler else 2)


def test_the_count_sees_a_read(device):
    """torch's own AdamW on a CPU has no device-side skip: GradScaler asks for the flag."""
    run = stepper(torch.amp.GradScaler, torch.device("cpu"), kernels="eager")
    with Calls() as calls:
        run([batch(torch.device("cpu"))], 1, 1e-3)
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
