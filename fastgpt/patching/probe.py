"""Does a fused module compute what the model's own does? Tried out at patch time, on a copy, in plain PyTorch.

Matching names prove little: a fork may scale, rotate, window or detach what it computes. So each kind of module is copied to
the CPU with random weights (zeros would hide differences), run as it is and with the fused forward, in train mode with
gradients, and left alone if anything differs. What two runs cannot show (random numbers, a step counter) is looked for in
the traces that it leaves. The model itself, its device and the random states are not touched.

Dropout takes part as a fixed pattern, a function of the shape and the probability alone, so that a dropout that is missing,
elsewhere or of another probability changes the result.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves

from fastgpt.common import UserError, first_line
from fastgpt.ops import EAGER
from fastgpt.patching.swap import Change, fuse, is_fused, restore

TOLERANCE = 2e-5
"""Largest difference over the largest value, in fp32. Rounding alone causes about 1e-6."""

UNTRIED = "its own forward cannot be tried out"


class Probe:
    """A CPU copy of ``module`` in fp32 with random parameters. With ``share``, parameters of one shape have the same values,
    in the same memory, and few have a gradient: a copy of a whole model then takes little more than its embedding."""

    def __init__(self, module: nn.Module, share: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(0)
        drawn: dict[torch.Size, Tensor] = {}
        tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
        memo: dict[int, Any] = {}
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_meta:
                raise UserError("the model is on the meta device: patch it after it has been given memory (to_empty)")
        for parameter in module.parameters():
            values = drawn.get(parameter.shape) if share else None
            if values is None:
                values = drawn[parameter.shape] = self.randn(*parameter.shape)
                values *= values.shape[-1] ** -0.5 if values.dim() > 1 else 1.0
            memo[id(parameter)] = nn.Parameter(values, not share or values.dim() < 2 or id(parameter) in tables)
        try:
            self.module = cast(copy.deepcopy(module, memo).to("cpu"), torch.float32)
        except Exception as error:
            raise UserError(
                f"{type(module).__name__} cannot be copied to be tried out ({type(error).__name__}: {first_line(error)})"
            ) from error
        self.copies = {id(part): copied for part, copied in zip(module.modules(), self.module.modules())}
        """{id of a part of ``module``: its copy}."""
        for part in self.copies.values():
            for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
                hooks.clear()
            vars(part).pop("forward", None)  # a closure over the model itself, as Accelerate's
        for number, (part, name) in enumerate(dropouts(self.module)):
            vars(part)[name] = 0.3 + 0.01 * (number % 50)  # each its own

    def why_not(
        self,
        changes: Sequence[Change],
        call: Callable[[Any, Tensor], Any],
        x: Tensor,
        train: bool = False,
        own_forward_runs: bool = False,
    ) -> str | None:
        """None if ``call(copy, x)`` returns the same with the changes as without, in train mode with the same gradients, else
        the reason in a few words. ``own_forward_runs``, inside the fused one, and may then count and draw."""
        self.module.train(train)
        here = [replace(change, module=self.copies[id(change.module)]) for change in changes]
        changed = [change.module for change in here]
        with _same_random_state():
            before = _random_state(), _plain_state(changed)
            try:
                want = self._run(call, x, train)
            except Exception as error:
                return f"{UNTRIED} ({type(error).__name__}: {first_line(error)})"
            after = _random_state(), _plain_state(changed)
        done = []
        with _same_random_state():
            try:
                for change in here:
                    if not is_fused(change.module):  # a module in two places
                        fuse(change, EAGER)
                        done.append(change.module)
                got = self._run(call, x, train)
            except Exception as error:
                return f"it is built otherwise ({type(error).__name__}: {first_line(error)})"
            finally:
                for part in done:
                    restore(part)
        if not _same(want, got):
            return "its forward computes something else"
        if own_forward_runs:
            return None
        if before[0] != after[0]:
            return "its forward draws random numbers"
        return None if before[1] == after[1] else "its forward changes the module's state"

    def _run(self, call: Callable[[Any, Tensor], Any], x: Tensor, train: bool) -> tuple[Any, Any]:
        """(outputs, gradients of a fixed combination of them)."""
        with torch.set_grad_enabled(train), torch.autocast("cpu", enabled=False), _PatternedDropout():
            x = x.detach().requires_grad_() if x.is_floating_point() else x
            outputs = call(self.module, x.clone())  # a forward may write to its input
            leaves = [y for y in tree_leaves(outputs) if isinstance(y, Tensor) and y.requires_grad]
            self.module.zero_grad()
            # autograd.backward is a torch function, in which the patterned dropout would end: not for checkpointed parts.
            torch.autograd.Variable._execution_engine.run_backward(
                tuple(leaves), tuple(_pattern(y.shape) for y in leaves), False, False, (), True, accumulate_grad=True
            )
            return outputs, [tensor.grad for tensor in (x, *self.module.parameters())]

    def ids(self) -> Tensor:
        """A few tokens that a model can be called with (2, T)."""
        tables = [part.weight for part in self.module.modules() if isinstance(part, nn.Embedding)]
        T = min(8, *(len(table) for table in tables))  # of positions there may be fewer
        known = getattr(getattr(self.module, "config", None), "vocab_size", None) or len(tables[0])
        return torch.randint(min(known, len(tables[0])), (2, T), generator=self.generator)  # a table may be padded

    def randn(self, *shape: int) -> Tensor:
        return torch.empty(shape).normal_(generator=self.generator)


def dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where probabilities of dropout are kept: (module, name of its attribute)."""
    for module in model.modules():
        name = (
            "p" if isinstance(module, nn.Dropout) else "dropout"
        )  # nanoGPT's attention has it twice: here, and as a child
        if type(vars(module).get(name)) in (int, float):
            yield module, name


