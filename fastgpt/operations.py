"""What one optimizer step of a GPT-2 launches, operation by operation: FLOPs, bytes and kernels, for each way to run it.

Four variants of the same mathematics move very different numbers of bytes:

``nanogpt-compile``, ``compile``
    bf16 autocast under torch.compile (nanoGPT's program; this repository's model is the same graph). Inductor fuses each
    chain of pointwise operations with the norm or the loss beside it. Logits exist as a whole, in bf16. Every fp32 weight
    is cast once per micro-batch, every gradient is cast to fp32 and added in passes of its own. What is fused and what
    is saved was read off the code that Inductor writes for this repository's model (docs/projection.md).
``eager``
    bf16 autocast, one pass per pointwise operation and per cast; logits also exist in fp32, log-probabilities and their
    gradients with them. Weights are cast once per micro-batch (autocast keeps the copy).
``triton``
    this repository's kernels: residual add and norm in one pass over an fp32 residual stream, attention on packed qkv,
    loss in chunks, working copies of the weights. Linears are cuBLAS, GELU is PyTorch's own.

FLOPs, and bytes where an operation moves no more than it must, come from fastgpt/flops.py; the bytes of passes that only
some variants make are written here as bytes per element. docs/projection.md explains each. No torch, no GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from fastgpt import flops
from fastgpt.errors import UserError
from fastgpt.flops import Shape

KERNELS = ("nanogpt-compile", "eager", "compile", "triton")
PRECISIONS = ("bf16", "fp16", "fp16-fast", "fp8")

GAPS = "gaps (nothing running)"

LINEARS = ("qkv", "attention projection", "mlp up", "mlp down", "head")
PASSES = ("forward", "dX", "dW")
GROUPS = (
    "embedding",
    "norms forward",
    "norms backward",
    "attention forward",
    "attention backward",
    *(f"{linear} {way}" for linear in LINEARS for way in PASSES),
    "GELU forward",
    "GELU backward",
    "pointwise",
    "loss",
    "gradient accumulation",
    "optimizer",
)
"""Every group that an operation can belong to, under the names of fastgpt/profiling.py; a cast, a residual add apart from
the norm and whatever else is not needed is "pointwise"."""

Kind = Literal["matmul", "attention", "memory"]
Per = Literal["micro-batch", "accumulation", "step"]

# These and ``loss_chunk`` repeat kernels/fused_cross_entropy.py, whose import decides how triton runs; a test compares.
LOGITS_BUDGET = 256 * 2**20  # bytes
TILE = 128


@dataclass(frozen=True)
class Operation:
    """One execution of one operation, and how often a step executes it."""

    name: str
    group: str  # of GROUPS
    kind: Kind
    flops: int
    bytes: int  # moved by one execution, every read and write counted
    launches: int  # kernels of one execution
    count: int = 1  # executions per micro-batch, per accumulation (all micro-batches but the first) or per step
    per: Per = "micro-batch"
    fresh: int = 0  # of ``bytes``: reads of what the kernel just before has written, and L2 may still hold
    mnk: tuple[int, int, int] | None = None  # of a matmul: an (m, k) by a (k, n) matrix
    scores: int = 0  # of attention: elements of S = Q K^T that get an exponential
    instructions: int = 0  # of attention: plain instructions per score, beside the exponential
    own: bool = False  # a kernel of this repository, not of a library or of Inductor

    def executions(self, grad_accum: int) -> int:
        """How often a step of ``grad_accum`` micro-batches executes this."""
        return self.count * {"micro-batch": grad_accum, "accumulation": grad_accum - 1, "step": 1}[self.per]


@dataclass(frozen=True)
class _Sizes:
    """The integers that every part below needs. ``e``: bytes of a 16-bit element."""

    shape: Shape
    kernels: str
    precision: str
    B: int
    T: int
    dropout: float
    sm_count: int
    e: int = 2

    @property
    def rows(self) -> int:
        return self.B * self.T

    @property
    def compiled(self) -> bool:
        return self.kernels.endswith("compile")

    @property
    def own(self) -> bool:
        """Whether norms, attention, loss and optimizer are this repository's kernels."""
        return self.kernels == "triton"

    @property
    def tensors(self) -> int:
        """Parameter tensors: token and position embedding, final norm, and per block two norms and four linears."""
        per_block, outside = 6, 3
        return (per_block * self.shape.n_layer + outside) + (6 * self.shape.n_layer + 1 if self.shape.bias else 0)


