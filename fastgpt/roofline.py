"""What each operation of a training step must cost at least, and how far a profiled one is from it.

The roof of an operation is the later of two limits: its matmul FLOPs at the device's matmul rate, and the bytes that it has
to move at the device's bandwidth (Williams et al. 2009). FLOPs and bytes are those of fastgpt/flops.py, summed over a step:
least figures, each input read once and each output written once. An operation that a fused step does not need (casts, adds
outside the norm) has no work, so all of its time counts as a gap.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastgpt import anatomy, flops
from fastgpt.anatomy import Shape
from fastgpt.ceilings import Ceilings
from fastgpt.flops import Work
from fastgpt.op_names import GAPS
from fastgpt.operations import LINEARS
from fastgpt.profiling import StepProfile


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

    Names are those of fastgpt/profiling.py. ``size``: bytes of an activation (2 for bf16); the residual stream, the
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
        add(f"{linear.name} forward", flops.linear_forward(rows, N, K, size, bias=linear.bias), linear.count)
        add(f"{linear.name} dX", flops.linear_input_grad(rows, N, K, size), linear.count)
        add(f"{linear.name} dW", flops.linear_weight_grad(rows, N, K, size, grad_size=grad_size), linear.count)
    heads = (B, T, attention.heads, attention.head_dim, size)
    add("attention forward", flops.attention_forward(*heads, kv_heads=attention.kv_heads), attention.count)
    add("attention backward", flops.attention_backward(*heads, kv_heads=attention.kv_heads), attention.count)
    bias = shape.bias
    add("norms forward", flops.layer_norm_forward(rows, C, stream, bias=bias))  # the first one has no residual yet
    add("norms backward", flops.layer_norm_backward(rows, C, stream, bias=bias))
    behind_a_branch = sum(norm.count for norm in model.norms) - 1
    add("norms forward", flops.layer_norm_forward(rows, C, stream, residual=fused, bias=bias), behind_a_branch)
    add("norms backward", flops.layer_norm_backward(rows, C, stream, residual=fused, bias=bias), behind_a_branch)
    add("pointwise", Work(0, 0))
    if not fused:  # x + branch, and the sum of its two gradients
        add("pointwise", Work(0, rows * C * ((size + 8) + 12)), behind_a_branch)
    add("GELU forward", Work(0, 2 * rows * model.hidden * size), L)
    add("GELU backward", Work(0, 3 * rows * model.hidden * size), L)
    if one_pass_loss:
        forward = flops.cross_entropy(rows, V, size, grad=False)
        add("loss", Work(0, forward.bytes + rows * V * size))
    else:
        add("loss", flops.cross_entropy(rows, V, size))
    for table in model.embeddings:
        table_rows, different = (T, T) if table.positions else (rows, distinct)
        add("embedding", flops.embedding_forward(table_rows, different, C, 4))
        add("embedding", flops.embedding_backward(table_rows, different, C, 4))
    work = {name: Work(w.flops * grad_accum, w.bytes * grad_accum) for name, w in work.items()}
    params = anatomy.n_params(shape)
    work["gradient accumulation"] = Work(0, 12 * params * (grad_accum - 1))
    copied = (
        anatomy.matmul_params(shape) if fused and one_pass_loss and size < 4 else 0
    )  # the working copy of the matrices
    optimizer = flops.adamw(params)
    work["optimizer"] = Work(0, optimizer.bytes + copied * size)
    return work


def judge(profile: StepProfile, work: dict[str, Work], roofs: Roofs) -> list[JudgedOperation]:
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


def _roof(todo: Work | None, roofs: Roofs) -> flops.Roof | None:
    """None where there is no work to name, or where it needs a matmul rate that is not known."""
    if todo is None or (todo.flops and roofs.flops_per_second is None):
        return None
    return todo.roof(roofs.flops_per_second or float("inf"), roofs.bytes_per_second)


ADVICE = {
    GAPS: "launch overhead and Python: fewer and larger kernels, a larger micro-batch, CUDA graphs",
    "data": "load the next batch while the step runs, from pinned memory",
    "pointwise": "fuse residual adds, casts and copies into the kernels beside them",
    "gradient accumulation": "add the weight gradient inside the matmul that forms it",
    "GELU": "fuse it into the matmul before it",
    "norms": "one pass over the residual stream, forward and backward",
    "attention forward": "tiles and occupancy of the attention kernel",
    "attention backward": "tiles and occupancy of the attention kernels; one pass for dQ, dK and dV",
    "loss": "form dlogits chunk by chunk, without logits in fp32",
    "optimizer": "one launch for all tensors, clip included",
    "embedding": "gather and scatter of rows: latency, and the zeros of a dense gradient",
}
"""What closes the gap of an operation, by the beginning of its name."""


def advice(name: str) -> str:
    """What closes the gap of an operation."""
    if name.startswith((*LINEARS, "matmul")):
        return "tile shape and wave fill; double-rate arithmetic raises the roof itself"
    return next((text for start, text in ADVICE.items() if name.startswith(start)), "find out what it is")
