"""What a run says on the terminal: a table at the start, one line per interval, a progress bar where there is a terminal."""

from __future__ import annotations

import math
import textwrap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from fastgpt import anatomy
from fastgpt.common import UserError, as_typed, duration, gigabytes, millions, rounded, styled, teraflops
from fastgpt.config import EXPERIMENTAL, load_preset
from fastgpt.data.tokenizer import CHARS
from fastgpt.hardware import cards, requirements
from fastgpt.hardware.device import device_name
from fastgpt.mfu import StepReport
from fastgpt.performance.fitting import free_bytes
from fastgpt.performance.memory import memory
from fastgpt.training.run import Run

if TYPE_CHECKING:
    from rich.console import Console

    from fastgpt.performance.projection import Projection

# GPT-2 124M: 21 kernels, 9 s of one core with triton 3.7 where nothing else runs.
COMPILE = "about 25 kernels in the first step: 10 s to 1 min, kept in ~/.triton/cache"
SAY_SECONDS = 5.0
INTERPRETED = (
    "No GPU: the Triton kernels run in Triton's interpreter, which shows that they compute the right thing, not how fast they "
    "are. On a CUDA GPU the same command compiles them{demo}. --kernels eager trains this model in plain PyTorch."
)
LARGER_DEMO = " and trains the larger demo: GPT-2's tokens, 6 layers of 384, bf16"
LABEL = 9
"""Columns before the text of a row at the start and at the end."""


def banner(console: Console, run: Run) -> None:
    """Say what will run, on what, and, without a GPU, what one would change."""
    config, shape, precision = run.config, run.config.model, run.stepper.precision
    compiled = " + torch.compile" if config.train.compile else ""
    graphs = " + CUDA graphs" if run.stepper.graphs is not None else ""
    unconfirmed = " (experimental: no GPU has confirmed it yet)" if precision in EXPERIMENTAL else ""
    arithmetic, peak = cards.arithmetic_of(precision), cards.peak_flops(run.device, precision)
    needed = memory(
        shape,
        micro_batch=run.micro_batch,
        kernels=config.train.implementation,
        precision=precision,
        world_size=run.world.size,
        optimizer=config.optim.optimizer,
    ).total
    if run.device.type == "cuda":
        room = f", of the GPU's {gigabytes(torch.cuda.get_device_properties(run.device).total_memory)}"
    else:
        room = f"; {gigabytes(free_bytes(run.device.type))} of main memory are free"
    projection = _projected(run)
    # The doctor finds in a log what stands at the beginning of a row (doctor/reading/log_formats.toml).
    rows = {
        "model": f"{millions(anatomy.n_params(shape, positions=False))} parameters (excluding position embeddings): "
        f"{shape.in_words}",
        "data": _data(run),
        "step": f"{config.tokens_per_step:,} tokens: micro-batches of {run.micro_batch} x {shape.block_size}"
        + (f", {run.grad_accum} in a step" if run.grad_accum > 1 else ""),
        **({"ranks": f"{run.world.size} ({config.train.parallel})"} if run.world.size > 1 else {}),
        "run": _steps(run),
        "time": _hours(run, projection),
        "kernels": f"{config.train.kernels}{compiled}{graphs}, {precision}{unconfirmed}",
        "device": device_name(run.device),
        "memory": f"{gigabytes(needed, 2)} predicted{room}",
        **({"mfu": f"of {teraflops(peak)}, its dense {arithmetic} peak, by PaLM's 6N + 12LCT"} if peak else {}),
        "out": str(config.train.out),
    }
    if projection is not None and run.stepper.graphs is None:
        from fastgpt.performance.step_time import WAITING

        waiting = sum(op.ms for op in projection.operations if op.name == WAITING) / projection.ms_per_step
        if waiting >= 0.01:
            rows["host"] = (
                f"projected: the GPU waits {waiting:.0%} of a step for Python to launch its kernels; larger micro-batches or "
                "--cuda-graphs on hide that"
            )
    if run.device.type == "cuda" and config.train.kernels == "triton":
        rows["compile"] = COMPILE
    console.print(styled(("fastgpt", "bold")))
    for name, text in rows.items():
        for i, line in enumerate(textwrap.wrap(text, console.width - LABEL, **_WHOLE_WORDS)):
            console.print(
                styled(("" if i else name).ljust(LABEL), line) if i else styled((name.ljust(LABEL), "bold"), line)
            )
    notes = [run.refused] if run.refused else []
    unable = requirements.no_triton(run.device.type)
    if config.train.kernels == "eager" and unable:
        why = unable.partition(": ")[0]
        notes.append(f"{why}: the model trains in plain PyTorch, --kernels eager")
    if run.device.type == "cpu" and config.train.kernels == "triton":
        demo = load_preset("demo")
        same = config.config is None and (config.model, config.data) == (demo.model, demo.data)
        notes.append(INTERPRETED.format(demo=LARGER_DEMO if same else ""))
    for note in notes:
        console.print(styled((textwrap.fill(note, console.width, **_WHOLE_WORDS), "yellow")))


