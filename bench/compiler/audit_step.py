"""The training steps whose launches bench.audit compiles: those of fastgpt/training/dry_run.py, at the presets' real shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from bench.ops.common import Case
from bench.ops.fp8 import has_fp8
from fastgpt.config import load_preset
from fastgpt.training import dry_run


def training_step(preset: str, precision: str = "bf16") -> None:
    """One optimizer step of a preset as it ships for CUDA: its model, micro-batch and clip; two micro-batches, so that
    gradients are also accumulated."""
    dry_run.step(load_preset(preset, "cuda"), precision)


def muon_step() -> None:
    """GPT-2 124M with Muon for its matrices."""
    config = load_preset("gpt2-124m", "cuda")
    dry_run.step(replace(config, optim=replace(config.optim, optimizer="muon")))


def fp8_step() -> None:
    """Nothing on a card without fp8: only where launches are captured is it known which card that is."""
    if has_fp8():
        training_step("gpt2-124m", "fp8")


def documents_step() -> None:
    config = load_preset("demo", "cuda")
    dry_run.step(replace(config, data=replace(config.data, mask_documents=True)))


def shipped_steps() -> Iterator[Case]:
    """What the RTX 4070's two real runs would launch."""
    for preset in ("gpt2-124m", "gpt2-40m"):
        yield f"step {preset} bf16", partial(training_step, preset)


def other_steps() -> Iterator[Case]:
    yield "step gpt2-350m bf16", partial(training_step, "gpt2-350m")
    yield "step demo bf16", partial(training_step, "demo")
    yield "step demo documents", documents_step
    yield "step modern-demo bf16", partial(training_step, "modern-demo")
    # Not among the steps that every run of the gate compiles: most of its binaries are those of others.
    yield "a step of modern-124m fp16-fast", partial(training_step, "modern-124m", "fp16-fast")
    yield "step gpt2-124m fp16", partial(training_step, "gpt2-124m", "fp16")
    yield "step gpt2-124m fp16-fast", partial(training_step, "gpt2-124m", "fp16-fast")
    yield "step gpt2-124m fp8", fp8_step
    yield "step gpt2-124m muon", muon_step
    yield "step gpt2-124m fp32", partial(training_step, "gpt2-124m", "fp32")
