"""Timing entries: what is checked is what is timed."""

from __future__ import annotations

import pytest
import torch

from bench.ops import ENTRIES
from bench.ops.common import TINY
from bench.parity import in_pieces, run
from fastgpt.kernels import runtime, tuning


@pytest.mark.parametrize("make", ENTRIES, ids=lambda make: make.__name__)
def test_parity_is_checked_with_the_shapes_and_configs_that_are_timed(make, device):
    entry = make(TINY, device, False)
    launched = {}
    for name, work in (("parity", entry.parity), ("timing", entry.variants["triton"])):
        choices, sizes = [], []
        work = work if name == "parity" else work()
        record = runtime.recorded(lambda op, shape, dtype, engine, sizes=sizes: sizes.append((op, shape, dtype)))
        with tuning.heard(choices.append), record:
            work()
        launched[name] = {(c.key, tuple(sorted(c.config.items()))) for c in choices}, set(sizes)
    assert launched["timing"][0] <= launched["parity"][0] and launched["timing"][1] <= launched["parity"][1]


@pytest.mark.parametrize("scalar", [False, True])
def test_a_reference_in_pieces_is_the_reference(scalar):
    def op(x, weight):
        y = (x @ weight).tanh()
        return y.mean() if scalar else y

    inputs = {"x": torch.randn(12, 5).double(), "weight": torch.randn(5, 3).double()}
    whole, upstream = run(op, inputs, None)
    cut, _ = run(in_pieces(op, ("x",), 4), inputs, upstream)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value)
