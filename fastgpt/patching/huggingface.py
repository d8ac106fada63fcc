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

from dataclasses import fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt.patching.modules import FusedBlock, supported
from fastgpt.patching.plan import PatchPlan, blocker, plan_blocks, unknown_children
from fastgpt.patching.swap import Fused, is_fused, parameters

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
            dropout_p=self.attn_dropout.p if self.training else 0.0,
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
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = self.named((hidden_states, *args), kwargs)
        if call.get("encoder_hidden_states") is not None or not supported(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        x = hidden_states
        h = self.before_attention(x)
        own = ("hidden_states", "encoder_hidden_states", "encoder_attention_mask")
        options = {name: value for name, value in call.items() if name not in own}
        dropout_p = 0.0
        if is_fused(self.attn) and self.attn.fusable({**options, "hidden_states": h}):
            outputs = self.attn(h, defer_dropout=True, **options)
            dropout_p = self.attn.resid_dropout.p if self.training else 0.0
        else:
            outputs = self.attn(h, **options)
        x = self.after_attention(x, outputs[0], dropout_p)
        if "layer_past" in self.names:
            return (x, *outputs[1:]) if call.get("use_cache") else (x, *outputs[2:])
        if "output_attentions" in self.names:
            return (x, outputs[1]) if call.get("output_attentions") else (x,)
        return x


class HuggingFaceLMHeadModel(Fused):
    """In train mode with labels: the fused loss, and None for the logits. Otherwise the model's own forward."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = self.named(args, kwargs)
        if not self._wants_fused_loss(call):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

        labels = call.pop("labels")
        call.pop("logits_to_keep", None)
        options = {name: call[name] for name in ("num_items_in_batch", "ignore_index", "shift_labels") if name in call}
        passed_on = call if self._fastgpt_passes_on else {n: call[n] for n in call if n in self.names}
        outputs = self.transformer(**passed_on)
        loss = self._loss(outputs[0], labels, **options)
        # The name of the cache differs between versions, so every field of the body's outputs is passed on.
        names = {field.name for field in fields(CausalLMOutputWithCrossAttentions)} - {"loss", "logits"}
        passed_through = {name: getattr(outputs, name) for name in names}
        return CausalLMOutputWithCrossAttentions(loss=loss, logits=None, **passed_through)

    def _wants_fused_loss(self: Any, call: dict[str, Any]) -> bool:
        if call.get("labels") is None or not self.training:
            return False
        returns_dict = call.get("return_dict")
        if returns_dict is None:
            returns_dict = getattr(self.config, "return_dict", True)
        keep = call.get("logits_to_keep", 0)
        all_logits = isinstance(keep, int) and keep == 0
        known = self.takes_more or all(name in self.names for name in call)
        return known and all_logits and returns_dict and type(self.lm_head) is nn.Linear and has_gpt2_loss(self)

    def _loss(
        self: Any,
        hidden: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of token i + 1 given those up to i: the mean, or the sum over ``num_items_in_batch``."""
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss = self.ops.linear_cross_entropy(
            hidden,
            self.lm_head.weight,
            shift_labels.to(hidden.device).reshape(hidden.shape[:-1]),
            bias=self.lm_head.bias,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch


def has_gpt2_loss(model: Any) -> bool:
    """Whether the loss is the shifted cross-entropy (a user may have set another)."""
    return getattr(getattr(model, "loss_function", None), "__name__", "ForCausalLMLoss") == "ForCausalLMLoss"


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
        attention=HuggingFaceAttention,
        block=HuggingFaceBlock,
        attention_blocker=_attention_blocker,
        call_attention=lambda block, x: block.attn(x)[0],
        shape=(2, min(base.wpe.weight.shape[0], 64), C),
    )
    plan.norm(f"{prefix}ln_f", base.ln_f, C)
    why = "a GPT2Model has none" if base is model else "keep_logits=True" if keep_logits else _loss_blocker(model)
    plan.decide("loss", model, HuggingFaceLMHeadModel, why)
    if why is None:
        plan.attributes = {"_fastgpt_passes_on": parameters(type(model.transformer).forward)[1]}
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
    if how != "sdpa":
        return f"attn_implementation is {how!r}: load the model with attn_implementation='sdpa'"
    unknown = unknown_children(attention, {"c_attn", "c_proj", "attn_dropout", "resid_dropout"})
    return f"it has a part that GPT-2's has not ({unknown})" if unknown else None


def _loss_blocker(model: Any) -> str | None:
    if type(model).forward.__qualname__ != "GPT2LMHeadModel.forward":
        return f"{type(model).__name__} has a forward of its own"
    if type(model.lm_head) is not nn.Linear:
        return f"its lm_head is a {type(model.lm_head).__name__}"
    if (why := blocker(model)) is not None:
        return why
    return None if has_gpt2_loss(model) else "it has a loss function of its own"
