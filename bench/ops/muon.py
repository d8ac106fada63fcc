"""Muon: launch cases, tuning families, timing entry beside torch.optim.Muon."""

from __future__ import annotations

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
from fastgpt.kernels import fused_muon
from fastgpt.kernels.working_copy import copies_kept, working_copy
from fastgpt.optim.muon import Muon
from fastgpt.performance import flops


def launch_muon(
    shapes: tuple[tuple[int, int], ...] = ((768, 768), (3072, 768), (768, 3072)),
    *,
    scaled: bool = False,
    copy: torch.dtype = BF16,
    **options: Any,
) -> None:
    """A step over matrices wide, tall and square; ``scaled``: as under a GradScaler."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = Muon(params, **options)
    if scaled:
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
    with copies_kept():
        for p in params:
            working_copy(p, copy)
        optimizer.step()


def cases() -> Iterator[Case]:
    yield "muon bf16", launch_muon
    yield "muon bf16 all options", partial(launch_muon, scaled=True, cautious=True, normuon=True, coefficients="polar")
    yield "muon bf16 fp16 copy", partial(launch_muon, copy=torch.float16, scaled=True, nesterov=False)
    odd = ((99, 50), (50, 99), (1, 7))
    for dtype, name in SHORT.items():
        yield f"muon {name} odd", partial(launch_muon, shapes=odd, dtype=dtype, scaled=True)
    yield "muon fp32", partial(launch_muon, dtype=FP32)


def families() -> Iterator[Family]:
    for kernel in ("muon.symmetric", "muon.product"):
        yield Family(kernel, BF16, (fused_muon.BUCKET,), (launch_muon,), time_muon, partial(clocks_muon, kernel))


def clocks_muon(kernel: str, bucket: str, found: ranking.Facts, gpu: Gpu) -> list[tuple[float, float]]:
    """By the model of a matmul: a batch is one of as many rows, and of a symmetric product about half of them are computed."""
    sizes = [(384, 384, 48), (768, 768, 48), (768, 3072, 14)]
    if kernel == "muon.symmetric":
        return [ranking.linear_time(kernel, found, n, m, n * b * 5 // 8, gpu) for n, m, b in sizes]
    return [ranking.linear_time(kernel, found, m, n, n * b, gpu) for n, m, b in sizes]


def time_muon(bucket: str, device: torch.device) -> Callable[[], Any]:
    x = torch.randn(14, 768, 3072, device=device, dtype=BF16)
    return lambda: fused_muon.orthogonalize(x.clone())


def muon(size: Sizes, device: torch.device, compiled: bool) -> Entry:
    """Muon's update of the blocks' matrices of a GPT-2, q, k and v apart; the peers are plain PyTorch, batched as ours is, and
    torch.optim.Muon, which takes matrices one by one. Iterations in bf16 on a GPU."""
    C = size.C
    shapes = [(C, C)] * 4 * size.n_layer + [(4 * C, C), (C, 4 * C)] * size.n_layer
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.01}
    generator = torch.Generator(device).manual_seed(0)
    start = [torch.randn(shape, device=device, generator=generator) for shape in shapes]

    def parameters(dtype: torch.dtype = FP32) -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(0.02 * p.to(dtype)) for p in start]
        for p, like in zip(made, start):
            p.grad = like.roll(1).to(dtype, copy=True)
        return made

    def stepped(params: list[torch.nn.Parameter], **more: Any) -> list[Tensor]:
        Muon(params, **options, **more).step()
        return [p.detach() for p in params]

    def parity() -> None:
        ours, plain = stepped(parameters()), stepped(parameters(), fused=False)
        for i, exact in enumerate(stepped(parameters(torch.float64), fused=False)):
            assert_parity(f"matrix {i}", ours[i], exact, plain[i])

    variants: dict[str, Callable[[], Work]] = {
        OURS: lambda: Muon(parameters(), **options).step,
        "eager": lambda: Muon(parameters(), fused=False, **options).step,
    }
    if hasattr(torch.optim, "Muon"):
        variants["torch"] = lambda: torch.optim.Muon(parameters(), **options).step
    work = flops.muon(anatomy.of(anatomy.Shape(size.n_layer, size.H, C, size.T, size.V)))
    return Entry("muon", f"{millions(sum(p.numel() for p in start))} parameters", work, parity, variants)
