"""The peers of the loss, and what it is checked against."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.ops import cross_entropy
from bench.ops.common import TINY
from bench.ops.cross_entropy import linear_cross_entropy
from bench.parity import run
from fastgpt.kernels import reference


def test_pytorchs_own_fused_loss_is_a_peer_where_there_is_one(device, monkeypatch):
    entry = linear_cross_entropy(TINY, device, False)
    has_it = hasattr(torch.nn.functional, "linear_cross_entropy")
    assert ("torch linear_ce" in entry.variants) == has_it
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    assert "torch linear_ce" not in linear_cross_entropy(TINY, device, False).variants


def test_the_reference_whose_loss_is_cut_is_the_reference_to_the_bit(monkeypatch):
    """A gradient that was rounded piece by piece would have a larger error, and ours twice that."""
    size = replace(TINY, rows=4096, C=16, V=32, dtype=torch.bfloat16)
    monkeypatch.setattr(cross_entropy, "check", lambda ours, cut, inputs, **_: compared.append((cut, inputs)))
    compared = []
    linear_cross_entropy(size, torch.device("cpu"), False).parity()
    ((cut, inputs),) = compared
    whole, upstream = run(reference.linear_cross_entropy, inputs, None)
    pieces, _ = run(cut, inputs, upstream)
    assert set(pieces) == {"out0", "dx", "dweight"}
    torch.testing.assert_close(pieces.pop("out0"), whole.pop("out0"))
    assert all(torch.equal(pieces[name], gradient) for name, gradient in whole.items())
