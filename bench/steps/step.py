"""One training step of one preset, timed in a process of its own, so that running out of memory ends nothing else.

    python -m bench.steps.step --preset gpt2-124m --kernels triton --batch-size 8 --grad-accum 4
        [--compile default] [--cap-gb 12] [--cuda-graphs on]

The last line printed is JSON: tokens per second, milliseconds per step, MFU of the peak at that precision, peak memory, loss
of the first step; or "error".
"""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch

from bench.reports.results import sentence
from bench.reports.timing import Timing
from fastgpt import anatomy, command, common, ops
from fastgpt.command import Arg
from fastgpt.common import UserError
from fastgpt.config import EXPERIMENTAL, Config, Kernels, Precision, load_preset
from fastgpt.hardware import cards
from fastgpt.model import GPT
from fastgpt.ops import precision_for, scales_loss
from fastgpt.optim.build import build_optimizer
from fastgpt.performance import flops
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


class Timed(NamedTuple):
    timing: Timing
    first_loss: float
    last_loss: float
    skipped_steps: int
    """How many of the timed steps were skipped: they do less than the others."""


def time_steps(
    stepper: Stepper, config: Config, device: torch.device, batch_size: int, grad_accum: int, steps: int, seconds: float
) -> Timed:
    """Time optimizer steps on random tokens: at least ``steps``, more while ``seconds`` last. Raises RuntimeError if graphs
    were asked for and cannot be used."""
    shape = (grad_accum, batch_size, config.model.block_size + 1)
    tokens = torch.randint(config.model.vocab_size, shape, device=device)
    batches = [(chunk[:, :-1].contiguous(), chunk[:, 1:].contiguous()) for chunk in tokens]

    def step() -> torch.Tensor:
        return stepper(batches, grad_accum, 1e-4)[0]

    loss = step()
    first_loss = float(loss)
    if stepper.graphs is not None:
        told = stepper.graphs.capture()
        if not stepper.graphs.active:  # what follows would be timed under a wrong name
            raise RuntimeError(told)
    if device.type == "cuda":  # what is made at first use: two more steps until all is as it stays
        for _ in range(2):
            step()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    skipped = stepper.skipped_steps()
    marks = [time.perf_counter()]
    while len(marks) <= steps or marks[-1] - marks[0] < seconds:
        loss = step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # once per optimizer step: nothing beside its micro-batches
        marks.append(time.perf_counter())
    timing = Timing.of([1e3 * (end - start) for start, end in itertools.pairwise(marks)])
    return Timed(timing, first_loss, float(loss), stepper.skipped_steps() - skipped)


def measure(config: Config, args: StepConfig, device: torch.device) -> dict[str, Any]:
    """What ``main`` prints."""
    precision = precision_for(args.precision, device)
    stepper = build(
        config, device, precision,
        table=ops.get(args.kernels, precision), optimizer=args.kernels, compile=args.compile, cuda_graphs=args.cuda_graphs,
    )  # fmt: skip
    found = time_steps(stepper, config, device, args.batch_size, args.grad_accum, args.steps, args.seconds)
    rate = args.grad_accum * args.batch_size * config.model.block_size / (found.timing.median_ms / 1e3)
    per_token = flops.palm(anatomy.Shape.of(config.model))
    peak = cards.peak_flops(device, precision)
    return {
        "tokens_per_second": rate,
        "ms": found.timing.median_ms,
        "iqr_ms": found.timing.iqr_ms,
        "steps": found.timing.runs,
        "mfu": None if peak is None else rate * per_token / peak,
        "tflops": rate * per_token / 1e12,
        "formula": flops.PALM,
        "peak_memory": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
        "reserved_memory": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0,
        "first_loss": found.first_loss,
        "last_loss": found.last_loss,
        "skipped_steps": found.skipped_steps,
    }


@dataclass(frozen=True)
class StepConfig:
    preset: str = "gpt2-124m"
    """The model."""
    kernels: Kernels = "triton"
    """Ours, or plain PyTorch."""
    compile: Literal["none", "default", "max-autotune", "max-autotune-no-cudagraphs"] = "none"
    """The mode of torch.compile."""
    precision: Precision = "auto"
    """fp16-fast and fp8: --kernels triton only."""
    cuda_graphs: Literal["on", "off"] = "off"
    """Replay the step as CUDA graphs."""
    batch_size: int = 8
    """Sequences per micro-batch."""
    grad_accum: int = 4
    """Micro-batches per step."""
    cap_gb: Annotated[float, Arg("GB")] = 0.0
    """Limit this process to so many GB (10^9 bytes); 0 does not."""
    steps: int = 5
    """Timed steps, at least."""
    seconds: float = 8.0
    """Time further steps for so long."""
    device: Literal["cpu", "cuda"] = "cuda"


def main(argv: list[str]) -> int:
    """Time a training step and print its figures as one line of JSON."""
    args = command.parse(StepConfig, argv, "bench.steps.step", __doc__)
    if args.precision in EXPERIMENTAL and args.kernels != "triton":
        raise UserError(f"precision is {args.precision}, which only --kernels triton has")
    device = torch.device(args.device)
    if args.cap_gb:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gb * 1e9 / total))
    try:
        result = measure(load_preset(args.preset, args.device), args, device)
    except torch.OutOfMemoryError:
        result = {"error": "out of memory", "oom": True}
    except Exception as error:
        result = {"error": sentence(error)}
        if "out of memory" in str(error):  # torch.compile wraps what its autotuning runs into
            result["oom"] = True
    print(json.dumps(result))
    return 1 if "error" in result else 0


if __name__ == "__main__":
    common.run(main)
