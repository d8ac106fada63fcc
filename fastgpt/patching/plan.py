"""What a patch will change, decided before anything is changed, and the report of it."""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.kernels.arguments import DTYPES, MAX_HEAD_DIM, MAX_WIDTH
from fastgpt.patching.modules import FusedLayerNorm, FusedMLP, gelu_kind, hooked, is_plain
from fastgpt.patching.probe import UNTRIED, Probe
from fastgpt.patching.swap import Change, Fused

Call = Callable[[Any, Tensor], Any]
"""How a module is tried out: (module, input) -> result."""


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
    verified: dict[str, tuple[float, float]] = field(default_factory=dict)
    """With ``verify``: {"loss" or the name of a parameter whose gradient it is: (error, largest error that is allowed)}, both
    relative to the same model in fp64."""

    def __str__(self) -> str:
        done = ", ".join(name if n == 1 else f"{n} x {name}" for name, n in self.replaced.items())
        lines = [f"fastgpt.patch: {self.model}; {self.runs_in}", f"  replaced   {done or 'nothing'}"]
        lines += [f"  kept       {name}: {why}" for name, why in self.kept.items()]
        if self.verified:
            worst = max(self.verified, key=lambda name: self.verified[name][0] / self.verified[name][1])
            lines.append("  verified   loss: off by {:.1e}, {:.1e} is allowed".format(*self.verified["loss"]))
            lines.append(f"             and {len(self.verified) - 1} gradients; of all these the nearest to its limit:")
            lines.append("             {}: off by {:.1e}, {:.1e} is allowed".format(worst, *self.verified[worst]))
        lines += [f"  note       {sentence}" for sentence in self.at_run_time]
        return "\n".join(lines)


@dataclass
class PatchPlan:
    """The changes to make, and what the report will say."""

    model: str = ""
    changes: list[Change] = field(default_factory=list)
    """A module that stands in several places is here once."""
    kept: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def decide(self, change: Change, why: str | None, where: str = "") -> None:
        """Make the change, or keep the module if there is a reason ``why``. ``where`` tells it from others of its kind."""
        if why is not None:
            self.kept.setdefault(change.operation + where, why)
        elif not any(change.module is other.module for other in self.changes):
            self.changes.append(change)

    @property
    def replaced(self) -> dict[str, int]:
        """{operation: how many modules}."""
        return dict(Counter(change.operation for change in self.changes if change.counts))

    def why_not_together(self, probe: Probe, call: Call, more: Sequence[Change] = ()) -> str | None:
        """Why the model with all of the changes, and ``more`` of them, does not compute what its own does."""
        return probe.why_not([*self.changes, *more], call, probe.ids(), train=True, own_forward_runs=True)

    def try_together(self, probe: Probe, call: Call) -> None:
        """Keep everything if the changes are no good together."""
        why = self.why_not_together(probe, call)
        if why and not why.startswith(UNTRIED):
            self.kept.update(dict.fromkeys(self.replaced, f"together with the other changes {why}"))
            self.changes.clear()

    def norm(self, name: str, module: nn.Module, width: int) -> None:
        """Plan one layer norm that stands outside the blocks."""
        change = Change("layer norm", module, FusedLayerNorm)
        why = blocker(module) or _too_wide(width) or _other_arguments(module) or unknown_part(module, _NORM)
        if why is None:
            probe = Probe(module)
            x = small_too(probe.randn(2, 4, width))
            why = probe.why_not([change], lambda norm, x: norm(x), x, train=True)
        self.decide(change, why, f" {name}")


_NORM = {"weight", "bias"}


@dataclass(frozen=True)
class Replaceable:
    """A module of a block that can be replaced, and how that is tried out."""

    operation: str
    mixin: type[Fused]
    known: set[str]
    """Names of the modules, parameters and buffers that the fused forward knows."""
    call: Call
    """(block, x) -> result: calls the part inside a block."""
    blocker: Callable[[Any], str | None] = lambda part: None
    """Why it cannot be replaced, seen without trying, or None."""
    settings: Callable[[Any], dict[str, Any]] = lambda block: {}
    """What else the mixin has to know, read from a copy of the block with random weights."""
    loud: bool = False
    """Whether large values are tried, too. They would show a clamp; scores of attention would only drown in their rounding."""