def operations(
    shape: Shape,
    kernels: str = "triton",
    micro_batch: int = 8,
    T: int | None = None,
    precision: str = "bf16",
    *,
    dropout: float = 0.0,
    sm_count: int = 46,
) -> list[Operation]:
    """Every operation of one optimizer step, in the order of forward, backward, update.

    ``micro_batch`` sequences of ``T`` tokens (default: the block size); ``sm_count`` matters to triton's loss, which cuts
    its chunks to fill the SMs. Raises UserError for a name that is not in KERNELS or PRECISIONS, and for sizes below 1.
    """
    T = shape.block_size if T is None else T
    _check(shape, kernels, precision, micro_batch, T)
    s = _Sizes(shape, kernels, precision, micro_batch, T, dropout, sm_count)
    ops = [*_embedding(s), *_norms(s), *_attention(s), *_linears(s), *_pointwise(s), *_head_and_loss(s), *_update(s)]
    return [op for op in ops if op.count]


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def loss_chunk(rows: int, V: int, C: int, sm_count: int) -> int:
    """Tokens per chunk of triton's linear_cross_entropy: ``fused_cross_entropy.chunk_rows`` for 16-bit logits."""
    padded = 64 * cdiv(V, 64)
    budget = LOGITS_BUDGET // (2 * padded) // TILE * TILE
    fewest = cdiv(rows, max(budget, TILE))
    best, best_fill = 0, 0.0
    for chunks in range(fewest, fewest + 3):
        candidate = TILE * cdiv(cdiv(rows, chunks), TILE)
        tiles = candidate // TILE * cdiv(C, TILE)
        fill = tiles / (sm_count * cdiv(tiles, sm_count))
        if fill > best_fill:
            best, best_fill = candidate, fill
    return best


