"""A driver that applies the parity bound (fastgpt/kernels/parity.py) to an op's outputs and gradients.

The check is made at the shape that is timed, so with the very launch configs. Where the fp64 reference does not fit there,
``in_pieces`` computes it in the memory of one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastgpt.kernels.parity import allowed, errors


def assert_parity(
    name: str, got: Tensor, ref64: Tensor, torch_same_dtype: Tensor, operand_dtype: torch.dtype | None = None
) -> float:
    """Assert the bound for one tensor, and return the share of it that is used. ``ref64`` is fp64; ``torch_same_dtype`` is
    PyTorch's result in the dtype."""
    assert got.shape == ref64.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(ref64.shape)}"
    assert got.dtype == torch_same_dtype.dtype, f"{name}: dtype {got.dtype}, PyTorch gives {torch_same_dtype.dtype}"
    assert torch.isfinite(got).all(), f"{name}: not finite"
    ref64 = ref64.detach()
    used = 0.0
    for kind, mine, theirs in zip(("rms", "max"), errors(got, ref64), errors(torch_same_dtype, ref64)):
        limit = allowed(theirs, got.dtype, operand_dtype)
        assert mine <= limit, f"{name}: {kind} error {mine:.3g}, PyTorch's {theirs:.3g}, allowed {limit:.3g}"
        used = max(used, mine / limit)
    return used


def run(op: Callable, inputs: dict[str, Any], upstream: tuple[Tensor, ...] | None) -> tuple[dict, tuple[Tensor, ...]]:
    """Call ``op(**inputs)`` and its backward. Floating tensors in ``inputs`` become leaves. Returns outputs and gradients
    by name, and the upstream gradients used (ones drawn from N(0, 1) if none were given)."""
    leaves = {
        key: value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }
    outputs = op(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if upstream is None:
        upstream = tuple(torch.randn_like(out, dtype=torch.float32).to(out.dtype) for out in outputs)
    torch.autograd.backward(outputs, [grad.to(out.device, out.dtype) for grad, out in zip(upstream, outputs)])
    results = {f"out{i}": out for i, out in enumerate(outputs)}
    for key, leaf in leaves.items():
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            assert leaf.grad is not None, f"no gradient for {key}"
            results[f"d{key}"] = leaf.grad
    return results, upstream


def check(
    op: Callable,
    reference: Callable,
    inputs: dict[str, Any],
    *,
    upstream: tuple[Tensor, ...] | None = None,
    operand_dtype: torch.dtype | None = None,
    exact_operands: tuple[str, ...] = (),
    exact: Callable | None = None,
) -> None:
    """Assert parity of every output and every gradient of ``op`` with ``reference``, which ``exact`` replaces in fp64.

    ``inputs`` are the keyword arguments of both (tensors in the dtypes and strides under test; strides are kept).
    ``operand_dtype`` grants its 2 eps to all results but those named in ``exact_operands`` ("out0", "dx", ...).
    """
    got, upstream = run(op, inputs, upstream)
    same_dtype, _ = run(reference, inputs, upstream)
    wide = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    ref64, _ = run(exact or reference, wide, upstream)
    for name, value in got.items():
        granted = None if name in exact_operands else operand_dtype
        assert_parity(name, value, ref64[name], same_dtype[name], granted)


def in_pieces(op: Callable[..., Tensor], rows: tuple[str, ...], pieces: int) -> Callable[..., Tensor]:
    """``op`` over equal pieces of its inputs named ``rows``, cut along their first dimension. Results are joined; of scalars,
    which are means over rows, the mean is taken. Each piece is computed again in backward, so that only one is ever held."""

    def whole(**inputs: Any) -> Tensor:
        cut = {key: value.chunk(pieces) if key in rows else (value,) * pieces for key, value in inputs.items()}
        found = [checkpoint(op, use_reentrant=False, **dict(zip(cut, piece))) for piece in zip(*cut.values())]
        return torch.cat(found) if found[0].ndim else torch.stack(found).mean()

    return whole
