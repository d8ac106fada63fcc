"""Does a fused module compute what the model's own does? Tried out at patch time, on a copy, in plain PyTorch.

Matching names prove little: a fork may scale, rotate or window what it computes. So each kind of module is copied to the
CPU with random weights (zeros would hide differences), run as it is and with the fused forward, and left alone if the
results differ. The model itself, its device and torch's random state are not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fastgpt.common import UserError, first_line
from fastgpt.ops import EAGER
from fastgpt.patching.swap import Fused, fuse, restore

TOLERANCE = 1e-4
"""Largest difference over the largest value, in fp32. Rounding alone causes about 1e-6."""

Change = tuple[str, type[Fused]]
"""(name inside the probed module, "" for the module itself; mixin)."""


class Probe:
    """A CPU copy of ``module``. The children in ``leave_out`` (a model's blocks) are replaced by empty ModuleLists."""

    def __init__(self, module: nn.Module, leave_out: Sequence[nn.Module] = ()) -> None:
        generator = torch.Generator().manual_seed(0)
        left_out = {id(p) for part in leave_out for p in part.parameters()}
        memo: dict[int, Any] = {id(part): nn.ModuleList() for part in leave_out}
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_meta:
                raise UserError("the model is on the meta device: patch it after it has been given memory (to_empty)")
        for parameter in module.parameters():
            if id(parameter) not in left_out:
                values = torch.empty(parameter.shape).normal_(generator=generator)
                values *= values.shape[-1] ** -0.5 if values.dim() > 1 else 1.0
                memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
        self.module = copy.deepcopy(module, memo).to("cpu", torch.float32)
        for part in self.module.modules():
            for hooks in (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks):
                hooks.clear()
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            if isinstance(vars(part).get("dropout"), float):  # nanoGPT's attention keeps its probability twice
                part.__dict__["dropout"] = 0.0
        self.generator = generator

    def why_not(self, changes: Sequence[Change], call: Callable[[Any], Any], train: bool = False) -> str | None:
        """None if ``call(module)`` returns the same with the changes as without, else the reason in a few words."""
        self.module.train(train)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
            try:
                want = call(self.module)
            except Exception as error:
                return f"its own forward cannot be tried out ({type(error).__name__}: {first_line(error)})"
            parts = dict(self.module.named_modules(remove_duplicate=False))
            done = []
            try:
                for name, mixin in changes:
                    fuse(parts[name], mixin, EAGER)
                    done.append(parts[name])
                got = call(self.module)
            except Exception as error:
                return f"it is built otherwise ({type(error).__name__}: {first_line(error)})"
            finally:
                for part in done:
                    restore(part)
        return None if _same(want, got) else "its forward computes something else"

    def randn(self, *shape: int) -> Tensor:
        return torch.empty(shape).normal_(generator=self.generator)


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
