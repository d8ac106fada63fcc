"""One optimizer step: groups, accumulation, clipping, precision."""

from __future__ import annotations

import pytest
import torch

from fastgpt import ops
from fastgpt.config import ModelConfig, OptimConfig
from fastgpt.kernels import fused_linear
from fastgpt.model import GPT
from fastgpt.ops import precision_for
from fastgpt.optim.build import build_optimizer, parameter_groups
from fastgpt.training.step import Stepper

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
    """To the rounding of fp32 sums, also that of the head, which is the embedding too; the first micro-batch's are new tensors
    either way, with the same bits."""
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


def test_norms_and_biases_do_not_decay():
    decay, plain = parameter_groups(GPT(TINY), OptimConfig(weight_decay=0.1))
    assert decay["weight_decay"] == 0.1 and plain["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decay["params"]) and all(p.dim() == 1 for p in plain["params"])
    assert len(decay["params"]) + len(plain["params"]) == len(list(GPT(TINY).parameters()))


def test_auto_precision_is_fp32_on_a_cpu_and_bf16_on_a_gpu():
    assert precision_for("auto", torch.device("cpu")) == "fp32"
    assert precision_for("auto", torch.device("cuda")) == "bf16"
    assert precision_for("fp16", torch.device("cpu")) == "fp16"
