"""What every checkpoint format is read into: a GPT-2 under fastgpt's names, whole, on the CPU, in fp32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgpt import anatomy
from fastgpt.common import UserError, shortened
from fastgpt.config import MODERN, ModelConfig, typed_fields
from fastgpt.data.tokenizer import CHARS, SIZES

MOMENTS = (("exp_avg", "exp_avg_sq"), ("momentum_buffer",))
"""Tensors of a parameter's shape in its state: of AdamW, or of Muon."""


@dataclass
class Portable:
    """A model, and what its checkpoint says besides."""

    config: ModelConfig
    weights: dict[str, Tensor]
    """By fastgpt's names, which are nanoGPT's; a GPT-2's head is transformer.wte.weight."""
    step: int = 0
    optimizer: dict[str, Any] | None = None
    """{"state": {name: {step, exp_avg, exp_avg_sq}}, "param_groups": [{..., "params": [names]}]}."""
    exact_gelu: bool = False
    """Trained with the exact GELU (erf); False: with its tanh form, as GPT-2 was and fastgpt computes."""
    letters: list[str] | None = None
    """The letters of a model of characters, by id."""
    extras: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{format: what only that format knows}, kept so that the way back restores it."""
    notes: list[str] = field(default_factory=list)
    """What does not survive, a sentence each."""

    @property
    def tokenizer(self) -> str:
        """The name of the tokenizer, as ``--tokenizer`` has it: GPT-2's unless the checkpoint says otherwise."""
        if self.letters is not None:
            return CHARS
        said = self.settings("data").get("tokenizer")
        return said if said in tuple(SIZES) else "gpt2"

    def settings(self, section: str) -> dict[str, Any]:
        """What fastgpt's configuration of the run has under ``section``; nothing where a file has no such table."""
        config = self.extras.get("fastgpt", {}).get("config")
        found = config.get(section) if isinstance(config, dict) else None
        return found if isinstance(found, dict) else {}

    def not_finite(self) -> list[str]:
        """Names of the weights that hold NaN or infinity."""
        return [name for name, weight in self.weights.items() if not weight.isfinite().all()]


def tied(source: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without lm_head.weight, which is the token embedding again, or a copy of it in a narrower dtype. Raises
    UserError if it is another tensor."""
    kept = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    head, embedding = weights.get("lm_head.weight"), kept.get("transformer.wte.weight")
    if head is None or embedding is None:
        return kept
    narrow, wide = sorted((head, embedding), key=lambda tensor: tensor.itemsize)
    rounded = wide.to(narrow.dtype)
    if rounded.shape != narrow.shape or not torch.allclose(rounded, narrow, rtol=0, atol=0, equal_nan=True):
        raise UserError(f"{source} has a head that is not tied to its token embedding, which GPT-2's is")
    return {**kept, "transformer.wte.weight": wide}


def check(source: str, weights: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The weights in the order of the model's parameters. Raises UserError unless they are exactly the model's: no name too
    few, none too many, every shape right."""
    shapes = anatomy.parameters(config)
    wrong = [f"{name} is missing" for name in shapes if name not in weights]
    kind = "GPT-2" if config.family == "gpt2" else "model"
    wrong += [f"{name} is not {kind}'s" for name in weights if name not in shapes]
    for name in shapes.keys() & weights.keys():
        if weights[name].shape != shapes[name]:
            wrong.append(f"{name} is {tuple(weights[name].shape)} instead of {tuple(shapes[name])}")
        elif not weights[name].is_floating_point():
            wrong.append(f"{name} is {str(weights[name].dtype)[6:]}")
    if wrong:
        shown = "; ".join(sorted(wrong)[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise UserError(f"{source} does not hold the {kind} that its configuration describes ({shown})")
    return {name: weights[name] for name in shapes}


def check_optimizer(source: str, optimizer: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Raise UserError unless every moment has its weight's shape."""
    for name, state in optimizer["state"].items():
        muon = isinstance(state, dict) and "momentum_buffer" in state
        for key in MOMENTS[muon]:
            moment = state.get(key) if isinstance(state, dict) else None
            if name not in weights or not isinstance(moment, Tensor) or moment.shape != weights[name].shape:
                raise UserError(f"{source} has an optimizer state that does not fit its weights ({key} of {name})")


def loss(said: Any) -> float | None:
    """A validation loss that a file names; None for what is no number."""
    try:
        return float(said) if isinstance(said, (int, float, Tensor)) else None
    except (OverflowError, RuntimeError, ValueError):  # more digits than a float has; a tensor of many elements
        return None


def steps(said: Any) -> int:
    """How many optimizer steps a file says were done; 0 for what is no such number."""
    return said if type(said) is int and said >= 0 else 0


def in_fp32(weights: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The weights as fp32 masters; exact for fp16 and bf16."""
    narrow = {str(w.dtype)[6:] for w in weights.values()} - {"float32"}
    if narrow:
        notes.append(f"the weights were {' and '.join(sorted(narrow))} and are float32 now")
    return {name: w.to(torch.float32) for name, w in weights.items()}


def model_config(source: str, values: Mapping[str, Any]) -> ModelConfig:
    """A ModelConfig of plain values. Raises UserError for one that is missing or of another type."""
    kinds = {"bias": bool, "dropout": (float, int)}
    fields = (*anatomy.SHAPE, "dropout")
    for name in fields:
        value = values.get(name)
        kind: Any = kinds.get(name, int)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(
                f"{source} says that {name} is {shortened(repr(value))}: it is not a configuration of a GPT-2"
            )
    try:
        parts = {name: values[name] for name in ("family", *MODERN) if name in values}
        return ModelConfig(**{name: values[name] for name in fields}, **typed_fields(ModelConfig, parts, "its [model]"))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
