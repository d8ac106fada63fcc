"""The low-precision working copy of an fp32 parameter: cast once per optimizer step, not once per use.

Parameters stay fp32 masters; operations read a bf16 or fp16 copy of them. A copy promises that nothing has written the
parameter since, and no tensor can keep that promise by itself. ``param._version`` counts the writes of PyTorch
(load_state_dict, torch.optim, ``param.mul_`` under no_grad), but not those through ``param.data`` or by somebody's own kernel,
which is how some optimizers, averages of weights and loaders write. So copies are kept and read only inside
``copies_kept``, which a loop opens that knows who writes its parameters; everywhere else each use casts. A copy is right

* if it was cast since the loop opened this ``copies_kept``, or
* if FusedAdamW wrote it last, in the pass that updates the parameter, and has said so (``mark_fresh``),

and if parameter, version and address are still the same. It lies beside the parameter, outside the module and its state_dict,
for as long as the parameter lives. FSDP refills a parameter's storage behind the version's back: under it ``enabled`` is False.

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
"""False: nothing is kept, also inside ``copies_kept``."""


# Not attributes of the parameters: deepcopy and pickle of a module must neither carry a copy along nor share it.
_copies = WeakTensorKeyDictionary()
_scope: object | None = None  # of the ``copies_kept`` that is open


@contextmanager
def copies_kept() -> Iterator[None]:
    """What is made of a parameter inside is kept and used again, until a write that ``param._version`` counts.

    For a loop that writes parameters inside in no other way: not through ``param.data``, not by a kernel of its own. FusedAdamW
    may step inside, and the copies that it writes are right in the next ``copies_kept``, too, so nothing else may write by
    those ways in between. One that is open already stays."""
    global _scope
    before, _scope = _scope, _scope or object()
    try:
        yield
    finally:
        _scope = before


def keeps(param: Tensor) -> bool:
    """Whether what is made of ``param`` now may be kept: not under torch.compile, and only of plain leaf parameters, whose
    version counts every write by PyTorch, unlike a view's, an inference tensor's or a DTensor's."""
    # Order matters: dynamo folds is_compiling() and never looks at the rest.
    if torch.compiler.is_compiling() or not enabled or _scope is None:
        return False
    return type(param) is nn.Parameter and param.is_leaf and not param.is_inference()


def keep(entries: WeakTensorKeyDictionary, param: Tensor, made: Any) -> None:
    """Enter what was made of ``param``, where it ``keeps``, for as long as ``param`` lives."""
    entries[param] = made, param._version, _place(param), _scope


def kept(entries: WeakTensorKeyDictionary, param: Tensor) -> Any:
    """What was made of ``param``, or None if there is nothing, or ``param`` was, or may have been, written or moved since."""
    made, version, place, scope = entries.get(param, (None, None, None, None))
    right = version == param._version and place == _place(param) and (scope is _ANNOUNCED or scope is _scope)
    return made if made is not None and right else None


_ANNOUNCED = object()
"""Stands for the scope of what was written together with its parameter."""


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
        with copies_kept():
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


def working_copy(param: Tensor, dtype: torch.dtype, differentiable: bool = True) -> Tensor:
    """``param`` in ``dtype``, ``differentiable``: the gradient arrives at ``param`` in its own dtype.

    Returns ``param`` itself if it has that dtype. Inside ``copies_kept`` the result shares storage from call to call; do not
    write to it. Outside, and for what does not ``keep`` (the arguments of functional_call, DTensors, everything under
    torch.compile) and in the capture of a CUDA graph (but see ``captured_reads``), it is ``param.to(dtype)``.
    """
    if param.dtype == dtype:
        return param
    if not keeps(param):
        return (param if differentiable else param.detach()).to(dtype)
    copy = existing(param)
    if copy is not None and copy.dtype != dtype:
        copy = None
    if runtime.capturing(param.device):
        if copy is None or _captures is None:
            return (param if differentiable else param.detach()).to(dtype)
        _captures.reads.append(copy)
    elif copy is None:
        # Kept beyond this call, so no inference tensor, even if made in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            copy = param.detach().to(dtype)
            keep(_copies, param, copy)
    if differentiable and param.requires_grad and torch.is_grad_enabled():
        return _WorkingCopy.apply(param, copy)
    return copy.detach()


def existing(param: Tensor) -> Tensor | None:
    """The copy of ``param``, if there is one and it is up to date: what an optimizer writes together with ``param``."""
    return kept(_copies, param)


def mark_fresh(param: Tensor) -> None:
    """Declare the copy of ``param`` up to date with its present version, after a kernel has written both."""
    if param in _copies:
        copy, _, place, _ = _copies[param]
        _copies[param] = copy, param._version, place, _ANNOUNCED


def forget(param: Tensor) -> None:
    """Drop the copy of ``param``, after a write inside ``copies_kept`` that ``param._version`` does not show."""
    _copies.pop(param, None)


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
