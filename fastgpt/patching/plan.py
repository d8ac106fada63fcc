"""What a patch is going to do, decided before anything is changed; and the report of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastgpt.patching.modules import DTYPES, MAX_HEAD_DIM, MAX_WIDTH, MLP, gelu_kind
from fastgpt.patching.probe import Change, Probe
from fastgpt.patching.swap import Fused


@dataclass(frozen=True)
class Report:
    """What ``patch`` replaced, what it kept, and why. ``print(report)`` shows it."""

    model: str
    """The kind of model."""
    runs_in: str
    """What computes the fused operations where the model is now."""
    replaced: dict[str, int]
    """{operation: how many}."""
    kept: dict[str, str]
    """{operation: why it stays the model's own}."""
    at_run_time: tuple[str, ...] = ()
    """Calls that go the model's own way although the operation is replaced."""

    def __str__(self) -> str:
        def count(name: str, n: int) -> str:
            return name if n == 1 else f"{n} x {name}"

        lines = [f"fastgpt.patch: {self.model}; {self.runs_in}"]
        done = ", ".join(count(name, n) for name, n in self.replaced.items())
        lines.append(f"  replaced   {done or 'nothing'}")
        lines += [f"  kept       {name}: {why}" for name, why in self.kept.items()]
        lines += [f"  note       {sentence}" for sentence in self.at_run_time]
        return "\n".join(lines)


@dataclass
class Plan:
    """The changes to make and the parts to keep."""

    changes: list[tuple[str, nn.Module, type[Fused]]] = field(default_factory=list)
    """(name in the model, module, mixin)."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """What the model itself is given (names start with _fastgpt_)."""
    replaced: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def change(self, operation: str, name: str, module: nn.Module, mixin: type[Fused]) -> None:
        self.changes.append((name, module, mixin))
        self.replaced[operation] = self.replaced.get(operation, 0) + 1

    def keep(self, operation: str, why: str) -> None:
        self.kept.setdefault(operation, why)

    def norm(self, name: str, module: nn.Module, mixin: type[Fused], shape: tuple[int, ...]) -> bool:
        """Plan one layer norm on its own; False if it is kept."""
        why = blocker(module) or _width_blocker(module)
        if why is None:
            probe = Probe(module)
            x = probe.randn(*shape)
            why = probe.why_not([("", mixin)], lambda part: part(x))
        if why is None:
            self.change("layer norm", name, module, mixin)
        else:
            self.keep(f"layer norm {name}", why)
        return why is None


def plan_blocks(
    plan: Plan,
    blocks: dict[str, Any],
    *,
    norm: type[Fused],
    attention: type[Fused],
    block: type[Fused],
    attention_blocker: Callable[[Any], str | None],
    calls: dict[str, Callable[[Any], Callable[[Any], Any]]],
    shape: tuple[int, ...],
) -> None:
    """Plan every part of every block. ``calls``: how "attention" and "block" are called on an input of ``shape``, given
    (input) -> (block) -> result. Blocks that differ in nothing but parameters are tried out once."""
    decided: dict[Any, dict[str, str | None]] = {}
    mixins = {"ln_1": norm, "ln_2": norm, "attn": attention, "mlp": MLP, "": block}
    operations = {
        "ln_1": "layer norm",
        "ln_2": "layer norm",
        "attn": "attention",
        "mlp": "MLP",
        "": "residual add with its norm",
    }
    for name, module in blocks.items():
        key = _fingerprint(module)
        if key not in decided:
            decided[key] = _try_out(module, mixins, attention_blocker, calls, shape)
        for part, why in decided[key].items():
            path = f"{name}.{part}" if part else name
            if why is None:
                plan.change(operations[part], path, module.get_submodule(part), mixins[part])
            elif len(decided) == 1:
                plan.keep(operations[part], why)
            else:
                plan.keep(f"{operations[part]} of {name}", why)


def _try_out(
    module: Any,
    mixins: dict[str, type[Fused]],
    attention_blocker: Callable[[Any], str | None],
    calls: dict[str, Callable[[Any], Callable[[Any], Any]]],
    shape: tuple[int, ...],
) -> dict[str, str | None]:
    """{part of a block: why it is kept, or None}."""
    probe = Probe(module)
    x = probe.randn(*shape)
    few = x[:, :16].contiguous()
    why: dict[str, str | None] = {}

    def decide(
        part: str, reason: str | None, call: Callable[[Any], Callable[[Any], Any]], changes: list[Change]
    ) -> None:
        """In eval mode over the whole context (a window would show), in train mode over a few tokens (noise would)."""
        why[part] = reason or probe.why_not(changes, call(x)) or probe.why_not(changes, call(few), train=True)

    def child(part: str) -> Callable[[Any], Callable[[Any], Any]]:
        return lambda x: lambda block: block.get_submodule(part)(x)

    def alone(part: str) -> list[Change]:
        return [(part, mixins[part])]

    for part in ("ln_1", "ln_2"):
        norm = module.get_submodule(part)
        decide(part, blocker(norm) or _width_blocker(norm), child(part), alone(part))
    reason = blocker(module.attn) or attention_blocker(module.attn) or _head_blocker(module.attn, shape[-1])
    decide("attn", reason, calls["attention"], alone("attn"))
    decide("mlp", blocker(module.mlp) or _mlp_blocker(module.mlp), child("mlp"), alone("mlp"))
    good = [(part, mixins[part]) for part, reason in why.items() if reason is None]
    unknown = unknown_children(module, {"ln_1", "ln_2", "attn", "mlp"})
    reason = blocker(module) or (f"a block has a part that is not GPT-2's ({unknown})" if unknown else None)
    if why["ln_2"] is not None:
        reason = reason or "ln_2 is kept"
    decide("", reason, calls["block"], [*good, ("", mixins[""])])
    return why


def unknown_children(module: nn.Module, known: set[str]) -> str | None:
    return next((name for name, _ in module.named_children() if name not in known), None)


def blocker(module: nn.Module) -> str | None:
    """Why a module of any kind cannot be given another forward."""
    if "forward" in vars(module):
        return "something has replaced its forward (Accelerate's hooks do): patch before that"
    wrong = next((p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype not in DTYPES), None)
    return f"its parameters are {str(wrong)[6:]}, and the kernels take float32, float16 and bfloat16" if wrong else None


def _width_blocker(norm: Any) -> str | None:
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1:
        return "it has no weight of shape (C,)"
    return None if weight.shape[0] <= MAX_WIDTH else f"it is {weight.shape[0]} wide, and the kernel takes {MAX_WIDTH}"


def _head_blocker(attention: Any, width: int) -> str | None:
    heads: int = getattr(attention, "n_head", None) or getattr(attention, "num_heads", 0) or 1
    dim = width // heads
    return None if dim <= MAX_HEAD_DIM else f"its heads are {dim} wide, and the kernel takes {MAX_HEAD_DIM}"


def _mlp_blocker(mlp: Any) -> str | None:
    parts = dict(mlp.named_children())
    activation = parts.get("act", parts.get("gelu"))
    if not {"c_fc", "c_proj"} <= parts.keys() or activation is None:
        return "it is not c_fc, GELU, c_proj"
    if gelu_kind(activation) is None:
        return f"its activation is a {type(activation).__name__}, not a GELU"
    if not isinstance(parts.get("dropout"), nn.Dropout):
        return "it has no dropout"
    return None


def _fingerprint(module: nn.Module) -> Any:
    """What a block is apart from its parameters' values: classes, shapes, and plain attributes."""
    parts = []
    for name, part in module.named_modules():
        plain = {k: v for k, v in vars(part).items() if isinstance(v, (bool, int, float, str)) and k != "training"}
        if not getattr(part, "scale_attn_by_inverse_layer_idx", True):
            plain.pop("layer_idx", None)  # transformers: only counts the cache
        shapes = tuple((n, tuple(p.shape), p.dtype) for n, p in part.named_parameters(recurse=False))
        parts.append((name, type(part), shapes, tuple(sorted(plain.items()))))
    return tuple(parts)
