"""RMS norm: launch cases, tuning families, timing entries, alone and with the residual stream mixed before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

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
from bench.ops.layer_norm import WIDTHS, clocks_layer_norm, few_elements_a_thread
from bench.parity import check
from fastgpt.kernels import fused_layernorm, fused_rmsnorm, reference
from fastgpt.performance import flops


def launch_rms_norm(
    C: int,
    x: torch.dtype,
    residual: torch.dtype | None = None,
    weight: torch.dtype | None = None,
    mixed: bool = False,
    rows: int = 8192,
    **options: Any,
) -> None:
    """``mixed``: with scale, x0 and x0_scale."""
    rows = min(rows, 2**23 // C)  # the host code may touch its outputs
    given: dict[str, Any] = {}
    if residual is not None:
        given["residual"] = leaf(rows, C, dtype=residual)
    if mixed:
        given |= {
            "scale": leaf(1, dtype=FP32),
            "x0": leaf(rows, C, dtype=residual or x),
            "x0_scale": leaf(1, dtype=FP32),
        }
    gain = None if weight is None else leaf(C, dtype=weight)
    backward(fused_rmsnorm.rms_norm(leaf(rows, C, dtype=x), gain, **given, **options))


def cases() -> Iterator[Case]:
    for C in WIDTHS:
        # A block's norms under bf16 autocast: bf16 branch, fp32 residual stream, bf16 output.
        yield f"rms_norm C{C}", partial(launch_rms_norm, C, BF16, FP32, out_dtype=BF16)
        yield f"rms_norm C{C} mixed", partial(launch_rms_norm, C, BF16, FP32, mixed=True, out_dtype=BF16)
        everything: dict[str, Any] = {"weight": FP32, "mixed": True, "dropout_p": 0.1}
        yield f"rms_norm C{C} all options", partial(launch_rms_norm, C, BF16, FP32, out_dtype=BF16, **everything)
    for dtype, name in SHORT.items():
        yield f"rms_norm {name} C768", partial(launch_rms_norm, 768, dtype, weight=dtype)
        yield f"rms_norm {name} C768 residual", partial(launch_rms_norm, 768, dtype, dtype)
        yield f"rms_norm {name} C768 mixed", partial(launch_rms_norm, 768, dtype, FP32, mixed=True)
    # The embedding's sum under autocast: normed for the stream, and mixed with itself before the first block.
    yield "rms_norm C768 embedding", partial(launch_rms_norm, 768, FP32)
    yield "rms_norm C768 first", partial(launch_rms_norm, 768, FP32, mixed=True, out_dtype=BF16)
    yield "rms_norm fp32 C16384 all options", partial(launch_rms_norm, 16384, FP32, FP32, **everything)


def families() -> list[Family]:
    found = []
    for C in TUNED_WIDTHS:
        for dtype in (BF16, FP16, FP32):
            low = BF16 if dtype == FP32 else dtype
            norm = partial(launch_rms_norm, C, dtype, rows=256)
            inside = partial(norm, FP32, mixed=True, out_dtype=dtype)  # dy then has this dtype
            everything = partial(inside, weight=FP32, dropout_p=0.1)
            first = partial(norm, mixed=True, out_dtype=low)
            for kernel in ("rms_norm.forward", "rms_norm.backward"):
                usual = first if dtype == FP32 and kernel == "rms_norm.forward" else inside
                bucket = fused_layernorm.layer_norm_bucket(C)
                timed, clocks = partial(time_rms_norm, kernel, dtype), partial(clocks_layer_norm, kernel, dtype)
                cases = (usual, everything, partial(norm, weight=FP32))
                worth = partial(few_elements_a_thread, kernel, C)
                found.append(Family(kernel, dtype, (bucket,), cases, timed, clocks, worth))
    return found


def time_rms_norm(kernel: str, dtype: torch.dtype, bucket: str, device: torch.device) -> Callable[[], Any]:
    x, residual, x0 = torch.randn(3, 8192, int(bucket[1:]), device=device)
    scale, x0_scale = torch.rand(2, device=device)

    def op(x: Tensor, residual: Tensor, scale: Tensor, x0: Tensor, x0_scale: Tensor) -> Any:
        mixed: dict[str, Any] = {"residual": residual, "scale": scale, "x0": x0, "x0_scale": x0_scale}
        return fused_rmsnorm.rms_norm(x, **mixed, out_dtype=dtype)

    return pass_of(kernel, op, [x.to(dtype), residual, scale, x0, x0_scale])


def rms_norm(size: Sizes, device: torch.device, compiled: bool) -> Entry:
    """bf16 in and out, without a weight; Liger's has one."""

    def inputs() -> dict[str, Tensor]:
        return {"x": torch.randn(size.rows, size.C, device=device).to(size.dtype)}

    liger, gain = liger_function("liger_rms_norm"), torch.ones(size.C, device=device, dtype=size.dtype)
    ops = peers(reference.rms_norm, compiled, liger=liger and (lambda x: liger(x, gain, 1e-6)))
    forward, backward = flops.rms_norm_forward, flops.rms_norm_backward
    return Entry(
        "rms_norm",
        f"{size.rows} x {size.C}",
        total(*(of(size.rows, size.C, size.dtype.itemsize) for of in (forward, backward))),
        lambda: check(fused_rmsnorm.rms_norm, reference.rms_norm, inputs()),
        timed({OURS: fused_rmsnorm.rms_norm} | ops, inputs),
    )


def rms_norm_mixed(size: Sizes, device: torch.device, compiled: bool) -> Entry:
    """As before a block under autocast: low-precision branch, fp32 stream and embedding, both outputs with a gradient."""

    def inputs() -> dict[str, Tensor]:
        x, residual, x0 = torch.randn(3, size.rows, size.C, device=device)
        scale, x0_scale = torch.rand(2, 1, device=device)
        return {"x": x.to(size.dtype), "residual": residual, "scale": scale, "x0": x0, "x0_scale": x0_scale}

    def parity() -> None:
        given = inputs()
        # The scales' gradients are one number each: with random gradients a sum that cancels, whose error is chance.
        along = given["x0"] + given["residual"]
        check(fused_rmsnorm.rms_norm, reference.rms_norm, given, upstream=(torch.randn_like(given["x"]), along))

    options: dict[str, Any] = {"stream": 4, "residual": True, "mixed": True}
    forward, backward = flops.rms_norm_forward, flops.rms_norm_backward
    return Entry(
        "rms_norm + residual + x0",
        f"{size.rows} x {size.C}",
        total(*(of(size.rows, size.C, size.dtype.itemsize, **options) for of in (forward, backward))),
        parity,
        timed({OURS: fused_rmsnorm.rms_norm} | peers(reference.rms_norm, compiled), inputs),
    )
