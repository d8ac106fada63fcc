"""One training step on several backends: timed in turns, then profiled. What ``python -m bench.mfu`` measures with.

Every backend has its own model (same seed), optimizer and loader, and runs the step of the training loop (bench/steps/turns.py)
in the --precision asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.reports.results import sentence
from bench.steps import marks, roofs
from bench.steps import trace as trace_module
from bench.steps.ceilings import Ceilings
from bench.steps.turns import NOT_REACHED, Runner, Setup, Turns, random_tokens
from bench.steps.variants import BACKENDS
from fastgpt.anatomy import Shape
from fastgpt.common import UserError, is_out_of_memory
from fastgpt.hardware import cards
from fastgpt.hardware.device import device_name
from fastgpt.performance import flops

NO_CUPTI = (
    "no kernel was recorded, only the host's time, as CUPTI is missing or not permitted: install the nvidia-cuda-cupti of "
    "this torch, end other profilers, allow CAP_SYS_ADMIN in a container, or the GPU's performance counters under WSL"
)


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
    turns = Turns(device, say)
    with random_tokens(setup) as tokens, named_cpu_kernels():
        for name in names:
            turns.start(name, partial(Runner, BACKENDS[name], setup, device, tokens))
        turns.check(tokens)
        with _fitting(setup):
            turns.time(steps, budget_s)
        for name in list(turns.runners):
            found = turns.results[name]
            found |= _speed(found["ms"], setup, device, ceilings)
            if turns.stopped:
                found["profile_error"] = NOT_REACHED
                continue
            say(f"{name}: profiling")
            try:
                # A GPU's trace is large, and a step of seconds hardly varies.
                repeats = 1 if found["ms"] > 2000 else 5 if device.type == "cpu" else 3
                with turns.turn(name) as runner:
                    found |= profiled(runner, ceilings, traces / f"trace-{name}.json.gz", repeats=repeats)
            except RuntimeError as error:  # another profiler holds the device, or CUPTI is not permitted
                found["profile_error"] = sentence(error)
            except KeyboardInterrupt:
                turns.stopped, found["profile_error"] = True, NOT_REACHED
            turns.release(name)
    return turns.results


@contextmanager
def _fitting(setup: Setup) -> Iterator[None]:
    """Running out of memory inside is one sentence."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"batch is {setup.batch_size}: a step that fitted this GPU a moment ago no longer does; give a smaller --batch, or "
            "close what else uses the GPU"
        ) from error


def attribution(setup: Setup, traces: Path) -> dict[str, Any]:
    """Which operations a step of our kernels consists of, in Triton's interpreter: no time in it says anything of a GPU."""
    ceilings = Ceilings("interpreter", "", "", 0, copy_gbs=1.0, matmul_tflops={})
    with random_tokens(setup) as tokens:
        runner = Runner(BACKENDS["triton"], setup, torch.device("cpu"), tokens)
        runner()
        return profiled(runner, ceilings, traces / "trace-triton-interpreted.json.gz", repeats=1)


def profiled(runner: Runner, ceilings: Ceilings, trace: Path, *, repeats: int) -> dict[str, Any]:
    """Profile steps, keep the trace, and return the one of median length as plain values: "profile" and "rows"."""
    setup = runner.setup
    record(runner, trace, repeats)
    found = trace_module.attribute(trace_module.read_trace(trace), setup.shape, setup.batch_size * setup.seq)
    if runner.device.type == "cuda" and found.launches is None:
        raise RuntimeError(NO_CUPTI)
    sizes = (setup.shape, setup.batch_size, setup.seq)
    work = roofs.needed(
        found,
        *sizes,
        grad_accum=setup.grad_accum,
        precision=setup.precision,
        kernels=runner.kernels,
        compiled=runner.compiled,
        distinct=int(runner.loader.next_batch("cpu")[0].unique().numel()),
        optimizer=setup.optimizer,
    )
    return {
        "profile": {
            "wall_ms": found.wall_ms,
            "accounted": found.accounted,
            "unaccounted_ms": found.unaccounted,
            "overlap_ms": found.overlap_ms,
            "device_ms": found.device_ms,
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


def _speed(ms: float, setup: Setup, device: torch.device, ceilings: Ceilings) -> dict[str, Any]:
    rate = setup.tokens_per_step / (ms / 1e3)
    return {"tokens_per_second": rate, "mfu": mfu_figures(rate, setup.shape, setup.precision, device, ceilings)}


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
