"""Where the tensors of an AdamW step lie, written down in device memory for the kernels of fused_adamw.py.

A kernel argument is one pointer; an optimizer step touches hundreds of tensors. So the kernels get one table of
addresses (a row per kind, a column per tensor) and one list of (tensor, chunk) pairs, one pair per program. Both are
built once and kept for as long as the tensors stay where they are. Only gradients are expected to move, since
``zero_grad`` frees them: their row is then sent again, from pinned memory and without waiting.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

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


class Step(NamedTuple):
    """The arguments of one AdamW step; ``fused_adamw.adamw_`` says what they are."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    copies: list[Tensor]
    copy_of: list[int]
    group_of: list[int]
    hyper: Tensor
    grad_scale: Tensor | None
    found_inf: Tensor | None
    grad_norm: Tensor
    skipped: Tensor
    seed: int
    total: Tensor | None = None


class Launch(NamedTuple):
    """One launch over ``n_chunks`` chunks from ``first`` on: tensors alike in everything that is compiled in."""

    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    aligned: bool  # every address is a multiple of 16 bytes
    first: int
    n_chunks: int


class Plan:
    """Address table, chunk list and scratch of the steps over one set of tensors, and the launches they take."""

    def __init__(self, s: Step, chunk: int) -> None:
        n, device = len(s.params), s.params[0].device
        table = torch.zeros(ROWS, n, dtype=torch.int64)
        for row, tensors in (
            (PARAM, s.params),
            (GRAD, s.grads),
            (EXP_AVG, s.exp_avgs),
            (EXP_AVG_SQ, s.exp_avg_sqs),
            (STEP, s.steps),
        ):
            table[row.value] = torch.tensor([tensor.data_ptr() for tensor in tensors])
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
        self.launches: list[Launch] = []
        pairs, total = [], 0
        for (param_dtype, grad_dtype, is_aligned), members in alike.items():
            owners = torch.tensor(members)
            counts = -(-numels[owners] // chunk)  # 0 for an empty tensor; its step still counts
            owner = owners.repeat_interleave(counts)
            index = torch.arange(len(owner)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
            pairs.append(torch.stack((owner, index), dim=1))
            if len(owner):
                self.launches.append(Launch(param_dtype, grad_dtype, is_aligned, total, len(owner)))
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
        if capturing(row.device):
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
        if capturing(device):
            raise RuntimeError(
                "a captured step cannot allocate: run one step on the same tensors before the graph capture"
            )
        plan = _plans[key] = Plan(s, chunk)
        for old in [k for k, p in _plans.items() if not p.captured][:-_MAX_PLANS]:
            del _plans[old]
    _plans.move_to_end(key)
    plan.send_grads(s.grads)
    return plan


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def pinned(host: Tensor, device: torch.device) -> Tensor:
    """``host`` in memory that ``device`` copies from without the CPU waiting. New memory each time, because the GPU
    may not have read the last; PyTorch's allocator reuses it once it has."""
    return host.pin_memory() if device.type == "cuda" else host
