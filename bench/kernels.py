"""Every kernel beside its peers: PyTorch eager, torch.compile, SDPA's backends, torch's fused AdamW, Liger-Kernel.

    python -m bench.kernels [--device cpu|cuda] [--quick] [--only NAME] [--out DIR]

Each entry runs forward and backward (AdamW: clip and update). Before any clock starts, the kernel has to pass its parity
check against fp64 in this same run; one that fails gets no speed. Bytes and FLOPs come from fastgpt/flops.py: the least
that the operation can move and compute. Shares are of what this device was just measured to reach (copy bandwidth, bf16
matmul rate), never of a data sheet. On a CPU the kernels run in Triton's interpreter: that shows that everything works,
and the times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bench import report
from bench.environment import environment
from bench.timing import Timing, Work, interleave, peak_memory
from fastgpt import flops, hardware

if TYPE_CHECKING:
    from bench.entries import Entry


def measure(entry: Entry, device: torch.device, ceilings: hardware.Ceilings | None, rounds: int) -> dict[str, Any]:
    """Parity, then times: the entry's part of the results file."""
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
        result["parity"] = f"failed: {type(error).__name__}: {error}"
    ready: dict[str, Work] = {}
    for name, make in entry.variants.items() if result["parity"] == "passed" else ():
        try:
            work = make()
            figures: dict[str, Any] = {"peak_memory": peak_memory(work, device)}
            work()
        except Exception as error:
            figures = {"error": f"{type(error).__name__}: {error}"[:500]}
        else:
            ready[name] = work
        result["variants"][name] = figures
    for name, timing in interleave(ready, device, rounds=rounds, warmup=warmup, budget_s=20).items() if ready else ():
        result["variants"][name] |= rates(entry.work, timing, ceilings)
    return result


def rates(work: flops.Work, timing: Timing, ceilings: hardware.Ceilings | None) -> dict[str, Any]:
    """What a time means: bytes and FLOPs per second, and the share of the measured roof that binds."""
    seconds = timing.median_ms / 1e3
    out: dict[str, Any] = {"ms": timing.median_ms, "iqr_ms": timing.iqr_ms, "runs": timing.runs}
    out |= {"gbs": work.bytes / seconds / 1e9, "tflops": work.flops / seconds / 1e12}
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
    only: str = "",
    keep_roofs: bool = False,
    save: Callable[[dict], None] = lambda _: None,
) -> dict[str, Any]:
    """All entries; ``save`` gets the results so far after each."""
    from bench.entries import ENTRIES, TINY, Sizes  # imports fastgpt.kernels, which looks for the interpreter's switch

    cuda = device.type == "cuda"
    ceilings = hardware.measured_ceilings(device, refresh=not keep_roofs) if cuda else None
    results: dict[str, Any] = {
        "environment": environment(device),
        "copy_gbs": ceilings and ceilings.copy_gbs,
        "matmul_tflops": ceilings and ceilings.matmul_tflops,
        "entries": [],
    }
    for make in ENTRIES:
        if only not in ("", make.__name__):
            continue
        torch.manual_seed(0)
        with torch.cuda.device(device) if cuda else nullcontext():
            entry = make(Sizes() if cuda else TINY, device, cuda and not quick)
            results["entries"].append(measure(entry, device, ceilings, rounds=(10 if quick else 40) if cuda else 3))
        if cuda:
            torch.cuda.empty_cache()
        save(results)
    return results


def main(argv: list[str] | None = None) -> int:
    """Time every kernel beside its peers, after a parity check."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=main.__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no torch.compile")
    parser.add_argument("--only", default="", help="only the entry of this function in bench/entries.py")
    parser.add_argument("--keep-roofs", action="store_true", help="do not measure copy and matmul rates again")
    parser.add_argument("--out", type=Path, help="folder for kernels.json and kernels.md")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench.kernels --device cuda needs a CUDA GPU, and torch sees none here.", file=sys.stderr)
        return 2
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)

    def save(results: dict) -> None:
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "kernels.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
            (args.out / "kernels.md").write_text(report.kernels_markdown(results), encoding="utf-8")

    device = torch.device(args.device)
    results = run(device, quick=args.quick, only=args.only, keep_roofs=args.keep_roofs, save=save)
    report.print_kernels(results)
    return 1 if any(entry["parity"] != "passed" for entry in results["entries"]) else 0


if __name__ == "__main__":
    sys.exit(main())
