"""The training steps that bench.ablation compares, as shipped and with one thing changed, and the part of it that runs them:
the training loop's own objects, one of them exchanged."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.compiler.tune_table import HINTS
from bench.reports import results
from bench.steps import build as build_module
from bench.steps.turns import NOT_REACHED, Runner, Setup, Turns, random_tokens
from bench.steps.variants import StepVariant
from fastgpt import anatomy, ops
from fastgpt.config import Config, load_preset
from fastgpt.hardware import cards
from fastgpt.hardware.environment import environment
from fastgpt.kernels import runtime, tuning, working_copy
from fastgpt.ops import EAGER, Ops
from fastgpt.training.step import Stepper


@dataclass(frozen=True)
class Variant:
    """The step with one thing changed. ``fusion``: a field of operations.Fusions, switched to ``on``; ``part``: one of
    ablation.PARTS, computed as in plain fp16."""

    name: str
    text: str
    precision: str = "bf16"
    fusion: str | None = None
    on: bool = False
    part: str | None = None
    graphs: bool = False

    @property
    def key(self) -> str:
        return f"{self.precision}: {self.name}"

    @property
    def is_shipped(self) -> bool:
        return self.name == "as shipped"


VARIANTS = (
    Variant("as shipped", "cuBLAS with every fusion below on"),
    Variant("attention off", "torch's flash attention; dQ, dK and dV packed by a copy", fusion="attention"),
    Variant("norms off", "residual add, norm and casts in passes of their own", fusion="norms"),
    Variant("loss off", "whole logits, in 16 bits and fp32", fusion="loss"),
    Variant("weight gradients off", "rounded to 16 bits, cast and added by passes", fusion="weight_gradients"),
    Variant("in place off", "autograd adds the gradients of later micro-batches", fusion="in_place"),
    Variant("working copy off", "weights cast in every micro-batch", fusion="working_copy"),
    Variant("optimizer off", "torch's fused AdamW and clip_grad_norm_", fusion="optimizer"),
    Variant("embedding off", "gather, add; dense gradients", fusion="embedding"),
    Variant("epilogues on", "GELU inside Triton matmuls, at a library's efficiency", fusion="epilogues", on=True),
    Variant("CUDA graphs on", "micro-steps and update replayed", graphs=True),
    Variant("as shipped", "products summed in fp16 by chunks, in Triton", "fp16-fast"),
    Variant("linears off", "the blocks' linears by cuBLAS, sums in fp32, GELU in passes", "fp16-fast", part="linears"),
    Variant("head off", "logits and their gradients by cuBLAS", "fp16-fast", part="head"),
    Variant("attention off", "attention's products summed in fp32", "fp16-fast", part="attention"),
)  # fmt: skip

GRAD_ACCUM = 4

Measured = dict[tuple[str, str], dict[str, Any]]
"""By model and variant's key: the figures, or an ``error``."""


# ---------------------------------------------------------------- one thing exchanged


