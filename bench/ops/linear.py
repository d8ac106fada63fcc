"""Linear layers and the MLP: launch cases and tuning families."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.compiler import ranking
from bench.ops.common import BF16, FP16, FP32, TUNED_WIDTHS, Case, Family, backward, leaf
from fastgpt.hardware.cards import Gpu
from fastgpt.kernels import fused_linear, matmul, runtime, tuning
from fastgpt.kernels.working_copy import gradients_in_place

# ---------------------------------------------------------------- launch cases: the public operations


def launch_mlp(
    dtype: torch.dtype,
    *,
    C: int = 128,
    rows: int = 2048,
    bias: bool = True,
    conv1d: bool = False,
    stream: torch.dtype | None = None,
    in_place: bool = False,
    **options: Any,
) -> None:
    """An MLP with fp32 masters. Few columns, as PyTorch computes what is cuBLAS's; the tokens are enough to be split."""

    def weight(out: int, into: int) -> Tensor:
        return leaf(into, out, dtype=FP32).t() if conv1d else torch.nn.Parameter(torch.zeros(out, into))

    w_fc, w_proj = weight(2 * C, C), weight(C, 2 * C)
    b_fc, b_proj = (leaf(size, dtype=FP32) if bias else None for size in (2 * C, C))
    residual = None if stream is None else leaf(rows, C, dtype=stream)
    if in_place:
        w_fc.grad, w_proj.grad = torch.zeros(2 * C, C), torch.zeros(C, 2 * C)
    with gradients_in_place() if in_place else nullcontext():
        backward(fused_linear.mlp(leaf(rows, C, dtype=dtype), w_fc, b_fc, w_proj, b_proj, residual=residual, **options))


def launch_activation(name: str, dtype: torch.dtype, **options: Any) -> None:
    """``name``, of an operation of fused_linear: looked up at the call, as the emulator puts one that compares in its place."""
    x, weight, bias = leaf(256, 128, dtype=dtype), leaf(256, 128, dtype=FP32), leaf(256, dtype=FP32)
    backward(getattr(fused_linear, name)(x, weight, bias, **options))


def launch_one_column() -> None:
    """A weight and a bias of one row, whose sizes triton takes for constants."""
    weight, bias = leaf(1, 16, dtype=FP32), leaf(1, dtype=FP32)
    backward(fused_linear.linear(leaf(2049, 16, dtype=FP16), weight, bias, dropout_p=0.1, accumulate="fp16"))


def cases() -> Iterator[Case]:
    everything: dict[str, Any] = {"stream": FP32, "dropout_p": 0.1, "approximate": "none"}
    for dtype, name in ((BF16, "bf16"), (FP16, "fp16")):
        yield f"linear {name} mlp", partial(launch_mlp, dtype, bias=False)
        yield f"linear {name} mlp bias", partial(launch_mlp, dtype)
        yield f"linear {name} mlp conv1d all options", partial(launch_mlp, dtype, conv1d=True, **everything)
        yield f"linear {name} mlp odd", partial(launch_mlp, dtype, C=99, rows=1999, **everything)
        yield f"linear {name} gelu alone", partial(launch_activation, "linear_gelu", dtype, approximate="none")
        yield f"linear {name} mlp relu2", partial(launch_mlp, dtype, activation="relu2", stream=FP32)
        yield f"linear {name} relu2 alone", partial(launch_activation, "linear_relu2", dtype)
    yield "linear bf16 mlp in place", partial(launch_mlp, BF16, rows=512, in_place=True)
    fast: dict[str, Any] = {"accumulate": "fp16"}
    yield "linear fp16-fast mlp", partial(launch_mlp, FP16, bias=False, in_place=True, **fast)
    yield "linear fp16-fast mlp bias", partial(launch_mlp, FP16, stream=FP32, **fast)
    yield "linear fp16-fast mlp relu2", partial(launch_mlp, FP16, activation="relu2", stream=FP32, **fast)
    yield "linear fp16-fast mlp conv1d all options", partial(launch_mlp, FP16, conv1d=True, **everything, **fast)
    yield "linear fp16-fast one column", launch_one_column
    yield "linear fp16-fast mlp odd", partial(launch_mlp, FP16, C=99, rows=1999, in_place=True, **everything, **fast)


# ---------------------------------------------------------------- tuning families: one product each

LINEAR_WIDTHS = TUNED_WIDTHS[:3]
TOKENS = {384: 16384, 768: 8192, 1024: 2048}
"""Tokens in a micro-batch of GPT-2 40M, 124M and 350M on 12 GB, by width. Half and twice as many stand for the bucket, too."""
_FORWARD = ((3, 1), (1, 1), (1, 4))  # without the MLP's first, whose epilogue is "gelu"
SHAPES = {
    "none": (*_FORWARD, (1, 3)),  # also the input gradients, where N and K have changed places
    "bias": _FORWARD,
    "residual": ((1, 1), (1, 4)),
    "gelu": ((4, 1),),
    "dgelu": ((4, 1),),
    "weight_grad": (*_FORWARD, (4, 1)),
    "weight_grad_bias": (*_FORWARD, (4, 1)),
}
"""(N, K) of the weights of GPT-2's blocks, in units of the width, by the kind of the product."""


