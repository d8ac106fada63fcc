"""The MLP of a patched model, over a stand-in for fastgpt.kernels.fused_linear that records what it is given."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgpt.patching import modules, patch, unpatch
from fastgpt.patching.modules import gelu_kind
from tests.patch_parity import assert_same, batch, labelled, loss_of, make_huggingface, make_nanogpt, tokens


class FusedLinear:
    """fused_linear's interface in plain PyTorch."""

    def __init__(self):
        self.calls = []

    def linear(self, x, weight, bias=None, *, residual=None):
        self.calls.append(("linear", tuple(weight.shape), weight.stride(), residual is not None))
        y = F.linear(x, weight, bias)
        return y if residual is None else (y + residual).to(residual.dtype)

    def linear_gelu(self, x, weight, bias=None, *, approximate="tanh"):
        self.calls.append((f"linear_gelu {approximate}", tuple(weight.shape), weight.stride(), False))
        return F.gelu(F.linear(x, weight, bias), approximate=approximate)


@pytest.fixture
def kernel(monkeypatch):
    stand_in = FusedLinear()
    monkeypatch.setattr(modules, "fused_linear", lambda: stand_in)
    return stand_in


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_nanogpts_mlp_is_the_exact_gelu_with_the_residual_added_inside(device, kernel, autocast):
    assert_same(make_nanogpt(device, n_layer=1), loss_of(*batch(device)), train=True, autocast=autocast)
    assert kernel.calls == [("linear_gelu none", (96, 24), (24, 1), False), ("linear", (24, 96), (96, 1), True)]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_hugging_faces_weights_are_read_as_strided_views(device, kernel, autocast):
    """assert_same also asserts that every gradient has its parameter's layout."""
    assert_same(make_huggingface(device, n_layer=1), labelled(tokens(device)), train=True, autocast=autocast)
    assert kernel.calls == [("linear_gelu tanh", (96, 24), (1, 96), False), ("linear", (24, 96), (1, 24), True)]


def test_dropout_comes_between_c_proj_and_the_sum(device, kernel):
    model = make_nanogpt(device, dropout=0.5, n_layer=1)
    assert patch(model, quiet=True).replaced["MLP"] == 1
    mlp, x = model.transformer.h[0].mlp, torch.randn(4, 17, 24, device=device)
    nn.init.ones_(mlp.c_proj.bias)
    nn.init.zeros_(mlp.c_proj.weight)
    added = mlp(x, residual=torch.zeros_like(x))
    assert added.unique().tolist() == [0.0, 2.0]
    assert [call[3] for call in kernel.calls] == [False, False]


def test_an_adapter_in_the_place_of_c_fc_is_called(device, kernel):
    model, ids = make_huggingface(device).eval(), tokens(device)
    patch(model, quiet=True)
    for block in model.transformer.h:
        block.mlp.c_fc = nn.Sequential(block.mlp.c_fc)
    got = model(ids).logits
    assert not kernel.calls
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
