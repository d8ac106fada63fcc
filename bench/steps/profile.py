"""One training step on several backends: timed in turns, then profiled. What ``python -m bench.mfu`` measures with.

Every backend has its own model (same seed), optimizer and loader, and runs the step of the training loop (bench.steps.step)
in the --precision asked for. Turns are timed by the host's clock with the device synchronised: launch overhead and waiting
count, as they do in training.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from bench.reports import timing
from bench.reports.results import sentence
from bench.steps import marks, roofs
from bench.steps import step as step_module
from bench.steps import trace as trace_module
from bench.steps.ceilings import Ceilings
from bench.steps.variants import BACKENDS
from fastgpt import anatomy, ops
from fastgpt.anatomy import Shape
from fastgpt.common import UserError
from fastgpt.config import EXPERIMENTAL, PLAIN, Config, ModelConfig
from fastgpt.data.loader import TokenLoader
from fastgpt.hardware import cards
from fastgpt.hardware.device import device_name
from fastgpt.ops import autocast
from fastgpt.performance import flops

LOSS_TOLERANCE = {"fp32": 1e-3}
"""Where it is not step.LOSS_TOLERANCE: the largest difference between a backend's first loss and eager's. Eager has no
experimental mode: the loss is then taken in config.PLAIN's precision."""


@dataclass(frozen=True)
class Setup:
    """What is measured: model, batch geometry, precision."""

    model: str
    config: ModelConfig
    batch_size: int
    grad_accum: int
    precision: str

    @property
    def shape(self) -> Shape:
        return Shape.of(self.config)

    @property
    def seq(self) -> int:
        return self.config.block_size

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq * self.grad_accum

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "shape": asdict(self.shape),
            "parameters": anatomy.n_params(self.shape, positions=False),
            "batch_size": self.batch_size,
            "seq": self.seq,
            "grad_accum": self.grad_accum,
            "tokens_per_step": self.tokens_per_step,
            "precision": self.precision,
        }


class Runner:
    """``runner()`` is one optimizer step of a backend, loading included, until the device has done it; returns its loss."""

    def __init__(self, backend: str, setup: Setup, device: torch.device, tokens: Path):
        kernels, mode = BACKENDS[backend].kernels, BACKENDS[backend].compile
        self.setup, self.device, self.kernels, self.compiled = setup, device, kernels, mode != "none"
        table = ops.get(kernels, setup.precision)
        config = Config(model=setup.config)
        self.stepper = step_module.build(config, device, setup.precision, table=table, optimizer=kernels, compile=mode)
        self.loader = TokenLoader([tokens], setup.seq, setup.batch_size)

    def __call__(self) -> float:
        loss = self.stepper(self.batches(), self.setup.grad_accum, 1e-4)[0]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return float(loss)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.setup.grad_accum):
            with record_function(trace_module.DATA):
                x, y = self.loader.next_batch(self.device)
            yield x, y


@contextmanager
def random_tokens(setup: Setup) -> Iterator[Path]:
    """A file of random tokens, as nanoGPT writes them: the real loader reads it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        count = max(64 * setup.batch_size, 256) * setup.seq + 1
        np.random.default_rng(0).integers(setup.config.vocab_size, size=count).astype(np.uint16).tofile(path)
        yield path


@contextmanager
def named_cpu_kernels() -> Iterator[None]:
    """Inductor's C++ kernels appear in a trace only if they are compiled under this switch."""
    import torch._inductor.config as inductor

    before = inductor.cpp.enable_kernel_profile
    inductor.cpp.enable_kernel_profile = True
    try:
        yield
    finally:
        inductor.cpp.enable_kernel_profile = before


