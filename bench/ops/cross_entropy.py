"""The loss: launch cases, tuning families, timing entry beside torch and Liger."""

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
    liger_function,
    peers,
    timed,
)
from bench.parity import check, in_pieces
from fastgpt.hardware.cards import Gpu
from fastgpt.kernels import fused_cross_entropy, reference
from fastgpt.performance import flops


def launch_loss(
    dtype: torch.dtype, V: int = 50304, C: int = 32, N: int = 256, bias: bool = False, **options: Any
) -> None:
    x, weight = torch.zeros(N, C, dtype=dtype, requires_grad=True), torch.zeros(V, C, dtype=dtype, requires_grad=True)
    shift = torch.zeros(V, dtype=dtype, requires_grad=True) if bias else None
    backward(
        fused_cross_entropy.linear_cross_entropy(x, weight, torch.zeros(N, dtype=torch.int64), bias=shift, **options)
    )


def cases() -> Iterator[Case]:
    everything: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-4, "logit_softcap": 30.0}
    for dtype, name in SHORT.items():
        yield f"linear_cross_entropy {name}", partial(launch_loss, dtype)
    yield "linear_cross_entropy bf16 padded", partial(launch_loss, BF16, vocab_size=50257)
    yield "linear_cross_entropy bf16 all options", partial(launch_loss, BF16, bias=True, vocab_size=50257, **everything)
    yield "linear_cross_entropy bf16 none", partial(launch_loss, BF16, reduction="none", **everything)
    yield "linear_cross_entropy fp32 bytes", partial(launch_loss, FP32, V=256)
    yield "linear_cross_entropy fp32 all options", partial(launch_loss, FP32, vocab_size=50257, **everything)
    fast: dict[str, Any] = {"accumulate": "fp16"}
    yield "linear_cross_entropy fp16-fast", partial(launch_loss, FP16, **fast)
    yield "linear_cross_entropy fp16-fast odd", partial(launch_loss, FP16, V=50257, bias=True, **everything, **fast)
    yield "linear_cross_entropy fp16-fast none", partial(launch_loss, FP16, reduction="none", **fast)


def families() -> list[Family]:
    found = []
    for dtype in (BF16, FP16, FP32):
        loss = partial(launch_loss, dtype, V=8192, N=64)
        cases = (loss, partial(loss, label_smoothing=0.1, z_loss=1e-4, vocab_size=8190))
        bucket = fused_cross_entropy.cross_entropy_bucket(8192, None)
        assert bucket is not None
        timed, clocks = partial(time_cross_entropy, dtype), partial(clocks_cross_entropy, dtype)
        found.append(Family("cross_entropy.rows", dtype, (bucket,), cases, timed, clocks))
    return found


def clocks_cross_entropy(dtype: torch.dtype, bucket: str, found: ranking.Facts, gpu: Gpu) -> list[tuple[float, float]]:
    return [ranking.cross_entropy_time(found, rows, 50304, dtype.itemsize, gpu) for rows in (1536, 1664, 2048)]


def time_cross_entropy(dtype: torch.dtype, bucket: str, device: torch.device) -> Callable[[], Any]:
    """Forward, which forms the gradients, too. Narrow: the matmuls around the kernel are not what is compared."""
    x, weight = (torch.randn(rows, 64, device=device).to(dtype).requires_grad_() for rows in (8192, 50304))
    target = torch.randint(0, 50304, (8192,), device=device)
    return lambda: fused_cross_entropy.linear_cross_entropy(x, weight, target)


def linear_cross_entropy(size: Sizes, device: torch.device, compiled: bool) -> Entry:
    """Mean loss over the vocabulary; the peers hold the logits, in fp32 for the loss."""
    ours = fused_cross_entropy.linear_cross_entropy

    def inputs() -> dict[str, Tensor]:
        x = torch.randn(size.rows, size.C, device=device).to(size.dtype)
        weight = (0.02 * torch.randn(size.V, size.C, device=device)).to(size.dtype)
        return {"x": x, "weight": weight, "target": torch.randint(size.V, (size.rows,), device=device)}

    def exact(**inputs: Tensor) -> Tensor:
        return in_pieces(reference.linear_cross_entropy, ("x", "target"), max(1, size.rows // 1024))(**inputs)

    def same_dtype(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """The reference to the bit, as the number of pieces is a power of two: each matmul is one, whose gradient is rounded
        once, and only the loss is cut. Its whole logits of 16,384 rows in fp32 do not fit 12 GB."""

        def loss(logits: Tensor, target: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(logits.float(), target)

        logits = torch.nn.functional.linear(x, weight)
        return in_pieces(loss, ("logits", "target"), max(1, size.rows // 2048))(logits=logits, target=target)

    liger = liger_function("liger_fused_linear_cross_entropy")
    ops = peers(
        reference.linear_cross_entropy,
        compiled,
        **_torch_linear_cross_entropy(),
        liger=liger and (lambda x, weight, target: liger(x, weight, target)),
    )
    return Entry(
        "linear_cross_entropy",
        f"{size.rows} x {size.C} x {size.V}",
        flops.linear_cross_entropy(size.rows, size.C, size.V, size.dtype.itemsize, grad_size=size.dtype.itemsize),
        lambda: check(ours, same_dtype, inputs(), operand_dtype=size.dtype, exact=exact),
        timed({OURS: ours} | ops, inputs),
    )


def _torch_linear_cross_entropy() -> dict[str, Callable]:
    """PyTorch's own fused loss, whole and in chunks, where this PyTorch has it."""
    op = getattr(torch.nn.functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if op is None:
        return {}
    found = {"torch linear_ce": lambda x, weight, target: op(x, weight, target)}
    if options is not None:
        found["torch linear_ce chunked"] = lambda x, weight, target: op(x, weight, target, options=options())
    return found
