"""How an operation is called: as a registered operator where something traces it, straight to its function where nothing does.

torch.compile, torch.export, fake tensors, vmap and the profiler need an opaque operator with a schema. Eager training does not,
and pays 100 microseconds of Python per operator for it (torch/_library: aliasing checks, redispatching, an autograd formula in
three layers). So both are made from the same function, fake and autograd formula, and each call takes the cheaper one that
will do::

    @operator("scale_fwd")
    def scale_fwd(x: Tensor, factor: float) -> Tensor: ...      # launches; schema read from the annotations

    scale_fwd.register_fake(lambda x, factor: torch.empty_like(x))
    scale_fwd.register_autograd(backward, setup_context=setup)  # both as torch.library's
    y = scale_fwd(x, 2.0)                                       # also torch.ops.fastgpt.scale_fwd(x, 2.0)

Either way it runs on its first tensor's device, whichever is current (Liger-Kernel#1303), and once more if the GPU turns out to
have no room for a config of the tables: by then ``tuning`` chooses another. So a function may have written to its arguments
only after the first launch of each of its kernels. ``launches`` gives the same to a function that is no operator.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.kernels import runtime, tuning

_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_profiled = torch._C._autograd._profiler_enabled


def launches(function: Callable) -> Any:
    """Decorates a function that launches kernels, the first tensor among whose arguments says where."""

    @functools.wraps(function)
    def launched(*args: Any, **options: Any) -> Any:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        with runtime.device_guard(first):
            try:
                return function(*args, **options)
            except runtime.NoRoom as error:
                tuning.refuse(error)
            return launched(*args, **options)

    return launched


def _plain_tensors(kinds: tuple[type, ...]) -> tuple[int, ...]:
    """Which arguments of these types are tensors; () if one is of a subclass other than nn.Parameter."""
    found = tuple(i for i, kind in enumerate(kinds) if issubclass(kind, Tensor))
    return found if all(kinds[i] in (Tensor, nn.Parameter) for i in found) else ()


class Operator:
    """A function of tensors and options, all positional, whose results alias no argument."""

    def __init__(self, name: str, function: Callable, mutates_args: Sequence[str], schema: str | None) -> None:
        self.registered = torch.library.custom_op(
            f"fastgpt::{name}", launches(function), mutates_args=mutates_args, schema=schema
        )
        self._function = function
        names = list(inspect.signature(function).parameters)
        self._written = [names.index(arg) for arg in mutates_args]
        self._differentiable: Any = None
        self._tensors: dict[tuple[type, ...], tuple[int, ...]] = {}
        self.__doc__ = function.__doc__

    def register_fake(self, fake: Callable) -> Callable:
        """``fake`` returns unwritten results: sizes, strides and dtypes are those of the function."""
        return self.registered.register_fake(fake)

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """As torch.library.register_autograd."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        function = self._function

        def forward(ctx: Any, *args: Any) -> Any:
            output = function(*args)
            setup_context(ctx, args, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        made = type(function.__name__, (torch.autograd.Function,), members)
        # Past Function.apply, whose 5 microseconds of Python ask for functorch's transforms, as __call__ has done.
        self._differentiable = super(torch.autograd.Function, made).apply  # type: ignore[misc]

    def __call__(self, *args: Any) -> Any:
        # Order matters: dynamo folds is_compiling() and never looks at the rest.
        if torch.compiler.is_compiling():
            return self.registered(*args)
        kinds = tuple(map(type, args))
        tensors = self._tensors.get(kinds)
        if tensors is None:
            tensors = self._tensors[kinds] = _plain_tensors(kinds)
        if not tensors:  # a subclass is among them: a fake tensor, a DTensor
            return self.registered(*args)
        if _dispatch_modes() or _transforms_active() or _profiled():
            return self.registered(*args)
        first = args[tensors[0]]
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return self(*args)
        try:
            if torch.is_grad_enabled() and any([args[i].requires_grad for i in tensors]):
                # Without a formula (backward passes under create_graph), the registered operator says what is missing.
                return self.registered(*args) if self._differentiable is None else self._differentiable(*args)
            if self._written:
                # As the registered operator does: autograd refuses a backward pass through what changed since.
                torch.autograd.graph.increment_version([args[i] for i in self._written if args[i] is not None])
            return self._function(*args)
        except runtime.NoRoom as error:  # not by ``launches``: a frame less
            tuning.refuse(error)
        return self(*args)


def operator(
    name: str, function: Callable | None = None, *, mutates_args: Sequence[str] = (), schema: str | None = None
) -> Any:
    """An Operator ``fastgpt::name`` of ``function``, or a decorator for one. ``mutates_args``, ``schema``: as
    torch.library.custom_op's."""
    if function is None:
        return lambda function: Operator(name, function, mutates_args, schema)
    return Operator(name, function, mutates_args, schema)
