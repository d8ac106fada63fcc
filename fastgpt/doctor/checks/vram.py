"""How much memory a micro-batch takes, and which one fits: fastgpt.plan's prediction, asked for a run's own settings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict

from fastgpt.anatomy import Shape
from fastgpt.common import UserError
from fastgpt.config import ModelConfig
from fastgpt.doctor.figures import Figures
from fastgpt.hardware.cards import Gpu
from fastgpt.performance.fitting import usable_vram
from fastgpt.performance.memory import memory


def kernels(figures: Figures) -> str:
    """Which of the planner's kernels the run uses: nanoGPT compiles unless told not to."""
    if figures.config.kind == "fastgpt":
        name = str(figures.config.get("kernels", "triton"))
        return "compile" if name == "eager" and figures.config.get("compile") else name
    return "nanogpt-compile" if figures.config.get("compile", True) else "eager"


def needed(shape: Shape, micro_batch: int, figures: Figures) -> int | None:
    """Bytes of a training step, predicted; None for a shape or kernels that the planner has no answer for."""
    dropout = figures.config.get("dropout") or 0.0
    precision = "fp32" if figures.precision == "tf32" else figures.precision
    try:
        model = ModelConfig(**asdict(shape), dropout=dropout if dropout < 1 else 0.0)
        return memory(model, micro_batch=micro_batch, kernels=kernels(figures), precision=precision).total
    except UserError:
        return None


def geometries(figures: Figures, largest: int) -> Iterator[tuple[int, int]]:
    """Micro-batches from ``largest`` down, each with the accumulation that keeps the tokens per step."""
    batch, accumulate = figures.config.get("batch_size"), figures.config.get("gradient_accumulation_steps") or 1
    sequence_tokens = (batch or 0) * (figures.config.get("block_size") or 0)
    if figures.tokens_per_step and sequence_tokens and figures.tokens_per_step % sequence_tokens == 0:
        accumulate = figures.tokens_per_step // sequence_tokens  # the log's, where it says another
    return ((size, batch * accumulate // size) for size in range(largest, 0, -1) if batch * accumulate % size == 0)


def fitting(shape: Shape, figures: Figures, gpu: Gpu) -> tuple[int, int] | None:
    """The largest of the run's ``geometries`` that fits; None if its batch is not known, or one sequence does not fit."""
    room = usable_vram(gpu)
    sizes = geometries(figures, figures.config.get("batch_size") or 0)
    return next((found for found in sizes if (needed(shape, found[0], figures) or math.inf) <= room), None)


def lines(geometry: tuple[int, int]) -> str:
    """Config lines for a micro-batch and its accumulation."""
    return f"batch_size = {geometry[0]}\ngradient_accumulation_steps = {geometry[1]}"