@contextmanager
def plain_defaults(model: nn.Module) -> Iterator[None]:
    """New tensors are on the CPU in fp32, whatever torch.set_default_device and set_default_dtype have been told, and so is
    what ``model`` computes."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), computing_in(torch.float32, model):
            yield
    finally:
        torch.set_default_dtype(dtype)


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """model.to(dtype), but for the rotary tables of a nanochat from before March 2026, whose forward asserts that they are
    bf16. Later versions ask for COMPUTE_DTYPE."""
    asserted = "COMPUTE_DTYPE" not in getattr(getattr(type(model), "forward", None), "__globals__", {})
    tables = {name: model._buffers.get(name) for name in ("cos", "sin")} if asserted else {}
    narrow = {name: table for name, table in tables.items() if table is not None and table.dtype == torch.bfloat16}
    model.to(dtype)._buffers.update(narrow)
    return model


@contextmanager
def computing_in(dtype: torch.dtype, model: nn.Module) -> Iterator[None]:
    """Where the forwards of ``model`` go by names of their Python module, as nanochat's do, let these say ``dtype``, and no
    FlashAttention 3, which takes neither fp32 nor a CPU's tensors."""
    functions: list[Any] = [getattr(type(part), "forward", None) for part in model.modules()]
    for _ in range(2):  # theirs, and that of the attention that they call
        spaces = [function.__globals__ for function in functions if hasattr(function, "__globals__")]
        functions += [getattr(space.get("flash_attn"), "flash_attn_func", None) for space in spaces]
    meanwhile = {"COMPUTE_DTYPE": dtype, "USE_FA3": False, "HAS_FA3": False}
    before = [(space, {name: space[name] for name in meanwhile if name in space}) for space in spaces]
    try:
        for space, names in before:
            space.update({name: meanwhile[name] for name in names})
        yield
    finally:
        for space, names in before:
            space.update(names)


def _pattern(shape: torch.Size) -> Tensor:
    """Numbers between -1 and 1, no two alike."""
    return torch.arange(1.0, 1 + shape.numel()).cos().view(shape)


def _drop(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return x * (1 + p * _pattern(x.shape)) if training else x


class _PatternedDropout(TorchFunctionMode):
    """Multiplication by 1 + p cos(position) in place of every dropout, attention's included."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.dropout, torch.dropout):
            return _drop(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            call = {**dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args)), **kwargs}
            if p := call.pop("dropout_p", 0.0):
                v = call["value"]
                # The attended values of an identity matrix are the attention weights.
                weights = func(**{**call, "value": torch.eye(v.shape[-2]).expand(*v.shape[:-1], -1)})
                return _drop(weights, p) @ v
        return func(*args, **kwargs)


@contextmanager
def _same_random_state() -> Iterator[None]:
    """What is drawn inside is drawn again by whatever comes after."""
    with torch.random.fork_rng(devices=[]):
        python, numpy = random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _random_state() -> Any:
    numpy: Any = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numpy[1].tobytes(), numpy[2]


def _plain_state(modules: Sequence[nn.Module]) -> Any:
    """What a forward may count in: plain attributes, and which buffers there are and how often each was written to."""
    return [
        (
            {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))},
            [(name, id(buffer), buffer._version) for name, buffer in module.named_buffers(recurse=False)],
        )
        for module in modules
    ]


def _same(want: Any, got: Any) -> bool:
    (want, structure), (got, other) = tree_flatten(want), tree_flatten(got)
    return structure == other and all(map(_same_leaf, want, got))


def _same_leaf(want: Any, got: Any) -> bool:
    if not isinstance(want, Tensor) or not isinstance(got, Tensor):
        return type(want) is type(got) and want == got
    if want.shape != got.shape or want.dtype != got.dtype:
        return False
    scale = want.abs().max().item() if want.numel() else 0.0
    return bool(((want - got).abs() <= TOLERANCE * scale).all())
