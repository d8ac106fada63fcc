"""Tables and pictures of what bench.precision found. Reads plain dicts, as they are in precision.json."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from bench.reports.tables import markdown

ALLOWED = 0.01
"""Nats between the final validation losses of a mode and of bf16."""

COLOURS = {
    "bf16": "#222222",
    "fp32": "#999999",
    "fp16": "#2e8b8b",
    "fp16-fast, chunk 32": "#17becf",
    "fp16-fast, chunk 64": "#1f4e79",
    "fp16-fast, chunk 128": "#5b9bd5",
    "fp16-fast, chunk 256": "#c55a11",
    "fp16-fast, unchunked": "#d62728",
    "fp8": "#7b4fa3",
    "fp8, promoted every 128": "#b7a0d0",
    "fp8, fp32 sums": "#d98cb3",
    "fp8 by rows, promoted every 128": "#9c6b30",
    "fp8-fast, chunk 64": "#548235",
    "fp8-fast by rows, chunk 64": "#a9d18e",
}


def table(header: list[str], rows: list[list[str]]) -> str:
    return markdown([header, *rows], right=True) + "\n"


def figure(value: float) -> str:
    return "overflow" if math.isinf(value) else f"{value:.1e}"


def ratio(value: float) -> str:
    return "overflow" if math.isinf(value) else f"{value:.2f}" if value < 10 else f"{value:.0f}"


def tables(result: dict[str, Any]) -> str:
    """All of it as Markdown."""
    found = result["errors"]
    parts = [
        _where(result),
        _drawn(found["drawn"]),
        _recorded(found),
        _scales(found["scales"]),
        _readings(found["readings"]),
    ]
    if result["training"]:
        parts.append(_training(result["training"]))
    return "\n".join(parts)


def _where(result: dict[str, Any]) -> str:
    env = result["environment"]
    quick = " **With --quick: these figures mean nothing.**" if result["quick"] else ""
    return (
        f"Simulated on a CPU ({env['device']}, {env['threads']} thread), torch {env['torch']}, Python {env['python']}, "
        f"{env['time'][:10]}; errors {result['errors']['seconds']:.0f} s"
        + (f", training {sum(r['seconds'] for r in result['training']['runs']):.0f} s" if result["training"] else "")
        + f".{quick}\n"
    )


def _drawn(points: list[dict[str, Any]]) -> str:
    ks = sorted({p["K"] for p in points})
    modes = list(dict.fromkeys(p["mode"] for p in points))
    by = {(p["values"], p["K"], p["mode"]): p["error"] for p in points}
    kinds = list(dict.fromkeys(p["values"] for p in points))
    text = f"### Relative rms error against fp64, by K\n\nDrawn operands: {kinds[0]}.\n\n"
    text += table(["mode", *(f"{k:,}" for k in ks)], [[m, *(figure(by[kinds[0], k, m]) for k in ks)] for m in modes])
    text += "\nThe largest over all K, for each kind of values:\n\n"
    rows = [[m, *(figure(max(by[kind, k, m] for k in ks)) for kind in kinds)] for m in modes]
    text += table(["mode", *(kind.split(":")[0] for kind in kinds)], rows)
    text += "\nWhere it is worse than bf16 on the same operands:\n\n"
    rows = []
    for mode in modes:
        if not mode.startswith("fp16"):
            continue
        worse = []
        for kind in kinds:
            beside = {k: by[kind, k, mode] / by[kind, k, "bf16"] for k in ks}
            bad = [f"{k:,}" for k in ks if beside[k] > 1]
            if bad:
                tail = len(bad) > 1 and bad == [f"{k:,}" for k in ks[-len(bad) :]]
                where = f"from K = {bad[0]} on" if tail else f"K = {', '.join(bad)}"
                worse.append(f"{kind} ({where}; up to {ratio(max(beside.values()))} times)")
        rows.append([mode, "; ".join(worse) or "nowhere"])
    return text + "\n".join(f"- **{mode}**: {where}" for mode, where in rows) + "\n"


def _recorded(found: dict[str, Any]) -> str:
    rows = found["recorded"]
    setup = found["recorded_from"]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    by = {(row["what"], row["mode"]): row for row in rows}
    text = (
        f"### Operands recorded from training\n\n{setup['matmuls']} matmuls of a GPT ({setup['n_layer']} layers, C = "
        f"{setup['n_embd']}, T = {setup['block_size']}) at steps {', '.join(map(str, setup['recorded_at']))}; gradients in "
        f"fp16 times a loss scale of {found['loss_scale']:,.0f}. Median relative rms error of the sums:\n\n"
    )
    header = ["mode", *(f"{kind} (K {by[kind, modes[0]]['K']:,})" for kind in kinds)]
    text += table(header, [[mode, *(figure(by[kind, mode]["median"]) for kind in kinds)] for mode in modes])
    for key, what in (
        ("beside_bf16", "The sums, as they leave the accumulators"),
        ("as_stored", "The results as stored in 16 bits (weight gradients and scores in fp32)"),
    ):
        text += f"\n{what}: error divided by bf16's, the worst matmul of each kind. Above 1 is worse than bf16.\n\n"
        text += table(
            ["mode", *kinds], [[m, *(ratio(by[kind, m][key]) for kind in kinds)] for m in modes if m != "bf16"]
        )
    return text


def _scales(scales: dict[str, list[dict[str, Any]]]) -> str:
    text = "### Loss scales\n\nThe worst recorded matmul with a gradient, in fp16-fast, at powers of two. Shares of elements.\n"
    for name, rows in scales.items():
        text += f"\n{name}:\n\n"
        header = ["scale", "gradients: to zero", "subnormal", "overflow", "products: overflow", "error / bf16's"]
        text += table(
            header,
            [
                [
                    f"2^{round(math.log2(row['scale']))}",
                    *(f"{row[key]:.2%}" for key in ("to_zero", "subnormal", "overflow", "products_overflow")),
                    ratio(row["beside_bf16"]),
                ]
                for row in rows
            ],
        )
    return text


def _readings(found: dict[str, Any]) -> str:
    text = (
        "### If the chip rounds otherwise\n\nfp16-fast: the fp16 accumulator rounded after so many products. Error on drawn "
        "operands at the largest K, and the worst ratio to bf16's error over the recorded matmuls, as summed and as stored.\n\n"
    )
    rows = []
    for chunk, part in found.items():
        for point in part["drawn"]:
            mine = [row for row in part["recorded"] if row["mode"] == point["mode"]]
            worst = max(mine, key=lambda row: row["beside_bf16"])
            stored = max(mine, key=lambda row: row["as_stored"])
            rows.append(
                [
                    f"chunk {chunk}, {point['mode']}",
                    figure(point["error"]),
                    f"{ratio(worst['beside_bf16'])} ({worst['what']})",
                    f"{ratio(stored['as_stored'])} ({stored['what']})",
                ]
            )
    return text + table(["reading", "drawn", "recorded, as summed", "recorded, as stored"], rows)


def differences(training: dict[str, Any]) -> list[tuple[dict[str, Any], float, bool]]:
    """Each run, its final validation loss less bf16's, and whether that is within ``ALLOWED`` (and finite)."""
    reference = training["runs"][0]["final"]
    return [(run, run["final"] - reference, abs(run["final"] - reference) <= ALLOWED) for run in training["runs"]]


