"""A training step without its arithmetic, so that its launches can be compiled at shapes that no CPU could compute."""

from __future__ import annotations

import torch

from fastgpt.training.dry_run import no_arithmetic


def test_large_results_have_shape_and_dtype_but_are_never_computed():
    with no_arithmetic():
        a = torch.empty(2**15, 2**15, dtype=torch.bfloat16)  # 2 GiB that no page is ever touched of
        product = a @ a.T
        cast = product.float().view(2**10, -1).transpose(0, 1)
        total = cast.sum(1)
    assert (product.shape, product.dtype) == ((2**15, 2**15), torch.bfloat16)
    assert (cast.shape, cast.dtype, total.shape) == ((2**20, 2**10), torch.float32, (2**20,))


def test_writes_return_what_they_write_to():
    with no_arithmetic():
        x = torch.empty(2**20)
        out = torch.empty(2**10, 2**10)
        matrix = x.view(2**10, 2**10)
        assert x.mul_(2) is x and torch.mm(matrix, matrix, out=out) is out


def test_small_values_are_computed():
    with no_arithmetic():
        lengths = torch.tensor([1, 2, 3])
        assert int(lengths.cumsum(0)[-1]) == 6 and lengths.repeat_interleave(lengths).tolist() == [1, 2, 2, 3, 3, 3]


def test_gradients_reach_the_leaves():
    with no_arithmetic():
        weight = torch.nn.Parameter(torch.empty(1024, 1024))
        torch.nn.functional.gelu(torch.empty(4096, 1024) @ weight).sum().backward()
    assert weight.grad is not None and weight.grad.shape == weight.shape
