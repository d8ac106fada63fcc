"""What a training step would take on a GPU that is not here, operation by operation: projected, never measured.

    python -m bench.project --gpu rtx4070 --model gpt2-124m                    this repository's kernels, bf16
    python -m bench.project --gpu rtx4070 --kernels nanogpt-compile
    python -m bench.project --gpu rtx4070 --precision fp16-fast
    python -m bench.project --gpu rtx4090 --model gpt2-350m --batch 8 --json
    python -m bench.project --calibration                                      fit again: how far off the model is known to be
    python -m bench.project --measured results.json                            beside what was measured on a GPU

Figures are low / central / high. The model, its constants with their sources and its errors: docs/projection.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.markup import escape

from bench.reports import calibration
from bench.reports.tables import Cells, print_table, terminal
from fastgpt import command, common
from fastgpt.anatomy import Shape
from fastgpt.command import Arg
from fastgpt.common import UserError
from fastgpt.config import load_preset, preset_names
from fastgpt.hardware import cards
from fastgpt.hardware.cards import Gpu
from fastgpt.performance.flops import PALM
from fastgpt.performance.projection import Projection, Sensitivity, calibration_error, project
from fastgpt.performance.step_time import CONSTANTS, Chip


@dataclass(frozen=True)
class ProjectConfig:
    gpu: str = "rtx4070"
    """rtx4070, rtx4090, h100, ...: python -m fastgpt.hardware NAME."""
    model: Annotated[str, Arg("PRESET")] = "gpt2-124m"
    """A preset."""
    kernels: str = "triton"
    """nanogpt-compile, eager, compile or triton."""
    precision: str = "bf16"
    """bf16, fp16, fp16-fast or fp8."""
    batch: int | None = None
    """Sequences per micro-batch. Without it: the preset's."""
    seq: Annotated[int | None, Arg("T")] = None
    """Tokens per sequence. Without it: the preset's block size."""
    tokens_per_step: int | None = None
    """Without it: as near to the preset's as --batch and --seq allow."""
    dropout: Annotated[float | None, Arg("P")] = None
    """Without it: the preset's."""
    json: bool = False
    """Print JSON instead of tables."""
    calibration: bool = False
    """Show the fits, every public figure, and the constants."""
    measured: Annotated[Path | None, Arg("FILE")] = None
    """A results file of bench.mfu, bench.gpu or bench.kernels."""


def main(argv: list[str]) -> int:
    """Project, and print. Raises UserError for bad input."""
    args = command.parse(ProjectConfig, argv, "bench.project", __doc__)
    console = terminal(130)
    if args.measured:
        return _measured(args.measured, args.json, console)
    if args.calibration:
        return calibration.report(args.json, console)
    gpu = cards.card(args.gpu)
    found = projected(args, gpu)
    assumed = assumptions(found, gpu)
    if args.json:
        print(json.dumps({**found.to_json(), "assumptions": assumed}, indent=1))
    else:
        show(found, args.model, assumed, console)
    return 0


def projected(args: ProjectConfig, gpu: Gpu) -> Projection:
    if args.model not in preset_names():
        raise UserError(f"model is {args.model!r}: it can be {', '.join(preset_names())}")
    preset = load_preset(args.model, "cuda")
    shape, T = Shape.of(preset.model), preset.model.block_size if args.seq is None else args.seq
    batch = preset.data.batch_size if args.batch is None else args.batch
    dropout = preset.model.dropout if args.dropout is None else args.dropout
    for flag, value in (("batch", batch), ("seq", T)):
        if value < 1:
            raise UserError(f"{flag} is {value}: it must be at least 1")
    if T > shape.block_size:
        raise UserError(f"seq is {T}: {args.model} has a block_size of {shape.block_size}, so give at most that")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout is {dropout}: it must lie in [0, 1)")
    tokens = args.tokens_per_step
    if tokens is None:
        tokens = max(1, round(preset.tokens_per_step / (batch * T))) * batch * T
    return project(
        shape,
        gpu,
        kernels=args.kernels,
        precision=args.precision,
        micro_batch=batch,
        tokens_per_step=tokens,
        T=T,
        dropout=dropout,
        optimizer=preset.optim.optimizer,
    )


# ---------------------------------------------------------------- a projection


def show(found: Projection, model: str, assumed: list[str], console: Console) -> None:
    """The step and every operation of it."""
    console.print(
        f"\n[bold]{escape(found.gpu)}[/], {escape(model)}, {found.kernels}, {found.precision}: [bold]{found.status}[/]\n"
        f"{found.tokens_per_step:,} tokens per step: {found.grad_accum} micro-batches of {found.micro_batch} x {found.T}",
        soft_wrap=True,
    )
    print_table(console, f"The step ({found.status})", step_cells(found))
    console.print(
        f"MFU: {PALM}, of the {found.mfu_of}; as nanoGPT prints it, of an A100's 312 TFLOP/s.",
        soft_wrap=True,
    )
    print_table(console, f"Operations of a step, projected ({found.status})", operation_cells(found))
    for line in ("Assumed: " + "; ".join(assumed) + ".", _most(found.sensitivities), INTERVAL):
        console.print(escape(line), soft_wrap=True)


INTERVAL = (
    "low to high: the largest error of the model among cases that it was not fitted on, and in quadrature what the constants "
    "could change here that no such case shows. python -m bench.project --calibration shows every case."
)


