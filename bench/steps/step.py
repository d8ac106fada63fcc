"""Training steps of one preset, timed in turns, in a process of their own:

    python -m bench.steps.step --variants eager,compile,triton --batch-size 8
    python -m bench.steps.step --preset gpt2-40m --batch-size 8,16,32,64

The last line printed is JSON: ``{"steps": [...]}``, each with tokens per second, milliseconds per step, MFU of the peak at that
precision, peak memory, loss of the first step; or "error". Of several batch sizes all have the tokens per step of the largest.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch

from bench.steps.build import updates_left_out
from bench.steps.turns import Runner, Setup, Turns, random_tokens
from bench.steps.variants import VARIANTS
from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import UserError, at_least, unknown
from fastgpt.config import load_preset
from fastgpt.hardware import cards
from fastgpt.ops import precision_for
from fastgpt.performance import flops


def figures(setup: Setup, found: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What ``Turns`` has found, as one of the steps that ``main`` prints."""
    about = {"preset": setup.model, "batch_size": setup.batch_size, "grad_accum": setup.grad_accum}
    reason = updates_left_out(found.get("skipped_steps", 0))
    if "ms" not in found or reason:
        return (
            about
            | {key: found[key] for key in ("oom", "first_loss") if key in found}
            | {"error": reason or found.get("error", "not run")}
        )
    rate, per_token = setup.tokens_per_step / (found["ms"] / 1e3), flops.palm(setup.shape)
    peak = cards.peak_flops(device, setup.precision)
    return (
        about
        | found
        | {
            "tokens_per_second": rate,
            "mfu": None if peak is None else rate * per_token / peak,
            "tflops": rate * per_token / 1e12,
            "formula": flops.PALM,
        }
    )


def measure(args: StepConfig, device: torch.device) -> list[dict[str, Any]]:
    """The steps of all variants and batch sizes. Raises UserError for a name or a size that cannot be."""
    names, sizes = args.variants.split(","), _sizes(args.batch_size)
    for name in names:
        if name not in VARIANTS:
            raise UserError(unknown("variants", name, VARIANTS))
    at_least(1, grad_accum=args.grad_accum, steps=args.steps)
    config, largest = load_preset(args.preset, args.device), max(sizes)
    turns = Turns(device, say=lambda text: print(text, file=sys.stderr, flush=True))
    setups: dict[str, tuple[str, Setup]] = {}
    for size in sizes:
        for name in names:
            precision = precision_for(VARIANTS[name].precision, device)
            accum, optimizer = args.grad_accum * largest // size, config.optim.optimizer
            setup = Setup(args.preset, config.model, size, accum, precision, optimizer)
            setups[name if len(sizes) == 1 else f"{name}, batch {size}"] = name, setup
    with random_tokens(Setup(args.preset, config.model, largest, 1, "")) as tokens:
        for key, (name, setup) in setups.items():
            turns.start(key, partial(Runner, VARIANTS[name], setup, device, tokens))
        turns.check(tokens)
        turns.time(args.steps, args.seconds)
    return [
        {"variant": name, "cap_gb": args.cap_gb} | figures(setup, turns.results[key], device)
        for key, (name, setup) in setups.items()
    ]


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1 or any(max(sizes) % size for size in sizes):
        raise UserError(
            f"batch_size is {text!r}: it must be a number, or some that divide the largest, such as 8,16,32"
        )
    return sizes


@dataclass(frozen=True)
class StepConfig:
    preset: str = "gpt2-124m"
    """The model."""
    variants: Annotated[str, Arg("NAME,NAME")] = "triton"
    """Names of bench/steps/variants.py."""
    batch_size: Annotated[str, Arg("N,N")] = "8"
    """Sequences per micro-batch; several are compared."""
    grad_accum: int = 4
    """Micro-batches per step, of the largest batch size."""
    cap_gb: Annotated[float, Arg("GB")] = 0.0
    """Limit this process to so many GB (10^9 bytes); 0 does not."""
    steps: int = 8
    """Timed steps of each."""
    seconds: float = 60.0
    """End the timing after so long, once each has had three turns."""
    device: Literal["cpu", "cuda"] = "cuda"


def main(argv: list[str]) -> int:
    """Time training steps and print their figures as one line of JSON."""
    args = command.parse(StepConfig, argv, "bench.steps.step", __doc__)
    device = torch.device(args.device)
    if args.cap_gb:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gb * 1e9 / total))
    steps = measure(args, device)
    print(json.dumps({"steps": steps}))
    return 0 if all("error" not in step for step in steps) else 1


if __name__ == "__main__":
    common.run(main)
