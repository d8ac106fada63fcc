"""What is tried out before anything is replaced: differences that are easily overlooked."""

from __future__ import annotations

import copy
import threading

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


def test_values_that_are_clamped(device):
    """Against overflow in fp16: usual values do not show it."""

    class Clamped(nanogpt_model.Block):
        def forward(self, x):
            return super().forward(x).clamp(-50, 50)

    model = make_nanogpt(device, n_layer=1)
    model.transformer.h[0].__class__ = Clamped
    assert report_of(model, device).kept == {"residual add with its norm": "its forward computes something else"}


@pytest.mark.parametrize("kind, kept", [("tanh", False), ("none", True)])
def test_a_gelu_that_is_another_than_its_name_says(device, kind, kept):
    class NewGELU(nn.Module):
        def forward(self, x):
            return nn.functional.gelu(x, approximate=kind)

    model = make_nanogpt(device, n_layer=1)
    model.transformer.h[0].mlp.gelu = NewGELU()
    assert ("MLP" in report_of(model, device).kept) == kept


def test_a_model_that_cannot_be_copied_keeps_its_loss(device):
    model = make_nanogpt(device, n_layer=1)
    model.lock = threading.Lock()
    report = patch(model, quiet=True)
    assert report.kept["loss"].startswith("GPT cannot be copied to be tried out (TypeError: ")
    assert report.replaced["attention"] == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_traced_module_stays(device):
    model = make_nanogpt(device, n_layer=1)
    block = model.transformer.h[0]
    block.mlp = torch.jit.trace(block.mlp, torch.randn(1, 2, 24, device=device))
    report = patch(model, quiet=True)
    assert report.kept["MLP"] == "its activation is a TracedModule, not a GELU"
    assert report.kept["residual add with its norm"] == "the forward of TopLevelTracedModule cannot be read"
    assert report.replaced["attention"] == 1


def test_defaults_for_new_tensors_do_not_matter(device):
    model = make_nanogpt(device, n_layer=1)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.bfloat16)
    try:
        report = patch(model, quiet=True)
        assert torch.get_default_dtype() == torch.bfloat16 and torch.empty(0).is_meta
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert not report.kept


def test_blocks_that_leave_something_for_the_next(device):
    """A block alone shows nothing of it: the whole model is tried out, too."""

    class Storing(nanogpt_model.Block):
        def forward(self, x):
            self.shared["x"] = x
            return super().forward(x)

    class Reading(nanogpt_model.Block):
        def forward(self, x):
            return super().forward(x) + self.shared.pop("x", 0.0)

    model, shared = make_nanogpt(device), {}
    for block, cls in zip(model.transformer.h, (Storing, Reading)):
        block.__class__, block.shared = cls, shared
    own, (idx, targets) = copy.deepcopy(model), batch(device)
    report = patch(model, quiet=True)
    torch.testing.assert_close(model(idx, targets)[1], own(idx, targets)[1])
    assert "together with the other changes its forward computes something else" in report.kept.values()


def test_linears_that_have_to_be_called_are_named(device):
    """LoRA of the MLP before patch: what is reported as replaced would never run."""

    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.5

    model = make_nanogpt(device)
    first, second = model.transformer.h
    first.mlp.c_fc.__class__ = first.attn.c_attn.__class__ = Adapter
    second.mlp.c_proj.register_forward_hook(lambda *_: None)
    report = report_of(model, device)
    assert report.kept == {
        "MLP of transformer.h.0": f"its c_fc is a {__name__}.Adapter, not a plain linear",
        "MLP of transformer.h.1": "its c_proj has a hook",
    }
    assert report.replaced["attention"] == 2
