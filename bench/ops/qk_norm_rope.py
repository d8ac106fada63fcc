"""Rotary positions, QK-norm and value embeddings: launch cases, tuning families, timing entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.compiler import ranking
from bench.ops.common import (
    BF16,
    FP16,
    FP32,
    OURS,
    SHORT,
    Case,
    Entry,
    Family,
    Sizes,
    backward,
    leaf,
    pass_of,
    peers,
    timed,
    total,
)
from bench.parity import check
from fastgpt.hardware.cards import Gpu
from fastgpt.kernels import fused_qk_rope, reference
from fastgpt.performance import flops

HEAD_DIMS = (32, 64, 80, 96, 128, 256)


def launch_qk(
    dtype: torch.dtype,
    D: int,
    T: int = 1024,
    H: int = 4,
    kv: int = 2,
    ve: bool = True,
    starts: bool = False,
    **options: Any,
) -> None:
    qkv, cos, sin = leaf(2, T, (H + 2 * kv) * D, dtype=dtype), *(torch.empty(2048, D // 2) for _ in range(2))
    if ve:
        options |= {"ve": leaf(2, T, kv * D, dtype=dtype), "gate": leaf(2, T, kv, dtype=dtype)}
    if starts:
        options["position"] = torch.empty(2, dtype=torch.int32)
    backward(fused_qk_rope.qk_norm_rope(qkv, H, kv, cos, sin, **options))


def cases() -> Iterator[Case]:
    for D in HEAD_DIMS:
        yield f"qk_norm_rope bf16 D{D}", partial(launch_qk, BF16, D)
    yield "qk_norm_rope bf16 D64 no value embedding", partial(launch_qk, BF16, 64, ve=False)
    yield "qk_norm_rope bf16 D64 no norm", partial(launch_qk, BF16, 64, ve=False, norm=False)
    yield "qk_norm_rope bf16 D128 12 heads", partial(launch_qk, BF16, 128, H=12, kv=12)
    for dtype in (FP16, FP32):
        yield f"qk_norm_rope {SHORT[dtype]} D64", partial(launch_qk, dtype, 64)
    for D in (64, 80, 256):
        yield f"qk_norm_rope bf16 D{D} interleaved", partial(launch_qk, BF16, D, interleaved=True, scale=1.2)
    yield "qk_norm_rope fp32 D256 interleaved, starts", partial(launch_qk, FP32, 256, interleaved=True, starts=True)
    yield "qk_norm_rope bf16 D64 decode", partial(launch_qk, BF16, 64, T=1, starts=True)


def families() -> list[Family]:
    found = []
    for kernel in ("qk_norm_rope.forward", "qk_norm_rope.backward"):
        for dtype in (BF16, FP16):
            for D in (64, 128):
                launches = tuple(partial(launch_qk, dtype, D, kv=4, ve=ve) for ve in (False, True))
                time, clocks = partial(time_qk, kernel, dtype), partial(clocks_qk, kernel, dtype)
                found.append(Family(kernel, dtype, (f"D{D}",), launches, time, clocks))
    return found


def work(tokens: int, size: Sizes) -> tuple[flops.Work, flops.Work]:
    given = tokens, size.H, size.D, size.dtype.itemsize
    return flops.qk_norm_rope_forward(*given), flops.qk_norm_rope_backward(*given)


def clocks_qk(
    kernel: str, dtype: torch.dtype, bucket: str, found: ranking.Facts, gpu: Gpu
) -> list[tuple[float, float]]:
    """A block moves its rows in one round: 768 columns of queries, keys and values each."""
    D, times = int(bucket[1:]), []
    for tokens in (2048, 8192, 16384):
        moved = work(tokens, Sizes(H=768 // D, D=D, dtype=dtype))[kernel.endswith("backward")].bytes
        blocks = -(-tokens * 3 * 768 // found.config["elements"])
        times.append(ranking.waves_time(blocks, moved / blocks, 1, found, gpu))
    return times


def time_qk(kernel: str, dtype: torch.dtype, bucket: str, device: torch.device) -> Callable[[], Any]:
    D = int(bucket[1:])
    tables = [table.to(device) for table in angles(1024, D)]
    op = partial(fused_qk_rope.qk_norm_rope, n_head=768 // D, n_kv_head=768 // D, cos=tables[0], sin=tables[1])
    return pass_of(kernel, op, [torch.randn(8, 1024, 3 * 768, device=device).to(dtype)])


def angles(positions: int, D: int) -> tuple[Tensor, Tensor]:
    """cos and sin, (positions, D / 2) each, to base 10,000."""
    turned = torch.outer(torch.arange(positions), 10_000.0 ** (-torch.arange(0, D, 2) / D))
    return turned.cos(), turned.sin()


def qk_norm_rope(size: Sizes, device: torch.device, compiled: bool) -> Entry:
    """As in a block without a value embedding: packed projections in, packed projections out."""

    def inputs() -> dict[str, Tensor]:
        return {"qkv": torch.randn(size.B, size.T, 3 * size.H * size.D, device=device).to(size.dtype)}

    cos, sin = (table.to(device) for table in angles(size.T, size.D))

    def ours(qkv: Tensor) -> Tensor:
        return fused_qk_rope.qk_norm_rope(qkv, size.H, size.H, cos, sin)

    def eager(qkv: Tensor) -> Tensor:
        return reference.qk_norm_rope(qkv, size.H, size.H, cos, sin)

    return Entry(
        "qk_norm_rope",
        f"B={size.B} T={size.T} H={size.H} D={size.D}",
        total(*work(size.B * size.T, size)),
        lambda: check(ours, eager, inputs()),
        timed({OURS: ours} | peers(eager, compiled), inputs),
    )
