"""What each operation of a training step must cost at least, and how far a profiled one is from it.

The roof of an operation is the later of two limits: its matmul FLOPs at the device's matmul rate, and the bytes that it has
to move at the device's bandwidth (Williams et al. 2009). FLOPs and bytes are those of performance/flops.py, summed over a step:
least figures, each input read once and each output written once. An operation that a fused step does not need (casts, adds
outside the norm) has no work, so all of its time counts as a gap.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.steps.trace import StepProfile
from fastgpt import anatomy
from fastgpt.anatomy import Shape
from fastgpt.config import PLAIN
from fastgpt.hardware.ceilings import Ceilings
from fastgpt.performance import flops as flops_module
from fastgpt.performance.flops import Work
from fastgpt.performance.operations import AS_SHIPPED, Fusions, Operation, arithmetics, operations


@dataclass(frozen=True)
class Roofs:
    """The two limits of a device. ``flops_per_second`` is None where this arithmetic has not been measured."""

    flops_per_second: float | None
    bytes_per_second: float

    @classmethod
    def measured(cls, ceilings: Ceilings, arithmetic: str) -> Roofs:
        """What this machine reached itself: the fairer judge, as no code reaches the nominal figures."""
        return cls(ceilings.peak_flops(arithmetic), ceilings.copy_gbs * 1e9)


@dataclass(frozen=True)
class JudgedOperation:
    """One operation of a profiled step beside its roof. ``flops`` and ``bytes`` are None where nothing is counted."""

    name: str
    calls: int
    ms: float
    share: float
    """Share of the step's wall time."""
    flops: int | None
    bytes: int | None
    roof_ms: float | None
    bound: str | None
    """"compute" or "memory": which roof is the nearer one."""
    achieved: float | None
    """roof_ms / ms. Above 1 where data was still in a cache: the roof takes every byte from memory."""
    gap_ms: float
    """What reaching the roof would save."""


def step_work(
    shape: Shape,
    B: int,
    T: int,
    *,
    grad_accum: int = 1,
    size: int = 2,
    fused: bool = True,
    one_pass_loss: bool = False,
    distinct: int | None = None,
) -> dict[str, Work]:
    """FLOPs and least bytes of every operation in one optimizer step of ``grad_accum`` micro-batches of (B, T) tokens.

    Names are those of bench/steps/trace.py. ``size``: bytes of an activation (2 for bf16); the residual stream, the
    masters and the optimizer are fp32. ``fused``: a norm adds the residual in the same pass (triton, torch.compile);
    eager does it in a pass of its own, as pointwise work. ``one_pass_loss``: dlogits overwrite logits as they are
    read (triton).
    ``distinct``: different tokens in a micro-batch, for the embedding's rows; all by default.
    """
    model = anatomy.of(shape)
    attention, rows = model.attention, B * T
    L, C, V = shape.n_layer, shape.n_embd, shape.vocab_size
    distinct = min(rows, V) if distinct is None else distinct
    stream = (size + 4) // 2  # a norm touches as many elements of the fp32 residual stream as of activations
    work: dict[str, Work] = {}

    def add(name: str, one: Work, times: int = 1) -> None:
        before = work.get(name, Work(0, 0))
        work[name] = Work(before.flops + one.flops * times, before.bytes + one.bytes * times)

    for linear in model.linears:
        N, K = linear.n_out, linear.n_in
        grad_size = 4 if one_pass_loss and linear.sink == "loss" else size
        add(f"{linear.name} forward", flops_module.linear_forward(rows, N, K, size, bias=linear.bias), linear.count)
        add(f"{linear.name} dX", flops_module.linear_input_grad(rows, N, K, size), linear.count)
        add(f"{linear.name} dW", flops_module.linear_weight_grad(rows, N, K, size, grad_size=grad_size), linear.count)
    heads = (B, T, attention.heads, attention.head_dim, size)
    add("attention forward", flops_module.attention_forward(*heads, kv_heads=attention.kv_heads), attention.count)
    add("attention backward", flops_module.attention_backward(*heads, kv_heads=attention.kv_heads), attention.count)
    bias = shape.bias
    add(
        "norms forward", flops_module.layer_norm_forward(rows, C, stream, bias=bias)
    )  # the first one has no residual yet
    add("norms backward", flops_module.layer_norm_backward(rows, C, stream, bias=bias))
    behind_a_branch = sum(norm.count for norm in model.norms) - 1
    add("norms forward", flops_module.layer_norm_forward(rows, C, stream, residual=fused, bias=bias), behind_a_branch)
    add("norms backward", flops_module.layer_norm_backward(rows, C, stream, residual=fused, bias=bias), behind_a_branch)
    add("pointwise", Work(0, 0))
    if not fused:  # x + branch, and the sum of its two gradients
        add("pointwise", Work(0, rows * C * ((size + 8) + 12)), behind_a_branch)
    add("GELU forward", Work(0, 2 * rows * model.hidden * size), L)
    add("GELU backward", Work(0, 3 * rows * model.hidden * size), L)
    if one_pass_loss:
        forward = flops_module.cross_entropy(rows, V, size, grad=False)
        add("loss", Work(0, forward.bytes + rows * V * size))
    else:
        add("loss", flops_module.cross_entropy(rows, V, size))
    for table in model.embeddings:
        table_rows, different = (T, T) if table.positions else (rows, distinct)
        add("embedding", flops_module.embedding_forward(table_rows, different, C, 4))
        add("embedding", flops_module.embedding_backward(table_rows, different, C, 4))
    work = {name: Work(w.flops * grad_accum, w.bytes * grad_accum) for name, w in work.items()}
    params = anatomy.n_params(shape)
    work["gradient accumulation"] = Work(0, 12 * params * (grad_accum - 1))
    copied = (
        anatomy.matmul_params(shape) if fused and one_pass_loss and size < 4 else 0
    )  # the working copy of the matrices
    optimizer = flops_module.adamw(params)
    work["optimizer"] = Work(0, optimizer.bytes + copied * size)
    return work


