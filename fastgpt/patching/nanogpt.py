"""nanoGPT's GPT and its forks, build-nanogpt's and llm.c's among them: any model whose modules have the same names.

transformer.{wte, h[i].{ln_1, attn.{c_attn, c_proj}, ln_2, mlp.{c_fc, gelu, c_proj}}, ln_f}, lm_head
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastgpt.patching.loss import FusedLoss, plan_loss
from fastgpt.patching.modules import FusedBlock, dropout_p, hooked, missing_in, supported
from fastgpt.patching.plan import PatchPlan, gpt2_parts, plan_blocks
from fastgpt.patching.swap import Fused, is_fused


class NanoGPTAttention(Fused):
    """c_attn -> causal flash attention on its packed output -> c_proj -> dropout."""

    def forward(self: Any, x: Tensor, *, defer_dropout: bool = False) -> Tensor:
        """``defer_dropout``: the caller applies the dropout after c_proj."""
        if not supported(x):
            return super().forward(x)  # type: ignore[misc]
        p = dropout_p(self, "attn_dropout")
        # nanoGPT keeps the probability twice: SDPA reads the attribute, its own softmax the module.
        if getattr(self, "flash", not hasattr(self, "attn_dropout")):
            p = float(getattr(self, "dropout", 0.0)) if self.training else 0.0
        y = self.c_proj(self.ops.qkv_attention(self.c_attn(x), self.n_head, dropout_p=p))
        return y if defer_dropout or not hasattr(self, "resid_dropout") else self.resid_dropout(y)


class NanoGPTBlock(FusedBlock):
    def forward(self: Any, x: Tensor) -> Tensor:
        if not supported(x) or hooked(self.ln_2):
            return super().forward(x)  # type: ignore[misc]
        h, p = self.before_attention(x), 0.0
        if is_fused(self.attn) and supported(h) and not hooked(self.attn):
            branch, p = self.attn(h, defer_dropout=True), dropout_p(self.attn, "resid_dropout")
        else:
            branch = self.attn(h)
        return self.after_attention(x, branch, p)


def missing(model: nn.Module) -> str | None:
    """The first module of nanoGPT's that ``model`` has not, or None."""
    return missing_in(model, ["transformer.ln_f"], ("ln_1", "attn", "ln_2", "mlp"))


def matches(model: nn.Module) -> bool:
    return missing(model) is None


def plan(model: Any, plan: PatchPlan, keep_logits: bool) -> None:
    """Decide what of ``model`` is replaced. Changes nothing."""
    plan.model = f"nanoGPT's {type(model).__name__}"
    C = model.transformer.wte.weight.shape[1]
    positions = getattr(model.transformer, "wpe", None)
    T = getattr(getattr(model, "config", None), "block_size", 1024) if positions is None else len(positions.weight)
    plan_blocks(
        plan,
        {f"transformer.h.{i}": block for i, block in enumerate(model.transformer.h)},
        gpt2_parts(NanoGPTAttention, NanoGPTBlock, lambda block, x: block.attn(x), C),
        shape=(1, min(T, 2048), C),
    )
    plan.norm("transformer.ln_f", model.transformer.ln_f, C)
    plan_loss(plan, model, FusedLoss, lambda model, ids: model(ids, ids.flip(1)), keep_logits)
