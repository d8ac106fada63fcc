"""A report for the terminal, and for machines."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fastgpt.common import millions, rounded
from fastgpt.doctor.checks import scaling
from fastgpt.doctor.diagnosis import Diagnosis
from fastgpt.doctor.evidence import seen_as_json
from fastgpt.doctor.figures import UNITS, Figures
from fastgpt.doctor.findings import COLOURS, Finding, is_code
from fastgpt.hardware.cards import Gpu
from fastgpt.performance import recipes


def to_json(report: Diagnosis, gpu: Gpu | None) -> dict[str, Any]:
    """Everything: findings, figures with what they are, what could not be checked or read."""
    return {
        "findings": [finding.to_json() for finding in report.findings],
        "figures": report.figures.to_json(),
        "sources": {name: sorted(report.figures.sources(name)) for name in UNITS if name in report.figures.origin},
        "assumed": report.figures.assumptions(),
        "units": UNITS,
        "gpu": gpu.name if gpu else None,
        "precision": report.figures.precision,
        "recipe": report.figures.shape and recipes.comparison(report.figures.shape, gpu),
        "not_checked": report.not_checked,
        "unread": seen_as_json(report.unread),
    }


def summary(figures: Figures, gpu: Gpu | None) -> list[tuple[str, str]]:
    """The figures worth a line, in words. A line of which a figure is not known is left out."""
    f, tokens = figures, figures.seen()
    unit = "{:.1%} in nanoGPT's unit (of an A100)"
    ratio = ",.0f" if (f.tokens_per_parameter or 0) >= 100 else ".3g"
    twenty = "Chinchilla: 20" if scaling.in_range(f.shape, f.parameters or 0) else "outside of Chinchilla's range"
    counted = (
        "excluding position embeddings" if "log" not in f.sources("parameters") or f.shape else "as the log counts them"
    )
    speed = ["{:,.0f} ms per step", "{:,.0f} tokens/s", "{:.1f} TFLOP/s"]
    tflops = f.model_tflops if (f.model_tflops or 0) >= 0.05 else None  # a CPU's would be 0.0
    speeds = [value for value in (f.steady_ms_per_iter, f.tokens_per_second, tflops) if value is not None]
    card = gpu.name.removeprefix("NVIDIA ") if gpu else ""
    rows: list[tuple[Any, ...]] = [
        ("model", f"{{}} parameters ({counted})", f.parameters and millions(f.parameters)),
        (
            "tokens",
            "{:,} per step, {} " + ("seen" if f.tokens_seen is not None else "planned"),
            f.tokens_per_step,
            tokens and rounded(tokens),
        ),
        ("", f"{{:{ratio}}} per parameter ({twenty})", f.tokens_per_parameter),
        *([("speed", ", ".join(speed[: len(speeds)]), *speeds)] if speeds else []),
        ("MFU", "{:.1%} of the " + card + " ({:.1f} TFLOP/s {})", f.mfu_nominal, f.nominal_tflops, f.precision),
        ("", "{}", f.out_of_reach if f.mfu_nominal is not None and f.out_of_reach else None),
        (
            "" if f.ceiling_nanogpt is not None else "MFU",
            unit + ("; the card's ceiling there is {:.1%}" if f.ceiling_nanogpt is not None else ""),
            f.mfu_nanogpt if (f.mfu_nanogpt or 0) >= 0.0005 else None,
            f.ceiling_nanogpt or 0.0,
        ),
        ("evaluations", "{:.1%} of the time, {:.0f} minutes per day", f.evaluation_share, f.evaluation_minutes_per_day),
        ("val loss", "{:.4f} last, {:.4f} lowest (step {:,})", f.last_val, f.best_val, f.best_val_step),
        ("val", "{:.4f} bits per byte last, {:.4f} lowest", f.last_bpb, f.best_bpb),
        ("recipe", "{}", f.shape and recipes.comparison(f.shape, gpu)),
        *(("note", "{}", sentence) for sentence in f.assumptions()),
    ]
    return [(name, form.format(*values)) for name, form, *values in rows if None not in values]


def print_report(report: Diagnosis, gpu: Gpu | None, console: Console) -> None:
    """Figures, findings with their evidence, then what was left open."""
    grid = Table.grid(padding=(0, 2))
    for name, text in summary(report.figures, gpu):
        grid.add_row(f"[dim]{name}", escape(text))
    console.print(grid)
    for number, finding in enumerate(report.findings, 1):
        console.print(_finding(number, finding))
    console.print()
    if report.unread:
        console.print(f"[bold]Could not be read[/] ({len(report.unread)})")
        for place, text in report.unread[:10]:
            console.print(Padding(Text(f"{place}  {text}"), (0, 0, 0, 2)))
    if report.not_checked:
        console.print("[bold]Not checked")
        for sentence in report.not_checked:
            console.print(Padding(Text(sentence), (0, 0, 0, 2)))
    nothing = "steps of the log could not be read" if report.steps_not_read else "nothing found"
    colour = "red" if report.steps_not_read else "green"
    console.print(f"[bold]{counts(report)}" if report.findings else f"[bold {colour}]{nothing}")


def _finding(number: int, finding: Finding) -> RenderableType:
    colour = COLOURS[finding.severity]
    head = Text.assemble("\n", (f"{number}. {finding.severity}", colour), "  ", (finding.title, "bold"))
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True, min_width=6)
    rows.add_column()
    for i, (place, text) in enumerate(finding.evidence):
        rows.add_row("seen" if i == 0 else "", Text.assemble((f"{place}  ", "dim"), text))
    rows.add_row("why", _prose(finding.explanation))
    rows.add_row("do", _advice(finding.advice))
    sure = finding.confidence + (f"; at stake: {finding.cost_text}" if finding.cost_text else "")
    rows.add_row("sure", Text(f"{sure}  [{finding.id}]", style="dim"))
    return Group(head, Padding(rows, (0, 0, 0, 3)))


def _prose(text: str) -> RenderableType:
    """Paragraphs wrap; tables keep their lines."""
    lines = ((line, is_table(line)) for line in text.split("\n"))
    return Group(*(Text(line, no_wrap=table, overflow="ignore" if table else "fold") for line, table in lines))


def is_table(line: str) -> bool:
    """Whether a line of an explanation belongs to a table, and is not wrapped."""
    return line.startswith("  ")


def _advice(text: str) -> RenderableType:
    return Group(*(Text(line, style="green" if is_code(line) else "") for line in text.split("\n")))


def counts(report: Diagnosis) -> str:
    """ "1 critical, 3 warnings, 4 notes"."""
    by = [sum(f.severity == s for f in report.findings) for s in ("critical", "warning", "info")]
    words = [f"{by[0]} critical", f"{by[1]} warning{'s' * (by[1] != 1)}", f"{by[2]} note{'s' * (by[2] != 1)}"]
    return ", ".join(word for n, word in zip(by, words) if n)