_WHOLE_WORDS: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}  # flags and paths among them


def ending(run: Run, loss: float | None, text: str | None) -> Iterator[str]:
    """What is said when all steps are done: the validation loss, some of the model's text, where all is, what to do next."""
    out = run.config.train.out
    word = f'"{out}"' if " " in str(out) else out  # in a shell
    done = f"{run.step:,} steps, {rounded(run.tokens(run.step))} tokens"
    if loss is not None:
        done += f"; validation loss {loss:.4f}, best {run.best_val_loss:.4f}"
    rows = {
        "done": [done],
        "text": [line[: 80 - LABEL] for line in (text or "").strip().splitlines()[:6]],
        "out": [f"{out}: checkpoints, metrics.jsonl, config.json"],
        "next": [as_typed(f"python -m fastgpt.{name} {word}") for name in ("sample", "plot")],
    }
    for name, lines in rows.items():
        for i, line in enumerate(lines):
            yield f"{'' if i else name:<{LABEL}}{line}"


def _data(run: Run) -> str:
    """The corpus: how large it is, and what was left out of it."""
    config = run.config
    vocabulary = f", {run.corpus.tokenizer.vocab_size} letters" if run.corpus and config.data.tokenizer == CHARS else ""
    text = (
        f"{config.data.data} ({config.data.tokenizer}{vocabulary}): {rounded(run.train_loader.tokens)} tokens, and "
        f"{rounded(run.val_loader.tokens)} to validate"
    )
    return f"{text}; left out: {run.corpus.skipped}" if run.corpus and run.corpus.skipped else text


def _steps(run: Run) -> str:
    """How much the run reads, and how often it reads the corpus."""
    steps, read = run.config.train.max_iters, run.tokens(run.config.train.max_iters)
    epochs = read / run.train_loader.tokens
    share = f"{100 * epochs:.2g}%" if epochs < 0.1 else f"{epochs:.0%}"
    return (
        f"{steps:,} steps, {rounded(read)} tokens: {f'{epochs:.3g} epochs' if epochs > 1 else f'{share} of the data'}"
    )


def _projected(run: Run) -> Projection | None:
    """A step on this card, if the projection knows it."""
    gpu, config = cards.present(run.device), run.config
    if gpu is None or run.world.size > 1:
        return None
    from fastgpt.performance.projection import project

    try:
        return project(
            anatomy.Shape.of(config.model),
            gpu,
            kernels=config.train.implementation,
            precision=run.stepper.precision,
            micro_batch=run.micro_batch,
            tokens_per_step=config.tokens_per_step,
            dropout=config.model.dropout,
            optimizer=config.optim.optimizer,
        )
    except UserError:  # no projection for this precision
        return None


def _hours(run: Run, step: Projection | None) -> str:
    """How long the rest of the run may take."""
    if step is None:
        return "the log lines say how much is left"
    left = run.config.train.max_iters - run.step
    ends = [duration(1e-3 * left * ms) for ms in (step.ms_per_step_low, step.ms_per_step_high)]
    return f"projected {' to '.join(dict.fromkeys(ends))}, {step.tokens_per_second:,.0f} tok/s"


@contextmanager
def compiling_shown(run: Run, console: Console, bar: Any) -> Iterator[None]:
    """Inside, say what Triton compiles for the GPU: each kernel on the bar, and a line every few seconds."""
    if run.device.type != "cuda" or run.config.train.kernels != "triton":
        yield
        return
    from triton import knobs

    hooks = knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook
    count, seconds, began, said = 0, 0.0, 0.0, time.monotonic()

    def before(*, fn: Any, **_: Any) -> None:
        nonlocal began
        began = time.monotonic()
        bar.update(bar.task_ids[0], description=f"compiling {fn.name}")

    def after(*, fn: Any, **_: Any) -> None:
        nonlocal count, seconds, said
        count, seconds = count + 1, seconds + time.monotonic() - began
        bar.update(bar.task_ids[0], description="training")
        if time.monotonic() - said >= SAY_SECONDS:
            said = time.monotonic()
            console.print(f"compiled {count} kernels in {seconds:.0f} s, {fn.name} last", markup=False)

    knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = before, after
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook, knobs.runtime.jit_post_compile_hook = hooks


