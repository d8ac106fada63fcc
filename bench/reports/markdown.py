"""Results of bench.kernels and bench.gpu as Markdown, a terminal table and a plot. Reads plain dicts, measures nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bench.reports.tables import markdown, print_table, terminal
from bench.steps.variants import VARIANTS
from fastgpt.config import load_preset
from fastgpt.performance.memory import CUBLAS_WORKSPACE, CUBLAS_WORKSPACE_HOPPER, KERNELS, memory


def _figure(value: float | None, form: str, scale: float = 1.0) -> str:
    return "n/a" if value is None else format(value * scale, form)


def where(environment: dict[str, Any]) -> str:
    """On what, in which versions, and when it was measured."""
    sms = f", {environment['sms']} SMs" if environment.get("sms") else ""
    versions = (
        f"torch {environment['torch']}, triton {environment['triton']}, driver {environment.get('driver') or 'n/a'}"
    )
    return (
        f"Measured on {environment['device']}{sms} (kernels {environment['kernels']}), {versions}, "
        f"commit {environment['commit'] or 'n/a'}, {environment['time']}."
    )


# ---------------------------------------------------------------- kernels

KERNEL_HEADER = [
    "operation",
    "variant",
    "ms",
    "± IQR",
    "ms, warm L2",
    "GB/s",
    "TFLOP/s",
    "share of the binding roof",
    "peak MB",
    "vs triton",
]


def kernel_rows(results: dict[str, Any]) -> list[list[str]]:
    """One row per entry and variant; a failed parity or an error takes the place of the figures."""
    rows = []
    for entry in results["entries"]:
        title = f"{entry['name']} {entry['shape']}"
        if entry["parity"] != "passed":
            reason = entry["parity"].replace("failed", "parity failed", 1)
            rows.append([title, "triton", "no speed: " + reason[:200], *[""] * (len(KERNEL_HEADER) - 3)])
        ours = entry["variants"].get("triton", {}).get("ms")
        for name, v in entry["variants"].items():
            if "ms" not in v:
                rows.append(
                    [title, name, "error: " + v.get("error", "not run")[:120], *[""] * (len(KERNEL_HEADER) - 3)]
                )
                continue
            share = "n/a" if v["share"] is None else f"{v['share']:.0%} of {v['of']}"
            rows.append(
                [
                    title,
                    name,
                    f"{v['ms']:.3f}",
                    f"{v['iqr_ms']:.3f}",
                    _figure((v.get("warm") or {}).get("ms"), ".3f"),
                    f"{v['gbs']:.0f}",
                    f"{v['tflops']:.1f}" if v["tflops"] else "-",
                    share,
                    _figure(v.get("peak_memory"), ".0f", 1e-6),
                    f"{v['ms'] / ours:.2f}x" if ours else "n/a",
                ]
            )
    return rows


def kernels_markdown(results: dict[str, Any]) -> str:
    return "\n\n".join(["## Kernels", *_kernels(results)])


def _kernels(results: dict[str, Any]) -> list[str]:
    tflops = (results.get("matmul_tflops") or {}).get("bf16")
    roofs = (
        f"Roofs measured in the same run: copy {_figure(results.get('copy_gbs'), '.0f')} GB/s, "
        f"bf16 matmul {_figure(tflops, '.1f')} TFLOP/s. Medians of interleaved runs, forward + backward; with a cold L2 cache "
        "but for the column that says otherwise, rates and shares included."
    )
    return [where(results["environment"]), roofs, markdown([KERNEL_HEADER, *kernel_rows(results)])]


def print_kernels(results: dict[str, Any]) -> None:
    console = terminal(180)
    print_table(console, where(results["environment"]), [KERNEL_HEADER, *kernel_rows(results)])
    if results["environment"]["kernels"] == "interpreted":
        console.print("Interpreted on a CPU: parity is real, the times say nothing about speed.", style="yellow")


# ---------------------------------------------------------------- the whole run of bench.gpu

STEP_HEADER = [
    "model",
    "batch x accumulation",
    "variant",
    "tokens/s",
    "ms/step",
    "± IQR",
    "MFU",
    "peak GB",
    "vs eager",
]


def step_rows(steps: list[dict[str, Any]], *, header: bool = False) -> list[list[str]]:
    """One row per training step measured; ratios are within the same model, tokens per step and memory cap (where memory
    runs out, a variant gets smaller micro-batches and more of them)."""
    rows = [STEP_HEADER] if header else []
    for step in steps:
        model = step["preset"] + (f", {step['cap_gb']:g} GB cap" if step.get("cap_gb") else "")
        geometry = f"{step['batch_size']} x {step['grad_accum']}"
        if "tokens_per_second" not in step:
            reason = step.get("error", "not run")[:160]
            rows.append([model, geometry, step["variant"], reason, *[""] * (len(STEP_HEADER) - 4)])
            continue
        eager = [s for s in steps if s["variant"] == "eager" and _group(s) == _group(step) and "tokens_per_second" in s]
        ratio = step["tokens_per_second"] / eager[0]["tokens_per_second"] if eager else None
        rows.append(
            [
                model,
                geometry,
                step["variant"],
                f"{step['tokens_per_second']:,.0f}",
                f"{step['ms']:.1f}",
                f"{step['iqr_ms']:.1f}",
                _figure(step.get("mfu"), ".1%"),
                _figure(step.get("peak_memory"), ".2f", 1e-9),
                "n/a" if ratio is None else f"{ratio:.2f}x",
            ]
        )
    return rows


def _group(step: dict[str, Any]) -> tuple:
    return step["preset"], step.get("cap_gb"), step["batch_size"] * step["grad_accum"]


class MemoryRow(NamedTuple):
    """A measured step beside what fastgpt/performance/memory.py counts for it."""

    step: dict[str, Any]
    counted: int
    """Bytes allocated at the peak."""

    @property
    def off(self) -> float:
        return self.counted / self.step["peak_memory"] - 1


def memory_rows(results: dict[str, Any]) -> list[MemoryRow]:
    """The steps whose peak memory is known, and can be counted."""
    found = []
    hopper = results["environment"].get("arch") == "sm_90"
    workspace = CUBLAS_WORKSPACE_HOPPER if hopper else CUBLAS_WORKSPACE
    for step in results.get("steps", ()):
        variant = VARIANTS.get(step["variant"])
        kernels = {"nanogpt": "nanogpt-compile"}.get(step["variant"], step["variant"].split(" ")[0])
        if variant is not None and kernels in KERNELS and step.get("peak_memory") and not step.get("cap_gb"):
            counted = memory(
                load_preset(step["preset"], "cuda").model, micro_batch=step["batch_size"], kernels=kernels,
                precision=variant.precision, workspace=workspace,
            )  # fmt: skip
            found.append(MemoryRow(step, counted.allocated))
    return found


def gpu_markdown(results: dict[str, Any]) -> str:
    """All stages; those that have not run yet are left out, and those that could not say why."""
    parts = ["# fastgpt on " + results["environment"]["device"], where(results["environment"])]
    for name, (title, section) in SECTIONS.items():
        found, ended = results.get(name), results.get("stages", {}).get(name, {}).get("ended", True)
        if found or ended is not True:
            parts.append(f"## {title}")
        if ended is not True:
            parts.append(f"Not complete: {ended}")
        if found:
            parts += section(found)
    if rows := memory_rows(results):
        parts += ["## Peak memory", *_memory(rows)]
    return "\n\n".join(parts) + "\n"


def _device(device: dict[str, Any]) -> list[str]:
    load, ceilings = device["under_load"], device["ceilings"]
    names = (("clock_mhz", "MHz"), ("power_w", "W"), ("temperature_c", "C"))
    said = [f"{load[key]:.0f} {unit}" for key, unit in names if load and load.get(key) is not None]
    rates = [f"{name} {rate:.1f}" for name, rate in ceilings["matmul_tflops"].items() if rate is not None]
    parts = [
        f"Under load: {', '.join(said) or 'not known, as nvidia-ml-py is not here'}. Copy {ceilings['copy_gbs']:.0f} GB/s; "
        f"matmul, TFLOP/s: {', '.join(rates)}."
    ]
    return parts + [f"Cannot be imported: {name}: {error}" for name, error in device["failed_imports"].items()]


def _train(runs: dict[str, Any]) -> list[str]:
    rows = [
        [name, _figure(run.get("ms"), ".1f"), " to ".join(f"{loss:.4f}" for loss in _ends(run)) or run.get("error", "")]
        for name, run in runs.items()
    ]
    return ["30 steps of the demo on real text.", markdown([["run", "ms/step", "loss"], *rows])]


def _ends(run: dict[str, Any]) -> list[float]:
    losses = list(run.get("losses", {}).values())
    return [losses[0], losses[-1]] if losses else []


def _batch(batch: dict[str, Any]) -> list[str]:
    rows = [[str(size), f"{rate:,.0f}"] for size, rate in batch["tokens_per_second"].items()]
    return ["GPT-2 124M, triton, by micro-batch.", markdown([["micro-batch", "tokens/s"], *rows])]


def _tests(tests: dict[str, Any]) -> list[str]:
    counts = ", ".join(f"{tests[key]} {key}" for key in ("passed", "failed", "skipped", "not_reached"))
    end = "" if tests.get("finished", True) else " (cut off by the time budget)"
    parts = [
        f"{counts} in {tests['seconds']:.0f} s{end}, in {tests['processes']} processes; {tests['compiled']:,} compiled."
    ]
    return parts + (["Failed: " + ", ".join(tests["failures"][:20])] if tests.get("failures") else [])


def _steps(steps: list[dict[str, Any]]) -> list[str]:
    about = (
        "Whole optimizer steps on random tokens: bf16 autocast, dropout as in the preset. eager: SDPA, F.cross_entropy, "
        "torch's fused AdamW and clip_grad_norm_; compile: the same under torch.compile; nanogpt: the step of its train.py; "
        "triton+compile: our kernels under torch.compile. MFU: 6N + 12LCT over the card's nominal dense bf16 peak."
    )
    return [about, markdown([STEP_HEADER, *step_rows(steps)])]


def _profile(profile: dict[str, Any]) -> list[str]:
    rows = [
        [name, f"{b['ms']:.1f}" if "ms" in b else "error: " + b.get("error", "not run")[:160]]
        for name, b in profile["backends"].items()
    ]
    about = f"A step of GPT-2 124M, operation by operation: {profile['report']} (figures: {profile['file']})."
    return [about, markdown([["backend", "ms/step"], *rows])]


def _projection(projection: dict[str, Any]) -> list[str]:
    rows = [
        [
            pair["what"],
            pair["variant"],
            _figure(pair["measured_ms"], ".3f"),
            _figure(pair["projected_ms"], ".3f"),
            _figure(pair["error"], "+.0%"),
            pair["note"] or pair["status"],
        ]
        for pair in projection["pairs"]
    ]
    about = "Projected by bench.project with its committed constants, without this measurement."
    if projection.get("calibration_error") is not None:
        about += f" Error of its calibration: {projection['calibration_error']:.1%}."
    header = ["what", "variant", "measured ms", "projected ms", "projection is off by", "note"]
    parts = [about, markdown([header, *rows])] if rows else []
    return parts + [f"Not projected: {error}" for error in projection.get("errors", [])]


def _ablation(found: dict[str, Any]) -> list[str]:
    about = "GPT-2 124M, one thing changed: the change of the step's time as measured, and as projected for this card."
    rows = []
    for row in found["rows"]:
        measured, projected = row["measured"] or {}, row["projected_change"]
        shipped = row["variant"] == "as shipped"
        figure = f"{measured['ms']:.1f} ms" if shipped and "ms" in measured else measured.get("error", "-")
        figure = f"{measured['change']:+.1%}" if not shipped and "change" in measured else figure
        cells = [figure, "-" if projected is None or shipped else f"{projected:+.1%}"]
        rows.append([row["precision"], row["variant"], *cells, row["meaning"]])
    header = ["precision", "variant", "measured", "projected", "what runs instead"]
    return [about, markdown([header, *rows])]


def _memory(rows: list[MemoryRow]) -> list[str]:
    cells = [["step", "predicted GB", "measured GB", "prediction is off by"]]
    for row in rows:
        sizes = [f"{size / 1e9:.2f}" for size in (row.counted, row.step["peak_memory"])]
        name = f"{row.step['preset']}, {row.step['variant']}, micro-batch {row.step['batch_size']}"
        cells.append([name, *sizes, f"{row.off:+.1%}"])
    return ["Allocated at the peak of the steps above.", markdown(cells)]


def _tuning(tuning: dict[str, Any]) -> list[str]:
    return [f'{tuning["entries"]} launch configs were measured: {tuning["table"]}. The steps above have it as "tuned".']


SECTIONS: dict[str, tuple[str, Callable[[Any], list[str]]]] = {
    "device": ("The device", _device),
    "train": ("Training", _train),
    "batch": ("The best micro-batch", _batch),
    "parity": ("Parity tests on this GPU", _tests),
    "steps": ("Training steps", _steps),
    "profile": ("Where the time goes", _profile),
    "kernels": ("Kernels", _kernels),
    "tuning": ("Tuning", _tuning),
    "ablation": ("What each fusion is worth", _ablation),
    "projection": ("Predicted beside measured", _projection),
}
"""By the name of the stage, in the order of the report: its title, and what stands under it."""


def plot_steps(results: dict[str, Any], path: Path) -> bool:
    """Tokens per second and peak memory, one group of bars per model, cap and sequences per step. False without matplotlib or
    figures."""
    steps = results.get("steps", [])
    measured = [step for step in steps if "tokens_per_second" in step] if isinstance(steps, list) else []
    try:
        import matplotlib
    except ImportError:
        return False
    if not measured:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys(_group(step) for step in measured))
    variants = list(dict.fromkeys(step["variant"] for step in measured))
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    quantities = (("tokens_per_second", 1.0, "tokens/s"), ("peak_memory", 1e-9, "peak memory, GB"))
    for ax, (key, scale, label) in zip(axes, quantities):
        for i, variant in enumerate(variants):
            bars = [
                (groups.index(_group(s)) + i / (len(variants) + 1), (s.get(key) or 0) * scale)
                for s in measured
                if s["variant"] == variant
            ]
            ax.bar([x for x, _ in bars], [y for _, y in bars], width=1 / (len(variants) + 1), label=variant)
        ax.set_xticks([g + 0.4 * (len(variants) - 1) / len(variants) for g in range(len(groups))])
        ax.set_xticklabels(
            [preset + (f"\n{cap:g} GB cap" if cap else f"\n{rows} rows") for preset, cap, rows in groups]
        )
        ax.set_ylabel(label)
    axes[0].legend()
    figure.suptitle(f"Training step on {results['environment']['device']}, measured")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True
