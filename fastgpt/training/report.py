"""What a run says on the terminal: a table at the start, one line per interval, a progress bar where there is a terminal."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from fastgpt import anatomy
from fastgpt.common import UserError, gigabytes, millions, rounded, teraflops
from fastgpt.config import EXPERIMENTAL
from fastgpt.hardware import cards
from fastgpt.hardware.device import device_name
from fastgpt.hardware.telemetry import telemetry
from fastgpt.performance import flops
from fastgpt.performance.memory import memory
from fastgpt.training.run import Run


def peak_memory_gb(device: torch.device) -> float:
    """Most memory used so far, in GB (1e9 bytes): allocated by torch on a GPU, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def banner(console: Console, run: Run) -> None:
    """Say what will run, on what, and, without a GPU, what one would change."""
    config, shape = run.config, run.config.model
    ranks = f" on {run.world.size} ranks ({config.train.parallel})" if run.world.size > 1 else ""
    peak = cards.peak_flops(run.device, run.stepper.precision)
    arithmetic = cards.arithmetic_of(run.stepper.precision)
    rows = {
        "model": f"{millions(run.model.n_params())} parameters (excluding position embeddings): {shape.n_layer} layers, "
        f"{shape.n_head} heads, width {shape.n_embd}, context {shape.block_size}, vocabulary {shape.vocab_size}",
        "step": f"{config.tokens_per_step:,} tokens: micro-batches of {run.micro_batch} x {shape.block_size}, "
        f"{run.grad_accum} per rank and step{ranks}",
        "run": f"{config.train.max_iters:,} steps, {rounded(config.train.max_iters * config.tokens_per_step)} tokens"
        + _projected(run),
        "kernels": f"{config.train.kernels}{' + torch.compile' if config.train.compile else ''}"
        f"{' + CUDA graphs' if run.stepper.graphs is not None else ''}, {run.stepper.precision}"
        + (" (experimental: no GPU has confirmed it yet)" if run.stepper.precision in EXPERIMENTAL else ""),
        "device": device_name(run.device),
        "memory": _memory(run),
        "mfu": f"{flops.PALM}, of "
        + (
            f"{teraflops(peak)}, its dense {arithmetic} peak" if peak else f"n/a (no {arithmetic} peak is known for it)"
        ),
        "data": f"{config.data.data} ({config.data.tokenizer})",
        "out": str(config.train.out),
    }
    console.print("[bold]fastgpt")
    for name, text in rows.items():
        console.print(f"[bold]{name:<8}[/] {escape(text)}")
    if run.refused:
        console.print(f"[yellow]{escape(run.refused)}")
    if run.device.type == "cpu" and config.train.kernels == "triton":
        console.print(
            "[yellow]No GPU: the Triton kernels run in Triton's interpreter, one program at a time in NumPy. It shows that "
            "they compute the right thing, not how fast they are. On a CUDA GPU the same command compiles them and trains "
            "the larger demo: GPT-2's tokens, 6 layers of 384, bf16. --kernels eager trains this model in plain PyTorch."
        )


def _memory(run: Run) -> str:
    """What the step needs, by the VRAM model, and what a GPU has."""
    needed = memory(
        run.config.model,
        micro_batch=run.micro_batch,
        kernels=run.config.train.implementation,
        precision=run.stepper.precision,
        world_size=run.world.size,
    ).total
    if run.device.type != "cuda":
        return f"{gigabytes(needed, 2)} predicted for weights, optimizer, gradients and activations"
    return (
        f"{gigabytes(needed, 2)} predicted, of {gigabytes(torch.cuda.get_device_properties(run.device).total_memory)}"
    )


def _projected(run: Run) -> str:
    """How long the run may take on a card that the projection knows; "" elsewhere."""
    gpu, config = cards.present(run.device), run.config
    if gpu is None or run.world.size > 1:
        return ""
    from fastgpt.performance.projection import project

    try:
        step = project(
            anatomy.Shape.of(config.model),
            gpu,
            kernels=config.train.implementation,
            precision=run.stepper.precision,
            micro_batch=run.micro_batch,
            tokens_per_step=config.tokens_per_step,
            dropout=config.model.dropout,
        )
    except UserError:  # no projection for this precision
        return ""
    hours = [
        (config.train.max_iters - run.step) * config.tokens_per_step / rate / 3600
        for rate in (step.tokens_per_second_high, step.tokens_per_second_low)
    ]
    return f"; projected {hours[0]:,.1f} to {hours[1]:,.1f} hours at {step.tokens_per_second:,.0f} tok/s"


def describe_device(device: torch.device) -> dict[str, Any]:
    """Clock, power and temperature now, as LogLine's fields; none on a CPU, or without nvidia-ml-py."""
    moment = telemetry(device.index or 0) if device.type == "cuda" else None
    if moment is None:
        return {}
    held = ",".join(moment.throttle) if moment.throttle else None
    return {
        "clock_mhz": moment.clock_mhz,
        "power_w": moment.power_w,
        "temperature_c": moment.temperature_c,
        "throttle": held,
    }


@dataclass(frozen=True)
class LogLine:
    """One interval of a run, in the shape of nanoGPT's lines. ``loss`` is the mean over all micro-batches of the interval's
    steps, in nats; ``mfu`` the share of the nominal dense peak of this very card (None on one that is unknown, and before
    the first timed step)."""

    step: int
    max_iters: int
    loss: float
    lr: float
    grad_norm: float
    ms: float | None
    tokens_per_second: float | None
    memory_gb: float
    mfu: float | None
    data_wait: float | None
    skipped_steps: int = 0
    eta_s: float | None = None
    clock_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    throttle: str | None = None

    def __str__(self) -> str:
        def or_na(value: float | None, form: str) -> str:
            return "n/a" if value is None else form.format(value)

        parts = [
            f"iter {self.step}: loss {self.loss:.4f}",
            f"time {or_na(self.ms, '{:.2f}ms')}",
            f"mfu {or_na(self.mfu, '{:.2%}')}",
            f"{or_na(self.tokens_per_second, '{:,.0f}')} tok/s",
            f"lr {self.lr:.2e}",
            f"norm {self.grad_norm:.3f}",
            f"data {or_na(self.data_wait, '{:.1%}')}",
            f"mem {self.memory_gb:.2f} GB",
        ]
        if self.clock_mhz is not None:
            parts.append(f"{self.clock_mhz} MHz {or_na(self.power_w, '{:.0f}')} W {or_na(self.temperature_c, '{}')} C")
        if self.throttle:
            parts.append(f"held back by {self.throttle}")
        if self.skipped_steps:
            parts.append(f"skipped {self.skipped_steps}")
        if self.eta_s is not None:
            parts.append(f"eta {timedelta(seconds=round(self.eta_s))}")
        return ", ".join(parts)


class Progress:
    """How far the run is: a bar at the foot of a terminal, nothing where output goes to a file; and the time left."""

    def __init__(self, console: Console, step: int, max_iters: int) -> None:
        self._first, self._max = step, max_iters
        self._bar: RichProgress | None = None
        if console.is_terminal and not console.quiet:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
            self._bar = RichProgress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("training", total=max_iters, completed=step, left="")

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def seconds_left(self, step: int) -> float | None:
        """At the pace since the start, evaluation and checkpoints included; None before there is a pace."""
        done = step - self._first
        return (time.monotonic() - self._began) / done * (self._max - step) if done > 1 else None

    def advance(self, step: int) -> None:
        if self._bar is not None:
            left = self.seconds_left(step)
            text = "" if left is None else f"{timedelta(seconds=round(left))} left"
            self._bar.update(self._task, completed=step, left=text)