def gpt2_parts(
    attention: type[Fused],
    block: type[Fused],
    call_attention: Call,
    width: int,
    attention_blocker: Callable[[Any], str | None] = lambda attention: None,
) -> dict[str, Replaceable]:
    """{name in a GPT-2 block ("" is the block itself): Replaceable}. ``attention`` and ``block`` are the mixins of a family."""
    attn = {"c_attn", "c_proj", "attn_dropout", "resid_dropout", "bias", "masked_bias"}  # the last two are masks
    return {
        **{
            name: Replaceable(
                "layer norm",
                FusedLayerNorm,
                _NORM,
                lambda block, x, name=name: block.get_submodule(name)(small_too(x)),  # type: ignore[misc]
                lambda _: _too_wide(width),
            )
            for name in ("ln_1", "ln_2")
        },
        "attn": Replaceable(
            "attention",
            attention,
            attn,
            call_attention,
            lambda attn: attention_blocker(attn) or head_blocker(attn, width),
        ),
        "mlp": Replaceable(
            "MLP",
            FusedMLP,
            {"c_fc", "c_proj", "gelu", "act", "dropout"},
            lambda block, x: block.mlp(x),
            _mlp_blocker,
            loud=True,
        ),
        "": Replaceable(
            "residual add with its norm",
            block,
            {"ln_1", "ln_2", "attn", "mlp"},
            lambda block, x: block(x),
            loud=True,
        ),
    }


Decided = dict[str, tuple[Change, str | None]]
"""{part of a block: (what it would become, why it is kept or None)}."""


def plan_blocks(plan: PatchPlan, blocks: dict[str, Any], parts: dict[str, Replaceable], shape: tuple[int, ...]) -> None:
    """Plan every part of every block. Blocks that differ only in the values of their parameters, and in a number that their
    forwards do not read, are tried out once.

    Args:
        parts: by their names inside a block; the last, "", is the block itself, which is tried out with all others that are
            replaced, and is kept if a norm called ln_2 is.
        shape: of the input on which the parts are tried out, (B, T, C).
    """
    decided: dict[Any, Decided] = {}
    found: dict[str, Decided] = {}
    for name, module in blocks.items():
        key = _fingerprint(module, numbered=False)
        if key not in decided:
            decided[key] = _try_out(module, parts, shape, numbered=False)
        if any(why and why.startswith(UNTRIED) for _, why in decided[key].values()):
            key = _fingerprint(module, numbered=True)
            decided[key] = decided.get(key) or _try_out(module, parts, shape, numbered=True)
        found[name] = decided[key]
    for part in parts:
        everywhere = len({result[part][1] for result in found.values()}) == 1
        for name, result in found.items():
            change, why = result[part]
            change = replace(change, module=blocks[name].get_submodule(part))
            plan.decide(change, why, "" if everywhere else f" of {name}")


_NUMBER = "layer_idx"
"""The attribute that tells a module which layer it is in. Where it only finds the layer's cache, a trial does without it."""


def _try_out(module: Any, parts: dict[str, Replaceable], shape: tuple[int, ...], numbered: bool) -> Decided:
    """``numbered``: whether the modules know the number of their layer."""
    probe = Probe(module)
    if not numbered:
        for each in probe.module.modules():
            vars(each).pop(_NUMBER, None)
    x = probe.randn(*shape)
    few = probe.randn(2, min(shape[1], 16), shape[2])
    decided: Decided = {}
    more = {name: _other_arguments(module.get_submodule(name)) for name, part in parts.items() if part.mixin.takes_one}
    if "" in more:  # a fused block calls its parts with x alone
        more[""] = next(filter(None, more.values()), None)
    for name, part in parts.items():
        inside = module.get_submodule(name)
        why = blocker(inside) or part.blocker(inside) or more.get(name) or unknown_part(inside, part.known)
        if name == "" and "ln_2" in decided and decided["ln_2"][1]:
            why = why or "ln_2 is kept"
        change = Change(part.operation, inside, part.mixin, settings={} if why else part.settings(probe.module))
        others = [other for other, reason in decided.values() if reason is None] if name == "" else []
        changes = [*others, change]
        # Eval mode over the whole context would show a window, train mode over a few tokens would show noise.
        why = (
            why
            or probe.why_not(changes, part.call, x)
            or probe.why_not(changes, part.call, few, train=True)
            or (probe.why_not(changes, part.call, 100 * few) if part.loud else None)
        )
        decided[name] = change, why
    return decided


