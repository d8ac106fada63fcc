"""Multi-tensor AdamW: gradient norm, clip and update of every parameter in three launches, with no host sync.

For every parameter p with gradient g, moments m and v, and step count t (Loshchilov & Hutter 2019, as
torch.optim.AdamW):

    g  = g * clip / grad_scale          clip = min(1, max_grad_norm / (norm + 1e-6)), norm over all gradients together
    p  = p * (1 - lr * weight_decay)
    m  = m + (g - m) * (1 - beta1)      v = v * beta2 + g * g * (1 - beta2)
    p  = p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

1. ``_sum_squares_kernel``: one program per chunk of a gradient writes that chunk's sum of squares.
2. ``_prepare_kernel``: one program adds the sums in a fixed order to norm and clip, decides whether the step happens
   (norm finite, found_inf zero), advances the step counts, and works out each tensor's coefficients in fp64.
3. ``_adamw_kernel``: one program per chunk updates p, m, v and the working copy; it returns at once if the step does
   not happen.

A kernel argument is one pointer, and a step touches hundreds of tensors. The kernels therefore read a table of addresses in
device memory (a row per kind, a column per tensor) and a list of (tensor, chunk) pairs, one pair per program: any number of
tensors of any size, from any parameter groups, takes one launch each of 1 and 3. ``Plan`` builds both once and keeps them while
the tensors stay where they are. Only gradients are expected to move, since ``zero_grad`` frees them: their row is then sent
again, from pinned memory and without waiting. Dtypes are compiled in: 1 and 3 are launched once per (parameter dtype, gradient
dtype, 16-byte aligned or not), which for a GPT is once.

Dtypes: parameters and gradients fp32, bf16 or fp16; moments, step counts and arithmetic fp32. bf16 parameters are
rounded stochastically (Gupta et al. 2015), or updates below 2^-9 of a weight would be lost; the random bits are
Philox of (seed, step, tensor, element), so a resumed run repeats them. fp16 parameters are rounded to nearest.

Bytes moved per fp32 parameter: p, m, v read and written and g read = 28, + 2 where a bf16 or fp16 working copy is
written, + 4 for the norm's own reading of g. A skipped step costs those 4 only.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import product
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels import arguments, runtime, tuning
from fastgpt.kernels.philox import stochastic_bf16

# Rows of the int64 table: addresses, then what else a program needs to know of its tensor.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
EXP_AVG = tl.constexpr(2)
EXP_AVG_SQ = tl.constexpr(3)
STEP = tl.constexpr(4)
COPY = tl.constexpr(5)  # 0 without a working copy
COPY_KIND = tl.constexpr(6)  # 1: bf16, 2: fp16
NUMEL = tl.constexpr(7)
GROUP = tl.constexpr(8)  # row of the hyperparameter table
ROWS = 9
COPY_KINDS = {torch.bfloat16: 1, torch.float16: 2}

COEFFICIENTS = tl.constexpr(8)  # fp32 numbers per tensor in ``Plan.coefficients``; 7 are used

# Columns of the fp64 hyperparameter table, which has one row per parameter group.
LR = tl.constexpr(0)
BETA1 = tl.constexpr(1)
BETA2 = tl.constexpr(2)
EPS = tl.constexpr(3)
WEIGHT_DECAY = tl.constexpr(4)
MAX_GRAD_NORM = tl.constexpr(5)  # the first group's counts; inf: no clipping
HYPERPARAMETERS = tl.constexpr(6)

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

ADAMW_BUCKET = "any"
# BLOCK elements at a time, CHUNK (a multiple) per program. 4 elements a thread are one 128-bit access per fp32 tensor; with
# more, triton passes every store through shared memory to keep it coalesced.
_CONFIGS = [
    {"BLOCK": 128 * warps, "CHUNK": chunk, "num_warps": warps}
    for warps, chunk in product((4, 8, 16), (4096, 8192, 16384, 32768))
]


def config() -> dict[str, int]:
    """The default of both chunked kernels, safe on any card. The interpreter pays per block operation, so its are larger."""
    if runtime.INTERPRET:
        return {"BLOCK": 4096, "CHUNK": 32768, "num_warps": 8}
    return {"BLOCK": 1024, "CHUNK": 8192, "num_warps": 8}


@tuning.cached
def _choice(dtype: torch.dtype, device: torch.device) -> tuning.Choice:
    return tuning.choose("adamw.update", dtype, ADAMW_BUCKET, device, config())


@triton.jit
def _chunk_of(program, table, chunks, n, CHUNK: tl.constexpr):
    """Which tensor's chunk a program works on, the chunk's first element, and how many elements are left from there on."""
    tensor = tl.load(chunks + 2 * program)
    first = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    return tensor, first, tl.load(table + NUMEL * n + tensor) - first


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:  # triton knows nothing of an address out of memory, and would access single elements
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["n"])
def _sum_squares_kernel(
    table, chunks, partials, n, grad_scale,
    GRAD_DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor, first, left = _chunk_of(program, table, chunks, n, CHUNK)
    grad = _pointer(tl.load(table + GRAD * n + tensor), GRAD_DTYPE, ALIGNED)
    grad += first + tl.arange(0, BLOCK)
    inverse_scale = 1.0
    if grad_scale is not None:
        inverse_scale = tl.div_rn(1.0, tl.load(grad_scale))  # / may be off, also for a power of two
    total = tl.full([BLOCK], 0.0, tl.float32)
    # A mask whose alignment is unknown splits every access into single elements: full chunks go without.
    if left >= CHUNK:
        for start in range(0, CHUNK, BLOCK):
            g = tl.load(grad + start).to(tl.float32) * inverse_scale
            total += g * g
    else:
        for start in range(0, left.to(tl.int32), BLOCK):
            mask = start + tl.arange(0, BLOCK) < left
            g = tl.load(grad + start, mask=mask, other=0.0).to(tl.float32) * inverse_scale
            total += g * g
    tl.store(partials + program, tl.sum(total))


@triton.jit(do_not_specialize=["n", "n_partials"])
def _prepare_kernel(
    table, partials, hyper, coefficients, control, grad_norm, skipped, grad_scale, found_inf, n, n_partials,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``control`` (2,) receives the factor on the gradients, clip / grad_scale, and 1 or 0: whether the step happens."""
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_partials, BLOCK):
        total += tl.load(partials + start + offsets, mask=start + offsets < n_partials, other=0.0)
    norm = tl.sqrt(tl.sum(total))
    clip = tl.minimum(1.0, tl.load(hyper + MAX_GRAD_NORM).to(tl.float32) / (norm + 1e-6))
    happens = norm < float("inf")  # False for NaN, too
    if found_inf is not None:
        happens = happens & (tl.load(found_inf) == 0)
    tl.store(grad_norm, norm)
    before = tl.load(skipped)
    tl.debug_barrier()  # every warp has read the count before one writes it
    tl.store(skipped, before + (1 - happens.to(tl.int64)))
    if grad_scale is not None:
        clip = tl.div_rn(clip, tl.load(grad_scale))
    tl.store(control, clip)
    tl.store(control + 1, happens.to(tl.float32))

    for start in range(0, n, BLOCK):
        tensor = start + offsets
        mask = tensor < n
        step = tl.load(table + STEP * n + tensor, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        t = tl.load(step, mask=mask, other=0.0) + happens.to(tl.float32)
        tl.store(step, t, mask=mask)

        row = hyper + tl.load(table + GROUP * n + tensor, mask=mask, other=0) * HYPERPARAMETERS
        lr = tl.load(row + LR)
        beta1 = tl.load(row + BETA1)
        beta2 = tl.load(row + BETA2)
        eps = tl.load(row + EPS)
        weight_decay = tl.load(row + WEIGHT_DECAY)
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
def _update(
    param, grad, exp_avg, exp_avg_sq, copy_address, copy_kind, start, first, left, scale,
    decay, weight1, beta2, weight2, step_size, inverse_correction2, eps, seed, tensor, step,
    MASKED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update BLOCK elements, from ``start`` on, of the chunk at element ``first`` of its tensor, ``left`` from its end."""
    offsets = start + tl.arange(0, BLOCK)
    mask = offsets < left if MASKED else None
    g = tl.load(grad + offsets, mask=mask).to(tl.float32) * scale
    m = tl.load(exp_avg + offsets, mask=mask)
    v = tl.load(exp_avg_sq + offsets, mask=mask)
    p = tl.load(param + offsets, mask=mask).to(tl.float32)
    m += (g - m) * weight1
    v = v * beta2 + g * g * weight2
    p = p * decay - step_size * m / (tl.sqrt(v) * inverse_correction2 + eps)
    tl.store(exp_avg + offsets, m, mask=mask)
    tl.store(exp_avg_sq + offsets, v, mask=mask)
    dtype: tl.constexpr = param.dtype.element_ty
    if dtype == tl.bfloat16:
        tl.store(param + offsets, stochastic_bf16(p, seed, tensor, step, first + start, BLOCK), mask=mask)
    else:
        tl.store(param + offsets, p.to(dtype), mask=mask)
    if dtype == tl.float32:  # the kind of copy differs from tensor to tensor of one launch, so it is no constexpr
        if copy_kind == 1:
            copy = _pointer(copy_address, tl.bfloat16, ALIGNED)
            tl.store(copy + first + offsets, p.to(tl.bfloat16), mask=mask)
        if copy_kind == 2:
            copy = _pointer(copy_address, tl.float16, ALIGNED)
            tl.store(copy + first + offsets, p.to(tl.float16), mask=mask)


@tuning.space("adamw.update", _CONFIGS)
@triton.jit(do_not_specialize=["n", "seed"])
def _adamw_kernel(
    table, chunks, coefficients, control, n, seed,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(control + 1) != 0:  # else the step is skipped
        tensor, first, left = _chunk_of(tl.program_id(0), table, chunks, n, CHUNK)
        row = table + tensor
        param = _pointer(tl.load(row + PARAM * n), PARAM_DTYPE, ALIGNED)
        grad = _pointer(tl.load(row + GRAD * n), GRAD_DTYPE, ALIGNED)
        exp_avg = _pointer(tl.load(row + EXP_AVG * n), tl.float32, ALIGNED)
        exp_avg_sq = _pointer(tl.load(row + EXP_AVG_SQ * n), tl.float32, ALIGNED)
        param += first
        grad += first
        exp_avg += first
        exp_avg_sq += first
        copy_address = tl.load(row + COPY * n)
        copy_kind = tl.load(row + COPY_KIND * n)
        step = tl.load(tl.load(row + STEP * n).to(tl.pointer_type(tl.float32))).to(tl.uint32)
        scale = tl.load(control)
        row = coefficients + tensor * COEFFICIENTS
        decay = tl.load(row)
        weight1 = tl.load(row + 1)
        beta2 = tl.load(row + 2)
        weight2 = tl.load(row + 3)
        step_size = tl.load(row + 4)
        inverse_correction2 = tl.load(row + 5)
        eps = tl.load(row + 6)
        if left >= CHUNK:  # without masks, as in _sum_squares_kernel
            for start in range(0, CHUNK, BLOCK):
                _update(
                    param, grad, exp_avg, exp_avg_sq, copy_address, copy_kind, start, first, left, scale,
                    decay, weight1, beta2, weight2, step_size, inverse_correction2, eps, seed, tensor, step,
                    False, ALIGNED, BLOCK,
                )  # fmt: skip
        else:
            for start in range(0, left.to(tl.int32), BLOCK):
                _update(
                    param, grad, exp_avg, exp_avg_sq, copy_address, copy_kind, start, first, left, scale,
                    decay, weight1, beta2, weight2, step_size, inverse_correction2, eps, seed, tensor, step,
                    True, ALIGNED, BLOCK,
                )  # fmt: skip


class Step(NamedTuple):
    """The arguments of ``adamw_``, one AdamW step on all tensors together. They lie on one device."""

    params: list[Tensor]
    """The i-th of these, of ``grads`` and of the moments have one shape (any, 0-dim and empty included) and dense strides."""
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    """Moments, in fp32; in fp64 for fp64 parameters."""
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    """0-dim fp32: the steps taken so far."""
    copies: list[Tensor]
    """bf16 or fp16 working copies of the fp32 parameters that ``copy_of`` numbers."""
    copy_of: list[int]
    group_of: list[int]
    """Each parameter's row of ``hyper``."""
    hyper: Tensor
    """(groups, 6) fp64, with columns LR to MAX_GRAD_NORM."""
    grad_scale: Tensor | None
    """One fp32, divides the gradients."""
    found_inf: Tensor | None
    """One fp32; non-zero skips the step."""
    grad_norm: Tensor
    """fp32, receives the norm of the unscaled gradients before clipping."""
    skipped: Tensor
    """int64, counts the skipped steps. They change nothing else."""
    seed: int
    """The seed of stochastic rounding."""
    total: Tensor | None = None
    """One fp32: the sum of squares of all unscaled gradients, where ``grads`` are only a rank's shards of them."""


class AdamWLaunch(NamedTuple):
    """One launch over ``n_chunks`` chunks from ``first`` on: tensors alike in everything that is compiled in."""

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    aligned: bool  # every address is a multiple of 16 bytes
    first: int
    n_chunks: int


def _check(s: Step) -> None:
    """Raise ValueError unless the tensors are as ``Step`` says: the kernels go by address. Once per plan, which is for these
    tensors alone."""
    copies = dict(zip(s.copy_of, s.copies, strict=True))
    rows = zip(s.params, s.grads, s.exp_avgs, s.exp_avg_sqs, s.steps, s.group_of, strict=True)
    for i, (param, grad, exp_avg, exp_avg_sq, step, group) in enumerate(rows):
        moments = (f"exp_avgs[{i}]", exp_avg, param.shape), (f"exp_avg_sqs[{i}]", exp_avg_sq, param.shape)
        alike = *moments, (f"grads[{i}]", grad, param.shape), (f"copies of params[{i}]", copies.get(i), param.shape)
        name = f"params[{i}]"
        arguments.tensors(name, param.shape, (name, param, None), *alike, (f"steps[{i}]", step, torch.Size()))
        for other, tensor, _ in alike:
            if tensor is not None and tensor.stride() != param.stride() and param.numel():
                raise ValueError(f"{other} has strides {tensor.stride()}: {name} has {param.stride()}")
        if not exp_avg.dtype == exp_avg_sq.dtype == step.dtype == torch.float32:
            raise ValueError(
                f"moments and step of {name} are {exp_avg.dtype}, {exp_avg_sq.dtype}, {step.dtype}: use float32"
            )
        if not 0 <= group < len(s.hyper):
            raise ValueError(f"group_of[{i}] is {group}: hyper has {len(s.hyper)} rows")


class Plan:
    """Address table, chunk list and scratch of the steps over one set of tensors, and the launches they take."""

    def __init__(self, s: Step, chunk: int) -> None:
        _check(s)
        n, device = len(s.params), s.params[0].device
        table = torch.zeros(ROWS, n, dtype=torch.int64)
        for row, tensors in enumerate((s.params, s.grads, s.exp_avgs, s.exp_avg_sqs, s.steps)):  # PARAM to STEP
            table[row] = torch.tensor([tensor.data_ptr() for tensor in tensors])
        for i, copy in zip(s.copy_of, s.copies):
            table[COPY.value, i] = copy.data_ptr()
            table[COPY_KIND.value, i] = COPY_KINDS[copy.dtype]
        numels = torch.tensor([param.numel() for param in s.params])
        table[NUMEL.value] = numels
        table[GROUP.value] = torch.tensor(s.group_of)

        addresses = table[[PARAM.value, GRAD.value, EXP_AVG.value, EXP_AVG_SQ.value, COPY.value]]
        aligned = (addresses % 16 == 0).all(0).tolist()
        alike: dict[tuple, list[int]] = {}
        for i in range(n):
            alike.setdefault((s.params[i].dtype, s.grads[i].dtype, aligned[i]), []).append(i)
        self.launches: list[AdamWLaunch] = []
        pairs, total = [], 0
        for (param_dtype, grad_dtype, is_aligned), members in alike.items():
            owners = torch.tensor(members)
            counts = -(-numels[owners] // chunk)  # 0 for an empty tensor; its step still counts
            owner = owners.repeat_interleave(counts)
            index = torch.arange(len(owner)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
            pairs.append(torch.stack((owner, index), dim=1))
            if len(owner):
                self.launches.append(AdamWLaunch(param_dtype, grad_dtype, is_aligned, total, len(owner)))
            total += len(owner)

        self.n_tensors, self.n_chunks = n, total
        self.table = pinned(table, device).to(device, non_blocking=True)
        self.chunks = pinned(torch.cat(pairs).to(torch.int32), device).to(device, non_blocking=True)
        self.partials = torch.empty(total, dtype=torch.float32, device=device)
        self.coefficients = torch.empty(n, COEFFICIENTS.value, dtype=torch.float32, device=device)
        self.control = torch.empty(2, dtype=torch.float32, device=device)
        self.grads = table[GRAD.value].tolist()
        # A CUDA graph replays the transfer that it captured, out of the same pinned memory. So a captured row gets a
        # buffer of its own, allocated beforehand, and the plan then lives as long as the process.
        self.captured: list[Tensor] = []
        self.spare = pinned(torch.empty(n, dtype=torch.int64), device)

    def send_grads(self, grads: list[Tensor]) -> None:
        """Bring the gradients' addresses to the table, if it may hold others."""
        addresses = [grad.data_ptr() for grad in grads]
        row = self.table[GRAD.value]
        if runtime.capturing(row.device):
            if len(self.captured) and self.spare is self.captured[-1]:
                raise RuntimeError("this step is already in a CUDA graph: run one outside before capturing another")
            self.spare.copy_(torch.tensor(addresses))
            row.copy_(self.spare, non_blocking=True)
            self.captured.append(self.spare)
        elif addresses != self.grads or self.captured:  # a replay may have put the graph's gradients into the table
            row.copy_(pinned(torch.tensor(addresses), row.device), non_blocking=True)
            self.grads = addresses
            if self.captured and self.spare is self.captured[-1]:
                self.spare = pinned(torch.empty_like(self.spare), row.device)


_plans: OrderedDict[tuple, Plan] = OrderedDict()
_MAX_PLANS = 8


def plan_for(s: Step, chunk: int) -> Plan:
    """The plan for these tensors, remembered by address, size and dtype: so it can be forgotten, but never be wrong."""
    device = s.params[0].device
    key = (
        device,
        chunk,
        tuple(
            (p.data_ptr(), p.numel(), p.dtype, g.data_ptr() % 16, g.dtype, m.data_ptr(), v.data_ptr(), step.data_ptr())
            for p, g, m, v, step in zip(s.params, s.grads, s.exp_avgs, s.exp_avg_sqs, s.steps)
        ),
        tuple((i, copy.data_ptr(), copy.dtype) for i, copy in zip(s.copy_of, s.copies)),
        tuple(s.group_of),
    )
    plan = _plans.get(key)
    if plan is None:
        if runtime.capturing(device):
            raise RuntimeError(
                "a captured step cannot allocate: run one step on the same tensors before the graph capture"
            )
        plan = _plans[key] = Plan(s, chunk)
        for old in [k for k, p in _plans.items() if not p.captured][:-_MAX_PLANS]:
            del _plans[old]
    _plans.move_to_end(key)
    plan.send_grads(s.grads)
    return plan


def pinned(host: Tensor, device: torch.device) -> Tensor:
    """``host`` in memory that ``device`` copies from without the CPU waiting. New memory each time, because the GPU
    may not have read the last; PyTorch's allocator reuses it once it has."""
    return host.pin_memory() if device.type == "cuda" else host


def _launch(s: Step) -> None:
    # Not through tuning.launch: a step cannot be begun twice. These kernels take hardly any shared memory: all configs fit.
    first = s.params[0]
    choice = _choice(first.dtype, first.device)
    tuning.announce(choice)
    settings = choice.config
    plan = plan_for(s, settings["CHUNK"])
    for launch in plan.launches if s.total is None else ():
        _sum_squares_kernel[(launch.n_chunks,)](
            plan.table, plan.chunks[launch.first :], plan.partials[launch.first :], plan.n_tensors, s.grad_scale,
            GRAD_DTYPE=DTYPES[launch.grad_dtype], ALIGNED=launch.aligned, enable_fp_fusion=True,
            **settings,
        )  # fmt: skip
    partials, n_partials = (plan.partials, plan.n_chunks) if s.total is None else (s.total, 1)
    _prepare_kernel[(1,)](
        plan.table, partials, s.hyper, plan.coefficients, plan.control, s.grad_norm, s.skipped, s.grad_scale, s.found_inf,
        plan.n_tensors, n_partials, BLOCK=1024, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    for launch in plan.launches:
        _adamw_kernel[(launch.n_chunks,)](
            plan.table, plan.chunks[launch.first :], plan.coefficients, plan.control, plan.n_tensors, s.seed,
            PARAM_DTYPE=DTYPES[launch.param_dtype], GRAD_DTYPE=DTYPES[launch.grad_dtype], ALIGNED=launch.aligned,
            enable_fp_fusion=True, **settings,
        )  # fmt: skip


def _begin(s: Step) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients as they are after unscaling (without a scale ``s.grads`` themselves), what clipping multiplies them by, and
    whether the step happens; writes ``grad_norm`` and ``skipped``."""
    grads = [g.to(m.dtype) for g, m in zip(s.grads, s.exp_avgs)]
    if s.grad_scale is not None:
        inverse_scale = 1.0 / s.grad_scale.squeeze()
        grads = [g * inverse_scale for g in grads]
    norm = torch.nn.utils.get_total_norm(grads) if s.total is None else s.total.squeeze().sqrt()
    happens = torch.isfinite(norm)
    if s.found_inf is not None:
        happens = happens & (s.found_inf.squeeze() == 0)
    s.grad_norm.copy_(norm)
    s.skipped.add_(~happens)
    return grads, (s.hyper[0, MAX_GRAD_NORM.value] / (norm + 1e-6)).clamp(max=1.0), happens


def _reference(s: Step) -> None:
    """The same step in plain PyTorch, for what neither Triton nor ``_torchs`` takes: fp64, bf16 on a CPU. ``torch.where`` in
    place of a branch: no value is brought to the host. bf16 is rounded stochastically, with other random bits than the
    kernel's."""
    grads, clip, happens = _begin(s)
    copy_of = dict(zip(s.copy_of, s.copies))
    for i, (p, g, m, v, step) in enumerate(zip(s.params, grads, s.exp_avgs, s.exp_avg_sqs, s.steps)):
        step.add_(happens)
        lr, beta1, beta2, eps, decay, _ = s.hyper[s.group_of[i]]  # 0-dim
        g = g * clip
        new_m = m + (g - m) * (1 - beta1)
        new_v = v * beta2 + g * g * (1 - beta2)
        denominator = new_v.sqrt() / (1 - beta2 ** step.double()).sqrt() + eps
        new_p = p.to(m.dtype) * (1 - lr * decay) - lr / (1 - beta1 ** step.double()) * new_m / denominator
        new_p = new_p.to(m.dtype)  # a 0-dim parameter has been promoted
        if p.dtype == torch.bfloat16:
            noise = torch.randint(0, 1 << 16, p.shape, dtype=torch.int32, device=p.device)
            rounded = ((new_p.view(torch.int32) + noise) & -0x10000).view(torch.float32)
            new_p = torch.where(torch.isfinite(new_p), rounded, new_p)
        m.copy_(torch.where(happens, new_m, m))
        v.copy_(torch.where(happens, new_v, v))
        p.copy_(torch.where(happens, new_p.to(p.dtype), p))
        if i in copy_of:
            copy_of[i].copy_(p)


def _torchs(s: Step) -> None:
    """The same step for contiguous fp32 tensors on a CPU outside the interpreter, whose update is torch's own: a quarter of
    the time of the passes above."""
    grads, clip, happens = _begin(s)
    if not happens:
        return
    torch._foreach_add_(s.steps, 1.0)
    hyper, factor = s.hyper.tolist(), float(clip)
    for i, (p, g, m, v, step) in enumerate(zip(s.params, grads, s.exp_avgs, s.exp_avg_sqs, s.steps)):
        lr, beta1, beta2, eps, decay, _ = hyper[s.group_of[i]]
        g = g * factor if factor < 1 else g  # one at a time: it is still in the cache when it is read
        torch._fused_adamw_(
            [p], [g], [m], [v], [], [step],
            lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
    for i, copy in zip(s.copy_of, s.copies):
        copy.copy_(s.params[i])


@torch.library.custom_op(
    "fastgpt::adamw_",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "steps", "copies", "grad_norm", "skipped"),
    schema="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor(e!)[] copies, SymInt[] copy_of, SymInt[] group_of, Tensor hyper, Tensor? grad_scale, Tensor? found_inf, "
    "Tensor(f!) grad_norm, Tensor(g!) skipped, SymInt seed, Tensor? total=None) -> ()",
)
def adamw_(*arguments):
    """One AdamW step, in place; ``Step`` has its arguments. Nothing is brought to the host. A gradient norm that is not
    finite, or that leaves fp32's range, skips the step as ``found_inf`` does."""
    step = Step(*arguments)
    with torch.no_grad():
        if runtime.runs_in_triton(step.params[0]) and all(t.dtype in DTYPES for t in (*step.params, *step.grads)):
            with runtime.device_guard(step.params[0]):
                _launch(step)
        elif all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for ts in step[:4] for t in ts):
            _torchs(step)
        else:
            _reference(step)


@adamw_.register_fake
def _(*arguments) -> None:
    return None
