"""What one optimizer step launches, operation by operation: FLOPs, bytes and kernels, for each way to run it.

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
    loss in chunks, working copies of the weights, weight gradients in fp32 that are added where they lie. Linears are
    cuBLAS. ``fusions`` switches each of these off alone.

FLOPs, and bytes where an operation moves no more than it must, come from performance/flops.py; the bytes of passes that only
some variants make are written here as bytes per element. docs/projection.md explains each. No torch, no GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastgpt import anatomy
from fastgpt.anatomy import Linear, Shape
from fastgpt.common import UserError, at_least
from fastgpt.performance import flops
from fastgpt.performance.attention import attention, fp8_group
from fastgpt.performance.flops import cdiv
from fastgpt.performance.memory import LOGITS_BUDGET, SIZES, check_family, check_step
from fastgpt.performance.operation import AS_SHIPPED, NONE, Fusions, Operation, Per, StepSizes, sweep

PRECISIONS = tuple(name for name, size in SIZES.items() if size <= 2)
"""Those that a step's operations are known for: fp32 is left out."""

# ---------------------------------------------------------------- what is listed

GAPS = "gaps (nothing running)"
NEWTON_SCHULZ = 5
"""Steps of Muon's iteration: OptimConfig has no other number."""

LINEARS = tuple(linear.name for linear in anatomy.of(anatomy.GPT2_124M).linears)
PASSES = ("forward", "dX", "dW")

# ---------------------------------------------------------------- a step


def operations(
    shape: Shape,
    kernels: str = "triton",
    micro_batch: int = 8,
    T: int | None = None,
    precision: str = "bf16",
    *,
    dropout: float = 0.0,
    sm_count: int = 46,
    fusions: Fusions = AS_SHIPPED,
    optimizer: str = "adamw",
) -> list[Operation]:
    """Every operation of one optimizer step, grouped by part of the model.

    ``micro_batch`` sequences of ``T`` tokens (default: the block size). ``sm_count`` matters to triton's loss, which cuts its
    chunks to fill the SMs; ``fusions`` are those of triton that are on. ``optimizer``: "adamw", or "muon" for the blocks'
    matrices. Raises UserError for a name that is not in KERNELS or PRECISIONS, and for sizes below 1.
    """
    T = shape.block_size if T is None else T
    check_step(kernels, precision, micro_batch, PRECISIONS)
    at_least(1, T=T)
    if T > shape.block_size:
        raise UserError(f"T is {T}: the model's block_size is {shape.block_size}, so give at most that")
    check_family(shape, kernels, precision)
    on = fusions if kernels == "triton" else NONE
    s = StepSizes(shape, kernels, precision, micro_batch, T, dropout, sm_count, on, optimizer)
    ops = [*_embedding(s), *_norms(s), *attention(s), *_linears(s), *_head_and_loss(s), *_update(s)]
    return [op for op in ops if op.count]


# ---------------------------------------------------------------- embedding and norms


def _embedding(s: StepSizes) -> list[Operation]:
    """Token and position embedding in fp32, and their gradients."""
    if s.shape.family == "modern":
        return _lookups(s)
    rows, C, V, T = s.rows, s.shape.n_embd, s.shape.vocab_size, s.T
    distinct = min(V, rows)  # at most: text repeats itself, which the L2 would gain from
    forward = flops.embedding_forward(rows, distinct, C, 4).bytes
    if s.fusions.embedding:
        return [sweep("embedding forward", "embedding", forward + 4 * T * C, own=True), *_fused_embedding_backward(s)]
    # The whole gradient is zeroed first; positions read dy once more.
    backward = flops.embedding_backward(rows, distinct, C, 4).bytes + 4 * V * C + 4 * rows * C
    mask = 9 * rows * C if s.dropout else 0  # dropout: read and write fp32, write the mask
    if s.compiled:  # gather, add (and dropout) in one kernel
        return [
            sweep("embedding forward", "embedding", forward + (rows * C if s.dropout else 0)),
            sweep("embedding backward", "embedding", backward + (rows * C if s.dropout else 0), 3),
        ]
    return [
        sweep("embedding forward", "embedding", forward + 8 * rows * C + mask, 4 if s.dropout else 3),
        sweep("embedding backward", "embedding", backward + mask, 6 if s.dropout else 5),
        # The embedding is tied to the LM head: autograd adds the two gradients.
        sweep("tied gradients added", "embedding", 12 * V * C),
    ]


