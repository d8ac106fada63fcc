"""Attention: launch cases, tuning families, timing entry beside SDPA's backends."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.compiler import ranking
from bench.ops.common import (
    BF16,
    FP16,
    FP32,
    OURS,
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
from bench.parity import check, in_pieces
from fastgpt.hardware.cards import Gpu
from fastgpt.kernels import fused_attn, reference
from fastgpt.performance import flops

HEAD_DIMS = (32, 64, 80, 96, 128, 256)


def launch_attention(
    dtype: torch.dtype,
    D: int,
    T: int = 1024,
    H: int = 2,
    kv: int = 2,
    docs: bool = False,
    **options: Any,
) -> None:
    qkv = leaf(1, T, (H + 2 * kv) * D, dtype=dtype)
    doc_ids = torch.empty(1, T, dtype=torch.int32) if docs else None
    backward(fused_attn.qkv_attention(qkv, H, n_kv_head=kv, doc_ids=doc_ids, **options))


def launch_decode(dtype: torch.dtype, D: int, T_q: int, **options: Any) -> None:
    """Sampling with a preallocated cache: T_q new tokens against up to 1024 keys, no backward."""
    q = torch.empty(1, T_q, 2, D, dtype=dtype)
    k, v = torch.empty(2, 1, 1024, 2, D, dtype=dtype)
    with torch.no_grad():
        fused_attn.attention(q, k, v, kv_len=torch.empty(1, dtype=torch.int32), **options)


def cases() -> Iterator[Case]:
    everything: dict[str, Any] = {"docs": True, "dropout_p": 0.1, "window": 256}
    for D in HEAD_DIMS:
        yield f"attention bf16 D{D}", partial(launch_attention, BF16, D)
        yield f"attention bf16 D{D} all options", partial(launch_attention, BF16, D, H=4, **everything)
    for D in (64, 128, 256):
        yield f"attention fp16 D{D}", partial(launch_attention, FP16, D)
        yield f"attention fp32 D{D}", partial(launch_attention, FP32, D)
        yield f"attention bf16 D{D} decode", partial(launch_decode, BF16, D, 1)
    yield "attention bf16 D64 short", partial(launch_attention, BF16, 64, T=64)
    yield "attention bf16 D64 T1025", partial(launch_attention, BF16, 64, T=1025)
    yield "attention bf16 D64 not causal", partial(launch_attention, BF16, 64, causal=False)
    yield "attention bf16 D64 dropout", partial(launch_attention, BF16, 64, dropout_p=0.1)
    yield "attention bf16 D64 documents", partial(launch_attention, BF16, 64, docs=True)
    for D in (64, 128):  # the modern recipe's
        yield f"attention bf16 D{D} documents, window", partial(launch_attention, BF16, D, H=4, docs=True, window=256)
    yield "attention bf16 D64 window", partial(launch_attention, BF16, 64, window=256)
    yield "attention bf16 D64 grouped queries", partial(launch_attention, BF16, 64, H=4)
    yield "attention bf16 D64 prefill", partial(launch_decode, BF16, 64, 256)
    yield "attention fp32 D64 dropout", partial(launch_attention, FP32, 64, dropout_p=0.1)
    fast: dict[str, Any] = {"accumulate": "fp16"}
    for D in HEAD_DIMS:
        yield f"attention fp16-fast D{D}", partial(launch_attention, FP16, D, **fast)
    for D in (32, 64, 128, 256):
        yield f"attention fp16-fast D{D} all options", partial(launch_attention, FP16, D, H=4, **everything, **fast)
    yield "attention fp16-fast D64 dropout", partial(launch_attention, FP16, 64, dropout_p=0.1, **fast)
    yield "attention fp16-fast D64 documents", partial(launch_attention, FP16, 64, docs=True, **fast)
    yield (
        "attention fp16-fast D128 documents, window",
        partial(launch_attention, FP16, 128, docs=True, window=256, **fast),
    )
    yield "attention fp16-fast D64 window", partial(launch_attention, FP16, 64, window=256, **fast)
    yield "attention fp16-fast D64 grouped queries", partial(launch_attention, FP16, 64, H=4, **fast)
    yield "attention fp16-fast D64 decode", partial(launch_decode, FP16, 64, 1, **fast)


def families() -> list[Family]:
    bounds = [*fused_attn.ROW_BOUNDS, fused_attn.ROW_BOUNDS[-1] + 1]
    found = []
    for dtype in (BF16, FP16):
        for dropout in (False, True):
            found_buckets = [fused_attn.attention_bucket(64, rows, plain=True, dropout=dropout) for rows in bounds]
            buckets = tuple(bucket for bucket in found_buckets if bucket is not None)
            case = partial(launch_attention, dtype, 64, dropout_p=0.1 if dropout else 0.0)
            for kernel in ("attention.forward", "attention.backward_q", "attention.backward_kv"):
                timed, clocks = partial(time_attention, kernel, dtype), partial(clocks_attention, kernel)
                found.append(Family(kernel, dtype, buckets, (case,), timed, clocks))
    return found


def clocks_attention(kernel: str, bucket: str, found: ranking.Facts, gpu: Gpu) -> list[tuple[float, float]]:
    return [ranking.attention_time(kernel, found, heads, 1024, 64, gpu) for heads in batch_heads(bucket)]


def batch_heads(bucket: str) -> list[int]:
    """Batch x heads at T = 1024 that stand for a bucket of attention: spread over it, and 96, GPT-2 124M's (8 x 12) and
    40M's (16 x 6), once more."""
    bound = re.search(r"rows<=(\d+)", bucket)
    upper = int(bound[1]) if bound else 4 * fused_attn.ROW_BOUNDS[-1]
    found = [max(1, round(upper * share / 1024)) for share in (0.3, 0.5, 0.7, 0.85, 1.0)]
    return found + [96] * (upper // 4 < 96 * 1024 <= upper)


def time_attention(kernel: str, dtype: torch.dtype, bucket: str, device: torch.device) -> Callable[[], Any]:
    heads = batch_heads(bucket)[-1]
    H = min(heads, 12)
    qkv = torch.randn(-(-heads // H), 1024, 3 * H * 64, device=device).to(dtype)
    return pass_of(
        kernel, partial(fused_attn.qkv_attention, n_head=H, dropout_p=0.1 if "dropout" in bucket else 0.0), [qkv]
    )


def attention(size: Sizes, device: torch.device, compiled: bool) -> Entry:
    """Packed qkv to packed dqkv: the peers' transposes and copies are part of their time."""

    def inputs() -> dict[str, Tensor]:
        return {"qkv": torch.randn(size.B, size.T, 3 * size.H * size.D, device=device).to(size.dtype)}

    def eager(qkv: Tensor) -> Tensor:
        return reference.qkv_attention(qkv, size.H)

    def exact(qkv: Tensor) -> Tensor:
        """A few heads at a time: one's scores in fp64 are 134 MB at T = 4096, several times over."""
        heads = qkv.unflatten(-1, (3, size.H, size.D)).movedim(3, 1).flatten(0, 1)  # (B H, T, 3, D)
        pieces = -(-len(heads) * size.T**2 // 2**26)
        found = in_pieces(lambda qkv: reference.qkv_attention(qkv, 1), ("qkv",), pieces)(qkv=heads.flatten(-2))
        return found.unflatten(0, (size.B, size.H)).movedim(1, 2).flatten(-2)

    def backend(which: SDPBackend) -> Callable:
        def op(qkv: Tensor) -> Tensor:
            with sdpa_kernel(which):
                return reference.qkv_attention(qkv, size.H)

        return op

    def ours(qkv: Tensor) -> Tensor:
        return fused_attn.qkv_attention(qkv, size.H)

    ops = peers(eager, compiled)
    if device.type == "cuda":
        names = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        names["efficient"] = SDPBackend.EFFICIENT_ATTENTION
        ops |= {f"sdpa {name}": backend(which) for name, which in names.items()}
    shape = (size.B, size.T, size.H, size.D, size.dtype.itemsize)
    return Entry(
        "attention",
        f"B={size.B} T={size.T} H={size.H} D={size.D}, causal",
        total(flops.attention_forward(*shape), flops.attention_backward(*shape)),
        lambda: check(ours, eager, inputs(), operand_dtype=size.dtype, exact=exact),
        timed({OURS: ours} | ops, inputs),
    )
