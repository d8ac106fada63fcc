"""What the compiler made of every kernel of a training step, for a GPU that is not here; and a gate on it.

    python -m bench.audit                                # RTX 4070: the shipped steps, and today's sample of the rest
    python -m bench.audit --arch sm_90 --all --jobs 4    # everything, for H100
    python -m bench.audit --only "attention bf16 D64"    # cases whose name matches

The host code of a step (GPT-2 124M and 40M, forward, backward, FusedAdamW) runs at its real shapes on CPU tensors, and each
launch is compiled. "The rest" is bench/ops (other dtypes, head sizes, widths, options) and steps of other presets
and precisions; without --all an eighth of it is compiled, another one each day.

The gate (exit 1): no kernel spills registers; each fits the shared memory of a block; a kernel with matrix products
(``tl.dot``, as compiled, whatever its name) uses tensor cores. Products in true fp32 (``input_precision="ieee"``) are
exempt: tensor cores have none.

In the tables: waves are blocks over what the card holds at once, and how full the last one is; spills are bytes of stack
and instructions that load and store them; shared memory is bytes per block; blocks/SM names what keeps it from more;
128-bit is the share of global-memory instructions that are so wide; tensor counts tensor-core instructions ("fp32": exempt),
whose kinds stand behind the config.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any

from rich.console import Console

from bench.compiler.audit import Audit, run, target
from bench.reports.tables import Cells, print_table, terminal, waiting
from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import UserError
from fastgpt.config import load_preset

SAMPLE = 8
"""Without --all, one of so many parts of the rest."""


def print_audit(found: Audit) -> None:
    """Two tables per step, figures and configs, and two for the other cases. They fit 120 columns."""
    console, card = terminal(120), found.gpu
    steps = list(dict.fromkeys(row["case"] for row in found.rows if row["case"].startswith("step ")))
    for case in steps:
        rows = [row for row in found.rows if row["case"] == case]
        _, preset, precision = case.split()
        config = load_preset(preset, "cuda")
        geometry = f"{config.data.batch_size} x {config.model.block_size}"
        launches = sum(row["launches"] for row in rows)
        title = f"{preset} {precision}: {launches} launches in a step of 2 micro-batches of {geometry}"
        _print_rows(console, f"{title}, on {card.name} ({card.arch}, {card.sm_count} SMs)", rows, with_waves=True)
    others = [row for row in found.rows if row["case"] not in steps]
    if others:
        title = f"Other cases ({card.arch}): {len(others)} kernels that no step above launches"
        _print_rows(console, title, others, with_waves=False)
    console.print("Compiled, not run: these are the compiler's figures, not measurements of time.", style="dim")


def _print_rows(console: Console, title: str, rows: list[dict[str, Any]], *, with_waves: bool) -> None:
    head = ["#", "kernel", *(("launches", "blocks", "waves (last)") if with_waves else ())]
    figures: Cells = [[*head, "regs", "spills", "shared", "blocks/SM", "128-bit", "tensor"]]
    configs: Cells = [["#", "kernel", "config"]]
    for n, row in enumerate(rows, 1):
        file = row["module"].removeprefix("fused_").replace("cross_entropy", "loss")
        name = [str(n), f"{file}: {row['kernel'].strip('_').removesuffix('_kernel')}"]
        launched = []
        if with_waves:
            waves = "-" if row["waves"] is None else f"{row['waves']:.2f} ({row['last_wave']:.0%})"
            launched = [str(row["launches"]), "x".join(f"{n}" for n in row["grid"] if n > 1) or "1", waves]
        spills = f"{row['stack']} B {row['spill_loads']}+{row['spill_stores']}"
        used = [str(row["registers"]), spills if spills != "0 B 0+0" else "0", f"{row['shared']:,}"]
        used += [f"{row['blocks_per_sm']} {row['limiter']}", f"{row['wide_share']:.0%}"]
        tensor = f"{sum(row['tensor_core'].values())}" if row["tensor_core"] else "fp32" if row["dots"] else "-"
        figures.append([*name, *launched, *used, tensor])
        kinds = "".join(f", {number} {op}" for op, number in row["tensor_core"].items())
        case = "" if with_waves else f"  ({row['case']})"
        configs.append([*name, f"{row['dtype']} {row['config']}{case}{kinds}"])

    def style(line: list[str]) -> str | None:
        return "red" if rows[int(line[0]) - 1]["problems"] else None

    print_table(console, title, figures, style, narrow=True)
    print_table(console, "", configs, lambda line: style(line) or "dim", narrow=True)


@dataclass(frozen=True)
class AuditConfig:
    arch: str | None = None
    """sm_80, sm_86, sm_89, sm_90 or sm_120. Without it: the card's, or sm_89."""
    gpu: str | None = None
    """The card whose SMs are counted: rtx4070, h100, ... Without it: one of the architecture."""
    all: bool = False
    """Every case, not a sample of the rest."""
    only: Annotated[str | None, Arg("REGEX")] = None
    """Only the cases whose name has this, all of them."""
    sample: Annotated[int | None, Arg("SEED")] = None
    """Which eighth of the rest. Without it: by the date."""
    shard: Annotated[str | None, Arg("K/N")] = None
    """The K-th of N parts of the rest, instead of a sample."""
    jobs: int = min(4, os.cpu_count() or 1)
    """Processes."""
    json: bool = False
    """Print JSON."""


def main(argv: list[str]) -> int:
    args = command.parse(AuditConfig, argv, "bench.audit", __doc__)
    if args.jobs < 1:
        raise UserError(f"jobs is {args.jobs}: it must be at least 1")
    shard = (1, 1) if args.all else _shard(args.shard, args.sample)
    card = target(args.arch, args.gpu)
    with waiting(f"compiling kernels for {card.name} in {args.jobs} process{'es' * (args.jobs != 1)}"):
        found = run(card, only=args.only, shard=shard, jobs=args.jobs)
    if args.json:
        print(json.dumps(found.to_json()))
    else:
        print_audit(found)
    for failure in found.failures:
        print(f"gate: {failure}", file=sys.stderr)
    if not found.failures and not args.json:
        part = "" if args.all or args.only else f" (shipped steps and part {shard[0]} of {shard[1]} of the rest)"
        cases = f"{len(found.cases)} case{'s' * (len(found.cases) != 1)}"
        print(f"gate: passed with triton {found.triton}, {cases}{part}")
    return 1 if found.failures else 0


def _shard(shard: str | None, seed: int | None) -> tuple[int, int]:
    if shard is None:
        return (date.today().toordinal() if seed is None else seed) % SAMPLE + 1, SAMPLE
    parsed = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not parsed or not 1 <= int(parsed[1]) <= int(parsed[2]):
        raise UserError(f"shard is {shard!r}: it must be K/N with 1 <= K <= N, such as 1/8")
    return int(parsed[1]), int(parsed[2])


if __name__ == "__main__":
    common.run(main)
