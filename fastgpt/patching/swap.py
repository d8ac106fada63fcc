"""Replace a module's class in place by a subclass that computes differently, and leave everything else as it is.

``fuse`` makes ``class GPT2Block(Mixin, GPT2Block)`` and assigns it to ``module.__class__``. Parameters, buffers, names, hooks,
training flag and isinstance tests are untouched, ``super().forward`` is the module's own forward, and
``restore`` puts the old class back. Unlike a function assigned to ``module.forward``, this survives deepcopy and pickle, and
leaves wrappers of the class (gradient checkpointing in transformers) in effect.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, update_wrapper
from typing import Any

from torch import nn

from fastgpt import ops as operations
from fastgpt.common import UserError
from fastgpt.ops import Ops

_PREFIX = "_fastgpt_"  # begins the names of attributes that a patch adds to an instance


class Fused:
    """Base of the mixins."""

    takes_one = True
    """Whether only a forward that takes its input and nothing else can be replaced."""
    ops: Ops
    """The table of operations that the mixin calls."""
    names: tuple[str, ...]
    """Parameters of the module's own forward, after self."""

    def named(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of forward, by name."""
        return {**dict(zip(self.names, args)), **kwargs}

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls: Any = type(self)
        _, _, *state = tuple(super().__reduce_ex__(protocol))
        return (_new, (cls._fastgpt_base, cls._fastgpt_mixin, cls.ops.name), *state)


@dataclass(frozen=True)
class Change:
    """A module and the forward that it is to get."""

    operation: str
    """What the report calls it."""
    module: nn.Module
    mixin: type[Fused]
    counts: bool = True
    """Whether the report counts it: it is no companion of another change."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else the mixin has to know: put on the module as attributes that begin with ``_fastgpt_``."""


def parameters(forward: Any) -> tuple[str, ...]:
    """Names of a method's parameters after self."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(p.name for p in list(inspect.signature(forward).parameters.values())[1:] if p.kind in named)


@cache
def _fused_class(base: Any, mixin: Any, ops_name: str) -> type:
    own, names = base.forward, parameters(base.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and names and names[0] in kwargs:  # a mixin may call it otherwise
            args = (kwargs.pop(names[0]),)
        return mixin.forward(self, *args, **kwargs)

    # Keep the signature: a Trainer decides by it which columns and arguments to pass. Do not keep __wrapped__: Accelerate
    # follows it to the end when it unwraps a model, and would go past this function.
    update_wrapper(forward, own)
    del forward.__wrapped__  # type: ignore[attr-defined]
    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]

    namespace = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "forward": forward,
        "ops": operations.get(ops_name),
        "names": names,
        "_fastgpt_base": base,
        "_fastgpt_mixin": mixin,
    }
    return type(base.__name__, (mixin, base), namespace)


def _new(base: type, mixin: type, ops_name: str) -> nn.Module:
    """An empty module for copy and pickle to fill: the class is made on the fly, so it has no name to be found by."""
    cls: Any = _fused_class(base, mixin, ops_name)
    return cls.__new__(cls)


def fuse(change: Change, ops: Ops) -> None:
    """Give a module the forward pass of its mixin, computed with ``ops``. It must not be fused already."""
    module = change.module
    module.__class__ = _fused_class(type(module), change.mixin, ops.name)  # type: ignore[arg-type]
    vars(module).update({_PREFIX + name: value for name, value in change.settings.items()})


def is_fused(module: nn.Module) -> bool:
    return isinstance(module, Fused)


def base_class(module: nn.Module) -> type:
    """The class of the module, without what ``fuse`` added."""
    return getattr(type(module), "_fastgpt_base", type(module))


def restore(module: nn.Module) -> None:
    """Undo ``fuse``. Raises UserError if something has subclassed the class of the module since (FSDP2 does)."""
    cls = type(module)
    if "_fastgpt_base" not in vars(cls):
        raise UserError(f"a {cls.__name__} was wrapped after patch: it cannot be unpatched until it is unwrapped")
    if getattr(vars(module).get("forward"), "__func__", None) is vars(cls)["forward"]:
        del module.forward  # Accelerate's unwrap_model leaves the class's forward on the instance
    module.__class__ = cls._fastgpt_base  # type: ignore[attr-defined]
    for name in [name for name in vars(module) if name.startswith(_PREFIX)]:
        delattr(module, name)


def fused_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if is_fused(module)]


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """If what is done inside raises, the model's modules get back the classes and attributes that they had."""
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, cls, state in before:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(state)
        raise
