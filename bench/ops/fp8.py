"""fp8 linears and attention: launch cases."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from bench.ops.common import BF16, FP32, Case, backward, leaf
from fastgpt.kernels.fp8 import launch
from fastgpt.kernels.fp8.ops import layer_norm, linear, mlp, qkv_attention


def has_fp8() -> bool:
    """Whether the card that is compiled for has fp8. On others triton does not compile these kernels, and no run uses them."""
    return triton.runtime.driver.active.get_current_target().arch >= 89


def launch_fp8(C: int, *, bias: bool = False, dropout_p: float = 0.0, approximate: str = "tanh") -> None:
    """Norm, MLP, norm, linear, as in a block."""
    if not has_fp8():
        return

    def weight(*shape: int) -> Tensor:
        return torch.nn.Parameter(torch.zeros(shape))

    def shift(size: int) -> Tensor | None:
        return leaf(size, dtype=FP32) if bias else None

    norm: dict[str, Any] = {"dropout_p": dropout_p, "out_dtype": BF16}
    branch, stream = leaf(256, C, dtype=BF16), leaf(256, C, dtype=FP32)
    h, stream = layer_norm(branch, weight(C), shift(C), residual=stream, **norm)
    y = mlp(h, weight(2 * C, C), shift(2 * C), weight(C, 2 * C), shift(C), approximate=approximate)
    h, stream = layer_norm(y, weight(C), shift(C), residual=stream, **norm)
    backward((linear(h, weight(48, C), shift(48)), stream))


def launch_fp8_sweep(erf: bool, bias: bool) -> None:
    """What follows torch._scaled_mm, which some of torch's CPU backends do not have: forward and backward."""
    if not has_fp8():
        return
    z, stats, limit = torch.ones(256, 768, dtype=BF16), torch.ones(2, 256), torch.ones(())
    for dy, dtype, shift in ((None, launch.FORWARD, limit if bias else None), (z, launch.GRADIENT, None)):
        q = launch.new(z.shape, dtype, z.device)
        sums = torch.empty(768) if bias and dy is not None else None
        launch.sweep(z, dy, torch.empty_like(z), q, (q.values, q.scale, stats[1], limit, shift), erf, sums)


def launch_fp8_attention(D: int, T: int = 1024, H: int = 2, kv: int = 2, docs: bool = False, **options: Any) -> None:
    """A block's attention between its two linears: what they read in fp8 is written by attention, forward and backward."""
    if not has_fp8():
        return
    doc_ids = torch.empty(1, T, dtype=torch.int32) if docs else None
    qkv = linear(leaf(1, T, 256, dtype=BF16), torch.nn.Parameter(torch.zeros((H + 2 * kv) * D, 256)))
    y = qkv_attention(qkv, H, n_kv_head=kv, doc_ids=doc_ids, **options)
    backward(linear(y, torch.nn.Parameter(torch.zeros(128, H * D)), leaf(128, dtype=FP32)))


def cases() -> Iterator[Case]:
    for C in (384, 768, 1024, 1600):
        yield f"fp8 C{C}", partial(launch_fp8, C)
    everything: dict[str, Any] = {"bias": True, "dropout_p": 0.1, "approximate": "none"}
    for C in (48, 768, 1024, 1600, 4096):
        yield f"fp8 C{C} all options", partial(launch_fp8, C, **everything)
    yield "fp8 C768 bias", partial(launch_fp8, 768, bias=True)
    for D in (32, 64, 96, 128, 256):
        yield f"fp8 attention D{D}", partial(launch_fp8_attention, D)
        yield (
            f"fp8 attention D{D} all options",
            partial(launch_fp8_attention, D, H=4, docs=True, dropout_p=0.1, window=256),
        )
    yield "fp8 attention D64 dropout", partial(launch_fp8_attention, 64, dropout_p=0.1)
    yield "fp8 attention D64 documents", partial(launch_fp8_attention, 64, docs=True)
    yield "fp8 attention D64 grouped queries", partial(launch_fp8_attention, 64, H=4)
    yield "fp8 sweep", partial(launch_fp8_sweep, False, False)
    yield "fp8 sweep all options", partial(launch_fp8_sweep, True, True)
