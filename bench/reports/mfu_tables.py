"""The result of bench.mfu on the terminal. Reads plain dicts, measures nothing; reports/page.py shows the same as HTML."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from bench.reports import elsewhere
from bench.reports.tables import Cells, print_table, terminal
from bench.steps.ceilings import arithmetics
from fastgpt.common import millions, percent, rounded
from fastgpt.config import EXPERIMENTAL
from fastgpt.performance.operations import GAPS, LINEARS

ADVICE = {
    GAPS: "launch overhead and Python: fewer and larger kernels, a larger micro-batch, CUDA graphs",
    "data": "load the next batch while the step runs, from pinned memory",
    "pointwise": "fuse residual adds, casts and copies into the kernels beside them",
    "gradient accumulation": "add the weight gradient inside the matmul that forms it",
    "GELU": "fuse it into the matmul before it",
    "ReLU2": "fuse it into the matmul before it",
    "rotary": "one pass over the packed projection, forward and backward",
    "norms": "one pass over the residual stream, forward and backward",
    "attention forward": "tiles and occupancy of the attention kernel",
    "attention backward": "tiles and occupancy of the attention kernels; one pass for dQ, dK and dV",
    "loss": "form dlogits chunk by chunk, without logits in fp32",
    "optimizer": "one launch for all tensors, clip included",
    "embedding": "gather and scatter of rows: latency, and the zeros of a dense gradient",
}
"""What closes the gap of an operation, by the beginning of its name."""


def advice(name: str) -> str:
    """What closes the gap of an operation."""
    if name.startswith((*LINEARS, "matmul")):
        return "tile shape and wave fill; double-rate arithmetic raises the roof itself"
    return next((text for start, text in ADVICE.items() if name.startswith(start)), "find out what it is")


KEPT_BUSY = 0.95
"""From this share of a step's time on, what the GPU waits for is not worth a word."""
DOUBLED = frozenset(arithmetics(precision)[0] for precision in EXPERIMENTAL)

INTERPRETED = (
    "Triton's interpreter runs our kernels in Python, one program after the other: which operations the step consists of is "
    "real, the time of each says nothing about a GPU."
)
CACHED = "above 100%: operands were still in a cache, while the roof takes every byte from memory"


def mfu_percent(value: float | None) -> str:
    """As ``percent``, but a CPU's share of an A100 is not 0.0%."""
    return percent(value) if value is None or value >= 0.001 else f"{100 * value:.2g}%"


def milliseconds(value: float | None) -> str:
    """Three digits that matter, and no more than microseconds."""
    if value is None:
        return "n/a"
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def quantity(value: float | None, unit: str) -> str:
    """1.2e9, "FLOP" -> 1.20 GFLOP; "-" for nothing."""
    return rounded(value, "kMGT", " ") + unit if value else "-"


def where(result: dict[str, Any]) -> str:
    """The line that every table and picture carries."""
    env = result["environment"]
    threads = f", {_count(env['threads'], 'thread')}" if "threads" in env else ""
    return f"measured on {env['device']}{threads}, torch {env['torch']}, commit {env['commit'] or 'n/a'}, {env['time'][:10]}"


def on_a_gpu(result: dict[str, Any]) -> bool:
    """Whether a GPU was measured: the environment of a CPU has threads. Advice for GPUs is not for a CPU."""
    return "threads" not in result["environment"]


def what(setup: dict[str, Any]) -> str:
    precision = setup["precision"] + (" (experimental)" if setup["precision"] in EXPERIMENTAL else "")
    return (
        f"{setup['model']}, {millions(setup['parameters'])} parameters, {setup['batch_size']} x {setup['seq']} tokens x "
        f"{_count(setup['grad_accum'], 'micro-batch', 'es')}, {precision}"
    )


def roofs(result: dict[str, Any]) -> str:
    """Rates of what this step's matmuls are computed in, and of copies."""
    ceilings = result["ceilings"]
    rates = {name: ceilings["matmul_tflops"].get(name) for name in arithmetics(result["setup"]["precision"])}
    matmuls = ", ".join(f"{name} matmul {f'{rate:.3g} TFLOP/s' if rate else 'n/a'}" for name, rate in rates.items())
    return f"{matmuls}, copy {ceilings['copy_gbs']:.3g} GB/s"


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


# ---------------------------------------------------------------- tables as plain cells: header first


