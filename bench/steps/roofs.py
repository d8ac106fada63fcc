"""What each operation of a training step must cost at least, and how far a profiled one is from it.

The roof of an operation is the later of two limits: its matmul FLOPs at the device's matmul rate, and the bytes that it has
to move at the device's bandwidth (Williams et al. 2009). FLOPs and bytes are those of performance/flops.py, summed over a step:
least figures, each input read once and each output written once. An operation that a fused step does not need (casts, adds
outside the norm) has no work, so all of its time counts as a gap.

``step_work`` knows steps in one arithmetic. The experimental modes mix two (docs/precision-modes.md, docs/fp8.md): which
operations are in which, and what the mode moves beyond 16 bits or less, is read from performance/operations.py, so that
profile and projection count the same.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.steps.ceilings import Ceilings, arithmetics
from bench.steps.trace import StepProfile
from fastgpt import anatomy
from fastgpt.anatomy import Shape
from fastgpt.config import PLAIN
from fastgpt.performance import flops
from fastgpt.performance.flops import Work
from fastgpt.performance.operation import AS_SHIPPED, Fusions
from fastgpt.performance.operations import operations

# ---------------------------------------------------------------- what a step has to do


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
    optimizer: str = "adamw",
) -> dict[str, Work]:
    """FLOPs and least bytes of every operation in one optimizer step of ``grad_accum`` micro-batches of (B, T) tokens.

    Names are those of bench/steps/trace.py. ``size``: bytes of an activation (2 for bf16); the residual stream, the
    masters and the optimizer are fp32. ``fused``: a norm adds the residual in the same pass (triton, torch.compile);
    eager does it in a pass of its own, as pointwise work. ``one_pass_loss``: dlogits overwrite logits as they are
    read (triton).
    ``distinct``: different tokens in a micro-batch, for the embedding's rows; all by default. ``optimizer``: "adamw", or "muon"
    for the blocks' matrices.
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
        add(f"{linear.name} forward", flops.linear_forward(rows, N, K, size, bias=linear.bias), linear.count)
        add(f"{linear.name} dX", flops.linear_input_grad(rows, N, K, size), linear.count)
        add(f"{linear.name} dW", flops.linear_weight_grad(rows, N, K, size, grad_size=grad_size), linear.count)
    heads = (B, T, attention.heads, attention.head_dim, size)
    for window, blocks in attention.reach.items():
        within: dict[str, Any] = {"kv_heads": attention.kv_heads, "window": window}
        add("attention forward", flops.attention_forward(*heads, **within), blocks)
        add("attention backward", flops.attention_backward(*heads, **within), blocks)
    valued = sum(table.count for table in model.embeddings if table.in_blocks)
    for embedded, blocks in ((False, attention.count - valued), (True, valued)) if attention.prepared else ():
        per_head = (rows, attention.heads, attention.head_dim, size)
        mixed: dict[str, Any] = {"kv_heads": attention.kv_heads, "value_embedding": embedded}
        add("rotary forward", flops.qk_norm_rope_forward(*per_head, **mixed), blocks)
        add("rotary backward", flops.qk_norm_rope_backward(*per_head, **mixed), blocks)
    bias = shape.bias
    # The first norm, and one of the embedding, have no residual yet.
    alone = sum(not norm.in_blocks for norm in model.norms)
    add("norms forward", flops.layer_norm_forward(rows, C, stream, bias=bias), alone)
    add("norms backward", flops.layer_norm_backward(rows, C, stream, bias=bias), alone)
    behind_a_branch = sum(norm.count for norm in model.norms) - alone
    if model.mixes:  # the embedded tokens, read in both passes, and their gradient; the branch in backward
        add("norms forward", Work(0, 4 * rows * C), L)
        add("norms backward", Work(0, (4 + 4 + size) * rows * C), L)
    add("norms forward", flops.layer_norm_forward(rows, C, stream, residual=fused, bias=bias), behind_a_branch)
    add("norms backward", flops.layer_norm_backward(rows, C, stream, residual=fused, bias=bias), behind_a_branch)
    add("pointwise", Work(0, 0))
    if not fused:  # x + branch, and the sum of its two gradients
        add("pointwise", Work(0, rows * C * ((size + 8) + 12)), behind_a_branch)
    add(f"{model.activation} forward", Work(0, 2 * rows * model.hidden * size), L)
    add(f"{model.activation} backward", Work(0, 3 * rows * model.hidden * size), L)
    if one_pass_loss:
        forward = flops.cross_entropy(rows, V, size, grad=False)
        add("loss", Work(0, forward.bytes + rows * V * size))
    else:
        add("loss", flops.cross_entropy(rows, V, size))
    for table in model.embeddings:
        table_rows, different = (T, T) if table.positions else (rows, distinct)
        of_row = size if table.in_blocks else 4
        add("embedding", flops.embedding_forward(table_rows, different, table.width, of_row), table.count)
        add("embedding", flops.embedding_backward(table_rows, different, table.width, of_row), table.count)
    work = {name: Work(w.flops * grad_accum, w.bytes * grad_accum) for name, w in work.items()}
    params = anatomy.n_params(shape)
    looked_up = sum(table.n_params for table in model.lookups if not table.positions)  # only rows that occur
    work["gradient accumulation"] = Work(0, 12 * (params - looked_up) * (grad_accum - 1))
    # Our optimizer writes the working copy of the matrices, too.
    copied = anatomy.matmul_params(shape) if fused and one_pass_loss and size < 4 else 0
    muon = flops.muon(model) if optimizer == "muon" else Work(0, 0)
    by_adamw = params - (model.block_weights if optimizer == "muon" else 0)
    work["optimizer"] = Work(muon.flops, flops.adamw(by_adamw).bytes + muon.bytes + copied * size)
    return work


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
    optimizer: str = "adamw",
) -> dict[str, Work]:
    """``step_work`` of a step on ``kernels`` ("eager" or "triton"), under torch.compile or not, and what our kernels do
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
        optimizer=optimizer,
    )
    if not triton or precision == "fp32":
        return work
    own_pass = any(op.name == f"{anatomy.of(shape).activation} forward" for op in profile.operations)
    in_matmuls = replace(AS_SHIPPED, epilogues=True)
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


# ---------------------------------------------------------------- beside what was profiled


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
    arithmetic: str | None
    """In what its matmuls are computed; None where it has none."""


def judge(
    profile: StepProfile, work: dict[str, Work], ceilings: Ceilings, shape: Shape, B: int, T: int, precision: str
) -> list[dict[str, Any]]:
    """Every operation of a step beside its roof, longest first, as plain values; what has no name comes last, as "unaccounted".

    The roof is what this machine reached itself: the fairer judge, as no code reaches the nominal figures. Each operation is
    judged by the rate of its own arithmetic."""
    names, mixed = arithmetics(precision), precision in PLAIN
    doubled_of = _doubled(shape, B, T, precision) if mixed else {}
    rows = []
    for op in profile.operations:
        doubled = doubled_of.get(op.name, 0.0) if mixed else 1.0
        used = " + ".join(name for name, part in zip(names, (doubled, 1.0 - doubled)) if part)
        rate = _rate(ceilings, names, doubled)
        rows.append(_judged(op.name, op.calls, op.ms, profile.wall_ms, work.get(op.name), rate, ceilings, used))
    if unknown := sum(profile.unaccounted.values()):
        count = len(profile.unaccounted)
        rows.append(_judged("unaccounted", count, unknown, profile.wall_ms, None, None, ceilings, ""))
    return [asdict(row) for row in rows]


def _judged(
    name: str,
    calls: int,
    ms: float,
    wall_ms: float,
    todo: Work | None,
    rate: float | None,
    ceilings: Ceilings,
    used: str,
) -> JudgedOperation:
    """``rate``: FLOP per second in the arithmetics ``used``; None where it was not measured: a matmul has no roof then."""
    roof = None
    if todo is not None and (rate is not None or not todo.flops):
        roof = todo.roof(rate or float("inf"), ceilings.copy_gbs * 1e9)
    return JudgedOperation(
        name=name,
        calls=calls,
        ms=ms,
        share=ms / wall_ms,
        flops=todo.flops if todo else None,
        bytes=todo.bytes if todo else None,
        roof_ms=None if roof is None else 1e3 * roof.seconds,
        bound=roof.bound if roof and roof.seconds else None,
        achieved=1e3 * roof.seconds / ms if roof and roof.seconds else None,
        gap_ms=max(0.0, ms - (1e3 * roof.seconds if roof else 0.0)),
        arithmetic=used if todo and todo.flops else None,
    )


def _doubled(shape: Shape, B: int, T: int, precision: str) -> dict[str, float]:
    """Share of each group's matmul FLOPs that the mode computes in its own arithmetic."""
    total: dict[str, int] = defaultdict(int)
    mode: dict[str, float] = defaultdict(float)
    for op in operations(shape, "triton", B, T, precision):
        if op.flops:
            total[op.group] += op.flops * op.count
            mode[op.group] += op.flops * op.count * (op.summed_in_fp16 if op.kind == "attention" else float(op.fast))
    return {group: mode[group] / total[group] for group in total}


def _rate(ceilings: Ceilings, names: tuple[str, ...], doubled: float) -> float | None:
    """FLOP per second measured here, of an operation with that share in the first arithmetic; None where one it needs was not
    measured."""
    seconds = 0.0  # per FLOP
    for name, part in zip(names, (doubled, 1.0 - doubled)):
        peak = ceilings.peak_flops(name)
        if part and peak is None:
            return None
        seconds += part / peak if part and peak else 0.0
    return 1 / seconds
