"""The public operations that a case calls, on random numbers, and compared with their references in fp64.

The launch cases of bench/ops allocate tensors that hold nothing. Inside ``recorded(session)`` each call of a public
operation is given numbers first, arguments and upstream gradients; ``Recorder.judge`` then compares its outputs and
its inputs' gradients with those of the function of the same name in fastgpt/kernels/reference.py, by the bound of
bench/parity.py. A new operation that has a launch case and a reference is so compared without a word here.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from types import FunctionType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import ops, parity
from bench.emulator import unwritten
from bench.emulator.dropout import same_masks
from bench.emulator.launch import Emulation
from fastgpt import kernels
from fastgpt.kernels import fused_adamw, fused_muon, reference

SEED = 0x1234_5678_9ABC_DEF1 % 2**62
COARSE = "fastgpt.kernels.fp8.ops"
"""Operations on fp8: e4m3 has an epsilon of 1/8 and e5m2 of 1/4, so a few percent rms, and more at the worst element."""
FP8_RMS, FP8_MAX = 0.15, 0.3
IN_PLACE = ("muon_momentum", "orthogonalize", "muon_update")
"""Muon's passes, which write to their arguments."""
ITERATED = {torch.float32: 1e-4}
"""By dtype, the error of a matrix over its norm after five steps of Newton-Schulz, which amplify it; 0.03 for 16 bits."""


# ---------------------------------------------------------------- numbers for the arguments


def _is_blank(x: Tensor) -> bool:
    return x.numel() > 0 and (unwritten.elements(x) == x.numel() or not x.any())


def _draw(name: str, x: Tensor) -> Tensor:
    """Numbers as they occur in a GPT: activations N(0, 1), weights that keep that, a norm's and a stream's factor near 1."""
    drawn = torch.randn(x.shape)
    if x.dim() == 2 and name.startswith("w"):
        return drawn * x.shape[-1] ** -0.5
    if x.dim() == 1:
        return 1 + 0.1 * drawn if name in ("weight", "scale") else 0.1 * drawn
    return drawn


def _integers(name: str, x: Tensor, arguments: dict[str, Any]) -> Tensor | None:
    """Token ids, classes, documents, lengths of caches; None for any other integers."""
    if name == "idx":
        return torch.randint(0, len(arguments["wte"]), x.shape)
    if name == "target":
        target = torch.randint(0, arguments.get("vocab_size") or len(arguments["weight"]), x.shape)
        target[3::7] = arguments.get("ignore_index", -100)
        return target
    if name == "position":
        return torch.randint(0, len(arguments["cos"]) - arguments["qkv"].shape[1] + 1, x.shape)
    if name == "doc_ids":
        return torch.randint(0, 4, x.shape).sort(dim=-1).values
    if name == "kv_len":
        return torch.randint(arguments["q"].shape[1], arguments["k"].shape[1] + 1, x.shape)
    return None


def _fill(arguments: dict[str, Any], floats: bool) -> None:
    for name, x in arguments.items():
        if not isinstance(x, Tensor) or not x.numel():
            continue
        if x.is_floating_point():
            values = _draw(name, x) if floats and _is_blank(x) else None
        else:
            values = _integers(name, x, arguments) if _is_blank(x) or not floats else None
        if values is not None:
            x.detach().copy_(values)
        if floats and x.is_leaf and x.grad is not None:  # a gradient that is there already, and is added to
            x.grad.copy_(torch.randn(x.shape))


# ---------------------------------------------------------------- calls