def step_cells(found: Projection) -> Cells:
    """Speed as low / central / high: the low speed is the high time."""
    rates = (found.tokens_per_second_low, found.tokens_per_second, found.tokens_per_second_high)
    times = (found.ms_per_step_high, found.ms_per_step, found.ms_per_step_low)

    def shares(central: float) -> list[str]:
        return [f"{central * rate / found.tokens_per_second:.1%}" for rate in rates]

    return [
        ["projected", "low", "central", "high"],
        ["tokens/s", *(f"{rate:,.0f}" for rate in rates)],
        ["ms per step", *(f"{ms:,.0f}" for ms in times)],
        ["MFU", *shares(found.mfu)],
        ["MFU as nanoGPT prints it", *shares(found.mfu_nanogpt)],
    ]


def operation_cells(found: Projection) -> Cells:
    """Longest first; the gaps last, and their sum."""
    gaps = [op for op in found.operations if op.bound == "launch"]
    ops = sorted((op for op in found.operations if op.bound != "launch"), key=lambda op: -op.ms)
    rows = [["operation", "ms", "share", "TFLOP", "GB", "kernels", "bound by"]]
    for op in [*ops, *gaps]:
        work = [f"{op.flops / 1e12:,.1f}" if op.flops else "-", f"{op.bytes / 1e9:,.1f}" if op.bytes else "-"]
        launches = f"{op.launches:,}" if op.launches else "-"
        rows.append([op.name, f"{op.ms:,.1f}", f"{op.ms / found.ms_per_step:.1%}", *work, launches, op.bound])
    flops, moved, launches = (sum(getattr(op, key) for op in ops) for key in ("flops", "bytes", "launches"))
    total = [f"{found.ms_per_step:,.1f}", "100.0%", f"{flops / 1e12:,.1f}", f"{moved / 1e9:,.1f}", f"{launches:,}", ""]
    return [*rows, ["sum", *total]]


def _most(varied: list[Sensitivity], count: int = 3) -> str:
    parts = [f"{s.constant} ({_span(s)})" for s in varied[:count] if max(abs(s.at_low), abs(s.at_high)) > 5e-4]
    return "Beyond what measured cases show, it depends on " + (", ".join(parts) or "no constant") + "."


def _span(s: Sensitivity) -> str:
    return f"{s.at_low:+.1%} at its low end, {s.at_high:+.1%} at its high end"


def assumptions(found: Projection, gpu: Gpu) -> list[str]:
    """What a projection for ``gpu`` takes for granted."""
    kernels, precision = found.kernels, found.precision
    chip = Chip(gpu, precision, CONSTANTS)
    said = [
        f"SM clock {chip.hz / 1e6:,.0f} MHz, "
        + ("nominal" if chip.clock == CONSTANTS.clock_full_rate else "from the fit on the 124M RTX 4070 run"),
        f"memory {chip.memory_efficiency:.0%} of {gpu.memory_gbs:g} GB/s (fixed)",
        "kernels run one after the other; data loading, evaluation and checkpoints are left out",
    ]
    if precision in ("fp16-fast", "fp8"):
        arithmetic = cards.arithmetic_of(precision)
        doubled = (gpu.peak_flops(arithmetic) or 0) > 1.01 * (gpu.peak_flops("fp16") or 0)
        ratio = f"{CONSTANTS.double_rate:g} times the rate of fp16 with fp32 accumulation (measured elsewhere: 1.71 to 1.87)"
        own_fp8 = (kernels, precision) == ("triton", "fp8")
        which = "forward and input gradients of the blocks' linears" if own_fp8 else "linears"
        said.append(f"{which} at {ratio if doubled else 'the rate of fp16: this card gains nothing from it'}")
        if kernels == "triton" and precision == "fp16-fast":
            said.append("the same for attention's products but S, which is summed in fp32")
        else:
            said.append("attention keeps fp32 accumulation")
    if not found.calibrated:
        said.append(
            "uncalibrated: the two real runs are nanoGPT + torch.compile, bf16, T = 1024, 12 blocks of 384 and 768, RTX 4070"
        )
    if kernels == "triton":
        said.append(
            "this repository's kernels at a library's efficiency; none was timed on a GPU, hence 0.9 to 1.3 times"
        )
    return said


# ---------------------------------------------------------------- predicted beside measured


def _measured(path: Path, as_json: bool, console: Console) -> int:
    from bench.reports.against_projection import read

    gpu, pairs = read(path)
    if as_json:
        found = {"projected": True, "gpu": gpu.name, "calibration_error": calibration_error()}
        print(json.dumps({**found, "pairs": [pair.to_json() for pair in pairs]}, indent=1))
        return 0
    rows = [["what", "variant", "measured ms", "projected ms", "error", "note"]]
    for pair in pairs:
        times = ["-" if ms is None else f"{ms:,.3f}" for ms in (pair.measured_ms, pair.projected_ms)]
        error = "-" if pair.error is None else f"{pair.error:+.0%}"
        note = pair.note or ("uncalibrated" if "uncalibrated" in pair.status else "calibrated")
        rows.append([pair.what, pair.variant, *times, error, note])
    print_table(console, f"Measured on {gpu.name} beside projected (calibration error {calibration_error():.1%})", rows)
    return 0


if __name__ == "__main__":
    common.run(main)
