"""nanoGPT's GPT and its forks: any model whose modules have the same names and compute the same.

transformer.{wte, wpe, drop, h[i].{ln_1, attn.{c_attn, c_proj}, ln_2, mlp.{c_fc, gelu, c_proj}}, ln_f}, lm_head
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt.patching.modules import FusedBlock, supported
from fastgpt.patching.plan import PatchPlan, blocker, plan_blocks, unknown_children
from fastgpt.patching.probe import Probe
from fastgpt.patching.swap import Fused, is_fused, parameters


class NanoGPTAttention(Fused):
    """c_attn -> causal flash attention on its packed output -> c_proj -> dropout."""

    def forward(self: Any, x: Tensor, defer_dropout: bool = False) -> Tensor:
        """``defer_dropout``: the caller applies the dropout after c_proj."""
        if not supported(x):
            return super().forward(x)  # type: ignore[misc]
        # nanoGPT keeps the probability twice: SDPA reads the attribute, its own softmax the module.
        dropout_p = self.dropout if getattr(self, "flash", False) else self.attn_dropout.p
        y = self.ops.qkv_attention(self.c_attn(x), self.n_head, dropout_p=float(dropout_p) if self.training else 0.0)
        y = self.c_proj(y)
        return y if defer_dropout else self.resid_dropout(y)


class NanoGPTBlock(FusedBlock):
    def forward(self: Any, x: Tensor) -> Tensor:
        if not supported(x):
            return super().forward(x)  # type: ignore[misc]
        h, dropout_p = self.before_attention(x), 0.0
        if is_fused(self.attn) and supported(h):
            branch = self.attn(h, defer_dropout=True)
            dropout_p = self.attn.resid_dropout.p if self.training else 0.0
        else:
            branch = self.attn(h)
        return self.after_attention(x, branch, dropout_p)


class NanoGPTModel(Fused):
    """In train mode with targets: the fused loss, and None for the logits. Otherwise the model's own forward."""

    def forward(self: Any, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        plain_head = type(self.lm_head) is nn.Linear
        if targets is None or self._fastgpt_keep_logits or not self.training or not plain_head:
            return super().forward(idx, targets)  # type: ignore[misc]
        T, block_size = idx.shape[1], self.transformer.wpe.weight.shape[0]
        if block_size < T:
            raise ValueError(f"sequence of {T} tokens is longer than block_size {block_size}")
        position = torch.arange(T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(position))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        ignore_index = self._fastgpt_ignore_index
        return None, self.ops.linear_cross_entropy(
            x, self.lm_head.weight, targets, bias=self.lm_head.bias, ignore_index=ignore_index
        )


def matches(model: nn.Module) -> bool:
    """Whether the modules have nanoGPT's names. What they compute is tried out later."""
    transformer = getattr(model, "transformer", None)
    names = ("wte", "wpe", "drop", "h", "ln_f")
    if not isinstance(getattr(model, "lm_head", None), nn.Module) or not isinstance(transformer, nn.ModuleDict):
        return False
    if not all(name in transformer for name in names) or not isinstance(transformer["h"], nn.ModuleList):
        return False
    parts = ("ln_1", "attn", "ln_2", "mlp")
    blocks = list(transformer["h"])
    return bool(blocks) and all(isinstance(getattr(block, part, None), nn.Module) for block in blocks for part in parts)


def plan(model: Any, plan: PatchPlan) -> None:
    """Decide what of ``model`` is replaced. Changes nothing."""
    T = min(model.transformer.wpe.weight.shape[0], 1024)
    C = model.transformer.wte.weight.shape[1]
    plan_blocks(
        plan,
        {f"transformer.h.{i}": block for i, block in enumerate(model.transformer.h)},
        attention=NanoGPTAttention,
        block=NanoGPTBlock,
        attention_blocker=_attention_blocker,
        call_attention=lambda block, x: block.attn(x),
        shape=(1, T, C),
    )
    plan.norm("transformer.ln_f", model.transformer.ln_f, C)
    _plan_loss(model, plan)


def _attention_blocker(attention: Any) -> str | None:
    """Why this attention cannot be replaced, as far as its modules show it."""
    unknown = unknown_children(attention, {"c_attn", "c_proj", "attn_dropout", "resid_dropout"})
    if unknown:
        return f"it has a part that nanoGPT's has not ({unknown})"
    if not isinstance(getattr(attention, "resid_dropout", None), nn.Dropout):
        return "it has no resid_dropout"
    if not isinstance(getattr(attention, "attn_dropout", None), nn.Dropout):
        return "it has no attn_dropout"
    if getattr(attention, "flash", False) and not isinstance(getattr(attention, "dropout", None), (int, float)):
        return "it has no dropout probability"
    return None if isinstance(getattr(attention, "n_head", None), int) else "it has no n_head"


def _plan_loss(model: Any, plan: PatchPlan) -> None:
    why = blocker(model) or _loss_blocker(model)
    if why is None:
        probe = Probe(model, leave_out=[model.transformer.h])
        head: Any = probe.module.lm_head
        T, V = min(model.transformer.wpe.weight.shape[0], 16), head.weight.shape[0]
        idx = torch.randint(0, V, (2, T), generator=probe.generator)
        reasons = []
        for ignore_index in (-1, -100):  # nanoGPT's, PyTorch's default
            targets = torch.randint(0, V, (2, T), generator=probe.generator)
            targets[0, 0] = ignore_index

            def loss(module: Any, targets: Tensor = targets, ignore_index: int = ignore_index) -> Any:
                module._fastgpt_keep_logits, module._fastgpt_ignore_index = False, ignore_index
                return module(idx, targets)[1]

            why = probe.why_not([("", NanoGPTModel)], loss, train=True)
            if why is None:
                plan.attributes = {"_fastgpt_ignore_index": ignore_index}
                break
            reasons.append(why)
        why = why and reasons[0]
    if why is None:
        plan.change("loss", model, NanoGPTModel)
    else:
        plan.keep("loss", why)


def _loss_blocker(model: Any) -> str | None:
    names, takes_more = parameters(type(model).forward)
    if len(names) != 2 or names[1] != "targets" or takes_more:
        return f"its forward takes ({', '.join(names)}), not (idx, targets)"
    if type(model.lm_head) is not nn.Linear:
        return f"its lm_head is a {type(model.lm_head).__name__}"
    try:
        source = inspect.getsource(type(model).forward)
    except (OSError, TypeError):
        source = ""
    return "its forward checkpoints activations itself" if "checkpoint" in source else None
