"""What a training step would take on a GPU that is not here, operation by operation: projected, never measured.

    python -m bench.project --gpu rtx4070 --model gpt2-124m                    this repository's kernels, bf16
    python -m bench.project --gpu rtx4070 --model gpt2-124m --kernels nanogpt-compile
    python -m bench.project --gpu rtx4070 --model gpt2-124m --precision fp16-fast
    python -m bench.project --gpu rtx4090 --model gpt2-350m --batch 8 --seq 512 --json
    python -m bench.project --calibration                                      fit again: how far off the model is known to be
    python -m bench.project --measured results.json                            beside what was measured on a GPU

Figures are low / central / high. The model, its constants with their sources and its errors: docs/projection.md.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape

from bench.reports.tables import Cells, print_table, terminal
from fastgpt import command, common
from fastgpt.anatomy import Shape
from fastgpt.command import Arg
from fastgpt.common import UserError
from fastgpt.config import load_preset, preset_names
from fastgpt.hardware import cards
from fastgpt.performance.flops import PALM
from fastgpt.performance.projection import (
    ANCHORS,
    FITTED_CLOCKS,
    MEDIAN_MS,
    REFITTED_CLOCKS,
    RUN_40M,
    RUN_124M,
    Clocks,
    Projection,
    Sensitivity,
    calibration_error,
    fit_clocks,
    project,
    refit_clocks,
    refits,
)
from fastgpt.performance.step_time import CONSTANTS, Constants


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
        clocks, at_ends = fit_clocks(), refit_clocks()
        if args.json:
            print(json.dumps(calibration(clocks, at_ends), indent=1))
        else:
            show_calibration(calibration(clocks, at_ends), console)
        outdated = outdated_constants(clocks, at_ends)
        print(outdated, file=sys.stderr, end="")
        return 1 if outdated else 0
    found = projected(args)
    if args.json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        show(found, args.model, console)
    return 0


def projected(args: ProjectConfig) -> Projection:
    gpu = cards.card(args.gpu)
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
    )


# ---------------------------------------------------------------- a projection


def show(found: Projection, model: str, console: Console) -> None:
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
    for line in ("Assumed: " + "; ".join(found.assumptions) + ".", _most(found.sensitivities), INTERVAL):
        console.print(escape(line), soft_wrap=True)


INTERVAL = (
    "low to high: the model's error in known cases and the effect of every fixed constant over its range, in quadrature. "
    "python -m bench.project --calibration shows both."
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
    return (
        "Step time depends most on " + ", ".join(parts) + "." if parts else "No fixed constant moves this step's time."
    )


def _span(s: Sensitivity) -> str:
    return f"{s.at_low:+.1%} at its low end, {s.at_high:+.1%} at its high end"


# ---------------------------------------------------------------- calibration


FIT_ACCURACY = 1e-6
"""Relative difference of two fits of one clock that counts as none: ``projection.fit`` stops at 1e-7."""


def outdated_constants(clocks: dict[str, float], at_ends: Clocks) -> str:
    """The lines of performance/projection.py that a new fit changes; nothing where the frozen clocks are the fit's."""
    pairs = [(clocks[name], frozen) for name, frozen in FITTED_CLOCKS.items()]
    for name, ends in at_ends.items():
        pairs += zip(ends, REFITTED_CLOCKS.get(name, (0.0, 0.0)))
    if at_ends.keys() == REFITTED_CLOCKS.keys() and all(
        math.isclose(fitted, frozen, rel_tol=FIT_ACCURACY) for fitted, frozen in pairs
    ):
        return ""
    lines = [f'    "{name}": {ends},' for name, ends in at_ends.items()]
    return "\n".join(
        [
            "The frozen clocks in fastgpt/performance/projection.py differ from this fit. To use it, write there:",
            f"FITTED_CLOCKS = {json.dumps(clocks)}",
            "REFITTED_CLOCKS: Clocks = {",
            *lines,
            "}\n",
        ]
    )


