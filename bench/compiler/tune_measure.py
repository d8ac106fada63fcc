"""The part of bench.tune that needs a GPU: times configs, and checks the model that ranks them."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.compiler import ranking, tune_table
from bench.ops.common import Family
from bench.ops.linear import default_at
from bench.reports.timing import Timing, Work, interleave
from fastgpt.common import UserError
from fastgpt.hardware import cards
from fastgpt.hardware.environment import environment
from fastgpt.kernels import runtime, tuning

CANDIDATES = 10
"""Configs of a bucket that are timed, beside the default: the model's first."""
CLOSE = 1.05
"""The model is right about a case if its first choice takes at most this times the best."""
TOLERANCE = 2e-2
"""How far, relative to their rms, results of two configs may lie apart: tiles change the order of sums, in 16 bits."""


# ---------------------------------------------------------------- what is timed


def operation(family: Family, bucket: str, device: torch.device) -> Callable[[], Any]:
    """The public operation around the kernel, at the size that stands for the bucket. Returns its results."""
    torch.manual_seed(0)
    return family.timed(bucket, device)


def _with(family: Family, config: dict[str, int], op: Callable[[], Any]) -> Work:
    def work() -> Any:
        with tuning.forced({family.kernel: config}):
            return op()

    return work


def _tensors(results: Any) -> list[Tensor]:
    found = results if isinstance(results, (tuple, list)) else (results,)
    return [x.detach().float().clone() for x in found if isinstance(x, Tensor)]


def time_configs(
    family: Family, bucket: str, configs: list[dict[str, int]], device: torch.device, budget_s: float
) -> tuple[list[Timing | None], list[str]]:
    """Times of ``configs``, the first of which is taken to be right, and why some have none: a config that does not fit,
    or gives other results, is left out."""
    op = operation(family, bucket, device)
    ready: dict[str, Work] = {}
    problems = []
    expected: list[Tensor] = []
    for i, config in enumerate(configs):
        work = _with(family, config, op)
        try:
            results = _tensors(work())
            torch.cuda.synchronize(device)
        except Exception as error:  # OutOfResources, a compiler's error, memory
            problems.append(f"{tuning.brief(config)}: {type(error).__name__}: {str(error)[:120]}")
            continue
        expected = expected or results
        apart = max([_distance(a, b) for a, b in zip(results, expected)], default=0.0)
        if not apart <= TOLERANCE:
            problems.append(f"{tuning.brief(config)}: results differ by {apart:.2g}")
            continue
        ready[str(i)] = work
    timed = interleave(ready, device, rounds=30, budget_s=budget_s) if ready else {}
    return [timed.get(str(i)) for i in range(len(configs))], problems


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-30)).item()


# ---------------------------------------------------------------- measuring


def present() -> tuple[torch.device, cards.Gpu, tuning.Target]:
    """This GPU as the model sees it. One that is not in the table ranks as the nearest of its architecture would."""
    device = torch.device("cuda", torch.cuda.current_device())
    here = tuning.target(device)
    assert here is not None
    card = cards.present(device)
    if card is None:
        alike = [gpu for gpu in cards.GPUS if gpu.arch == f"sm_{here.arch}"]
        if not alike:
            raise UserError(f"this GPU is sm_{here.arch}: its limits are not known, so configs cannot be ranked for it")
        card = min(alike, key=lambda gpu: abs(gpu.sm_count - here.sms))
        card = replace(card, name=torch.cuda.get_device_name(device), sm_count=here.sms)
    return device, card, here


