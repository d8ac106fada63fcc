"""The MLP of a patched model: fastgpt.kernels.mlp on the model's own weights, nanoGPT's and Hugging Face's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgpt.kernels import matmul as launch
from fastgpt.patching import patch, unpatch
from fastgpt.patching.modules import gelu_kind
from tests.patching.parity import assert_same, batch, labelled, loss_of, make_huggingface, make_nanogpt, tokens


@pytest.fixture
def forward(monkeypatch):
    """What forward hands to the matmuls: (which, exact GELU or None, weight's shape, its strides, with a residual)."""
    seen = []
    gelu, plain = launch.matmul_gelu, launch.matmul

    def matmul_gelu(a, b, bias, act, *rest):
        seen.append((act, None, tuple(b.t().shape), b.t().stride(), False))
        return gelu(a, b, bias, act, *rest)

    def matmul(a, b, bias, residual, *rest):
        if bias is not None:  # forward's: backward has none
            seen.append(("plain", None, tuple(b.t().shape), b.t().stride(), residual is not None))
        return plain(a, b, bias, residual, *rest)

    monkeypatch.setattr(launch, "matmul_gelu", matmul_gelu)
    monkeypatch.setattr(launch, "matmul", matmul)
    return seen


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_nanogpts_mlp_is_the_exact_gelu_with_the_residual_added_inside(device, forward, autocast):
    assert_same(make_nanogpt(device, n_layer=1), loss_of(*batch(device)), train=True, autocast=autocast)
    exact, last = ("gelu_erf", None, (96, 24), (24, 1), False), ("plain", None, (24, 96), (96, 1), True)
    assert forward == [exact, last]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_hugging_faces_weights_are_read_as_strided_views(device, forward, autocast):
    """assert_same also asserts that every gradient has its parameter's layout."""
    assert_same(make_huggingface(device, n_layer=1), labelled(tokens(device)), train=True, autocast=autocast)
    tanh, last = ("gelu", None, (96, 24), (1, 96), False), ("plain", None, (24, 96), (1, 24), True)
    assert forward == [tanh, last]


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_residual_of_another_dtype_gives_the_sum_that_pytorch_gives(device, train):
    """A bf16 model in an fp32 stream, as after a norm that is kept in fp32."""
    mlp, x = make_nanogpt(device).bfloat16().transformer.h[0].mlp.train(train), torch.randn(3, 24, device=device)
    want = x + mlp(x.bfloat16())
    model = make_nanogpt(device).bfloat16()
    patch(model, quiet=True)
    fused = model.transformer.h[0].mlp.train(train)
    fused.load_state_dict(mlp.state_dict())
    got = fused(x.bfloat16(), residual=x)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


def test_dropout_comes_between_c_proj_and_the_sum(device, forward):
    model = make_nanogpt(device, dropout=0.5, n_layer=1)
    assert patch(model, quiet=True).replaced["MLP"] == 1
    mlp, x = model.transformer.h[0].mlp, torch.randn(4, 17, 24, device=device)
    nn.init.ones_(mlp.c_proj.bias)
    nn.init.zeros_(mlp.c_proj.weight)
    scaled = pytest.approx(2.0, rel=2**-22)  # 1 / (1 - p), a division of GPUs: 2 ulp
    assert (mlp(x, residual=torch.ones_like(x)) - 1.0).unique().tolist() == [0.0, scaled]
    assert mlp(x).unique().tolist() == [0.0, scaled]
    assert [call[-1] for call in forward if call[0] == "plain"] == [True, False]
    assert mlp.eval()(x, residual=torch.ones_like(x)).unique().tolist() == [2.0]


def test_an_adapter_in_the_place_of_c_fc_is_called(device, forward):
    model, ids = make_huggingface(device).eval(), tokens(device)
    patch(model, quiet=True)
    for block in model.transformer.h:
        block.mlp.c_fc = nn.Sequential(block.mlp.c_fc)
    got = model(ids).logits
    assert not forward
    torch.testing.assert_close(got, unpatch(model)(ids).logits)


def test_which_activations_are_gelus():
    from transformers.activations import ACT2FN

    kinds = {
        name: gelu_kind(ACT2FN[name])
        for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "quick_gelu", "silu")
    }
    assert kinds == {
        **{"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"},
        **{"relu": None, "quick_gelu": None, "silu": None},
    }
    assert gelu_kind(nn.GELU()) == "none" and gelu_kind(nn.GELU("tanh")) == "tanh"