def _rounded(table: Ops) -> Ops:
    """Linears that are given the working copy for their weight: its gradient is rounded to 16 bits, and cast by autograd."""

    def copy(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return working_copy.working_copy(weight, runtime.compute_dtype(x))

    def linear(x: torch.Tensor, weight: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return table.linear(x, copy(weight, x), *rest, **options)

    def mlp(x: torch.Tensor, w_fc: Any, b_fc: Any, w_proj: Any, b_proj: Any, **options: Any) -> torch.Tensor:
        return table.mlp(x, copy(w_fc, x), b_fc, copy(w_proj, x), b_proj, **options)

    return replace(table, linear=linear, mlp=mlp)


_EAGER_PARTS = {
    "attention": ("attention", "qkv_attention"),
    "norms": ("layer_norm",),
    "loss": ("linear_cross_entropy",),
    "embedding": ("embedding",),
}
_FP16_PARTS = {
    "linears": ("linear", "linear_gelu", "mlp"),
    "head": ("linear_cross_entropy",),
    "attention": ("attention", "qkv_attention"),
}


def table_of(variant: Variant) -> Ops:
    """The operations that the variant's model calls."""
    table = ops.get("triton", variant.precision)
    if variant.fusion in _EAGER_PARTS:
        return replace(table, **{name: getattr(EAGER, name) for name in _EAGER_PARTS[variant.fusion]})
    if variant.fusion == "weight_gradients":
        return _rounded(table)
    if variant.part:
        plain = ops.get("triton", "fp16")
        return replace(table, **{name: getattr(plain, name) for name in _FP16_PARTS[variant.part]})
    return table


@contextmanager
def conditions(variant: Variant, config: Config, device: torch.device) -> Iterator[None]:
    """What holds while the variant runs."""
    with ExitStack() as stack:
        if variant.fusion == "working_copy":
            stack.enter_context(mock.patch.object(working_copy, "enabled", False))
        if variant.fusion == "epilogues":
            stack.enter_context(tuning.forced(_tiles(config, device)))
        yield


def _tiles(config: Config, device: torch.device) -> dict[str, tuning.Config]:
    """For the MLP's first matmul and the gradient before it, in Triton: those of a table or a hint, or the default ones."""
    from fastgpt.kernels.matmul import default_tiles, linear_bucket

    C, hidden = config.model.n_embd, anatomy.of(config.model).hidden
    tokens = config.data.batch_size * config.model.block_size
    dtype, here = torch.bfloat16 if device.type == "cuda" else torch.float32, tuning.target(device)
    found = {}
    for kind in ("gelu", "dgelu"):
        bucket = linear_bucket(hidden, C, tokens)
        known = []
        if here is not None and bucket is not None:
            key = tuning.Key(f"linear.{kind}", tuning.DTYPES[dtype], bucket)
            known = tuning.entries_for(key, here, HINTS)
        tiles = [entry.config for entry, _ in known if entry.config != tuning.CUBLAS]
        found[f"linear.{kind}"] = tiles[0] if tiles else default_tiles(kind, tokens, hidden, C, dtype)
    return found


def build(variant: Variant, config: Config, device: torch.device, precision: str) -> Stepper:
    stepper = build_module.build(
        config, device, precision,
        table=table_of(variant), optimizer="eager" if variant.fusion == "optimizer" else "triton",
        cuda_graphs="on" if variant.graphs else "off",
    )  # fmt: skip
    stepper.adds_in_place = variant.fusion not in ("in_place", "weight_gradients")
    return stepper


# ---------------------------------------------------------------- timed


def run(
    models: list[str],
    device: torch.device,
    deadline: float,
    *,
    load: Callable[[str], Config] = lambda model: load_preset(model, "cuda"),
    steps: int = 8,
    batch_size: int | None = None,
    save: Callable[[Measured], None] = lambda found: None,
) -> Measured:
    """Every variant of every model that the time allows, by (model, variant's key), each in turns with the shipped step of
    its precision: ``ms``, ``iqr_ms``, ``runs`` of steps of GRAD_ACCUM micro-batches of random tokens, ``first_loss`` and
    ``change``. What is not run has an ``error`` that says why. ``save`` gets the results so far after each."""
    found: Measured = {}
    for model in models:
        config = load(model)
        if batch_size is not None:
            config = replace(config, data=replace(config.data, batch_size=batch_size))
        turns = Turns(device)
        shipped = {variant.precision: variant for variant in VARIANTS if variant.is_shipped}
        with random_tokens(_setup(model, config, "")) as tokens:
            for variant in VARIANTS:
                base = shipped[variant.precision]
                reason = NOT_REACHED if turns.stopped else _reason(variant, device, deadline)
                if reason is None:
                    reason = _measure(turns, variant, base, partial(_runner, model, config, device, tokens), steps)
                one = {"error": reason} if reason else turns.results[variant.key]
                found[model, variant.key] = _compared(one, turns.results.get(base.key, {"error": "not run"}))
                save(found)
                if not variant.is_shipped:
                    turns.release(variant.key)
        for key in list(turns.runners):
            turns.release(key)
    return found


def _measure(
    turns: Turns, variant: Variant, base: Variant, make: Callable[[Variant], Runner], steps: int
) -> str | None:
    """Time a variant in turns with the shipped step. Returns why there is no figure."""
    for one in dict.fromkeys((base, variant)):
        if one.key not in turns.results:
            turns.start(one.key, partial(make, one))
    pair = [one.key for one in dict.fromkeys((base, variant))]
    for key in pair:
        if "error" in turns.results[key]:
            return turns.results[key]["error"] if key == variant.key else None
    try:
        turns.time(steps, 30.0, pair)
    except Exception as error:
        return results.sentence(error)
    return build_module.updates_left_out(turns.results[variant.key]["skipped_steps"])


def _setup(model: str, config: Config, precision: str) -> Setup:
    return Setup(model, config.model, config.data.batch_size, GRAD_ACCUM, precision)


def _runner(model: str, config: Config, device: torch.device, tokens: Path, variant: Variant) -> Runner:
    precision = variant.precision if device.type == "cuda" or variant.precision != "bf16" else "fp32"
    held = partial(conditions, variant, config, device)
    with held():
        stepper = build(variant, config, device, precision)
    step = StepVariant("triton", cuda_graphs="on" if variant.graphs else "off")
    return Runner(step, _setup(model, config, precision), device, tokens, stepper=stepper, conditions=held)


def _reason(variant: Variant, device: torch.device, deadline: float) -> str | None:
    """Why the variant is not run."""
    if time.monotonic() > deadline:
        return "not run: the budget is up"
    if variant.graphs and device.type != "cuda":
        return "not run: CUDA graphs need a CUDA GPU"
    gpu = cards.present(device)
    if variant.precision == "fp16-fast" and gpu is not None and not cards.gains("fp16-fast", gpu):
        return f"not run: {gpu.name} is no faster in fp16-fast"
    return None


def _compared(one: dict[str, Any], shipped: dict[str, Any]) -> dict[str, Any]:
    """``change``: against the shipped step as it was timed in turns with this one."""
    if "error" in one or "error" in shipped:
        return one if "error" in one else {"error": f"nothing to compare with: {shipped['error']}"}
    if reason := build_module.wrong_loss(one["first_loss"], shipped["first_loss"], "the shipped step's"):
        return {"error": reason}
    return {**one, "change": one["ms"] / shipped["ms"] - 1 if math.isfinite(shipped["ms"]) else None}


def store(measured: Measured, device: torch.device) -> Path:
    entries = {f"{model} | {key}": one for (model, key), one in measured.items()}
    return results.store("ablation", environment(device), entries)
