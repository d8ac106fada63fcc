"""Pictures of bench.mfu: the roofline with every operation on it, and where a step's time goes. Reads plain dicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.reports.mfu_tables import milliseconds, what, where
from bench.steps.ceilings import arithmetics
from fastgpt.common import rounded
from fastgpt.performance.operations import LINEARS

GROUPS = {
    "matmuls of the blocks": "#1f4e79",
    "head": "#5b9bd5",
    "attention": "#c55a11",
    "norms": "#f4b183",
    "rotary": "#833c0b",
    "GELU": "#ffd966",
    "ReLU2": "#ffe699",
    "loss": "#7b4fa3",
    "embedding": "#b7a0d0",
    "pointwise": "#a9d18e",
    "gradient accumulation": "#548235",
    "optimizer": "#2e8b8b",
    "data": "#d98cb3",
    "gaps (nothing running)": "#bfbfbf",
    "unaccounted": "#d62728",
}
"""What is one colour in the pictures, in the order in which it is stacked."""

DARK = {"matmuls of the blocks", "attention", "loss", "optimizer", "gradient accumulation", "unaccounted"}


def group_of(name: str) -> str:
    """The colour group of an operation."""
    if name.startswith((*LINEARS, "matmul")) and not name.startswith("head"):
        return "matmuls of the blocks"
    return next((group for group in GROUPS if name.startswith(group)), "unaccounted")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130})
    return plt


def draw(result: dict[str, Any], out: Path) -> list[Path]:
    """Every picture of a result, into a folder: time.png, then roofline-BACKEND.png. Raises ImportError without matplotlib."""
    profiled = {name: b for name, b in result["backends"].items() if b.get("rows")}
    paths = []
    if profiled:
        paths.append(where_time_goes(result, profiled, out / "time.png"))
        paths += [roofline(result, name, out / f"roofline-{name}.png") for name in profiled]
    return paths


# ---------------------------------------------------------------- where the time goes


def where_time_goes(result: dict[str, Any], profiled: dict[str, dict[str, Any]], path: Path) -> Path:
    """A bar per backend, as long as its profiled step, stacked from groups of operations."""
    plt = _pyplot()
    figure, ax = plt.subplots(figsize=(11, 2.6 + 0.75 * len(profiled)), layout="constrained")
    longest = max(b["profile"]["wall_ms"] for b in profiled.values())
    seen = set()
    for y, backend in enumerate(profiled.values()):
        sums = dict.fromkeys(GROUPS, 0.0)
        for row in backend["rows"]:
            sums[group_of(row["name"])] += row["ms"]
        left = 0.0
        for group, ms in sums.items():
            if not ms:
                continue
            ax.barh(y, ms, left=left, height=0.62, color=GROUPS[group], edgecolor="white", linewidth=0.6)
            seen.add(group)
            if ms > 0.045 * longest:
                colour = "white" if group in DARK else "black"
                ax.text(left + ms / 2, y, milliseconds(ms), ha="center", va="center", fontsize=9, color=colour)
            left += ms
        ax.text(left + 0.008 * longest, y, f"{milliseconds(left)} ms", va="center", fontweight="bold")
    ax.set_yticks(range(len(profiled)), profiled)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.1 * longest)
    ax.set_xlabel("milliseconds of one profiled step")
    handles = [plt.Rectangle((0, 0), 1, 1, color=GROUPS[group]) for group in GROUPS if group in seen]
    labels = [group for group in GROUPS if group in seen]
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle("Where a training step's time goes", x=0.01, ha="left", fontweight="bold")
    ax.set_title(f"{what(result['setup'])}\n{where(result)}", loc="left", fontsize=9)
    figure.savefig(path)
    plt.close(figure)
    return path


# ---------------------------------------------------------------- roofline


def roofline(result: dict[str, Any], backend: str, path: Path) -> Path:
    """Operations with matmul FLOPs against intensity, on the left; those that only move bytes against bandwidth, right."""
    plt = _pyplot()
    setup, ceilings = result["setup"], result["ceilings"]
    rows = result["backends"][backend]["rows"]
    points = [_point(row) for row in rows if row["flops"] and row["ms"]]
    movers = sorted(
        ((row["name"], row["bytes"] / row["ms"] / 1e6) for row in rows if not row["flops"] and row["bytes"]),
        key=lambda p: p[1],
    )
    height = max(4.8, 1.8 + 0.27 * max(len(points), len(movers)))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, height), layout="constrained", gridspec_kw={"width_ratios": [1.9, 1]}
    )
    _compute_panel(left, points, result)
    idle = [f"{row['name']} {milliseconds(row['ms'])} ms" for row in rows if not row["flops"] and not row["bytes"]]
    _memory_panel(right, movers, ceilings["copy_gbs"])
    figure.suptitle(f"Roofline of a training step: {backend}", x=0.01, ha="left", fontweight="bold")
    figure.text(0.01, 0.945, f"{what(setup)}; {where(result)}", fontsize=9, va="top")
    if idle:
        figure.text(0.01, 0.012, "Not on it, as there is no work to count: " + ", ".join(idle), fontsize=9)
    figure.get_layout_engine().set(rect=(0, 0.045, 1, 0.885))
    figure.savefig(path)
    plt.close(figure)
    return path


def _point(row: dict[str, Any]) -> tuple[str, float, float, float]:
    """(name, FLOP per byte, TFLOP/s, ms)"""
    return row["name"], row["flops"] / row["bytes"], row["flops"] / row["ms"] / 1e9, row["ms"]


def _compute_panel(ax: Any, points: list[tuple[str, float, float, float]], result: dict[str, Any]) -> None:
    import numpy as np
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    roofs, gbs = step_roofs(result), result["ceilings"]["copy_gbs"]
    ax.set_xscale("log")
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    xs = [x for _, x, _, _ in points] or [1.0]
    ys = [y for _, _, y, _ in points] or [1.0]
    peaks = [tflops for _, tflops, _, _ in roofs if tflops]
    ridge = 1e3 * (roofs[0][1] or 0) / gbs or xs[0]
    low, high = min([*xs, ridge]) / 2.5, max([*xs, 3 * ridge]) * 1.6
    x = np.geomspace(low, high, 200)
    for label, tflops, bandwidth, line in roofs:
        ax.plot(x, np.minimum(x * bandwidth / 1e3, tflops or np.inf), label=label, **line)
    top = max([*ys, *peaks]) * 1.6
    bottom = min([*ys, min(peaks, default=max(ys)) / 10]) / 2
    largest = max((ms for *_, ms in points), default=1.0)
    # Labels stand in a column on the right, in the order of the points, with lines to them: matmuls crowd under the roof.
    ordered = sorted(points, key=lambda p: p[2])
    places = np.linspace(0.03, 0.97, len(ordered)) if len(ordered) > 1 else [0.5]
    for (name, px, py, ms), place in zip(ordered, places):
        colour = GROUPS[group_of(name)]
        ax.scatter(px, py, s=25 + 225 * ms / largest, color=colour, alpha=0.75, edgecolor="white", zorder=3)
        ax.annotate(
            f"{name}  {milliseconds(ms)} ms",
            xy=(px, py),
            xytext=(1.03, place),
            textcoords="axes fraction",
            fontsize=8.5,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.45, "linewidth": 0.7, "relpos": (0, 0.5)},
        )
    ax.set_xlim(low, high)
    ax.set_ylim(bottom, top)
    ax.set_xlabel("FLOP per byte that must be moved")
    ax.set_ylabel("achieved TFLOP/s")
    ax.set_title("matmuls (area: time per step)", loc="left", fontsize=10)
    ax.grid(True, which="major", alpha=0.25)
    ax.legend(loc="lower left", frameon=False, fontsize=9)


def step_roofs(result: dict[str, Any]) -> list[tuple[str, float | None, float, dict[str, Any]]]:
    """(name, TFLOP/s or None for bandwidth alone, GB/s, how it is drawn) of what a step computes in: measured, then nominal."""
    names, ceilings, nominal = arithmetics(result["setup"]["precision"]), result["ceilings"], result.get("nominal")
    measured = [(name, rate) for name in names if (rate := ceilings["matmul_tflops"].get(name))]
    roofs: list[tuple[str, float | None, float, dict[str, Any]]] = [
        (f"{name} roof, measured here", rate, ceilings["copy_gbs"], {"color": "black", "linewidth": width})
        for (name, rate), width in zip(measured, (1.6, 0.8))
    ] or [("roof of memory, measured here", None, ceilings["copy_gbs"], {"color": "black", "linewidth": 1.6})]
    dense = nominal["dense_tflops"] if nominal else {}
    return roofs + [
        (
            f"{name} roof, nominal",
            dense[name],
            nominal["memory_gbs"],
            {"color": "grey", "linewidth": width, "linestyle": "--"},
        )
        for name, width in zip(names, (1.2, 0.8))
        if nominal and dense.get(name)
    ]


def _memory_panel(ax: Any, movers: list[tuple[str, float]], gbs: float) -> None:
    names, rates = [name for name, _ in movers], [rate for _, rate in movers]
    plain = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.85}
    ax.barh(range(len(movers)), rates, height=0.6, color=[GROUPS[group_of(name)] for name in names])
    for y, rate in enumerate(rates):
        label = f"{rate:.3g} ({rate / gbs:.0%})"
        ax.text(rate + 0.015 * max([*rates, gbs]), y, label, va="center", fontsize=8.5, bbox=plain, zorder=3)
    ax.axvline(gbs, color="black", linewidth=1.6)
    ax.set_yticks(range(len(movers)), names, fontsize=9)
    ax.set_ylim(-0.6, len(movers) - 0.4)
    ax.set_xlim(0, 1.35 * max([*rates, gbs]))
    ax.set_xlabel("achieved GB/s")
    ax.set_title(f"operations without matmuls\n(line: copy, measured here, {gbs:.3g} GB/s)", loc="left", fontsize=10)


# ---------------------------------------------------------------- the modern recipe (bench.recipe)


def two_recipes(curves: list[dict[str, Any]], summary: dict[str, Any], path: Path) -> Path:
    """Validation loss over tokens of both recipes, left; what the loss rises by without a part of the modern one, right."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.6), layout="constrained", gridspec_kw={"width_ratios": [1.2, 1]}
    )
    per_step = summary["gpt2_tokens"] / max(run["steps"] for run in curves) / 1e6
    kinds = {"gpt2": ("GPT-2 + AdamW", "#c55a11"), "modern": ("modern + Muon", "#1f4e79")}
    for recipe, (kind, colour) in kinds.items():
        runs = [run for run in curves if run["recipe"] == recipe]
        for i, run in enumerate(runs):
            points = [(step * per_step, loss) for step, loss in run["evals"] if step]
            label = "_" if i else f"{kind}, {len(runs)} seeds"
            left.plot(*zip(*points), color=colour, label=label, linewidth=1.4)
    left.axhline(max(summary["gpt2_losses"].values()), color="grey", linewidth=0.8, linestyle="--")
    left.set_xlabel("million tokens")
    left.set_ylabel("validation loss, nats per byte")
    left.set_ylim(top=2.6)
    left.grid(alpha=0.25)
    left.legend(frameon=False, fontsize=9)
    left.set_title("dashed: the last loss of GPT-2's recipe, of its worst seed", loc="left", fontsize=10)
    changed = {part: figures["more"] for part, figures in summary["parts"].items() if figures["recipe"] == "modern"}
    parts = sorted((more, part) for part, more in changed.items())
    right.barh([part for _, part in parts], [more for more, _ in parts], color="#1f4e79", height=0.62)
    right.axvline(0, color="black", linewidth=0.8)
    right.set_xlabel(f"rise of the loss after {rounded(summary['parts_tokens'])} tokens, one seed")
    right.set_title("the modern recipe with one part changed", loc="left", fontsize=10)
    figure.suptitle("Tokens to a loss, measured on a CPU at 4 layers of 128", x=0.01, ha="left", fontweight="bold")
    figure.savefig(path)
    plt.close(figure)
    return path
