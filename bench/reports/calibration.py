"""How far off the projection is known to be: the clock fitted on each of two real runs, which predicts the other; the fit again
with each fixed constant at an end of its range; and public figures that nothing was fitted on.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console

from bench.reports.tables import print_table
from fastgpt.hardware import cards
from fastgpt.performance.operations import SHARED_BYTES, SOFTMAX_INSTRUCTIONS, Operation
from fastgpt.performance.projection import (
    ANCHORS,
    FITTED_CLOCKS,
    MEDIAN_MS,
    REFITTED_CLOCKS,
    RUN_40M,
    RUN_124M,
    Clocks,
    MeasuredRun,
    alternatives,
    holds_without,
)
from fastgpt.performance.step_time import CONSTANTS, DESCRIBED, RANGES, Chip, Constants


def report(as_json: bool, console: Console) -> int:
    """Fit again and print. Returns 1, and says what to change, if the frozen clocks are not those of the fit."""
    clocks, at_ends = fit_clocks(), refit_clocks()
    found = figures(clocks, at_ends)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(found, console)
    outdated = outdated_constants(clocks, at_ends)
    print(outdated, file=sys.stderr, end="")
    return 1 if outdated else 0


# ---------------------------------------------------------------- fits


def fit(run: MeasuredRun, constants: Constants = CONSTANTS) -> Constants:
    """``constants`` with the clock at which the model takes as long as ``run`` did (secant method)."""

    def miss(clock: float) -> float:
        return math.log(run.measured / run.predicted(replace(constants, clock=clock)))

    before, clock = 1.0, 1.1
    miss_before, found = miss(before), miss(clock)
    for _ in range(20):
        if abs(found) < 1e-7 or found == miss_before:
            break
        before, clock = clock, clock - found * (clock - before) / (found - miss_before)
        miss_before, found = found, miss(clock)
    return replace(constants, clock=clock)


def fit_clocks() -> dict[str, float]:
    """``FITTED_CLOCKS``, fitted again."""
    return {"40M": fit(RUN_40M).clock, "124M": fit(RUN_124M).clock}


def refit_clocks() -> Clocks:
    """``REFITTED_CLOCKS``, fitted again."""

    def clock(name: str, value: float) -> float:
        return fit(RUN_124M, replace(CONSTANTS, **{name: value})).clock

    return {name: (clock(name, low), clock(name, high)) for name, (low, high) in RANGES.items()}


@dataclass(frozen=True)
class Refit:
    """One fixed constant at an end of its range: the clock fitted on the 124M run, and the error on the 40M run."""

    constant: str
    value: float
    clock: float
    error: float


def refits(clocks: Clocks = REFITTED_CLOCKS) -> list[Refit]:
    """What the calibration would have been, for the constants that the two runs depend on."""
    found = []
    for name, *ends in alternatives(clocks):
        if any(abs(end.clock - CONSTANTS.clock) > 1e-4 for end in ends):
            found += [Refit(name, getattr(end, name), end.clock, RUN_40M.error(end)) for end in ends]
    return found


FIT_ACCURACY = 1e-6
"""Relative difference of two fits of one clock that counts as none: ``fit`` stops at 1e-7."""


def outdated_constants(clocks: dict[str, float], at_ends: Clocks) -> str:
    """The lines of constants.toml that a new fit changes; nothing where the frozen clocks are the fit's."""
    pairs = [(clocks[name], frozen) for name, frozen in FITTED_CLOCKS.items()]
    for name, ends in at_ends.items():
        pairs += zip(ends, REFITTED_CLOCKS[name])
    if all(math.isclose(fitted, frozen, rel_tol=FIT_ACCURACY) for fitted, frozen in pairs):
        return ""
    lines = ["The clocks in fastgpt/performance/constants.toml differ from this fit. To use it, write there:"]
    lines += ["[clock]", "fitted = { " + ", ".join(f"{name} = {clock!r}" for name, clock in clocks.items()) + " }"]
    for name, (low, high) in at_ends.items():
        lines += [f"[{name}]", f"clock_at_low = {low!r}", f"clock_at_high = {high!r}"]
    return "\n".join([*lines, ""])


# ---------------------------------------------------------------- attention

LENGTHS = (1024, 2048, 4096, 16384)
FLASH_ATTENTION_2 = {
    ("forward", 64, False): (306, 318, 321, 324),
    ("forward", 64, True): (229, 262, 284, 299),
    ("forward", 128, False): (350, 362, 368, 370),
    ("forward", 128, True): (260, 298, 319, 335),
    ("backward", 64, False): (238, 264, 279, 291),
    ("backward", 128, False): (260, 291, 310, 322),
}
"""Way, columns of a head, causal -> TFLOP/s at ``LENGTHS`` tokens on an H100 SXM: 16,384 tokens in all, width 2,048, a causal
mask halves the FLOPs. Figures 5 and 6 of Shah et al., FlashAttention-3, arXiv 2407.08608, by public transcripts."""