def calibration(clocks: dict[str, float], at_ends: Clocks) -> dict[str, Any]:
    """Both fits, every anchor and every constant, as plain values. The clocks are those of fit_clocks and refit_clocks."""
    runs = {"124M": RUN_124M, "40M": RUN_40M}
    fits: list[dict[str, Any]] = []
    for on, other in (("124M", "40M"), ("40M", "124M")):
        fitted, run = replace(CONSTANTS, clock=clocks[on]), runs[other]
        fits.append(
            {
                "fitted_on": runs[on].name,
                "clock": clocks[on],
                "predicted": run.name,
                "measured_ms": 1e3 * run.tokens_per_step / run.measured,
                "projected_ms": 1e3 * run.tokens_per_step / run.predicted(fitted),
                "error": run.error(fitted),
            }
        )
    return {
        "projected": True,
        "calibration_error": max(abs(each["error"]) for each in fits),
        "fits": fits,
        "refits": [asdict(each) for each in refits(at_ends)],
        "anchors": [
            {
                "name": run.name,
                "measured_tokens_per_second": [run.low, run.high],
                "projected_tokens_per_second": run.predicted(),
                "error": run.error(),
                "micro_batch": run.micro_batch,
                "note": run.note,
            }
            for run in ANCHORS
        ],
        "constants": [{"name": f.name, "value": getattr(CONSTANTS, f.name), **f.metadata} for f in fields(Constants)],
    }


def show_calibration(found: dict[str, Any], console: Console) -> None:
    """Print what ``calibration`` returns."""
    title = "nanoGPT + torch.compile, bf16, RTX 4070: the clock is fitted on one run and predicts the other (projected)"
    medians = ", ".join(f"{name} {ms:,.0f} ms" for name, ms in MEDIAN_MS.items())
    rows = [["fitted on", "clock, of boost", "predicts", "measured ms", "projected ms", "error of step time"]]
    for each in found["fits"]:
        figures = [f"{each['measured_ms']:,.0f}", f"{each['projected_ms']:,.0f}", f"{each['error']:+.1%}"]
        rows.append([each["fitted_on"], f"{each['clock']:.4f}", each["predicted"], *figures])
    print_table(console, title, rows)
    console.print(
        f"Medians of a step of 524,288 tokens: {medians}. Calibration error: {found['calibration_error']:.1%}. "
        f"Used: {CONSTANTS.clock}, the fit on the 124M run, so that run itself is no test.\n",
        soft_wrap=True,
    )
    rows = [["constant", "at", "clock fitted on 124M", "error of step time on 40M"]]
    for each in found["refits"]:
        rows.append([each["constant"], f"{each['value']:g}", f"{each['clock']:.4f}", f"{each['error']:+.1%}"])
    print_table(console, "The first fit again, with one fixed constant at an end of its range (projected)", rows)
    rows = [["public figure", "measured tokens/s", "projected tokens/s", "error of step time", "note"]]
    for each in found["anchors"]:
        low, high = each["measured_tokens_per_second"]
        measured = f"{low:,.0f}" + (f" to {high:,.0f}" if high > low else "")
        note = f"micro-batch {each['micro_batch']} ({each['note'].replace('micro-batch ', '', 1)})"
        rows.append(
            [each["name"], measured, f"{each['projected_tokens_per_second']:,.0f}", f"{each['error']:+.1%}", note]
        )
    print_table(console, "Public figures that nothing was fitted on (projected as nanogpt-compile, bf16)", rows)
    rows = [["constant", "value", "range", "meaning", "source"]]
    for each in found["constants"]:
        span = f"{each['low']:g} to {each['high']:g}"
        rows.append([each["name"], f"{each['value']:g}", span, each["meaning"], each["source"]])
    print_table(console, "Constants: one fitted (clock), all others fixed", rows)


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
