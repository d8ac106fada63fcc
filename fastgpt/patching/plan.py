"""What a patch will change, decided before anything is changed, and the report of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fastgpt.kernels.arguments import DTYPES, MAX_HEAD_DIM, MAX_WIDTH
from fastgpt.patching.modules import FusedLayerNorm, FusedMLP, gelu_kind
from fastgpt.patching.probe import Probe
from fastgpt.patching.swap import Fused


@dataclass(frozen=True)
class PatchReport:
    """What ``patch`` replaced, what it kept, and why. ``print(report)`` shows it."""

    model: str
    """The kind of model."""
    runs_in: str
    """What computes the fused operations on the device the model is on."""
    replaced: dict[str, int]
    """{operation: how many}."""
    kept: dict[str, str]
    """{operation: why it stays the model's own}."""
    at_run_time: tuple[str, ...] = ()
    """Calls that still use the model's own forward although the operation is replaced."""

    def __str__(self) -> str:
        done = ", ".join(name if n == 1 else f"{n} x {name}" for name, n in self.replaced.items())
        lines = [f"fastgpt.patch: {self.model}; {self.runs_in}", f"  replaced   {done or 'nothing'}"]
        lines += [f"  kept       {name}: {why}" for name, why in self.kept.items()]
        lines += [f"  note       {sentence}" for sentence in self.at_run_time]
        return "\n".join(lines)


@dataclass
class PatchPlan:
    """The changes to make, and what the report will say."""

    model: str = ""
    changes: list[tuple[nn.Module, type[Fused]]] = field(default_factory=list)
    attributes: dict[str, Any] = field(default_factory=dict)
    """Set on the model itself; names start with _fastgpt_."""
    replaced: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def decide(self, operation: str, module: nn.Module, mixin: type[Fused], why: str | None, where: str = "") -> None:
        """Change ``module``, or keep it if there is a reason ``why``. ``where`` tells it from others of its kind."""
        if why is None:
            self.changes.append((module, mixin))
            self.replaced[operation] = self.replaced.get(operation, 0) + 1
        else:
            self.kept.setdefault(operation + where, why)

    def norm(self, name: str, module: nn.Module, width: int) -> None:
        """Plan one layer norm that stands outside the blocks."""
        why = blocker(module) or _too_wide(width)
        if why is None:
            probe = Probe(module)
            x = probe.randn(2, 3, width)
            why = probe.why_not([("", FusedLayerNorm)], lambda norm: norm(x))
        self.decide("layer norm", module, FusedLayerNorm, why, f" {name}")


PARTS = {
    "ln_1": "layer norm",
    "ln_2": "layer norm",
    "attn": "attention",
    "mlp": "MLP",
    "": "residual add with its norm",
}
"""{name in a block ("" is the block itself): what the report calls it}."""
Call = Callable[[Any, Tensor], Any]
"""How a part is called: (block, input) -> result."""


def plan_blocks(
    plan: PatchPlan,
    blocks: dict[str, Any],
    *,
    attention: type[Fused],
    block: type[Fused],
    attention_blocker: Callable[[Any], str | None],
    call_attention: Call,
    shape: tuple[int, ...],
) -> None:
    """Plan every part of every block. Blocks that differ only in the values of their parameters are tried out once.

    Args:
        attention, block: the mixins of this family of models.
        attention_blocker: why an attention module cannot be replaced, or None.
        shape: of the input on which the parts are tried out, (B, T, C).
    """
    mixins: dict[str, type[Fused]] = {
        "ln_1": FusedLayerNorm,
        "ln_2": FusedLayerNorm,
        "attn": attention,
        "mlp": FusedMLP,
        "": block,
    }
    decided: dict[Any, dict[str, str | None]] = {}
    for name, module in blocks.items():
        key = _fingerprint(module)
        if key not in decided:
            decided[key] = _try_out(module, mixins, attention_blocker(module.attn), call_attention, shape)
        where = "" if len(decided) == 1 else f" of {name}"
        for part, why in decided[key].items():
            plan.decide(PARTS[part], module.get_submodule(part), mixins[part], why, where)


def _try_out(
    module: Any,
    mixins: dict[str, type[Fused]],
    attention_reason: str | None,
    call_attention: Call,
    shape: tuple[int, ...],
) -> dict[str, str | None]:
    """{part of a block: why it is kept, or None}."""
    probe = Probe(module)
    x = probe.randn(*shape)
    few = x[:, :16].contiguous()
    why: dict[str, str | None] = {}

    def decide(part: str, reason: str | None, call: Call) -> None:
        # A block is tried out with all of its parts that are replaced.
        others = [other for other, reason in why.items() if reason is None] if part == "" else []
        changes = [(name, mixins[name]) for name in (*others, part)]
        # Eval mode over the whole context would show a window, train mode over a few tokens would show noise.
        why[part] = (
            blocker(module.get_submodule(part))
            or reason
            or probe.why_not(changes, lambda block: call(block, x))
            or probe.why_not(changes, lambda block: call(block, few), train=True)
        )

    width = shape[-1]
    decide("ln_1", _too_wide(width), lambda block, x: block.ln_1(x))
    decide("ln_2", _too_wide(width), lambda block, x: block.ln_2(x))
    decide("attn", attention_reason or _head_blocker(module.attn, width), call_attention)
    decide("mlp", _activation_blocker(module.mlp), lambda block, x: block.mlp(x))
    unknown = unknown_children(module, {"ln_1", "ln_2", "attn", "mlp"})
    reason = f"a block has a part that is not GPT-2's ({unknown})" if unknown else None
    decide("", reason or ("ln_2 is kept" if why["ln_2"] else None), lambda block, x: block(x))
    return why


def unknown_children(module: nn.Module, known: set[str]) -> str | None:
    return next((name for name, _ in module.named_children() if name not in known), None)


def blocker(module: nn.Module) -> str | None:
    """Why a module of any kind cannot be given another forward."""
    if "forward" in vars(module):
        return "something has replaced its forward (Accelerate's hooks do): patch before that"
    wrong = next((p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype not in DTYPES), None)
    return f"its parameters are {str(wrong)[6:]}, and the kernels take float32, float16 and bfloat16" if wrong else None


def _too_wide(width: int) -> str | None:
    return None if width <= MAX_WIDTH else f"it is {width} wide, and the kernel takes {MAX_WIDTH}"


def _head_blocker(attention: Any, width: int) -> str | None:
    heads: int = getattr(attention, "n_head", None) or getattr(attention, "num_heads", 0) or 1
    dim = width // heads
    return None if dim <= MAX_HEAD_DIM else f"its heads are {dim} wide, and the kernel takes {MAX_HEAD_DIM}"


def _activation_blocker(mlp: Any) -> str | None:
    """FusedMLP calls the model's own forward for another activation, so that trying it out would find no difference."""
    activation = getattr(mlp, "act", getattr(mlp, "gelu", None))
    if activation is None or gelu_kind(activation) is not None:
        return None
    return f"its activation is a {type(activation).__name__}, not a GELU"


def _fingerprint(module: nn.Module) -> Any:
    """What describes a block except the values of its parameters: classes, shapes and plain attributes."""
    parts = []
    for name, part in module.named_modules():
        plain = {k: v for k, v in vars(part).items() if isinstance(v, (bool, int, float, str)) and k != "training"}
        if not getattr(part, "scale_attn_by_inverse_layer_idx", True):
            plain.pop("layer_idx", None)  # transformers: it only indexes the cache
        shapes = tuple((n, tuple(p.shape), p.dtype) for n, p in part.named_parameters(recurse=False))
        parts.append((name, type(part), shapes, tuple(sorted(plain.items()))))
    return tuple(parts)
