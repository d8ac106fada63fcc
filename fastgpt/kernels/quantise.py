"""Rounding to fp8 inside a kernel of another operation: whole rows, or groups of columns of a row, each with its own scale.

This is the one hook by which kernels/fp8 reaches into other kernels: the launchers of fused_layernorm.py and fused_attn.py take
``quantised``, where a result is to be written in fp8 beside its own dtype. The kernels then call ``quantise_rows`` or
``quantise_groups`` on what they hold in registers; where it is None, nothing of this is compiled.

For a row x, with F the largest number of the format (448 in e4m3, 57,344 in e5m2; Micikevicius et al. 2022)::

    scale = max |x| / F        q = round(x / scale)        x is about scale * q

Scales are worked out where the row is made and never leave the device: no history, no wait for the host. The norm written
with them, scale * ||q||, bounds the next matmul's result, which can so be scaled before it is known (fp8/kernels.py).

A program of attention has the columns of one head only. What it makes gets a scale for every ``group_size`` columns of a row
in the same way, which the matmul applies where it adds up its sums over these columns. DeepSeek-AI 2024 (arXiv 2412.19437,
section 3.3) scale 1 x 128 groups so.

inf and NaN are preserved. A row that holds one becomes NaN there, and inf makes its scale inf, so that every sum over the row
is inf or NaN: nothing here turns one into a finite number, although conversions to fp8 saturate on the chip.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def group_size(D):
    """Columns of a head of D that share a scale: as many as a matmul sums before it adds up in fp32, or, where the head has no
    whole number of these, as many as one fp8 instruction of the tensor cores sums. 0 where it has no whole number of these."""
    return 64 if D % 64 == 0 else 32 if D % 32 == 0 else 0


@triton.jit
def row_scale(amax, Q):
    """Scales (ROWS,) that bring amax, fp32, to the largest number of what Q points to. For 0 the scale is not 0, so that its
    reciprocal is finite; for NaN it is NaN."""
    largest: tl.constexpr = 448.0 if Q.dtype.element_ty == tl.float8e4nv else 57344.0
    # Smallest normal number: its reciprocal is finite, so a row of zeros gives zeros.
    return tl.maximum(tl.div_rn(amax, largest), 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scaled_down(x, scale):
    """x (ROWS, BLOCK) over scale (ROWS,)."""
    return x * tl.div_rn(1.0, scale)[:, None]


@triton.jit
def nearest(x, Q):
    """fp32 x in the dtype that Q points to, rounded to nearest even."""
    if not tl.target_info.cuda_capability_geq(9, 0):
        # For sm_89 triton's own cast goes through fp16, cut off toward zero, which makes a tie of what lies just above one. So
        # where one of the 13 bits that fp16 lacks is set, set the last bit that it has: no longer a tie.
        bits = x.to(tl.uint32, bitcast=True)
        bits |= ((bits & 0x1FFF) != 0).to(tl.uint32) << 13
        x = bits.to(tl.float32, bitcast=True)
    return x.to(Q.dtype.element_ty)


@triton.jit
def norm_bound(sum_squares, scale, Q):
    """An upper bound of ||row|| once q is rounded: rounding adds at most half a unit in the last place."""
    slack: tl.constexpr = 1.0625 if Q.dtype.element_ty == tl.float8e4nv else 1.125
    return tl.sqrt(sum_squares) * scale * slack


@triton.jit
def quantise_rows(x, rows, row_mask, at, mask, Q, SCALE, NORM):
    """Write whole rows x (ROWS, BLOCK), fp32 and 0 past their ends: Q at ``at``, SCALE and NORM at ``rows``."""
    scale = row_scale(tl.max(tl.abs(x), axis=1), Q)
    x = scaled_down(x, scale)
    tl.store(Q + at, nearest(x, Q), mask=mask)
    tl.store(SCALE + rows, scale, mask=row_mask)
    tl.store(NORM + rows, norm_bound(tl.sum(x * x, axis=1), scale, Q), mask=row_mask)


@triton.jit
def quantise_groups(x, q, mask, scales, row_mask, stride, D: tl.constexpr, COLS: tl.constexpr):
    """Write whole groups x (ROWS, COLS), fp32, of which D columns exist: x in fp8 at the pointers ``q``, and the scales of the
    i-th group at the pointers ``scales`` (ROWS,) + i ``stride``."""
    size: tl.constexpr = group_size(D)
    group = tl.arange(0, COLS)[None, :] // size
    for i in tl.static_range(D // size):
        scale = row_scale(tl.max(tl.where(group == i, tl.abs(x), 0.0), axis=1), q)
        x = tl.where(group == i, scaled_down(x, scale), x)
        tl.store(scales + i * stride, scale, mask=row_mask)
    tl.store(q, nearest(x, q), mask=mask)
