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
from fastgpt.performance.step_time import CONSTANTS, DESCRIBED, RANGES, Constants


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
    rows = [["constant", "value", "range", "meaning", "source"]]
    for each in found["constants"]:
        span = f"{each['low']:g} to {each['high']:g}"
        rows.append([each["name"], f"{each['value']:g}", span, each["meaning"], each["source"]])
    print_table(console, "Constants: one fitted (clock), all others fixed", rows)
