"""Multi-tensor AdamW: gradient norm, clip and update of every parameter in three launches, with no host sync.

For every parameter p with gradient g, moments m and v, and step count t (Loshchilov & Hutter 2019, as torch.optim.AdamW):

    g  = g * clip / grad_scale          clip = min(1, max_grad_norm / (norm + 1e-6)), norm over all gradients together
    p  = p * (1 - lr * weight_decay)
    m  = m + (g - m) * (1 - beta1)      v = v * beta2 + g * g * (1 - beta2)
    p  = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

1. ``_sum_squares_kernel``: one program per chunk of a gradient writes that chunk's sum of squares.
2. ``_prepare_kernel``: one program reduces the sums in a fixed order to norm and clip, decides whether the step happens (norm
   finite, found_inf zero), advances the step counts, and works out each tensor's coefficients in fp64.
3. ``_adamw_kernel``: one program per chunk updates p, m, v and the working copy, or returns at once if the step is skipped.

The kernels find the tensors through a table of addresses in device memory and a list of (tensor, chunk) pairs, so any number of
tensors of any size, from any parameter group, takes one launch of 1 and of 3. Dtypes are compiled in: launches 1 and 3 are
repeated per (parameter dtype, gradient dtype, 16-byte aligned or not), which for a GPT is once. Table and chunk list are built
once and kept while the tensors stay where they are; only gradients may move (``zero_grad`` frees them): their row of the
table is then sent again from pinned memory, without waiting.

Dtypes: parameters and gradients fp32, bf16 or fp16; moments, step counts and arithmetic fp32. A bf16 parameter is rounded
stochastically (Gupta et al. 2015), or updates below 2^-9 of a weight would be lost; the random bits are Philox of (seed, step, tensor,
element), so a resumed run repeats them. fp16 is rounded to nearest.

Bytes per fp32 parameter: p, m, v read and written, g read = 28, + 2 where a bf16 or fp16 working copy is written, + 4 for the norm.
Steps that are skipped cost the 4 only.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import List, Optional  # noqa: UP035  (the schema is inferred from the annotations)

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import runtime

# Columns of ``hyper``, the fp64 table with one row per parameter group.
LR, BETA1, BETA2, EPS, WEIGHT_DECAY, MAX_GRAD_NORM = range(6)
HYPERPARAMETERS = 6

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# Rows of a plan's int64 table: addresses, then what else a program needs to know of its tensor.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
STEP = tl.constexpr(4)
COPY = tl.constexpr(5)
COPY_KIND = tl.constexpr(6)  # 0: no working copy, 1: bf16, 2: fp16
NUMEL = tl.constexpr(7)
GROUP = tl.constexpr(8)
ROWS = 9
COPY_KINDS = {torch.bfloat16: 1, torch.float16: 2}

COEFFICIENTS = tl.constexpr(8)  # fp32 per tensor, written by _prepare_kernel; 7 used


def config(param_dtype: torch.dtype) -> dict[str, int]:
    """Launch configuration of the two chunked kernels: BLOCK elements at a time, CHUNK (a multiple) per program.

    4 elements a thread: one 128-bit access per fp32 tensor. With 8, triton would pass every store through shared memory to keep
    it coalesced. The interpreter pays per block operation."""
    if runtime.INTERPRET:
        return {"BLOCK": 4096, "CHUNK": 32768, "num_warps": 8}
    return {"BLOCK": 1024, "CHUNK": 8192, "num_warps": 8}


@triton.jit
def _pointer(table, row: tl.constexpr, n, tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table + row * n + tensor).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _squares(grad, offsets, left, inverse_scale, MASKED: tl.constexpr):
    # A mask of unknown alignment would split every access into single elements: full blocks go without.
    if MASKED:
        g = tl.load(grad + offsets, mask=offsets < left, other=0.0).to(tl.float32)
    else:
        g = tl.load(grad + offsets).to(tl.float32)
    g *= inverse_scale
    return g * g


@triton.jit
def _inverse_scale(grad_scale):
    if grad_scale is None:
        return 1.0
    else:
        return 1.0 / tl.load(grad_scale)


@triton.jit
def _sum_squares_kernel(
    table,
    chunks,
    partials,
    n,
    grad_scale,
    GRAD_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(chunks + 2 * program)
    first = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    left = tl.load(table + NUMEL * n + tensor) - first
    grad = _pointer(table, GRAD, n, tensor, GRAD_DTYPE, ALIGNED) + first
    inverse_scale = _inverse_scale(grad_scale)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if left >= CHUNK:
        for start in range(0, CHUNK, BLOCK):
            total += _squares(grad, start + offsets, left, inverse_scale, MASKED=False)
    else:
        for start in range(0, left.to(tl.int32), BLOCK):
            total += _squares(grad, start + offsets, left, inverse_scale, MASKED=True)
    tl.store(partials + program, tl.sum(total))


@triton.jit
def _prepare_kernel(
    table,
    partials,
    hyper,
    coefficients,
    control,
    grad_norm,
    skipped,
    grad_scale,
    found_inf,
    n,
    n_partials,
    HYPERPARAMETERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``control`` (2,) fp32 receives the factor on the gradients (clip / grad_scale) and 1 or 0: whether the step happens."""
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_partials, BLOCK):
        total += tl.load(partials + start + offsets, mask=start + offsets < n_partials, other=0.0)
    norm = tl.sqrt(tl.sum(total))
    clip = tl.minimum(1.0, tl.load(hyper + 5).to(tl.float32) / (norm + 1e-6))
    happens = norm < float("inf")  # False for NaN, too
    if found_inf is not None:
        happens = happens & (tl.load(found_inf) == 0)
    tl.store(grad_norm, norm)
    tl.store(skipped, tl.load(skipped) + (1 - happens.to(tl.int64)))
    tl.store(control, clip * _inverse_scale(grad_scale))
    tl.store(control + 1, happens.to(tl.float32))

    for start in range(0, n, BLOCK):
        tensor = start + offsets
        mask = tensor < n
        step_address = tl.load(table + STEP * n + tensor, mask=mask, other=0)
        step = step_address.to(tl.pointer_type(tl.float32))
        t = tl.load(step, mask=mask, other=0.0) + happens.to(tl.float32)
        tl.store(step, t, mask=mask)

        row = hyper + tl.load(table + GROUP * n + tensor, mask=mask, other=0) * HYPERPARAMETERS
        lr = tl.load(row)
        beta1 = tl.load(row + 1)
        beta2 = tl.load(row + 2)
        eps = tl.load(row + 3)
        weight_decay = tl.load(row + 4)
        # fp64: 1 - beta2 of 0.001 would keep four digits in fp32. t of 0 (a first step that is skipped) is never used.
        t = tl.maximum(t, 1.0).to(tl.float64)
        correction1 = 1.0 - tl.exp(t * tl.log(beta1))
        correction2 = 1.0 - tl.exp(t * tl.log(beta2))
        out = coefficients + tensor * COEFFICIENTS
        tl.store(out, (1.0 - lr * weight_decay).to(tl.float32), mask=mask)
        tl.store(out + 1, (1.0 - beta1).to(tl.float32), mask=mask)
        tl.store(out + 2, beta2.to(tl.float32), mask=mask)
        tl.store(out + 3, (1.0 - beta2).to(tl.float32), mask=mask)
        tl.store(out + 4, (lr / correction1).to(tl.float32), mask=mask)
        tl.store(out + 5, (1.0 / tl.sqrt(correction2)).to(tl.float32), mask=mask)
        tl.store(out + 6, eps.to(tl.float32), mask=mask)


@triton.jit
def _stochastic_bf16(x, seed, tensor, step, first, BLOCK: tl.constexpr):
    """Round fp32 up or down to bf16, with the odds that make the mean x. ``first`` is the index of x's first element in its
    tensor, a multiple of 4: one Philox call serves four elements."""
    quad = first // 4 + tl.arange(0, BLOCK // 4)
    low = quad.to(tl.uint32)
    zero = low * 0
    r0, r1, r2, r3 = tl.philox(seed, low, (quad >> 32).to(tl.uint32), zero + tensor.to(tl.uint32), zero + step)
    bits = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(BLOCK)
    rounded = (x.to(tl.uint32, bitcast=True) + (bits & 0xFFFF)) & 0xFFFF0000
    # Adding to the bits of an infinity would make a NaN.
    return tl.where(tl.abs(x) < float("inf"), rounded.to(tl.float32, bitcast=True), x).to(tl.bfloat16)


@triton.jit
def _update(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    copy_address,
    copy_kind,
    start,
    first,
    left,
    scale,
    decay,
    weight1,
    beta2,
    weight2,
    step_size,
    inverse_correction2,
    eps,
    seed,
    tensor,
    step,
    MASKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = start + tl.arange(0, BLOCK)
    if MASKED:
        mask = offsets < left
    else:
        mask = None
    g = tl.load(grad + offsets, mask=mask).to(tl.float32) * scale
    m = tl.load(exp_avg + offsets, mask=mask)
    v = tl.load(exp_avg_sq + offsets, mask=mask)
    p = tl.load(param + offsets, mask=mask).to(tl.float32)
    m += (g - m) * weight1
    v = v * beta2 + g * g * weight2
    p = p * decay - step_size * m / (tl.sqrt(v) * inverse_correction2 + eps)
    tl.store(exp_avg + offsets, m, mask=mask)
    tl.store(exp_avg_sq + offsets, v, mask=mask)
    if param.dtype.element_ty == tl.bfloat16:
        tl.store(param + offsets, _stochastic_bf16(p, seed, tensor, step, first + start, BLOCK), mask=mask)
    else:
        tl.store(param + offsets, p.to(param.dtype.element_ty), mask=mask)
    if param.dtype.element_ty == tl.float32:
        if copy_kind == 1:
            copy = copy_address.to(tl.pointer_type(tl.bfloat16))
            if ALIGNED:
                copy = tl.multiple_of(copy, 16)
            tl.store(copy + first + offsets, p.to(tl.bfloat16), mask=mask)
        if copy_kind == 2:
            copy = copy_address.to(tl.pointer_type(tl.float16))
            if ALIGNED:
                copy = tl.multiple_of(copy, 16)
            tl.store(copy + first + offsets, p.to(tl.float16), mask=mask)


@triton.jit
def _adamw_kernel(
    table,
    chunks,
    coefficients,
    control,
    n,
    seed,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(control + 1) != 0:
        program = tl.program_id(0)
        tensor = tl.load(chunks + 2 * program)
        first = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
        left = tl.load(table + NUMEL * n + tensor) - first
        param = _pointer(table, PARAM, n, tensor, PARAM_DTYPE, ALIGNED) + first
        grad = _pointer(table, GRAD, n, tensor, GRAD_DTYPE, ALIGNED) + first
        exp_avg = _pointer(table, EXP_AVG, n, tensor, tl.float32, ALIGNED) + first
        exp_avg_sq = _pointer(table, EXP_AVG_SQ, n, tensor, tl.float32, ALIGNED) + first
        copy_address = tl.load(table + COPY * n + tensor)
        copy_kind = tl.load(table + COPY_KIND * n + tensor)
        step = tl.load(_pointer(table, STEP, n, tensor, tl.float32, False)).to(tl.uint32)
        scale = tl.load(control)
        row = coefficients + tensor * COEFFICIENTS
        decay = tl.load(row)
        weight1 = tl.load(row + 1)
        beta2 = tl.load(row + 2)
        weight2 = tl.load(row + 3)
        step_size = tl.load(row + 4)
        inverse_correction2 = tl.load(row + 5)
        eps = tl.load(row + 6)
        # fmt: off
        if left >= CHUNK:
            for start in range(0, CHUNK, BLOCK):
                _update(
                    param, grad, exp_avg, exp_avg_sq, copy_address, copy_kind, start, first, left, scale, decay, weight1, beta2,
                    weight2, step_size, inverse_correction2, eps, seed, tensor, step, False, ALIGNED, BLOCK,
                )
        else:
            for start in range(0, left.to(tl.int32), BLOCK):
                _update(
                    param, grad, exp_avg, exp_avg_sq, copy_address, copy_kind, start, first, left, scale, decay, weight1, beta2,
                    weight2, step_size, inverse_correction2, eps, seed, tensor, step, True, ALIGNED, BLOCK,
                )
        # fmt: on


class _Plan:
    """Where a set of tensors lies, in device memory: the address table, the chunk list, and the launches' scratch."""

    def __init__(self, params, grads, exp_avgs, exp_avg_sqs, steps, copies, copy_of, group_of):
        n, device = len(params), params[0].device
        settings = config(params[0].dtype)
        self.block, self.chunk, self.num_warps = settings["BLOCK"], settings["CHUNK"], settings["num_warps"]
        table = torch.zeros(ROWS, n, dtype=torch.int64)
        for row, tensors in (
            (PARAM, params),
            (GRAD, grads),
            (EXP_AVG, exp_avgs),
            (EXP_AVG_SQ, exp_avg_sqs),
            (STEP, steps),
        ):
            table[row.value] = torch.tensor([t.data_ptr() for t in tensors])
        for copy, index in zip(copies, copy_of):
            table[COPY.value, index] = copy.data_ptr()
            table[COPY_KIND.value, index] = COPY_KINDS[copy.dtype]
        numels = torch.tensor([p.numel() for p in params])
        table[NUMEL.value] = numels
        table[GROUP.value] = torch.tensor(group_of)

        addresses = table[[PARAM.value, GRAD.value, EXP_AVG.value, EXP_AVG_SQ.value, COPY.value]]
        aligned = (addresses % 16 == 0).all(0).tolist()
        buckets: dict[tuple, list[int]] = {}
        for i in range(n):
            buckets.setdefault((params[i].dtype, grads[i].dtype, aligned[i]), []).append(i)
        self.launches: list[tuple[torch.dtype, torch.dtype, bool, int, int]] = []
        pairs, total = [], 0
        for (param_dtype, grad_dtype, is_aligned), members in buckets.items():
            tensors = torch.tensor(members)
            counts = -(-numels[tensors] // self.chunk)
            owner = tensors.repeat_interleave(counts)
            index = torch.arange(owner.numel()) - (counts.cumsum(0) - counts).repeat_interleave(counts)
            pairs.append(torch.stack((owner, index), dim=1))
            if owner.numel():
                self.launches.append((param_dtype, grad_dtype, is_aligned, total, owner.numel()))
            total += owner.numel()

        self.n, self.n_chunks = n, total
        self.table = _send(table, device)
        self.chunks = _send(torch.cat(pairs).to(torch.int32), device)
        self.partials = torch.empty(total, dtype=torch.float32, device=device)
        self.coefficients = torch.empty(n, COEFFICIENTS.value, dtype=torch.float32, device=device)
        self.control = torch.empty(2, dtype=torch.float32, device=device)
        self.grads = table[GRAD.value].tolist()
        # A graph replays the transfer that it captured, out of the same pinned memory. So captured rows get a buffer of
        # their own, allocated beforehand, and the plan then lives as long as the process.
        self.captured: list[Tensor] = []
        self.spare = torch.empty(n, dtype=torch.int64, pin_memory=True) if device.type == "cuda" else None

    def send_grads(self, grads: list[Tensor]) -> None:
        addresses = [g.data_ptr() for g in grads]
        device = self.table.device
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing:
            # Always: what the table holds at replay is not what it holds now.
            row, self.spare = self.spare, None
            if row is None:
                row = torch.empty(self.n, dtype=torch.int64, pin_memory=True)
            row.copy_(torch.tensor(addresses))
            self.captured.append(row)
            self.table[GRAD.value].copy_(row, non_blocking=True)
            self.grads = []
        elif addresses != self.grads:
            self.table[GRAD.value].copy_(_pin(torch.tensor(addresses), device), non_blocking=True)
            self.grads = addresses
        if self.captured and not capturing:
            # A replay may have put the graph's gradients into the table since.
            self.grads = []


def _pin(host: Tensor, device: torch.device) -> Tensor:
    return host.pin_memory() if device.type == "cuda" else host


def _send(host: Tensor, device: torch.device) -> Tensor:
    return _pin(host, device).to(device, non_blocking=True)


_plans: OrderedDict[tuple, _Plan] = OrderedDict()
_MAX_PLANS = 8


def _plan(params, grads, exp_avgs, exp_avg_sqs, steps, copies, copy_of, group_of) -> _Plan:
    """The plan for these tensors, remembered by their addresses (so a plan can never be wrong, only forgotten)."""
    key = (
        params[0].device,
        tuple(
            (p.data_ptr(), p.numel(), p.dtype, m.data_ptr(), v.data_ptr(), s.data_ptr(), g.dtype, g.data_ptr() % 16 == 0)
            for p, g, m, v, s in zip(params, grads, exp_avgs, exp_avg_sqs, steps)
        ),
        tuple((i, copy.data_ptr(), copy.dtype) for i, copy in zip(copy_of, copies)),
        tuple(group_of),
    )
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _Plan(params, grads, exp_avgs, exp_avg_sqs, steps, copies, copy_of, group_of)
        for old in [k for k, p in _plans.items() if not p.captured][:-_MAX_PLANS]:
            del _plans[old]
    _plans.move_to_end(key)
    plan.send_grads(grads)
    return plan


def _launch(
    params, grads, exp_avgs, exp_avg_sqs, steps, copies, copy_of, group_of, hyper, grad_scale, found_inf, grad_norm, skipped, seed
):
    plan = _plan(params, grads, exp_avgs, exp_avg_sqs, steps, copies, copy_of, group_of)
    for _, grad_dtype, aligned, first, count in plan.launches:
        _sum_squares_kernel[(count,)](
            plan.table,
            plan.chunks[first:],
            plan.partials[first:],
            plan.n,
            grad_scale,
            GRAD_DTYPE=DTYPES[grad_dtype],
            ALIGNED=aligned,
            CHUNK=plan.chunk,
            BLOCK=plan.block,
            num_warps=plan.num_warps,
        )
    _prepare_kernel[(1,)](
        plan.table,
        plan.partials,
        hyper,
        plan.coefficients,
        plan.control,
        grad_norm,
        skipped,
        grad_scale,
        found_inf,
        plan.n,
        plan.n_chunks,
        HYPERPARAMETERS=HYPERPARAMETERS,
        BLOCK=1024,
        num_warps=8,
    )
    for param_dtype, grad_dtype, aligned, first, count in plan.launches:
        _adamw_kernel[(count,)](
            plan.table,
            plan.chunks[first:],
            plan.coefficients,
            plan.control,
            plan.n,
            seed,
            PARAM_DTYPE=DTYPES[param_dtype],
            GRAD_DTYPE=DTYPES[grad_dtype],
            ALIGNED=aligned,
            CHUNK=plan.chunk,
            BLOCK=plan.block,
            num_warps=plan.num_warps,
        )


def _reference(
    params, grads, exp_avgs, exp_avg_sqs, steps, copies, copy_of, group_of, hyper, grad_scale, found_inf, grad_norm, skipped, seed
):
    """The same step in plain PyTorch, for CPU tensors outside the interpreter and for fp64. ``torch.where`` in place of a branch:
    no value is brought to the host. Rounds bf16 parameters stochastically, with other random bits than the kernel."""
    inverse_scale = 1.0 if grad_scale is None else 1.0 / grad_scale
    wide = [g.to(m.dtype) * inverse_scale for g, m in zip(grads, exp_avgs)]
    norm = torch.nn.utils.get_total_norm(wide)
    happens = torch.isfinite(norm)
    if found_inf is not None:
        happens = happens & (found_inf == 0).squeeze()
    clip = (hyper[0, MAX_GRAD_NORM] / (norm + 1e-6)).clamp(max=1.0)
    grad_norm.copy_(norm)
    skipped += ~happens
    copy_at = dict(zip(copy_of, copies))
    for i, (p, g, m, v, step, group) in enumerate(zip(params, wide, exp_avgs, exp_avg_sqs, steps, group_of)):
        lr, beta1, beta2, eps, weight_decay, _ = hyper[group]
        step += happens
        t = step.double()
        g = g * clip.to(g.dtype)
        new_m = torch.lerp(m, g, (1 - beta1).to(m.dtype))
        new_v = v * beta2.to(v.dtype) + g * g * (1 - beta2).to(v.dtype)
        denominator = new_v.sqrt() / (1 - beta2**t).sqrt().to(v.dtype) + eps.to(v.dtype)
        update = (lr / (1 - beta1**t)).to(m.dtype) * new_m / denominator
        new_p = p.to(m.dtype) * (1 - lr * weight_decay).to(m.dtype) - update
        if p.dtype == torch.bfloat16:
            noise = torch.randint(0, 1 << 16, p.shape, dtype=torch.int32, device=p.device)
            rounded = ((new_p.view(torch.int32) + noise) & -0x10000).view(torch.float32)
            new_p = torch.where(torch.isfinite(new_p), rounded, new_p)
        m.copy_(torch.where(happens, new_m, m))
        v.copy_(torch.where(happens, new_v, v))
        p.copy_(torch.where(happens, new_p.to(p.dtype), p))
        if i in copy_at:
            copy_at[i].copy_(p)


@torch.library.custom_op(
    "fastgpt::adamw_", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "steps", "copies", "grad_norm", "skipped")
)
def adamw_(
    params: List[Tensor],  # noqa: UP006
    grads: List[Tensor],  # noqa: UP006
    exp_avgs: List[Tensor],  # noqa: UP006
    exp_avg_sqs: List[Tensor],  # noqa: UP006
    steps: List[Tensor],  # noqa: UP006
    copies: List[Tensor],  # noqa: UP006
    copy_of: List[int],  # noqa: UP006
    group_of: List[int],  # noqa: UP006
    hyper: Tensor,
    grad_scale: Optional[Tensor],  # noqa: UP045
    found_inf: Optional[Tensor],  # noqa: UP045
    grad_norm: Tensor,
    skipped: Tensor,
    seed: int,
) -> None:
    """One AdamW step, in place, on all tensors together; they lie on one device and nothing is brought to the host.

    params, grads, exp_avgs, exp_avg_sqs: the i-th of each has the same numel and memory layout (dense, equal strides); any
    shape, 0-dim and empty included. Moments are fp32 (fp64 for fp64 parameters). steps: 0-dim fp32, steps taken so far.
    copies: bf16 or fp16 working copies, of the fp32 parameters that ``copy_of`` numbers. group_of: row of ``hyper`` per parameter.
    hyper: (groups, 6) fp64, columns LR .. MAX_GRAD_NORM; the first row's MAX_GRAD_NORM counts (inf: no clipping).
    grad_scale: fp32, divides the gradients. found_inf: fp32, non-zero skips the step. A gradient norm that is not finite, which
    includes one past fp32's range, skips it too: then ``skipped`` (int64) grows by one and nothing else changes.
    grad_norm (fp32) receives the norm of the unscaled gradients before clipping. seed: of the stochastic rounding.
    """
    arguments = (
        params, grads, exp_avgs, exp_avg_sqs, steps, copies, copy_of, group_of, hyper, grad_scale, found_inf, grad_norm, skipped,
        seed,
    )  # fmt: skip
    with torch.no_grad():
        if runtime.runs_in_triton(params[0]) and all(p.dtype in DTYPES and g.dtype in DTYPES for p, g in zip(params, grads)):
            with runtime.device_guard(params[0]):
                _launch(*arguments)
        else:
            _reference(*arguments)


@adamw_.register_fake
def _(*arguments) -> None:
    return None
