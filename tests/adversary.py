"""Triton's interpreter, made as hard on a kernel as a GPU may be: for ``pytest --adversary`` and tests marked ``adversarial``.

The interpreter is kinder than a GPU. Fresh memory holds zeros, functions are NumPy's, right to the last bit, and programs run
one after another from the first. A kernel that leans on any of that passes every test on a CPU and fails on a card. So inside
``adversary``:

* ``torch.empty`` holds NaN, and so do the lanes that a load masks off without saying ``other`` (integers: the largest);
* fp32 functions err by as much as NVIDIA allows them to (PTX ISA, "Floating Point Instructions"; CUDA C++ Programming Guide,
  "Mathematical Functions"), in a direction that depends on nothing but the result;
* the programs of a launch run from the last to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from unittest import mock

import numpy as np
import torch

Function = Callable[[np.ndarray], np.ndarray]

EX2 = 2.0**-22  # ex2.approx.f32; tl.exp is that of x log2(e), a product that is rounded
ULP = 2.0**-24  # an ulp is 2^-24 to 2^-23 of a number: what is allowed wherever between two powers of two it lies
LOG = ULP  # __nv_logf, __nv_log2f: 1 ulp
ERF = DIV = 2 * ULP  # __nv_erff, div.full.f32: 2 ulp
SQRT = 2.0**-23  # sqrt.approx.ftz.f32
RSQRT = 2.0**-22.4  # rsqrt.approx.ftz.f32


def _off(values: np.ndarray, error: float) -> np.ndarray:
    """fp64 ``values`` off by that relative ``error``, as fp32: up or down, for one value always the same, as a function's."""
    with np.errstate(all="ignore"):
        mixed = (np.ascontiguousarray(values).view(np.uint64) >> np.uint64(20)) * np.uint64(0x9E3779B97F4A7C15)
        sign = 1.0 - 2.0 * ((mixed >> np.uint64(40)) & np.uint64(1)).reshape(values.shape)
        return (values * (1.0 + error * sign)).astype(np.float32)


def _flushed(values: np.ndarray) -> np.ndarray:
    """.ftz: subnormal fp32 numbers are zeros."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, 0 * values, values)


def _approximate(exact: Function, error: float, flushes: bool = False) -> Function:
    """``exact``, of fp32 as a GPU computes it. Of fp64 it is right there too."""

    def function(*operands: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            if operands[0].dtype != np.float32:
                return exact(*operands).astype(operands[0].dtype)
            found = exact(*(operand.astype(np.float64) for operand in operands))
            return _off(_flushed(found) if flushes else found, error)

    return function


def _exp2(x: np.ndarray) -> np.ndarray:
    approximate = _approximate(np.exp2, EX2, flushes=True)
    return np.where(x == 0, x.dtype.type(1), approximate(x))  # the one value of which PTX says that it is right


def _exp(x: np.ndarray) -> np.ndarray:
    return np.exp(x) if x.dtype != np.float32 else _exp2(x * np.float32(np.log2(np.e)))


@contextmanager
def adversary() -> Iterator[None]:
    """Launches inside run so. Nests; everything is as before afterwards."""
    from triton.language import bfloat16
    from triton.runtime import interpreter

    import_module("fastgpt.kernels")  # whose corrections to the interpreter come first
    builder = interpreter.InterpreterBuilder
    load, erf, set_grid_idx = builder.create_masked_load, builder.create_erf, builder.set_grid_idx

    def poisoned(self, ptrs, mask, other, *rest, **options):
        if other is None:
            dtype = ptrs.get_element_ty()
            numpy = interpreter._get_np_dtype(dtype)
            if dtype == bfloat16:
                fill = 0x7FC0  # kept as its bits
            else:
                fill = (
                    np.nan if np.issubdtype(numpy, np.floating) else True if numpy == np.bool_ else np.iinfo(numpy).max
                )
            other = interpreter.TensorHandle(np.full(ptrs.data.shape, fill, dtype=numpy), dtype)
        return load(self, ptrs, mask, other, *rest, **options)

    def unary(function: Function) -> Callable:
        return lambda self, operand: self.unary_op(operand, function)

    divide = _approximate(np.divide, DIV)
    patches = {
        "create_masked_load": poisoned,
        "create_exp": unary(_exp),
        "create_exp2": unary(_exp2),
        "create_log": unary(_approximate(np.log, LOG)),
        "create_log2": unary(_approximate(np.log2, LOG)),
        "create_sqrt": unary(_approximate(np.sqrt, SQRT, flushes=True)),
        "create_rsqrt": unary(_approximate(lambda x: 1 / np.sqrt(x), RSQRT)),
        "create_erf": lambda self, operand: self.unary_op(erf(self, operand), _approximate(np.positive, ERF)),
        "create_fdiv": lambda self, a, b: self.binary_op(a, b, divide),
        "set_grid_idx": lambda self, *at: set_grid_idx(self, *(n - 1 - i for n, i in zip(self.grid_dim, at))),
    }
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # NaN, or the largest integer
        with mock.patch.multiple(builder, **patches):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled
