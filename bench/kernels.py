"""Every kernel beside its peers, over a sweep of shapes: PyTorch eager, torch.compile, SDPA's backends, torch's fused
AdamW with clip, torch's linear_cross_entropy where it has one, Liger-Kernel where it is installed.

    python -m bench.kernels                            # on a GPU: every kernel, every shape
    python -m bench.kernels --only attention           # one kernel
    python -m bench.kernels --quick --out runs/kernels   # one shape each, fewer rounds; also as JSON and Markdown
    python -m bench.kernels --label before             # a name for bench.compare

Each entry runs forward and backward (AdamW: clip and update). Before any clock starts, the kernel has to pass its parity
check against fp64 in this same run, at that very shape; one that fails gets no speed. Times are with a cold L2 cache (it
is overwritten before each run, as in training) and with a warm one (the run before left in it what fits).

Bytes and FLOPs come from performance/flops.py: the least that the operation can move and compute. Shares are of what this
device was just measured to reach (copy bandwidth, bf16 matmul rate), never of a data sheet. Results on a GPU are kept in
bench/results/. On a CPU the kernels run in Triton's interpreter on tiny shapes: that shows that everything works; the
times mean nothing and are not kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from bench.reports import markdown
from bench.reports import results as results_module
from bench.reports.tables import waiting
from bench.reports.timing import Timing, Work, interleave, peak_memory
from bench.steps.ceilings import Ceilings, measured_ceilings
from fastgpt import command, common
from fastgpt.command import Arg
from fastgpt.common import UserError, write_json
from fastgpt.config import Device
from fastgpt.hardware.device import present
from fastgpt.hardware.environment import environment
from fastgpt.hardware.requirements import check_kernels, no_gpu, unused_gpu
from fastgpt.performance import flops

if TYPE_CHECKING:
    from bench.ops.common import Entry


def measure(
    entry: Entry, device: torch.device, ceilings: Ceilings | None, rounds: int, budget_s: float = 20.0
) -> dict[str, Any]:
    """Parity, then times, at most about ``budget_s`` seconds of them: the entry's part of the results file."""
    warmup = 3 if device.type == "cuda" else 1
    result: dict[str, Any] = {
        "name": entry.name,
        "shape": entry.shape,
        "flops": entry.work.flops,
        "bytes": entry.work.bytes,
        "timed": "forward + backward" if entry.name != "adamw + clip" else "clip + update",
        "parity": "passed",
        "variants": {},
    }
    try:
        entry.parity()
    except Exception as error:  # also a kernel that crashes
        result["parity"] = f"failed: {results_module.sentence(error)}"
    ready: dict[str, Work] = {}
    for name, make in entry.variants.items() if result["parity"] == "passed" else ():
        try:
            work = make()
            figures: dict[str, Any] = {"peak_memory": peak_memory(work, device)}
            work()
        except Exception as error:
            figures = {"error": results_module.sentence(error)}
        else:
            ready[name] = work
        result["variants"][name] = figures
    if not ready:
        return result
    limits: dict[str, Any] = {"rounds": rounds, "warmup": warmup, "budget_s": budget_s / 2}
    for name, timing in interleave(ready, device, **limits).items():
        result["variants"][name] |= rates(entry.work, timing, ceilings)
    if device.type == "cuda":
        for name, timing in interleave(ready, device, cold=False, **limits).items():
            # No share: what comes from the L2 cache is not under the memory's roof.
            result["variants"][name]["warm"] = rates(entry.work, timing, None, share=False)
    return result


def rates(work: flops.Work, timing: Timing, ceilings: Ceilings | None, *, share: bool = True) -> dict[str, Any]:
    """What a time means: bytes and FLOPs per second, and the share of the measured roof that binds."""
    seconds = timing.median_ms / 1e3
    out: dict[str, Any] = {"ms": timing.median_ms, "iqr_ms": timing.iqr_ms, "runs": timing.runs}
    out |= {"gbs": work.bytes / seconds / 1e9, "tflops": work.flops / seconds / 1e12}
    if not share:
        return out
    peak = None if ceilings is None else ceilings.peak_flops("bf16")
    if ceilings is None or peak is None:
        return out | {"share": None, "of": "n/a"}
    roof = work.roof(peak, ceilings.copy_gbs * 1e9)
    denominator = "measured copy bandwidth" if roof.bound == "memory" else "measured bf16 matmul rate"
    return out | {"share": roof.seconds / seconds, "of": denominator}