SORT_LAUNCHES = 4
"""Assumed: kernels of PyTorch's sort of the token ids."""


def _fused_embedding_backward(s: StepSizes) -> list[Operation]:
    """A sort of the ids, sums over equal ids, and sums over sequences. In the first micro-batch of a step the gradient is
    dense, and autograd adds it to the head's; in later ones only the rows that occur are read and written, in place."""
    rows, C, V, T = s.rows, s.shape.n_embd, s.shape.vocab_size, s.T
    distinct, positions, once = min(V, rows), s.shape.block_size, 12 * rows * 2
    added = 8 * rows * C + 8 * distinct * C + 8 * T * C + once
    dense = 8 * rows * C + 4 * distinct * C + 4 * T * C + 4 * (V + positions) * C + once
    launches, when = SORT_LAUNCHES + 3, "step" if s.fusions.in_place else "micro-batch"
    rest: dict[str, Any] = {"own": True, "fresh": 4 * rows * C}
    found = [
        sweep("embedding backward", "embedding", dense, launches + 2, per=when, **rest),
        sweep("tied gradients added", "embedding", 12 * V * C, per=when),
    ]
    if s.fusions.in_place:
        found.append(sweep("embedding backward", "embedding", added, launches, per="accumulation", **rest))
    return found


def _lookups(s: StepSizes) -> list[Operation]:
    """A modern model's tables, whose rows are only copied: of tokens in fp32, of value embeddings in 16 bits. Gradients as in
    ``_fused_embedding_backward``; without the fusion a dense one in every micro-batch."""
    found = []
    for table in s.model.embeddings:
        rows, W, size = s.rows, table.width, 2 if table.in_blocks else 4
        distinct = min(table.rows, rows)
        rest: dict[str, Any] = {"count": table.count, "own": s.fusions.embedding}
        found.append(sweep("embedding forward", "embedding", rows * (8 + size * W) + 4 * distinct * W, **rest))
        summed, in_place = (24 + size * W) * rows + 4 * distinct * W, s.fusions.embedding and s.fusions.in_place
        dense = summed + 4 * table.rows * W
        when: Per = "step" if in_place else "micro-batch"
        found.append(sweep("embedding backward", "embedding", dense, SORT_LAUNCHES + 3, per=when, **rest))
        if in_place:
            moved = summed + 4 * distinct * W
            found.append(sweep("embedding backward", "embedding", moved, SORT_LAUNCHES + 2, per="accumulation", **rest))
        if s.model.head.tied and not table.in_blocks:
            found.append(sweep("tied gradients added", "embedding", 12 * table.n_params, per=when))
    return found


