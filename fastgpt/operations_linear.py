"""The matrix products of a step, and what stands between them and the weights: GELU, loss, casts, accumulation, update.

A part of fastgpt/operations.py, which says what the variants are."""

from __future__ import annotations

from dataclasses import replace

from fastgpt import flops
from fastgpt.operation_types import LINEARS, PASSES, Operation, Sizes, cdiv, memory

# These, ``loss_chunk`` and ``fp8_group`` repeat what kernels/ says, whose import decides how triton runs; tests compare.
LOGITS_BUDGET = 256 * 2**20  # bytes
TILE = 128


def matrix_operations(s: Sizes) -> list[Operation]:
    return [*_linears(s), *_head_and_loss(s), *_update(s)]


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


# ---------------------------------------------------------------- matrix products


def _epilogues(s: Sizes) -> bool:
    """Whether the GELU is in the epilogues of matmuls: those in Triton, as sums in fp16 and products in fp8 are anyway."""
    return s.fused("epilogues") or (s.kernels == "triton" and s.precision in ("fp16-fast", "fp8"))


def _linear(name: str, M: int, N: int, K: int, count: int, s: Sizes) -> list[Operation]:
    """Forward, input gradient and weight gradient of y (M, N) = x (M, K) w^T. The last is rounded to 16 bits; or stays fp32,
    and is added to what there is (``in_place``) in all micro-batches but the first."""
    full = s.fused("weight_gradients")
    works = (
        ((M, N, K), flops.linear_forward(M, N, K, s.e, bias=s.shape.bias)),
        ((M, K, N), flops.linear_input_grad(M, N, K, s.e)),
        ((N, K, M), flops.linear_weight_grad(M, N, K, s.e, grad_size=4 if full else s.e)),
    )
    own = s.kernels == "triton" and s.precision == "fp16-fast"  # no library has it
    found = [
        Operation(f"{name} {way}", f"{name} {way}", "matmul", work.flops, work.bytes, 1, count=count, mnk=mnk, own=own)
        for way, (mnk, work) in zip(PASSES, works)
    ]
    if s.own_fp8:
        found = _in_fp8(found, name, M, N, K)
    if full and s.fused("in_place"):
        first = found.pop()
        found += [replace(first, per="step"), replace(first, bytes=first.bytes + 4 * N * K, per="accumulation")]
    return found


def _in_fp8(found: list[Operation], name: str, M: int, N: int, K: int) -> list[Operation]:
    """Forward and input gradient from operands of 8 bits; the weight gradient and the head stay as they are with bf16."""
    if name == "head":
        return [replace(op, fast=False) for op in found]
    forward, dx, dw = found
    return [
        replace(forward, bytes=M * K + N * K + 2 * M * N, own=True),
        replace(dx, bytes=M * N + N * K + 2 * M * K, own=True),
        replace(dw, fast=False),
    ]


def fp8_group(s: Sizes) -> int:
    """Columns that share a scale in what attention's kernels write in fp8 for the linears around it: ``_fp8_rows.group_size``.
    0 where they write none."""
    D = s.shape.n_embd // s.shape.n_head
    return 0 if not s.own_fp8 else 64 if D % 64 == 0 else 32 if D % 32 == 0 else 0


