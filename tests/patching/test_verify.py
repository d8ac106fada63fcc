"""patch(model, verify=batch): a kernel that is wrong on this machine is found, named, and the patch undone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastgpt import ops
from fastgpt.common import UserError
from fastgpt.patching import patch
from fastgpt.patching.swap import is_fused
from tests.patching.parity import batch, make_huggingface, make_nanogpt, tokens

KINDS = ("nanogpt", "huggingface")


def model_and_batch(kind, device, **options):
    if kind == "nanogpt":
        return make_nanogpt(device, **options), batch(device)
    ids = tokens(device).cpu()  # as a loader hands it over
    return make_huggingface(device, **options), {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_has_the_figures_and_nothing_else_has_changed(device, kind, capsys):
    model, given = model_and_batch(kind, device, dropout=0.2)
    model.transformer.h[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    report = patch(model, verify=given)
    assert len(report.verified) > 15
    assert all(error <= limit < 1e-4 for error, limit in report.verified.values())
    assert "verified   loss: off by " in capsys.readouterr().out
    assert [m.training for m in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.2}
    assert torch.get_rng_state().equal(state)
    assert is_fused(model.transformer.h[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "parameters"])
def test_in_the_dtypes_of_the_user(device, dtype, autocast):
    model, given = model_and_batch("nanogpt", device, n_layer=1)
    model = model if autocast else model.to(dtype)
    with torch.autocast(device.type, dtype, enabled=autocast):
        error, limit = patch(model, verify=given, quiet=True).verified["loss"]
    assert error <= limit and limit > torch.finfo(dtype).eps


def wrong(name, monkeypatch, error=None):
    """The table of kernels with one that computes something else, as by a miscompilation, or raises ``error``."""
    table = ops.get("triton")
    own = getattr(table, name)

    def off(*args, **kwargs):
        if error:
            raise error
        result = own(*args, **kwargs)
        return tuple(1.01 * part for part in result) if isinstance(result, tuple) else 1.01 * result

    monkeypatch.setattr(ops, "get", lambda *_: replace(table, name=f"triton wrong {name} {error}", **{name: off}))


@pytest.mark.parametrize("kernel, operation", [
    ("layer_norm", "layer norm"), ("qkv_attention", "attention"), ("mlp", "MLP"), ("linear_cross_entropy", "loss"),
])  # fmt: skip
def test_a_wrong_kernel_is_named_and_the_patch_undone(device, kernel, operation, monkeypatch):
    model, given = model_and_batch("nanogpt", device, n_layer=1)
    wrong(kernel, monkeypatch)
    with pytest.raises(
        UserError, match=f"patch was undone: with the fused {operation} the (loss|gradient of .*) is off by .*e-"
    ):
        patch(model, verify=given)
    assert not any(map(is_fused, model.modules()))
    assert not any(name.startswith("_fastgpt") for module in model.modules() for name in vars(module))


def test_a_kernel_that_does_not_run_is_named(device, monkeypatch):
    model, given = model_and_batch("nanogpt", device, n_layer=1)
    wrong("mlp", monkeypatch, RuntimeError("out of shared memory\nand more"))
    with pytest.raises(UserError, match=r"with the fused MLP the model fails .RuntimeError: out of shared memory.$"):
        patch(model, verify=given)
    assert not any(map(is_fused, model.modules()))


@pytest.mark.parametrize("given, message", [
    (torch.zeros(2, 3), "verify is a Tensor: give .idx, targets., or a dict of arguments with labels"),
    ((torch.zeros(2, 3, dtype=torch.int64),), "returns no loss that depends on a parameter: are there targets or labels"),
    ((torch.full((2, 3), 10**6),) * 2, "the unpatched model fails on this batch .IndexError"),
])  # fmt: skip
def test_a_batch_that_does_not_fit_is_refused(device, given, message):
    model = make_nanogpt("cpu")
    with pytest.raises(UserError, match=message):
        patch(model, verify=given)
    assert not any(map(is_fused, model.modules()))


def test_a_model_that_is_not_finite_is_not_blamed_on_the_patch(device):
    model, given = model_and_batch("nanogpt", device)
    model.transformer.ln_f.weight.data.fill_(float("inf"))
    with pytest.raises(UserError, match="of the unpatched model are not finite on this batch"):
        patch(model, verify=given)