def small_too(x: Tensor) -> Tensor:
    """x with each second row so small that a norm's eps counts."""
    return x * torch.tensor([1.0, 0.01]).repeat(x.shape[1])[: x.shape[1], None]


def unknown_part(module: nn.Module, known: set[str]) -> str | None:
    """Why a module with a child, parameter or buffer that the fused forward does not know is kept."""
    parts = (*module._modules, *module._parameters, *module._buffers)
    unknown = next((name for name in parts if name not in known), None)
    return f"it has a part that the fused forward does not know ({unknown})" if unknown else None


def _other_arguments(module: nn.Module) -> str | None:
    """Why a module is kept whose forward takes more than its input: the fused one would drop the rest."""
    try:
        _, *taken = inspect.signature(type(module).forward).parameters.values()
    except (AttributeError, TypeError, ValueError):  # TorchScript
        return f"the forward of {type(module).__name__} cannot be read"
    if len(taken) == 1 and taken[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return None
    return f"the forward of {type(module).__name__} takes ({', '.join(p.name for p in taken)}), not x alone"


def blocker(module: nn.Module) -> str | None:
    """Why a module of any kind cannot be given another forward."""
    if "forward" in vars(module):
        return "something has replaced its forward (Accelerate's hooks do): patch before that"
    wrong = next((p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype not in DTYPES), None)
    return f"its parameters are {str(wrong)[6:]}, and the kernels take float32, float16 and bfloat16" if wrong else None


def _too_wide(width: int) -> str | None:
    return None if width <= MAX_WIDTH else f"it is {width} wide, and the kernel takes {MAX_WIDTH}"


def head_blocker(attention: Any, width: int) -> str | None:
    heads: int = getattr(attention, "n_head", None) or getattr(attention, "num_heads", 0) or 1
    dim = width // heads
    return None if dim <= MAX_HEAD_DIM else f"its heads are {dim} wide, and the kernel takes {MAX_HEAD_DIM}"


def _mlp_blocker(mlp: Any) -> str | None:
    """Where FusedMLP calls the model's own forward, which trying it out would find no fault with."""
    activation = getattr(mlp, "act", getattr(mlp, "gelu", None))
    if activation is not None and gelu_kind(activation) is None:
        return f"its activation is a {type(activation).__name__}, not a GELU"
    linears = ((name, getattr(mlp, name, None)) for name in ("c_fc", "c_proj"))
    return next((why for name, linear in linears if linear is not None and (why := linear_blocker(name, linear))), None)


def linear_blocker(name: str, linear: nn.Module, known: type[nn.Module] = nn.Linear) -> str | None:
    """Why a linear layer has to be called itself. ``known``: a class that is plain, beside nn.Linear."""
    if is_plain(linear, known):
        return None
    cls = type(linear)
    return f"its {name} " + (
        "has a hook" if hooked(linear) else f"is a {cls.__module__}.{cls.__name__}, not a plain linear"
    )


_VANILLA = {*vars(nn.Module()), "training"}


def _fingerprint(module: nn.Module, numbered: bool) -> Any:
    """What describes a block except the values of its parameters: classes, shapes, buffers (a mask may differ in one block) and
    attributes, its number only if ``numbered``. Objects that are not plain values are told apart by identity."""

    def value(attribute: Any) -> Any:
        if isinstance(attribute, Tensor):
            content = attribute.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            return attribute.shape, attribute.dtype, hashlib.blake2b(content.tobytes()).digest()
        if isinstance(attribute, (list, tuple)):
            return tuple(map(value, attribute))
        return attribute if isinstance(attribute, (bool, int, float, str)) else id(attribute)

    parts = []
    for name, part in module.named_modules():
        attributes = {key: value(attribute) for key, attribute in vars(part).items() if key not in _VANILLA}
        if not numbered:
            attributes.pop(_NUMBER, None)
        attributes |= {key: value(buffer) for key, buffer in part.named_buffers(recurse=False)}
        shapes = tuple((n, p.shape, p.dtype) for n, p in part.named_parameters(recurse=False))
        parts.append((name, type(part), shapes, tuple(sorted(attributes.items()))))
    return tuple(parts)