def _linears(s: Sizes) -> list[Operation]:
    """The four linears of a block, L times, and the GELU between the last two: passes of its own but in epilogues."""
    C, L, M = s.shape.n_embd, s.shape.n_layer, s.rows
    sizes = ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C))
    ops = [op for name, (N, K) in zip(LINEARS, sizes) for op in _linear(name, M, N, K, L, s)]
    elements = 4 * M * C
    # c_fc's bias: whoever forms GELU's gradient writes the sums of its rows by tiles, which are then added up.
    summed = s.kernels == "triton" and s.shape.bias
    sums = 8 * 4 * C * cdiv(M, 128 if s.precision == "fp16-fast" else 64) if summed else 0
    if _epilogues(s):  # forward writes z beside gelu(z); backward reads z for the gradient of gelu(z), which it writes
        each = 3 if s.own_fp8 else 2  # what goes into the next matmul is written in 8 bits, too
        more = {"mlp up forward": (each * elements, 0), "mlp down dX": (each * elements + sums, int(summed))}
        for i, op in enumerate(ops):
            if op.name in more:
                moved, launches = more[op.name]
                ops[i] = replace(op, bytes=op.bytes + moved, launches=op.launches + launches, own=True)
    else:
        moved = (2 + 2 + 2) * elements + sums
        ops += [
            memory("GELU forward", "GELU forward", (2 + 2) * elements, count=L, fresh=2 * elements),
            memory("GELU backward", "GELU backward", moved, 1 + int(summed), count=L, fresh=2 * elements),
        ]
    if s.shape.bias:
        ops += _bias_gradients(s, sum(N for N, _ in sizes))
    if s.own_fp8:
        # Activations and gradients are written by the kernels that make them. Weights once a step, both ways round.
        if not fp8_group(s):  # what attention gives and takes
            ops.append(memory("fp8 quantisation", "pointwise", 3 * 4 * M * C, 2, count=L, own=True))
        weights = memory("fp8 weights", "pointwise", 10 * 12 * C * C, 8, count=L, per="step", own=True)
        ops.append(weights)
    elif s.precision == "fp8":
        # Each operand is read in 16 bits and written in 8, twice: both of its matmuls want the summed side contiguous.
        columns = sum(N + K for N, K in sizes)
        ops.append(memory("fp8 quantisation", "pointwise", 4 * M * columns, 8, count=L))
    return ops


def _bias_gradients(s: Sizes, columns: int) -> list[Operation]:
    """Passes that sum dy over its rows. Of triton only where another kernel has made dy: its own add up their rows."""
    C, L = s.shape.n_embd, s.shape.n_layer
    if s.kernels != "triton":
        return [memory("bias gradients", "pointwise", s.e * s.rows * columns, 4, count=L)]
    left = [(width, tensors) for width, tensors, maker in ((3, 1, "attention"), (2, 2, "norms")) if not s.fused(maker)]
    if not left or s.precision == "fp16-fast":  # there the tiles of dW add them up
        return []
    width, tensors = map(sum, zip(*left))  # each a sum in fp32, and a copy to where it belongs
    return [memory("bias gradients", "pointwise", s.e * s.rows * width * C, 2 * tensors, count=L)]


# ---------------------------------------------------------------- head and loss


def _head_and_loss(s: Sizes) -> list[Operation]:
    rows, C, V = s.rows, s.shape.n_embd, s.shape.vocab_size
    logits = rows * V
    if not s.fused("loss"):
        plain = replace(s, fusions=replace(s.fusions, weight_gradients=False))
        head = _linear("head", rows, V, C, 1, plain)
        if s.compiled:  # the cast to fp32 is fused into both passes
            work = flops.cross_entropy(rows, V, s.e)
            return [*head, memory("loss", "loss", work.bytes, 4, fresh=s.e * logits)]
        # Forward: cast 2 -> 4, log-softmax 4 -> 4. Backward: of the pick, a gradient that is zero but for one class (4);
        # of log-softmax 4 + 4 -> 4; of the cast 4 -> 2.
        return [*head, memory("loss", "loss", (6 + 8 + 4 + 12 + 6) * logits, 7)]
    chunk = loss_chunk(rows, V, C, s.sm_count)
    whole, rest = divmod(rows, chunk)
    once = replace(s, fusions=replace(s.fusions, in_place=False))  # all chunks of a micro-batch add to one new gradient
    ops: list[Operation] = []
    for size, count in ((chunk, whole), (rest, 1)):
        if not size or not count:
            continue
        forward, dx, dw = _linear("head", size, V, C, count, once)
        summed = flops.linear_weight_grad(size, V, C, s.e, grad_size=4, accumulate=True)
        # dX comes in fp32: straight from cuBLAS, or copied from the 16 bits that Triton's matmul stores.
        moved, launches = (6, 2) if dx.own else (2, 1)
        ops += [
            forward,
            # Statistics, then dlogits in place; the second pass over a row finds it in L2.
            memory("loss rows", "loss", 2 * s.e * size * V + 12 * size, count=count, fresh=s.e * size * V, own=True),
            replace(dx, bytes=dx.bytes + moved * size * C, launches=launches),
            replace(dw, bytes=summed.bytes),
        ]
    # dx and dW come in fp32 and are multiplied by the upstream gradient; dx is then cast.
    return [*ops, memory("loss gradients scaled", "loss", 14 * rows * C + 8 * V * C, 3)]