def measure(
    names: list[str],
    setup: Setup,
    device: torch.device,
    ceilings: Ceilings,
    *,
    steps: int,
    traces: Path,
    say: Any = lambda text: None,
    budget_s: float | None = None,
) -> dict[str, dict[str, Any]]:
    """Time the backends in turns, profile a step of each, and judge it: name -> figures, or {"error": sentence}.

    A backend that fails is reported and the others go on. One whose first loss is not eager's gets no speed.
    Chrome traces go to ``traces``/trace-NAME.json.gz.
    """
    results: dict[str, dict[str, Any]] = {}
    runners: dict[str, Runner] = {}
    with random_tokens(setup) as tokens, named_cpu_kernels():
        for name in names:
            say(f"{name}: first steps")
            try:
                runners[name], results[name] = _start(name, setup, device, tokens)
            except Exception as error:  # no compiler, no memory, an operation that this backend lacks
                results[name] = {"error": sentence(error)}
        expected = results.get("eager", {}).get("first_loss")
        if runners and setup.precision in EXPERIMENTAL:
            say("eager: the loss to compare with")
            with _fitting(setup, runners):
                expected = plain_loss(setup, device, tokens)
        _withhold_wrong(results, runners, expected, LOSS_TOLERANCE.get(setup.precision, step_module.LOSS_TOLERANCE))
        skipped = {name: runner.stepper.skipped_steps() for name, runner in runners.items()}
        if runners:
            say(f"timing {', '.join(runners)} in turns")
            # With the CPU's timer: what counts is the host's clock around a whole step, synchronised at its end.
            clock = torch.device("cpu")
            with _fitting(setup, runners):
                times = timing.interleave(runners, clock, rounds=steps, warmup=1, cold=False, budget_s=budget_s)
        for name, runner in runners.items():
            say(f"{name}: profiling")
            results[name] |= _speed(times[name], setup, device, ceilings)
            results[name]["skipped_steps"] = runner.stepper.skipped_steps() - skipped[name]
            try:
                # A GPU's trace is large, and a step of seconds hardly varies.
                repeats = 1 if times[name].median_ms > 2000 else 5 if device.type == "cpu" else 3
                results[name] |= profiled(runner, ceilings, traces / f"trace-{name}.json.gz", repeats=repeats)
            except RuntimeError as error:  # another profiler holds the device, or CUPTI is not permitted
                results[name]["profile_error"] = sentence(error)
    return results


@contextmanager
def _fitting(setup: Setup, runners: dict[str, Runner]) -> Iterator[None]:
    """Running out of memory inside is one sentence."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"batch is {setup.batch_size}: {len(runners)} backends side by side do not fit this GPU; give a smaller --batch or "
            "fewer --backends"
        ) from error


def _start(name: str, setup: Setup, device: torch.device, tokens: Path) -> tuple[Runner, dict[str, Any]]:
    """Build a backend and run it warm: its first loss, how long its first steps took, its peak memory."""
    start, before = time.perf_counter(), _allocated(device)
    runner = Runner(name, setup, device, tokens)
    loss = runner()
    runner()
    seconds = time.perf_counter() - start
    return runner, {"first_loss": loss, "start_s": seconds, "peak_memory": _peak_memory(runner, device, before)}


def plain_loss(setup: Setup, device: torch.device, tokens: Path) -> float:
    """The first loss of plain PyTorch, in the 16 bits that an experimental mode is made of: same weights, same tokens."""
    plain = replace(setup, precision=PLAIN[setup.precision])
    runner = Runner("eager", plain, device, tokens)
    model, total = runner.stepper.model, 0.0
    with torch.no_grad(), autocast(device, plain.precision):
        for x, y in runner.batches():
            for i in range(len(x)):  # whole logits of one sequence at a time: ours need no room for more
                total += float(model(x[i : i + 1], y[i : i + 1])[1])
    return total / (setup.grad_accum * setup.batch_size)


def attribution(setup: Setup, traces: Path) -> dict[str, Any]:
    """Which operations a step of our kernels consists of, in Triton's interpreter: no time in it says anything of a GPU."""
    ceilings = Ceilings("interpreter", "", "", 0, copy_gbs=1.0, matmul_tflops={})
    with random_tokens(setup) as tokens:
        runner = Runner("triton", setup, torch.device("cpu"), tokens)
        runner()
        return profiled(runner, ceilings, traces / "trace-triton-interpreted.json.gz", repeats=1)


