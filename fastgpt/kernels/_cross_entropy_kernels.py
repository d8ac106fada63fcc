"""The kernel of fused_cross_entropy.py: statistics of rows of logits, and their gradient in place."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softcap_of(z, cap):
    """cap * tanh(z / cap); the exponential cannot overflow."""
    e = tl.exp(-2 * tl.abs(z / cap))
    capped = cap * (1 - e) / (1 + e)
    return tl.where(z < 0, -capped, capped)


@triton.jit
def softcap_slope(z, cap):
    """1 - tanh(z / cap)^2, without the cancellation where tanh is near 1."""
    e = tl.exp(-2 * tl.abs(z / cap))
    return 4 * e / ((1 + e) * (1 + e))


@triton.jit(do_not_specialize=["rows"])
def rows_kernel(
    logits_ptr,  # (rows, stride) in x's dtype, columns [V, stride) are 0; overwritten by dz if GRAD
    target_ptr,  # (rows,) int32 or int64
    loss_ptr,  # (rows,) fp32, written if LOSS
    stats_ptr,  # (rows, 2) fp32: the largest logit, and lse minus it; written if LOSS, else read
    row_scale_ptr,  # (rows,) fp32, read if PER_ROW
    rows,
    V,
    stride,
    ignore_index,
    scale,
    smoothing,
    z_loss,
    softcap,
    LOSS: tl.constexpr,
    GRAD: tl.constexpr,
    PER_ROW: tl.constexpr,
    SMOOTH: tl.constexpr,
    CAP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows: loss and statistics in a first pass over the vocabulary; dz, in place, in a second, which finds the rows
    in L2. Logits of ignored rows are not read. A target outside [0, V) that is not ignored makes its row's loss and dz
    NaN.

    Accesses are masked at ``stride``, a multiple of 64, and cut at V in registers: a mask at an odd V would break every
    one of them into single elements."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    target = tl.load(target_ptr + row, mask=exists, other=0).to(tl.int64)
    live = exists & (target != ignore_index)
    in_range = (target >= 0) & (target < V)
    row_ptr = logits_ptr + row * stride
    lanes = tl.arange(0, BLOCK)

    if LOSS:
        z_target = tl.load(row_ptr + target, mask=live & in_range, other=float("nan")).to(tl.float32)
        if CAP:
            z_target = softcap_of(z_target, softcap)
        z_max = tl.full((ROWS,), float("-inf"), tl.float32)
        exp_sum = tl.full((ROWS,), 0.0, tl.float32)
        z_sum = tl.full((ROWS,), 0.0, tl.float32)
        for start in range(0, V, BLOCK):
            columns = start + lanes
            mask = live[:, None] & (columns < stride)[None, :]
            z = tl.load(row_ptr[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            if CAP:
                z = softcap_of(z, softcap)
            if SMOOTH:
                z_sum += tl.sum(z, 1)
            z = tl.where((columns < V)[None, :], z, float("-inf"))
            new_max = tl.maximum(z_max, tl.max(z, 1))
            # While every logit so far is -inf, subtract 0 instead: -inf - -inf is NaN.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            exp_sum = exp_sum * tl.exp(z_max - shift) + tl.sum(tl.exp(z - shift[:, None]), 1)
            z_max = new_max
        log_sum = tl.log(exp_sum)
        lse = z_max + log_sum
        # z_max - z_target first: lse - z_target would cancel where the target is certain.
        loss = log_sum + (z_max - z_target) + z_loss * lse * lse
        if SMOOTH:
            loss += smoothing * (z_target - z_sum / V)
        tl.store(loss_ptr + row, tl.where(live, loss, 0.0), mask=exists)
        tl.store(stats_ptr + 2 * row, z_max, mask=exists)
        tl.store(stats_ptr + 2 * row + 1, log_sum, mask=exists)
    else:
        z_max = tl.load(stats_ptr + 2 * row, mask=exists, other=0.0)
        log_sum = tl.load(stats_ptr + 2 * row + 1, mask=exists, other=0.0)

    if GRAD:
        # Every thread has read its target's logit before any thread overwrites it.
        tl.debug_barrier()
        p_factor = 1 + 2 * z_loss * (z_max + log_sum)
        if PER_ROW:
            scale *= tl.load(row_scale_ptr + row, mask=exists, other=0.0)
        row_scale = tl.where(in_range, scale, float("nan"))
        for start in range(0, V, BLOCK):
            columns = start + lanes
            inside = (columns < stride)[None, :]
            z = tl.load(row_ptr[:, None] + columns[None, :], mask=live[:, None] & inside, other=0.0).to(tl.float32)
            factor = row_scale[:, None]
            if CAP:
                factor *= softcap_slope(z, softcap)
                z = softcap_of(z, softcap)
            p = tl.exp(z - z_max[:, None] - log_sum[:, None])
            # In fp32 until the store: p - 1 of a certain target keeps its digits.
            dz = p * p_factor[:, None] - tl.where(columns[None, :] == target[:, None], 1 - smoothing, 0.0)
            if SMOOTH:
                dz -= smoothing / V
            dz = tl.where(live[:, None] & (columns < V)[None, :], dz * factor, 0.0).to(logits_ptr.dtype.element_ty)
            tl.store(row_ptr[:, None] + columns[None, :], dz, mask=exists[:, None] & inside)
