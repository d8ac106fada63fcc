"""The second kernel of sums over a tensor's columns."""

from __future__ import annotations

import pytest
import torch

from fastgpt.kernels import column_sums

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("rows, C", [(1, 1), (3, 77), (64, 32), (200, 33)])
def test_partial_sums_are_added_up(device, rows, C):
    partials = [torch.randn(rows, C, device=device) for _ in range(3)]
    outs = [torch.empty(C, device=device, dtype=dtype) for dtype in (FP32, BF16, FP32)]
    column_sums.add_up((partials[0], outs[0]), (None, None), (partials[1], outs[1]), (partials[2], outs[2]))
    for values, out in zip(partials, outs):
        torch.testing.assert_close(
            out, values.double().sum(0).to(out.dtype), rtol=1e-2 if out.dtype == BF16 else 1e-5, atol=1e-5
        )
    assert column_sums.partial(7, None) is None and column_sums.partial(7, outs[0]).shape == (7, C)