def profiled(runner: Runner, ceilings: Ceilings, trace: Path, *, repeats: int) -> dict[str, Any]:
    """Profile steps, keep the trace, and return the one of median length as plain values: "profile" and "rows"."""
    setup = runner.setup
    record(runner, trace, repeats)
    found = trace_module.attribute(trace_module.read_trace(trace), setup.shape, setup.batch_size * setup.seq)
    sizes = (setup.shape, setup.batch_size, setup.seq)
    work = roofs.needed(
        found,
        *sizes,
        grad_accum=setup.grad_accum,
        precision=setup.precision,
        kernels=runner.kernels,
        compiled=runner.compiled,
        distinct=int(runner.loader.next_batch("cpu")[0].unique().numel()),
    )
    return {
        "profile": {
            "wall_ms": found.wall_ms,
            "accounted": found.accounted,
            "unaccounted_ms": found.unaccounted,
            "overlap_ms": found.overlap_ms,
            "kernels": {op.name: op.kernels for op in found.operations},
            "trace": trace.name,
        },
        "launches": found.launches,
        "rows": roofs.judge(found, work, ceilings, *sizes, setup.precision),
    }


def record(runner: Runner, trace: Path, repeats: int) -> None:
    """Run steps under torch.profiler and export a Chrome trace."""
    activities = [ProfilerActivity.CPU]
    if runner.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with (
        marks.marked(runner.setup.shape),
        profile(activities=activities, record_shapes=True) as recorder,
    ):
        for _ in range(repeats):
            with record_function(trace_module.STEP):
                runner()
    recorder.export_chrome_trace(str(trace))


def _speed(found: timing.Timing, setup: Setup, device: torch.device, ceilings: Ceilings) -> dict[str, Any]:
    rate = setup.tokens_per_step / (found.median_ms / 1e3)
    return {
        "ms": found.median_ms,
        "iqr_ms": found.iqr_ms,
        "runs": found.runs,
        "tokens_per_second": rate,
        "mfu": mfu_figures(rate, setup.shape, setup.precision, device, ceilings),
    }


def mfu_figures(
    tokens_per_second: float, shape: Shape, precision: str, device: torch.device, ceilings: Ceilings
) -> list[dict[str, Any]]:
    """The same speed as a share of three limits; each names its formula and its denominator. None where one is not known."""
    arithmetic = cards.arithmetic_of(precision)
    card = device_name(device)
    limits = (
        ("of the nominal peak", cards.peak_flops(device, precision), f"nominal dense {arithmetic} peak of {card}"),
        ("of the measured ceiling", ceilings.peak_flops(arithmetic), f"{arithmetic} matmul measured on {card}"),
        ("nanoGPT's own", cards.NANOGPT_PEAK, "an A100's dense bf16 peak, whatever the card"),
    )
    per_token = flops.palm(shape)
    return [
        {
            "name": name,
            "value": None if limit is None else tokens_per_second * per_token / limit,
            "formula": flops.PALM,
            "flops_per_token": per_token,
            "denominator_tflops": None if limit is None else limit / 1e12,
            "denominator": denominator,
        }
        for name, limit, denominator in limits
    ]


def _withhold_wrong(
    results: dict[str, dict[str, Any]], runners: dict[str, Runner], expected: float | None, tolerance: float
) -> None:
    for name in list(runners):
        if expected is None:
            return
        if reason := step_module.wrong_loss(results[name]["first_loss"], expected, "eager's", tolerance):
            results[name] = {"error": reason}
            del runners[name]


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _peak_memory(runner: Runner, device: torch.device, before: int) -> int | None:
    """What this backend keeps between steps and what a step adds to it at its peak; None on a CPU."""
    kept = _allocated(device) - before
    step = timing.peak_memory(runner, device)
    return None if step is None else kept + step