def _training(training: dict[str, Any]) -> str:
    setup = training["setup"]
    text = (
        f"### Trained in each mode\n\n{setup['n_layer']} layers, C = {setup['n_embd']}, T = {setup['block_size']}, "
        f"{setup['batch_size'] * setup['block_size']:,} bytes a step, {setup['steps']} steps: same seed, same batches, same "
        f"validation text. Allowed: {ALLOWED} nat.\n\n"
    )
    rows = [
        [
            run["mode"],
            f"{run['final']:.4f}",
            "reference" if run is training["runs"][0] else f"{delta:+.4f}",
            "yes" if within else "**no**",
            str(run["skipped"]),
            "-" if run["scale"] is None else f"{run['scale']:,.0f}",
            f"{run['seconds']:.0f}",
        ]
        for run, delta, within in differences(training)
    ]
    return text + table(
        ["mode", "validation loss", "less bf16's", "within", "steps skipped", "loss scale at the end", "seconds"], rows
    )


# ---------------------------------------------------------------- pictures


def pictures(result: dict[str, Any], out: Path) -> list[Path]:
    """precision-errors.png, precision-recorded.png, precision-scales.png and, after training, precision-training.png."""
    found = result["errors"]
    paths = [
        _draw_errors(found["drawn"], out),
        _draw_recorded(found["recorded"], out),
        _draw_scales(found["scales"], out),
    ]
    if result["training"]:
        paths.append(_draw_training(result["training"], out))
    return paths


def _figure(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(width, height), layout="constrained", dpi=110)
    return drawing, drawing.subplots(rows, columns, squeeze=False, **options)


def _draw_errors(points: list[dict[str, Any]], out: Path) -> Path:
    drawing, axes = _figure(2, 4, 15, 7.2, sharex=True, sharey=True)
    for ax, kind in zip(axes.flat, dict.fromkeys(p["values"] for p in points)):
        for mode in dict.fromkeys(p["mode"] for p in points):
            line = [(p["K"], p["error"]) for p in points if p["mode"] == mode and p["values"] == kind]
            bold = {"linewidth": 2.6} if mode == "bf16" else {"linewidth": 1.3, "marker": ".", "markersize": 5}
            ax.loglog(
                *zip(*line), label=mode, color=COLOURS[mode], linestyle="--" if "by rows" in mode else "-", **bold
            )
        ax.set_title(kind, fontsize=9)
        ax.grid(alpha=0.25)
    for ax in axes[-1]:
        ax.set_xlabel("K")
    for ax in axes[:, 0]:
        ax.set_ylabel("relative rms error")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    drawing.suptitle("A product's error against fp64, before it is stored (simulated)")
    return _saved(drawing, out / "precision-errors.png")