def against_roofs(profile: StepProfile, work: dict[str, Work], roofs: Roofs) -> list[JudgedOperation]:
    """Every operation of a step beside its roof, longest first; what has no name comes last, as "unaccounted"."""
    rows = []
    for op in profile.operations:
        todo = work.get(op.name)
        roof = _roof(todo, roofs)
        rows.append(
            JudgedOperation(
                name=op.name,
                calls=op.calls,
                ms=op.ms,
                share=op.ms / profile.wall_ms,
                flops=todo.flops if todo else None,
                bytes=todo.bytes if todo else None,
                roof_ms=None if roof is None else 1e3 * roof.seconds,
                bound=roof.bound if roof and roof.seconds else None,
                achieved=1e3 * roof.seconds / op.ms if roof and roof.seconds else None,
                gap_ms=max(0.0, op.ms - (1e3 * roof.seconds if roof else 0.0)),
            )
        )
    unknown = sum(profile.unaccounted.values())
    if unknown:
        count, share = len(profile.unaccounted), unknown / profile.wall_ms
        rows.append(JudgedOperation("unaccounted", count, unknown, share, None, None, None, None, None, unknown))
    return rows


def _roof(todo: Work | None, roofs: Roofs) -> flops_module.Roof | None:
    """None where there is no work to name, or where it needs a matmul rate that is not known."""
    if todo is None or (todo.flops and roofs.flops_per_second is None):
        return None
    return todo.roof(roofs.flops_per_second or float("inf"), roofs.bytes_per_second)


# ---------------- was bench/step_roofs.py
# The roof of every operation of a profiled step at its --precision: in which arithmetic it is computed, what it has to move.
#
# What stands above knows steps in one arithmetic. The experimental modes mix two (docs/precision-modes.md, docs/fp8.md):
# which operations are in which, and what the mode moves beyond 16 bits or less, is read off performance/operations.py, so
# that profile and projection count the same.


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
    work = step_work(
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
        roofs = Roofs(_rate(ceilings, arithmetic, doubled), ceilings.copy_gbs * 1e9)
        (row,) = against_roofs(replace(profile, operations=(op,), unaccounted={}), work, roofs)
        rows.append({**asdict(row), "arithmetic": " + ".join(used) if row.flops else None})
    rest = against_roofs(replace(profile, operations=()), work, Roofs(None, ceilings.copy_gbs * 1e9))
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
