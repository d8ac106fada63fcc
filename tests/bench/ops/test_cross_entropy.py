"""The peers of the loss."""

from __future__ import annotations

import torch

from bench.ops.common import TINY
from bench.ops.cross_entropy import linear_cross_entropy


def test_pytorchs_own_fused_loss_is_a_peer_where_there_is_one(device, monkeypatch):
    entry = linear_cross_entropy(TINY, device, False)
    has_it = hasattr(torch.nn.functional, "linear_cross_entropy")
    assert ("torch linear_ce" in entry.variants) == has_it
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    assert "torch linear_ce" not in linear_cross_entropy(TINY, device, False).variants
