"""How much memory a micro-batch takes, and which one fits: fastgpt.plan's prediction, asked for a run's own settings."""

from __future__ import annotations

import math
from dataclasses import asdict

from fastgpt.anatomy import Shape
from fastgpt.common import UserError
from fastgpt.config import ModelConfig
from fastgpt.doctor.figures import Figures
from fastgpt.hardware.cards import Gpu


def kernels(figures: Figures) -> str:
    """Which of the planner's kernels the run uses: nanoGPT compiles unless told not to."""
    if figures.config.kind == "fastgpt":
        name = str(figures.config.get("kernels", "triton"))
        return "compile" if name == "eager" and figures.config.get("compile") else name
    return "nanogpt-compile" if figures.config.get("compile", True) else "eager"


def needed(shape: Shape, micro_batch: int, figures: Figures) -> int | None:
    """Bytes of a training step, predicted; None for a shape or kernels that the planner has no answer for."""
    from fastgpt.performance import memory

    dropout = figures.config.get("dropout") or 0.0
    precision = "fp32" if figures.precision == "tf32" else figures.precision
    try:
        model = ModelConfig(**asdict(shape), dropout=dropout if dropout < 1 else 0.0)
        return memory.memory(model, micro_batch=micro_batch, kernels=kernels(figures), precision=precision).total
    except UserError:
        return None


def room(gpu: Gpu) -> int:
    """Bytes that a run can have on this card."""
    from fastgpt.performance import fitting as fitting_module

    return fitting_module.usable_vram(gpu)


def fitting(shape: Shape, figures: Figures, gpu: Gpu) -> tuple[int, int] | None:
    """The largest micro-batch up to the present one that fits, and the accumulation that keeps the tokens per step.

    None if the batch is not known, or one sequence does not fit."""
    batch, accumulate = figures.config.get("batch_size"), figures.config.get("gradient_accumulation_steps") or 1
    if batch is None:
        return None
    sizes = (size for size in range(batch, 0, -1) if batch * accumulate % size == 0)
    found = next((size for size in sizes if (needed(shape, size, figures) or math.inf) <= room(gpu)), None)
    return (found, batch * accumulate // found) if found else None


def lines(geometry: tuple[int, int]) -> str:
    return f"batch_size = {geometry[0]}\ngradient_accumulation_steps = {geometry[1]}"
