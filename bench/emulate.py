"""Runs the compiled kernels without a GPU: the PTX for a card, executed on the CPU, with checks that no card makes.

    python -m bench.emulate                            # sm_89: today's sample of the cases, minutes
    python -m bench.emulate --all --json all.json      # every case
    python -m bench.emulate --arch sm_120 -k "attention bf16 D64" --once
    python -m bench.emulate --mutants -k "numbers layer_norm fp32 C7"

Reported are accesses outside of a tensor, misaligned or of memory that nobody wrote; races between CTAs and between
warps; reads of a copy not waited for; threads that miss a barrier; results that depend on the order of CTAs or
warps; and outputs and gradients further from fp64 than bench/parity.py allows. docs/kernels.md says what cannot be
seen this way.

"numbers" cases run whole grids at small sizes, "shapes" some CTAs of each launch at real ones, "far" addresses beyond 2^31
elements, "train" whole optimizer steps. An instruction that is not known fails its case by name. Exit code 1 if a case fails.
"""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch

from bench.compiler.audit import DEFAULT_GPU
from bench.reports.tables import Cells, print_table, terminal
from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import UserError
from fastgpt.hardware.device import interprets

SAMPLE = 2
"""About so many cases without --all and --only."""
KINDS = ("numbers", "shapes", "far", "train")
MMA_SYNC = tuple(arch for arch in DEFAULT_GPU if arch != "sm_90")
"""Architectures whose PTX has no instruction that is refused."""


@dataclass(frozen=True)
class EmulateConfig:
    arch: str = "sm_89"
    """sm_80, sm_86, sm_89 or sm_120."""
    all: bool = False
    """Every case, not a sample."""
    only: Annotated[str | None, Arg("REGEX", aliases=("-k",))] = None
    """Only the cases whose name has this, all of them."""
    once: bool = False
    """Run no launch a second time in another order: half the time."""
    sample: Annotated[int | None, Arg("SEED")] = None
    """Which sample. Without it: by the date."""
    list: bool = False
    """Print the names of the cases, and run none."""
    mutants: bool = False
    """Take every barrier and every wait out of the kernels of the cases in turn: is it noticed?"""
    json: Annotated[Path | None, Arg("FILE")] = None
    """Write everything that was found there."""

    def __post_init__(self) -> None:
        if self.arch not in MMA_SYNC:
            raise UserError(
                f"arch is {self.arch!r}: it must be one of {', '.join(MMA_SYNC)}, whose instructions are known"
            )
        try:
            re.compile(self.only or "")
        except re.error as error:
            raise UserError(f"only is {self.only!r}, which is not a regular expression: {error}") from None
        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise UserError(f"json is {self.json}: its folder does not exist")


def main(argv: list[str]) -> int:
    options = command.parse(EmulateConfig, argv, "bench.emulate", __doc__)
    if interprets():
        raise UserError("TRITON_INTERPRET is set, so kernels are interpreted, not compiled: unset it")
    torch.set_num_threads(1)
    from bench.emulator import cases  # which imports triton

    arch = int(options.arch[3:])
    every, seed = cases.cases(arch), date.today().toordinal() if options.sample is None else options.sample
    chosen = [case for case in every if re.search(options.only or "", case.name)]
    if not chosen:
        raise UserError(f"only is {options.only!r}, which is in the name of no case: --list has them")
    if options.list:
        print(*(case.name for case in chosen), sep="\n")
        return 0
    sampled = not options.all and options.only is None
    if sampled:
        chosen = sample(chosen, seed)
    if options.mutants:
        from bench.emulator import mutants

        return mutants.report(chosen, arch)
    began, cpu = time.perf_counter(), time.process_time()
    outcomes = run(chosen, arch, once=options.once)
    spent = f"{time.process_time() - cpu:.0f} s of CPU, {time.perf_counter() - began:.0f} s"
    print_outcomes(outcomes, options.arch, spent)
    if sampled:
        print(f"a sample of {len(every)} cases: --sample {seed} repeats it, --all runs them all")
    if options.json is not None:
        common.write_json(options.json, to_json(outcomes, options.arch))
    if left := len(chosen) - len(outcomes):
        print(f"interrupted: {left} of {len(chosen)} cases were not run")
        return 130
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def sample(every: list[Any], seed: int, size: int = SAMPLE) -> list[Any]:
    """Some cases of each kind, others for another seed."""
    chance, found = random.Random(seed), []
    for kind in KINDS:
        of_kind = [case for case in every if case.name.startswith(kind)]
        share = max(1, round(size * len(of_kind) / len(every)))
        found += chance.sample(of_kind, min(share, len(of_kind)))
    return found


def run(chosen: list[Any], arch: int, once: bool) -> list[Any]:
    """One line for each case that fails, and on a terminal a bar. Those that ran, if Ctrl-C ends it."""
    from rich.console import Console
    from rich.progress import track

    from bench.emulator import cases

    console, outcomes = Console(stderr=True), []
    with suppress(KeyboardInterrupt):
        for case in track(chosen, "emulating", console=console, transient=True, disable=not console.is_terminal):
            outcomes.append(cases.execute(case, arch, **({"twice": False} if once else {})))
            if not outcomes[-1].passed:
                wrong = *outcomes[-1].problems, *outcomes[-1].faults
                print(f"FAILED {case.name}", *map(str, wrong), sep="\n  ", flush=True)
    return outcomes


def print_outcomes(outcomes: list[Any], arch: str, spent: str) -> None:
    table: Cells = [["cases", "run", "failed", "launches", "kernels", "binaries", "of the bound"]]
    for kind in KINDS:
        of_kind = [outcome for outcome in outcomes if outcome.case.startswith(kind)]
        if of_kind:
            launches = [launch for outcome in of_kind for launch in outcome.session.launches]
            counts = len(of_kind), sum(not outcome.passed for outcome in of_kind), len(launches)
            kinds = len({launch.kernel for launch in launches}), len({launch.key for launch in launches})
            used = max(outcome.used for outcome in of_kind)
            table.append([kind, *map(str, (*counts, *kinds)), f"{used:.2f}" if used else "-"])
    print_table(terminal(80), f"{arch}: {spent}", table)
    notes = Counter(f"{note.kind} ({note.kernel})" for outcome in outcomes for note in outcome.notes)
    for note, count in sorted(notes.items()):
        print(f"note: {note}, {count} x")
    print(f"{sum(not outcome.passed for outcome in outcomes)} of {len(outcomes)} cases failed")


def to_json(outcomes: list[Any], arch: str) -> dict[str, Any]:
    rows = [
        {
            "case": outcome.case,
            "passed": outcome.passed,
            "problems": outcome.problems,
            "faults": [str(fault) for fault in outcome.faults],
            "notes": [str(note) for note in outcome.notes],
            "share_of_bound": outcome.used,
            "cpu_seconds": round(outcome.seconds, 2),
            "launches": [[launch.kernel, launch.key, launch.ctas, launch.grid] for launch in outcome.session.launches],
        }
        for outcome in outcomes
    ]
    return {"arch": arch, "cases": rows}


if __name__ == "__main__":
    common.run(main)