def linear_sizes(bucket: str) -> tuple[int, int]:
    """(N, K) of "N3072 K768"."""
    N, K = (int(word[1:]) for word in bucket.split())
    return N, K


def typical_tokens(bucket: str) -> int:
    """Tokens in a micro-batch of the model that has this matrix: its matmul is timed with as many."""
    return TOKENS.get(min(linear_sizes(bucket)), 8192)


def families() -> Iterator[Family]:
    for kernel in tuning.spaces():
        if not kernel.startswith("linear"):
            continue
        kind, fast = kernel.split(".")[1], kernel.startswith("linear_fast")
        grad = kind.startswith("weight_grad")
        known = [
            matmul.linear_bucket(n * C, k * C, matmul.FEWEST_TOKENS) for C in LINEAR_WIDTHS for n, k in SHAPES[kind]
        ]
        buckets = tuple(bucket for bucket in known if bucket is not None)
        for dtype in (FP16,) if fast else (BF16, FP16):
            case = partial(_launch_product, kind, dtype, fast)
            # Adding takes registers, and so do sums of columns: some tiles spill only then.
            heavy = {"add": True} if grad else {"sums": True} if kind == "dgelu" else None
            cases = (case,) if heavy is None else (case, partial(case, **heavy))
            relu2: dict[str, Any] = {"act": "relu2_fp16" if dtype == FP16 else "relu2"}
            rest = {
                "none": ({"transposed": True},),
                "gelu": ({"bias": False}, {"save": False}, {"save": dtype == FP16, **relu2}),
                "dgelu": ({"sums": True, **relu2},),
            }.get(kind, ())
            timed, clocks = partial(time_linear, kernel, dtype), partial(clocks_linear, kernel)
            yield Family(
                kernel, dtype, buckets, cases, timed, clocks, rest=tuple(partial(case, **more) for more in rest)
            )


def clocks_linear(kernel: str, bucket: str, found: ranking.Facts, gpu: Gpu) -> list[tuple[float, float]]:
    (N, K), usual = linear_sizes(bucket), typical_tokens(bucket)
    return [ranking.linear_time(kernel, found, N, K, tokens, gpu) for tokens in (usual // 2, usual, usual, 2 * usual)]


def _launch_product(kind: str, dtype: torch.dtype, fast: bool, **options: Any) -> None:
    product(kind, dtype, fast, **options)()


def product(
    kind: str,
    dtype: torch.dtype,
    fast: bool,
    N: int = 256,
    K: int = 256,
    tokens: int = matmul.FEWEST_TOKENS,
    device: torch.device | str = "cpu",
    *,
    bias: bool = True,
    save: bool = True,
    add: bool = False,
    transposed: bool = False,
    sums: bool = False,
    act: str = "gelu",
) -> Callable[[], Any]:
    """A function that computes the product of a bucket ``N.. K..`` and its epilogue on random operands and returns the results.

    Options of one kind only: ``bias`` and ``save`` (the pre-activation) of "gelu"; ``transposed``, an input gradient, of
    "none"; ``sums``, with a bias gradient, of "dgelu"; ``add``, to a gradient that is already there, of weight gradients;
    ``act``, which of matmul.ACTIVATIONS, of "gelu" and "dgelu"."""

    def make(*shape: int, like: torch.dtype = dtype) -> Tensor:
        if runtime.compile_only:
            return torch.empty(shape, dtype=like)
        return torch.randn(shape, device=device).to(like)

    if kind.startswith("weight_grad"):
        dz, x, dw = make(tokens, N), make(tokens, K), make(N, K, like=FP32)
        db = make(N, like=FP32) if kind.endswith("bias") else None

        def gradient() -> list[Tensor]:
            matmul.weight_grad(dz, x, dw, db, fast, add=add)
            return [dw] if db is None else [dw, db]

        return gradient
    x, shift = make(tokens, K), make(N, like=FP32) if bias and kind != "none" else None
    weight = (make(K, N) if transposed or kind == "dgelu" else make(N, K).t()).mul_(K**-0.5)
    if kind == "gelu":
        return lambda: matmul.matmul_gelu(x, weight, shift, act, fast, save)
    if kind == "dgelu":
        pre, totals = make(tokens, N), make(N, like=FP32) if sums else None
        return lambda: matmul.matmul_dgelu(x, weight, pre, act, fast, totals)
    residual = make(tokens, N, like=FP32) if kind == "residual" else None
    return lambda: matmul.matmul(x, weight, shift, residual, None, 0.0, fast)


def time_linear(kernel: str, dtype: torch.dtype, bucket: str, device: torch.device) -> Callable[[], Any]:
    prefix, kind = kernel.split(".")
    N, K = linear_sizes(bucket)
    return product(kind, dtype, prefix == "linear_fast", N, K, typical_tokens(bucket), device)


def default_at(family: Family, bucket: str, default: dict[str, int], sms: int) -> dict[str, int]:
    """The default config in this bucket: that of a weight gradient is split as its shape wants."""
    if "splits" not in default:
        return default
    N, K = linear_sizes(bucket)
    ways = matmul.splits(N, K, typical_tokens(bucket), default["block_m"], default["block_n"], sms)
    return {**default, "splits": ways}