def attention_speed(way: str, D: int, causal: bool, T: int, constants: Constants = CONSTANTS) -> float:
    """What the model says of a figure of ``FLASH_ATTENTION_2``, TFLOP/s; backward with its two passes over dQ."""
    tokens, width, tile = 16384, 2048, 128
    heads, products = tokens // T * (width // D), 5 if way == "backward" else 2
    scores, multiply_add = heads * T * T, 2 * D
    computed = heads * T * (T + tile) // 2 if causal else scores
    op = Operation(
        name=way,
        group="",
        kind="attention",
        flops=products * multiply_add * computed,
        bytes=0,
        launches=1,
        scores=computed,
        instructions=SOFTMAX_INSTRUCTIONS,
        shared=SHARED_BYTES[way][0] + D * SHARED_BYTES[way][1],
        longest=tile * T if causal else 0,
        blocks=heads * T // tile,
    )
    chip = Chip(cards.card("h100"), "bf16", constants)
    passes = 14 * tokens * width / chip.bandwidth if way == "backward" else 0.0  # 8 bytes in delta, 6 in dQ's cast
    return products * multiply_add * (scores / 2 if causal else scores) / (chip.times(op)["compute"] + passes) / 1e12


def solve_exposed(way: str) -> float:
    """``exposed_forward`` or ``exposed_backward`` that gives the speed of 64 columns, 16,384 tokens (bisection)."""
    low, high = 0.0, 1.0
    for _ in range(30):
        value = (low + high) / 2
        speed = attention_speed(way, 64, False, 16384, replace(CONSTANTS, **{f"exposed_{way}": value}))
        low, high = (value, high) if speed > FLASH_ATTENTION_2[way, 64, False][-1] else (low, value)
    return (low + high) / 2


# ---------------------------------------------------------------- figures


def figures(clocks: dict[str, float], at_ends: Clocks) -> dict[str, Any]:
    """Both fits, every anchor and every constant, as plain values. The clocks are those of fit_clocks and refit_clocks."""
    runs, known = {"124M": RUN_124M, "40M": RUN_40M}, (RUN_124M, RUN_40M, *ANCHORS)
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
        "hold_without": [sum(map(holds_without, known)), len(known)],
        "fits": fits,
        "refits": [asdict(each) for each in refits(at_ends)],
        "anchors": [
            {
                "name": run.name,
                "measured_tokens_per_second": [run.low, run.high],
                "projected_tokens_per_second": run.predicted(),
                "error": run.error(),
                "holds_without": holds_without(run),
                "micro_batch": run.micro_batch,
                "note": run.note,
            }
            for run in ANCHORS
        ],
        "flash_attention_2": [
            {
                "way": way,
                "columns": D,
                "causal": causal,
                "tokens": T,
                "measured_tflops": speed,
                "projected_tflops": said,
            }
            for (way, D, causal), speeds in FLASH_ATTENTION_2.items()
            for T, speed, said in zip(LENGTHS, speeds, (attention_speed(way, D, causal, T) for T in LENGTHS))
        ],
        "constants": [
            {"name": name, **{key: about[key] for key in ("value", "low", "high", "meaning", "source")}}
            for name, about in DESCRIBED.items()
        ],
    }


def show(found: dict[str, Any], console: Console) -> None:
    """Print what ``figures`` returns."""
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
    rows = [["public figure", "measured tokens/s", "projected tokens/s", "error of step time", "left out", "note"]]
    for each in found["anchors"]:
        low, high = each["measured_tokens_per_second"]
        measured = f"{low:,.0f}" + (f" to {high:,.0f}" if high > low else "")
        note = f"micro-batch {each['micro_batch']} ({each['note'].replace('micro-batch ', '', 1)})"
        holds = "inside" if each["holds_without"] else "outside"
        projected = f"{each['projected_tokens_per_second']:,.0f}"
        rows.append([each["name"], measured, projected, f"{each['error']:+.1%}", holds, note])
    print_table(console, "Public figures that nothing was fitted on (projected as nanogpt-compile, bf16)", rows)
    inside, known = found["hold_without"]
    console.print(
        f"Left out: inside or outside of the interval that the model states without knowing that figure. "
        f"{inside} of {known} measured cases, the two runs among them, lie inside.\n",
        soft_wrap=True,
    )
    rows = [["attention", *(f"T = {T:,}" for T in LENGTHS)]]
    for way, D, causal in FLASH_ATTENTION_2:
        same = [
            each
            for each in found["flash_attention_2"]
            if (each["way"], each["columns"], each["causal"]) == (way, D, causal)
        ]
        speeds = [f"{each['measured_tflops']} / {each['projected_tflops']:.0f}" for each in same]
        rows.append([f"{way}, {D} columns{', causal' if causal else ''}", *speeds])
    title = "FlashAttention-2 on an H100, TFLOP/s, measured / projected; the exposures are solved for 64 columns at T = 16,384"
    print_table(console, title, rows)
    rows = [["constant", "value", "range", "meaning", "source"]]
    for each in found["constants"]:
        span = f"{each['low']:g} to {each['high']:g}"
        rows.append([each["name"], f"{each['value']:g}", span, each["meaning"], each["source"]])
    print_table(console, "Constants: one fitted (clock), all others fixed", rows)
