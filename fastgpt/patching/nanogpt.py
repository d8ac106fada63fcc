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
        if targets is None or not self.training or type(self.lm_head) is not nn.Linear:
            return super().forward(idx, targets)  # type: ignore[misc]
        T, block_size = idx.shape[1], self.transformer.wpe.weight.shape[0]
        if block_size < T:
            raise ValueError(f"sequence of {T} tokens is longer than block_size {block_size}")
        position = torch.arange(T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(position))
        for block in self.transformer.h:
            x = block(x)
        return None, self.ops.linear_cross_entropy(
            self.transformer.ln_f(x),
            self.lm_head.weight,
            targets,
            bias=self.lm_head.bias,
            ignore_index=self._fastgpt_ignore_index,
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


def plan(model: Any, plan: PatchPlan, keep_logits: bool) -> None:
    """Decide what of ``model`` is replaced. Changes nothing."""
    plan.model = f"nanoGPT's {type(model).__name__}"
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
    why = "keep_logits=True" if keep_logits else blocker(model) or _loss_blocker(model) or _try_loss(model, plan)
    plan.decide("loss", model, NanoGPTModel, why)


def _attention_blocker(attention: Any) -> str | None:
    unknown = unknown_children(attention, {"c_attn", "c_proj", "attn_dropout", "resid_dropout"})
    return f"it has a part that nanoGPT's has not ({unknown})" if unknown else None


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


def _try_loss(model: Any, plan: PatchPlan) -> str | None:
    """Try out the loss with nanoGPT's ``ignore_index`` and with PyTorch's default, and note in ``plan`` which one it has."""
    probe = Probe(model, leave_out=[model.transformer.h])
    T, V = min(model.transformer.wpe.weight.shape[0], 16), model.lm_head.weight.shape[0]
    idx = torch.randint(0, V, (2, T), generator=probe.generator)

    def why_not(ignore_index: int) -> str | None:
        targets = torch.randint(0, V, (2, T), generator=probe.generator)
        targets[0, 0] = ignore_index
        vars(probe.module)["_fastgpt_ignore_index"] = ignore_index
        return probe.why_not([("", NanoGPTModel)], lambda module: module(idx, targets)[1], train=True)

    reasons = []
    for ignore_index in (-1, -100):
        reasons.append(why_not(ignore_index))
        if reasons[-1] is None:
            plan.attributes = {"_fastgpt_ignore_index": ignore_index}
            return None
    return reasons[0]