def _norms(s: StepSizes) -> list[Operation]:
    """All norms follow a residual add but the first. Bytes per element: the residual stream is fp32, branches 16 bits."""
    norms = s.model.norms
    outside = [norm for norm in norms if not norm.in_blocks]  # the last, and the embedding's where there is one
    n, elements = sum(norm.count for norm in norms) - len(outside), s.rows * norms[0].width

    def op(name: str, group: str, per_element: int, launches: int = 1, count: int = n, fresh: int = 0) -> Operation:
        own = s.fusions.norms and group != "pointwise"
        return sweep(name, group, per_element * elements, launches, count=count, fresh=fresh * elements, own=own)

    forward, backward, extra = "norms forward", "norms backward", "pointwise"
    mask = 1 if s.dropout else 0  # a byte per element, kept from forward for backward
    first = [
        op("first norm forward", forward, 4 + 2, count=1),
        op("first norm backward", backward, 2 + 4 + 4, 2, count=1),
    ]
    if not s.model.mixes:  # else the first norm's pass, too, returns the sum that the stream goes on with
        first.append(op("first norm, gradients added", extra, 12, count=1))
    if len(outside) > 1:  # nothing is added to the embedding's
        first.append(op("embedding norm forward", forward, 4 + 4, count=1))
        first.append(op("embedding norm backward", backward, 4 + 4 + 4, count=1))
    if s.model.mixes:
        # In the norm's pass: forward reads x0 4; backward reads the branch 2, the residual in the place of the sum, and x0 4,
        # and writes x0's gradient 4, which autograd then adds to those of the blocks behind. Else passes of their own: a x (8),
        # b x0 (8), their sum (12), and in backward two products and two sums of products.
        L, fused = s.shape.n_layer, s.fusions.norms or s.compiled
        first += [
            op("residual mix forward", forward if fused else extra, 4 if fused else 28, 0 if fused else 3, L),
            op("residual mix backward", backward if fused else extra, 10 if fused else 40, 0 if fused else 6, L),
            op("embedding gradients added", extra, 12, count=L),
        ]
    if s.shape.smear:
        # In PyTorch, fp32: tokens moved by one (8), times the gate (8), added (12); backward two products, one of them summed
        # (8, 8), moved back (8), added (12).
        first += [op("smear forward", extra, 28, 6, count=1), op("smear backward", extra, 36, 8, count=1)]
    if s.shape.backout:
        # The middle's sum, 4 + 2 + 4, and x0 in the final norm's pass, 4; backward x0's gradient 4, and its sum 12.
        first += [op("backout forward", extra, 14, 2, count=1), op("backout backward", extra, 16, 2, count=1)]
    if s.fusions.norms:  # Philox again in backward: no mask
        return [
            *first,
            # Reads branch 2 and residual 4, writes sum 4 and norm 2, with fp8 also that in 1.
            op("norm forward", forward, 12 + s.own_fp8, fresh=2),
            # Reads dy 2, sum 4, the sum's gradient 4; writes the branch's gradient 2 (with fp8 also in 1), the residual's 4.
            op("norm backward", backward, 16 + s.own_fp8, 2, fresh=2),
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
        op("residual add", extra, 2 + 4 + 4, fresh=2),
        op("norm forward", forward, 4 + 4, fresh=4),
        op("norm cast", extra, 4 + 2, fresh=4),
        op("norm gradient cast", extra, 2 + 4, fresh=2),
        op("norm backward", backward, 4 + 4 + 4, fresh=4),
        op("norm weight gradient", backward, 8),
        op("residual gradient add", extra, 12, fresh=4),
        op("branch gradient cast", extra, 4 + 2, fresh=4),
    ]
    if s.dropout:
        passes += [op("dropout", extra, 2 + 2 + 1, fresh=2), op("dropout backward", extra, 2 + 1 + 2, fresh=2)]
    return passes


# ---------------------------------------------------------------- matrix products


def _epilogues(s: StepSizes) -> bool:
    """Whether the GELU is in the epilogues of matmuls: those in Triton, as sums in fp16 and products in fp8 are anyway."""
    return s.fusions.epilogues or (s.kernels == "triton" and s.precision in ("fp16-fast", "fp8"))


def _linear(linear: Linear, M: int, count: int, s: StepSizes) -> list[Operation]:
    """Forward, input gradient and weight gradient of y (M, N) = x (M, K) w^T. The last is rounded to 16 bits; or stays fp32,
    and is added to what there is (``in_place``) in all micro-batches but the first."""
    name, N, K, full = linear.name, linear.n_out, linear.n_in, s.fusions.weight_gradients
    works = (
        ((M, N, K), flops.linear_forward(M, N, K, bias=linear.bias)),
        ((M, K, N), flops.linear_input_grad(M, N, K)),
        ((N, K, M), flops.linear_weight_grad(M, N, K, grad_size=4 if full else 2)),
    )
    own = s.kernels == "triton" and s.precision == "fp16-fast"  # no library has it
    found = [
        Operation(f"{name} {way}", f"{name} {way}", "matmul", work.flops, work.bytes, 1, count=count, mnk=mnk, own=own)
        for way, (mnk, work) in zip(PASSES, works)
    ]
    if s.own_fp8:
        found = _in_fp8(found, linear, M)
    if full and s.fusions.in_place:
        first = found.pop()
        found += [replace(first, per="step"), replace(first, bytes=first.bytes + 4 * N * K, per="accumulation")]
    return found


