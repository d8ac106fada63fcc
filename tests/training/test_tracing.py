import gzip
import os

import pytest
import torch

from fastgpt.training import tracing


@pytest.mark.skipif(torch.cuda.is_available(), reason="that records kernels")
def test_a_trace_that_lacks_the_gpus_side_is_named(tmp_path, monkeypatch, recwarn):
    """As kineto's own error is silenced with its noise. Without CUDA the profiler records the host alone."""
    monkeypatch.setattr(os, "environ", dict(os.environ))
    said = []
    with tracing.traced(tmp_path, torch.device("cuda"), said.append, said) as after_step:
        for _ in range(tracing.SETTLED + tracing.STEPS):
            torch.ones(2).add(1)
            after_step()
    assert len(said) == 2 and "has 3 steps" in said[0]
    assert "has no kernel of the GPU, as CUPTI is missing or not permitted" in said[1]


def test_kernels_in_a_trace_are_found(tmp_path):
    path = tmp_path / tracing.FILE
    path.write_bytes(gzip.compress(b'{"traceEvents": [\n{"ph": "X", "cat": "kernel", "name": "sgemm"}]}'))
    assert tracing._has_kernels(path)
