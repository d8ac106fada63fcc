"""Timing entries: what is checked is what is timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from bench.ops import ENTRIES
from bench.ops.common import TINY
from bench.parity import in_pieces, run
from fastgpt.kernels import tuning


class Calls(TorchDispatchMode):
    """Our operators that were called, with the shapes and dtypes of their tensors."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastgpt":
            self.found.add((func.name(), str(tree_map_only(torch.Tensor, lambda x: (x.shape, x.dtype), args))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", ENTRIES, ids=lambda make: make.__name__)
def test_parity_is_checked_with_the_shapes_and_configs_that_are_timed(make, device):
    entry = make(replace(TINY, B=2, rows=128), device, False)
    launched = {}
    for name, work in (("parity", entry.parity), ("timing", entry.variants["triton"])):
        choices, calls = [], Calls()
        work = work if name == "parity" else work()
        with tuning.heard(choices.append), calls:
            work()
        launched[name] = calls.found | {(c.key, str(c.config)) for c in choices}
    assert launched["timing"] and launched["timing"] <= launched["parity"]


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
