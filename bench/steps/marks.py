"""Ranges for a step that is being profiled, where the frames of its trace cannot tell its operations apart.

Several matmuls of one registered operation, or a pass behind a matmul in the same one, are launched from the same frames. They
are marked while a step is recorded, and at no other time: training pays nothing for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch.profiler import record_function

from bench.steps.trace import IS, OPTIMIZER
from fastgpt import anatomy
from fastgpt.anatomy import Shape
from fastgpt.kernels import runtime
from fastgpt.training.step import Stepper

NAMES = {
    # The head's matmuls with sums in fp16, which are kernels of ours inside the loss.
    "head.logits": "head forward",
    "head.input_grad": "head dX",
    "head.weight_grad": "head dW",
    "fp8.gelu": "mlp up forward",
    # What follows a matmul that is a library's.
    "gelu": "GELU forward",
    "gelu_grad": "GELU backward",
}
"""What a step's operations are called, by their name in ``runtime.record``; the frames tell all others apart."""


@contextmanager
def marked(shape: Shape) -> Iterator[None]:
    """Inside, steps of a model of this shape carry the ranges that bench/steps/trace.py reads."""
    hidden, activation = anatomy.of(shape).hidden, anatomy.of(shape).activation

    def mark(op: str, sizes: tuple[int, ...], dtype: torch.dtype, engine: str) -> record_function | None:
        # fp8's MLP is one operation of two matmuls; backward has an operation for each matmul.
        second_of_mlp = op == "fp8.forward" and sizes[1:] == (shape.n_embd, hidden)
        name = "mlp down forward" if second_of_mlp else NAMES.get(op)
        return None if name is None else record_function(IS + name.replace("GELU", activation))

    update = Stepper.update

    @wraps(update)
    def marked_update(stepper: Stepper) -> Any:
        with record_function(OPTIMIZER):
            return update(stepper)

    with runtime.recorded(mark), mock.patch.object(Stepper, "update", marked_update):
        yield
