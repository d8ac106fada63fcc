"""What each fusion is worth: the training step with one of them switched off, projected, and measured where there is a GPU.

    python -m bench.ablation                                  # RTX 4070, GPT-2 124M and 40M: projected
    python -m bench.ablation --gpu h200 --models gpt2-124m
    python -m bench.ablation --measure --budget 10m           # on a GPU: measured beside projected, kept in bench/results/
    python -m bench.ablation --plot ablation.png --json ablation.json

Off means: what PyTorch does in its place, as in --kernels eager. Two rows switch on what is off by default. In fp16-fast a
part is off if its products are summed in fp32 again. Projected figures are the central ones of performance/projection.py, per
optimizer step; measured ones are the change of a step of four micro-batches. A variant whose first loss is not the shipped
step's gets no figure.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from bench.reports import tables
from bench.reports.timing import parse_budget
from bench.steps.ablation_measure import VARIANTS, Measured, Variant
from fastgpt import command, common
from fastgpt.anatomy import Shape
from fastgpt.command import Arg
from fastgpt.common import UserError, at_least, write_json
from fastgpt.config import Config, load_preset, preset_names
from fastgpt.hardware import cards
from fastgpt.hardware.cards import Gpu
from fastgpt.hardware.requirements import check_kernels, no_gpu
from fastgpt.performance.operation import AS_SHIPPED, Fusions
from fastgpt.performance.operations import LINEARS, PASSES, operations
from fastgpt.performance.step_time import CONSTANTS, OperationTime, step_times

SCHEMA_VERSION = 1


PARTS = {
    "linears": {f"{name} {way}" for name in LINEARS[:-1] for way in PASSES} | {"GELU forward", "GELU backward"},
    "head": {f"head {way}" for way in PASSES},
    "attention": {"attention forward", "attention backward"},
}
"""The groups of operations in fp16-fast whose products are summed in fp16. With the linears go the epilogues."""

# ---------------------------------------------------------------- projected


def projected(config: Config, gpu: Gpu, variant: Variant) -> float | None:
    """Milliseconds per optimizer step, central; None where the card gains nothing from the precision, and so never runs it."""
    if variant.precision == "fp16-fast" and not cards.gains("fp16-fast", gpu):
        return None
    fusions = AS_SHIPPED
    if variant.fusion:
        fusions = replace(fusions, **{variant.fusion: variant.on})
    times = _times(config, gpu, variant.precision, fusions, graphs=variant.graphs)
    if variant.part:
        plain = _times(config, gpu, "fp16", fusions)
        groups = PARTS[variant.part]
        kept = [op for op in times if op.group not in groups] + [op for op in plain if op.group in groups]
        times = [op for op in kept if op.bound != "launch"]
        return sum(op.ms for op in times) + 1e-3 * CONSTANTS.kernel_gap_us * sum(op.launches for op in times)
    return sum(op.ms for op in times)


def _times(config: Config, gpu: Gpu, precision: str, fusions: Fusions, *, graphs: bool = False) -> list[OperationTime]:
    model, data = config.model, config.data
    ops = operations(
        Shape.of(model), "triton", data.batch_size, model.block_size, precision,
        dropout=model.dropout, sm_count=gpu.sm_count, fusions=fusions,
    )  # fmt: skip
    return step_times(ops, data.grad_accum, gpu, precision, CONSTANTS, graphs=graphs)


@dataclass(frozen=True)
class AblationRow:
    """One variant of one model. ``change``: of the step's time, relative to the shipped step's in the same precision."""

    model: str
    variant: Variant
    projected_ms: float | None
    projected_change: float | None
    measured: dict[str, Any] | None = None
    """``ms``, ``iqr_ms``, ``runs``, ``change``, of four micro-batches; or ``error``; None where nothing was run."""

    def to_json(self) -> dict[str, Any]:
        about = {"model": self.model, "precision": self.variant.precision, "variant": self.variant.name}
        figures = {"projected_ms": self.projected_ms, "projected_change": self.projected_change}
        return {**about, "meaning": self.variant.text, **figures, "measured": self.measured}


def table(models: list[str], gpu: Gpu, measured: Measured | None = None) -> list[AblationRow]:
    """Every variant of every model. ``measured``: by (model, variant's key)."""
    rows = []
    for model in models:
        config = load_preset(model, "cuda")
        shipped: dict[str, float | None] = {}
        for variant in VARIANTS:
            ms = projected(config, gpu, variant)
            shipped.setdefault(variant.precision, ms)
            base = shipped[variant.precision]
            change = None if ms is None or base is None else ms / base - 1
            rows.append(AblationRow(model, variant, ms, change, (measured or {}).get((model, variant.key))))
    return rows


# ---------------------------------------------------------------- output


def cells(rows: list[AblationRow]) -> tables.Cells:
    """The table of one model."""
    found = [["precision", "variant", "projected ms", "projected change", "measured change", "what runs instead"]]
    for row in rows:
        ms = "-" if row.projected_ms is None else f"{row.projected_ms:,.0f}"
        change = "-" if row.projected_change is None else f"{row.projected_change:+.1%}"
        figures = [ms, "" if row.variant.is_shipped else change, _measured(row)]
        found.append([row.variant.precision, row.variant.name, *figures, row.variant.text])
    return found


def _measured(row: AblationRow) -> str:
    if row.measured is None:
        return "projected only"
    if "error" in row.measured:
        return "no figure"
    return f"{row.measured['ms']:,.1f} ms" if row.variant.is_shipped else f"{row.measured['change']:+.1%}"


def markdown(rows: list[AblationRow]) -> str:
    """The tables, as docs/performance.md has them."""
    return "\n".join(f"{model}:\n\n{tables.markdown(found)}\n" for model, found in _by_model(rows))


def _by_model(rows: list[AblationRow]) -> Iterator[tuple[str, tables.Cells]]:
    for model in dict.fromkeys(row.model for row in rows):
        yield model, cells([row for row in rows if row.model == model])


def show(rows: list[AblationRow], gpu: Gpu) -> None:
    from rich.markup import escape

    console = tables.terminal(140)
    for model, found in _by_model(rows):
        title = f"{gpu.name}, {model}: one thing changed (projected is a model's figure, not a measurement)"
        tables.print_table(console, title, found, lambda line: "bold" if line[1] == "as shipped" else None)
    for row in rows:
        if row.measured and "error" in row.measured:
            console.print(f"{row.model}, {row.variant.key}: {escape(row.measured['error'])}", style="yellow")


def plot(rows: list[AblationRow], gpu: Gpu, path: Path) -> None:
    """Bars: by how much the step gets longer (projected; measured beside it where there is one)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row.model for row in rows))
    names = [v.key for v in VARIANTS if not v.is_shipped]
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(names) + 1.2), constrained_layout=True)
    height = 0.8 / max(1, len(models))
    for i, model in enumerate(models):
        changes = {row.variant.key: row for row in rows if row.model == model}
        shown = [100 * (changes[name].projected_change or 0.0) for name in names]
        at = [-n - i * height for n in range(len(names))]
        axes.barh(at, shown, height, label=f"{model}, projected")
        real = {n: m["change"] for n in names if (m := changes[n].measured) and "change" in m}
        axes.plot([100 * real[n] for n in names if n in real], [at[names.index(n)] for n in names if n in real], "k|")
    axes.set_yticks([-n - height * (len(models) - 1) / 2 for n in range(len(names))], names)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("change of the step's time, %")
    kind = "marks: measured" if any(row.measured for row in rows) else "nothing was measured"
    axes.set_title(f"{gpu.name}, one thing changed: projected ({kind})", loc="right")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- command line


@dataclass(frozen=True)
class AblationConfig:
    gpu: str | None = None
    """The card to project for. Without it: rtx4070; with --measure, the one that is here."""
    models: Annotated[str, Arg("PRESET,PRESET")] = "gpt2-124m,gpt2-40m"
    """Presets."""
    measure: bool = False
    """Run each variant on this GPU, too."""
    budget: Annotated[str, Arg("TIME")] = "10m"
    """With --measure: stop after it."""
    json: Annotated[Path | None, Arg("FILE")] = None
    """Write the table there, too."""
    plot: Annotated[Path | None, Arg("FILE")] = None
    """Draw it."""
    markdown: bool = False
    """Print it as docs/performance.md has it."""
    batch_size: Annotated[int | None, Arg("N")] = None
    """With --measure: sequences per micro-batch. Without it: the preset's."""
    no_store: bool = False
    """Do not keep what was measured in bench/results/."""


def main(argv: list[str]) -> int:
    args = command.parse(AblationConfig, argv, "bench.ablation", __doc__)
    models, budget = args.models.split(","), parse_budget(args.budget)
    for model in models:
        if model not in preset_names():
            raise UserError(f"models has {model!r}: each can be {', '.join(preset_names())}")
    if args.measure and not torch.cuda.is_available():
        raise UserError(f"measure needs a CUDA GPU, but {no_gpu()}: leave it out to see projected figures")
    if args.measure:
        check_kernels("bench.ablation --measure")
    gpu = _card(args.gpu, args.measure)
    at_least(1, batch_size=args.batch_size)
    measured: Measured = {}

    def keep(measured: Measured) -> None:
        if args.json:
            rows = [row.to_json() for row in table(models, gpu, measured)]
            write_json(args.json, {"schema_version": SCHEMA_VERSION, "gpu": gpu.name, "rows": rows})

    if args.measure:
        from bench.steps import ablation_measure

        device, deadline = torch.device("cuda"), time.monotonic() + budget
        measured = ablation_measure.run(models, device, deadline, batch_size=args.batch_size, save=keep)
        if not args.no_store:
            print(f"Kept in {ablation_measure.store(measured, torch.device('cuda'))}.")
    rows = table(models, gpu, measured)
    keep(measured)
    if args.plot:
        plot(rows, gpu, args.plot)
    if args.markdown:
        print(markdown(rows))
    else:
        show(rows, gpu)
    return 0


def _card(name: str | None, measure: bool) -> Gpu:
    if name is None and measure and (present := cards.present(torch.device("cuda"))) is not None:
        return present
    return cards.card(name or "rtx4070")


if __name__ == "__main__":
    common.run(main)
