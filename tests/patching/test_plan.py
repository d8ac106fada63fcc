"""What is tried out before anything is replaced: differences that are easily overlooked."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from bench.steps import nanogpt as nanogpt_model
from fastgpt.patching import patch
from tests.patching.parity import batch, make_nanogpt


def report_of(model, device):
    """That of patching ``model``, whose loss is asserted to stay what it was."""
    own, (idx, targets) = copy.deepcopy(model), batch(device)
    report = patch(model, quiet=True)
    torch.testing.assert_close(model(idx, targets)[1], own(idx, targets)[1])
    return report


def test_a_mask_that_is_another_in_one_block(device):
    """Local attention in some layers: the same class and the same attributes, another buffer."""
    model = make_nanogpt(device, flash=False, n_layer=3)
    model.transformer.h[1].attn.bias.triu_(-4)
    report = report_of(model, device)
    assert report.kept["attention of transformer.h.1"] == "its forward computes something else"
    assert report.replaced["attention"] == 2


def test_an_attribute_that_is_no_plain_value(device):
    class Scaled(nanogpt_model.MLP):
        def forward(self, x):
            return super().forward(x) * self.scales[0]

    model = make_nanogpt(device)
    for block, scale in zip(model.transformer.h, (1.0, 0.5)):
        block.mlp.__class__, block.mlp.scales = Scaled, (scale,)
    report = report_of(model, device)
    assert (
        report.replaced["MLP"] == 1 and report.kept["MLP of transformer.h.1"] == "its forward computes something else"
    )


@pytest.mark.parametrize("eps", [1e-6, 3e-5])
@pytest.mark.parametrize("which", ["ln_1", "ln_2", "ln_f"])
def test_another_epsilon(device, eps, which):
    class Norm(nanogpt_model.LayerNorm):
        def forward(self, input):
            return nn.functional.layer_norm(input, self.weight.shape, self.weight, self.bias, eps)

    model = make_nanogpt(device, n_layer=1)
    block = model.transformer.h[0]
    norm = model.transformer.ln_f if which == "ln_f" else getattr(block, which)
    norm.__class__ = Norm
    report = report_of(model, device)
    assert "its forward computes something else" in report.kept.values()
    assert report.replaced["layer norm"] == 2


@pytest.mark.parametrize("kind, kept", [("tanh", False), ("none", True)])
def test_a_gelu_that_is_another_than_its_name_says(device, kind, kept):
    class NewGELU(nn.Module):
        def forward(self, x):
            return nn.functional.gelu(x, approximate=kind)

    model = make_nanogpt(device, n_layer=1)
    model.transformer.h[0].mlp.gelu = NewGELU()
    assert ("MLP" in report_of(model, device).kept) == kept
