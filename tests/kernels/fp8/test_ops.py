"""Layers in fp8: what the kernels around them write against a pass of its own, bit by bit; whole layers against the error that
the simulation foretells (docs/precision-modes.md)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import islice

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bench.numerics.simulation import FP8_ROWS, relative_error
from bench.numerics.simulation import matmul as simulated
from fastgpt import ops
from fastgpt.config import ModelConfig
from fastgpt.kernels import fused_attn, fused_layernorm, fused_linear, reference, runtime, tuning, working_copy
from fastgpt.kernels.fp8 import launch
from fastgpt.kernels.fp8 import ops as module
from fastgpt.kernels.fp8.launch import FORWARD, GRADIENT, Fp8, Grouped
from fastgpt.model import GPT
from fastgpt.optim.adamw import FusedAdamW
from tests.kernels.fp8.test_launch import dequantised, rounded, rounded_in_groups, same_bits

BF16 = torch.bfloat16
pytestmark = [
    pytest.mark.usefixtures("needs_fp8"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of inf and NaN in the interpreter
]


# ---------------------------------------------------------------- attention

ATTENTION = {
    "one head": (1, 1, 64, 70, {}),
    "heads, documents": (3, 3, 64, 33, {"docs": True}),
    "grouped queries, dropout": (4, 2, 64, 130, {"dropout_p": 0.2}),
    "two groups a head, window": (2, 1, 128, 20, {"window": 7}),
    "three, of which a tile has four": (1, 1, 192, 17, {}),
    "heads of 32": (3, 1, 32, 21, {}),
    "heads of 96, dropout": (1, 1, 96, 17, {"dropout_p": 0.2}),
}


def attend(op, qkv: Tensor, heads: int, kv: int, options: dict):
    """(output, its form, gradient of qkv, its form)."""
    torch.manual_seed(3)
    B, T, _ = qkv.shape
    if "docs" in options:
        options = {"doc_ids": (torch.arange(T, device=qkv.device) // 9).expand(B, T)}
    qkv = qkv.clone().requires_grad_()
    out = op(qkv, heads, n_kv_head=kv, **options)
    form, seen = launch.take(out, FORWARD, grouped=True), []
    qkv.register_hook(lambda grad: seen.append(launch.take(grad, GRADIENT, grouped=True)))
    out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(BF16))
    return out.detach(), form, qkv.grad, seen[0]


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_writes_what_a_pass_would(device, case, monkeypatch):
    # Without fp8 in the tiles that it has with fp8, and so with sums in the same order.
    choose, chosen = tuning.choose, {}
    monkeypatch.setattr(fused_attn, "_prepared", fused_attn._prepared.__wrapped__)  # without its memory
    monkeypatch.setattr(tuning, "choose", lambda kernel, *rest: chosen.setdefault(kernel, choose(kernel, *rest)))
    heads, kv, D, T, options = ATTENTION[case]
    qkv = torch.randn(2, T, (heads + 2 * kv) * D, device=device).to(BF16)
    out, form, grad, grad_form = attend(module.qkv_attention, qkv, heads, kv, options)
    plain, none, plain_grad, no_grad_form = attend(fused_attn.qkv_attention, qkv, heads, kv, options)
    assert torch.equal(out, plain) and torch.equal(grad, plain_grad), "attention itself is the same"
    assert none is None and no_grad_form is None
    for tensor, found, dtype in ((out, form, FORWARD), (grad, grad_form, GRADIENT)):
        expected = rounded_in_groups(tensor.flatten(0, 1), dtype, 32 if D % 64 else 64)
        assert found.values.shape == tensor.shape and same_bits(found.values.flatten(0, 1), expected.values)
        assert torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=str)
def test_what_is_not_finite_passes_from_attention_to_its_linears(device, bad):
    qkv, weight = torch.randn(1, 140, 192, device=device).to(BF16), torch.randn(32, 64, device=device)
    clean = attend(module.qkv_attention, qkv, 1, 1, {})
    assert all(dequantised(Grouped(form.values.flatten(0, 1), form.scale)).isfinite().all() for form in clean[1::2])
    qkv[0, 130, 130] = bad  # v of key 130: in the output of the tiles that read it
    out, form, grad, grad_form = attend(module.qkv_attention, qkv, 1, 1, {})
    for tensor, made, width in ((out, form, 64), (grad, grad_form, 192)):
        b = launch.quantise_weight(torch.ones(16, width, device=device))[0]
        finite = launch.matmul(Grouped(made.values.flatten(0, 1), made.scale), b).isfinite()
        broken = ~tensor[0].isfinite().all(dim=1)
        assert 0 < broken.sum() and not finite[broken].any() and finite[~broken].all()
    qkv.requires_grad_()
    y = module.linear(module.qkv_attention(qkv, 1), weight.requires_grad_())
    assert y[0, :128].isfinite().all() and not y[0, 130:].isfinite().any()


def test_a_linear_around_attention_errs_as_rows_do(device):
    qkv = torch.randn(2, 64, 3 * 128, device=device).to(BF16)
    weight = torch.randn(96, 128, device=device) / 8
    leaves = qkv.clone().requires_grad_(), weight.clone().requires_grad_()
    y = module.qkv_attention(leaves[0], 2)
    found = module.linear(y, leaves[1])
    assert len(launch._made) == 0, "read"
    exact = y.detach().double() @ weight.double().t()
    assert relative_error(found.detach(), exact) < 0.039  # docs/precision-modes.md
    assert not torch.equal(found, module.linear(y.detach(), leaves[1])), "by rows"


@pytest.mark.parametrize("why", ["D = 48", "fp32", "no gradients", "no tokens"])
def test_attention_whose_form_nobody_would_read(device, why):
    width = 3 * (48 if why == "D = 48" else 64)
    qkv = torch.randn(1, 0 if why == "no tokens" else 5, width, device=device)
    qkv = (qkv if why == "fp32" else qkv.to(BF16)).requires_grad_()
    with torch.set_grad_enabled(why != "no gradients"):
        out = module.qkv_attention(qkv, 1)
        assert torch.equal(out, fused_attn.qkv_attention(qkv, 1))
    assert len(launch._made) == 0


def test_attention_refuses_what_attention_refuses(device, monkeypatch):
    qkv = torch.randn(1, 4, 192, device=device).to(BF16).requires_grad_()
    for n_head, message in ((0, r"qkv is \(1, 4, 192\) for n_head=0"), (5, "n_head=5")):
        with pytest.raises(ValueError, match=message):
            module.qkv_attention(qkv, n_head)
    with pytest.raises(ValueError, match=r"dropout_p is 1\.5"):
        module.qkv_attention(qkv, 1, dropout_p=1.5)
    monkeypatch.setattr(launch, "refusal", lambda _: "RTX 3090 (sm_86) has no fp8 tensor cores")
    with pytest.raises(ValueError, match="precision is fp8, but RTX 3090"):
        module.qkv_attention(qkv, 1)


# ---------------------------------------------------------------- layer norm


def assert_same_norm(found: list[Tensor], expected: list[Tensor]) -> None:
    """Bit by bit in the interpreter. On a GPU the norm that writes fp8 has half the rows, or twice the warps, of the one that
    does not (fused_layernorm.launch_forward): a row is summed in another order, and its mean and rstd differ in their last bit.
    """
    for a, b in zip(found, expected, strict=True):
        if a.is_cuda:
            torch.testing.assert_close(a, b, rtol=1e-5 if a.dtype == torch.float32 else 2**-7, atol=1e-5)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "C, residual, dropout_p", [(16, False, 0.0), (96, True, 0.0), (96, True, 0.3), (4112, True, 0.0)], ids=str
)
@pytest.mark.adversarial
def test_the_norm_writes_what_a_pass_would(device, C, residual, dropout_p):
    leaves = [torch.randn(5, C, device=device).to(BF16), torch.rand(C, device=device), torch.randn(C, device=device)]
    # Far from 0, so that what the kernel has in its lanes past C, -mean * rstd, would be the largest in a row.
    stream = 100 + torch.randn(5, C, device=device) if residual else None
    results = []
    for norm in (module.layer_norm, fused_layernorm.layer_norm):
        torch.manual_seed(3)
        inputs = [t.clone().requires_grad_() for t in leaves]
        out = norm(*inputs, residual=stream, dropout_p=dropout_p, out_dtype=BF16)
        y = out[0] if residual else out
        form = launch.take(y, FORWARD)
        seen: list = []
        inputs[0].register_hook(lambda grad, seen=seen: seen.append((grad, launch.take(grad, GRADIENT))))
        y.backward(torch.linspace(-1, 1, y.numel(), device=device).view_as(y).to(BF16))
        results.append([y, *[t.grad for t in inputs]])
        if norm is module.layer_norm:
            assert form is not None and same_bits(form.values, rounded(y.detach(), FORWARD).values)
            grad, made = seen[0]
            assert (made is not None) == (residual and C <= fused_layernorm.MAX_BACKWARD_BLOCK)
            if made is not None:
                assert same_bits(made.values, rounded(grad, GRADIENT).values)
                assert torch.equal(made.scale, rounded(grad, GRADIENT).scale)
    assert_same_norm(*results)


# ---------------------------------------------------------------- whole layers


def layer(device, K=96, N=64, rows=48) -> dict[str, Tensor]:
    return {
        "x": torch.randn(rows, K, device=device).to(BF16),
        "weight": 0.02 * torch.randn(N, K, device=device),
        "bias": 0.02 * torch.randn(N, device=device),
    }


def results(op, inputs: dict[str, Tensor], dy: Tensor | None = None) -> dict[str, Tensor]:
    leaves = {key: value.clone().requires_grad_() for key, value in inputs.items()}
    out = op(**leaves)
    dy = (
        torch.randn(out.shape, device=out.device, generator=torch.Generator(out.device).manual_seed(5))
        if dy is None
        else dy
    )
    out.backward(dy.to(out.dtype))
    return {"out": out.detach(), **{key: leaf.grad for key, leaf in leaves.items()}, "dy": dy}


def test_the_errors_of_a_layer_are_the_simulations(device):
    inputs = layer(device, K=256, N=192, rows=128)
    found = results(module.linear, inputs)
    x, weight, dy = (t.double() for t in (inputs["x"], inputs["weight"], found["dy"].to(BF16)))
    expected = {"out": (x, weight.t(), None), "x": (dy, weight, ("e5m2", "e4m3"))}
    for name, (a, b, forms) in expected.items():
        exact = a @ b
        foretold = relative_error(simulated(a.float().cpu(), b.float().cpu(), FP8_ROWS, forms=forms), exact.cpu())
        got = found[name].double() - (inputs["bias"].double() if name == "out" else 0)
        assert relative_error(got, exact) == pytest.approx(foretold, rel=0.03)
        assert foretold < (0.039 if forms is None else 0.060)  # what docs/precision-modes.md states
    # dW and db are bf16's: exact but for fp32 sums
    assert found["weight"].dtype == torch.float32 and relative_error(found["weight"], dy.t() @ x) < 1e-6
    assert relative_error(found["bias"], dy.sum(0)) < 1e-6


@pytest.mark.parametrize(
    "options", [{"approximate": "tanh"}, {"approximate": "none"}, {"activation": "relu2"}], ids=str
)
def test_the_errors_of_an_mlp(device, options):
    C, H = 128, 256
    inputs = {"x": torch.randn(2, 40, C, device=device).to(BF16), "w_fc": torch.randn(H, C, device=device) / C**0.5}
    inputs |= {"b_fc": torch.randn(H, device=device) / 4, "w_proj": torch.randn(C, H, device=device) / H**0.5}
    inputs |= {"b_proj": torch.randn(C, device=device) / 4}
    found = results(partial(module.mlp, **options), inputs)
    wide = {key: value.double() for key, value in inputs.items()}
    exact = results(partial(reference.mlp, **options), wide, dy=found["dy"])
    # Two matmuls in a row, each 3.8e-2 off in forward and 5.9e-2 in backward, which also reads gelu' where forward was.
    errors = {key: relative_error(found[key], exact[key]) for key in exact if key != "dy"}
    assert errors["out"] < 0.039 * 2**0.5 and errors["x"] < (2 * 0.060**2 + 0.039**2) ** 0.5
    # gelu(z) is about as far off as z, and gelu' hardly; relu(z)^2 is twice as far off, and its gradient, 2 relu(z), as z.
    relu2 = "activation" in options
    assert errors["w_fc"] < ((0.060**2 + 0.039**2) ** 0.5 if relu2 else 0.060 * 1.1)
    assert errors["w_proj"] < 0.039 * (2 if relu2 else 1) and errors["b_proj"] < 5e-3
    assert {found[key].dtype for key in ("w_fc", "b_fc", "w_proj", "b_proj")} == {torch.float32}
    assert found["out"].dtype == found["x"].dtype == BF16


def test_any_strides_and_any_rank(device):
    inputs = layer(device)
    expected = results(module.linear, inputs)
    wide = torch.randn(96, 8, 6, device=device).to(BF16)
    wide.copy_(inputs["x"].view(6, 8, 96).permute(2, 1, 0))
    found = results(module.linear, {**inputs, "x": wide.permute(2, 1, 0)}, expected["dy"].view(6, 8, 64))
    assert torch.equal(found["out"].view(48, 64), expected["out"]) and torch.equal(found["weight"], expected["weight"])
    # bug 5: the gradient of a sum has stride 0
    ones = results(module.linear, inputs, torch.ones(1, 1, device=device).expand(48, 64))
    torch.testing.assert_close(ones["bias"], torch.full((64,), 48.0, device=device))


def test_a_layer_without_bias_and_with_frozen_weights(device):
    inputs = layer(device)
    x, weight = inputs["x"].requires_grad_(), inputs["weight"]
    module.linear(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None
    x, weight = x.detach(), weight.requires_grad_()
    module.linear(x, weight).sum().backward()
    assert weight.grad is not None and x.grad is None


def test_gradients_in_place(device):
    weights = [nn.Parameter(0.1 * torch.randn(*size, device=device)) for size in ((64, 32), (32, 64))]
    x = torch.randn(8, 32, device=device).to(BF16).requires_grad_()

    def step():
        module.mlp(x, weights[0], None, weights[1], None).sum().backward()

    step()
    once, address = [w.grad.clone() for w in weights], [w.grad.data_ptr() for w in weights]
    with working_copy.gradients_in_place():
        step()
    for w, grad, where in zip(weights, once, address):
        torch.testing.assert_close(w.grad, 2 * grad)
        assert w.grad.data_ptr() == where


def test_repeat_runs_are_bit_equal(device):
    inputs = layer(device)
    first, second = results(module.linear, inputs), results(module.linear, inputs)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("sizes", [{"K": 40}, {"N": 72}, {"rows": 0}], ids=str)
def test_sizes_that_rows_of_fp8_cannot_have_run_in_bf16(device, sizes):
    inputs = layer(device, **sizes)
    found, expected = results(module.linear, inputs), results(fused_linear.linear, inputs)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert inputs["weight"] not in working_copy._copies


def test_without_gradients_everything_runs_in_bf16(device):
    inputs, weight = layer(device), nn.Parameter(0.1 * torch.randn(64, 96, device=device))
    with torch.no_grad():
        assert torch.equal(
            module.linear(inputs["x"], weight), fused_linear.linear(inputs["x"], weight, keep_copy=False)
        )
        norm = module.layer_norm(inputs["x"], torch.ones(96, device=device))
    assert weight not in launch._weights and launch.take(norm, FORWARD) is None
    assert weight not in working_copy._copies, "no second copy beside fp8's"


# ---------------------------------------------------------------- inf and NaN


@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("where", ["x", "weight", "bias", "dy"])
def test_what_is_not_finite_reaches_every_result_that_it_should(device, where, bad):
    inputs = {**layer(device), "dy": torch.randn(48, 64, device=device)}
    clean = results(module.linear, {k: v for k, v in inputs.items() if k != "dy"}, inputs["dy"])
    inputs[where].view(-1)[5] = bad  # row 0, column 5
    exact = results(reference.linear, {k: v for k, v in inputs.items() if k != "dy"}, inputs["dy"])
    found = results(module.linear, {k: v for k, v in inputs.items() if k != "dy"}, inputs["dy"])
    for name, result in found.items():
        broken = ~exact[name].isfinite()
        assert not result[broken].isfinite().any(), f"{name} was made finite"
        assert name == "dy" or clean[name].isfinite().all()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=str)
@pytest.mark.parametrize("where", ["x", "w_fc", "b_fc", "w_proj"])
def test_what_is_not_finite_passes_through_an_mlp(device, where, bad):
    inputs = {"x": torch.randn(6, 32, device=device).to(BF16), "w_fc": torch.randn(48, 32, device=device)}
    inputs |= {"b_fc": torch.randn(48, device=device), "w_proj": torch.randn(16, 48, device=device)}
    inputs |= {"b_proj": torch.zeros(16, device=device)}
    inputs[where].view(-1)[5] = bad
    found, exact = results(module.mlp, inputs), results(reference.mlp, inputs)
    assert not found["out"][~exact["out"].isfinite()].isfinite().any()
    assert not found["x"][~exact["x"].isfinite()].isfinite().any()


def test_the_optimizer_skips_the_step(device):
    inputs, weight = layer(device), nn.Parameter(0.1 * torch.randn(64, 96, device=device))
    first = nn.Parameter(torch.ones(96, device=device))
    optimizer = FusedAdamW([first, weight], lr=0.1)
    before = weight.detach().clone()
    y = module.linear(inputs["x"] * first.to(BF16), weight)
    upstream = torch.ones_like(y)
    upstream[3, 4] = float("inf")
    y.backward(upstream)
    weight.grad.zero_()  # only what has gone through fp8 tells of it
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1 and torch.equal(weight, before)


# ---------------------------------------------------------------- forms that are kept


def tiny(device, attention=False, **options) -> GPT:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 64, "dropout": 0.1} | options
    table = ops.get("triton", "fp8")
    if device.type == "cpu":  # only what is tested here is interpreted
        eager = ("attention", *(() if attention else ("qkv_attention",)), "linear_cross_entropy", "embedding")
        table = replace(table, **{name: getattr(ops.EAGER, name) for name in eager})
    return GPT(ModelConfig(**sizes), table).to(device)


def loss_of(model: GPT, tokens: Tensor) -> Tensor:
    with torch.autocast(tokens.device.type, BF16):
        return model(tokens[:, :-1], tokens[:, 1:])[1]


@pytest.mark.parametrize("D", [64, 32, 16])
def test_every_tensor_of_a_model_is_quantised_by_its_maker(device, monkeypatch, D):
    asked, passes = [], []

    def take(tensor, dtype, grouped):
        form = real(tensor, dtype, grouped)
        asked.append((tensor.shape[-1], dtype, type(form)))
        return form

    real, quantise = launch.take, launch.quantise
    monkeypatch.setattr(launch, "take", take)
    monkeypatch.setattr(launch, "quantise", lambda x, dtype: passes.append(tuple(x.shape)) or quantise(x, dtype))
    model = tiny(device, attention=True, n_head=64 // D, n_embd=64)
    with working_copy.copies_kept():
        loss_of(model, torch.randint(0, 64, (2, 17), device=device)).backward()
    groups = Grouped if D >= 32 else type(None)
    forward = [(64, FORWARD, Fp8), (64, FORWARD, groups), (64, FORWARD, Fp8)]  # c_attn, attention's c_proj, mlp
    backward = [(64, GRADIENT, Fp8), (64, GRADIENT, Fp8), (192, GRADIENT, groups)]  # mlp, c_proj, c_attn
    assert asked == 2 * forward + 2 * backward
    matrices = [tuple(p.shape) for p in model.transformer.h.parameters() if p.dim() == 2]
    weights = [shape for matrix in matrices for shape in (matrix, matrix[::-1])]
    others = [] if D >= 32 else 2 * [(32, 64), (32, 192)]
    assert sorted(passes) == sorted(weights + others), "a pass of its own for weights alone"
    assert len(launch._made) == 0, "forms are let go of when they have been read"
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    count = len(launch._weights)
    del model
    assert count == 8 and len(launch._weights) == 0


def test_a_form_is_only_for_the_tensor_as_it_was(device):
    def made():
        tensor = torch.randn(4, 16, device=device)
        launch.give(tensor, launch.quantise(tensor, FORWARD))
        return tensor

    assert launch.take(tensor := made(), FORWARD) is not None
    assert launch.take(tensor, FORWARD) is None, "taken"
    assert launch.take(made(), GRADIENT) is None, "another format"
    for grouped in (False, True):
        launch.give(tensor := torch.randn(4, 64, device=device), rounded_in_groups(tensor, FORWARD))
        found = launch.take(tensor, FORWARD, grouped)
        assert isinstance(found, Grouped) if grouped else found is None, "scales of another kind"
    assert launch.take(made().view(2, 32), FORWARD) is None, "another tensor"
    assert launch.take(made().add_(1), FORWARD) is None, "written to since"
    made()
    del tensor
    assert len(launch._made) == 0, "a form goes with its tensor"


def test_weights_are_quantised_once_per_step(device, monkeypatch):
    calls = []
    real = launch.quantise_weight
    monkeypatch.setattr(launch, "quantise_weight", lambda weight: calls.append(1) or real(weight))
    weight, x = nn.Parameter(torch.randn(32, 16, device=device)), torch.randn(4, 16, device=device).to(BF16)
    optimizer = FusedAdamW([weight], lr=0.1)
    with working_copy.copies_kept():
        for _ in range(2):
            for _ in range(3):
                module.linear(x, weight).sum().backward()
            optimizer.step()
        assert len(calls) == 2
        expected = rounded(weight.detach(), FORWARD).values
        assert same_bits(launch.of_weight(weight)[0], expected) and len(calls) == 3
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(working_copy, "enabled", False)  # as under FSDP
            launch.of_weight(weight)
        assert len(calls) == 4
    for _ in range(2):
        weight.data.mul_(2.0)  # as who knows what does between two steps of somebody's loop
        assert same_bits(launch.of_weight(weight)[0], rounded(weight.detach(), FORWARD).values)


# ---------------------------------------------------------------- in company


def test_functional_call_uses_the_weights_it_is_given(device):
    model, x = nn.Linear(16, 32, bias=False).to(device), torch.randn(4, 16, device=device).to(BF16)
    model.forward = lambda x: module.linear(x, model.weight)
    other = {"weight": torch.randn(32, 16, device=device).requires_grad_()}
    out = torch.func.functional_call(model, other, (x,))
    assert torch.equal(out, module.linear(x, other["weight"]))
    out.sum().backward()
    assert other["weight"].grad is not None and model.weight.grad is None


def test_gradient_checkpointing(device):
    model = tiny(device, attention=True, n_layer=1, n_head=1, n_embd=64)
    tokens = torch.randint(0, 64, (2, 17), device=device)
    gradients = []
    for wrap in (False, True):
        torch.manual_seed(7)
        model.zero_grad()
        block = model.transformer.h[0]
        if wrap:
            forward = type(block).forward.__get__(block)
            block.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False)  # noqa: B023
        loss_of(model, tokens).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile(device):
    torch._dynamo.reset()
    weight, x = nn.Parameter(torch.randn(32, 16, device=device)), torch.randn(4, 16, device=device).to(BF16)
    gain = nn.Parameter(torch.rand(16, device=device))

    def step(x):
        return module.linear(module.layer_norm(x, gain, out_dtype=BF16), weight)

    outputs = []
    for forward in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        weight.grad = gain.grad = None
        y = forward(x)
        y.sum().backward()
        outputs.append([y.detach(), weight.grad, gain.grad])
    assert_same_norm(*outputs)  # compiled, fp8 is a pass of its own


def test_opcheck(device):
    weight, x = torch.randn(32, 16, device=device), torch.randn(2, 3, 16, device=device).to(BF16)
    forms = launch.of_weight(weight)
    q, stats = module._quantise(x, FORWARD)
    dq, dstats = module._quantise(torch.randn(2, 3, 32, device=device), GRADIENT)
    wide, grouped = torch.randn(64, 16, device=device), rounded_in_groups(torch.randn(5, 64, device=device), GRADIENT)
    grads = x.requires_grad_(), weight.requires_grad_()
    for op, args in (
        (torch.ops.fastgpt.fp8_quantise, (x.detach(), FORWARD)),
        (torch.ops.fastgpt.fp8_quantise_weight, (weight.detach(),)),
        (torch.ops.fastgpt.linear_fp8_fwd, (grads[0], q, stats, grads[1], *forms, None, False, False)),
        (torch.ops.fastgpt.linear_fp8_bwd_input, (dq, dstats, *forms[2:], False)),
        (torch.ops.fastgpt.linear_fp8_bwd_input, (*grouped, *launch.of_weight(wide)[2:], True)),
    ):
        # torch's "test_schema" compares inputs by allclose, which has no fp8
        checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        torch.library.opcheck(op.default, args, test_utils=checks)


# ---------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused_in_a_sentence(device, monkeypatch):
    x, weight = torch.randn(4, 16, device=device), torch.randn(32, 16, device=device).requires_grad_()
    with pytest.raises(ValueError, match=r"x is torch\.float32: in fp8 mode it must be bfloat16"):
        module.linear(x, weight)
    with pytest.raises(ValueError, match=r"x is \(4, 16\) and weight \(32, 48\)"):
        module.linear(x, torch.randn(32, 48, device=device))
    monkeypatch.setattr(launch, "refusal", lambda _: "RTX 3090 (sm_86) has no fp8 tensor cores")
    for op in (module.linear, partial(module.layer_norm, out_dtype=BF16)):
        with pytest.raises(ValueError, match=r"precision is fp8, but RTX 3090 \(sm_86\) has no .*: use bf16"):
            op(x, weight[0] if op is not module.linear else weight)


@pytest.mark.parametrize("capability, name", [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), None), ((12, 0), None)])
def test_which_cards_can(capability, name, monkeypatch):
    monkeypatch.setattr(launch, "capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A card")
    reason = launch.refusal(torch.device("cuda", 0))
    assert reason is None if name is None else f"A card ({name}) has no fp8 tensor cores" in reason
    assert launch.engine(torch.device("cuda", 0)) == "triton"
    monkeypatch.setattr(launch, "capability", lambda _: (9, 0))
    for has, name in ((True, "scaled_mm"), (False, "triton")):
        monkeypatch.setattr(launch, "_torch_multiplies", lambda _, has=has: has)
        assert launch.engine(torch.device("cuda", 0)) == name


def test_a_distributed_tensor_is_refused(device):
    class DTensor(Tensor):
        pass

    weight = torch.randn(32, 16, device=device).as_subclass(DTensor)
    with pytest.raises(ValueError, match="weight is a DTensor"):
        module.linear(torch.randn(4, 16, device=device).to(BF16), weight)


def test_a_cpu_without_the_interpreter_computes_the_reference(monkeypatch):
    monkeypatch.setattr(runtime, "INTERPRET", False)
    inputs = layer(torch.device("cpu"))
    assert "a CPU has no fp8 kernels" in launch.refusal(torch.device("cpu"))
    assert torch.equal(module.linear(**inputs), reference.linear(**inputs))


# ---------------------------------------------------------------- training


def batches(device):
    """Text that can be learned: each token is the last plus one of three steps."""
    generator = torch.Generator().manual_seed(11)
    while True:
        steps = torch.randint(1, 4, (4, 17), generator=generator)
        yield (steps.cumsum(1) % 64).to(device)


@pytest.mark.parametrize("D", [16, 64])
def test_a_short_run_learns_as_bf16_does(device, D):
    sizes = {"n_layer": 1, "dropout": 0.0, "attention": D == 64, "n_embd": 64 if D == 64 else 32}
    sizes["n_head"] = sizes["n_embd"] // D
    # The wider model at 1e-2: with a scale per row, too, it then ends 0.012 from bf16. The rate, not the groups.
    rate = 4e-3 if D == 64 else 1e-2
    finals = {}
    for name in ("bf16", "fp8"):
        torch.manual_seed(0)
        model = tiny(device, **sizes)
        if name == "bf16":
            model = GPT(model.config, ops.EAGER if device.type == "cpu" else ops.TRITON).to(device)
            torch.manual_seed(0)
            model.load_state_dict(tiny(device, **sizes).state_dict())
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        losses = []
        for tokens in islice(batches(device), 20):
            loss = loss_of(model, tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        finals[name] = sum(losses[-5:]) / 5
        assert losses[0] - finals[name] > 1.5, "it learns"
    assert finals["fp8"] == pytest.approx(finals["bf16"], abs=0.01)
