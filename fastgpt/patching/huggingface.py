"""Hugging Face's GPT2LMHeadModel and GPT2Model, transformers >= 4.45.

How a block is called and what it returns has changed over the versions:

    to 4.52       attn(h, layer_past=(k, v))        -> (y, (k, v) or None, ...)    block -> (x, (k, v), ...)   (to 4.47 a
                  class for each attn_implementation; GPT2SdpaAttention always returns three)
    4.53 - 4.57   attn(h, past_key_values=Cache)    -> (y, weights)                block -> (x, ...)
    5 - 5.23      attn(h, past_key_values=Cache)    -> (y, weights)                block -> x
    5.24          attn(h, cache=Cache)              -> (y, weights)                block -> x

The names of the parameters tell which version it is. What fits none of them is left alone: probe.py finds that out.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastgpt.patching.loss import FusedLoss, plan_loss
from fastgpt.patching.modules import FusedBlock, dropout_p, hooked, supported
from fastgpt.patching.plan import PatchPlan, gpt2_parts, plan_blocks
from fastgpt.patching.probe import Probe
from fastgpt.patching.swap import Fused, is_fused

_CACHES = ("layer_past", "past_key_value", "past_key_values", "cache")
_KNOWN = {
    *_CACHES, "hidden_states", "attention_mask", "head_mask", "encoder_hidden_states", "encoder_attention_mask",
    "output_attentions", "use_cache", "cache_position", "position_ids", "output_hidden_states", "return_dict",
    "num_items_in_batch",
}  # fmt: skip
"""Arguments of attention whose meaning is known. With any other the model's own attention runs, since a later version may
have renamed or added one."""


def _cache_in(call: dict[str, Any]) -> Any:
    return next((call[name] for name in _CACHES if call.get(name) is not None), None)


class HuggingFaceAttention(Fused):
    """c_attn -> causal flash attention on its packed output -> c_proj -> dropout."""

    takes_one = False  # named() and fusable() see to the rest

    def forward(self: Any, hidden_states: Tensor, *args: Any, defer_dropout: bool = False, **kwargs: Any) -> Any:
        """``defer_dropout``: the caller applies the dropout after c_proj. Ask ``fusable`` first."""
        call = self.named((hidden_states, *args), kwargs)
        if not self.fusable(call):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        qkv = self.c_attn(hidden_states)
        present = self._remember(qkv, call)
        y = self.ops.qkv_attention(
            qkv,
            self.num_heads,
            scale=getattr(self, "scaling", None),  # 4.x: always 1 / sqrt(D) in SDPA
            dropout_p=dropout_p(self, "attn_dropout"),
        )
        y = self.c_proj(y)
        y = y if defer_dropout else self.resid_dropout(y)
        return (y, present, None) if self._fastgpt_base.__name__ == "GPT2SdpaAttention" else (y, present)

    def fusable(self: Any, call: dict[str, Any]) -> bool:
        """Whether these arguments of forward ask for nothing but causal attention from the first token on."""
        if any(value is not None and name not in _KNOWN for name, value in call.items()):
            return False
        if call.get("attention_mask") is not None or call.get("head_mask") is not None or call.get("output_attentions"):
            return False
        if call.get("encoder_hidden_states") is not None or self.config._attn_implementation != "sdpa":
            return False
        cache = _cache_in(call)
        if cache is not None and (type(cache).__name__ != "DynamicCache" or cache.get_seq_length(self.layer_idx)):
            return False
        return supported(call["hidden_states"])

    def _remember(self: Any, qkv: Tensor, call: dict[str, Any]) -> Any:
        """Put keys and values into the cache of the call. Returns them for a version that returns them from attention."""
        cache = _cache_in(call)
        old_style = "layer_past" in self.names
        if cache is None and not (old_style and call.get("use_cache")):
            return None
        k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1)[1:])
        if old_style:
            return k, v
        extra = {"cache_position": call["cache_position"]} if call.get("cache_position") is not None else None
        cache.update(k, v, self.layer_idx, extra) if extra else cache.update(k, v, self.layer_idx)
        return None


class HuggingFaceBlock(FusedBlock):
    takes_one = False  # it hands the rest to attention

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = self.named((hidden_states, *args), kwargs)
        if call.get("encoder_hidden_states") is not None or not supported(hidden_states) or hooked(self.ln_2):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        x = hidden_states
        h = self.before_attention(x)
        own = ("hidden_states", "encoder_hidden_states", "encoder_attention_mask")
        options = {name: value for name, value in call.items() if name not in own}
        p = 0.0
        if is_fused(self.attn) and not hooked(self.attn) and self.attn.fusable({**options, "hidden_states": h}):
            outputs = self.attn(h, defer_dropout=True, **options)
            p = dropout_p(self.attn, "resid_dropout")
        else:
            outputs = self.attn(h, **options)
        x = self.after_attention(x, outputs[0], p)
        if "layer_past" in self.names:
            return (x, *outputs[1:]) if call.get("use_cache") else (x, *outputs[2:])
        if "output_attentions" in self.names:
            return (x, outputs[1]) if call.get("output_attentions") else (x,)
        return x


class HuggingFaceLMHeadModel(FusedLoss):
    def defers(self: Any, call: dict[str, Any]) -> bool:
        """Not where a tuple is returned, in which the place of the logits counts."""
        returns_dict = call.get("return_dict")
        return bool(getattr(self.config, "return_dict", True) if returns_dict is None else returns_dict)


def matches(model: nn.Module) -> bool:
    """Whether this is one of transformers' two classes (or a subclass)."""
    return any(
        cls.__module__ == "transformers.models.gpt2.modeling_gpt2" and cls.__name__ in ("GPT2LMHeadModel", "GPT2Model")
        for cls in type(model).__mro__
    )


def plan(model: Any, plan: PatchPlan, keep_logits: bool) -> None:
    """Decide what of ``model`` is replaced. Changes nothing."""
    import transformers

    plan.model = f"{type(model).__name__} of transformers {transformers.__version__}"
    base = getattr(model, "transformer", model)
    prefix = "" if base is model else "transformer."
    C = base.wte.weight.shape[1]
    plan_blocks(
        plan,
        {f"{prefix}h.{i}": block for i, block in enumerate(base.h)},
        gpt2_parts(HuggingFaceAttention, HuggingFaceBlock, lambda block, x: block.attn(x)[0], C, _attention_blocker),
        shape=(1, min(len(base.wpe.weight), 2048), C),
    )
    plan.norm(f"{prefix}ln_f", base.ln_f, C)
    if base is model:
        plan.kept["loss"] = "a GPT2Model has none"
        plan.try_together(Probe(model, share=True), lambda model, ids: model(ids)[0])
    else:
        plan_loss(plan, model, HuggingFaceLMHeadModel, lambda model, ids: model(ids, labels=ids), keep_logits)
    if "attention" in plan.replaced:
        plan.notes.append(
            "padding masks, cached decoding steps, head masks and output_attentions take the model's own attention"
        )
        if (4, 53) <= tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 0):
            plan.notes.append(
                "this transformers hands over a mask where none is needed: pass attention_mask, or use transformers 5"
            )


def _attention_blocker(attention: Any) -> str | None:
    how = attention.config._attn_implementation
    return None if how == "sdpa" else f"attn_implementation is {how!r}: load the model with attn_implementation='sdpa'"
