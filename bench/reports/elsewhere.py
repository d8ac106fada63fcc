"""Tables and notes of what bench/steps/elsewhere.py finds: a step as projected, its kernels as compiled. Reads plain dicts."""

from __future__ import annotations

from typing import Any

from bench.reports.tables import Cells


def projection_notes(found: dict[str, Any]) -> list[str]:
    """What the projection is, and how far off it was where it could be checked."""
    known = [v for v in found["variants"].values() if "error" not in v]
    notes = [
        f"A projection of {found['model']} on {found['gpu']}, {found['batch_size']} x {found['seq']} tokens, "
        f"{found['tokens_per_step']:,} per step: from compiled shapes, FLOPs and bytes, not from a run."
    ]
    if known:
        notes.append(
            f"Calibration error {100 * known[0]['calibration_error']:.1f}%: fitted on one of two real RTX 4070 runs, the other "
            "one predicted (python -m bench.project). Low and high are an interval, not a guarantee."
        )
        notes.append("MFU: " + "; ".join(dict.fromkeys(f"{v['precision']}: {v['mfu_of']}" for v in known)) + ".")
    return notes


def projection_cells(found: dict[str, Any]) -> Cells:
    """A row per kind of kernels: low, central, high."""
    cells = [["kernels", "tokens/s, low", "central", "high", "ms/step", "MFU", "nanoGPT's", "what"]]
    for name, v in found["variants"].items():
        if "error" in v:
            cells.append([name, *[""] * 6, v["error"]])
            continue
        rates = [f"{v[key]:,.0f}" for key in ("tokens_per_second_low", "tokens_per_second", "tokens_per_second_high")]
        cells.append(
            [name, *rates, f"{v['ms_per_step']:,.0f}", f"{v['mfu']:.1%}", f"{v['mfu_nanogpt']:.1%}", v["status"]]
        )
    return cells


def projected_operation_cells(found: dict[str, Any]) -> Cells:
    """Milliseconds per step by group of operations, one column per kind of kernels; longest first."""
    known = {name: v for name, v in found["variants"].items() if "error" not in v}
    sums: dict[str, dict[str, float]] = {}
    for name, v in known.items():
        for op in v["operations"]:
            group = sums.setdefault(op["group"], dict.fromkeys(known, 0.0))
            group[name] += op["ms"]
    ordered = sorted(sums.items(), key=lambda item: -max(item[1].values()))
    cells = [["operation", *(f"{name}, ms" for name in known)]]
    cells += [[group, *(f"{ms:,.1f}" if ms else "-" for ms in by_kernels.values())] for group, by_kernels in ordered]
    return [*cells, ["sum", *(f"{v['ms_per_step']:,.1f}" for v in known.values())]]


def audit_note(found: dict[str, Any]) -> str:
    """The audit in one sentence."""
    gate = (
        "; ".join(found["failures"])
        if found["failures"]
        else "no spills, shared memory within the limit, tensor cores where expected"
    )
    return f"Every kernel of a {found['cases'].removeprefix('step ')} step, compiled with triton {found['triton']}: {gate}."


def audit_cells(found: dict[str, Any]) -> Cells:
    """A row per kernel: what it takes of an SM, and how it fills the card."""
    cells = [
        ["kernel", "launches", "registers", "shared, bytes", "blocks/SM", "limit", "waves", "last full", "tensor cores"]
    ]
    for row in found["rows"]:
        held = row["waves"] is not None
        cells.append(
            [
                f"{row['module'].removeprefix('fused_')}: {row['kernel'].strip('_').removesuffix('_kernel')}",
                f"{row['launches']}",
                f"{row['registers']}",
                f"{row['shared']:,}",
                f"{row['blocks_per_sm']}",
                row["limiter"],
                f"{row['waves']:.2f}" if held else "-",
                f"{row['last_wave']:.0%}" if held else "-",
                ", ".join(f"{count} {kind}" for kind, count in row["tensor_core"].items()) or "-",
            ]
        )
    return cells