@dataclass
class Call:
    """One call of an operation, as it was made."""

    name: str
    coarse: bool
    inputs: dict[str, Any]
    """Copies of the floating tensors among the arguments."""
    options: dict[str, Any]
    """The other arguments."""
    tensors: dict[str, Tensor]
    """The floating tensors themselves that want a gradient."""
    initial: dict[str, Tensor]
    """Gradients that these had already."""
    outputs: tuple[Tensor, ...] = ()
    upstream: dict[int, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def watch(self) -> None:
        """Note the gradients that arrive, filling those that are blank."""
        for i, out in enumerate(self.outputs):
            if out.requires_grad:
                out.register_hook(partial(self._arrived, i))
        for name, x in self.tensors.items():
            if not x.is_leaf:  # a hook on a parameter would keep its gradient from being added in place
                x.register_hook(partial(self._left, name))

    def _arrived(self, i: int, gradient: Tensor) -> None:
        if _is_blank(gradient):
            gradient.copy_(torch.randn(gradient.shape))
        self.upstream[i] = gradient.detach().clone()

    def _left(self, name: str, gradient: Tensor) -> None:
        self.gradients[name] = gradient.detach().clone()

    def results(self) -> dict[str, Tensor]:
        found = {f"out{i}": out.detach() for i, out in enumerate(self.outputs)}
        found |= {f"d{name}": gradient for name, gradient in self.gradients.items()}
        for name, x in self.tensors.items():
            if x.is_leaf and x.grad is not None and len(self.upstream) == len(self.outputs):
                found[f"d{name}"] = x.grad - self.initial[name] if name in self.initial else x.grad
        return found

    def wanted(self, double: bool) -> dict[str, Tensor]:
        """The reference's results, in fp64 or in the dtypes of the call."""
        function = getattr(reference, self.name)
        known = inspect.signature(function).parameters
        op = partial(function, **{key: value for key, value in self.options.items() if key in known})
        inputs = {key: x.double() if double else x for key, x in self.inputs.items()}
        if len(self.upstream) == len(self.outputs):
            found = parity.run(op, inputs, tuple(self.upstream[i] for i in range(len(self.outputs))))[0]
            return {key: x for key, x in found.items() if key.startswith("out") or key[1:] in self.tensors}
        with torch.no_grad():
            out = op(**inputs)
        return {f"out{i}": x for i, x in enumerate(out if isinstance(out, tuple) else (out,))}


class Recorder:
    def __init__(self, session: Emulation, numbers: bool) -> None:
        self.session, self.numbers, self.inside = session, numbers, False
        self.calls: list[Call] = []
        self.steps: list[tuple[fused_adamw.Step, fused_adamw.Step]] = []
        """AdamW's, before and after."""
        self.passes: list[tuple[str, dict[str, Tensor], list[dict[str, Any]]]] = []
        """Calls of IN_PLACE: each one's name, results, and arguments as they were, in fp64 and in their own dtypes."""

    def wrap(self, function: FunctionType) -> Callable:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            bound = inspect.signature(function).bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = dict(bound.arguments)
            arguments |= arguments.pop("options", {})
            _fill(arguments, self.numbers)
            floats = {key: x for key, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}
            made = Call(
                function.__name__,
                function.__module__ == COARSE,
                {key: x.detach().clone() for key, x in floats.items()} if self.numbers else {},
                {key: value for key, value in arguments.items() if key not in floats},
                {key: x for key, x in floats.items() if x.requires_grad},
                {key: x.grad.clone() for key, x in floats.items() if self.numbers and x.is_leaf and x.grad is not None},
            )
            self.inside = True
            try:
                out = function(*args, **kwargs)
            finally:
                self.inside = False
            if self.numbers:
                made.outputs = out if isinstance(out, tuple) else (out,)
                made.watch()
                self.calls.append(made)
            return out

        return call

    def wrap_in_place(self, function: FunctionType) -> Callable:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = inspect.signature(function).bind(*args, **kwargs).arguments
            for name in ("grad", "momentum_buffer", "param"):
                if name in arguments and _is_blank(arguments[name]):
                    arguments[name].detach().copy_(_draw(name, arguments[name]))
            before = [{name: _clone(x, double) for name, x in arguments.items()} for double in (True, False)]
            returned = function(*args, **kwargs)
            self.passes.append((function.__name__, _results(returned, arguments), before))
            return returned

        return call

    def plan_for(self, original: Callable, step: fused_adamw.Step, chunk: int) -> Any:
        """AdamW's tensors are found by a table of addresses: they are the kernels' to touch."""
        lists = (step.params, step.grads, step.exp_avgs, step.exp_avg_sqs, step.steps, step.copies)
        self.session.reachable = [x for tensors in lists for x in tensors]
        if self.numbers:
            if all(_is_blank(p) for p in step.params if p.numel()):
                for tensors, scale in ((step.params, 1.0), (step.grads, 0.1), (step.exp_avgs, 0.1)):
                    for x in tensors:
                        x.detach().copy_(scale * torch.randn(x.shape))
                for v, t in zip(step.exp_avg_sqs, step.steps):
                    v.copy_((0.1 * torch.randn(v.shape)).square())
                    t.fill_(3)
            self.steps.append((_copy(step), step))
        return original(step, chunk)

    def judge(self) -> tuple[list[str], float]:
        """What is wrong, and the largest share of its bound that a result uses."""
        problems = (
            [] if self.calls or self.steps or self.passes else ["it calls no public operation: nothing was compared"]
        )
        largest = 0.0
        with same_masks(SEED):
            pairs: list[tuple[str, bool, torch.dtype | None, dict, dict, dict]] = [
                (call.name, call.coarse, _operand(call), call.results(), call.wanted(True), call.wanted(False))
                for call in self.calls
            ]
        for name, got, given in self.passes:
            exact, same = (_results(getattr(reference, name)(**each), each) for each in given)
            if name == "orthogonalize":
                largest = max(largest, _assert_iterated(got["out"], exact["out"], problems))
            else:
                pairs.append((name, False, None, got, exact, same))
        for both in self.steps:
            after, exact_step, same_step = map(_state, _stepped(*both))
            pairs.append(("adamw", False, None, after, exact_step, same_step))
        for name, coarse, operand, got, exact, same in pairs:
            if missing := exact.keys() - got.keys():
                problems.append(f"{name}: no {', '.join(sorted(missing))}")
            for key in got.keys() & exact.keys():
                if lost := unwritten.elements(got[key]):
                    problems.append(f"{name} {key}: {lost} of {got[key].numel()} elements were never written")
                try:
                    if coarse:
                        _assert_coarse(f"{name} {key}", got[key], exact[key])
                    else:
                        used = parity.assert_parity(f"{name} {key}", got[key], exact[key], same[key], operand)
                        largest = max(largest, used)
                except AssertionError as error:
                    problems.append(str(error))
        for _, step in self.steps:
            for i, copy in zip(step.copy_of, step.copies):
                if not torch.equal(copy, step.params[i].detach().to(copy.dtype)):
                    problems.append(f"adamw: working copy {i} is not the rounded parameter")
        return problems, largest


def _assert_coarse(name: str, got: Tensor, exact: Tensor) -> None:
    rms, peak = parity.errors(got, exact)
    assert rms <= FP8_RMS and peak <= FP8_MAX, f"{name}: rms error {rms:.3g} of {FP8_RMS}, max {peak:.3g} of {FP8_MAX}"


def _assert_iterated(got: Tensor, exact: Tensor, problems: list[str]) -> float:
    """Add to ``problems`` what is further off than ITERATED allows; the share of that which is used."""
    allowed = ITERATED.get(got.dtype, 0.03)
    error = ((got.double() - exact).norm(dim=(1, 2)) / exact.norm(dim=(1, 2))).max().item()
    if not error <= allowed:
        problems.append(f"orthogonalize: error {error:.3g} of the norm, allowed {allowed}")
    return error / allowed


def _results(returned: Tensor | None, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """What is returned, or copies of all that may have been written."""
    floats = {name: x.detach().clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    return floats if returned is None else {"out": returned.clone()}


def _operand(call: Call) -> torch.dtype | None:
    """That of the matrix products, if it is a 16-bit one: what a kernel rounds intermediates to."""
    first = next(iter(call.inputs.values())).dtype
    return first if first.itemsize == 2 else None


def _copy(step: fused_adamw.Step, double: bool = False) -> fused_adamw.Step:
    """The same step on other memory, without working copies."""

    return fused_adamw.Step(*(_clone(x, double) for x in step))._replace(copies=[], copy_of=[])


def _clone(x: Any, double: bool) -> Any:
    if isinstance(x, list):
        return [_clone(each, double) for each in x]
    if isinstance(x, Tensor):
        return (x.detach().double() if double and x.is_floating_point() else x.detach()).clone()
    return x


def _stepped(
    before: fused_adamw.Step, after: fused_adamw.Step
) -> tuple[fused_adamw.Step, fused_adamw.Step, fused_adamw.Step]:
    """As it was computed; and by PyTorch in fp64, and in the same dtypes."""
    references = _copy(before, double=True), _copy(before)
    for step in references:
        fused_adamw.adamw_(*step)  # outside of ``emulated`` CPU tensors take the reference
    return after, *references


def _state(step: fused_adamw.Step) -> dict[str, Tensor]:
    lists = {"param": step.params, "exp_avg": step.exp_avgs, "exp_avg_sq": step.exp_avg_sqs}
    found = {f"{name}{i}": x.detach() for name, xs in lists.items() for i, x in enumerate(xs)}
    # A norm that is not finite skips the step, which the parameters show.
    return found | ({"norm": step.grad_norm} if step.grad_norm.isfinite() else {})


# ---------------------------------------------------------------- every public operation


def _places() -> Iterator[tuple[Any, str, FunctionType]]:
    """(module, name there, function) of the public operations, as the launch cases call them."""
    for name in kernels.__all__:
        function = getattr(kernels, name)
        yield importlib.import_module(function.__module__), name, function
    for info in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"bench.ops.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, FunctionType) and value.__module__ == COARSE and hasattr(reference, name):
                yield module, name, value


@contextmanager
def recorded(session: Emulation, numbers: bool = True, integers: bool = True) -> Iterator[Recorder]:
    """``numbers`` False: only integers that decide what is accessed are filled in, and nothing is compared. ``integers`` False:
    nothing is filled in."""
    recorder = Recorder(session, numbers)
    with ExitStack() as stack:
        stack.enter_context(same_masks(SEED))
        for module, name, function in list(_places()) if numbers or integers else ():
            stack.enter_context(mock.patch.object(module, name, recorder.wrap(function)))
        for name in IN_PLACE if numbers else ():
            stack.enter_context(mock.patch.object(fused_muon, name, recorder.wrap_in_place(getattr(fused_muon, name))))
        plan = partial(recorder.plan_for, fused_adamw.plan_for)
        stack.enter_context(mock.patch.object(fused_adamw, "plan_for", plan))
        yield recorder
