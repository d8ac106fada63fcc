"""A training step to measure, built as the training loop builds its own, and what a measured one is judged by."""

from __future__ import annotations

import torch

from bench.steps import nanogpt
from bench.steps.variants import StepVariant
from fastgpt import ops
from fastgpt.config import Config
from fastgpt.model import GPT
from fastgpt.ops import scales_loss
from fastgpt.optim.build import build_optimizer
from fastgpt.training.graphs import CudaRecorder, Graphs
from fastgpt.training.run import use_graphs
from fastgpt.training.step import LossScaler, Stepper


def build(
    config: Config,
    device: torch.device,
    precision: str,
    *,
    table: ops.Ops,
    optimizer: str = "triton",
    compile: str = "none",
    cuda_graphs: str = "off",
) -> Stepper:
    """The training loop's step, of operations from ``table`` and the optimizer of ``--kernels``."""
    torch.manual_seed(0)
    model = GPT(config.model, table).to(device)
    forward = model if compile == "none" else torch.compile(model, mode=compile)
    scaler = LossScaler(device.type, enabled=scales_loss(precision))
    stepper = Stepper(
        model, forward, build_optimizer(model, config.optim, optimizer), scaler, precision, config.optim.grad_clip
    )
    kernels = "eager" if table is ops.EAGER else "triton"
    stepper.adds_in_place = kernels == "triton" and compile == "none"  # as the training loop does
    if use_graphs(cuda_graphs, device, kernels, compile != "none", ranks=1):
        stepper.graphs = Graphs(stepper, CudaRecorder(device))
    return stepper


LOSS_TOLERANCE = 0.02
"""Largest difference between the first losses of two ways to run a step in 16 bits or fewer: same weights and tokens."""


def wrong_loss(loss: float, expected: float, whose: str, tolerance: float = LOSS_TOLERANCE) -> str | None:
    """Why a step with this first loss gets no speed; None if the loss is right. NaN is not. ``whose``: the expected loss."""
    if abs(loss - expected) <= tolerance:
        return None
    return f"no speed: its first loss is {loss:.4f}, {whose} {expected:.4f}"


def updates_left_out(skipped: int) -> str | None:
    """Why a step that skipped updates gets no speed: such a step does less. None if it skipped none."""
    return f"no speed: {skipped} updates were skipped for a gradient that is not finite" if skipped else None


def of_variant(variant: StepVariant, config: Config, device: torch.device, precision: str) -> Stepper:
    """A variant's step. ``precision``: as it is in force on this device."""
    if variant.nanogpt:
        return nanogpt.build(config, device, precision, variant.compile)
    kernels, mode, graphs = variant.kernels, variant.compile, variant.cuda_graphs
    table = ops.get(kernels, precision)
    return build(config, device, precision, table=table, optimizer=kernels, compile=mode, cuda_graphs=graphs)
