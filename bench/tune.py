"""Launch configs for a GPU: measured on the card that is here, or ranked by compiling for one that is not.

    python -m bench.tune                                    # on a GPU: measure, 10 minutes; run again to go on
    python -m bench.tune --kernel attention --budget 30m    # one kernel
    python -m bench.tune --rank --arch sm_89 --sms 46       # no GPU: what the compiler-based model says
    python -m bench.tune --check-model                      # on a large GPU: how often is the model's order right?

Configs are compiled on all other cores, ahead of their turn. Those that spill, or do not fit an SM, are left out by what the
compiler reports; the rest are ranked by the model in bench/compiler/ranking.py, and on a GPU the best of them are timed beside
the default, each in turn. The table goes to your cache directory (--out: elsewhere), where training finds it at its next
start, before the shipped ones. It is written whole after every bucket of shapes: a run that is interrupted, or whose budget is
up, goes on where it was. Tiles that --rank finds for matmuls that cuBLAS can compute go to hints/ in that folder: the next
measurement there times them first, and training never reads them.

--check-model confines this process to --sms SMs (46) of a larger GPU by a CUDA green context, times every config that the
model ranks, and reports the share of cases in which the model's first choice is within 5% of the best.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from bench.compiler import ranking, tune_measure
from bench.compiler.tune_table import HINTS, change, compiled_ahead, open_table, print_changes, save
from bench.ops import families
from bench.ops.common import Family
from bench.ops.linear import default_at
from bench.reports.timing import parse_budget
from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import UserError, at_least
from fastgpt.hardware import cards
from fastgpt.hardware.requirements import check_kernels, no_gpu
from fastgpt.kernels import tuning

# ---------------------------------------------------------------- ranking


def card_of(arch: str | None, sms: int | None, name: str | None = None) -> cards.Gpu:
    """The card of this name, or of this architecture and SM count (sm_89 and 46 where not given), of which the first in
    hardware.GPUS stands for all. Raises UserError if there is none."""
    tunable = [gpu for gpu in cards.GPUS if int(gpu.arch[3:]) >= 80]
    if name is not None:
        if arch or sms:
            raise UserError("gpu says which card it is: leave out --arch and --sms")
        card = cards.card(name)
        if card not in tunable:
            raise UserError(f"gpu is {name!r} ({card.arch}): kernels are compiled for sm_80 and later")
        return card
    arch, sms = arch or "sm_89", sms or 46
    alike = [gpu for gpu in tunable if gpu.arch == arch]
    if not alike:
        possible = sorted({gpu.arch for gpu in tunable}, key=lambda name: int(name[3:]))
        raise UserError(f"arch is {arch!r}: it must be one of {', '.join(possible)}")
    found = next((gpu for gpu in alike if gpu.sm_count == sms), None)
    if found is None:
        counts = ", ".join(map(str, sorted({gpu.sm_count for gpu in alike})))
        raise UserError(f"sms is {sms}: cards of {arch} in the table have {counts}")
    return found


def target_of(card: cards.Gpu) -> tuning.Target:
    return tuning.Target(int(card.arch[3:]), card.sm_count, card.chip.shared_per_block)


def ranked_entries(
    family: Family, found: list[ranking.Facts], default: dict[str, int], card: cards.Gpu
) -> Iterator[tuning.TableEntry]:
    """An entry per bucket for which some config is fit."""
    evidence: dict[str, Any]
    orders = {
        bucket: family.rank(bucket, found, default_at(family, bucket, default, card.sm_count), card)
        for bucket in family.buckets
    }
    for bucket, best in ranking.settle(orders).items():
        over = None if best.over_default is None else round(best.over_default, 3)
        evidence = {"model": ranking.MODEL, "source": tuning.source_hash(family.kernel), "over_default": over}
        evidence |= {"under": {name: round(score, 3) for name, score in best.under.items()}}
        evidence |= {"fill": round(best.fill, 3), "compared": len(orders[bucket])}
        parts: dict[str, float] = {}
        if family.kernel.startswith("attention") and best.facts.plain_loop is not None:
            read = ranking.l2_bytes(family.kernel, best.facts, D=64)
            parts = ranking.tile_parts(best.facts, best.facts.plain_loop, read, card)
        elif family.kernel.startswith("linear"):
            parts = ranking.tile_parts(best.facts, *ranking.linear_step(best.facts), card)
        if parts:
            evidence["tile_clocks"] = {name: round(clocks) for name, clocks in parts.items()}
        key = tuning.Key(family.kernel, family.dtype_name, bucket)
        yield tuning.TableEntry(key, best.facts.config, "ranked", best.facts.resources, evidence)


def rank(chosen: list[Family], card: cards.Gpu, path: Path, deadline: float) -> int:
    """Rank the families into the table at ``path``, or where cuBLAS competes into the hints beside it; entries that were
    measured stay. Returns the number not reached."""
    paths = {False: path, True: path.parent / HINTS.name / path.name}
    tables = {library: open_table(where, target_of(card), card.name) for library, where in paths.items()}
    rows: list[list[str]] = []
    with compiled_ahead(chosen, int(card.arch[3:])) as compiled:
        for done, family in enumerate(chosen):
            if time.monotonic() > deadline:
                print_changes(rows, "over the default", *ranking.ASSUMPTIONS)
                print(f"The budget is up: {len(chosen) - done} families are left; run the same command again.")
                return len(chosen) - done
            library = tuning.has_library(family.kernel)
            table = tables[library]
            found, default, table.compiler = compiled(family)
            out = sum(bool(one.problem) for one in found)
            print(f"{family.name}: {len(found)} configs compiled, {out} of them spill or do not fit", flush=True)
            for entry in ranked_entries(family, found, default, card):
                old = table.entries.get(entry.key)
                if old is not None and old.origin == "measured":
                    continue
                table.entries[entry.key] = entry
                usual = default_at(family, entry.key.bucket, default, card.sm_count)
                cells = change(entry, old.config if old else usual, entry.evidence["over_default"])
                rows.append(cells + [f"{score:.3f}" for score in entry.evidence["under"].values()])
            save(table, paths[library])
    print_changes(rows, "over the default", *ranking.ASSUMPTIONS)
    for library, table in tables.items():
        if table.entries:
            print(f"{len(table.entries)} entries for {card.name} in {paths[library]}. Ranked, not measured.")
    return 0


# ---------------------------------------------------------------- command line


def pick(pattern: str | None) -> list[Family]:
    """Families whose name the regular expression is found in. Raises UserError."""
    try:
        found = [family for family in families() if re.search(pattern or "", family.name)]
    except re.error as error:
        raise UserError(f"kernel is {pattern!r}, which is not a regular expression: {error}") from None
    if not found:
        names = ", ".join(dict.fromkeys(family.kernel for family in families()))
        raise UserError(f"kernel is {pattern!r}, and no kernel has that in its name: there are {names}")
    return found


@dataclass(frozen=True)
class TuneConfig:
    kernel: Annotated[str | None, Arg("REGEX")] = None
    """Such as attention, "layer_norm.*C768", "bf16 D64 dropout"."""
    budget: Annotated[str, Arg("TIME")] = "10m"
    """Stop after it: 90s, 10m, 1h."""
    again: bool = False
    """Measure also what the table has measured already."""
    out: Annotated[Path | None, Arg("FOLDER")] = None
    """Where the table is written. Without it: your cache."""
    rank: bool = False
    """No measuring: rank by the compiler-based model."""
    arch: str | None = None
    """With --rank: sm_80, sm_86, sm_89, sm_90 or sm_120; without it, sm_89."""
    sms: int | None = None
    """With --rank or --check-model: SMs of the card; without it, 46."""
    gpu: str | None = None
    """With --rank: the card by name instead, such as h200."""
    check_model: bool = False
    """On a large GPU: is the model's order right?"""

    def __post_init__(self) -> None:
        at_least(1, sms=self.sms)


def main(argv: list[str]) -> int:
    args = command.parse(TuneConfig, argv, "bench.tune", __doc__)
    chosen, deadline = pick(args.kernel), time.monotonic() + parse_budget(args.budget)
    folder = args.out or tuning.user_folder()
    if args.rank and args.check_model:
        raise UserError(
            "rank and check-model are both given: the one needs no GPU, the other measures on one; leave one out"
        )
    if args.rank:
        card = card_of(args.arch, args.sms, args.gpu)
        return 1 if rank(chosen, card, folder / target_of(card).file_name, deadline) else 0
    if args.arch or args.gpu or (args.sms and not args.check_model):
        raise UserError("arch, sms and gpu say what to rank for: add --rank, or leave them out to measure on this GPU")
    if not torch.cuda.is_available():
        other = "there is no model to check without one" if args.check_model else "use --rank --arch sm_89 --sms 46"
        raise UserError(f"there is no GPU to measure on, as {no_gpu()}: {other}")
    check_kernels("bench.tune")
    if args.check_model:
        return tune_measure.check_model(chosen, args.sms or 46, deadline, args.out)
    return tune_measure.measure(chosen, folder, deadline, again=args.again)


if __name__ == "__main__":
    common.run(main)