def _draw_recorded(rows: list[dict[str, Any]], out: Path) -> Path:
    kinds = list(dict.fromkeys(row["what"] for row in rows))
    modes = [mode for mode in dict.fromkeys(row["mode"] for row in rows) if mode.startswith("fp16")]
    drawing, axes = _figure(1, 2, 12, 4.6, sharey=True)
    for ax, key, title in (
        (axes[0, 0], "beside_bf16", "as summed"),
        (axes[0, 1], "as_stored", "as stored for the next operation"),
    ):
        for mode in modes:
            values = [next(r[key] for r in rows if r["mode"] == mode and r["what"] == kind) for kind in kinds]
            shown = [(kind, value) for kind, value in zip(kinds, values) if math.isfinite(value)]
            gone = [kind for kind, value in zip(kinds, values) if not math.isfinite(value)]
            ax.plot(*zip(*shown), "o", color=COLOURS[mode], label=mode, markersize=6)
            ax.plot(gone, [100.0] * len(gone), "^", color=COLOURS[mode], markersize=8)
        ax.axhline(1, color="black", linewidth=1.2)
        ax.set_yscale("log")
        ax.set_title(f"{title} (triangle: overflow)", fontsize=10)
        ax.tick_params(axis="x", rotation=35)
        ax.grid(alpha=0.25)
    axes[0, 0].set_ylabel("error / bf16's error, worst matmul")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    drawing.suptitle("Operands recorded from training: below 1 is better than bf16 (simulated)")
    return _saved(drawing, out / "precision-recorded.png")


def _draw_scales(scales: dict[str, list[dict[str, Any]]], out: Path) -> Path:
    drawing, axes = _figure(1, 2, 12, 4.2, sharex=True)
    for name, colour in zip(scales, ("#1f4e79", "#5b9bd5", "#c55a11", "#f4b183")):
        rows = scales[name]
        exponents = [math.log2(row["scale"]) for row in rows]
        beside = [(e, row["beside_bf16"]) for e, row in zip(exponents, rows) if math.isfinite(row["beside_bf16"])]
        if beside:
            axes[0, 0].semilogy(*zip(*beside), ".-", color=colour, label=name)
        axes[0, 1].plot(exponents, [row["products_overflow"] for row in rows], ".-", color=colour, label=name)
    axes[0, 0].axhline(1, color="black", linewidth=1.2)
    axes[0, 0].set(ylabel="error / bf16's error", title="Too small a scale: gradients become subnormal")
    axes[0, 1].set(ylabel="share of a product's elements", title="Too large: overflow, first inside a chunk")
    for ax in axes.flat:
        ax.set_xlabel("scale of the gradients, log2")
        ax.grid(alpha=0.25)
        ax.legend(fontsize=9)
    return _saved(drawing, out / "precision-scales.png")


def _draw_training(training: dict[str, Any], out: Path) -> Path:
    drawing, axes = _figure(1, 2, 13, 5)
    reference = dict(training["runs"][0]["validation"])
    left, right = axes[0]
    for run in training["runs"]:
        steps, losses = zip(*run["validation"])
        yardstick = run["mode"].startswith("bf16")
        colour = COLOURS.get(run["mode"], "#222222")
        style = {"color": colour, "linewidth": 2.2 if run["mode"] == "bf16" else 1.2}
        style["linestyle"] = ":" if "perturbed" in run["mode"] else "--" if "by rows" in run["mode"] else "-"
        left.plot(steps, losses, label=run["mode"], **style)
        if run["mode"] != "bf16":
            delta = [loss - reference[step] for step, loss in zip(steps, losses)]
            right.plot(steps, delta, label=run["mode"], zorder=3 if yardstick else 2, **style)
    right.axhspan(-ALLOWED, ALLOWED, color="#2e8b57", alpha=0.15)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_ylim(-4 * ALLOWED, 4 * ALLOWED)
    left.set(xlabel="step", ylabel="validation loss (nat)", title="Same seed, same batches")
    right.set(xlabel="step", ylabel="nat", title="Validation loss less bf16's")
    for ax in (left, right):
        ax.grid(alpha=0.25)
    left.fill_between([], [], color="#2e8b57", alpha=0.15, label=f"allowed at the end: {ALLOWED} nat")
    handles, labels = left.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    return _saved(drawing, out / "precision-training.png")


def _saved(drawing: Any, path: Path) -> Path:
    drawing.savefig(path)
    return path
