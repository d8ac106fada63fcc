"""The roof of every operation of a profiled step at its --precision: in which arithmetic it is computed, what it has to move.

fastgpt/roofline.py knows steps in one arithmetic. The experimental modes mix two (docs/precision-modes.md, docs/fp8.md): which
operations are in which, and what the mode moves beyond 16 bits or less, is read off fastgpt/operations.py, so that profile and
projection count the same.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, replace
from typing import Any

from fastgpt import roofline
from fastgpt.anatomy import Shape
from fastgpt.ceilings import Ceilings
from fastgpt.config import PLAIN
from fastgpt.flops import Work
from fastgpt.operations import AS_SHIPPED, Fusions, Operation, arithmetics, operations
from fastgpt.profiling import StepProfile


def needed(
    profile: StepProfile,
    shape: Shape,
    B: int,
    T: int,
    *,
    grad_accum: int,
    precision: str,
    kernels: str,
    compiled: bool,
    distinct: int | None = None,
) -> dict[str, Work]:
    """roofline.step_work of a step on ``kernels`` ("eager" or "triton"), under torch.compile or not, and what our kernels do
    otherwise: operands and copies in fp8, and GELU in the epilogues of the matmuls around it, where ``profile`` has no
    operation for it."""
    triton = kernels == "triton"
    work = roofline.step_work(
        shape,
        B,
        T,
        grad_accum=grad_accum,
        size=4 if precision == "fp32" else 2,
        fused=triton or compiled,
        one_pass_loss=triton,
        distinct=distinct,
    )
    if not triton or precision == "fp32":
        return work
    own_pass, in_matmuls = (
        any(op.name == "GELU forward" for op in profile.operations),
        replace(AS_SHIPPED, epilogues=True),
    )
    plain = PLAIN.get(precision, precision)
    before = _bytes(shape, B, T, grad_accum, plain, in_matmuls if own_pass and precision != plain else AS_SHIPPED)
    after = _bytes(shape, B, T, grad_accum, precision, AS_SHIPPED if own_pass else in_matmuls)
    # Passes outside matmuls and norms stay what could be saved; compiled, nothing but them writes copies in fp8.
    unchanged = ("pointwise", *(("norms", "attention forward", "attention backward") if compiled else ()))
    return {
        name: one if name.startswith(unchanged) else Work(one.flops, one.bytes + after[name] - before[name])
        for name, one in work.items()
    }


def _bytes(shape: Shape, B: int, T: int, grad_accum: int, precision: str, fusions: Fusions) -> dict[str, int]:
    """What each group of operations moves in a step of our kernels."""
    moved: dict[str, int] = defaultdict(int)
    for op in operations(shape, "triton", B, T, precision, fusions=fusions):
        moved[op.group] += op.bytes * op.executions(grad_accum)
    return moved


def judge(
    profile: StepProfile, work: dict[str, Work], ceilings: Ceilings, shape: Shape, B: int, T: int, precision: str
) -> list[dict[str, Any]]:
    """roofline.judge, each operation by the rate of its own arithmetic, which is named beside it (None where there are no
    matmul FLOPs), as plain values."""
    arithmetic = arithmetics(precision)
    share = _doubled(shape, B, T, precision) if precision in PLAIN else {}
    rows = []
    for op in profile.operations:
        doubled = share.get(op.name, 0.0 if precision in PLAIN else 1.0)
        used = [name for name, part in zip(arithmetic, (doubled, 1.0 - doubled)) if part]
        roofs = roofline.Roofs(_rate(ceilings, arithmetic, doubled), ceilings.copy_gbs * 1e9)
        (row,) = roofline.judge(replace(profile, operations=(op,), unaccounted={}), work, roofs)
        rows.append({**asdict(row), "arithmetic": " + ".join(used) if row.flops else None})
    rest = roofline.judge(replace(profile, operations=()), work, roofline.Roofs(None, ceilings.copy_gbs * 1e9))
    return rows + [{**asdict(row), "arithmetic": None} for row in rest]


def _doubled(shape: Shape, B: int, T: int, precision: str) -> dict[str, float]:
    """Share of each group's matmul FLOPs that the mode computes in its own arithmetic."""
    total: dict[str, int] = defaultdict(int)
    mode: dict[str, float] = defaultdict(float)
    for op in operations(shape, "triton", B, T, precision):
        if op.flops:
            total[op.group] += op.flops * op.count
            mode[op.group] += op.flops * op.count * _share(op)
    return {group: mode[group] / flops for group, flops in total.items()}


def _share(op: Operation) -> float:
    return op.summed_in_fp16 if op.kind == "attention" else float(op.fast)


def _rate(ceilings: Ceilings, arithmetic: tuple[str, ...], doubled: float) -> float | None:
    """FLOP per second measured here, of an operation with that share in the first arithmetic; None where one it needs was not
    measured."""
    seconds = 0.0  # per FLOP
    for name, part in zip(arithmetic, (doubled, 1.0 - doubled)):
        peak = ceilings.peak_flops(name)
        if part and peak is None:
            return None
        seconds += part / peak if part and peak else 0.0
    return 1 / seconds