def speed_cells(result: dict[str, Any]) -> Cells:
    """A row per backend: time and spread, tokens/s, three MFUs, memory, launches; or why it has none."""
    header = ["backend", "ms/step", "± IQR", "steps", "tokens/s", "vs eager"]
    header += ["MFU, nominal", "MFU, measured", "nanoGPT's", "peak GB", "launches/step"]
    cells = [header]
    eager = result["backends"].get("eager", {}).get("ms")
    for name, b in result["backends"].items():
        if "ms" not in b:
            cells.append([name, "failed", *[""] * (len(header) - 2)])
            continue
        memory = b.get("peak_memory")
        cells.append(
            [
                name,
                milliseconds(b["ms"]),
                milliseconds(b["iqr_ms"]),
                str(b["runs"]),
                f"{b['tokens_per_second']:,.0f}",
                f"{eager / b['ms']:.2f}x" if eager else "n/a",
                *(mfu_percent(figure["value"]) for figure in b["mfu"]),
                "n/a" if memory is None else f"{memory / 1e9:.2f}",
                "n/a" if b.get("launches") is None else f"{b['launches']:,}",
            ]
        )
    return cells


def mfu_notes(result: dict[str, Any]) -> list[str]:
    """What each MFU divides by what, and what that is worth."""
    figures: list[dict[str, Any]] = next((b["mfu"] for b in result["backends"].values() if "ms" in b), [])
    notes = []
    for figure in figures:
        limit = figure["denominator_tflops"]
        of = f"{limit:.4g} TFLOP/s" if limit else "n/a"
        notes.append(
            f"MFU {figure['name']}: tokens/s x {figure['flops_per_token'] / 1e6:.4g} MFLOP ({figure['formula']}) / {of} "
            f"({figure['denominator']})"
        )
    if any(
        (f["value"] or 0) > 1 for b in result["backends"].values() for f in b.get("mfu", ()) if "measured" in f["name"]
    ):
        notes.append(
            "above 100% of the measured ceiling: the matmul that it was measured with is slower than the step's own"
        )
    precision = result["setup"]["precision"]
    mode, *plain = arithmetics(precision)
    if notes and plain:
        notes.append(
            f"{precision}: part of the step is computed in {plain[0]}, so nothing could reach 100% of the {mode} peak"
        )
    return notes


ACCOUNTED = 0.97
"""Share of a step's time that has to have a name."""


def failures(result: dict[str, Any]) -> list[str]:
    """A sentence for each backend that could not be measured or profiled, whose profile leaves too much unnamed, or whose steps
    did less than they should."""
    found = []
    for name, b in result["backends"].items():
        if "error" in b:
            found.append(f"{name}: {b['error']}")
        elif "profile_error" in b:
            found.append(f"{name}: no profile, {b['profile_error']}")
        elif "profile" in b and b["profile"]["accounted"] < ACCOUNTED:
            unnamed = ", ".join(list(b["profile"]["unaccounted_ms"])[:3])
            share = percent(b["profile"]["accounted"])
            found.append(
                f"{name}: only {share} of its profiled step has a name ({ACCOUNTED:.0%} is wanted); not {unnamed}"
            )
        if b.get("skipped_steps"):
            count = _count(b["skipped_steps"], "update")
            found.append(
                f"{name}: {count} skipped while it was timed, for a gradient that is not finite: such a step does less"
            )
    return found


def operation_cells(backend: dict[str, Any], *, roofs: bool = True) -> Cells:
    """A row per operation of a profiled step, longest first; the last row adds them up."""
    header = ["operation", "calls", "ms", "share"]
    header += ["FLOPs", "bytes", "of its roof", "which roof", "gap, ms"] if roofs else []
    cells = [header]
    for row in backend["rows"]:
        line = [row["name"], str(row["calls"] or "-"), milliseconds(row["ms"]), percent(row["share"])]
        if roofs:
            line += [quantity(row["flops"], "FLOP"), quantity(row["bytes"], "B")]
            line += [percent(row["achieved"], 0) if row["achieved"] is not None else "-", _roof(row)]
            line += [milliseconds(row["gap_ms"])]
        cells.append(line)
    found = backend["profile"]
    total = ["sum", "", milliseconds(sum(row["ms"] for row in backend["rows"])), percent(found["accounted"]) + " named"]
    return [*cells, total + [""] * (len(header) - len(total))]


def _roof(row: dict[str, Any]) -> str:
    """The nearer roof of an operation, and in which arithmetic: a step may have several."""
    if row["bound"] == "compute" and row.get("arithmetic"):
        return f"compute, {row['arithmetic']}"
    return row["bound"] or "-"