def _in_fp8(found: list[Operation], linear: Linear, M: int) -> list[Operation]:
    """Forward and input gradient from operands of 8 bits; the weight gradient and the head stay as they are with bf16."""
    if not linear.in_blocks:
        return [replace(op, fast=False) for op in found]
    forward, dx, dw = found
    N, K = linear.n_out, linear.n_in
    return [
        replace(forward, bytes=M * K + N * K + 2 * M * N, own=True),
        replace(dx, bytes=M * N + N * K + 2 * M * K, own=True),
        replace(dw, fast=False),
    ]


def _linears(s: StepSizes) -> list[Operation]:
    """The linears of the blocks, and the GELU between the last two: passes of its own, or in the epilogues of those two."""
    model, L, M = s.model, s.shape.n_layer, s.rows
    linears = model.block_linears
    ops = [op for linear in linears for op in _linear(linear, M, linear.count, s)]
    elements = M * model.hidden
    # The bias of the linear before the GELU: the kernel that forms the GELU's gradient writes the sums of its rows by tiles,
    # which are then added up.
    summed = s.kernels == "triton" and s.shape.bias
    sums = 8 * model.hidden * cdiv(M, 128 if s.precision == "fp16-fast" else 64) if summed else 0
    if _epilogues(s):  # forward writes z beside gelu(z); backward reads z for the gradient of gelu(z), which it writes
        moved = (3 if s.own_fp8 else 2) * elements  # what goes into the next matmul is written in 8 bits, too
        more = {f"{linear.name} forward": (moved, 0) for linear in linears if linear.sink == "activation"}
        more |= {
            f"{linear.name} dX": (moved + sums, int(summed)) for linear in linears if linear.source == "activation"
        }
        for i, op in enumerate(ops):
            if op.name in more:
                added, launches = more[op.name]
                ops[i] = replace(op, bytes=op.bytes + added, launches=op.launches + launches, own=True)
    else:
        moved, name = (2 + 2 + 2) * elements + sums, model.activation
        ops += [
            sweep(f"{name} forward", f"{name} forward", (2 + 2) * elements, count=L, fresh=2 * elements),
            sweep(f"{name} backward", f"{name} backward", moved, 1 + int(summed), count=L, fresh=2 * elements),
        ]
    if s.shape.bias:
        ops += _bias_gradients(s)
    if s.own_fp8:
        # Activations and gradients are written by the kernels that make them. Weights once a step, both ways round.
        if not fp8_group(s):  # what attention gives and takes: read in 16 bits, written in 8
            around = [linear.n_in for linear in linears if linear.source == "attention"]
            around += [linear.n_out for linear in linears if linear.sink == "attention"]
            ops.append(sweep("fp8 quantisation", "pointwise", 3 * M * sum(around), len(around), count=L, own=True))
        moved, launches = 10 * (model.block_weights // L), 2 * len(linears)
        ops.append(sweep("fp8 weights", "pointwise", moved, launches, count=L, per="step", own=True))
    elif s.precision == "fp8":
        # Each operand is read in 16 bits and written in 8, twice: both of its matmuls want the summed side contiguous.
        columns = sum(linear.n_out + linear.n_in for linear in linears)
        ops.append(sweep("fp8 quantisation", "pointwise", 4 * M * columns, 2 * len(linears), count=L))
    return ops


def _bias_gradients(s: StepSizes) -> list[Operation]:
    """Passes that sum dy over its rows. In triton the tiles of dW add them up in fp16-fast; the kernel that forms the GELU's
    gradient does in all precisions."""
    linears, launches = s.model.block_linears, 1
    if s.kernels == "triton":
        linears = [linear for linear in linears if linear.sink != "activation"]
        launches = 2  # a sum in fp32, and a copy to where it belongs
        if s.precision == "fp16-fast":
            return []
    columns = sum(linear.n_out for linear in linears)
    moved = 2 * s.rows * columns
    return [sweep("bias gradients", "pointwise", moved, launches * len(linears), count=s.shape.n_layer)]


# ---------------------------------------------------------------- head and loss


LOSS_TILE = 128


def loss_chunk(rows: int, V: int, C: int, sm_count: int) -> int:
    """Tokens per chunk of triton's linear_cross_entropy: ``fused_cross_entropy.chunk_rows`` for 16-bit logits, repeated here as
    importing kernels/ decides how triton runs; a test compares."""
    padded = 64 * cdiv(V, 64)
    budget = LOGITS_BUDGET // (2 * padded) // LOSS_TILE * LOSS_TILE
    fewest = cdiv(rows, max(budget, LOSS_TILE))
    best, best_fill = 0, 0.0
    for chunks in range(fewest, fewest + 3):
        candidate = LOSS_TILE * cdiv(cdiv(rows, chunks), LOSS_TILE)
        tiles = candidate // LOSS_TILE * cdiv(C, LOSS_TILE)
        fill = tiles / (sm_count * cdiv(tiles, sm_count))
        if fill > best_fill:
            best, best_fill = candidate, fill
    return best


def _head_and_loss(s: StepSizes) -> list[Operation]:
    linear = s.model.head
    rows, C, V = s.rows, linear.n_in, linear.n_out
    logits = rows * V
    if not s.fusions.loss:
        plain = replace(s, fusions=replace(s.fusions, weight_gradients=False))
        head = _linear(linear, rows, 1, plain)
        if s.compiled:  # the cast to fp32 is fused into both passes
            work = flops.cross_entropy(rows, V)
            return [*head, sweep("loss", "loss", work.bytes, 4, fresh=2 * logits)]
        # Forward: cast 2 -> 4, log-softmax 4 -> 4. Backward: of the pick, a gradient that is zero but for one class (4);
        # of log-softmax 4 + 4 -> 4; of the cast 4 -> 2.
        return [*head, sweep("loss", "loss", (6 + 8 + 4 + 12 + 6) * logits, 7)]
    chunk = loss_chunk(rows, V, C, s.sm_count)
    whole, rest = divmod(rows, chunk)
    once = replace(s, fusions=replace(s.fusions, in_place=False))  # all chunks of a micro-batch add to one new gradient
    ops: list[Operation] = []
    for size, count in ((chunk, whole), (rest, 1)):
        if not size or not count:
            continue
        forward, dx, dw = _linear(linear, size, count, once)
        summed = flops.linear_weight_grad(size, V, C, accumulate=True)
        # dX comes in fp32: straight from cuBLAS, or copied from the 16 bits that Triton's matmul stores.
        moved, launches = (6, 2) if dx.own else (2, 1)
        ops += [
            forward,
            # Statistics, then dlogits in place; the second pass over a row finds it in L2.
            sweep("loss rows", "loss", 4 * size * V + 12 * size, count=count, fresh=2 * size * V, own=True),
            replace(dx, bytes=dx.bytes + moved * size * C, launches=launches),
            replace(dw, bytes=summed.bytes),
        ]
    # dx and dW come in fp32 and are multiplied by the upstream gradient; dx is then cast.
    return [*ops, sweep("loss gradients scaled", "loss", 14 * rows * C + 8 * V * C, 3)]


# ---------------------------------------------------------------- weights and their update


def _update(s: StepSizes) -> list[Operation]:
    """Weight and gradient casts per micro-batch, accumulation, clip and AdamW."""
    if s.kernels == "triton":
        return [*_casts(s), _accumulation(s), *_optimizer(s)]
    P, matrices = anatomy.matmul_params(s.shape), sum(linear.count for linear in s.model.linears)
    tied = (
        4 * s.model.head.weights if s.compiled and s.model.head.tied else 0
    )  # Inductor adds the embedding's gradient in the same pass
    return [
        sweep("weights cast", "pointwise", 6 * P, matrices),
        sweep("weight gradients cast", "pointwise", 6 * P + tied, matrices, fresh=2 * P),
        _accumulation(s),
        *_optimizer(s),
    ]


def _casts(s: StepSizes) -> list[Operation]:
    """Casts in triton: the head's weight in every micro-batch, the blocks' only when no kernel has written a copy of them."""
    head, blocks = s.model.head.weights, s.model.block_weights
    matrices = sum(linear.count for linear in s.model.block_linears)
    found = [sweep("head weight cast", "pointwise", 6 * head)]
    if s.own_fp8:
        pass  # theirs are "fp8 weights"
    elif not s.fusions.working_copy:
        found.append(sweep("weights cast", "pointwise", 6 * blocks, matrices))
    elif not s.fusions.optimizer:  # torch's writes none: they are made anew once a step
        found.append(sweep("weights cast", "pointwise", 6 * blocks, matrices, per="step"))
    rounded = (0 if s.fusions.weight_gradients else blocks) + (0 if s.fusions.loss else head)
    tensors = (0 if s.fusions.weight_gradients else matrices) + (0 if s.fusions.loss else 1)
    if rounded:
        found.append(sweep("weight gradients cast", "pointwise", 6 * rounded, tensors, fresh=2 * rounded))
    return found


def _accumulation(s: StepSizes) -> Operation:
    """What autograd adds to the gradients of earlier micro-batches: all of them, less those that a kernel adds in place."""
    elements, tensors = anatomy.n_params(s.shape), s.model.n_tensors
    if s.fusions.in_place and s.fusions.weight_gradients:
        elements -= s.model.block_weights
        tensors -= sum(linear.count for linear in s.model.block_linears)
        if s.fusions.embedding:  # of a token embedding that is tied to the LM head autograd still adds the gradient
            tables = s.model.lookups
            elements -= sum(table.n_params for table in tables)
            tensors -= sum(table.count for table in tables)
    return sweep("gradients added", "gradient accumulation", 12 * elements, tensors, per="accumulation")


def _optimizer(s: StepSizes) -> list[Operation]:
    N, muon = anatomy.n_params(s.shape), _muon(s) if s.optimizer == "muon" else []
    copied = anatomy.matmul_params(s.shape)
    if muon:
        N, copied = N - s.model.block_weights, copied - s.model.block_weights
    update = flops.adamw(N).bytes
    if s.fusions.optimizer:
        copies = 2 * copied if s.fusions.working_copy and not s.own_fp8 else 0
        return [sweep("clip and AdamW", "optimizer", update + copies, 3, per="step", own=True), *muon]
    # torch: one pass for the norm (4), one that scales (8), then the fused update.
    unscale = 8 * N if s.precision.startswith("fp16") else 0
    return [sweep("clip and AdamW", "optimizer", update + 8 * N + unscale, 12, per="step"), *muon]


def _muon(s: StepSizes) -> list[Operation]:
    """Muon's passes, and the products of its Newton-Schulz steps, each over all matrices of one shape. Of the symmetric ones
    this repository's kernels compute about half: as many tiles as lie on and below the diagonal."""
    own, weights = s.fusions.optimizer, s.model.block_weights
    copies = 2 * weights if own and s.fusions.working_copy and not s.own_fp8 else 0
    matrices = flops.muon_matrices(s.model)
    passes = sweep(
        "Muon's passes", "optimizer", 30 * weights + copies, 2 * sum(m[0] for m in matrices), per="step", own=own
    )
    together: dict[tuple[int, int], int] = {}
    for count, n, m in matrices:
        together[n, m] = together.get((n, m), 0) + count
    found = [passes]
    for (n, m), count in together.items():
        tiles = cdiv(n, 128)
        rows = cdiv(count * n * (tiles + 1), 2 * tiles) if own else count * n
        # (batch and rows, columns, k), bytes: X X^T, then P of it, then P X.
        for name, mnk, moved in (
            ("X X^T", (rows, n, m), 2 * (n * m + n * n)),
            ("polynomial", (rows, n, n), 4 * n * n),
            ("P X", (count * n, m, n), 2 * (n * n + 2 * n * m)),
        ):
            product = Operation(
                f"Muon's {name}, {n} x {m}", "optimizer", "matmul", 2 * mnk[0] * mnk[1] * mnk[2], count * moved, 1,
                count=NEWTON_SCHULZ, per="step", mnk=mnk, fast=False, own=own,
            )  # fmt: skip
            found.append(product)
    return found
