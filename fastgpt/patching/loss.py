"""The loss of a patched model: its own forward runs, and only the product that its cross-entropy reads is never formed.

In train mode the LM head returns a ``Logits`` in place of a tensor. ``F.cross_entropy`` of it (or of rows of it, of its first
columns, or capped: c tanh(z / c)) is the fused linear + cross-entropy; anything else that is done with it forms the tensor and
goes on with that. So embeddings, the order of the blocks, auxiliary losses and the options of the cross-entropy are the
model's, whatever they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from fastgpt.common import UserError
from fastgpt.patching.modules import hooked, supported, weight_of
from fastgpt.patching.plan import PatchPlan, blocker, linear_blocker
from fastgpt.patching.probe import Probe
from fastgpt.patching.swap import Change, Fused, is_fused


@dataclass
class Use:
    """What has become of the logits of one call of the LM head."""

    reduced: bool = False
    """A cross-entropy was computed without them."""
    formed: bool = False
    """They, or some rows of them, were needed as a tensor."""


@dataclass(frozen=True)
class Done:
    """What has been done to each of the first ``columns`` logits z: ``outer * tanh(inner * z)``, or without tanh inner * z."""

    columns: int
    inner: float = 1.0
    tanh: bool = False
    outer: float = 1.0

    def times(self, factor: float) -> Done:
        return replace(self, outer=self.outer * factor) if self.tanh else replace(self, inner=self.inner * factor)

    def options(self, rows: int) -> dict[str, Any] | None:
        """As the fused loss of a head with so many rows takes it; None for what it has not."""
        if not math.isclose(self.inner * self.outer, 1.0, rel_tol=1e-9):
            return None
        options: dict[str, Any] = {} if self.columns == rows else {"vocab_size": self.columns}
        return {**options, "logit_softcap": abs(self.outer)} if self.tanh else options


class Logits:
    """x @ head.weight.T + head.bias that is not computed yet, and what is ``done`` to it. x (..., C).

    Not a Tensor: torch hands it to ``__torch_function__`` wherever one is expected, and torch.compile traces through it."""

    def __init__(self, head: Any, x: Tensor, form: Callable[[], Tensor], use: Use, done: Done) -> None:
        self.head, self.x, self.form, self.use, self.done = head, x, form, use, done
        self.formed: Tensor | None = None

    def tensor(self) -> Tensor:
        """The logits. Every later use reads this tensor, as it may be written to."""
        if self.formed is None:
            self.use.formed = True
            self.formed = self.form()
        return self.formed

    def rows(self, x: Tensor, of: Callable[[Any], Any], done: Done | None = None) -> Any:
        """``of(logits)``, which takes the rows that belong to ``x``, and of these what ``done`` says."""
        if self.formed is not None:
            return of(self.formed)
        return Logits(self.head, x, lambda: of(self.tensor()), self.use, done or self.done)

    def cross_entropy(self, target: Tensor, options: dict[str, Any]) -> Tensor:
        """F.cross_entropy(self, target, **options)."""
        known = all(value is None or name in _OPTIONS for name, value in options.items())
        fits = self.x.dim() == 2 and target.shape == self.x.shape[:1] and not target.is_floating_point()
        weight = weight_of(self.head)
        done = self.done.options(len(weight))
        if self.use.formed or not (known and fits) or done is None:
            return F.cross_entropy(self.tensor(), target, **options)
        self.use.reduced = True
        options = {name: value for name, value in options.items() if value is not None}
        return self.head.ops.linear_cross_entropy(self.x, weight, target, bias=self.head.bias, **done, **options)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            given = {**dict(zip(("input", "target", "weight"), args)), **kwargs}
            logits, target = given.pop("input"), given.pop("target")
            if isinstance(logits, Logits) and isinstance(target, Tensor) and len(args) <= 3:
                return logits.cross_entropy(target, given)
        if func in (torch.tanh, Tensor.tanh) and isinstance(args[0] if args else None, Logits) and not kwargs:
            return args[0].tanh()
        args, kwargs = tree_map_only(Logits, Logits.tensor, (args, kwargs))
        return func(*args, **kwargs)

    # ---- what forwards do to logits on the way to their cross-entropy

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.x.shape[:-1], self.done.columns))

    @property
    def device(self) -> torch.device:
        return self.x.device

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.x.dim()

    def view(self, *shape: Any) -> Any:
        sizes = shape if isinstance(shape[0], int) else tuple(shape[0]) if len(shape) == 1 else ()
        if sizes and sizes[-1] == -1 and math.prod(sizes[:-1]) == math.prod(self.shape[:-1]):
            sizes = (*sizes[:-1], self.shape[-1])
        if not sizes or sizes[-1] != self.shape[-1]:
            return self.tensor().view(*shape)
        return self.rows(self.x.reshape(*sizes[:-1], self.x.shape[-1]), lambda logits: logits.reshape(sizes))

    def reshape(self, *shape: Any) -> Any:
        return self.view(*shape) if self.formed is None else self.formed.reshape(*shape)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        if end_dim not in (-2, self.dim() - 2):
            return self.tensor().flatten(start_dim, end_dim)
        return self.rows(self.x.flatten(start_dim, end_dim), lambda logits: logits.flatten(start_dim, end_dim))

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        if all(part is Ellipsis or isinstance(part, (int, slice)) for part in parts):
            if len(parts) < self.dim() and Ellipsis not in parts:
                return self.rows(self.x[index], lambda logits: logits[index])
            columns, width = parts[-1], self.shape[-1]
            if isinstance(columns, slice) and columns.start in (None, 0) and columns.step in (None, 1):
                last = width if columns.stop is None else columns.stop  # torch 2.11 cannot trace slice.indices
                last = min(last if last >= 0 else width + last, width)
                if last > 0:
                    x, done = self.x[parts[:-1] + (slice(None),)], replace(self.done, columns=last)
                    return self.rows(x, lambda logits: logits[index], done)
        return self.tensor()[index]

    def tanh(self) -> Any:
        if self.done.tanh:
            return self.tensor().tanh()
        return self.rows(self.x, torch.tanh, replace(self.done, tanh=True))

    def __mul__(self, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return self.tensor() * (other.tensor() if isinstance(other, Logits) else other)
        return self.rows(self.x, lambda logits: logits * other, self.done.times(other))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if not isinstance(other, (int, float)) or other == 0:
            return self.tensor() / (other.tensor() if isinstance(other, Logits) else other)
        return self.rows(self.x, lambda logits: logits / other, self.done.times(1 / other))

    def contiguous(self) -> Any:
        return self.rows(self.x, lambda logits: logits.contiguous())

    def float(self) -> Any:
        return self.rows(self.x, lambda logits: logits.float())  # the fused loss is fp32 in any case

    def to(self, *args: Any, **kwargs: Any) -> Any:
        wide = (args, kwargs) in (((torch.float32,), {}), ((), {"dtype": torch.float32}))
        return self.float() if wide else self.tensor().to(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)


_OPTIONS = ("ignore_index", "reduction", "label_smoothing")
"""Of F.cross_entropy, those that the fused one has."""


def _operator(name: str) -> Any:
    return lambda self, *others: getattr(torch.Tensor, name)(
        self.tensor(), *tree_map_only(Logits, Logits.tensor, others)
    )


for _name in (
    *("add", "radd", "sub", "rsub", "rtruediv", "pow", "rpow", "matmul", "rmatmul", "neg"),
    *("lt", "le", "gt", "ge", "eq", "ne", "setitem", "len", "iter"),
):  # Python looks for operators in the class only
    setattr(Logits, f"__{_name}__", _operator(f"__{_name}__"))


class FusedHead(Fused):
    """A linear layer that returns ``Logits`` while ``FusedLoss`` asks for them."""

    _fastgpt_deferred: list[Use] | None = None
    """Where a call is noted, and whether the logits are deferred at all."""

    def forward(self: Any, x: Tensor) -> Any:
        own = super().forward  # type: ignore[misc]
        if self._fastgpt_deferred is None or hooked(self) or not supported(x):
            return own(x)
        self._fastgpt_deferred.append(use := Use())
        return Logits(self, x, lambda: own(x), use, Done(len(weight_of(self))))


class FusedLoss(Fused):
    """In train mode the model's own forward with deferred logits. Logits whose cross-entropy was computed without them are None
    in what it returns, others are tensors."""

    in_eval = False
    """Whether in eval mode, too: only where a call with targets returns no logits."""
    noted: list[Use] | None = None
    """Where a trial wants to find what has become of the logits."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        head = self.lm_head
        if not (self.training or self.in_eval) or not is_fused(head) or not self.defers(self.named(args, kwargs)):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        head._fastgpt_deferred = [] if self.noted is None else self.noted
        try:
            outputs = super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            head._fastgpt_deferred = None  # not del, which torch.compile does not trace
        return tree_map_only(Logits, _none_if_reduced, outputs)

    def defers(self: Any, call: dict[str, Any]) -> bool:
        """Whether a call with these arguments may return None for its logits."""
        return True