def help_cells(backend: dict[str, Any], count: int = 8) -> Cells:
    """What would help: the operations furthest from their roof."""
    rows = sorted((row for row in backend["rows"] if row["gap_ms"] > 0), key=lambda row: -row["gap_ms"])
    return [["operation", "gap, ms per step", "what would close it"]] + [
        [row["name"], milliseconds(row["gap_ms"]), _advice(row)] for row in rows[:count]
    ]


def _advice(row: dict[str, Any]) -> str:
    """The advice for a matmul that is at double rate already, without the half that recommends it."""
    text = advice(row["name"])
    return text.partition("; double-rate")[0] if row.get("arithmetic") in DOUBLED else text


def overhead(backend: dict[str, Any]) -> str:
    """How the profiled step compares with the timed one."""
    wall = backend["profile"]["wall_ms"]
    if "ms" not in backend:
        return f"profiled step: {milliseconds(wall)} ms"
    slower = f"{round(100 * (wall / backend['ms'] - 1)):+d}%"
    return f"profiled step: {milliseconds(wall)} ms, {slower} beside the median without profiler"


def host_notes(result: dict[str, Any]) -> list[str]:
    """A sentence for each backend that was timed and profiled on a GPU: does the host bind? The time that the device is busy
    comes from the profiled step, the step's from those without profiler, whose cost is the host's."""
    found = []
    for name, backend in result["backends"].items():
        busy = backend.get("profile", {}).get("device_ms")
        if busy is None or "ms" not in backend:
            continue
        share = min(1.0, busy / backend["ms"])
        said = f"{name}: measured, the GPU computes for {milliseconds(busy)} of {milliseconds(backend['ms'])} ms"
        waits = "otherwise it waits for the host; a larger micro-batch hides that, and in training --cuda-graphs on"
        found.append(f"{said} ({percent(share, 0)}): {waits if share < KEPT_BUSY else 'the host keeps up'}")
    return found


def projected_in(found: dict[str, Any]) -> str:
    """The precisions of a projection, for its title: ", bf16"."""
    used = dict.fromkeys(v["precision"] for v in found["variants"].values() if "error" not in v)
    return "".join(f", {precision}" for precision in used)


# ---------------------------------------------------------------- terminal


def show(result: dict[str, Any]) -> None:
    """Print everything."""
    console = terminal(160)
    console.print(f"\n[bold]{escape(what(result['setup']))}[/]\n{escape(where(result))}", soft_wrap=True)
    for note in result.get("notes", ()):
        console.print(f"[yellow]{escape(note)}[/]", soft_wrap=True)
    if result["backends"]:
        print_table(console, "Training step, backends in turns", speed_cells(result))
    for note in [*mfu_notes(result), *host_notes(result)]:
        console.print(escape(note), soft_wrap=True)
    for failure in failures(result):
        console.print(f"[yellow]failed[/] {escape(failure)}", soft_wrap=True)
    for name, backend in result["backends"].items():
        if "rows" not in backend:
            continue
        print_table(console, f"{name}: where a step's time goes ({overhead(backend)})", operation_cells(backend))
        if on_a_gpu(result):
            print_table(console, f"{name}: what would help", help_cells(backend))
    if any("rows" in backend for backend in result["backends"].values()):
        console.print(
            f"Roofs measured here: {roofs(result)}. FLOPs and bytes are least figures (performance/flops.py); {CACHED}.",
            soft_wrap=True,
        )
    if result.get("interpreted"):
        _show_interpreted(console, result["interpreted"])
    if result.get("audit"):
        _show_audit(console, result["audit"])
    if result.get("projection"):
        _show_projection(console, result["projection"])


def _show_interpreted(console: Console, found: dict[str, Any]) -> None:
    if "error" in found:
        console.print(f"[yellow]failed[/] triton in the interpreter: {escape(found['error'])}", soft_wrap=True)
        return
    print_table(console, f"triton, interpreted: {what(found['setup'])}", operation_cells(found, roofs=False))
    console.print(INTERPRETED, soft_wrap=True)


def _show_audit(console: Console, found: dict[str, Any]) -> None:
    title = f"Compiled for {found['gpu']} ({found['arch']}), not run"
    if "error" in found:
        console.print(f"[yellow]failed[/] {escape(title)}: {escape(found['error'])}", soft_wrap=True)
        return
    print_table(console, title, elsewhere.audit_cells(found))
    console.print(escape(elsewhere.audit_note(found)), soft_wrap=True)


def _show_projection(console: Console, found: dict[str, Any]) -> None:
    title = f"Projected, not measured: {found['model']} on {found['gpu']}{projected_in(found)}"
    print_table(console, title, elsewhere.projection_cells(found))
    for note in elsewhere.projection_notes(found):
        console.print(escape(note), soft_wrap=True)
