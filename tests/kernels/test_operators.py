"""Which way an operation is called, and that both ways compute, differentiate and refuse the same."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgpt.kernels import layer_norm, runtime, tuning
from fastgpt.kernels.operators import operator

_number = itertools.count()


@pytest.fixture
def scale():
    """An operator x * factor, and the log of its direct calls."""
    direct = []

    def function(x: torch.Tensor, factor: float) -> torch.Tensor:
        if type(x) is torch.Tensor or type(x) is torch.nn.Parameter:
            direct.append("_library" not in "".join(frames()))
        return x.detach() * factor

    op = operator(f"test_scale_{next(_number)}", function)
    op.register_fake(lambda x, factor: torch.empty_like(x))

    def setup(ctx, inputs, output):
        _, ctx.factor = inputs

    op.register_autograd(lambda ctx, dy: (dy * ctx.factor, None), setup_context=setup)
    op.direct = direct
    return op


def frames():
    """File names of the call stack: torch/_library is in it below a registered operator."""
    import sys

    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back


def test_eager_calls_go_straight_to_the_function_and_are_differentiable(scale):
    x = torch.randn(3, requires_grad=True)
    y = scale(x, 3.0)
    y.sum().backward()
    assert scale.direct == [True]
    torch.testing.assert_close(y, 3 * x)
    torch.testing.assert_close(x.grad, torch.full((3,), 3.0))
    assert not scale(x.detach(), 3.0).requires_grad
    with torch.no_grad():
        assert not scale(x, 3.0).requires_grad
    assert scale.direct == [True] * 3


def test_what_traces_or_profiles_sees_a_registered_operator(scale):
    x = torch.randn(3, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        scale(x, 2.0).sum().backward()
    assert any(event.key == scale.registered._qualname for event in profile.key_averages())
    assert scale.direct == [False]
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
        assert scale(fake, 2.0).shape == (3,)
    assert scale(fake, 2.0).shape == (3,)  # outside the mode, too
    compiled = torch.compile(lambda x: scale(x, 2.0), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), 2 * x)
    assert scale.direct == [False] * 2


def test_a_second_derivative_without_a_formula_is_refused():
    op = operator(f"test_square_{next(_number)}", lambda x: x.detach() ** 2, schema="(Tensor x) -> Tensor")
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="autograd"):
        op(x).sum().backward()


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_written_in_place_gets_a_new_version(grad):
    def add(total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        total.data.add_(x)  # as a kernel writes: without PyTorch's noticing
        return x.clone()

    op = operator(f"test_add_{next(_number)}", add, mutates_args=("total",))
    total = torch.zeros(3)
    with torch.no_grad():
        op(total, torch.ones(3, requires_grad=grad))
    assert total._version == 1 and total.tolist() == [1, 1, 1]


@pytest.mark.parametrize("way", ["direct", "differentiable", "registered"])
def test_an_operator_runs_again_where_the_gpu_has_no_room_for_a_config(way, monkeypatch):
    refused, runs = [], []

    def double(x: torch.Tensor) -> torch.Tensor:
        runs.append(x)
        if len(runs) == 1:
            raise runtime.NoRoom("a choice", RuntimeError())
        return x.detach() * 2

    monkeypatch.setattr(tuning, "refuse", lambda error: refused.append(error.choice))
    op = operator(f"test_double_{next(_number)}", double)
    op.register_fake(torch.empty_like)
    op.register_autograd(lambda ctx, dy: 2 * dy, setup_context=lambda ctx, inputs, output: None)
    x = torch.ones(3, requires_grad=way == "differentiable")
    y = (op.registered if way == "registered" else op)(x)
    assert y.tolist() == [2.0] * 3 and refused == ["a choice"] and len(runs) == 2


def test_what_pytorch_says_of_functional_transforms(device):
    """docs/troubleshooting.md names the message."""
    loss = lambda x: layer_norm(x, torch.ones(8, device=device)).sum()  # noqa: E731
    with pytest.raises(RuntimeError, match=r"In order to use an autograd\.Function with functorch transforms"):
        torch.func.grad(loss)(torch.randn(3, 8, device=device))