def measure(chosen: list[Family], folder: Path, deadline: float, *, again: bool) -> int:
    """Time the model's first configs of every bucket beside the default, and keep the quickest. 1 if time ran out."""
    device, card, here = present()
    path = folder / here.file_name
    table = tune_table.open_table(path, here, card.name)
    rows, left = [], 0
    todo = {f.name: [b for b in f.buckets if again or not _is_measured(table, f, b)] for f in chosen}
    chosen = [family for family in chosen if todo[family.name]]
    with tune_table.compiled_ahead(chosen, here.arch) as compiled:
        for family in chosen:
            if time.monotonic() > deadline:
                left += len(todo[family.name])
                continue
            found, default, compiler = compiled(family)
            table.compiler = compiler
            by_config = {json.dumps(one.config, sort_keys=True): one for one in found}
            for bucket in todo[family.name]:
                if time.monotonic() > deadline:
                    left += 1
                    continue
                usual = default_at(family, bucket, default, card.sm_count)
                order = family.rank(bucket, found, usual, card)
                first = tuning.CUBLAS if tuning.has_library(family.kernel) else usual
                configs = [first] + [c for c in candidates(family, bucket, order, here, folder) if c != first]
                budget_s = max(1.0, min(20.0, deadline - time.monotonic()))
                times, problems = time_configs(family, bucket, configs, device, budget_s)
                for problem in problems:
                    print(f"left out: {family.kernel} {problem}")
                timed = [(t.median_ms, i) for i, t in enumerate(times) if t is not None]
                if not timed or times[0] is None:
                    continue
                best_ms, best = min(timed)
                key = tuning.Key(family.kernel, family.dtype_name, bucket)
                evidence = {
                    "ms": best_ms,
                    "default_ms": times[0].median_ms,
                    "compared": len(timed),
                    "source": tuning.source_hash(family.kernel),
                    "torch": torch.__version__,
                }
                evidence |= {"time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
                known = by_config.get(json.dumps(configs[best], sort_keys=True))
                resources = known.resources if known else ranking.Facts(configs[best], "").resources
                # What training took before: of a matmul cuBLAS, unless a table had a measurement.
                dtype = family.dtype
                old = tuning.choose(family.kernel, dtype, bucket, device, first).config
                table.entries[key] = tuning.TableEntry(key, configs[best], "measured", resources, evidence)
                tune_table.save(table, path)
                rows.append(tune_table.change(table.entries[key], old, best_ms / times[0].median_ms))
                torch.cuda.empty_cache()
    tune_table.print_changes(rows, "time over the default's, measured")
    print(f"{len(table.entries)} entries for {card.name} in {path}.")
    if left:
        print(f"The budget is up: {left} buckets are left; run the same command again.")
    return 1 if left else 0


def candidates(
    family: Family, bucket: str, order: list[ranking.Ranked], here: tuning.Target, folder: Path
) -> list[tuning.Config]:
    """The configs to time: those that tables and hints know, then the model's first."""
    key = tuning.Key(family.kernel, family.dtype_name, bucket)
    known = tuning.entries_for(key, here, folder / tune_table.HINTS.name, tune_table.HINTS)
    hinted = [entry.config for entry, _ in known]
    configs = [ranked.facts.config for ranked in order]
    return sorted(configs, key=lambda config: config not in hinted)[:CANDIDATES]


def _is_measured(table: tuning.Table, family: Family, bucket: str) -> bool:
    entry = table.entries.get(tuning.Key(family.kernel, family.dtype_name, bucket))
    return entry is not None and entry.origin == "measured"


# ---------------------------------------------------------------- is the model right?


def granted_sms(asked: int, arch: int) -> int:
    """SMs of a green context: CUDA rounds up to a multiple of 8 from compute capability 9.0 on, of 2 before
    (cuDevSmResourceSplitByCount)."""
    unit = 8 if arch >= 90 else 2
    return -(-asked // unit) * unit


@contextmanager
def confined(asked: int, device: torch.device, here: tuning.Target) -> Iterator[int]:
    """Inside, work runs on about ``asked`` SMs, the number given. To be entered before any kernel is loaded: a kernel
    belongs to the context that it was loaded in. Raises UserError where that cannot be had."""
    from torch.cuda.green_contexts import GreenContext

    granted = granted_sms(asked, here.arch)
    if granted >= here.sms:
        raise UserError(f"sms is {asked}: this GPU has {here.sms}; the check needs a larger one, or fewer")
    try:
        context: Any = GreenContext.create(num_sms=granted, device_id=device.index)
    except RuntimeError as error:
        raise UserError(
            f"torch {torch.__version__} gives no CUDA green context of {granted} SMs ({str(error).splitlines()[0]}): "
            "use a build for CUDA 12.8 or later, and a driver for it"
        ) from None
    # torch 2.15 would have a stream of its own in their place, which the code that is timed does not know of.
    warnings.filterwarnings("ignore", "`GreenContext.set_context`", FutureWarning)
    context.set_context()
    try:
        # Autograd's own thread would run backward in the device's context, on all SMs.
        with (
            mock.patch.object(runtime, "sm_count", lambda device: granted),
            torch.autograd.set_multithreading_enabled(False),
        ):
            tuning.choose_again()
            yield granted
    finally:
        context.pop_context()


def check_model(chosen: list[Family], asked: int, deadline: float, out: Path | None) -> int:
    """Print, for every case, the model's first choice against the best that was measured, and the share that is CLOSE."""
    device, card, here = present()
    cases: list[dict[str, Any]] = []
    with confined(asked, device, here) as granted:
        small = replace(card, sm_count=granted, memory_gbs=card.memory_gbs)
        for family in chosen:
            if time.monotonic() > deadline:
                break
            found, default, _ = tune_table.facts_of(family, here.arch)
            for bucket in family.buckets:
                usual = default_at(family, bucket, default, granted)
                order = family.rank(bucket, found, usual, small)
                if len(order) < 2 or time.monotonic() > deadline:
                    continue
                configs = [r.facts.config for r in order]
                budget_s = max(1.0, min(30.0, deadline - time.monotonic()))
                times, _ = time_configs(family, bucket, configs, device, budget_s)
                timed = [t.median_ms for t in times if t is not None]
                if times[0] is None or len(timed) < 2:
                    continue
                cases.append({"case": f"{family.kernel} {family.dtype_name} {bucket}", "compared": len(timed)})
                cases[-1] |= {"first_ms": times[0].median_ms, "best_ms": min(timed), "worst_ms": max(timed)}
                ratio = times[0].median_ms / min(timed)
                print(f"{cases[-1]['case']}: first choice {ratio:.3f} x the best of {len(timed)}", flush=True)
    if not cases:
        raise UserError("the budget was up before the first case was measured: give more, such as --budget 20m")
    result = summary(cases, granted)
    print(result["sentence"])
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / "tuning-model.json").write_text(json.dumps({"environment": environment(device), **result}, indent=1))
    return 0


def summary(cases: list[dict[str, Any]], sms: int) -> dict[str, Any]:
    """What the check reports: the share of cases in which the first choice is within 5% of the best."""
    close = sum(case["first_ms"] <= CLOSE * case["best_ms"] for case in cases)
    sentence = (
        f"On {sms} SMs the model's first choice is within {CLOSE - 1:.0%} of the best measured in {close} of {len(cases)} "
        f"cases ({close / len(cases):.0%})."
    )
    return {"sms": sms, "close": close, "share": close / len(cases), "sentence": sentence, "cases": cases}
