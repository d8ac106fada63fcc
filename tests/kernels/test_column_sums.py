"""Gradients of biases, which come from whoever makes dy: what is found, what it is, and when there is nothing to find."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.config import ModelConfig
from fastgpt.kernels import _attn_launch, _linear_grads, fused_attn, fused_fp8, fused_layernorm, fused_linear, runtime
from fastgpt.kernels import _column_sums as column_sums
from fastgpt.kernels._notes import Notes
from fastgpt.model import GPT

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


# ---------------------------------------------------------------- kernel


@pytest.mark.parametrize("rows, C", [(1, 1), (3, 77), (64, 32), (200, 33)])
def test_partial_sums_are_added_up(device, rows, C):
    partials = [torch.randn(rows, C, device=device) for _ in range(3)]
    outs = [torch.empty(C, device=device, dtype=dtype) for dtype in (FP32, BF16, FP32)]
    column_sums.add_up((partials[0], outs[0]), (None, None), (partials[1], outs[1]), (partials[2], outs[2]))
    for values, out in zip(partials, outs):
        torch.testing.assert_close(
            out, values.double().sum(0).to(out.dtype), rtol=1e-2 if out.dtype == BF16 else 1e-5, atol=1e-5
        )
    assert column_sums.partial(7, None) is None and column_sums.partial(7, outs[0]).shape == (7, C)


# ---------------------------------------------------------------- who makes them


def norm(module, dtype, dropout_p, C=24):
    def read(y: Tensor) -> Tensor:
        stream = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).requires_grad_()
        h, s = module.layer_norm(
            y, torch.ones(C, device=y.device), residual=stream, dropout_p=dropout_p, out_dtype=dtype
        )
        return h.float() + 2 * s

    return read, C


def attention(module, n_head, n_kv_head, D, documents=False, **options):
    def read(y: Tensor) -> Tensor:
        doc_ids = (torch.arange(y.shape[1], device=y.device) // 9).expand(y.shape[:2]) if documents else None
        return module.qkv_attention(y, n_head, n_kv_head=n_kv_head, doc_ids=doc_ids, **options).float()

    return read, (n_head + 2 * n_kv_head) * D


READERS = {
    "norm, fp32": (fused_linear, FP32, norm(fused_layernorm, FP32, 0.0)),
    "norm, bf16, dropout": (fused_linear, BF16, norm(fused_layernorm, BF16, 0.3)),
    "norm, columns in chunks": (fused_linear, FP32, norm(fused_layernorm, FP32, 0.0, C=150)),
    "norm, fp8": (fused_fp8, BF16, norm(fused_fp8, BF16, 0.0, C=48)),
    "attention, fp32, heads of 12": (fused_linear, FP32, attention(fused_attn, 2, 2, 12)),
    "attention, bf16, documents": (fused_linear, BF16, attention(fused_attn, 2, 2, 16, documents=True)),
    "attention, groups, dropout": (fused_linear, BF16, attention(fused_attn, 4, 2, 16, dropout_p=0.2)),
    "attention, not causal": (fused_linear, FP16, attention(fused_attn, 1, 1, 16, causal=False)),
    "attention, fp16-fast": (fused_linear, FP16, attention(fused_attn, 2, 2, 16, accumulate="fp16")),
    "attention, fp8": (fused_fp8, BF16, attention(fused_fp8, 2, 1, 32)),
}


@pytest.mark.parametrize("case", READERS)
@pytest.mark.parametrize("shape", [(2, 70), (3, 1)], ids=str)
def test_the_gradient_of_a_bias_is_the_sum_of_dy_and_no_pass(device, case, shape, monkeypatch, request):
    if "fp8" in case:
        request.getfixturevalue("needs_fp8")
    module, dtype, (read, N) = READERS[case]
    monkeypatch.setattr(fused_layernorm, "MAX_BACKWARD_BLOCK", 64)
    monkeypatch.setattr(_attn_launch, "config", partial(small_blocks, _attn_launch.config))
    x = torch.randn(*shape, 16, device=device).to(dtype)
    weight = nn.Parameter(torch.randn(N, 16, device=device) / 4)
    bias = nn.Parameter(torch.randn(N, device=device))
    asked, dy = record_passes(monkeypatch), []
    partials = guard_partial_sums(monkeypatch)
    y = module.linear(x, weight, bias)
    y.register_hook(dy.append)
    read(y).sin().sum().backward()
    assert asked == [None], "the weight's gradient alone is formed from dy"
    exact = dy[0].double().flatten(0, 1).sum(0)
    rounding = torch.finfo(dtype).eps / 2 if "attention" in case else 0.0  # attention's are of dy before it is rounded
    bound = dy[0].double().flatten(0, 1).abs().sum(0).max() * (1e-6 + rounding)
    assert (bias.grad.double() - exact).abs().max() <= bound and bias.grad.abs().max() > 0
    assert partials and all(buffer[:512].isnan().all() and buffer[-512:].isnan().all() for buffer in partials)
    assert len(column_sums._expected) == len(column_sums._sums) == 0


def small_blocks(config, *args, **options) -> dict[str, int]:
    """Several blocks of rows even for few tokens, where the interpreter would have one."""
    return config(*args, **options) | ({"BLOCK_M": 32, "BLOCK_N": 16} if runtime.INTERPRET else {})


def record_passes(monkeypatch) -> list:
    """The dtype of the bias gradient that each weight gradient is asked to form on its way."""
    asked: list = []
    original = _linear_grads._bwd_weight
    monkeypatch.setattr(fused_linear, "_bwd_weight", lambda *a: (asked.append(a[3]), original(*a))[1])
    return asked


def guard_partial_sums(monkeypatch) -> list[Tensor]:
    """Partial sums that begin as NaN, with 512 more on either side."""
    buffers: list[Tensor] = []

    def guarded(rows, out):
        if out is None:
            return None
        buffers.append(torch.full((rows * len(out) + 1024,), torch.nan, device=out.device))
        return buffers[-1][512:-512].view(rows, len(out))

    monkeypatch.setattr(column_sums, "partial", guarded)
    return buffers


def small(device, precision, dropout=0.1) -> GPT:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 16, "vocab_size": 64}
    table = ops.get("triton", precision)
    if device.type == "cpu":  # only what is tested here is interpreted
        table = replace(table, linear_cross_entropy=ops.EAGER.linear_cross_entropy, embedding=ops.EAGER.embedding)
    return GPT(ModelConfig(**sizes, bias=True, dropout=dropout), table).to(device)


@pytest.mark.parametrize("precision", ["bf16", "fp16-fast", "fp8"])
def test_no_bias_of_a_model_takes_a_pass(device, precision, monkeypatch, request):
    if precision == "fp8":
        request.getfixturevalue("needs_fp8")
    torch.manual_seed(1)
    model, asked = small(device, precision), record_passes(monkeypatch)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(0, 64, (2, 17), device=device)
    found = []
    for notes in (True, False):
        if not notes:
            monkeypatch.setattr(column_sums, "expect", lambda *_: None)
        torch.manual_seed(2)
        model.zero_grad()
        with torch.autocast(device.type, FP16 if precision == "fp16-fast" else BF16):
            (model(tokens[:, :-1], tokens[:, 1:])[1] * 1024).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    linears, layers = 4, 2
    passes = [dtype is not None for dtype in asked]
    assert not any(passes[: linears * layers]), "found"
    assert sum(passes[linears * layers :]) == 3 * layers, (
        "all but c_fc's, which is formed with the gradient of its GELU"
    )
    for name, grad in found[0].items():
        scale, rounded = grad.abs().max(), name.endswith("c_attn.bias")  # a pass sums dqkv as it is stored
        assert scale > 0 and (grad - found[1][name]).abs().max() <= (2**-8 if rounded else 1e-5) * scale, name


# ---------------------------------------------------------------- when there are none


def test_a_note_is_for_a_tensor_as_it_was_and_once(device):
    notes: Notes[str] = Notes()
    tensor = torch.zeros(3, device=device)
    notes.give(tensor, "a")
    assert notes.take(tensor.view(3)) is None and notes.take(tensor.clone()) is None
    assert notes.take(tensor) == "a" and notes.take(tensor) is None
    notes.give(tensor, "b")
    tensor.add_(1)
    assert notes.take(tensor) is None, "written to since"
    notes.give(tensor, "c")
    del tensor
    assert len(notes) == 0, "goes with its tensor"


def hooked(hook):
    def use(y: Tensor, read) -> Tensor:
        y.register_hook(hook)
        return read(y)

    return use


def in_place(grad: Tensor) -> None:
    grad.mul_(3)


USES = {
    "used twice": lambda y, read: read(y) + y.cos(),
    "a view": lambda y, read: read(y.view(y.shape)),
    "changed": lambda y, read: read(y * 2),
    "by nobody": lambda y, read: y.clone(),
    "a hook's gradient": hooked(lambda grad: 3 * grad),
    "changed in place by a hook": hooked(in_place),
}


@pytest.mark.parametrize("use", USES)
def test_sums_of_another_gradient_are_not_taken(device, use):
    x, weight = torch.randn(2, 5, 16, device=device), torch.randn(24, 16, device=device) / 4
    read, _ = norm(fused_layernorm, FP32, 0.0)
    gradients = []
    for linear in (fused_linear.linear, torch.nn.functional.linear):
        bias = torch.linspace(-1, 1, 24, device=device, requires_grad=True)
        USES[use](linear(x, weight, bias), read).sin().sum().backward()
        gradients.append(bias.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)
    assert len(column_sums._expected) == len(column_sums._sums) == 0


def test_torch_compile_forms_them_in_a_pass(device):
    torch._dynamo.reset()
    weight, bias = nn.Parameter(torch.randn(24, 16, device=device)), nn.Parameter(torch.randn(24, device=device))
    x, (read, _) = torch.randn(2, 5, 16, device=device), norm(fused_layernorm, FP32, 0.0)

    def step(x):
        return read(fused_linear.linear(x, weight, bias)).sin().sum()

    gradients = []
    for forward in (step, torch.compile(step, backend="aot_eager")):
        bias.grad = None
        forward(x).backward()
        gradients.append(bias.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