# ---------------------------------------------------------------- weights and their update


def _update(s: Sizes) -> list[Operation]:
    """Weight and gradient casts per micro-batch, accumulation, clip and AdamW."""
    P, head = flops.matmul_params(s.shape), s.shape.vocab_size * s.shape.n_embd
    if s.kernels == "triton":
        return [*_casts(s, P, head), _accumulation(s, head), _optimizer(s, P)]
    matrices = 4 * s.shape.n_layer + 1
    tied = 4 * head if s.compiled else 0  # Inductor adds the embedding's gradient in the same pass
    return [
        memory("weights cast", "pointwise", 6 * P, matrices),
        memory("weight gradients cast", "pointwise", 6 * P + tied, matrices, fresh=2 * P),
        _accumulation(s, head),
        _optimizer(s, P),
    ]


def _casts(s: Sizes, P: int, head: int) -> list[Operation]:
    """Of triton: the head's weight is cast in every micro-batch, the others' when nobody has written a copy."""
    blocks, matrices = P - head, 4 * s.shape.n_layer
    found = [memory("head weight cast", "pointwise", 6 * head)]
    if s.own_fp8:
        pass  # theirs are "fp8 weights"
    elif not s.fused("working_copy"):
        found.append(memory("weights cast", "pointwise", 6 * blocks, matrices))
    elif not s.fused("optimizer"):  # torch's writes none: they are made anew once a step
        found.append(memory("weights cast", "pointwise", 6 * blocks, matrices, per="step"))
    rounded = (0 if s.fused("weight_gradients") else blocks) + (0 if s.fused("loss") else head)
    tensors = (0 if s.fused("weight_gradients") else matrices) + (0 if s.fused("loss") else 1)
    if rounded:
        found.append(memory("weight gradients cast", "pointwise", 6 * rounded, tensors, fresh=2 * rounded))
    return found


def _accumulation(s: Sizes, head: int) -> Operation:
    """What autograd adds to the gradients of earlier micro-batches: all, or what no kernel has added in place."""
    name, group = "gradients added", "gradient accumulation"
    if not (s.fused("in_place") and s.fused("weight_gradients")):
        return memory(name, group, 12 * flops.n_params(s.shape), s.tensors, per="accumulation")
    L, C, bias = s.shape.n_layer, s.shape.n_embd, int(s.shape.bias)
    norms = 2 * L + 1
    elements = head + norms * C * (1 + bias) + 9 * L * C * bias
    tensors = 1 + norms * (1 + bias) + 4 * L * bias
    if not s.fused("embedding"):
        elements, tensors = elements + s.shape.block_size * C, tensors + 1
    return memory(name, group, 12 * elements, tensors, per="accumulation")


def _optimizer(s: Sizes, P: int) -> Operation:
    N = flops.n_params(s.shape)
    update = flops.adamw(N).bytes
    if s.fused("optimizer"):
        copies = 2 * P if s.fusions.working_copy and not s.own_fp8 else 0
        return memory("clip and AdamW", "optimizer", update + copies, 3, per="step", own=True)
    # torch: one pass for the norm (4), one that scales (8), then the fused update.
    unscale = 8 * N if s.precision.startswith("fp16") else 0
    return memory("clip and AdamW", "optimizer", update + 8 * N + unscale, 12, per="step")
