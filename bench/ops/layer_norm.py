"""Layer norm: launch cases, tuning families, timing entries, with and without a residual."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from bench.compiler import ranking
from bench.ops.common import (
    BF16,
    FP16,
    FP32,
    OURS,
    SHORT,
    TUNED_WIDTHS,
    Case,
    Entry,
    Family,
    Sizes,
    backward,
    leaf,
    liger_function,
    pass_of,
    peers,
    timed,
    total,
)
from bench.parity import check
from fastgpt.hardware.cards import Gpu
from fastgpt.kernels import fused_layernorm, reference, tuning
from fastgpt.performance import flops

WIDTHS = (384, 768, 1024, 1600, 4096, 16384)


def launch_norm(
    C: int,
    x: torch.dtype,
    residual: torch.dtype | None = None,
    weight: torch.dtype = FP32,
    bias: bool = False,
    rows: int = 8192,
    **options: Any,
) -> None:
    rows = min(rows, 2**23 // C)  # the host code may touch its outputs
    branch = leaf(rows, C, dtype=x)
    stream = None if residual is None else leaf(rows, C, dtype=residual)
    shift = leaf(C, dtype=weight) if bias else None
    backward(fused_layernorm.layer_norm(branch, leaf(C, dtype=weight), shift, residual=stream, **options))


def cases() -> Iterator[Case]:
    for C in WIDTHS:
        # A block's norms under bf16 autocast: bf16 branch, fp32 residual stream, bf16 output.
        yield f"layer_norm C{C}", partial(launch_norm, C, BF16, FP32, out_dtype=BF16)
        yield (
            f"layer_norm C{C} all options",
            partial(launch_norm, C, BF16, FP32, bias=True, out_dtype=BF16, dropout_p=0.1),
        )
    for dtype, name in SHORT.items():
        yield f"layer_norm {name} C768", partial(launch_norm, 768, dtype, bias=True)
        yield f"layer_norm {name} C768 residual", partial(launch_norm, 768, dtype, dtype, dtype, bias=True)
    # The embedding's sum under autocast, before the first block has anything to add.
    yield "layer_norm C768 first", partial(launch_norm, 768, FP32, out_dtype=BF16)
    yield "layer_norm fp32 C16384 residual", partial(launch_norm, 16384, FP32, FP32, bias=True)


def families() -> list[Family]:
    found = []
    for C in TUNED_WIDTHS:
        for dtype in (BF16, FP16, FP32):
            low = BF16 if dtype == FP32 else dtype
            norm = partial(launch_norm, C, dtype, rows=256)
            inside = partial(norm, FP32, out_dtype=dtype)  # dy then has this dtype
            everything = partial(norm, FP32, bias=True, out_dtype=dtype, dropout_p=0.1)
            alone = partial(norm, None, bias=True)
            first = partial(norm, None, out_dtype=low)
            for kernel in ("forward", "backward"):
                cases = (
                    (inside, everything, alone) if kernel == "backward" or dtype != FP32 else (first, everything, alone)
                )
                bucket = fused_layernorm.layer_norm_bucket(C)
                name = f"layer_norm.{kernel}"
                timed, clocks = partial(time_layer_norm, name, dtype), partial(clocks_layer_norm, name, dtype)
                worth = partial(few_elements_a_thread, name, C)
                found.append(Family(name, dtype, (bucket,), cases, timed, clocks, worth))
    return found


def few_elements_a_thread(kernel: str, C: int, config: tuning.Config) -> bool:
    """Neither so few elements of a tile that loads are narrow, nor so many that they spill; in backward two accumulators take
    registers, too."""
    elements = config["rows"] * max(16, triton.next_power_of_2(C)) / (32 * config["num_warps"])
    return 8 <= elements <= 32 if kernel.endswith(".forward") else 4 <= elements <= 16


def clocks_layer_norm(
    kernel: str, dtype: torch.dtype, bucket: str, found: ranking.Facts, gpu: Gpu
) -> list[tuple[float, float]]:
    C, size = int(bucket[1:]), dtype.itemsize
    return [ranking.layer_norm_time(kernel, found, rows, C, size, gpu) for rows in (2048, 8192, 16384)]


def time_layer_norm(kernel: str, dtype: torch.dtype, bucket: str, device: torch.device) -> Callable[[], Any]:
    C = int(bucket[1:])
    x, residual = torch.randn(2, 8192, C, device=device)

    def op(x: Tensor, weight: Tensor, residual: Tensor) -> Any:
        return fused_layernorm.layer_norm(x, weight, residual=residual, out_dtype=dtype)

    return pass_of(kernel, op, [x.to(dtype), torch.rand(C, device=device), residual])


def layer_norm(size: Sizes, device: torch.device, compiled: bool) -> Entry:
    """bf16 in and out; weight and bias are fp32 for ours, and bf16 for the peers, which would have to cast them."""

    def inputs() -> dict[str, Tensor]:
        x = torch.randn(size.rows, size.C, device=device).to(size.dtype)
        return {"x": x, "weight": torch.rand(size.C, device=device), "bias": torch.rand(size.C, device=device)}

    def of_one_dtype() -> dict[str, Tensor]:
        return {name: tensor.to(size.dtype) for name, tensor in inputs().items()}

    liger = liger_function("liger_layer_norm")
    ops = peers(
        reference.layer_norm,
        compiled,
        liger=liger and (lambda x, weight, bias: liger(x, weight, bias, 1e-5)),
    )
    e = size.dtype.itemsize
    forward = flops.layer_norm_forward(size.rows, size.C, e, bias=True)
    backward = flops.layer_norm_backward(size.rows, size.C, e, bias=True)
    return Entry(
        "layer_norm",
        f"{size.rows} x {size.C}",
        total(forward, backward),
        lambda: check(fused_layernorm.layer_norm, reference.layer_norm, inputs()),
        timed({OURS: fused_layernorm.layer_norm}, inputs) | timed(ops, of_one_dtype),
    )


def layer_norm_residual(size: Sizes, device: torch.device, compiled: bool) -> Entry:
    """As in a block under autocast: low-precision branch, fp32 residual stream, both outputs with a gradient."""

    def inputs() -> dict[str, Tensor]:
        x, residual = torch.randn(2, size.rows, size.C, device=device)
        return {"x": x.to(size.dtype), "residual": residual, "weight": torch.rand(size.C, device=device)}

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return fused_layernorm.layer_norm(x, weight, residual=residual)

    def eager(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return reference.layer_norm(x, weight, residual=residual)

    e, rows, C = size.dtype.itemsize, size.rows, size.C
    # Forward reads x and residual, writes y and the sum; backward reads dy, dsum and the sum, writes dx and dresidual.
    moved = rows * C * ((2 * e + 2 * 4) + (2 * e + 3 * 4)) + 2 * 8 * rows + 3 * 4 * C
    return Entry(
        "layer_norm + residual",
        f"{rows} x {C}",
        flops.Work(0, moved),
        lambda: check(ours, eager, inputs()),
        timed({OURS: ours} | peers(eager, compiled), inputs),
    )
