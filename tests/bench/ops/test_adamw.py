"""The timing entry of AdamW."""

from __future__ import annotations

import pytest

from bench.ops import adamw
from bench.ops.common import TINY


def test_the_parity_check_of_adamw_compares_separate_parameters(device, monkeypatch):
    adamw.adamw(TINY, device, False).parity()

    class HalfStep(adamw.FusedAdamW):
        def __init__(self, params, lr, **options):
            super().__init__(params, lr=lr / 2, **options)

    monkeypatch.setattr(adamw, "FusedAdamW", HalfStep)
    with pytest.raises(AssertionError, match="parameter 0"):
        adamw.adamw(TINY, device, False).parity()
