"""Each kernel at GPT-2 124M's shapes, forward and backward, after its parity check. bench.kernels has peers and sweeps."""

from __future__ import annotations

import pytest
import torch

from bench.ops import ENTRIES
from bench.ops.common import Sizes


@pytest.mark.parametrize("name", [make.__name__ for make in ENTRIES])
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU: interpreted kernels have no speed to measure"
)
def test_kernel(measure, name):
    torch.manual_seed(0)
    entry = next(make for make in ENTRIES if make.__name__ == name)(Sizes(), torch.device("cuda"), False)
    entry.parity()
    work = entry.variants["triton"]()

    def run() -> None:
        work()
        torch.cuda.synchronize()

    measure(run)