def run(
    device: torch.device,
    *,
    quick: bool,
    sweep: bool = False,
    only: str = "",
    keep_roofs: bool = False,
    save: Callable[[dict], None] = lambda _: None,
) -> dict[str, Any]:
    """All entries, or those named in ``only``; ``save`` gets the results so far after each shape."""
    from bench.ops import (
        ENTRIES,
        shapes,  # imports fastgpt.kernels, which looks for the interpreter
    )
    from bench.ops.common import TINY, Sizes

    cuda = device.type == "cuda"
    names = [make.__name__ for make in ENTRIES]
    chosen = only.split(",") if only else names
    for name in chosen:
        if name not in names:
            raise UserError(f"only is {only!r}: it can be {', '.join(names)}, or several of them")
    ceilings = measured_ceilings(device, refresh=not keep_roofs) if cuda else None
    results: dict[str, Any] = {
        "environment": environment(device),
        "copy_gbs": ceilings and ceilings.copy_gbs,
        "matmul_tflops": ceilings and ceilings.matmul_tflops,
        "entries": [],
    }
    rounds = (10 if quick else 40) if cuda else 3
    for make in ENTRIES:
        if make.__name__ not in chosen:
            continue
        base = Sizes() if cuda else TINY
        sizes = [base] if not sweep else shapes(make, base) if cuda else [base, replace(base, rows=32, C=128, T=32)]
        for size in sizes:
            torch.manual_seed(0)
            with torch.cuda.device(device) if cuda else nullcontext():
                entry = make(size, device, cuda and not quick)
                results["entries"].append(measure(entry, device, ceilings, rounds, budget_s=10 if sweep else 20))
            del entry
            torch.compiler.reset()  # or the next shape would be a recompilation, and dynamic
            if cuda:
                torch.cuda.empty_cache()
            save(results)
    return results


@dataclass(frozen=True)
class KernelsConfig:
    device: Device = "auto"
    """auto takes a CUDA GPU if there is one."""
    quick: bool = False
    """Fewer rounds, no torch.compile, no sweep unless asked for."""
    sweep: bool | None = None
    """--sweep: many shapes of each kernel; --no-sweep: GPT-2 124M's only. Without either, a sweep on a GPU without --quick."""
    only: Annotated[str, Arg("ENTRY,ENTRY")] = ""
    """Only the entries of these names: embedding, layer_norm, layer_norm_residual, rms_norm, rms_norm_mixed, qk_norm_rope,
    attention, linear_cross_entropy, adamw, muon."""
    keep_roofs: bool = False
    """Do not measure copy and matmul rates again."""
    out: Annotated[Path | None, Arg("FOLDER")] = None
    """Folder for kernels.json and kernels.md."""
    label: str | None = None
    """A name under which bench.compare finds this run."""
    no_store: bool = False
    """Do not keep the results in bench/results/."""


def main(argv: list[str]) -> int:
    """Parse, run, keep. Exit code 1 if a kernel failed its parity check. Raises UserError for bad input."""
    args = command.parse(KernelsConfig, argv, "bench.kernels", __doc__)
    if args.device == "auto" and (unused := unused_gpu()) is not None:
        raise UserError(f"{unused}; --device cpu does without the card")
    where = present() if args.device == "auto" else args.device
    if where == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is 'cuda' but {no_gpu()}: use --device cpu")
    if args.out:
        results_module.check_writable(args.out)
    if where == "cuda":
        check_kernels("bench.kernels")
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)

    def save(found: dict) -> None:
        if args.out:
            write_json(args.out / "kernels.json", found)
            (args.out / "kernels.md").write_text(markdown.kernels_markdown(found), encoding="utf-8")

    device = torch.device(where)
    sweep = args.sweep if args.sweep is not None else where == "cuda" and not args.quick
    with waiting("checking and timing kernels"):
        found = run(device, quick=args.quick, sweep=sweep, only=args.only, keep_roofs=args.keep_roofs, save=save)
    markdown.print_kernels(found)
    if where == "cuda" and not args.no_store:
        entries = results_module.kernel_entries(found)
        print(f"Kept in {results_module.store('kernels', found['environment'], entries, args.label)}.")
    return 1 if any(entry["parity"] != "passed" for entry in found["entries"]) else 0


if __name__ == "__main__":
    common.run(main)
