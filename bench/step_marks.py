"""Ranges for a step that is being profiled, where the frames of its trace cannot tell its operations apart.

Several matmuls of one registered operation, or a pass behind a matmul in the same one, are launched from the same frames. The
functions that launch them are wrapped while a step is recorded, and at no other time: training pays nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any
from unittest import mock

from torch.profiler import record_function

from fastgpt.anatomy import Shape
from fastgpt.op_names import OPTIMIZER
from fastgpt.profiling import IS
from fastgpt.training.step import Stepper

Operation = Callable[..., str | None]
"""From the arguments of a call: the operation that it is, or None where its frames tell."""


@contextmanager
def marked(shape: Shape, *, triton: bool) -> Iterator[None]:
    """Inside, steps of a model of this shape carry the ranges that fastgpt/profiling.py reads. ``triton``: whether they run
    our kernels, which are imported for it."""
    with ExitStack() as stack:
        marks = [(Stepper, "_update", lambda *_: OPTIMIZER), *(_of_kernels(shape) if triton else ())]
        for owner, name, operation in marks:
            stack.enter_context(mock.patch.object(owner, name, _ranged(getattr(owner, name), operation)))
        yield


def _ranged(function: Callable[..., Any], operation: Operation) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        name = operation(*args, **options)
        with nullcontext() if name is None else record_function(name):
            return function(*args, **options)

    return run


def _of_kernels(shape: Shape) -> Iterator[tuple[Any, str, Operation]]:
    """(module or class, its function, operation) of our kernels."""
    from fastgpt.kernels import _fp8_launch as fp8
    from fastgpt.kernels import _linear_launch as linear
    from fastgpt.kernels._cross_entropy_matmuls import Fp16Sums

    def always(name: str) -> Operation:
        return lambda *_, **__: IS + name

    def second_of_the_mlp(a: Any, b: Any, *_: Any, **__: Any) -> str | None:
        """fp8's MLP is one operation; a first operand of gradients belongs to backward, which has one for each matmul."""
        is_down = tuple(b.values.shape) == (shape.n_embd, 4 * shape.n_embd)
        return IS + "mlp down forward" if is_down and a.values.dtype == fp8.FORWARD else None

    def sweep(z: Any, dy: Any, *_: Any, **__: Any) -> str:
        return IS + f"GELU {'forward' if dy is None else 'backward'}"

    def gelu_grad(dy: Any, dtype: Any, pre: Any, *_: Any, **__: Any) -> str | None:
        return None if pre is None else IS + "GELU backward"

    # The head's matmuls with sums in fp16, which are kernels of ours inside the loss.
    yield Fp16Sums, "logits", always("head forward")
    yield Fp16Sums, "input_grad", always("head dX")
    yield Fp16Sums, "weight_grad", always("head dW")
    yield fp8, "matmul_gelu", always("mlp up forward")
    yield fp8, "matmul", second_of_the_mlp
    # What follows a matmul that is a library's.
    yield fp8, "_sweep", sweep
    yield linear, "pointwise_grad", gelu_grad
