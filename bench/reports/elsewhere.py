"""What a GPU that is not here would do, for the report of bench.mfu: its step as projected, its kernels as compiled.

Nothing here is a measurement. bench.project and bench.audit show the same at length.
"""

from __future__ import annotations

from typing import Any

from fastgpt.common import UserError
from fastgpt.config import EXPERIMENTAL, load_preset, preset_names
from fastgpt.hardware.cards import Gpu
from fastgpt.performance.memory import KERNELS

AUDITED = "step gpt2-124m {precision}"
"""The step whose kernels are compiled: all of them take minutes (python -m bench.audit)."""


def projection(model: str | None, gpu: Gpu, precision: str = "bf16") -> dict[str, Any]:
    """One step of a preset (GPT-2 124M if ``model`` is none of them) on every kind of kernels, in bf16; and on ours in
    ``precision``, if that is an experimental one."""
    from fastgpt.anatomy import Shape
    from fastgpt.performance.projection import project

    name = model if model in preset_names() and model != "demo" else "gpt2-124m"
    config = load_preset(name, "cuda")
    batch, T, tokens = config.data.batch_size, config.model.block_size, config.tokens_per_step
    shape = Shape.of(config.model)
    rest: dict[str, Any] = {"micro_batch": batch, "tokens_per_step": tokens, "dropout": config.model.dropout}
    steps = {kernels: (kernels, "bf16") for kernels in KERNELS}
    if precision in EXPERIMENTAL:
        steps[f"triton {precision}"] = ("triton", precision)
    variants: dict[str, Any] = {}
    for name_of_step, (kernels, used) in steps.items():
        try:
            variants[name_of_step] = project(shape, gpu, kernels=kernels, precision=used, **rest).to_json()
        except UserError as error:  # a card without the arithmetic
            variants[name_of_step] = {"error": str(error)}
    return {
        "gpu": gpu.name,
        "model": name,
        "batch_size": batch,
        "seq": T,
        "tokens_per_step": tokens,
        "variants": variants,
    }


def audit(gpu: Gpu, precision: str = "bf16") -> dict[str, Any]:
    """The kernels of a GPT-2 124M step in bf16, or in an experimental precision, compiled for this GPU in a process of its own:
    rows of bench.audit."""
    from bench import audit as audit_module

    case = AUDITED.format(precision=precision if precision in EXPERIMENTAL else "bf16")
    found: dict[str, Any] = {"gpu": gpu.name, "arch": gpu.arch, "cases": case}
    try:
        report = audit_module.run(audit_module.target(None, gpu.name), only=f"^{case}$", shard=None)
    except (UserError, RuntimeError, OSError) as error:  # an architecture that Triton does not compile for, no ptxas
        return found | {"error": str(error).splitlines()[0][:300]}
    if not report.rows:
        return found | {"error": f"{gpu.name} cannot run {case}"}
    return found | {"triton": report.triton, "rows": report.rows, "failures": report.failures}


# ---------------------------------------------------------------- tables


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


def projection_cells(found: dict[str, Any]) -> list[list[str]]:
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


def projected_operation_cells(found: dict[str, Any]) -> list[list[str]]:
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


def audit_cells(found: dict[str, Any]) -> list[list[str]]:
    """A row per kernel: what it takes of an SM, and how it fills the card."""
    cells = [
        ["kernel", "launches", "registers", "shared, bytes", "blocks/SM", "limit", "waves", "last full", "tensor cores"]
    ]
    for row in found["rows"]:
        held = row["waves"] is not None
        cells.append(
            [
                f"{row['module'].removeprefix('_').removeprefix('fused_')}: {row['kernel']}",
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
