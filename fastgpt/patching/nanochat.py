"""Karpathy's nanochat GPT, in its versions since October 2025, and forks whose modules have its names.

transformer.{wte, h[i].{attn.{c_q, c_k, c_v, c_proj, ve_gate}, mlp.{c_fc, c_proj}}}, lm_head

    x = x + attn(norm(x), ve, cos_sin, window_size, kv_cache)      norm is a function: RMS norm without a weight
    x = x + mlp(norm(x))                                           c_proj(relu(c_fc(x))^2)

The versions differ in the arguments of attn (the first had neither ve nor window_size) and in two constants, which are read
from what reaches scaled_dot_product_attention in a trial. GPT.forward stays the model's own, and with it the norms outside the
blocks, the scalars on the residual stream, smear and backout, whichever of them a version has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastgpt.kernels.runtime import compute_dtype
from fastgpt.patching.loss import FusedLoss, plan_loss
from fastgpt.patching.modules import FusedMLP, hooked, is_plain, missing_in, supported, without_copy
from fastgpt.patching.plan import Call, PatchPlan, Replaceable, head_blocker, linear_blocker, plan_blocks, small_too
from fastgpt.patching.swap import Fused, is_fused, parameters

EPS = torch.finfo(torch.float32).eps
"""What F.rms_norm uses where no eps is given, for fp32, fp16 and bf16."""
_QKV = ("c_q", "c_k", "c_v")
_KNOWN = ("x", "ve", "cos_sin", "window_size", "kv_cache")
"""Arguments of attention whose meaning is known."""


class NanochatAttention(Fused):
    """q, k and v by one matmul -> rotary positions, QK norm and value embedding in one pass -> flash attention with the window
    -> c_proj. With a KV cache the model's own forward runs."""

    takes_one = False
    _fastgpt_linear: type[nn.Module] = nn.Linear
    _fastgpt_scale = 1.0
    """Factor of normed queries and keys."""
    _fastgpt_gate = 1.0
    """What the sigmoid of ve_gate is multiplied by."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        call = self.named((x, *args), kwargs)
        ve, gate = call.get("ve"), None
        to_gate: Any = getattr(self, "ve_gate", None)
        before, after = call.get("window_size", (-1, 0))  # so many tokens before a token's own; all if negative
        own = before == 0 or after != 0 or call.get("kv_cache") is not None  # 0 meant all in the first versions
        own = own or call["cos_sin"][0].shape[::2] != (1, 1)  # each sequence has positions of its own, or each head
        if own or (ve is not None and to_gate is None) or not supported(x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        H, H_kv = self.n_head, self.n_kv_head
        if ve is not None:
            gate = self._fastgpt_gate * torch.sigmoid(to_gate(x[..., : to_gate.in_features]))
        cos, sin = (table[0, :, 0] for table in call["cos_sin"])
        qkv = self.ops.qk_norm_rope(
            self._projected(x), H, H_kv, cos, -sin, scale=self._fastgpt_scale, ve=ve, gate=gate, eps=EPS
        )  # -sin: nanochat turns by the negative angle
        window = before + 1 if 0 <= before < x.shape[1] - 1 else None
        return self.c_proj(self.ops.qkv_attention(qkv, H, n_kv_head=H_kv, window=window))

    def _projected(self: Any, x: Tensor) -> Tensor:
        """(B, T, (H + 2 H_kv) D): queries, keys and values side by side."""
        linears = [getattr(self, name) for name in _QKV]
        if not all(is_plain(linear, self._fastgpt_linear) and linear.bias is None for linear in linears):
            return torch.cat([linear(x) for linear in linears], -1)
        weight = torch.cat([linear.weight for linear in linears])  # less to copy than what comes of three matmuls
        return self.ops.linear(x, weight, **without_copy(self.ops))


class NanochatMLP(FusedMLP):
    def activation(self) -> dict[str, str]:
        return {"activation": "relu2"}


class NanochatBlock(Fused):
    """x + attn(norm(x)), then x + mlp(norm(x)). The first sum is formed inside the second norm."""

    takes_one = False

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.named((x, *args), kwargs).get("kv_cache") is not None or not supported(x):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        norm = partial(self.ops.rms_norm, eps=EPS, out_dtype=compute_dtype(x))
        branch = self.attn(norm(x), *args, **kwargs)
        h, x = norm(branch, residual=x.to(torch.promote_types(branch.dtype, x.dtype)))
        return self.mlp(h, residual=x) if is_fused(self.mlp) and not hooked(self.mlp) else x + self.mlp(h)


class NanochatLoss(FusedLoss):
    """nanochat returns the loss alone, or without targets the logits alone."""

    in_eval = True

    def defers(self: Any, call: dict[str, Any]) -> bool:
        return call.get("targets") is not None


def missing(model: nn.Module) -> str | None:
    """The first module of nanochat's that ``model`` has not, or None."""
    return missing_in(model, [], (*(f"attn.{part}" for part in (*_QKV, "c_proj")), "mlp.c_fc", "mlp.c_proj"))


def matches(model: nn.Module) -> bool:
    return missing(model) is None


