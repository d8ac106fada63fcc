"""How far off the projection is known to be: the clock fitted on each of two real runs, which predicts the other; the fit again
with each fixed constant at an end of its range; and public figures that nothing was fitted on.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from rich.console import Console

from bench.reports.tables import print_table
from fastgpt.hardware import cards
from fastgpt.performance.attention import FLASH_ATTENTION_2 as COUNTED
from fastgpt.performance.operation import Operation, Scores
from fastgpt.performance.projection import (
    FITTED_CLOCKS,
    KNOWN,
    MEDIAN_MS,
    RUN_40M,
    RUN_124M,
    WITH_BIASES,
    MeasuredRun,
    interval_without,
    jackknife,
    known_errors,
    left_out_errors,
)
from fastgpt.performance.step_time import CONSTANTS, DESCRIBED, RANGES, Chip, Constants


def report(as_json: bool, console: Console) -> int:
    """Fit again and print. Returns 1, and says what to change, if the frozen clocks are not those of the fit."""
    clocks = fit_clocks()
    found = figures(clocks)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(found, console)
    outdated = outdated_constants(clocks)
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


@dataclass(frozen=True)
class Refit:
    """One fixed constant at an end of its range: the clock fitted on the 124M run, and the error on the 40M run."""

    constant: str
    value: float
    clock: float
    error: float


@lru_cache
def refits() -> list[Refit]:
    """What the calibration would have been, for the constants that the two runs depend on."""
    found = []
    for name, ends in RANGES.items():
        fits = [fit(RUN_124M, replace(CONSTANTS, **{name: end})) for end in ends]
        if any(abs(each.clock - CONSTANTS.clock) > 1e-4 for each in fits):
            found += [Refit(name, end, each.clock, RUN_40M.error(each)) for end, each in zip(ends, fits)]
    return found


def outdated_constants(clocks: dict[str, float]) -> str:
    """The lines of constants.toml that a new fit changes; nothing where it finds the frozen clocks (``fit`` stops at 1e-7)."""
    if all(math.isclose(clock, FITTED_CLOCKS[name], rel_tol=1e-6) for name, clock in clocks.items()):
        return ""
    fitted = ", ".join(f"{name} = {clock!r}" for name, clock in clocks.items())
    return (
        "The clocks in fastgpt/performance/constants.toml differ from this fit. To use it, write there:\n"
        f"[clock]\nfitted = {{ {fitted} }}\n"
    )


# ---------------------------------------------------------------- other cards

FURTHER = tuple(
    MeasuredRun(cards.card(short).name.removeprefix("NVIDIA "), short, WITH_BIASES, rate, rate, micro_batch)
    for short, micro_batch, rate in (
        ("h100pcie", 64, 289_447),
        ("h100nvl", 128, 262_133),
        ("a100pcie80gb", 64, 189_393),
        ("l40s", 32, 142_641),
        ("rtx6000ada", 64, 104_803),
        ("rtx4000ada", 16, 55_103),
        ("l4", 16, 40_423),
        ("rtx5090", 32, 196_551),
        ("a40", 32, 87_612),
        ("a6000", 64, 92_444),
        ("a5000", 16, 73_707),
        ("a4500", 16, 62_451),
        ("a4000", 16, 51_603),
    )
)
"""What the program of the H100's, H200's and A100's cases reaches on other cards, with the larger of its two micro-batches.
No interval knows of them: they test it."""


# ---------------------------------------------------------------- matrix products

_TORCH = "zzc0721/torch-performance-test-data#"
MATMULS: tuple[tuple[str, tuple[int, int, int], int, str], ...] = (
    ("rtx4090", (8192, 8192, 8192), 160, _TORCH + "78"),
    ("rtx5080", (8192, 8192, 8192), 103, _TORCH + "104"),
    ("rtx5090", (8192, 8192, 8192), 235, _TORCH + "96"),
    ("h100", (8192, 8192, 8192), 797, _TORCH + "79"),
    ("h100", (10240, 10240, 10240), 720, _TORCH + "79"),
    ("h100", (2048, 2048, 2048), 515, "triton-lang/triton#2339"),
    ("h100", (2048, 4096, 4096), 614, "triton-lang/triton#2339"),
    ("h100", (2048, 8192, 8192), 722, "triton-lang/triton#2339"),
    ("h100", (2048, 2048, 8192), 785, "NVIDIA/Fuser#3279"),
    ("h100", (16384, 16384, 1024), 708, "NVIDIA/Fuser#3137"),
    ("a100", (24576, 2304, 768), 249, "karpathy/llm.c#378"),
    ("a100", (24576, 768, 768), 235, "karpathy/llm.c#378"),
    ("a100", (24576, 3072, 768), 251, "karpathy/llm.c#378"),
)
"""Card, (m, n, k), TFLOP/s of cuBLAS in bf16 or fp16, source. NVIDIA/Fuser: of one call's time. llm.c: of the share of its
cycles in which tensor cores were busy, of 312; m by the bytes that its passes read."""


def matmul_speed(card: str, mnk: tuple[int, int, int]) -> float:
    """What the model says of a product of ``MATMULS``, TFLOP/s."""
    m, n, k = mnk
    op = Operation("product", "", "matmul", 2 * m * n * k, 2 * (m * k + k * n + m * n), 1, mnk=mnk)
    return op.flops / max(Chip(cards.card(card), "bf16", CONSTANTS).times(op).values()) / 1e12


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
    heads, n, forward = tokens // T * (width // D), T // tile, way == "forward"
    blocks = tuple(tile * tile * (m if causal else n) for m in (range(1, n + 1) if forward else range(n, 0, -1)))
    masked = tile * T if causal else 0
    scores = Scores(blocks, heads, masked, COUNTED[way], False, D, pairs=forward)
    per_score = 2 * D * (2 if forward else 5)
    op = Operation(way, "", "attention", per_score * scores.number, 0, 1, scores=scores)
    chip = Chip(cards.card("h100"), "bf16", constants)
    passes = 0.0 if forward else 14 * tokens * width / chip.bandwidth  # 8 bytes in delta, 6 in dQ's cast
    return per_score * heads * T * T / (2 if causal else 1) / (chip.times(op)["compute"] + passes) / 1e12


def solve_exposed(way: str) -> float:
    """``exposed_forward`` or ``exposed_backward`` that gives the speed of 64 columns, 16,384 tokens (bisection)."""
    low, high = 0.0, 1.0
    for _ in range(30):
        value = (low + high) / 2
        speed = attention_speed(way, 64, False, 16384, replace(CONSTANTS, **{f"exposed_{way}": value}))
        low, high = (value, high) if speed > FLASH_ATTENTION_2[way, 64, False][-1] else (low, value)
    return (low + high) / 2


# ---------------------------------------------------------------- figures


def figures(clocks: dict[str, float]) -> dict[str, Any]:
    """Both fits, every known case left out and every constant, as plain values. The clocks are those of fit_clocks."""
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
        "refits": [asdict(each) for each in refits()],
        "left_out": [
            {
                "name": run.name,
                "measured_tokens_per_second": [run.low, run.high],
                "projected_tokens_per_second": run.measured / (1 + error),
                "error": error,
                "interval_without": interval_without(run)[0],
                "inside": interval_without(run)[1],
                "micro_batch": run.micro_batch,
                "note": run.note,
            }
            for run, error in zip(KNOWN, left_out_errors().values())
        ],
        "further_cards": [
            {
                "gpu": run.gpu,
                "name": run.name,
                "micro_batch": run.micro_batch,
                "measured_tokens_per_second": run.measured,
                "projected_tokens_per_second": run.predicted(),
                "error": run.error(),
                "inside": jackknife([run.error()]) <= jackknife(known_errors(cards.card(run.gpu)).values()),
            }
            for run in FURTHER
        ],
        "matrix_products": [
            {
                "gpu": card,
                "mnk": mnk,
                "measured_tflops": speed,
                "projected_tflops": matmul_speed(card, mnk),
                "source": source,
            }
            for card, mnk, speed, source in MATMULS
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
    rows = [["left out", "measured tokens/s", "low", "central", "high", "error", "measured is"]]
    for each in found["left_out"]:
        low, high = each["measured_tokens_per_second"]
        measured = f"{low:,.0f}" + (f" to {high:,.0f}" if high > low else "")
        factor, central = each["interval_without"], each["projected_tokens_per_second"]
        interval = [f"{rate:,.0f}" for rate in (central / factor, central, central * factor)]
        inside = "inside" if each["inside"] else "outside"
        rows.append([each["name"], measured, *interval, f"{each['error']:+.1%}", inside])
    print_table(console, "Every measured case, as if it were not known (projected, bf16; error of the step time)", rows)
    inside, n = sum(each["inside"] for each in found["left_out"]), len(found["left_out"])
    console.print(
        f"The interval without a case: the largest error, either way, of the others on the RTX 4070, or of those on other "
        f"cards; without a run that a clock is fitted on, the other one is no case either. {inside} of {n} lie inside: the "
        f"worst of each kind never does.",
        soft_wrap=True,
    )
    for each in found["left_out"]:
        if each["note"]:
            console.print(f"{each['name']}: micro-batch {each['micro_batch']}, {each['note']}.", soft_wrap=True)
    console.print()
    rows = [["card", "micro-batch", "measured tokens/s", "projected", "error of step time", "measured is"]]
    for each in found["further_cards"]:
        rates = [f"{each[f'{which}_tokens_per_second']:,.0f}" for which in ("measured", "projected")]
        inside = "inside" if each["inside"] else "outside"
        rows.append([each["name"], f"{each['micro_batch']}", *rates, f"{each['error']:+.1%}", inside])
    print_table(console, "GPT-2 124M with biases on other cards, none of which any interval knows of", rows)
    rows = [["card", "m x n x k", "measured", "projected", "source"]]
    for each in found["matrix_products"]:
        size = " x ".join(f"{n:,}" for n in each["mnk"])
        speeds = [f"{each['measured_tflops']}", f"{each['projected_tflops']:.0f}"]
        rows.append([cards.card(each["gpu"]).name.removeprefix("NVIDIA "), size, *speeds, each["source"]])
    print_table(console, "Matrix products of cuBLAS, TFLOP/s; gemm_efficiency_hopper is of the H100, 10,240", rows)
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
