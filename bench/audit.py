"""What the compiler made of every kernel of a training step, for a GPU that is not here; and a gate on it.

    python -m bench.audit                                # RTX 4070: the shipped steps, and today's sample of the rest
    python -m bench.audit --arch sm_90 --all --jobs 4    # everything, for H100
    python -m bench.audit --only "attention bf16 D64"    # cases whose name matches

The host code of a step (GPT-2 124M and 40M, forward, backward, FusedAdamW) runs at its real shapes on CPU tensors, and each
launch is compiled. "The rest" is common.py (other dtypes, head sizes, widths, options) and steps of other presets
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
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any

from fastgpt import command as command_module
from fastgpt import common
from fastgpt.command import Arg
from fastgpt.common import UserError
from fastgpt.hardware import cards
from fastgpt.hardware.environment import ROOT

SCHEMA_VERSION = 1
DEFAULT_GPU = {"sm_80": "a100", "sm_86": "rtx3070", "sm_89": "rtx4070", "sm_90": "h100", "sm_120": "rtx5070"}
"""The card whose SMs are counted, by architecture."""
SAMPLE = 8
"""Without --all, one of so many parts of the rest."""


@dataclass(frozen=True)
class Audit:
    """``rows``: plain dicts, the fields of cubin.Row and ``waves``, ``last_wave`` and ``problems``. In a step there is
    one per binary and grid; of the other cases, one per binary that no step launches."""

    gpu: cards.Gpu
    triton: str
    """The version that compiled."""
    cases: list[str]
    rows: list[dict[str, Any]]
    errors: dict[str, str]
    """Cases that do not compile, with the compiler's message."""

    @property
    def failures(self) -> list[str]:
        """A sentence for each thing that the gate does not let through."""
        found = [f"{case}: {message}" for case, message in self.errors.items()]
        for row in self.rows:
            found += [f"{row['kernel']} {row['dtype']} ({row['case']}) {row['config']}: {p}" for p in row["problems"]]
        return found

    def to_json(self) -> dict[str, Any]:
        about = {
            "schema_version": SCHEMA_VERSION,
            "arch": self.gpu.arch,
            "gpu": self.gpu.name,
            "sms": self.gpu.sm_count,
        }
        about |= {"triton": self.triton, "cases": self.cases}
        return about | {"rows": self.rows, "errors": self.errors, "failures": self.failures}


def audit(arch: str = "sm_89", only: str | None = None, gpu: str | None = None) -> list[dict[str, Any]]:
    """The rows of the shipped steps, or of every case that the regular expression ``only`` is found in ("step gpt2-124m
    bf16"). Compiles in a process of its own: this one may interpret kernels.

    Raises UserError for an architecture, card or expression that there is not, RuntimeError if a case does not compile.
    """
    found = run(target(arch, gpu), only=only, shard=None)
    for case, message in found.errors.items():
        raise RuntimeError(f"{case}: {message}")
    return found.rows


def target(arch: str | None, gpu: str | None) -> cards.Gpu:
    """The card to audit for: ``gpu`` by name, or the usual one of ``arch``. They must agree if both are given."""
    if arch is not None and arch not in DEFAULT_GPU:
        raise UserError(f"arch is {arch!r}: it must be one of {', '.join(DEFAULT_GPU)}")
    name = gpu or DEFAULT_GPU[arch or "sm_89"]
    card = cards.card(name)
    if card.arch not in DEFAULT_GPU:
        raise UserError(f"gpu is {gpu!r} ({card.arch}): kernels are compiled for {', '.join(DEFAULT_GPU)}")
    if arch not in (None, card.arch):
        raise UserError(
            f"gpu is {gpu!r}, whose arch is {card.arch}, not {arch!r}: leave out --arch, or name another card"
        )
    return card