def _check(shape: Shape, kernels: str, precision: str, micro_batch: int, T: int) -> None:
    for name, value, known in (("kernels", kernels, KERNELS), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise UserError(f"{name} is {value!r}: it can be {', '.join(known)}")
    for name, number in (("micro_batch", micro_batch), ("T", T)):
        if number < 1:
            raise UserError(f"{name} is {number}: it must be at least 1")
    if T > shape.block_size:
        raise UserError(f"T is {T}: the model's block_size is {shape.block_size}, so give at most that")


def _memory(name: str, group: str, moved: int, launches: int = 1, **rest: Any) -> Operation:
    return Operation(name, group, "memory", 0, moved, launches, **rest)


# ---------------------------------------------------------------- embedding and norms


def _embedding(s: _Sizes) -> list[Operation]:
    """Token and position embedding in fp32, and their dense gradients."""
    rows, C, V = s.rows, s.shape.n_embd, s.shape.vocab_size
    distinct = min(V, rows)  # at most: text repeats itself, which the L2 would gain from
    forward = flops.embedding_forward(rows, distinct, C, 4).bytes
    backward = flops.embedding_backward(rows, distinct, C, 4).bytes + 4 * V * C + 4 * rows * C  # zeros first; positions
    mask = 9 * rows * C if s.dropout else 0  # dropout: read and write fp32, write the mask
    if s.compiled:  # gather, add (and dropout) in one kernel
        return [
            _memory("embedding forward", "embedding", forward + (rows * C if s.dropout else 0)),
            _memory("embedding backward", "embedding", backward + (rows * C if s.dropout else 0), 3),
        ]
    return [
        _memory("embedding forward", "embedding", forward + 8 * rows * C + mask, 4 if s.dropout else 3),
        _memory("embedding backward", "embedding", backward + mask, 6 if s.dropout else 5),
        # The table is the head too: autograd adds the two gradients.
        _memory("tied gradients added", "embedding", 12 * V * C),
    ]


def _norms(s: _Sizes) -> list[Operation]:
    """2L norms behind a residual add, and the first. Bytes per element: the residual stream is fp32, branches 16 bits."""
    n, elements = 2 * s.shape.n_layer, s.rows * s.shape.n_embd

    def op(name: str, group: str, per_element: int, launches: int = 1, count: int = n, fresh: int = 0) -> Operation:
        own = s.own and group != "pointwise"
        return _memory(name, group, per_element * elements, launches, count=count, fresh=fresh * elements, own=own)

    forward, backward, apart = "norms forward", "norms backward", "pointwise"
    mask = 1 if s.dropout else 0  # a byte per element, kept from forward for backward
    first = [
        op("first norm forward", forward, 4 + 2, count=1),
        op("first norm backward", backward, 2 + 4 + 4, 2, count=1),
        op("first norm, gradients added", apart, 12, count=1),
    ]
    if s.kernels == "triton":  # Philox again in backward: no mask
        return [
            *first,
            # Reads branch 2 and residual 4, writes sum 4 and norm 2.
            op("norm forward", forward, 12, fresh=2),
            # Reads dy 2, sum 4, the sum's gradient 4; writes the branch's gradient 2 and the residual's 4.
            op("norm backward", backward, 16, 2, fresh=2),
        ]
    if s.compiled:
        return [
            *first,
            # Reads the last sum 4 and the branches since, 2 each (1 to 4 of them: a sum is written every fourth time, 1 on
            # average); writes the normed 4, kept for backward, and its cast 2.
            op("norm forward", forward, 4 + 5 + 1 + 4 + 2 + mask, fresh=2),
            # Reads dy 2, the normed 4, the sum's gradient 4; writes that 4, and its cast 2 for the branch.
            op("norm backward", backward, 16 + mask, fresh=2),
            # A reduction over rows is a kernel of its own, in two stages: reads dy 2 and the normed 4 again.
            op("norm weight gradient", backward, 6, 2),
        ]
    passes = [
        *first,
        op("residual add", apart, 2 + 4 + 4, fresh=2),
        op("norm forward", forward, 4 + 4, fresh=4),
        op("norm cast", apart, 4 + 2, fresh=4),
        op("norm gradient cast", apart, 2 + 4, fresh=2),
        op("norm backward", backward, 4 + 4 + 4, fresh=4),
        op("norm weight gradient", backward, 8),
        op("residual gradient add", apart, 12, fresh=4),
        op("branch gradient cast", apart, 4 + 2, fresh=4),
    ]
    if s.dropout:
        passes += [op("dropout", apart, 2 + 2 + 1, fresh=2), op("dropout backward", apart, 2 + 1 + 2, fresh=2)]
    return passes


# ---------------------------------------------------------------- attention

SOFTMAX_INSTRUCTIONS = 8  # per score, beside the exponential: scale and subtract, maximum, sum, masks, half a convert
DROPOUT_INSTRUCTIONS = 10  # per score: its share of a Philox call, compare, select


def _attention(s: _Sizes) -> list[Operation]:
    B, T, H, L, C = s.B, s.T, s.shape.n_head, s.shape.n_layer, s.shape.n_embd
    rows, D = s.rows, _padded_head(C // H, power_of_two=s.kernels == "triton")
    instructions = SOFTMAX_INSTRUCTIONS + (DROPOUT_INSTRUCTIONS if s.dropout else 0)

    def op(name: str, group: str, work: flops.Work, moved: int, tile: int, launches: int = 1) -> Operation:
        scores = round(B * H * T * flops.attended_keys(T, tile=min(tile, T)))
        rest: dict[str, Any] = {"count": L, "scores": scores, "instructions": instructions, "own": s.own}
        return Operation(name, group, "attention", work.flops, moved, launches, **rest)

    forward = flops.attention_forward(B, T, H, D, s.e, tile=min(128, T))
    least = flops.attention_forward(B, T, H, C // H, s.e).bytes  # padding is in registers, not in memory
    found = [op("attention forward", "attention forward", forward, least, 128)]
    group, vector, log_sums = "attention backward", s.e * rows * C, 4 * rows * H
    if s.kernels == "triton":
        # Two kernels, each with scores and dP of its own; each reads q, k, v, dO, the first also O; writes dq or dk, dv.
        query = flops.attention_backward(B, T, H, D, s.e, tile=min(128, T), matmuls=3)
        key = flops.attention_backward(B, T, H, D, s.e, tile=min(64, T), matmuls=4)
        return [
            *found,
            op("attention backward dQ", group, query, 6 * vector + 2 * log_sums, 128),
            op("attention backward dK dV", group, key, 6 * vector + 2 * log_sums, 64),
        ]
    # FlashAttention-2: delta, and zeros into an fp32 dQ; the loop, which adds to that dQ; dQ rounded to 16 bits.
    loop = flops.attention_backward(B, T, H, D, s.e, tile=min(128, T))
    return [
        *found,
        _memory("attention backward, delta", group, 2 * vector + log_sums + 4 * rows * C, count=L, fresh=vector),
        op("attention backward", group, loop, 6 * vector + 2 * log_sums + 8 * rows * C, 128),
        _memory("attention backward, dQ cast", group, 4 * rows * C + vector, count=L, fresh=4 * rows * C),
        # q, k and v are views of one projection: their gradients are copied together.
        _memory("attention backward, dQ dK dV packed", group, 6 * vector, count=L, fresh=3 * vector),
    ]


def _padded_head(D: int, *, power_of_two: bool) -> int:
    """The head dimension that a kernel computes with: triton's next power of two, FlashAttention-2's next 32."""
    return max(16, 1 << (D - 1).bit_length()) if power_of_two else 32 * cdiv(D, 32)


# ---------------------------------------------------------------- matrix products


def _linear(name: str, M: int, N: int, K: int, count: int, s: _Sizes) -> list[Operation]:
    """Forward, input gradient and weight gradient (rounded to 16 bits) of y (M, N) = x (M, K) w^T."""
    works = (
        ((M, N, K), flops.linear_forward(M, N, K, s.e, bias=s.shape.bias)),
        ((M, K, N), flops.linear_input_grad(M, N, K, s.e)),
        ((N, K, M), flops.linear_weight_grad(M, N, K, s.e, grad_size=s.e)),
    )
    own = s.own and s.precision in ("fp16-fast", "fp8")  # no library has them
    return [
        Operation(f"{name} {way}", f"{name} {way}", "matmul", work.flops, work.bytes, 1, count=count, mnk=mnk, own=own)
        for way, (mnk, work) in zip(PASSES, works)
    ]


def _linears(s: _Sizes) -> list[Operation]:
    """The four linears of a block, L times."""
    C, L, M = s.shape.n_embd, s.shape.n_layer, s.rows
    sizes = ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C))
    ops = [op for name, (N, K) in zip(LINEARS, sizes) for op in _linear(name, M, N, K, L, s)]
    if s.shape.bias:
        widths = sum(N for N, _ in sizes)
        ops.append(_memory("bias gradients", "pointwise", s.e * M * widths, 4, count=L))
    if s.precision == "fp8":
        # Each operand is read in 16 bits and written in 8, twice: both of its matmuls want the summed side contiguous.
        columns = sum(N + K for N, K in sizes)
        ops.append(_memory("fp8 quantisation", "pointwise", 4 * M * columns, 8, count=L))
    return ops


def _pointwise(s: _Sizes) -> list[Operation]:
    """GELU over the 4C columns, the one pointwise operation that is fused with nothing in any variant."""
    elements, L = 4 * s.rows * s.shape.n_embd, s.shape.n_layer
    return [
        _memory("GELU forward", "GELU forward", (2 + 2) * elements, count=L, fresh=2 * elements),
        _memory("GELU backward", "GELU backward", (2 + 2 + 2) * elements, count=L, fresh=2 * elements),
    ]


def _head_and_loss(s: _Sizes) -> list[Operation]:
    rows, C, V = s.rows, s.shape.n_embd, s.shape.vocab_size
    logits = rows * V
    if s.kernels != "triton":
        head = _linear("head", rows, V, C, 1, s)
        if s.compiled:  # the cast to fp32 is fused into both passes
            work = flops.cross_entropy(rows, V, s.e)
            return [*head, _memory("loss", "loss", work.bytes, 4, fresh=s.e * logits)]
        # Forward: cast 2 -> 4, log-softmax 4 -> 4. Backward: of the pick, a gradient that is zero but for one class (4);
        # of log-softmax 4 + 4 -> 4; of the cast 4 -> 2.
        return [*head, _memory("loss", "loss", (6 + 8 + 4 + 12 + 6) * logits, 7)]
    chunk = loss_chunk(rows, V, C, s.sm_count)
    whole, rest = divmod(rows, chunk)
    ops: list[Operation] = []
    for size, count in ((chunk, whole), (rest, 1)):
        if not size or not count:
            continue
        forward, dx, dw = _linear("head", size, V, C, count, s)
        summed = flops.linear_weight_grad(size, V, C, s.e, grad_size=4, accumulate=True)
        ops += [
            forward,
            # Statistics, then dlogits in place; the second pass over a row finds it in L2.
            _memory("loss rows", "loss", 2 * s.e * size * V + 12 * size, count=count, fresh=s.e * size * V, own=True),
            replace(dx, bytes=dx.bytes + 2 * size * C),  # written in fp32
            replace(dw, bytes=summed.bytes),
        ]
    # dx and dW come in fp32 and are multiplied by the upstream gradient; dx is then cast.
    return [*ops, _memory("loss gradients scaled", "loss", 14 * rows * C + 8 * V * C, 3)]


# ---------------------------------------------------------------- weights and their update


def _update(s: _Sizes) -> list[Operation]:
    """Weight and gradient casts per micro-batch, accumulation, clip and AdamW."""
    N, P = flops.n_params(s.shape), flops.matmul_params(s.shape)
    head = s.shape.vocab_size * s.shape.n_embd
    matrices = 4 * s.shape.n_layer + 1
    accumulation = _memory("gradients added", "gradient accumulation", 12 * N, s.tensors, per="accumulation")
    if s.kernels == "triton":
        copies = 2 * P if s.precision != "fp8" else 4 * P  # of matrices; fp8 ones in both orientations, and their read
        update = flops.adamw(N).bytes + copies
        return [
            _memory("head weight cast", "pointwise", 6 * head),
            # cuBLAS writes 16 bits, autograd wants fp32. The head's gradient is fp32 already.
            _memory("weight gradients cast", "pointwise", 6 * (P - head), matrices - 1, fresh=2 * (P - head)),
            accumulation,
            _memory("clip and AdamW", "optimizer", update, 3, per="step", own=True),
        ]
    tied = 4 * head if s.compiled else 0  # Inductor adds the embedding's gradient in the same pass
    # torch: one pass for the norm (4), one that scales (8), then the fused update.
    clip_scales, unscale = 8 * N, 8 * N if s.precision.startswith("fp16") else 0
    return [
        _memory("weights cast", "pointwise", 6 * P, matrices),
        _memory("weight gradients cast", "pointwise", 6 * P + tied, matrices, fresh=2 * P),
        accumulation,
        _memory("clip and AdamW", "optimizer", flops.adamw(N).bytes + clip_scales + unscale, 12, per="step"),
    ]