def plan(model: Any, plan: PatchPlan, keep_logits: bool) -> None:
    """Decide what of ``model`` is replaced. Changes nothing."""
    plan.model = f"nanochat's {type(model).__name__}"
    C, T = model.transformer.wte.weight.shape[1], getattr(getattr(model, "config", None), "sequence_len", 1024)
    T = min(T, 2048)
    windows = sorted({size[0] for size in getattr(model, "window_sizes", ()) if isinstance(size, tuple)})
    cls = type(model.lm_head)
    linear = cls if _casts(cls) else nn.Linear
    attention = partial(_called, lambda block: block.attn, windows or [-1])
    parts = {
        "attn": Replaceable(
            "attention",
            NanochatAttention,
            {*_QKV, "c_proj", "ve_gate"},
            attention,
            partial(_blocker, width=C),
            lambda block: {"linear": linear, **_constants(block, attention)},
        ),
        "mlp": Replaceable(
            "MLP",
            NanochatMLP,
            {"c_fc", "c_proj"},
            lambda block, x: block.mlp(x),
            lambda mlp: linear_blocker("c_fc", mlp.c_fc, linear) or linear_blocker("c_proj", mlp.c_proj, linear),
            lambda block: {"linear": linear},
            loud=True,
        ),
        "": Replaceable(
            "norms with the residual add",
            NanochatBlock,
            {"attn", "mlp"},
            lambda block, x: _called(lambda block: block, windows[:1] or [-1], block, small_too(x)),
            _block_blocker,
            loud=True,
        ),
    }
    plan_blocks(plan, {f"transformer.h.{i}": block for i, block in enumerate(model.transformer.h)}, parts, (1, T, C))
    plan_loss(plan, model, NanochatLoss, lambda model, ids: model(ids, ids.flip(1)), keep_logits, linear)
    plan.kept["norms and sums outside the blocks"] = "the model's own forward, which stays, computes them"
    if "attention" in plan.replaced:
        plan.notes.append("calls with a KV cache take the model's own attention")


def _called(of: Callable[[Any], Any], windows: list[int], block: Any, x: Tensor) -> list[Any]:
    """What ``of(block)``, attention or the block itself, returns for x (B, T, C) with each of the windows, or over few tokens,
    where the model's own windows would show nothing, with shorter ones."""
    module, attention = of(block), block.attn
    T, D = x.shape[1], attention.c_q.weight.shape[0] // attention.n_head
    angles = torch.arange(1.0, 1 + T * D // 2).view(1, T, 1, -1) % 6.3
    known = {"ve": _value_embedding(attention, x), "cos_sin": (angles.cos(), angles.sin()), "kv_cache": None}
    names = parameters(type(module).forward)
    results = []
    for before in (-1, 1, 3, T) if T <= 16 else windows:
        given = {**known, "window_size": (before, 0)}
        results.append(module(x, **{name: given[name] for name in names[1:] if name in given}))
        if "window_size" not in names:
            break
    return results


def _value_embedding(attention: Any, x: Tensor) -> Tensor | None:
    """A value embedding to try attention with, if it mixes one in: made of x, whose gradient is compared."""
    if getattr(attention, "ve_gate", None) is None:
        return None
    n = attention.c_v.weight.shape[0]
    return x.flip(1).repeat(1, 1, -(-n // x.shape[-1]))[..., :n]


def _blocker(attention: Any, width: int) -> str | None:
    names = parameters(type(attention).forward)
    if "cos_sin" not in names or not set(names) <= set(_KNOWN):
        return f"the forward of {type(attention).__name__} takes ({', '.join(names)}), not ({', '.join(_KNOWN)})"
    return head_blocker(attention, width)


def _block_blocker(block: Any) -> str | None:
    names, attention = parameters(type(block).forward), parameters(type(block.attn).forward)
    return None if names == attention else f"its forward takes other arguments than {type(block.attn).__name__}'s"


def _constants(block: Any, call: Call) -> dict[str, float]:
    """The factors of queries and keys and of the value embedding's gate, from what attention hands to PyTorch. Nothing where
    that does not tell: the trial that follows then finds the difference."""
    attention = block.attn
    x = torch.arange(1.0, 1 + 4 * attention.c_q.weight.shape[1]).sin().view(1, 4, -1)
    try:
        with torch.no_grad(), _Listening() as heard:
            call(block, x)
        q, k, v = heard.calls[0]
        found = {"scale": float(q.square().mean() * k.square().mean()) ** 0.25}
        if (ve := _value_embedding(attention, x)) is not None:
            gate = torch.sigmoid(attention.ve_gate(x[..., : attention.ve_gate.in_features])).detach()
            mixed = gate[..., None] * ve.view(*gate.shape, -1)
            added = v.transpose(1, 2) - attention.c_v(x).detach().view_as(mixed)
            found["gate"] = float((added * mixed).sum() / mixed.square().sum())
    except Exception:
        return {}
    return {name: round(value, 5) for name, value in found.items()}


class _Listening(TorchFunctionMode):
    """Remembers the queries, keys and values that F.scaled_dot_product_attention is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        named = {**dict(zip(("query", "key", "value"), args)), **(kwargs or {})}
        if func is F.scaled_dot_product_attention:
            self.calls.append((named["query"], named["key"], named["value"]))
        return func(*args, **(kwargs or {}))


def _casts(cls: type[nn.Module]) -> bool:
    """Whether a subclass of nn.Linear only casts its weight to its input's dtype, as nanochat's does. Found out by trying."""
    if not issubclass(cls, nn.Linear):
        return False
    linear = nn.Linear(6, 4, bias=False)
    linear.weight.data = torch.arange(24.0).cos().view(4, 6)

    def results(y: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad(y.float().square().sum(), (x, linear.weight))]

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.arange(18.0).sin().view(3, 6).to(dtype).requires_grad_()
        try:
            linear.__class__ = cls
            own = results(linear(x))
        except Exception:
            return False
        want = results(F.linear(x, linear.weight.to(dtype)))
        if not all(a.dtype == b.dtype and a.equal(b) for a, b in zip(own, want)):
            return False
    return True