def run(card: cards.Gpu, *, only: str | None = None, shard: tuple[int, int] | None = (1, 1), jobs: int = 1) -> Audit:
    """Compile in ``jobs`` processes; ``only`` and ``shard`` as in audit_child.select."""
    try:
        re.compile(only or "")
    except re.error as error:
        raise UserError(f"only is {only!r}, which is not a regular expression: {error}") from None
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}

    def child(part: int) -> dict[str, Any]:
        job = {"arch": int(card.arch[3:]), "sms": card.sm_count, "only": only, "shard": shard, "part": (part, jobs)}
        command = [sys.executable, "-m", "bench.compiler.audit_child", json.dumps(job)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"bench.compiler.audit_child ended with code {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(jobs) as pool:
        parts = list(pool.map(child, range(1, jobs + 1)))
    cases = [case for part in parts for case in part["cases"]]
    if not cases:
        raise UserError(
            f"only is {only!r}, and no case has that in its name: 'step', 'attention' or 'adamw' would match"
        )
    rows = [judge(row, card) for row in _merge([row for part in parts for row in part["rows"]])]
    errors = {case: message for part in parts for case, message in part["errors"].items()}
    return Audit(card, parts[0]["triton"], sorted(cases), rows, errors)


def _merge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps first, whole; then, of the other cases, each binary that has not come yet."""
    steps = [row for row in rows if row["case"].startswith("step ")]
    seen = {row["key"]: row for row in steps}
    others = [row for row in rows if row["key"] not in seen and seen.setdefault(row["key"], row) is row]
    return steps + others


def judge(row: dict[str, Any], card: cards.Gpu) -> dict[str, Any]:
    """The row with its waves on this card and what is wrong with it.

    ``waves``: blocks of the grid over blocks that the card holds at once; ``last_wave``: how full the last one is, 1 if the
    grid divides evenly. None where the grid is not a real step's, or where no block fits.
    """
    problems = []
    if row["stack"] or row["spill_loads"] or row["spill_stores"]:
        problems.append(
            f"spills {row['stack']} bytes a thread, {row['spill_loads']} loads, {row['spill_stores']} stores"
        )
    limit = card.chip.shared_per_block
    if row["shared"] > limit:
        problems.append(f"takes {row['shared']:,} bytes of shared memory, over the limit of {limit:,}")
    elif not row["blocks_per_sm"]:
        problems.append(f"does not fit an SM: {row['limiter']}")
    if row["tensor_dots"] and not row["tensor_core"]:
        problems.append(f"has {row['tensor_dots']} matrix products and no tensor-core instruction")
    waves = last = None
    if row["case"].startswith("step ") and row["blocks_per_sm"]:
        blocks, held = 1, card.sm_count * row["blocks_per_sm"]
        for size in row["grid"]:
            blocks *= size
        waves, last = blocks / held, (blocks % held or held) / held
    return {**row, "waves": waves, "last_wave": last, "problems": problems}


# ---------------------------------------------------------------- output


def print_audit(found: Audit, width: int | None = None) -> None:
    """Two tables per step, figures and configs, and two for the other cases. They fit 120 columns."""
    from rich.console import Console

    from fastgpt.config import load_preset

    console = Console(width=width or (None if sys.stdout.isatty() else 120), highlight=False)
    card = found.gpu
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


def _print_rows(console: Any, title: str, rows: list[dict[str, Any]], *, with_waves: bool) -> None:
    from rich import box
    from rich.table import Table

    def table(**options: Any) -> Table:
        new = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), **options)
        new.add_column("#", justify="right", no_wrap=True)
        new.add_column("kernel", no_wrap=True)
        return new

    figures, configs = table(), table(show_header=False)
    for name in ("launches", "blocks", "waves (last)") if with_waves else ():
        figures.add_column(name, justify="right", no_wrap=True)
    for name in ("regs", "spills", "shared", "blocks/SM", "128-bit", "tensor"):
        figures.add_column(name, justify="right", no_wrap=True)
    configs.add_column("config", overflow="fold")
    for n, row in enumerate(rows, 1):
        file = (
            row["module"]
            .removeprefix("_")
            .removeprefix("fused_")
            .removesuffix("_kernels")
            .replace("cross_entropy", "loss")
        )
        kernel = f"{file}: {row['kernel'].strip('_').removesuffix('_kernel')}"
        cells = [str(n), kernel]
        if with_waves:
            waves = "-" if row["waves"] is None else f"{row['waves']:.2f} ({row['last_wave']:.0%})"
            cells += [str(row["launches"]), "x".join(f"{n}" for n in row["grid"] if n > 1) or "1", waves]
        spills = f"{row['stack']} B {row['spill_loads']}+{row['spill_stores']}"
        cells += [str(row["registers"]), spills if spills != "0 B 0+0" else "0", f"{row['shared']:,}"]
        cells += [f"{row['blocks_per_sm']} {row['limiter']}", f"{row['wide_share']:.0%}"]
        cells.append(f"{sum(row['tensor_core'].values())}" if row["tensor_core"] else "fp32" if row["dots"] else "-")
        style = "red" if row["problems"] else None
        figures.add_row(*cells, style=style)
        config = f"{row['dtype']} {row['config']}" + ("" if with_waves else f"  ({row['case']})")
        kinds = "".join(f", {number} {op}" for op, number in row["tensor_core"].items())
        configs.add_row(str(n), kernel, config + kinds, style=style or "dim")
    console.print(f"[bold]{title}[/]", soft_wrap=True)
    console.print(figures)
    console.print(configs)


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
    args = command_module.parse(AuditConfig, argv, "bench.audit", __doc__)
    if args.jobs < 1:
        raise UserError(f"jobs is {args.jobs}: it must be at least 1")
    shard = (1, 1) if args.all else _shard(args.shard, args.sample)
    found = run(target(args.arch, args.gpu), only=args.only, shard=shard, jobs=args.jobs)
    if args.json:
        print(json.dumps(found.to_json()))
    else:
        print_audit(found)
    for failure in found.failures:
        print(f"gate: {failure}", file=sys.stderr)
    if not found.failures and not args.json:
        part = "" if args.all or args.only else f" (shipped steps and part {shard[0]} of {shard[1]} of the rest)"
        print(f"gate: passed, {len(found.cases)} cases{part}")
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
