"""FusedAdamW: launch cases, tuning family, timing entry beside torch.optim.AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.compiler import ranking
from bench.ops.common import BF16, FP32, OURS, SHORT, Case, Entry, Family, Sizes
from bench.parity import assert_parity
from bench.reports.timing import Work
from fastgpt import anatomy
from fastgpt.common import millions
from fastgpt.hardware.cards import Gpu
from fastgpt.kernels.fused_adamw import ADAMW_BUCKET
from fastgpt.kernels.working_copy import copies_kept, working_copy
from fastgpt.optim.adamw import FusedAdamW
from fastgpt.performance import flops


def launch_adamw(
    dtype: torch.dtype,
    *,
    max_grad_norm: float | None = 1.0,
    copy: torch.dtype | None = None,
    offset: int = 0,
    scaled: bool = False,
) -> None:
    """A step over a few tensors: with a working copy, ``offset`` elements off alignment, or under a GradScaler."""
    shapes = ((768, 768), (768,), (50, 768), (3,))
    params = [torch.nn.Parameter(_zeros(shape, dtype, offset)) for shape in shapes]
    for p in params:
        p.grad = _zeros(p.shape, dtype, offset)
    optimizer = FusedAdamW(params, max_grad_norm=max_grad_norm)
    if scaled:  # as torch.amp.GradScaler hands them over
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
    with copies_kept():
        for p in params:
            working_copy(p, copy or dtype)
        optimizer.step()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> Tensor:
    return torch.zeros(offset + math.prod(shape), dtype=dtype)[offset:].view(shape)


def cases() -> Iterator[Case]:
    for dtype, name in SHORT.items():
        yield f"adamw {name}", partial(launch_adamw, dtype)
    yield "adamw fp32 bf16 copy", partial(launch_adamw, FP32, copy=BF16)
    yield "adamw fp32 unaligned", partial(launch_adamw, FP32, offset=1)
    yield "adamw fp32 scaled", partial(launch_adamw, FP32, scaled=True)
    yield "adamw fp32 no clip", partial(launch_adamw, FP32, max_grad_norm=None)


def families() -> list[Family]:
    cases = (partial(launch_adamw, FP32, copy=BF16), partial(launch_adamw, FP32, offset=1))
    return [Family("adamw.update", FP32, (ADAMW_BUCKET,), cases, time_adamw, clocks_adamw)]


def clocks_adamw(bucket: str, found: ranking.Facts, gpu: Gpu) -> list[tuple[float, float]]:
    return [ranking.adamw_time(found, parameters, gpu) for parameters in (40_560_000, 124_000_000)]


def time_adamw(bucket: str, device: torch.device) -> Callable[[], Any]:
    params = [torch.nn.Parameter(torch.randn(4096, 1024, device=device)) for _ in range(16)]
    for p in params:
        p.grad = torch.randn_like(p)
    return FusedAdamW(params, max_grad_norm=1.0).step


def adamw(size: Sizes, device: torch.device, compiled: bool) -> Entry:
    """Clip and update of all parameters of a GPT-2, fp32; the peer is torch's fused AdamW after clip_grad_norm_."""
    shapes = list(anatomy.parameters(anatomy.Shape(size.n_layer, size.H, size.C, size.T, size.V)).values())
    options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}

    def parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
        for p in made:
            p.grad = torch.randn_like(p)
        return made

    def ours(params: list) -> Work:
        return FusedAdamW(params, max_grad_norm=1.0, **options).step

    def torchs(params: list) -> Work:
        optimizer = torch.optim.AdamW(params, fused=True, **options)

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()

        return step

    def unclipped(params: list) -> Work:
        return torch.optim.AdamW(params, **options).step

    def parity() -> None:
        start = parameters(shapes)
        grads = [p.grad for p in start if p.grad is not None]

        def updated(make: Callable[[list], Work], start: list, grads: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
            params = [torch.nn.Parameter(p.detach().to(dtype, copy=True)) for p in start]
            step = make(params)
            for _ in range(3):
                for p, grad in zip(params, grads):
                    p.grad = grad.to(dtype, copy=True)  # clip_grad_norm_ scales in place
                step()
            return [p.detach() for p in params]

        mine, theirs = (updated(make, start, grads, torch.float32) for make in (ours, torchs))
        norm = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt()
        clipped = (1 / (norm + 1e-6)).clamp(max=1)  # as clip_grad_norm_
        for i, (p, grad) in enumerate(zip(start, grads)):  # fp64 of one parameter at a time
            (exact,) = updated(unclipped, [p], [clipped * grad.double()], torch.float64)
            assert_parity(f"parameter {i}", mine[i], exact, theirs[i])

    count = sum(torch.Size(shape).numel() for shape in shapes)
    return Entry(
        "adamw + clip",
        f"{millions(count)} parameters",
        flops.adamw(count),
        parity,
        {OURS: lambda: ours(parameters(shapes)), "torch fused": lambda: torchs(parameters(shapes))},
    )