def _none_if_reduced(logits: Logits) -> Tensor | None:
    return None if logits.use.reduced and not logits.use.formed else logits.tensor()


def plan_loss(
    plan: PatchPlan,
    model: Any,
    mixin: type[FusedLoss],
    call: Callable[[Any, Tensor], Any],
    keep_logits: bool,
    linear: type[nn.Module] = nn.Linear,
) -> None:
    """Plan the loss of ``model``, and try out the whole plan. ``call(model, ids)`` calls it with targets. ``linear``: a class
    of heads that is plain, beside nn.Linear."""

    def losses(model: Any, ids: Tensor) -> list[Tensor]:
        return [y for y in tree_leaves(call(model, ids)) if isinstance(y, Tensor) and y.numel() == 1]

    try:
        probe = Probe(model, share=True)
    except UserError as error:
        plan.kept["loss"] = str(error)
        return
    uses: list[Use] = []
    vars(probe.module)["noted"] = uses
    changes = [Change("loss", model, mixin), Change("loss", model.lm_head, FusedHead, counts=False)]
    why = "keep_logits=True" if keep_logits else blocker(model) or linear_blocker("lm_head", model.lm_head, linear)
    if why is None:
        if plan.why_not_together(probe, losses, changes) is None and _why_kept(uses) is None:
            plan.changes += changes
            return
        uses.clear()
        why = PatchPlan().why_not_together(probe, losses, changes) or _why_kept(uses)
    if why is None:
        plan.changes += changes
    else:
        plan.kept["loss"] = why
    plan.try_together(probe, losses)


def _why_kept(uses: list[Use]) -> str | None:
    """Why the loss is kept: it is not PyTorch's cross-entropy of the head's logits, or they are needed for something else."""
    if not any(use.reduced for use in uses):
        return "it is not the cross-entropy of what lm_head returns"
    return "its forward reads the logits for something else, too" if any(use.formed for use in uses) else None
