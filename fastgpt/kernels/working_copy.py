"""The low-precision working copy of an fp32 parameter: cast once per optimizer step, not once per use.

Parameters stay fp32 masters; operations read a bf16 or fp16 copy of them. The copy is kept beside the parameter,
outside the module and its state_dict, for as long as the parameter lives, and is valid for one value of
``param._version`` at one address: every in-place write by PyTorch (load_state_dict, torch.optim, ``param.mul_`` under
no_grad) raises the version, and the next use casts again. FusedAdamW writes the copy in the pass that updates the
parameter and declares it fresh.

What the version does not see: writes through ``param.data`` or by foreign kernels, and FSDP, which refills a
parameter's storage behind the version's back. Call ``forget(param)`` after the former; set ``enabled = False`` under
the latter.

A CUDA graph casts at each replay, as replays do not check versions. Code that captures inside ``captured_reads`` promises to
check them before each replay, and then the graph reads the copies.

The other half of what a weight costs per micro-batch is its gradient: ``gradients_in_place``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastgpt.kernels import runtime

enabled = True
"""False: ``working_copy`` casts at every call and keeps nothing."""


# Not attributes of the parameters: deepcopy and pickle of a module must neither carry a copy along nor share it.
_copies = WeakTensorKeyDictionary()


def keep(entries: WeakTensorKeyDictionary, param: Tensor, made: Any) -> None:
    """Enter what was made of ``param``, for as long as ``param`` lives."""
    entries[param] = made, param._version, _place(param)


def kept(entries: WeakTensorKeyDictionary, param: Tensor) -> Any:
    """What was made of ``param``, or None if there is nothing, or ``param`` was written or moved since."""
    made, version, place = entries.get(param, (None, None, None))
    return made if made is not None and version == param._version and place == _place(param) else None


def _place(param: Tensor) -> tuple:
    """``param.data = other`` may leave another shape at one address."""
    return param.data_ptr(), param.shape, param.device


@dataclass
class Captures:
    """What the captures inside ``captured_reads`` know of parameters."""

    reads: list[Tensor] = field(default_factory=list)
    """Copies that they read."""
    made: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    """Parameter -> what ``once_in_captures`` has made of it."""


_captures: Captures | None = None


@contextmanager
def captured_reads() -> Iterator[Captures]:
    """Captures made inside read the copies that are up to date, and list them in what this yields. Others are cast as ever.

    For a graph of training steps, whose captured FusedAdamW step writes parameters and copies together. Its owner keeps
    the copies alive as long as the graph, and before each replay compares them with ``existing(param)``: another one, or
    None, means that something else has written the parameter and the graph is out of date.
    """
    global _captures
    before, _captures = _captures, Captures()
    try:
        yield _captures
    finally:
        _captures = before


def once_in_captures(param: Tensor, make: Callable[[], Any]) -> Any:
    """``make()``, for calls while capturing. Inside ``captured_reads`` only the first capture makes it: its owner replays the
    others after that one, with no update in between, and keeps ``Captures.made`` alive. Any other capture makes its own."""
    if _captures is None:
        return make()
    if param not in _captures.made:
        _captures.made[param] = make()
    return _captures.made[param]


class _WorkingCopy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, param: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = param.dtype
        return copy.detach()  # a tensor of its own: the cached one must not get a grad_fn

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0].to(ctx.dtype), None


def working_copy(param: Tensor, dtype: torch.dtype) -> Tensor:
    """``param`` in ``dtype``, differentiable: the gradient arrives at ``param`` in its own dtype.

    Returns ``param`` itself if it has that dtype. The copy shares storage from call to call; do not write to it.
    Tensors that are not plain leaf parameters (the arguments of functional_call, DTensors), and everything under
    torch.compile or in the capture of a CUDA graph (but see ``captured_reads``), are cast with ``param.to(dtype)`` and
    not kept.
    """
    if param.dtype == dtype:
        return param
    # Order matters: dynamo folds is_compiling() and never looks at the rest.
    if torch.compiler.is_compiling() or not enabled or not cachable(param):
        return param.to(dtype)
    copy = existing(param)
    if copy is not None and copy.dtype != dtype:
        copy = None
    if runtime.capturing(param.device):
        if copy is None or _captures is None:
            return param.to(dtype)
        _captures.reads.append(copy)
    elif copy is None:
        # Kept beyond this call, so no inference tensor, even if made in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            copy = param.detach().to(dtype)
            keep(_copies, param, copy)
    if param.requires_grad and torch.is_grad_enabled():
        return _WorkingCopy.apply(param, copy)
    return copy.detach()


def existing(param: Tensor) -> Tensor | None:
    """The copy of ``param``, if there is one and it is up to date: what an optimizer writes together with ``param``."""
    return kept(_copies, param)


def mark_fresh(param: Tensor) -> None:
    """Declare the copy of ``param`` up to date with its present version, after a kernel has written both."""
    if param in _copies:
        copy, _, place = _copies[param]
        _copies[param] = copy, param._version, place


def forget(param: Tensor) -> None:
    """Drop the copy of ``param``, after a write that ``param._version`` does not show. The next use casts again."""
    _copies.pop(param, None)


def cachable(param: Tensor) -> bool:
    """Whether a version counts every write to ``param``: not of a view, an inference tensor or a DTensor."""
    return type(param) is nn.Parameter and param.is_leaf and not param.is_inference()


# ---------------------------------------------------------------- gradients

_in_place = False


@contextmanager
def gradients_in_place() -> Iterator[None]:
    """Forward passes made inside add their fp32 weight gradients to ``weight.grad`` in backward, where there is one, and
    hand none to autograd: 8 bytes per weight and micro-batch instead of 16.

    For a loop that calls ``loss.backward()`` and nothing else: torch.autograd.grad, DDP and FSDP would not see these
    gradients. Only leaf parameters of fp32 that have no hooks; without effect under torch.compile.
    """
    global _in_place
    before, _in_place = _in_place, True
    try:
        yield
    finally:
        _in_place = before


def adds_to(weight: Tensor) -> bool:
    """Whether backward may add to ``weight.grad``: not where a hook waits to see the gradient."""
    if not _in_place or torch.compiler.is_compiling() or type(weight) is not nn.Parameter or not weight.is_leaf:
        return False
    return not (weight._backward_hooks or weight._post_accumulate_grad_hooks)