def interval(run: Run, report: StepReport, losses: list[float], seconds_left: float | None) -> dict[str, Any]:
    """What a log interval adds to the record of its last step in metrics.jsonl. ``interval_loss`` is the mean over all
    micro-batches of the interval's steps, in nats; ``mfu`` the share of the nominal dense peak of this very card; speeds are
    None before the first timed step. ``memory_gb`` (1e9 bytes) is the most that torch has allocated on a GPU so far; on a CPU
    what is resident in this process now, None without psutil. Clock, power and temperature where nvidia-ml-py tells them."""
    rate, on_cuda = report.tokens_per_second, run.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(run.device) if on_cuda else _resident()
    moment = None
    if on_cuda:
        from fastgpt.hardware.telemetry import telemetry

        moment = telemetry(run.device.index or 0)
    return {
        "interval_loss": math.fsum(losses) / len(losses),
        "ms": report.ms_per_step,
        "tokens_per_second": None if rate is None else rate * run.world.size,
        "memory_gb": memory and memory / 1e9,
        "mfu": report.mfu,
        "data_wait": report.data_wait,
        "skipped_steps": run.stepper.skipped_steps(),
        "eta_s": seconds_left,
        "clock_mhz": moment and moment.clock_mhz,
        "power_w": moment and moment.power_w,
        "temperature_c": moment and moment.temperature_c,
        "throttle": moment and (",".join(moment.throttle or ()) or None),
    }


def _resident() -> int | None:
    """Bytes of memory that this process holds now."""
    try:
        import psutil
    except ImportError:
        return None
    return psutil.Process().memory_info().rss


LEAST_WAIT = 0.05
"""The share of the time spent waiting for data from which on every log line says it."""


def log_line(record: Mapping[str, Any], verbose: bool = False) -> str:
    """The record of an interval's last step, in the shape of nanoGPT's lines: at most 100 columns, all that is known where
    ``verbose``. What is not known is left out."""

    def shown(name: str, form: str) -> list[str]:
        return [] if record.get(name) is None else [form.format(record[name])]

    ms, eta, wait = record.get("ms"), record.get("eta_s"), record.get("data_wait")
    parts = [
        f"iter {record['step']}: loss {record['interval_loss']:.4f}",
        *shown("ms", "time {:.2f}ms" if ms is not None and ms < 1000 else "time {:.0f}ms"),
        *shown("mfu", "mfu {:.1%}"),
        *shown("tokens_per_second", "{:,.0f} tok/s"),
        f"lr {record['lr']:.2e}",
        f"norm {record['grad_norm']:.3g}",
    ]
    if eta is not None and eta < 1e10:  # 2^63 steps are a run that goes on until it is stopped
        parts.append(f"eta {duration(eta) if eta < 7200 else f'{eta / 3600:.3g} h'}")
    if wait is not None and (verbose or wait >= LEAST_WAIT):
        parts.append(f"data {wait:.1%}" if verbose else f"data {wait:.0%}")
    if verbose:
        parts += shown("memory_gb", "mem {:.2f} GB")
        card = [*shown("clock_mhz", "{} MHz"), *shown("power_w", "{:.0f} W"), *shown("temperature_c", "{} C")]
        parts += [" ".join(card)] if card else []
        parts += shown("throttle", "held back by {}")
        parts += [f"skipped {record['skipped_steps']}"] if record.get("skipped_steps") else []
    return ", ".join(parts)


class NoBar(nullcontext):
    """Stands in for ``progress_bar``'s where rich is not installed: nothing is shown, and the time left is not known."""

    task_ids, time_remaining = (0,), None

    @property
    def tasks(self) -> list[NoBar]:
        return [self]

    def update(self, *_: Any, **__: Any) -> None:
        pass


def progress_bar(console: Console, step: int, max_iters: int) -> Any:
    """How far the run is: a bar at the foot of a terminal, nothing where output goes to a file. Its one task knows the time
    left, evaluation and checkpoints included."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return NoBar()

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=math.inf,  # the pace of the whole run: evaluation is a matter of every few hundred steps
        transient=True,
        disable=console.quiet or not console.is_terminal,
    )
    bar.add_task("training", total=max_iters, completed=step)
    return bar
